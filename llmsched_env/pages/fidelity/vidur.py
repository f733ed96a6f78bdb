"""Against Vidur: six runs request by request, its iteration times, what lies above batch 128, and the speed."""

from __future__ import annotations

import csv
import gzip
import os
import platform
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import numpy as np

from llmsched_baselines import Policy, Setting, make_policy
from llmsched_env.backend import View
from llmsched_env.engine.rules import run_constant
from llmsched_env.engine.simulator import SimBackend
from llmsched_env.engine_config import EngineConfig, EpisodeLimits
from llmsched_env.errors import ConfigError
from llmsched_env.markdown import table
from llmsched_env.metrics import latency, ttft
from llmsched_env.pages.fidelity.evidence import Check, Paths, check_table, percent
from llmsched_env.perf import Batch, IterationTimeModel, TableTime, load_calibration
from llmsched_env.runner import EpisodeResult, run_episode
from llmsched_env.types import FloatArray, IterationReport, LengthStatistics, Workload
from llmsched_hardware.calibration.importers.vidur import read_iterations

CALIBRATION = "a100-llama2-7b-vidur"
FORMULA = "a100-llama2-7b-c10"
BLOCKS_40GB = 2816
PROFILED_DECODES = 128
SPEED_BAR = 300.0
SPEED_REQUESTS = 20_000
REPEATS = 5

RUN_COLUMNS = ("arrived_at", "prompt_tokens", "output_tokens", "scheduled_at", "ttft", "e2e", "restarts", "completed")
BATCH_COLUMNS = ("start", "duration", "batch_size", "prefill_tokens", "total_tokens", "alloc_blocks_before_free", "waiting")


@dataclass(frozen=True, slots=True)
class Run:
    """One run of Vidur; arrays in arrival order and in iteration order.

    Attributes:
        name: of its files; says policy, rate and KV capacity.
        requests: (N,) columns ``RUN_COLUMNS``.
        batches: (I,) columns ``BATCH_COLUMNS``.
    """

    name: str
    requests: Mapping[str, FloatArray]
    batches: Mapping[str, FloatArray]

    @property
    def policy(self) -> str:
        return "sarathi" if "sarathi" in self.name else "vllm-v0"

    @property
    def num_blocks(self) -> int | None:
        """KV blocks where they are not the calibration's."""
        return BLOCKS_40GB if self.name.endswith(f"_kv{BLOCKS_40GB}") else None

    @property
    def workload(self) -> Workload:
        r = self.requests
        return Workload.of(r["arrived_at"], r["prompt_tokens"].astype(np.int32), r["output_tokens"].astype(np.int32))


def read_runs(peers: Path) -> list[Run]:
    """The runs in a folder ``vidur`` of peers, by name.

    Raises:
        ConfigError: no run, a file that cannot be read, a missing column.
    """
    folder = peers / "vidur"
    names = sorted(path.stem for path in (folder / "runs").glob("*.csv"))
    if not names:
        raise ConfigError(f"LLMSCHED_PEERS: no runs in {folder / 'runs'}")
    return [
        Run(
            name,
            _columns(folder / "runs" / f"{name}.csv", RUN_COLUMNS),
            _columns(folder / "batches" / f"{name}.batches.csv.gz", BATCH_COLUMNS),
        )
        for name in names
    ]


def _columns(path: Path, names: Sequence[str]) -> dict[str, FloatArray]:
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise ConfigError(f"{path}: {error}") from error
    reader = csv.DictReader(text.splitlines())
    for name in names:
        if name not in (reader.fieldnames or ()):
            raise ConfigError(f"{path}: column {name!r} is missing")
    rows = list(reader)
    return {name: np.array([float(row[name]) for row in rows]) for name in names}


def policy_for(run: Run, model: IterationTimeModel) -> Policy:
    """The run's policy on an engine with Vidur's accounting (cap 128 and watermark 1 % are the policies' own)."""
    blocks = run.num_blocks if run.num_blocks is not None else model.provenance.num_blocks
    changes: dict[str, Any] = {"time_model": model, "num_blocks": blocks, "decode_needs_free_block": True}
    if run.policy == "vllm-v0":
        changes["padded_prefill"] = True
    workload = run.workload
    statistics = LengthStatistics.of(workload.prompt_tokens.mean(), workload.output_tokens.mean(), 1.0)
    rate = len(workload) / float(workload.arrival[-1])
    return make_policy(run.policy, Setting(statistics, rate, EngineConfig.vllm(), overrides=changes))


class Recorder:
    """Every iteration's row as in ``BATCH_COLUMNS``, blocks counted as Vidur counts them.

    Vidur takes all blocks of a prompt when it admits it, the engine those of the tokens computed so
    far: the blocks still to come for partly read prompts are added.
    """

    def __init__(self, block_size: int) -> None:
        self._block = block_size
        self.rows: list[tuple[float, ...]] = []

    def __call__(self, report: IterationReport, view: View) -> None:
        if report.idle:
            return
        residents = view.resident_requests()
        part = residents.computed < residents.prefill_target
        whole = -(-residents.prefill_target[part].astype(np.int64) // self._block)
        taken = -(-residents.computed[part].astype(np.int64) // self._block)
        blocks = report.kv_used + int((whole - taken).sum())
        r = report
        self.rows.append((r.start, r.duration, r.batch_size, r.prefill_tokens, r.total_tokens, blocks, r.waiting))

    def columns(self) -> dict[str, FloatArray]:
        table = np.array(self.rows, dtype=np.float64)
        return {name: table[:, i] for i, name in enumerate(BATCH_COLUMNS)}


@dataclass(frozen=True, slots=True)
class Replay:
    """A run of Vidur and the same requests on our engine."""

    run: Run
    result: EpisodeResult
    batches: Mapping[str, FloatArray]

    @property
    def ours(self) -> dict[str, FloatArray]:
        """(N,) our columns of ``RUN_COLUMNS`` that are outcomes."""
        log = self.result.log
        return {
            "scheduled_at": log.admitted,
            "ttft": ttft(log),
            "e2e": latency(log),
            "restarts": log.evictions.astype(np.float64),
            "completed": np.isfinite(log.completed).astype(np.float64),
        }

    def largest_difference(self, column: str) -> float:
        return float(np.abs(self.ours[column] - self.run.requests[column]).max())

    def differing_rows(self, column: str) -> int:
        """Iterations whose count differs (all of them if there are more or fewer)."""
        ours, theirs = self.batches[column], self.run.batches[column]
        return int(np.count_nonzero(ours != theirs)) if ours.size == theirs.size else max(ours.size, theirs.size)


def replay(run: Run, model: IterationTimeModel) -> Replay:
    """Vidur's requests under its policy and accounting on our engine."""
    policy = policy_for(run, model)
    recorder = Recorder(policy.engine.block_size)
    result = run_episode(policy, run.workload, on_step=recorder)
    return Replay(run, result, recorder.columns())


def section(paths: Paths) -> list[str]:
    """The part of the page."""
    runs = read_runs(paths.peers)
    model = load_calibration(CALIBRATION)
    if not isinstance(model, TableTime):
        raise ConfigError(f"calibration {CALIBRATION!r}: must be tables")
    replays = [replay(run, model) for run in runs]
    return [
        "## Vidur: six runs, request by request",
        "",
        "Runs of microsoft/vidur @ 7d47513 (Llama-2-7B on one A100-80GB, CPU overhead off; simulated, not measured), replayed with "
        f"`{CALIBRATION}` under `vllm-v0` and `sarathi` with Vidur's accounting as engine options: `decode_needs_free_block`, for "
        f"`vllm-v0` also `padded_prefill`; {model.provenance.num_blocks:,} blocks, {BLOCKS_40GB:,} where the run says so. "
        "A restart is an eviction.",
        "",
        *check_table(check for r in replays for check in _run_checks(r)),
        "",
        "Request by request and iteration by iteration, the largest differences (Vidur's files are rounded to 1e-6 s):",
        "",
        *_largest(replays),
        "",
        "Blocks count a partly read prompt whole, as Vidur takes its blocks on admission; the engine, like vLLM, takes them chunk by "
        "chunk and only checks on admission that the whole prompt would fit. In these runs the two never decide differently.",
        "",
        *_iteration_times(paths, model),
        *_above_the_profile(paths, model),
        *_speed(paths, runs, model),
    ]


def _run_checks(r: Replay) -> Iterator[Check]:
    theirs = r.run.requests
    for label, column in (("latency", "e2e"), ("TTFT", "ttft")):
        mine, other = r.ours[column], theirs[column]
        yield Check.relative(r.run.name, f"{label}, mean", float(mine.mean()), float(other.mean()), 0.01, digits=6)
        p99, their_p99 = float(np.percentile(mine, 99)), float(np.percentile(other, 99))
        yield Check.relative(r.run.name, f"{label}, P99", p99, their_p99, 0.01, digits=6)
    ours, restarts = int(r.ours["restarts"].sum()), int(theirs["restarts"].sum())
    yield Check.equal(r.run.name, "restarts", ours, restarts)
    yield Check.equal(r.run.name, "iterations", r.result.counters.iterations, r.run.batches["start"].size)


def _largest(replays: Sequence[Replay]) -> list[str]:
    counted = "iterations with another batch size, prefill tokens, blocks, queue"
    rows = []
    for r in replays:
        seconds = (f"{r.largest_difference(c):.1e}" for c in ("scheduled_at", "ttft", "e2e"))
        restarts = int(np.count_nonzero(r.ours["restarts"] != r.run.requests["restarts"]))
        counts = (r.differing_rows(c) for c in ("batch_size", "prefill_tokens", "alloc_blocks_before_free", "waiting"))
        rows.append((r.run.name, *seconds, restarts, ", ".join(map(str, counts))))
    return table(("run", "admitted (s)", "TTFT (s)", "latency (s)", "requests with other restarts", counted), rows, "lr")


def _iteration_times(paths: Paths, model: TableTime) -> list[str]:
    sampled = read_iterations(paths.calibration / "vidur_a100_llama2_7b_iterations.csv")
    met = read_iterations(paths.calibration / "vidur_a100_llama2_7b_iterations_from_runs.csv")
    formula = load_calibration(FORMULA)
    inside = sampled.decodes <= PROFILED_DECODES
    clip = f"{sampled.seconds.size:,} sampled compositions, Vidur's own (clip)"
    proportion = f"{sampled.seconds.size:,} sampled compositions, decode attention in proportion above {PROFILED_DECODES}"
    within = f"{int(inside.sum()):,} sampled compositions of at most {PROFILED_DECODES} decodes"
    in_runs = f"{met.seconds.size:,} compositions met in runs"
    compact = f"formula `{FORMULA}`"
    checks = [
        _mape(clip, "tables, clip", sampled.errors(model.clipped(), sampled.seconds), 0.005),
        _mape(proportion, "tables", sampled.errors(model, sampled.extrapolated), 0.005),
        _mape(in_runs, "tables", met.errors(model, met.seconds), 0.005),
        _mape(within, compact, sampled.errors(formula, sampled.seconds)[inside], None),
        _mape(proportion, compact, sampled.errors(formula, sampled.extrapolated), None),
        _mape(in_runs, compact, met.errors(formula, met.seconds), None),
    ]
    return [
        "### Iteration times",
        "",
        "MAPE: mean of |ours / theirs - 1|. The tables are Vidur's predictor itself in single precision; the formula is a fit with eight "
        "coefficients, close on average and not close enough for a comparison near saturation, where queueing amplifies its bias.",
        "",
        *check_table(checks),
        "",
    ]


def _mape(against: str, figure: str, errors: FloatArray, bar: float | None) -> Check:
    mape = float(np.abs(errors).mean())
    return Check(
        against=against,
        figure=f"iteration time, {figure}",
        ours=f"bias {percent(float(errors.mean()))}, P95 {percent(float(np.percentile(np.abs(errors), 95)))}",
        theirs="0",
        error=f"MAPE {percent(mape)}",
        bar="reported" if bar is None else f"MAPE under {percent(bar)}",
        holds=None if bar is None else mape < bar,
    )


def _above_the_profile(paths: Paths, model: TableTime) -> list[str]:
    clipped = model.clipped()
    headings = ("decodes", "mean context", "clip (ms)", "extrapolate (ms)", "extrapolate / clip", "tokens per second, clip", "extrapolate")
    rows = []
    for decodes in (PROFILED_DECODES, 192, 256, 512):
        for context in (192, 1024):
            batch = Batch(decodes=decodes, decode_kv=decodes * context, sampled=decodes, batch_size=decodes)
            low, high = clipped.seconds(batch), model.seconds(batch)
            milliseconds = (f"{1e3 * low:.1f}", f"{1e3 * high:.1f}", f"{high / low:.2f}")
            rows.append((decodes, f"{context:,}", *milliseconds, f"{decodes / low:,.0f}", f"{decodes / high:,.0f}"))
    sampled = read_iterations(paths.calibration / "vidur_a100_llama2_7b_iterations.csv")
    above = sampled.decodes > PROFILED_DECODES
    short = 1 - sampled.seconds[above] / sampled.extrapolated[above]
    return [
        f"### Above {PROFILED_DECODES} decodes: clip and extrapolate",
        "",
        f"Vidur's profile ends at {PROFILED_DECODES} decode requests; beyond, its forests return the value of the last row, so that a "
        f"larger batch costs no more attention (`clip`, as `{CALIBRATION}:clip`). The default goes on in proportion to the number of "
        "requests. Decode-only batches:",
        "",
        *table(headings, rows, "r"),
        "",
        f"Over the {int(above.sum())} sampled compositions above {PROFILED_DECODES} decodes clipping leaves out "
        f"{percent(float(short.mean()))} of the iteration time on average, {percent(float(short.max()))} at most. Either way such "
        "iterations are counted (`out_of_range` in the summary).",
        "",
    ]


def vidur_speeds(peers: Path) -> dict[str, float]:
    """Requests per CPU second of Vidur's event loop by run, from the last column of its README's table.

    Raises:
        ConfigError: the file cannot be read or holds no such row.
    """
    path = peers / "vidur" / "README.md"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error}") from error
    speeds = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) > 2 and re.fullmatch(r"up_\w+", cells[0]):
            speeds[cells[0]] = float(cells[-1].replace(",", ""))
    if not speeds:
        raise ConfigError(f"{path}: no row of a run")
    return speeds


def repeated(workload: Workload, requests: int) -> Workload:
    """The workload end to end, one mean gap apart, cut to ``requests``."""
    period = float(workload.arrival[-1]) * (1 + 1 / len(workload))
    times = -(-requests // len(workload))
    arrival = np.concatenate([workload.arrival + i * period for i in range(times)])[:requests]
    prompt, output = (np.tile(v, times)[:requests] for v in (workload.prompt_tokens, workload.output_tokens))
    return Workload.of(arrival, prompt, output)


@dataclass(frozen=True, slots=True)
class Speed:
    """Requests per second of wall time on one core, the fastest of ``REPEATS``, and the iterations of the run."""

    compiled: float
    asked: float
    iterations: int


def measure(policy: Policy, workload: Workload) -> Speed:
    """Speed with the constant decision of the policy in compiled code, and with the policy asked before every step."""
    backend = SimBackend()
    seconds = []
    for _ in range(REPEATS + 1):
        view = backend.reset(workload, policy.layout, policy.engine, EpisodeLimits())
        decision = policy.decide(view)
        start = time.perf_counter()
        run_constant(backend, decision)
        seconds.append(time.perf_counter() - start)
    compiled, counters = backend.log(), backend.counters()
    results = [run_episode(policy, workload) for _ in range(REPEATS)]
    if not np.array_equal(results[0].log.completed, compiled.completed):
        raise RuntimeError("the compiled loop and the policy loop differ")
    count = len(workload)
    return Speed(count / min(seconds[1:]), count / min(r.wall_seconds for r in results), counters.iterations)


def machine() -> str:
    """Processor, cores and software, for a statement about speed."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(encoding="utf-8"), re.MULTILINE)
        clock = re.search(r"^cpu MHz\s*:\s*(.+)$", info.read_text(encoding="utf-8"), re.MULTILINE)
        name = f"{found[1] if found else name}{f', {float(clock[1]):,.0f} MHz' if clock else ''}"
    return f"{name}, {os.cpu_count()} cores (one used), {platform.system()}, Python {platform.python_version()}, numba {numba.__version__}"


def _speed(paths: Paths, runs: Sequence[Run], model: TableTime) -> list[str]:
    theirs = vidur_speeds(paths.peers)
    checks, rows = [], []
    sarathi = [run for run in runs if run.policy == "sarathi"]
    long = repeated(sarathi[0].workload, SPEED_REQUESTS)
    cases = [(run, run.workload, run.name) for run in sarathi]
    cases.insert(0, (sarathi[0], long, f"{sarathi[0].name}, repeated to {SPEED_REQUESTS:,} requests"))
    for run, workload, label in cases:
        speed, peer = measure(policy_for(run, model), workload), theirs[run.name]
        ratio = speed.compiled / peer
        checks.append(
            Check(
                against=label,
                figure="requests per second",
                ours=f"{speed.compiled:,.0f}",
                theirs=f"{peer:,.0f}",
                error=f"{ratio:,.0f} times",
                bar=f"at least {SPEED_BAR:.0f} times",
                holds=ratio >= SPEED_BAR,
            )
        )
        iterations = (f"{speed.iterations:,}", f"{speed.compiled * speed.iterations / len(workload):,.0f}")
        rows.append((label, *iterations, f"{speed.asked:,.0f}", f"{speed.asked / peer:,.0f}"))
    headings = ("trace", "iterations", "iterations per second, compiled", "requests per second, policy asked", "times Vidur")
    return [
        "### Speed",
        "",
        "`sarathi` with the tables. Ours: wall time from the first iteration to the last in compiled code "
        f"(`llmsched_env.engine.rules`), the fastest of {REPEATS} after one to compile, on {machine()}. Vidur's: CPU time of its event "
        "loop alone on the machine that made the runs; its 8 to 10 seconds of start-up are left out.",
        "",
        *check_table(checks),
        "",
        "A policy that is asked before every iteration costs calls into Python each time:",
        "",
        *table(headings, rows, "lr"),
    ]
