"""A run of vLLM that LLMServingSim's authors recorded, and its replay on the simulator.

Two were recorded on the same 300 ShareGPT requests: on an RTX 4090 with the KV cache saturated, and on an RTX PRO 6000 where
the number of sequences is what is short.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmsched_baselines import make_policy
from llmsched_baselines.policy import Setting
from llmsched_env.backend import Backend, View
from llmsched_env.engine.simulator import PrefixCachingBackend
from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import ConfigError
from llmsched_env.metrics import latency, tpot, ttft
from llmsched_env.pages.fidelity.evidence import Check
from llmsched_env.pages.fidelity.recorded_prompts import read_prompts
from llmsched_env.perf import IterationTimeModel, load_calibration
from llmsched_env.runner import EpisodeResult, OnStep, run_episode
from llmsched_env.types import FloatArray, IterationReport, LengthStatistics, RequestLog, Workload
from llmsched_env.workload.readers import read_trace

JITTERED = 50
JITTER_SECONDS = 1e-3
FIGURES = ("mean", "median", "P90", "P95", "P99")
METRICS = ("TTFT", "TPOT", "latency")


@dataclass(frozen=True, slots=True)
class Recording:
    """A recorded run, and what it is compared with.

    Attributes:
        card: GPU, for readers.
        calibration: shipped, made from the profile.
        profile: folder of the profile in the calibration data.
        files: the recorded files' names in the traces begin so.
        bar: largest relative error asked for.
        async_scheduling: replayed with the next iteration scheduled while one runs, which is vLLM 0.19's default.
        blocks: usable KV blocks where the record does not hold them.
        max_model_len: tokens, where the record does not hold it.
    """

    card: str
    calibration: str
    profile: str
    files: str
    bar: float
    async_scheduling: bool
    blocks: int | None = None
    max_model_len: int | None = None


RTX4090 = Recording(
    card="RTX 4090",
    calibration="rtx4090-llama31-8b-vllm",
    profile="llmservingsim_rtx4090",
    files="vllm_measured_RTX4090_llama31-8b",
    bar=0.01,
    async_scheduling=False,
)
RTXPRO6000 = Recording(
    card="RTX PRO 6000",
    calibration="rtxpro6000-llama31-8b-vllm",
    profile="llmservingsim_rtxpro6000",
    files="vllm_measured_RTXPRO6000_llama31-8b",
    bar=0.02,
    async_scheduling=True,
    # 96 GB at vLLM's default utilisation of 0.9, less 16 GB of weights, is some 33,000 blocks of 2 MiB; the run uses a third of these.
    blocks=30_000,
    max_model_len=131_072,  # the model's own: the record says that none was asked for
)


@dataclass(frozen=True, slots=True)
class Run:
    """What was recorded.

    Attributes:
        workload: arrivals are ``queued_ts`` minus its smallest value.
        log: the run in the form of our own per-request log; preemptions were not recorded.
        seconds: one row for each second: requests running and waiting, KV used in percent.
        engine: the engine's settings, with the calibration as its time model.
        started: seconds from the start of the time series to the first arrival.
        workload_sha256: of the file with the prompts.
    """

    workload: Workload
    log: RequestLog
    seconds: FloatArray
    engine: EngineConfig
    started: float
    workload_sha256: str


def _text(folder: Path, name: str) -> str:
    path = folder / f"{name}.gz"
    if not path.is_file():
        raise ConfigError(f"LLMSCHED_TRACES: no {path.name} in {folder}")
    return gzip.decompress(path.read_bytes()).decode("utf-8")


def engine_of(recording: Recording, meta: Mapping[str, Any], time_model: IterationTimeModel) -> EngineConfig:
    """The recorded engine's settings: the resolved configuration, or where that was not recorded what was asked for.

    Raises:
        ConfigError: its KV cache is not the calibration's.
    """
    if "resolved_config" not in meta:
        asked = meta["engine_kwargs"]
        longest = asked["max_model_len"] or recording.max_model_len
        assert longest is not None and recording.blocks is not None
        return EngineConfig.vllm(
            time_model=time_model,
            num_blocks=recording.blocks,
            max_num_batched_tokens=int(asked["max_num_batched_tokens"]),
            max_num_seqs=int(asked["max_num_seqs"]),
            max_model_len=int(longest),
            async_scheduling=recording.async_scheduling,
        )
    resolved = meta["resolved_config"]
    scheduler, cache = resolved["scheduler_config"], resolved["cache_config"]
    blocks = int(cache["num_gpu_blocks"]) - 1  # one is vLLM's null block (v1/core/block_pool.py)
    if (blocks, cache["block_size"]) != (time_model.provenance.num_blocks, time_model.provenance.block_size):
        raise ConfigError(
            f"calibration {recording.calibration!r}: its KV capacity is not the {blocks} blocks of {cache['block_size']} of the run"
        )
    return EngineConfig.vllm(
        time_model=time_model,
        num_blocks=blocks,
        block_size=int(cache["block_size"]),
        max_num_batched_tokens=int(scheduler["max_num_batched_tokens"]),
        max_num_seqs=int(scheduler["max_num_seqs"]),
        max_model_len=int(resolved["model_config"]["max_model_len"]),
        enable_chunked_prefill=bool(scheduler["enable_chunked_prefill"]),
        scheduler_reserve_full_isl=bool(scheduler["scheduler_reserve_full_isl"]),
        async_scheduling=recording.async_scheduling,
    )


def read_run(recording: Recording, traces: Path) -> Run:
    """The recorded run."""
    name = recording.files
    rows = [json.loads(line) for line in _text(traces, f"{name}_requests.jsonl").splitlines()]
    workload = read_trace(traces / f"{name}_requests.jsonl.gz").workload()
    queued, first, last = (np.array([row[key] for row in rows]) for key in ("queued_ts", "first_token_ts", "last_token_ts"))
    series = list(csv.DictReader(_text(traces, f"{name}_timeseries.csv").splitlines()))
    n = len(rows)
    log = RequestLog(
        arrival=workload.arrival,
        prompt_tokens=workload.prompt_tokens,
        output_tokens=workload.output_tokens,
        class_id=np.zeros(n, np.int32),
        admitted=np.array([row["scheduled_ts"] for row in rows]) - queued.min(),
        first_token=first - queued.min(),
        completed=last - queued.min(),
        evictions=np.zeros(n, np.int32),
        forced_evictions=np.zeros(n, np.int32),
        rejected=np.zeros(n, np.bool_),
    )
    meta = json.loads(_text(traces, f"{name}_meta.json"))
    seconds = np.array([[float(row[key]) for key in ("running", "waiting", "kv_cache_pct")] for row in series])
    return Run(
        workload=workload,
        log=log,
        seconds=seconds,
        engine=engine_of(recording, meta, load_calibration(recording.calibration)),
        started=_series_start(log, np.array([float(row["prompt_throughput"]) for row in series])),
        workload_sha256=str(meta["dataset_hash"]),
    )


def recorded_series(recording: Recording, traces: Path, column: str) -> FloatArray:
    """(seconds,) one column of the recorded time series."""
    rows = csv.DictReader(_text(traces, f"{recording.files}_timeseries.csv").splitlines())
    return np.array([float(row[column]) for row in rows])


def _series_start(log: RequestLog, prompt_tokens: FloatArray) -> float:
    """Seconds from the start of the recorded time series to the first arrival, which no file states.

    vLLM counts a prompt's tokens when its first output token comes out, so the right offset puts the
    recorded first tokens into the recorded seconds. Taken from the record alone.
    """
    offsets = np.arange(0.0, 1.0, 0.005)
    misfit = []
    for offset in offsets:
        row = np.minimum((log.first_token + offset).astype(int), prompt_tokens.size - 1)
        misfit.append(np.abs(np.bincount(row, weights=log.prompt_tokens, minlength=prompt_tokens.size) - prompt_tokens).sum())
    best = offsets[np.flatnonzero(np.array(misfit) == min(misfit))]
    return float(best.mean())


# ------------------------------------------------------------------------------------------------------ replay


def caching(n: int) -> PrefixCachingBackend:
    """The simulator with the prefix cache that the runs had."""
    return PrefixCachingBackend(read_prompts(n), uncached_first=False)


def replay(
    run: Run, backend: Backend, workload: Workload | None = None, on_step: OnStep | None = None, engine: EngineConfig | None = None
) -> EpisodeResult:
    """The recorded requests on the simulator under the policy ``vllm``."""
    work = run.workload if workload is None else workload
    settings = run.engine if engine is None else engine
    statistics = LengthStatistics.of(work.prompt_tokens, work.output_tokens, np.ones(len(work)))
    policy = make_policy("vllm", Setting(statistics=statistics, rate=len(work) / float(work.arrival[-1]), engine=settings))
    return run_episode(policy, work, backend=backend, on_step=on_step)


def figures(log: RequestLog) -> FloatArray:
    """(3, 5) seconds: TTFT, TPOT, latency by mean, median, P90, P95, P99."""
    rows = [values[~np.isnan(values)] for values in (ttft(log), tpot(log), latency(log))]
    return np.array([[row.mean(), *np.percentile(row, (50, 90, 95, 99))] for row in rows])


def errors(run: Run, log: RequestLog) -> FloatArray:
    """(3, 5) relative error of every figure."""
    relative: FloatArray = figures(log) / figures(run.log) - 1.0
    return relative


def jittered(run: Run, backend: Backend) -> FloatArray:
    """(JITTERED, 3, 5) errors of replays whose arrivals are each up to a millisecond later."""
    found = []
    for seed in range(JITTERED):
        late = np.random.default_rng(seed).uniform(0.0, JITTER_SECONDS, len(run.workload))
        arrival = np.maximum.accumulate(run.workload.arrival + late)
        work = Workload.of(arrival, run.workload.prompt_tokens, run.workload.output_tokens)
        found.append(errors(run, replay(run, backend, work).log))
    return np.array(found)


def by_second(run: Run, backend: Backend) -> FloatArray:
    """(seconds, 3) running, waiting and KV used in percent after the last iteration of each second, as the run's logger has them."""
    rows: FloatArray = np.full_like(run.seconds, np.nan)

    def note(report: IterationReport, view: View) -> None:
        if not report.idle:
            second = int(report.start + report.duration + run.started)
            if second < rows.shape[0]:
                rows[second] = (view.num_residents, view.num_waiting, 100.0 * view.kv_used / run.engine.num_blocks)

    replay(run, backend, on_step=note)
    return rows


def their_errors(profile: Path) -> dict[str, float]:
    """LLMServingSim's own errors on the run, by "METRIC FIGURE"."""
    text = (profile / "their_validation_summary.txt").read_text(encoding="utf-8")
    found = {}
    for name, error in re.findall(r"^(\w+ \w+)\s+[\d.]+\s+[\d.]+\s+([+-][\d.]+)%", text, flags=re.MULTILINE):
        metric, figure = name.split()
        found[f"{metric if metric != 'Latency' else 'latency'} {figure if figure.startswith('P') else figure.lower()}"] = float(error) / 100
    return found


def checks(recording: Recording, run: Run, log: RequestLog) -> list[Check]:
    """One check for each figure."""
    ours, measured = figures(log), figures(run.log)
    return [
        Check.relative(f"vLLM 0.19 on an {recording.card}", f"{metric}, {figure}", float(ours[i, j]), float(measured[i, j]), recording.bar)
        for i, metric in enumerate(METRICS)
        for j, figure in enumerate(FIGURES)
    ]
