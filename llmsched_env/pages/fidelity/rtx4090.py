"""The recorded vLLM 0.19 run on an RTX 4090 against the simulator: 300 ShareGPT requests, KV cache saturated.

The recorded file has lengths and times, not the prompts. Which prompts begin alike, and so share
blocks in vLLM's prefix cache, is in ``rtx4090_prompts.csv``, a table that ``write_prompts`` makes from the
run's public workload file.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmsched_baselines import make_policy
from llmsched_baselines.policy import Setting
from llmsched_env.backend import Backend, View
from llmsched_env.backends import make_backend
from llmsched_env.engine.prefix_cache import SharedPrompts
from llmsched_env.engine.simulator import PrefixCachingBackend
from llmsched_env.errors import ConfigError
from llmsched_env.files import replacing
from llmsched_env.markdown import table
from llmsched_env.metrics import latency, tpot, ttft
from llmsched_env.pages.fidelity.evidence import Check, Paths, check_table, percent
from llmsched_env.perf import Batch, IterationTimeModel, load_calibration
from llmsched_env.runner import EpisodeResult, OnStep, run_episode
from llmsched_env.types import EngineConfig, FloatArray, IterationReport, LengthStatistics, RequestLog, Workload
from llmsched_env.workload.readers import read_trace
from llmsched_hardware.calibration.importers.llmservingsim import leave_one_out, read_profile

CALIBRATION = "rtx4090-llama31-8b-vllm"
PROFILE = "llmservingsim_rtx4090"
RUN = "vllm_measured_RTX4090_llama31-8b"
PROMPTS = Path(__file__).with_name("rtx4090_prompts.csv")
PROMPTS_SOURCE = "workloads/sharegpt-llama-3.1-8b-300-sps10.jsonl of casys-kaist/LLMServingSim @ 5daddb2"
BAR = 0.01
JITTERED = 50
JITTER_SECONDS = 1e-3
FIGURES = ("mean", "median", "P90", "P95", "P99")
METRICS = ("TTFT", "TPOT", "latency")


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
    path = folder / f"{RUN}_{name}.gz"
    if not path.is_file():
        raise ConfigError(f"LLMSCHED_TRACES: no {path.name} in {folder}")
    return gzip.decompress(path.read_bytes()).decode("utf-8")


def engine_of(meta: Mapping[str, Any], time_model: IterationTimeModel) -> EngineConfig:
    """The recorded engine's settings.

    Raises:
        ConfigError: its KV cache is not the calibration's.
    """
    resolved = meta["resolved_config"]
    scheduler, cache = resolved["scheduler_config"], resolved["cache_config"]
    blocks = int(cache["num_gpu_blocks"]) - 1  # one is vLLM's null block (v1/core/block_pool.py)
    if (blocks, cache["block_size"]) != (time_model.provenance.num_blocks, time_model.provenance.block_size):
        raise ConfigError(f"calibration {CALIBRATION!r}: its KV capacity is not the {blocks} blocks of {cache['block_size']} of the run")
    return EngineConfig.vllm(
        time_model=time_model,
        num_blocks=blocks,
        block_size=int(cache["block_size"]),
        max_num_batched_tokens=int(scheduler["max_num_batched_tokens"]),
        max_num_seqs=int(scheduler["max_num_seqs"]),
        max_model_len=int(resolved["model_config"]["max_model_len"]),
        enable_chunked_prefill=bool(scheduler["enable_chunked_prefill"]),
        scheduler_reserve_full_isl=bool(scheduler["scheduler_reserve_full_isl"]),
    )


def read_run(traces: Path) -> Run:
    """The recorded run."""
    rows = [json.loads(line) for line in _text(traces, "requests.jsonl").splitlines()]
    workload = read_trace(traces / f"{RUN}_requests.jsonl.gz").workload()
    queued, first, last = (np.array([row[key] for row in rows]) for key in ("queued_ts", "first_token_ts", "last_token_ts"))
    series = list(csv.DictReader(_text(traces, "timeseries.csv").splitlines()))
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
    meta = json.loads(_text(traces, "meta.json"))
    seconds = np.array([[float(row[key]) for key in ("running", "waiting", "kv_cache_pct")] for row in series])
    return Run(
        workload=workload,
        log=log,
        seconds=seconds,
        engine=engine_of(meta, load_calibration(CALIBRATION)),
        started=_series_start(log, np.array([float(row["prompt_throughput"]) for row in series])),
        workload_sha256=str(meta["dataset_hash"]),
    )


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


# ------------------------------------------------------------------------------------------ common heads of prompts


def common_heads(prompts: Sequence[Sequence[int]], least: int) -> list[tuple[int, int, int]]:
    """(request, earlier request, tokens): the first with the longest common head, where it has ``least`` tokens or more."""
    found = []
    for i, prompt in enumerate(prompts):
        donor, longest = -1, least - 1
        for j in range(i):
            other = prompts[j]
            if prompt[:least] != other[:least]:
                continue
            n = next((k for k, (a, b) in enumerate(zip(prompt, other, strict=False)) if a != b), min(len(prompt), len(other)))
            if n > longest:
                donor, longest = j, n
        if donor >= 0:
            found.append((i, donor, longest))
    return found


def prompts_table(workload: Path, sha256: str, block_size: int) -> str:
    """The text of ``rtx4090_prompts.csv``.

    Raises:
        ConfigError: not the workload file of the recorded run.
    """
    data = workload.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != sha256:
        raise ConfigError(f"{workload.name}: sha256 {digest}, the recorded run's workload has {sha256}")
    prompts = [json.loads(line)["input_tok_ids"] for line in data.decode("utf-8").splitlines()]
    rows = [f"{i},{donor},{tokens}" for i, donor, tokens in common_heads(prompts, block_size)]
    return "\n".join(["request,shares_with,tokens", *rows, ""])


def write_prompts(traces: Path, workload: Path) -> Path:
    """Make ``rtx4090_prompts.csv`` again; where it stands.

    Raises:
        ConfigError: no recorded run in ``traces``, or not its workload file.
    """
    run = read_run(traces)
    text = prompts_table(workload, run.workload_sha256, run.engine.block_size)
    with replacing(PROMPTS) as file:
        file.write(text)
    return PROMPTS


def read_prompts(n: int) -> SharedPrompts:
    """The shipped table for a workload of n requests."""
    donor, tokens = np.full(n, -1), np.zeros(n, dtype=np.int64)
    with PROMPTS.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            donor[int(row["request"])] = int(row["shares_with"])
            tokens[int(row["request"])] = int(row["tokens"])
    return SharedPrompts.of(donor, tokens)


# ------------------------------------------------------------------------------------------------------ replay


def backends(n: int) -> dict[str, Backend]:
    """The simulator as the run was (last), and with less of its prefix cache."""
    return {
        "off": make_backend("sim"),
        "own blocks after a preemption": PrefixCachingBackend(uncached_first=False),
        "own blocks and common heads of prompts, as recorded": PrefixCachingBackend(read_prompts(n), uncached_first=False),
    }


def replay(run: Run, backend: Backend, workload: Workload | None = None, on_step: OnStep | None = None) -> EpisodeResult:
    """The recorded requests on the simulator under the policy ``vllm``."""
    work = run.workload if workload is None else workload
    statistics = LengthStatistics.of(work.prompt_tokens, work.output_tokens, np.ones(len(work)))
    policy = make_policy("vllm", Setting(statistics=statistics, rate=len(work) / float(work.arrival[-1]), engine=run.engine))
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


# -------------------------------------------------------------------------------------------------- the section


def checks(run: Run, log: RequestLog) -> list[Check]:
    """One check for each figure."""
    ours, measured = figures(log), figures(run.log)
    return [
        Check.relative("vLLM 0.19 on an RTX 4090", f"{metric}, {figure}", float(ours[i, j]), float(measured[i, j]), BAR)
        for i, metric in enumerate(METRICS)
        for j, figure in enumerate(FIGURES)
    ]


def _signed(share: float) -> str:
    return f"{100 * share:+.2f} %"


def _worst(error: FloatArray) -> str:
    i, j = divmod(int(np.abs(error).argmax()), len(FIGURES))
    return f"{_signed(float(error[i, j]))} ({METRICS[i]} {FIGURES[j]})"


@dataclass(frozen=True, slots=True)
class Variant:
    """One replay with more or less of the prefix cache. ``hits``: share of the tokens asked for that it held; None without one."""

    name: str
    error: FloatArray
    result: EpisodeResult
    hits: float | None

    @property
    def row(self) -> list[str]:
        mean = [_signed(float(e)) for e in self.error[:, 0]]
        found = "-" if self.hits is None else f"{self.hits:.1%}"
        return [self.name, *mean, _worst(self.error), f"{self.result.summary.forced_evictions}", found]


def variant(run: Run, name: str, backend: Backend) -> Variant:
    """The run replayed on one of ``backends``."""
    result = replay(run, backend)
    hits = backend.hit_tokens / backend.asked_tokens if isinstance(backend, PrefixCachingBackend) else None
    return Variant(name, errors(run, result.log), result, hits)


def section(paths: Paths) -> list[str]:
    """Markdown lines: the figures, what the prefix cache does to them, how firm they are, and the errors of the tables."""
    run = read_run(paths.traces)
    profile_folder = paths.calibration / PROFILE
    engine, n = run.engine, len(run.workload)
    tried = backends(n)
    variants = [variant(run, name, backend) for name, backend in tried.items()]
    recorded, backend = variants[-1], list(tried.values())[-1]
    outside, iterations = recorded.result.summary.out_of_range, recorded.result.summary.iterations
    theirs = their_errors(profile_folder)
    theirs_worst = max(theirs, key=lambda name: abs(theirs[name]))
    return [
        "## The recorded vLLM 0.19 run on an RTX 4090",
        "",
        f"{n} ShareGPT requests on Llama-3.1-8B, recorded with vLLM 0.19.0 by LLMServingSim's authors with the KV cache saturated "
        f"({engine.num_blocks:,} usable blocks of {engine.block_size}). Ours: policy `vllm` on the simulator with prefix caching and the "
        f"engine settings of the run's own record; iteration times from `{CALIBRATION}`, the operator profile of the same GPU. **No "
        "parameter is fitted to the run**, and no engine overhead is added: the recorded engine schedules asynchronously, while the GPU "
        "works. Arrivals, TTFT and latency count from `queued_ts`, the engine's own clock; percentiles are numpy's.",
        "",
        *check_table(checks(run, recorded.result.log)),
        "",
        f"Largest error: {_worst(recorded.error)}. LLMServingSim's own largest error on this run: {_signed(theirs[theirs_worst])} "
        f"({theirs_worst}). {outside} of {iterations:,} iterations lie outside the profile's range.",
        "",
        *_prefix_cache(variants, read_prompts(n)),
        *_firmness(run, backend),
        *_interpolation(profile_folder),
        *_skew(run, backend, profile_folder),
        "Not used here: asynchronous scheduling, under which the blocks of a finished request are free one iteration later (rule 22). "
        "Not modelled: the padding of batches to CUDA graph sizes, and fused operators (the profile ran them one by one).",
        "",
    ]


def _prefix_cache(variants: Sequence[Variant], heads: SharedPrompts) -> list[str]:
    """What the errors are with less of the prefix cache than the run had."""
    return [
        "**The prefix cache decides.** vLLM has it on by default and the run had it on. A preempted request finds again those of its "
        f"blocks that nobody took meanwhile, and {int((heads.donor >= 0).sum())} of the prompts begin like an earlier one. Errors of the "
        "means, and the largest of the fifteen errors, by what is simulated of it:",
        "",
        *table(
            ("prefix cache", "TTFT", "TPOT", "latency", "largest error", "preemptions", "tokens found in the cache"),
            [one.row for one in variants],
            "lr",
        ),
        "",
        f"(Which prompts begin alike is not in the recorded file. It was taken from {PROMPTS_SOURCE}, whose sha256 the record states.)",
        "",
    ]


def _firmness(run: Run, backend: Backend) -> list[str]:
    """What a millisecond changes, and the run second by second."""
    spread = jittered(run, backend)
    series = by_second(run, backend)
    seen = ~np.isnan(series).any(axis=1)
    gap = series[seen] - run.seconds[seen]
    return [
        f"**How firm.** A saturated cache amplifies small differences: {JITTERED} replays whose arrivals are each up to 1 ms later give a "
        f"largest error of {percent(float(np.abs(spread).max()))} over all figures and replays; "
        f"{int((np.abs(spread).max(axis=(1, 2)) <= BAR).sum())} of {JITTERED} replays meet the bar on all fifteen.",
        "",
        f"**Second by second** over {int(seen.sum())} seconds (mean difference, mean absolute difference): "
        f"running {gap[:, 0].mean():+.2f}, {np.abs(gap[:, 0]).mean():.2f} requests; "
        f"waiting {gap[:, 1].mean():+.2f}, {np.abs(gap[:, 1]).mean():.2f} requests; "
        f"KV used {gap[:, 2].mean():+.2f}, {np.abs(gap[:, 2]).mean():.2f} percentage points. The record holds values after the last "
        "iteration of each second.",
        "",
    ]


def _interpolation(profile: Path) -> list[str]:
    """Errors of the profile's tables between their points."""
    left_out = leave_one_out(read_profile(profile))
    return [
        "**Interpolation.** The tables are measured; between their points they are linear. Every interior point predicted from its two "
        "neighbours, which lie twice as far apart as in use:",
        "",
        *table(
            ("table", "points", "mean error", "bias", "P95"),
            [[e.name, f"{e.points:,}", f"{e.mean:.1%}", f"{e.bias:+.1%}", f"{e.p95:.1%}"] for e in left_out],
            "lr",
        ),
        "",
    ]


def _skew(run: Run, backend: Backend, profile: Path) -> list[str]:
    """What the profile's correction for decodes of unequal context would add."""
    alone, added, weights = skew(run, backend, read_skew(profile))
    return [
        "**Unequal contexts.** Attention is read at the mean context of the decodes. The profile also holds a correction for unequal "
        "ones, fitted to batches of two lengths: time(mean) + alpha (time(longest) - time(mean)). Its own record states it as disabled, "
        f"and it is not applied here. It would add {percent(added / alone)} to the iterations without prefill ({alone:.0f} s of the run; "
        f"alpha {np.median(weights):.2f} in the median), more than the run leaves room for. The eager profile also misses what fused "
        "operators and CUDA graphs save, so part of this agreement may be two such effects that cancel; the run alone cannot tell them "
        "apart.",
        "",
    ]


@dataclass(frozen=True, slots=True)
class SkewCell:
    """One cell of ``skew_fit.csv`` for batches without prefill: upper edges of the cell, and its alpha."""

    decodes: float
    rate: float
    longest: float
    alpha: float


def read_skew(profile: Path) -> list[SkewCell]:
    """The cells without prefill, smallest first.

    The rate is (mean - shortest) / (longest - shortest) context of the decodes.
    """
    edges = {"": 1.0, "%": 0.01, "k": 1024.0}

    def edge(label: str) -> float:
        found = re.fullmatch(r"\w+<=(\d+)([%k]?)", label)
        return float(found[1]) * edges[found[2]] if found else np.inf

    text = gzip.decompress((profile / "skew_fit.csv.gz").read_bytes()).decode("utf-8")
    cells = [
        SkewCell(edge(row["n_label"]), edge(row["skew_rate_label"]), edge(row["kv_big_label"]), float(row["alpha"]))
        for row in csv.DictReader(text.splitlines())
        if row["pc"] == "0" and row["kp_label"] == "kp=0"
    ]
    return sorted(cells, key=lambda c: (c.decodes, c.rate, c.longest))


def skew(run: Run, backend: Backend, cells: Sequence[SkewCell]) -> tuple[float, float, list[float]]:
    """(seconds of the iterations without prefill, seconds the correction would add to them, alpha of each)."""
    model = run.engine.time_model
    contexts: list[int] = []  # of the decodes of the next iteration, if it is one without prefill
    alphas: list[float] = []
    alone = added = 0.0

    def note(report: IterationReport, view: View) -> None:
        nonlocal contexts, alone, added
        n = report.decode_requests
        if report.prefill_tokens == 0 and n == len(contexts) and n > 1 and max(contexts) > min(contexts):
            longest, shortest, mean = max(contexts), min(contexts), sum(contexts) / n
            rate = (mean - shortest) / (longest - shortest)
            alpha = next(c.alpha for c in cells if n <= c.decodes and rate <= c.rate and longest <= c.longest)
            seconds = [model.seconds(Batch(decodes=n, decode_kv=n * (kv + 1), batch_size=n)) for kv in (mean, longest)]
            alone += seconds[0]
            added += alpha * (seconds[1] - seconds[0])
            alphas.append(alpha)
        residents = view.resident_requests()
        contexts = residents.computed[residents.computed >= residents.prefill_target].tolist()

    replay(run, backend, on_step=note)
    return alone, added, alphas
