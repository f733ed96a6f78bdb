"""``llmsched gpu-measure``: measure, fit and validate on one machine with vLLM, within a time, into one archive."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import tyro

from llmsched_agents.lookup import named_policies
from llmsched_env import __version__, checks
from llmsched_env.cli import validate
from llmsched_env.cli.frame import DONE, FAILED, Assignments, Command, Options, Outcome, Screen, words
from llmsched_env.cli.measure_report import report
from llmsched_env.cli.measure_steps import REPORT_FILE, SUMMARY_FILE, Measurement, SkipStep, Step
from llmsched_env.errors import ConfigError, require
from llmsched_env.files import check_file
from llmsched_env.perf import CalibrationRangeWarning
from llmsched_env.workload import load_scenario
from llmsched_hardware.calibration.settings import LONGEST, engine_options
from llmsched_hardware.shapes import is_shape, write_shape
from llmsched_hardware.validation import SIM, Task, run_task
from llmsched_hardware.versions import DISTRIBUTIONS, check_version

POLICIES = ("vllm", "wait", "nested-wait")
LOADS, HELD_OUT_LOADS = (0.5, 0.8, 1.1), (0.65, 0.95)
HELD_OUT_SEED = 1000
START_SECONDS = 15.0
"""Until a command that uses vLLM begins its work."""
PILOT, FEWEST, MOST = 40, 20, 400
"""Requests of a run: simulated to see how long it takes; bounds of what is then asked for."""
SCHEDULE_REQUESTS = 40
MARGIN = 1.5
"""A run beside what the simulator says it takes: the policy's time, the front end, and what the calibration does not know."""
PACKAGES = (*DISTRIBUTIONS, "torch", "triton", "flashinfer-python", "transformers", "numpy", "numba", "llmsched-env")
SWEEP, FIT, CHECKED = "sweep/sweep.json", "fit/traffic.json", "fit/checked.json"
TRAFFIC, HELD_OUT = "traffic.csv.gz", "held-out.csv.gz"


@dataclass(frozen=True, kw_only=True)
class GpuMeasure(Options):
    """Measure, fit and validate on this machine, within a time, into one archive.

    One CUDA machine with vLLM, or vLLM's CPU build. Describes the machine, sweeps batches (calibrate engine), runs traffic under several
    policies and keeps its iterations (validate --log-iterations), fits them (calibrate from-log), and holds the fit against traffic it has
    not seen. Then, if there is time, the same schedules under a virtual clock, and kernels alone (calibrate kernels). A step that fails is
    recorded and the rest goes on; Ctrl-C and SIGTERM leave an archive of what there is.
    """

    model: Annotated[str, tyro.conf.arg(metavar="MODEL")]
    """tiny or the name of another shape (no download), such as llama-3-8b-shape; a Hugging Face id, or a folder."""
    set: Assignments = ()
    """engine.FIELD of llmsched_hardware.real_engine.EngineOptions."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE.tar.gz")]
    """The archive: calibrations, iteration logs, tables, logs of every step, summary.json and report.md."""
    overwrite: bool = False
    """Replace an archive that is there."""
    budget_seconds: Annotated[float, tyro.conf.arg(metavar="S")] = 540.0
    """Finish within this many seconds; at least 60."""
    scenario: Annotated[str, tyro.conf.arg(metavar="NAME")] = "azure-conv"
    """Where the lengths of the traffic come from; scaled to an engine that takes only short requests."""
    policies: Annotated[tuple[str, ...], tyro.conf.arg(metavar="POLICY [POLICY ...]", aliases=["--policy"])] = POLICIES
    """Under which the traffic runs."""
    loads: Annotated[tuple[float, ...], tyro.conf.arg(metavar="X [X ...]")] = LOADS
    """Of the traffic that is fitted, as shares of the fluid stability boundary."""
    held_out_loads: Annotated[tuple[float, ...], tyro.conf.arg(metavar="X [X ...]")] = HELD_OUT_LOADS
    """Of the traffic that is held out; its requests are others, too."""


def check(options: GpuMeasure) -> None:
    """Refuse what no step could do.

    Raises:
        ConfigError: naming the option.
        MissingExtraError: vLLM is not installed.
    """
    if not options.out.name.endswith(".tar.gz"):
        raise ConfigError(f"--out: {options.out}, must end in .tar.gz")
    check_file("--out", options.out)
    if options.out.exists() and not options.overwrite:
        raise ConfigError(f"--out: {options.out} is there already; use --overwrite or another place")
    checks.number("--budget-seconds", options.budget_seconds, low=60.0, high=86_400.0, unit="seconds")
    for name, loads in (("--loads", options.loads), ("--held-out-loads", options.held_out_loads)):
        if not loads:
            raise ConfigError(f"{name}: none given, must be at least one")
        for load in loads:
            checks.number(name, load, high=100.0, open_low=True)
    engine_options(options.model, words(options.set))
    load_scenario(options.scenario)
    if not named_policies("--policies", options.policies):
        raise ConfigError("--policies: none given, must be at least one")
    check_version()
    for module in ("rich.progress", "scipy.optimize"):
        require(module, "cli")


# --- the machine ------------------------------------------------------------------------------------------
def describe_machine(folder: Path) -> dict[str, Any]:
    """What this machine is, in short; the whole of what its tools say goes to ``machine/``."""
    (folder / "machine").mkdir(exist_ok=True)
    for name, command in (
        ("nvidia-smi", ["nvidia-smi", "-q"]),
        ("lscpu", ["lscpu"]),
        ("packages", [sys.executable, "-m", "pip", "list", "--format=freeze"]),
    ):
        text = _output(command)
        if text:
            (folder / "machine" / f"{name}.txt").write_text(text, encoding="utf-8")
    fields = "name,driver_version,memory.total,clocks.max.sm,clocks.max.memory,power.limit,pcie.link.gen.max"
    gpus = _output(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]).strip().splitlines()
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "gpus": gpus,
        "versions": versions,
    }


def _output(command: Sequence[str]) -> str:
    """What a tool prints; nothing where it is not there or fails."""
    if shutil.which(command[0]) is None:
        return ""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    return ""


# --- the steps --------------------------------------------------------------------------------------------
class Plan:
    """The commands of the steps; what one needs of an earlier one is read from what that has left."""

    def __init__(self, options: GpuMeasure, measurement: Measurement) -> None:
        self._options, self._measurement = options, measurement
        longest = engine_options(options.model, words(options.set)).max_model_len
        scaled = ("--length-scale", f"{longest / LONGEST:.4g}", "--max-total-tokens", str(longest)) if longest < LONGEST else ()
        self._lengths: tuple[str, ...] = scaled
        given = words(options.set)
        self._engine = ("--model", options.model, *(("--set", *given) if given else ()))

    def steps(self) -> list[Step]:
        """In order. What a validation needs at least is an engine that starts and a run or two."""
        return [
            Step("sweep", 0.30, 30.0, self._sweep),
            Step("traffic", 0.30, 30.0, self._traffic, needs=("sweep",)),
            Step("fit", 0.03, 10.0, self._fit, needs=("traffic",)),
            Step("held-out", 0.22, 30.0, self._held_out, needs=("fit",)),
            Step("check", 0.03, 10.0, self._check, needs=("held-out",)),
            Step("schedules", 0.08, 30.0, self._schedules, needs=("fit",)),
            Step("kernels", 0.08, 20.0, self._kernels),
        ]

    def _sweep(self, seconds: float) -> list[object]:
        budget = max(seconds - START_SECONDS, 10.0)
        given = ["calibrate", "engine", *self._engine, "--out", self._path(SWEEP)]
        return [*given, "--budget-seconds", f"{budget:.0f}", "--held-out", 0]

    def _traffic(self, seconds: float) -> list[object]:
        given = self._validation(SWEEP, "traffic", self._options.loads, seconds, repeats=1)
        return [*given, "--log-iterations", self._path(TRAFFIC)]

    def _fit(self, seconds: float) -> list[object]:
        return ["calibrate", "from-log", self._path(TRAFFIC), "--out", self._path(FIT)]

    def _held_out(self, seconds: float) -> list[object]:
        given = self._validation(FIT, "held-out", self._options.held_out_loads, seconds, repeats=2, first_seed=HELD_OUT_SEED)
        return [*given, "--log-iterations", self._path(HELD_OUT)]

    def _check(self, seconds: float) -> list[object]:
        given = ["calibrate", "from-log", self._path(TRAFFIC), "--out", self._path(CHECKED), "--name", "traffic"]
        return [*given, "--check", self._path(HELD_OUT)]

    def _schedules(self, seconds: float) -> list[object]:
        given = self._words(FIT, "schedules", self._options.loads[-1:], SCHEDULE_REQUESTS)
        return [*given, "--clock", "virtual", "--policies", *self._options.policies]

    def _kernels(self, seconds: float) -> list[object]:
        model, folder = self._options.model, self._path("kernels")
        own = Path(model).expanduser() / "config.json"
        if is_shape(model):
            write_shape(model, folder)
        elif own.is_file():
            folder.mkdir(exist_ok=True)
            shutil.copy(own, folder)
        else:
            raise SkipStep(f"{model} is no shape and no folder with a config.json")
        budget = max(seconds - START_SECONDS, 5.0)
        given = ["calibrate", "kernels", "--config", folder / "config.json", "--model", Path(model).name]
        return [*given, "--out", folder / "profile", "--budget-seconds", f"{budget:.0f}"]

    def _path(self, name: str) -> Path:
        return self._measurement.folder / name

    # --- a validation within a time
    def _words(self, calibration: str, out: str, loads: Sequence[float], num_requests: int) -> list[object]:
        given: list[object] = ["validate", "--calibration", self._path(calibration), *self._engine, "--scenario", self._options.scenario]
        return [*given, *self._lengths, "--loads", *loads, "--num-requests", num_requests, "--out", self._path(out)]

    def _validation(
        self, calibration: str, out: str, loads: Sequence[float], seconds: float, *, repeats: int, first_seed: int = 0
    ) -> list[object]:
        begin = time.monotonic()
        each = self._seconds_of_a_request(calibration, loads, first_seed)
        seconds -= START_SECONDS + time.monotonic() - begin  # the first such run compiles the simulator
        build = float((self._measurement.found("sweep") or {}).get("build_seconds") or 0.0)
        count = min(max(int(max(seconds - build, 0.0) / ((1 + repeats) * MARGIN * each)), FEWEST), MOST)
        given = [*self._words(calibration, out, loads, count), "--policies", *self._options.policies]
        given += ["--repeats", repeats, "--warm-ups", 1, "--first-seed", first_seed]
        return [*given, "--budget-seconds", f"{max(seconds, 10.0):.0f}"]

    def _seconds_of_a_request(self, calibration: str, loads: Sequence[float], first_seed: int) -> float:
        """What one more request in every run of a turn through policies and loads takes, by the simulator."""
        given = validate.Validate(
            calibration=str(self._path(calibration)),
            model=self._options.model,
            set=self._options.set,
            scenario=self._options.scenario,
            policies=self._options.policies,
            loads=tuple(loads),
            length_scale=float(self._lengths[1]) if self._lengths else None,
            max_total_tokens=int(self._lengths[3]) if self._lengths else None,
            num_requests=PILOT,
            first_seed=first_seed,
            out=self._path("pilot"),
        )
        with warnings.catch_warnings(action="ignore", category=CalibrationRangeWarning):  # the validations themselves say it
            validation = validate.planned(given).validation
            tasks = [Task(policy, rate, first_seed, SIM) for rate in validation.rates for policy in validation.policies]
            return sum(run_task(validation, task, None).figures.sim_seconds for task in tasks) / PILOT


def run(options: GpuMeasure, screen: Screen) -> Outcome:
    """All steps; the archive is there whatever happens after the checks."""
    check(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="llmsched-measure-") as name:
        measurement = Measurement(Path(name), options.out.absolute(), options.budget_seconds, report, screen.say)
        measurement.about = {
            "command": screen.command,
            "version": __version__,
            "model": options.model,
            "machine": describe_machine(measurement.folder),
        }
        measurement.archive()
        try:
            measurement.run(Plan(options, measurement).steps())
        except KeyboardInterrupt:
            screen.note(f"{options.out}: what there is")
            raise
        summary = measurement.summary()
        screen.print((measurement.folder / REPORT_FILE).read_text(encoding="utf-8"))
    screen.print(f"{options.out}: {REPORT_FILE}, {SUMMARY_FILE} and what the steps have left")
    failed = any(record.status in ("failed", "out of time") for record in measurement.records)
    return Outcome(summary, FAILED if failed else DONE)


COMMAND = Command("gpu-measure", GpuMeasure, run, "measure, fit and validate on one machine, into one archive")
main = COMMAND.main
