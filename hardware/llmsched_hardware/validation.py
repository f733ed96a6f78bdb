"""The same requests on the simulator and on a vLLM engine: what is run, and what the runs say about the simulator."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from llmsched_agents.lookup import NamedPolicy
from llmsched_baselines import Setting
from llmsched_env.backend import Backend
from llmsched_env.backends import make_backend
from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import ConfigError, require
from llmsched_env.fluid import stability_boundary
from llmsched_env.metrics import Summary
from llmsched_env.runner import Policy, run_episode
from llmsched_env.types import IntArray, IterationReport, LengthStatistics, Workload
from llmsched_env.workload import LengthModel, Scenario
from llmsched_env.workload.lengths import whole_tokens
from llmsched_env.workload.scenario import bucket_layout, hidden_layout

METRICS = (
    "throughput_tok_s",
    *(f"{name}_{what}" for name in ("latency", "ttft", "tpot") for what in ("mean", "p50", "p95", "p99")),
    "evictions",
)
RANKED = ("latency_mean", "latency_p99", "ttft_mean", "ttft_p99", "tpot_mean", "throughput_tok_s")
"""Metrics by which policies are ranked; throughput from large to small, the others from small to large."""
SIM, ENGINE, SCHEDULER = "sim", "vllm", "vllm-scheduler"


@dataclass(frozen=True, slots=True)
class Run:
    """One episode: a line of ``runs.csv``; the columns are these fields, the figures' own in their place.

    Attributes:
        backend: ``sim`` or ``vllm``; the latter ``repeat`` times.
        warm_up: not counted: on some devices the first run with a batch shape is slower.
        thinking_seconds: the policy's own time, which the measured clock does not count.
    """

    policy: str
    rate: float
    seed: int
    backend: str
    repeat: int
    warm_up: bool
    figures: Summary
    thinking_seconds: float
    known_lengths: bool
    notes: str

    @property
    def task(self) -> Task:
        return Task(self.policy, self.rate, self.seed, self.backend, self.repeat, self.warm_up)


@dataclass(frozen=True, slots=True)
class Task:
    """A run to be done."""

    policy: str
    rate: float
    seed: int
    backend: str
    repeat: int = 0
    warm_up: bool = False


@dataclass(frozen=True, slots=True)
class Schedules:
    """Whether two backends did the same, step by step: a line of ``schedules.csv``.

    Attributes:
        steps: of the simulator's episode, idle steps included.
        evictions: in it.
        identical: every report of every step and every request's times are equal.
        difference: the first one, in words.
    """

    policy: str
    rate: float
    seed: int
    backend: str
    steps: int
    evictions: int
    identical: bool
    difference: str


@dataclass(frozen=True, slots=True, eq=False)
class ScaledLengths(LengthModel):
    """Another model's lengths times ``scale``, then cut (the output first) to ``max_total`` tokens.

    Attributes:
        base: the lengths; statistics are transformed as samples are.
        scale: > 0.
        max_total: largest prompt + output, tokens, or None.
    """

    base: LengthModel
    scale: float = 1.0
    max_total: int | None = None

    def sample(self, rng: np.random.Generator, n: int) -> tuple[IntArray, IntArray, IntArray]:
        prompt, output, types = self.base.sample(rng, n)
        p, o, _ = whole_tokens(prompt * self.scale, output * self.scale, self.max_total)
        return p, o, types

    def statistics(self) -> LengthStatistics:
        own = self.base.statistics()
        p, o, _ = whole_tokens(own.prompt * self.scale, own.output * self.scale, self.max_total)
        source = f"{own.source}, lengths times {self.scale:g}" + (f", at most {self.max_total}" if self.max_total else "")
        return LengthStatistics.of(p, o, own.weight, own.type_id, source)


def on_engine(scenario: Scenario, engine: EngineConfig, scale: float = 1.0, max_total: int | None = None) -> Scenario:
    """The scenario's requests, scaled and cut, on another engine."""
    rows = scenario.rows
    lengths = scenario.lengths
    if scale != 1.0 or max_total is not None:
        lengths = ScaledLengths(lengths, scale, max_total)
        if rows is not None:
            p, o, _ = whole_tokens(rows.prompt_tokens * scale, rows.output_tokens * scale, max_total)
            rows = replace(rows, prompt_tokens=p, output_tokens=o)
    statistics = lengths.statistics()
    known = scenario.known_layout if scenario.known_layout.by == "type" else bucket_layout(statistics)
    tenants = scenario.tenants if lengths is scenario.lengths else None
    layout = hidden_layout(statistics)
    return replace(scenario, lengths=lengths, rows=rows, engine=engine, layout=layout, known_layout=known, tenants=tenants)


@dataclass(frozen=True, slots=True)
class Validation:
    """What is compared.

    Attributes:
        scenario: on the calibrated engine (``on_engine``).
        policies: by name in tables.
        rates, seeds: every combination with a policy is run on the simulator and the engine; rates in requests/s.
        num_requests: of one run.
        warm_ups, repeats: runs on the engine that are not counted, and that are.
        options: of the policies, by name.
        alternate: an engine is built anew for each turn of each of its configurations, so that all policies meet the same drift of the
            machine; otherwise once for each configuration.
    """

    scenario: Scenario
    policies: Mapping[str, NamedPolicy]
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    num_requests: int
    repeats: int = 3
    warm_ups: int = 1
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    alternate: bool = False

    def policy(self, name: str, rate: float) -> Policy:
        """Raises ConfigError where the policy cannot be built at this rate."""
        scenario = self.scenario
        setting = Setting(scenario.statistics, rate, scenario.engine, horizon_seconds=self.num_requests / rate)
        try:
            return self.policies[name].build(setting, **self.options.get(name, {}))
        except ConfigError as error:
            raise type(error)(f"policy {name!r} at rate {rate:g}: {error}") from error

    def workload(self, rate: float, seed: int) -> Workload:
        return self.scenario.generate(seed, rate=rate, num_requests=self.num_requests)

    def tasks(self) -> list[Task]:
        """Simulator first; then the engine, policies taking turns so that drift of the machine meets them alike.

        Policies on one engine configuration stay together, another one means building the engine anew; in each turn, with ``alternate``.
        """
        places = list(itertools.product(self.rates, self.seeds))
        tasks = [Task(policy, rate, seed, SIM) for rate, seed in places for policy in self.policies]
        engines: list[tuple[EngineConfig, list[str]]] = []
        for name in self.policies:
            engine = self.policy(name, self.rates[0]).engine
            same = next((names for other, names in engines if other == engine), None)
            if same is None:
                engines.append((engine, [name]))
            else:
                same.append(name)
        turns = range(self.warm_ups + self.repeats)
        together = [names for _, names in engines]
        order = [(t, names) for t in turns for names in together] if self.alternate else [(t, names) for names in together for t in turns]
        for turn, names in order:
            warm_up = turn < self.warm_ups
            repeat = turn if warm_up else turn - self.warm_ups
            tasks += [Task(name, rate, seed, ENGINE, repeat, warm_up) for rate, seed in places for name in names]
        return tasks

    def check(self) -> None:
        """Refuse what cannot be run, before the first run.

        Raises:
            ConfigError: a policy that cannot be built, requests longer than the engine takes.
        """
        longest = max(_longest(self.workload(self.rates[0], seed)) for seed in self.seeds)
        limit = self.scenario.engine.max_model_len
        if longest > limit:
            raise ConfigError(
                f"--scenario {self.scenario.name}: requests of up to {longest:,} tokens, the engine takes {limit:,}; "
                f"give --length-scale {math.floor(100 * limit / longest) / 100:g} (keeps the shape of the lengths) or "
                f"--max-total-tokens {limit} (cuts the longest)"
            )
        for name in self.policies:
            for rate in self.rates:
                self.policy(name, rate)

    @property
    def boundary(self) -> float:
        """Fluid stability boundary, requests/s."""
        return stability_boundary(self.scenario.statistics, self.scenario.engine)


def longest_request(scenario: Scenario, seeds: Sequence[int], num_requests: int) -> int:
    """Most prompt + output tokens of one request of the runs."""
    return max(_longest(scenario.generate(seed, num_requests=num_requests)) for seed in seeds)


def _longest(workload: Workload) -> int:
    return int((workload.prompt_tokens + workload.output_tokens).max())


def run_task(validation: Validation, task: Task, backend: Backend | None) -> Run:
    """One episode; ``backend`` is the engine's, for the simulator it is not used.

    Raises:
        EngineError: the engine cannot start or has died.
    """
    policy = validation.policy(task.policy, task.rate)
    result = run_episode(policy, validation.workload(task.rate, task.seed), backend=backend if task.backend == ENGINE else None)
    figures = result.summary
    notes = [policy.notes] if policy.notes else []
    if figures.truncated:
        notes.append("stopped at max_iterations")
    if figures.rejected:
        notes.append(f"{figures.rejected} requests rejected")
    return Run(
        policy=task.policy,
        rate=task.rate,
        seed=task.seed,
        backend=task.backend,
        repeat=task.repeat,
        warm_up=task.warm_up,
        figures=figures,
        thinking_seconds=float(getattr(backend, "thinking_seconds", math.nan)) if task.backend == ENGINE else math.nan,
        known_lengths=policy.known_lengths,
        notes="; ".join(notes),
    )


# --- the virtual clock: the same schedule ---------------------------------------------------------


def compare_schedules(validation: Validation, policy: str, rate: float, seed: int, name: str, backend: Backend) -> Schedules:
    """Run one episode on the simulator and on ``backend``, which keeps a virtual clock, and compare every step."""
    sim = make_backend(SIM)
    ours, our_log = _steps(validation, policy, rate, seed, sim)
    sim.close()
    theirs, their_log = _steps(validation, policy, rate, seed, backend)
    difference = ""
    for i, (a, b) in enumerate(itertools.zip_longest(ours, theirs)):
        if a != b:
            difference = f"step {i}: " + ("one has ended" if a is None or b is None else _first_difference(a, b))
            break
    if not difference:
        for column in ("admitted", "first_token", "completed", "evictions"):
            if not np.array_equal(getattr(our_log, column), getattr(their_log, column), equal_nan=True):
                difference = f"requests: {column}"
                break
    evictions = sum(len(r.evicted) + len(r.preempted) for r in ours)
    return Schedules(policy, rate, seed, name, len(ours), evictions, not difference, difference)


def _steps(validation: Validation, policy: str, rate: float, seed: int, backend: Backend) -> tuple[list[IterationReport], Any]:
    reports: list[IterationReport] = []
    result = run_episode(
        validation.policy(policy, rate), validation.workload(rate, seed), backend=backend, on_step=lambda report, _: reports.append(report)
    )
    return reports, result.log


def _first_difference(a: IterationReport, b: IterationReport) -> str:
    name = next(n for n in IterationReport.__dataclass_fields__ if getattr(a, n) != getattr(b, n))
    return f"{name} is {getattr(a, name)} on the simulator, {getattr(b, name)} there"


# --- what the runs say ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Gap:
    """One metric of one policy at one rate, simulator against engine.

    Attributes:
        sim: mean over seeds.
        real, low, high: mean, smallest and largest over repeats on the engine, each the mean over seeds.
        error: sim / real - 1; for evictions, whose engine count may be 0, sim - real.
        spread: (high - low) / real, for evictions high - low; NaN for one repeat.
    """

    policy: str
    rate: float
    metric: str
    repeats: int
    sim: float
    real: float
    low: float
    high: float

    @property
    def error(self) -> float:
        if self.metric == "evictions":
            return self.sim - self.real
        return self.sim / self.real - 1.0 if self.real else math.nan

    @property
    def spread(self) -> float:
        if self.repeats < 2:
            return math.nan
        return self.high - self.low if self.metric == "evictions" else (self.high - self.low) / self.real if self.real else math.nan


def gaps(runs: Sequence[Run], policies: Collection[str]) -> list[Gap]:
    """By rate, policy and metric; combinations without a run on both sides are left out."""
    found = []
    for rate in sorted({run.rate for run in runs}):
        for policy in policies:
            own = [run for run in runs if run.policy == policy and run.rate == rate and not run.warm_up]
            sim, real = ([run for run in own if run.backend == backend] for backend in (SIM, ENGINE))
            seeds = {run.seed for run in sim}
            by_repeat = {r: [run for run in real if run.repeat == r and run.seed in seeds] for r in sorted({run.repeat for run in real})}
            whole = [mine for mine in by_repeat.values() if len(mine) == len(seeds)]
            if not (sim and whole):
                continue
            for metric in METRICS:
                values = [_mean(mine, metric) for mine in whole]
                found.append(Gap(policy, rate, metric, len(values), _mean(sim, metric), float(np.mean(values)), min(values), max(values)))
    return found


def _mean(runs: Sequence[Run], metric: str) -> float:
    return float(np.mean([float(getattr(run.figures, metric)) for run in runs]))


@dataclass(frozen=True, slots=True)
class Ranking:
    """Policies at one rate ordered by one metric, best first.

    Attributes:
        real, sim: policies from best to worst.
        tau: Kendall's tau-b between the two; NaN for one policy, or all equal.
        pairs: of policies; swapped_inside, swapped_outside: pairs in another order on the simulator whose
            engine ranges over repeats overlap, or do not.
    """

    rate: float
    metric: str
    real: tuple[str, ...]
    sim: tuple[str, ...]
    tau: float
    pairs: int
    swapped_inside: int
    swapped_outside: int


def rankings(found: Sequence[Gap]) -> list[Ranking]:
    """One for each rate and metric of ``RANKED`` with at least two policies."""
    result = []
    for rate in sorted({gap.rate for gap in found}):
        for metric in RANKED:
            own = [g for g in found if g.rate == rate and g.metric == metric and math.isfinite(g.sim) and math.isfinite(g.real)]
            if len(own) > 1:
                result.append(_ranking(rate, metric, own))
    return result


def _ranking(rate: float, metric: str, own: Sequence[Gap]) -> Ranking:
    sign = -1.0 if metric == "throughput_tok_s" else 1.0
    order: Callable[[Callable[[Gap], float]], tuple[str, ...]] = lambda value: tuple(  # noqa: E731
        g.policy for g in sorted(own, key=lambda g: sign * value(g))
    )
    tau = require("scipy.stats", "cli").kendalltau([g.real for g in own], [g.sim for g in own]).statistic
    inside = outside = 0
    for a, b in itertools.combinations(own, 2):
        if (a.real - b.real) * (a.sim - b.sim) < 0:
            overlap = a.low <= b.high and b.low <= a.high
            inside += overlap
            outside += not overlap
    pairs = len(own) * (len(own) - 1) // 2
    return Ranking(rate, metric, order(lambda g: g.real), order(lambda g: g.sim), float(tau), pairs, inside, outside)
