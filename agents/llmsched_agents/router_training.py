"""Training of the learned router by an evolution strategy on whole episodes, with common random numbers.

Every generation draws episodes: one of each scenario, at loads and numbers of replicas of their own. All candidates of the generation
route the same calls on the same clusters, and are held against the reference router there. The mean of the search distribution is tried on
episodes of its own now and then; the best of these is what is kept. What was measured is written down after every generation, so
that a training that was interrupted goes on where it was and ends in the same weights.

The strategies are those of the package cmaes: Hansen, "The CMA evolution strategy: a tutorial", arXiv:1604.00772; Ros and Hansen,
"A simple modification in CMA-ES achieving linear time and space complexity", PPSN 2008.
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

from llmsched_agents.checkpoint import CONFIG, RECORD, WEIGHTS
from llmsched_agents.router_agent import RouterNetwork, save_router
from llmsched_agents.router_episodes import FIRST_VALIDATION_SEED, SEEDS_OF_A_TRAINING, Episode, RouterTraining, objective
from llmsched_env import __version__, checks
from llmsched_env.errors import ConfigError, require

STATE = "state.json"
"""In the folder of a training: what was measured so far."""
OF_A_TRAINING = (STATE, WEIGHTS, CONFIG, RECORD)
"""What a training leaves in its folder."""


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
        start_record: how these were trained; stands in the record of this training.

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
        start_record: Mapping[str, Any] | None = None,
    ) -> None:
        require("safetensors.numpy", "agents")
        self._cmaes = require("cmaes", "agents")
        self.training, self.folder, self._report, self._start_record = training, folder, report, start_record
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
                names = [name for _ in range(self.training.validation) for name in self.training.scenarios]
                self._validation = [Episode(self.training, name, FIRST_VALIDATION_SEED + k) for k, name in enumerate(names)]
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
            made.append(Episode(training, name, SEEDS_OF_A_TRAINING * (1 + training.seed) + 100 * generation + k, load, replicas))
        return made

    # --- what is written down ----------------------------------------------------------------------------
    def record(self) -> dict[str, Any]:
        """How the router was trained: ``trials`` as in ``Progress``, ``curve`` the best and the mean candidate of every generation."""
        numpy_version, cmaes_version = np.__version__, self._cmaes.__version__
        return {
            "training": self.training.as_dict(),
            "versions": {"llmsched-env": __version__, "numpy": numpy_version, "cmaes": cmaes_version},
            "wall_seconds": round(self.progress.seconds, 1),
            "generations": len(self.progress.values),
            "trials": [list(trial) for trial in self.progress.trials],
            "started_from": None if self._start_record is None else dict(self._start_record),
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
