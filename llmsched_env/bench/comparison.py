"""A comparison as a list of runs: every policy at every rate on every seed, and where the rows are kept."""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmsched_agents.lookup import NamedPolicy
from llmsched_baselines import Setting
from llmsched_baselines.overrides import Overrides
from llmsched_env import __version__
from llmsched_env.backends import make_backend
from llmsched_env.batch_runner import Run, run_batch
from llmsched_env.engine.simulator import SimBackend
from llmsched_env.engine_changes import engine_with
from llmsched_env.engine_config import EngineConfig, EpisodeLimits
from llmsched_env.errors import ConfigError, policy_named
from llmsched_env.fluid import stability_boundary
from llmsched_env.metrics import Summary, summarize, ttft
from llmsched_env.perf.base import CalibrationRangeWarning
from llmsched_env.runner import EpisodeResult, Policy, run_episode
from llmsched_env.types import FloatArray, Workload
from llmsched_env.workload import Scenario

SUMMARY_FILE = "summary.csv"
SETTINGS_FILE = "settings.json"
OVERRULED = 0.05
"""Share of iterations in which the engine had to override a policy above which a reader must know."""
SAMPLE = 2_000
"""Requests that stand for a scenario where it must be known again."""


@dataclass(frozen=True, slots=True)
class Row:
    """One finished run: one line of ``summary.csv``; the columns are these fields, the figures' own in their place."""

    scenario: str
    policy: str
    rate: float
    seed: int
    figures: Summary
    wall_seconds: float
    known_lengths: bool
    notes: str

    @property
    def task(self) -> Task:
        return Task(self.policy, self.rate, self.seed)


@dataclass(frozen=True, slots=True, order=True)
class Task:
    """One run of the comparison."""

    policy: str
    rate: float
    seed: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """What is compared. The same seed gives every policy the same requests.

    Attributes:
        rates: requests/s.
        num_requests: requests of one run.
        source: the trace file, if the workload is one.
        policies: what runs, by name in tables.
    """

    scenario: Scenario
    policies: Mapping[str, NamedPolicy]
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    num_requests: int
    overrides: Overrides = field(default_factory=Overrides)
    source: str = ""

    @property
    def engine(self) -> EngineConfig:
        """The scenario's engine with the user's settings, before a policy's own preset."""
        return engine_with(self.scenario.engine, self.overrides.engine)

    @property
    def boundary(self) -> float:
        """Fluid stability boundary of these lengths on that engine, requests/s."""
        return stability_boundary(self.scenario.statistics, self.engine)

    def tasks(self) -> list[Task]:
        """Highest rate first: the longest runs must not come last. Policies side by side within a seed."""
        return [Task(p, r, s) for r in sorted(self.rates, reverse=True) for s in self.seeds for p in self.policies]

    def workload(self, rate: float, seed: int) -> Workload:
        return self.scenario.generate(seed, rate=rate, num_requests=self.num_requests)

    def policy(self, name: str, rate: float) -> Policy:
        """Raises ConfigError where the policy cannot be built at this rate."""
        setting = Setting(
            statistics=self.scenario.statistics,
            rate=rate,
            engine=self.scenario.engine,
            horizon_seconds=self.num_requests / rate,
            overrides=self.overrides.engine,
        )
        try:
            return self.policies[name].build(setting, **self.overrides.options(name))
        except ConfigError as error:
            raise type(error)(f"policy {name!r} at rate {rate:g}: {error}") from error

    def check(self) -> None:
        """Build what every run needs, so that a refusal comes before the first run and not in the middle.

        Raises:
            ConfigError: a policy cannot be built at one of the rates, or a request can never be served.
        """
        _ = self.boundary
        policies = [[self.policy(name, rate) for rate in self.rates] for name in self.policies]
        backend = make_backend("sim")
        for seed in self.seeds:
            workload = self.workload(self.rates[0], seed)
            for at_rates in policies:
                first = at_rates[0]
                backend.reset(workload, first.layout, first.engine, EpisodeLimits(), reveal_output_length=first.known_lengths)
        for at_rates in policies:
            # One short episode compiles the engine, before several processes want it at once.
            with policy_named(f"policy {at_rates[0].name!r}"):
                run_episode(at_rates[0], shortest_request(workload))

    def content(self) -> str:
        """Digest of what the scenario draws and runs on: a file or a registered name may stand for something else tomorrow."""
        sample = self.scenario.generate(0, num_requests=min(self.num_requests, SAMPLE))
        scenario = self.scenario
        digest = hashlib.sha256(repr((scenario.layout, scenario.known_layout, scenario.ttft_slo, scenario.tpot_slo)).encode())
        engine = self.engine
        fields = {f.name: getattr(engine, f.name) for f in dataclasses.fields(engine) if f.name != "time_model"}
        digest.update(repr((fields, engine.time_model.provenance)).encode())
        gaps = np.round(sample.arrival * scenario.rate, 6)  # in mean gaps: a trace stretched to another rate is the same
        predicted = () if sample.predicted_tokens is None else (sample.predicted_tokens,)
        for values in (gaps, sample.prompt_tokens, sample.output_tokens, sample.type_id, *predicted):
            digest.update(np.ascontiguousarray(values).tobytes())
        if sample.tenant is not None:
            digest.update(sample.tenant.tobytes() + repr(scenario.statistics.tenants).encode())
        return digest.hexdigest()[:16]

    def describe(self) -> dict[str, Any]:
        """What must agree between a comparison and its resumption, as plain values."""
        return {
            "version": __version__,
            "scenario": self.scenario.name,
            "trace": self.source,
            "num_requests": self.num_requests,
            "set": {key: _plain(value) for key, value in self.overrides.items()},
            "content": self.content(),
            "policies": {name: [policy.text, digest] for name, policy in self.policies.items() if (digest := policy.digest())},
        }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def shortest_request(workload: Workload) -> Workload:
    """The shortest request alone."""
    i = int(np.argmin(workload.prompt_tokens.astype(np.int64) + workload.output_tokens))
    tenant = None if workload.tenant is None else workload.tenant[i : i + 1]
    predicted = None if workload.predicted_tokens is None else workload.predicted_tokens[i : i + 1]
    columns = (workload.prompt_tokens[i : i + 1], workload.output_tokens[i : i + 1], workload.type_id[i : i + 1])
    return Workload.of([0.0], *columns, tenant=tenant, predicted_tokens=predicted)


def run_tasks(comparison: Comparison, tasks: Sequence[Task]) -> Iterator[Row]:
    """The runs in order, each row as its run ends; a policy is built once for all its seeds."""
    policies: dict[tuple[str, float], Policy] = {}

    def policy_of(task: Task) -> Policy:
        key = (task.policy, task.rate)
        if key not in policies:
            policies[key] = comparison.policy(*key)
        return policies[key]

    results = run_batch(Run(policy_of(task), comparison.workload(task.rate, task.seed)) for task in tasks)
    for task in tasks:
        policy = policy_of(task)  # built here, as what refuses to be built names itself
        with policy_named(f"policy {task.policy!r} at rate {task.rate:g}, seed {task.seed}"):
            result = next(results)
        yield _row(comparison, task, policy, result)


def finished_rows(comparison: Comparison, tasks: Sequence[Task]) -> list[Row]:
    """``run_tasks`` for a worker process, which can only hand back what is complete."""
    with extrapolation_reported():
        return list(run_tasks(comparison, tasks))


def chunks(tasks: Sequence[Task], size: int) -> list[list[Task]]:
    """Tasks of one policy and rate, at most ``size`` at a time; the highest rate first, policies side by side."""
    groups: dict[tuple[float, str], list[Task]] = {}
    for task in tasks:
        groups.setdefault((task.rate, task.policy), []).append(task)
    parts = [(rate, i, group[i : i + size]) for (rate, _), group in groups.items() for i in range(0, len(group), size)]
    return [part for _, _, part in sorted(parts, key=lambda part: (-part[0], part[1]))]


def extrapolation_reported() -> warnings.catch_warnings[None]:
    """Rows say how many iterations had to be extrapolated and the report what share: no warning on top."""
    return warnings.catch_warnings(action="ignore", category=CalibrationRangeWarning)


def _row(comparison: Comparison, task: Task, policy: Policy, result: EpisodeResult) -> Row:
    scenario = comparison.scenario
    limits = {"ttft_limit": scenario.ttft_slo, "tpot_limit": scenario.tpot_slo}
    figures = summarize(result.log, result.counters, kv_capacity=policy.engine.kv_capacity, **limits)
    notes = [policy.notes] if policy.notes else []
    if figures.truncated:
        notes.append("stopped at max_iterations")
    if figures.drain_iterations > OVERRULED * figures.iterations:
        share = 100 * figures.drain_iterations / figures.iterations
        notes.append(f"scheduled nothing in {share:.0f} % of the iterations, in which the engine then admitted on its own")
    if figures.rejected:
        notes.append(f"{figures.rejected} requests rejected")
    return Row(
        scenario=scenario.name,
        policy=task.policy,
        rate=task.rate,
        seed=task.seed,
        figures=figures,
        wall_seconds=result.wall_seconds,
        known_lengths=policy.known_lengths,
        notes="; ".join(notes),
    )


@dataclass(frozen=True, slots=True)
class Recording:
    """One run in detail, for the plots over time.

    Attributes:
        time: (T,) seconds, end of each step.
        kv: (T,) KV reserved, share of the capacity.
        waiting: (T,) requests outside.
        eviction_times: (E,) seconds, one entry an eviction.
        ttft: (N,) seconds, sorted, requests with a first token.
    """

    task: Task
    time: FloatArray
    kv: FloatArray
    waiting: FloatArray
    eviction_times: FloatArray
    ttft: FloatArray


def record(comparison: Comparison, task: Task) -> Recording:
    """Run a task again and keep its course; the same seed gives the same run."""
    policy, backend = comparison.policy(task.policy, task.rate), SimBackend()
    policy.reset()
    workload = comparison.workload(task.rate, task.seed)
    view = backend.reset(workload, policy.layout, policy.engine, EpisodeLimits(), reveal_output_length=policy.known_lengths)
    now, last = backend.record, backend.record.report
    steps: list[tuple[float, int, int, int]] = []  # (end, KV, waiting, evictions)
    starts: list[float] = []
    with extrapolation_reported():
        while not backend.done:
            backend.advance(policy.decide(view))
            kv = view.kv_used if last.idle else last.kv_reserved
            steps.append((now.clock, kv, now.num_waiting, last.evicted + last.preempted))
            starts.append(last.start)
        first = ttft(backend.log())
    course = np.array(steps, dtype=np.float64)
    return Recording(
        task=task,
        time=course[:, 0],
        kv=course[:, 1] / policy.engine.kv_capacity,
        waiting=course[:, 2],
        eviction_times=np.repeat(starts, course[:, 3].astype(np.int64)),
        ttft=np.sort(first[np.isfinite(first)]),
    )


def largest_stable(rates: Sequence[float], boundary: float) -> float:
    """The highest rate inside the stability region; the lowest one if none is."""
    return max((r for r in rates if r < boundary), default=min(rates))
