"""A comparison as a list of runs: every policy at every rate on every seed, and where the rows are kept."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from llmsched_baselines import Setting, make_policy
from llmsched_baselines.overrides import Overrides
from llmsched_env import __version__
from llmsched_env.backends import make_backend
from llmsched_env.batch_runner import Run, run_batch
from llmsched_env.engine.simulator import SimBackend
from llmsched_env.engine_changes import engine_with
from llmsched_env.errors import ConfigError
from llmsched_env.files import replacing
from llmsched_env.fluid import stability_boundary
from llmsched_env.metrics import ttft
from llmsched_env.perf.base import CalibrationRangeWarning
from llmsched_env.runner import EpisodeResult, Policy, run_episode
from llmsched_env.types import EngineConfig, EpisodeLimits, FloatArray, Workload
from llmsched_env.workload import Scenario

SUMMARY_FILE = "summary.csv"
SETTINGS_FILE = "settings.json"


@dataclass(frozen=True, slots=True)
class Row:
    """One finished run: one line of ``summary.csv``; the columns are these fields, in this order."""

    scenario: str
    policy: str
    rate: float
    seed: int
    requests: int
    completed: int
    throughput_tok_s: float
    throughput_req_s: float
    latency_mean: float
    latency_p50: float
    latency_p95: float
    latency_p99: float
    ttft_mean: float
    ttft_p50: float
    ttft_p95: float
    ttft_p99: float
    tpot_mean: float
    tpot_p50: float
    tpot_p95: float
    tpot_p99: float
    evictions: int
    kv_mean: float
    kv_max: float
    sim_seconds: float
    wall_seconds: float
    known_lengths: bool
    notes: str
    iterations: int
    out_of_range: int

    @property
    def task(self) -> Task:
        return Task(self.policy, self.rate, self.seed)


COLUMNS = tuple(f.name for f in dataclasses.fields(Row))
_FROM_TEXT: dict[str, Callable[[str], Any]] = {"str": str, "int": int, "float": float, "bool": lambda text: text == "True"}
_PARSERS = {f.name: _FROM_TEXT[str(f.type)] for f in dataclasses.fields(Row)}


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
        agents: folders of checkpoints by the names they have among the policies.
    """

    scenario: Scenario
    policies: tuple[str, ...]
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    num_requests: int
    overrides: Overrides = field(default_factory=Overrides)
    source: str = ""
    agents: Mapping[str, str] = field(default_factory=dict)

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
            if name in self.agents:
                from llmsched_agents.checkpoint import load_checkpoint

                return load_checkpoint(self.agents[name], setting, name=name)
            return make_policy(name, setting, overload=True, **self.overrides.options(name))
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
            run_episode(at_rates[0], _shortest_request(workload))

    def describe(self) -> dict[str, Any]:
        """What must agree between a comparison and its resumption, as plain values."""
        return {
            "version": __version__,
            "scenario": self.scenario.name,
            "trace": self.source,
            "num_requests": self.num_requests,
            "set": {key: _plain(value) for key, value in self.overrides.items()},
            **({"agents": dict(self.agents)} if self.agents else {}),
        }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _shortest_request(workload: Workload) -> Workload:
    """The shortest request alone."""
    i = int(np.argmin(workload.prompt_tokens.astype(np.int64) + workload.output_tokens))
    return Workload.of([0.0], workload.prompt_tokens[i : i + 1], workload.output_tokens[i : i + 1], workload.type_id[i : i + 1])


def run_tasks(comparison: Comparison, tasks: Sequence[Task]) -> Iterator[Row]:
    """The runs in order, each row as its run ends; a policy is built once for all its seeds."""
    policies: dict[tuple[str, float], Policy] = {}

    def run_of(task: Task) -> Run:
        key = (task.policy, task.rate)
        if key not in policies:
            policies[key] = comparison.policy(*key)
        return Run(policies[key], comparison.workload(task.rate, task.seed))

    for task, result in zip(tasks, run_batch(map(run_of, tasks)), strict=True):
        yield _row(comparison, task, policies[task.policy, task.rate], result)


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
    summary = result.summary.as_dict()
    notes = [policy.notes] if policy.notes else []
    if result.summary.truncated:
        notes.append("stopped at max_iterations")
    if result.summary.rejected:
        notes.append(f"{result.summary.rejected} requests rejected")
    return Row(
        scenario=comparison.scenario.name,
        policy=task.policy,
        rate=task.rate,
        seed=task.seed,
        wall_seconds=result.wall_seconds,
        known_lengths=policy.known_lengths,
        notes="; ".join(notes),
        **{name: summary[name] for name in COLUMNS if name in summary},  # type: ignore[arg-type]
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


class SummaryFile:
    """``summary.csv``, there already with its heading: each row is on disk before the next run is waited for."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> SummaryFile:
        self._file = self._path.open("a", encoding="utf-8", newline="")
        self._writer = csv.writer(self._file)
        return self

    def append(self, row: Row) -> None:
        self._writer.writerow(dataclasses.astuple(row))
        self._file.flush()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Replace the file by these rows."""
    with replacing(path) as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(dataclasses.astuple(row) for row in rows)


def read_rows(path: Path) -> list[Row]:
    """Rows of a ``summary.csv``; a last line cut off by a kill is left out.

    Raises:
        ConfigError: other columns, or a line that is not a row.
    """
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    lines = list(csv.reader(io.StringIO(whole)))
    if not lines:
        return []
    if tuple(lines[0]) != COLUMNS:
        raise ConfigError(f"{path}: the columns are not those of this version, use --overwrite or another --out")
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            rows.append(Row(**{name: _PARSERS[name](text) for name, text in zip(COLUMNS, line, strict=True)}))
        except ValueError as error:
            raise ConfigError(f"{path}, line {number}: not a row ({error})") from error
    return rows


def write_settings(folder: Path, description: Mapping[str, Any]) -> None:
    with replacing(folder / SETTINGS_FILE) as file:
        json.dump(description, file, indent=2)
        file.write("\n")


def check_same_settings(folder: Path, description: Mapping[str, Any]) -> None:
    """Refuse to mix the rows of two different comparisons.

    Raises:
        ConfigError: the settings kept in the folder are missing, unreadable or differ.
    """
    path = folder / SETTINGS_FILE
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--resume: {path} cannot be read ({error}), use --overwrite") from error
    for name, value in description.items():
        if kept.get(name) != value:
            raise ConfigError(f"--resume: {name} is {value!r}, but the rows in {folder} were made with {kept.get(name)!r}")


def largest_stable(rates: Sequence[float], boundary: float) -> float:
    """The highest rate inside the stability region; the lowest one if none is."""
    return max((r for r in rates if r < boundary), default=min(rates))
