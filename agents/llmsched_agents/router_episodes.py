"""What the learned router is trained on: episodes of clusters, and what a router comes to on them beside a reference."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from llmsched_agents.router_agent import RouterNetwork
from llmsched_baselines.routers import Door, make_router
from llmsched_env import checks
from llmsched_env.cluster.metrics import call_metrics
from llmsched_env.cluster.routing import RouterRule, run_cluster
from llmsched_env.cluster.scenarios import load_cluster_scenario
from llmsched_env.cluster.simulator import ClusterSim
from llmsched_env.cluster.sinks import KeepAll
from llmsched_env.errors import ConfigError

MISS_FLOOR = 0.02
"""Share of the calls that is added to SLO misses before the logarithm: below it, few calls decide."""
SEEDS_OF_A_TRAINING, FIRST_VALIDATION_SEED = 10**6, 10**9
"""Episodes of training and of validation have plain integers for seeds; those of tables are drawn, from 2^63 of them."""


@dataclass(frozen=True, slots=True)
class RouterTraining:
    """What a training does; the same values give the same router.

    Attributes:
        scenarios: names; one episode of each in a generation. One that is named twice has two, and counts twice.
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

    scenarios: tuple[str, ...] = ("drifting", "drifting", "equal", "heterogeneous", "failing")
    seconds: float = 450.0
    loads: tuple[float, float] = (0.8, 1.05)
    replicas: tuple[int, ...] = (4, 4, 4, 4, 4, 2, 8)
    first_generations: int = 24
    generations: int = 10
    population: int = 12
    sigma: float = 0.15
    hidden: int = 12
    miss_weight: float = 0.12
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
        lowest = {"first_generations": 1, "generations": 0, "population": 4, "hidden": 1, "validate_every": 1, "validation": 1, "seed": 0}
        for name, least in lowest.items():
            checks.integer(f"training.{name}", getattr(self, name), low=least, high=900 if name == "seed" else 9_000)
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
