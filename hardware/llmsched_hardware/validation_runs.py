"""A validation carried out: the files it keeps, and every run that has no row yet."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llmsched_env import __version__
from llmsched_env.backends import make_backend
from llmsched_env.errors import ConfigError
from llmsched_env.files import write_settings
from llmsched_env.perf import IterationTimeModel
from llmsched_env.row_file import RowFile
from llmsched_hardware.progress import Bar
from llmsched_hardware.real_engine import EngineOptions
from llmsched_hardware.validation import ENGINE, SCHEDULER, Run, Schedules, Task, Validation, compare_schedules, run_task

RUNS_FILE, SCHEDULES_FILE, SETTINGS_FILE, MACHINE_FILE = "runs.csv", "schedules.csv", "settings.json", "machine.json"
TABLE_FILE, REPORT_FILE, LOG_FILE = "sim_to_real.csv", "report.md", "iterations.csv"
FILES = (RUNS_FILE, SCHEDULES_FILE, SETTINGS_FILE, MACHINE_FILE, TABLE_FILE, REPORT_FILE, LOG_FILE)
Clock = Literal["measured", "virtual", "wall"]


@dataclass(frozen=True, slots=True)
class Plan:
    """A validation and how it is to be run.

    Attributes:
        engine: the real engine's settings.
        calibration: the simulator's iteration times.
        clock: of the engine.
        length_scale, max_total_tokens: what was done to the scenario's requests; the latter in tokens.
    """

    validation: Validation
    engine: EngineOptions
    calibration: IterationTimeModel
    clock: Clock
    length_scale: float = 1.0
    max_total_tokens: int | None = None

    def describe(self) -> dict[str, Any]:
        """What must agree between a validation and its resumption, as plain values."""
        validation, source = self.validation, self.calibration.provenance
        fields = {field.name: getattr(self.engine, field.name) for field in dataclasses.fields(self.engine)}
        return {
            "version": __version__,
            "calibration": source.name,
            "calibration_source": source.source,
            "engine": fields | {"extra": dict(self.engine.extra)},
            "num_blocks": validation.scenario.engine.num_blocks,
            "scenario": validation.scenario.name,
            "length_scale": self.length_scale,
            "max_total_tokens": self.max_total_tokens,
            "num_requests": validation.num_requests,
            "clock": self.clock,
            "policy_options": {name: {k: str(v) for k, v in own.items()} for name, own in validation.options.items()},
            "policies": {name: [policy.text, digest] for name, policy in validation.policies.items() if (digest := policy.digest())},
        }


def read_machine(folder: Path) -> dict[str, Any]:
    """The machine that the runs in a folder are from: ``llmsched_hardware.real_engine.Machine`` by field."""
    machine: dict[str, Any] = json.loads((folder / MACHINE_FILE).read_text(encoding="utf-8"))
    return machine


def keep_machine(folder: Path, machine: Mapping[str, Any]) -> None:
    """Write down which machine the runs in the folder are from.

    Raises:
        ConfigError: the folder's earlier runs are from another one.
    """
    if (folder / MACHINE_FILE).exists():
        kept = read_machine(folder)
        for name in ("device", "vllm", "dtype"):
            if kept[name] != machine[name]:
                raise ConfigError(f"--resume: {name} is {machine[name]!r}, but runs in {folder} were made with {kept[name]!r}")
    write_settings(folder / MACHINE_FILE, machine)


def run_measured(plan: Plan, rows: RowFile[Run], backend: Any, folder: Path, bar: Bar, deadline: float = math.inf) -> int:
    """Every run that has no row yet; one count of the bar for each task.

    Args:
        rows: open; takes each run as it ends.
        backend: ``vllm``, under the plan's clock.
        folder: where the machine is written down.
        deadline: ``time.monotonic()`` after which no run on the engine ends, as far as the longest so far tells.

    Returns:
        How many runs on the engine were left out for lack of time.

    Raises:
        ConfigError: earlier rows are from another machine.
        EngineError: the engine cannot start or has died.
    """
    validation = plan.validation
    done = {row.task for row in rows.rows}
    warm: set[tuple[str, float, int]] = set()
    longest, left_out = 0.0, 0
    for task in validation.tasks():
        if task.backend == ENGINE and task not in done and time.monotonic() + longest > deadline:
            left_out += 1
            bar.advance()
            continue
        bar.show(f"{task.backend}: {task.policy} at {task.rate:.4g}" + (", warm-up" if task.warm_up else ""))
        if task not in done:
            place = (task.policy, task.rate, task.seed)
            if _is_cold(validation, task) and place not in warm:
                _describe_episode(backend, dataclasses.replace(task, warm_up=True))
                run_task(validation, task, backend)  # resumed: its warm-up ran in another process
            _describe_episode(backend, task)
            begin = time.monotonic()
            rows.append(run_task(validation, task, backend))
            if task.backend == ENGINE:
                if warm:  # the first run built the engine
                    longest = max(longest, time.monotonic() - begin)
                if not warm:
                    keep_machine(folder, dataclasses.asdict(backend.machine()))
                warm.add(place)
        bar.advance()
    return left_out


def _describe_episode(backend: Any, task: Task) -> None:
    """What an iteration log says of the run."""
    backend.about_episode = {name: value for name, value in dataclasses.asdict(task).items() if name != "backend"}


def _is_cold(validation: Validation, task: Task) -> bool:
    """Whether a counted run on the engine must have been warmed up for."""
    return task.backend == ENGINE and not task.warm_up and validation.warm_ups > 0


def run_virtual(plan: Plan, rows: RowFile[Schedules], backend: Any, folder: Path, bar: Bar) -> None:
    """Compare every episode that has no row yet, then repeat them on the engine; a count of the bar for each run on it and its scheduler.

    Arguments and errors as ``run_measured``.
    """
    validation = plan.validation
    done = {(row.policy, row.rate, row.seed, row.backend) for row in rows.rows}
    scheduler = make_backend(SCHEDULER)
    try:
        for rate, policy, seed in itertools.product(validation.rates, validation.policies, validation.seeds):
            for name, other in ((SCHEDULER, scheduler), (ENGINE, backend)):
                bar.show(f"{name}: {policy} at {rate:.4g}")
                if (policy, rate, seed, name) not in done:
                    _describe_episode(other, Task(policy, rate, seed, name))
                    rows.append(compare_schedules(validation, policy, rate, seed, name, other))
                    if name == ENGINE:
                        keep_machine(folder, dataclasses.asdict(backend.machine()))
                bar.advance()
        # The same schedules again, for the iteration log alone: what the machine does at other times.
        for repeat, policy in itertools.product(range(1, validation.repeats), validation.policies):
            for rate, seed in itertools.product(validation.rates, validation.seeds):
                task = Task(policy, rate, seed, ENGINE, repeat)
                bar.show(f"{ENGINE}: {policy} at {rate:.4g}, again")
                _describe_episode(backend, task)
                run_task(validation, task, backend)
                bar.advance()
    finally:
        scheduler.close()
