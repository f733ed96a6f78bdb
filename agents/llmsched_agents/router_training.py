"""Training of the learned router by an evolution strategy on whole episodes, with common random numbers.

Every generation draws episodes: one of each scenario, at loads and numbers of replicas of their own. All candidates of the generation route the same calls
on the same clusters, and are held against the reference router there. The mean of the search distribution is tried on episodes of its own now
and then; the best of these is what is kept. What was measured is written down after every generation, so that a training that was interrupted
goes on where it was and ends in the same bytes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmsched_agents.router_agent import RouterNetwork, save_router
from llmsched_baselines.routers import Door, make_router
from llmsched_env import __version__, checks
from llmsched_env.cluster.metrics import call_metrics
from llmsched_env.cluster.routing import RouterRule, run_cluster
from llmsched_env.cluster.scenarios import cluster_scenario_names, load_cluster_scenario
from llmsched_env.cluster.simulator import ClusterSim
from llmsched_env.cluster.sinks import KeepAll
from llmsched_env.errors import ConfigError, require

STATE = "state.json"
"""In the folder of a training: what was measured so far."""
MISS_FLOOR = 0.02
"""Share of the calls that is added to SLO misses before the logarithm: below it, few calls decide."""


@dataclass(frozen=True, slots=True)
class RouterTraining:
    """What a training does; the same values give the same router.

    Attributes:
        scenarios: names; one episode of each in a generation.
        seconds: in which sessions begin, of one episode; figures leave out the first quarter, at most 120 s.
        loads: shares of a scenario's rate, lowest and highest; drawn for each episode.
        replicas: numbers to draw from, for each episode; a number may stand there several times.
        first_generations: of the cost's weights and the network's output and direct weights alone, by CMA-ES, the hidden layer as drawn.
        generations: after them, of all weights, by sep-CMA-ES.
        population: candidates in a generation.
        sigma: standard deviation to begin with, of all weights; the second phase begins with half of it.
        hidden: units of the network.
        miss_weight: of log SLO misses beside log latency.
        worse_weight: of the part of a scenario's objective that is above the reference.
        validate_every: generations between two trials of the mean, on ``validation`` episodes of each scenario.
        seed: of everything that is drawn. Episodes have plain integers for seeds, which no table of results uses
            (``llmsched_env.bench.seeds``).
        reference: the router to be held against.
        reference_options: its options in each scenario, by name; as it ships where there are none.
    """

    scenarios: tuple[str, ...] = field(default_factory=lambda: tuple(cluster_scenario_names()))
    seconds: float = 450.0
    loads: tuple[float, float] = (0.85, 1.05)
    replicas: tuple[int, ...] = (4, 4, 4, 4, 2, 8)
    first_generations: int = 40
    generations: int = 60
    population: int = 16
    sigma: float = 0.15
    hidden: int = 8
    miss_weight: float = 0.1
    worse_weight: float = 1.0
    validate_every: int = 5
    validation: int = 3
    seed: int = 0
    reference: str = "prefix-affinity"
    reference_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.scenarios:
            load_cluster_scenario(name)
        if not self.scenarios or not self.replicas:
            raise ConfigError("training.scenarios, training.replicas: none given, must be at least one each")
        checks.integers("training.replicas", list(self.replicas), low=1, high=1_000)
        checks.number("training.seconds", self.seconds, low=1.0, unit="seconds")
        low = checks.number("training.loads[0]", self.loads[0], high=10.0, open_low=True)
        checks.number("training.loads[1]", self.loads[1], low=low, high=10.0)
        for name, least in (("first_generations", 1), ("generations", 0), ("population", 4), ("hidden", 1), ("validate_every", 1), ("validation", 1), ("seed", 0)):
            checks.integer(f"training.{name}", getattr(self, name), low=least, high=10**6)
        checks.number("training.sigma", self.sigma, high=10.0, open_low=True)
        checks.number("training.miss_weight", self.miss_weight, high=1e3)
        checks.number("training.worse_weight", self.worse_weight, high=1e3)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as JSON gives them back."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return found


class Episode:
    """The calls of one seed on the cluster of that seed, kept in memory so that they can be routed again and again."""

    def __init__(self, training: RouterTraining, scenario: str, seed: int, load: float = 1.0, replicas: int = 4) -> None:
        made = load_cluster_scenario(scenario)
        rate = load * made.total_rate(replicas)
        num_calls = max(1, round(rate * training.seconds))
        spec = made.cluster(seed, replicas=replicas, rate=rate, num_calls=num_calls)
        self.scenario, self.seconds = scenario, training.seconds
        self.door = Door.of(spec, made.source, rate)
        self._sim, self._apps = ClusterSim(spec), made.source.app_tokens
        self._chunks = list(made.source.chunks(seed, rate=rate, num_calls=num_calls))
        self._limits = spec.ttft_limit, spec.tpot_limit
        reference = make_router(training.reference, self.door, **training.reference_options.get(scenario, {}))
        self.reference = self.figures(reference.rule)

    def figures(self, rule: RouterRule) -> tuple[float, float]:
        """Mean latency in seconds and share of calls that miss a limit, of those that arrive after the warm-up and while sessions begin."""
        sink = KeepAll()
        run_cluster(self._sim, rule, self._chunks, self._apps, sink)
        rows = sink.rows()
        rows = rows[(rows["arrival"] >= min(120.0, self.seconds / 4)) & (rows["arrival"] < self.seconds)]
        metrics = call_metrics(rows)
        within = (metrics["ttft"] <= self._limits[0]) & ~(metrics["tpot"] > self._limits[1])  # a single token has no TPOT
        return float(np.nanmean(metrics["latency"])), 1.0 - float(np.mean(within))

    def against_reference(self, network: RouterNetwork) -> tuple[float, float]:
        """Logarithms of mean latency and of SLO misses over those of the reference."""
        latency, misses = self.figures(network.rule(self.door))
        return float(np.log(latency / self.reference[0])), float(np.log((misses + MISS_FLOOR) / (self.reference[1] + MISS_FLOOR)))


def objective(training: RouterTraining, results: Sequence[tuple[str, float, float]]) -> float:
    """What is minimised, from (scenario, log latency, log misses) of several episodes; the reference has 0."""
    total = 0.0
    for name in training.scenarios:
        own = [(latency, misses) for scenario, latency, misses in results if scenario == name]
        latency, misses = np.mean(own, axis=0)
        total += latency + training.miss_weight * misses
        total += training.worse_weight * (max(latency, 0.0) + training.miss_weight * max(misses, 0.0))
    return float(total / len(training.scenarios))


@dataclass(slots=True)
class Progress:
    """Where a training stands, as it is written down.

    Attributes:
        values: of every generation so far, what its candidates came to.
        trials: (generation, objective) of the mean of the search distribution on the validation episodes; generation 0: the start.
        seconds: of wall clock so far.
    """

    values: list[list[float]] = field(default_factory=list)
    trials: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0


class RouterTrainer:
    """A training in a folder.

    Args:
        folder: gets ``state.json`` and the best router so far. Where there is a state of the same training, it goes on there.
        report: called after every generation with a line, the generations done and all of them.
        start: weights to begin with; None: ``RouterNetwork.start``. A training that goes on must be given the same.

    Raises:
        ConfigError: a state of another training.
        MissingExtraError: cmaes or safetensors is not installed.
    """

    def __init__(
        self,
        training: RouterTraining,
        folder: Path,
        report: Callable[[str, int, int], None] = lambda line, done, total: None,
        start: RouterNetwork | None = None,
    ) -> None:
        require("safetensors.numpy", "agents")
        self._cmaes = require("cmaes", "agents")
        self.training, self.folder, self._report = training, folder, report
        self.start = start or RouterNetwork.start(training.hidden, training.seed)
        self.progress = Progress()
        self.best = self.start
        self._validation: list[Episode] = []
        if (folder / STATE).exists():
            self._read()

    def run(self) -> RouterNetwork:
        """Train to the end; the best router, which lies in the folder as well. What is measured already is not measured again."""
        training = self.training
        total = training.first_generations + training.generations
        mean, best = self.start.vector(), np.inf
        for generation, optimizer, open_ in self._optimizers(mean):
            if generation % training.validate_every == 0:
                best = self._try(generation, mean, best)
            candidates = [optimizer.ask() for _ in range(training.population)]
            if generation == len(self.progress.values):
                began = time.perf_counter()
                episodes = self._episodes(generation)
                self.progress.values.append([self._value(_filled(mean, open_, x), episodes) for x in candidates])
                self.progress.seconds += time.perf_counter() - began
                self._write()
                least = min(self.progress.values[generation])
                self._report(f"generation {generation + 1}: best of its candidates {least:+.4f}", generation + 1, total)
            optimizer.tell(list(zip(candidates, self.progress.values[generation], strict=True)))
            mean[:open_] = optimizer.mean
        self._try(total, mean, best)
        return self.best

    def _optimizers(self, mean: npt.NDArray[np.float64]) -> Iterator[tuple[int, Any, int]]:
        """(generation, optimizer, how many weights it has, the first of ``mean``) of every generation."""
        training, cmaes = self.training, self._cmaes
        few = mean.size - self.start.hidden_bias.size - self.start.hidden_weight.size
        common = {"seed": training.seed, "population_size": training.population}
        first = cmaes.CMA(mean=mean[:few].copy(), sigma=training.sigma, **common)
        for generation in range(training.first_generations):
            yield generation, first, few
        if training.generations:
            second = cmaes.SepCMA(mean=mean.copy(), sigma=training.sigma / 2, **common)
            for generation in range(training.generations):
                yield training.first_generations + generation, second, mean.size

    def _value(self, vector: npt.NDArray[np.float64], episodes: Sequence[Episode]) -> float:
        try:
            network = RouterNetwork.from_vector(vector)
        except ConfigError:  # out of bounds
            return 1e3
        return objective(self.training, [(episode.scenario, *episode.against_reference(network)) for episode in episodes])

    def _try(self, generation: int, mean: npt.NDArray[np.float64], best: float) -> float:
        """Try the mean on the validation episodes, unless that has been done; the best objective so far."""
        known = dict(self.progress.trials)
        if generation not in known:
            began = time.perf_counter()
            if not self._validation:
                self._validation = [
                    Episode(self.training, name, 10**9 + k) for k in range(self.training.validation) for name in self.training.scenarios
                ]
            known[generation] = self._value(mean, self._validation)
            self.progress.trials.append((generation, known[generation]))
            self.progress.seconds += time.perf_counter() - began
        if known[generation] >= best:
            self._write()
            return best
        self.best = RouterNetwork.from_vector(mean.copy())
        self._write()
        save_router(self.folder, self.best, self.record())
        return known[generation]

    def _episodes(self, generation: int) -> list[Episode]:
        training = self.training
        rng = np.random.default_rng([training.seed, generation])
        made = []
        for k, name in enumerate(training.scenarios):
            load, replicas = float(rng.uniform(*training.loads)), int(rng.choice(training.replicas))
            made.append(Episode(training, name, 10**6 * (1 + training.seed) + 100 * generation + k, load, replicas))
        return made

    # --- what is written down ----------------------------------------------------------------------------
    def record(self) -> dict[str, Any]:
        """How the router was trained."""
        numpy_version, cmaes_version = np.__version__, self._cmaes.__version__
        return {
            "training": self.training.as_dict(),
            "versions": {"llmsched-env": __version__, "numpy": numpy_version, "cmaes": cmaes_version},
            "wall_seconds": round(self.progress.seconds, 1),
            "generations": len(self.progress.values),
            "trials": [list(trial) for trial in self.progress.trials],
            "curve": [[float(np.min(values)), float(np.mean(values))] for values in self.progress.values],
        }

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {"training": self.training.as_dict(), "start": self.start.vector().tolist(), **asdict(self.progress)}
        part = self.folder / (STATE + ".part")
        part.write_text(json.dumps(state) + "\n", encoding="utf-8")
        part.replace(self.folder / STATE)

    def _read(self) -> None:
        path = self.folder / STATE
        where = f"training: {path}"
        state = checks.json_object(where, checks.file_bytes(where, path))
        if state.get("training") != self.training.as_dict() or state.get("start") != self.start.vector().tolist():
            raise ConfigError(f"{where} is of another training: give the same options, or another folder")
        try:
            values = [[float(x) for x in row] for row in state["values"]]
            trials = [(int(generation), float(value)) for generation, value in state["trials"]]
            self.progress = Progress(values, trials, float(state["seconds"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{where} cannot be read ({error})") from error
        if any(len(row) != self.training.population for row in values):
            raise ConfigError(f"{where} has generations of another size than {self.training.population}")


def _filled(mean: npt.NDArray[np.float64], count: int, first: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """``mean`` with its first ``count`` weights replaced."""
    vector = mean.copy()
    vector[:count] = first
    return vector
