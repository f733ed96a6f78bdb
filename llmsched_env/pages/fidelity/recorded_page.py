"""The page's sections on runs of vLLM that LLMServingSim's authors recorded, against the simulator."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmsched_env.backend import Backend, View
from llmsched_env.backends import make_backend
from llmsched_env.engine.prefix_cache import SharedPrompts
from llmsched_env.engine.simulator import PrefixCachingBackend
from llmsched_env.engine_config import EngineConfig
from llmsched_env.markdown import table
from llmsched_env.pages.fidelity.evidence import Paths, check_table, percent
from llmsched_env.pages.fidelity.recorded_iterations import PrefillIteration, decode_seconds, prefill_iterations
from llmsched_env.pages.fidelity.recorded_prompts import PROMPTS_SOURCE, read_prompts
from llmsched_env.pages.fidelity.recorded_run import (
    FIGURES,
    JITTERED,
    METRICS,
    RTX4090,
    RTXPRO6000,
    Recording,
    Run,
    by_second,
    caching,
    checks,
    errors,
    jittered,
    read_run,
    recorded_series,
    replay,
    their_errors,
)
from llmsched_env.perf import Batch
from llmsched_env.perf.mixed_attention import MixedAttentionTime
from llmsched_env.runner import EpisodeResult
from llmsched_env.types import FloatArray, IterationReport
from llmsched_hardware.calibration.importers.llmservingsim import MODELS, Profile, compose, leave_one_out, read_profile

# ---------------------------------------------------------------------------------------------- replays compared


def _signed(share: float) -> str:
    return f"{100 * share:+.2f} %"


def _worst(error: FloatArray) -> str:
    i, j = divmod(int(np.abs(error).argmax()), len(FIGURES))
    return f"{_signed(float(error[i, j]))} ({METRICS[i]} {FIGURES[j]})"


@dataclass(frozen=True, slots=True)
class Variant:
    """One replay with more or less of what the run had. ``hits``: share of the tokens asked for that the prefix cache held, if any."""

    name: str
    error: FloatArray
    result: EpisodeResult
    hits: float | None

    @property
    def means(self) -> list[str]:
        """The errors of the three means, and the largest of all."""
        return [*(_signed(float(e)) for e in self.error[:, 0]), _worst(self.error)]

    @property
    def found(self) -> str:
        """``hits`` as shown."""
        return "-" if self.hits is None else f"{self.hits:.1%}"


def variant(run: Run, name: str, backend: Backend, engine: EngineConfig | None = None) -> Variant:
    """The run replayed, on other engine settings if given."""
    result = replay(run, backend, engine=engine)
    hits = backend.hit_tokens / backend.asked_tokens if isinstance(backend, PrefixCachingBackend) else None
    return Variant(name, errors(run, result.log), result, hits)


def backends(n: int) -> dict[str, Backend]:
    """The simulator as the run on the RTX 4090 was (last), and with less of its prefix cache."""
    return {
        "off": make_backend("sim"),
        "own blocks after a preemption": PrefixCachingBackend(uncached_first=False),
        "own blocks and common heads of prompts, as recorded": caching(n),
    }


def one_grid(profile: Profile) -> Profile:
    """A profile with those cells of its attention grid alone whose coordinates are powers of two."""
    kept = {cell: time for cell, time in profile.attention.items() if all(x & (x - 1) == 0 for x in cell)}
    return dataclasses.replace(profile, attention=kept, skew=None)


def mean_contexts_alone(model: MixedAttentionTime) -> MixedAttentionTime:
    """The model without its correction for unequal contexts."""
    return dataclasses.replace(
        model, skew=None, skew_chunk=None, skew_decodes=None, skew_rate=None, skew_longest=None, skew_context=None, skew_reading=None
    )


def padded_to_graphs(model: MixedAttentionTime, max_num_seqs: int) -> MixedAttentionTime:
    """The model where batches that fit a CUDA graph compute as many tokens as the next size captured.

    Sizes by vLLM 0.19, ``config/vllm.py``: 1, 2, 4 and multiples of 8 up to twice ``max_num_seqs``, below 256, and of 16 up to 512.
    """
    last = min(2 * max_num_seqs, 512)
    sizes = np.array([1, 2, 4, *range(8, min(last, 256) + 1, 8), *range(272, last + 1, 16)])
    few = np.arange(1, last + 1)
    many = model.tokens > last
    seconds = np.interp(sizes[np.searchsorted(sizes, few)], model.tokens, model.linear)
    tokens = np.concatenate((few.astype(np.float64), model.tokens[many]))
    return dataclasses.replace(model, tokens=tokens, linear=np.concatenate((seconds, model.linear[many])))


def effects(recording: Recording, run: Run, profile: Profile) -> list[Variant]:
    """Replays of a run whose profile corrects for unequal contexts, each with one effect more; the last but one is the run's own."""
    n, full = len(run.workload), run.engine.time_model
    assert isinstance(full, MixedAttentionTime)
    graph = MODELS["llama-3.1-8b"]
    mean_alone = mean_contexts_alone(full)
    steps: list[tuple[str, MixedAttentionTime, Backend, bool]] = [
        ("one of the two grids, mean contexts alone", compose(one_grid(profile), graph, "one grid"), make_backend("sim"), False),
        ("both grids", mean_alone, make_backend("sim"), False),
        ("prefix cache with common heads of prompts", mean_alone, caching(n), False),
        ("unequal contexts, share of long ones by the range", dataclasses.replace(full, skew_reading="range"), caching(n), False),
        ("the same, by mean and variance", full, caching(n), False),
        ("asynchronous scheduling, vLLM 0.19's default", full, caching(n), True),
        ("batches padded to CUDA graph sizes", padded_to_graphs(full, run.engine.max_num_seqs), caching(n), True),
    ]
    return [
        variant(run, name, backend, dataclasses.replace(run.engine, time_model=model, async_scheduling=asynchronous))
        for name, model, backend, asynchronous in steps
    ]


# -------------------------------------------------------------------------------------------------- the sections


def _figures_of(recording: Recording, run: Run, recorded: Variant, profile_folder: Path, pressure: str) -> list[str]:
    """The beginning of a section: what was recorded, every figure, and the largest errors."""
    outside, iterations = recorded.result.summary.out_of_range, recorded.result.summary.iterations
    theirs = their_errors(profile_folder)
    theirs_worst = max(theirs, key=lambda name: abs(theirs[name]))
    return [
        f"## The recorded vLLM 0.19 run on an {recording.card}",
        "",
        f"{len(run.workload)} ShareGPT requests on Llama-3.1-8B, recorded with vLLM 0.19.0 by LLMServingSim's authors {pressure}. "
        "Ours: policy `vllm` on the simulator with prefix caching and the "
        f"engine settings of the run's own record; iteration times from `{recording.calibration}`, the operator profile of the same GPU. "
        "**No parameter is fitted to the run**, and no engine overhead is added: the recorded engine schedules asynchronously, while the "
        "GPU works. Arrivals, TTFT and latency count from `queued_ts`, the engine's own clock; percentiles are numpy's.",
        "",
        *check_table(checks(recording, run, recorded.result.log)),
        "",
        f"Largest error: {_worst(recorded.error)}. LLMServingSim's own largest error on this run: {_signed(theirs[theirs_worst])} "
        f"({theirs_worst}). {outside} of {iterations:,} iterations lie outside the profile's range.",
        "",
    ]


def rtx4090(paths: Paths) -> list[str]:
    """Markdown lines: the figures, what the prefix cache does to them, how firm they are, and the errors of the tables."""
    recording = RTX4090
    run = read_run(recording, paths.traces)
    folder = paths.calibration / recording.profile
    engine, n = run.engine, len(run.workload)
    tried = backends(n)
    variants = [variant(run, name, backend) for name, backend in tried.items()]
    recorded, backend = variants[-1], list(tried.values())[-1]
    overlapped = variant(run, "asynchronous", caching(n), dataclasses.replace(engine, async_scheduling=True))
    pressure = f"with the KV cache saturated ({engine.num_blocks:,} usable blocks of {engine.block_size})"
    return [
        *_figures_of(recording, run, recorded, folder, pressure),
        *_prefix_cache(variants, read_prompts(n)),
        *_firmness(recording, run, backend),
        *_interpolation(folder),
        *_skew(run, backend, folder),
        "Not used here: asynchronous scheduling, under which the blocks of a finished request are free one iteration later (rule 22); "
        f"with it the largest error is {_worst(overlapped.error)}. "
        "Not modelled: the padding of batches to CUDA graph sizes, and fused operators (the profile ran them one by one).",
        "",
    ]


def rtxpro6000(paths: Paths) -> list[str]:
    """Markdown lines: the figures, what each effect is worth, how firm they are, single iterations, and the errors of the tables."""
    recording = RTXPRO6000
    run = read_run(recording, paths.traces)
    folder = paths.calibration / recording.profile
    profile = read_profile(folder)
    variants = effects(recording, run, profile)
    recorded = variants[-2]
    missed = sum(not check.holds for check in checks(recording, run, recorded.result.log))
    used = recorded.result.summary.kv_max * run.engine.num_blocks
    pressure = (
        f"with at most {run.engine.max_num_seqs} sequences at a time. The record holds neither the number of KV blocks nor vLLM's resolved "
        f"settings; {run.engine.num_blocks:,} blocks are simulated, of which the run uses at most {used:,.0f}, so that more would change "
        "nothing"
    )
    return [
        *_figures_of(recording, run, recorded, folder, pressure),
        f"**{missed} of the 15 figures miss the bar**, those of TTFT, for a reason found below in the record itself: the prefill "
        "iterations of this run took longer than the profile's operators say.",
        "",
        *_effects(variants),
        *_firmness(recording, run, caching(len(run.workload)), kv=False),
        *_decode_iterations(recording, run, paths.traces),
        *_prefill_iterations(run, read_run(RTX4090, paths.traces), their_errors(folder)),
        *_interpolation(folder),
    ]


def _effects(variants: Sequence[Variant]) -> list[str]:
    """What each effect is worth."""
    return [
        "**What each effect is worth.** Each line adds one to the line before. Errors of the means, and the largest of the fifteen:",
        "",
        *table(
            ("with", "TTFT", "TPOT", "latency", "largest error", "tokens found in the cache"),
            [[one.name, *one.means, one.found] for one in variants],
            "lr",
        ),
        "",
        "Unequal contexts: the kernel waits for the longest context, time(mean) + alpha (time(longest) - time(mean)), with the profile's "
        "own alpha, which its record states as enabled. The profile measured batches of two contexts, r of them long. By the range r is "
        "(mean - shortest) / (longest - shortest), as LLMServingSim reads a batch; by mean and variance it is that of the batch of two "
        "contexts with the same longest, mean and variance (`llmsched_env/perf/skew.py`). On the profile's own batches both are the same.",
        "",
    ]


def _decode_iterations(recording: Recording, run: Run, traces: Path) -> list[str]:
    """Iterations without prefill, recorded and modelled."""
    full = run.engine.time_model
    assert isinstance(full, MixedAttentionTime)
    models = (mean_contexts_alone(full), dataclasses.replace(full, skew_reading="range"), full)
    seconds = decode_seconds(run, recorded_series(recording, traces, "gen_throughput"), models)
    rows = []
    for least, most in ((96, 128), (64, 96), (40, 64), (24, 40), (8, 24)):
        those = [s for s in seconds if least < s.decodes <= most]
        if those:
            recorded = sum(s.tokens for s in those)
            shares = [recorded / sum(s.modelled[i] for s in those) - 1.0 for i in range(len(models))]
            longest = np.mean([s.longest for s in those])
            rows.append([f"{least + 1} to {most}", f"{len(those)}", f"{longest:,.0f}", *map(_signed, shares)])
    return [
        "**Iterations without prefill.** After the last prompt, tokens a second are iterations a second. Iteration times of the model less "
        "those recorded, by the number of decodes; one request is twice as long as all others until 45 are left:",
        "",
        *table(("decodes", "seconds", "longest context", "mean contexts alone", "by the range", "by mean and variance"), rows, "lr"),
        "",
    ]


def _prefill_iterations(run: Run, elsewhere: Run, theirs: Mapping[str, float]) -> list[str]:
    """Iterations with prefill, recorded and modelled; ``elsewhere``: another run, ``theirs``: the errors of LLMServingSim."""
    found = prefill_iterations(run, read_prompts(len(run.workload)), run.engine.block_size)
    rows = []
    for least, most in ((128, 384), (384, 640), (640, 768), (768, 896), (896, 1152), (1152, 1280), (1280, 1408), (1408, 2048)):
        those = [one for one in found if least < one.tokens + one.decodes <= most]
        if those:
            recorded, modelled = sum(one.recorded for one in those), sum(one.modelled for one in those)
            mean = [1e3 * value / len(those) for value in (recorded, modelled)]
            rows.append(
                [f"{least + 1} to {most}", f"{len(those)}", f"{mean[0]:.1f} ms", f"{mean[1]:.1f} ms", _signed(modelled / recorded - 1)]
            )
    few = [one for one in found if one.decodes <= 80]
    longer, captured = _longer(found), 2 * run.engine.max_num_seqs
    model = run.engine.time_model
    assert isinstance(model, MixedAttentionTime)
    late = dataclasses.replace(model, linear=model.linear + np.where(model.tokens > captured, longer, 0.0))
    shifted = variant(run, "shifted", caching(len(run.workload)), dataclasses.replace(run.engine, time_model=late))
    other = prefill_iterations(elsewhere, read_prompts(len(elsewhere.workload)), elsewhere.engine.block_size)
    return [
        f"**Iterations with prefill.** {len(found)} of them begin while decodes alone are in flight and compute their prompts whole, so "
        "that first token less scheduling is their own time after that of the decodes (by the model, see the table before):",
        "",
        *table(("tokens of the batch", "iterations", "recorded", "model", "error"), rows, "lr"),
        "",
        f"All together {_signed(_error_of(found))}. An iteration took {1e3 * longer:.1f} ms longer than by the model, beside at most "
        f"80 decodes {1e3 * _longer(few):.1f} ms ({len(few)} iterations), and the error has steps where the profile's GEMM times have "
        "theirs, every 128 tokens. Other GEMM kernels than those that the profile timed one by one, or the launch of kernels without a "
        f"CUDA graph (vLLM captures up to {captured} tokens for {run.engine.max_num_seqs} sequences), would look so; the record does not "
        f"tell which, and the profile holds neither. (The median error of {len(other)} such iterations on the RTX 4090 is "
        f"{_signed(_median_error(other))}.) With {1e3 * longer:.1f} ms added to every iteration of more than {captured} tokens the largest "
        f"of the fifteen errors would be {_worst(shifted.error)}: that number comes from the run itself, so it is no prediction, and "
        "**it is not used**. Tried, and not enough: the correction by either reading, asynchronous scheduling, padding to CUDA graph "
        "sizes (table above). "
        f"LLMServingSim's errors of TTFT on this run are {_signed(theirs['TTFT mean'])} in the mean and {_signed(theirs['TTFT median'])} "
        "in the median.",
        "",
    ]


def _longer(iterations: Sequence[PrefillIteration]) -> float:
    """Mean seconds by which iterations of the run were longer than those of the model."""
    return float(np.mean([one.recorded - one.modelled for one in iterations]))


def _error_of(iterations: Sequence[PrefillIteration]) -> float:
    return sum(one.modelled for one in iterations) / sum(one.recorded for one in iterations) - 1.0


def _median_error(iterations: Sequence[PrefillIteration]) -> float:
    """Of single iterations: those of requests that were preempted before their first token are far off."""
    return float(np.median([one.modelled / one.recorded - 1.0 for one in iterations]))


def _prefix_cache(variants: Sequence[Variant], heads: SharedPrompts) -> list[str]:
    """What the errors are with less of the prefix cache than the run had."""
    return [
        "**The prefix cache decides.** vLLM has it on by default and the run had it on. A preempted request finds again those of its "
        f"blocks that nobody took meanwhile, and {int((heads.donor >= 0).sum())} of the prompts begin like an earlier one. Errors of the "
        "means, and the largest of the fifteen errors, by what is simulated of it:",
        "",
        *table(
            ("prefix cache", "TTFT", "TPOT", "latency", "largest error", "preemptions", "tokens found in the cache"),
            [[one.name, *one.means, f"{one.result.summary.forced_evictions}", one.found] for one in variants],
            "lr",
        ),
        "",
        f"(Which prompts begin alike is not in the recorded file. It was taken from {PROMPTS_SOURCE}, whose sha256 the record states.)",
        "",
    ]


def _firmness(recording: Recording, run: Run, backend: Backend, kv: bool = True) -> list[str]:
    """What a millisecond changes, and the run second by second; ``kv``: its use of KV was recorded."""
    spread = jittered(run, backend)
    series = by_second(run, backend)
    seen = ~np.isnan(series).any(axis=1)
    gap = series[seen] - run.seconds[seen]
    return [
        f"**How firm.** {'A saturated cache amplifies small differences: ' if kv else ''}{JITTERED} replays whose arrivals are each up to "
        f"1 ms later give a largest error of {percent(float(np.abs(spread).max()))} over all figures and replays; "
        f"{int((np.abs(spread).max(axis=(1, 2)) <= recording.bar).sum())} of {JITTERED} replays meet the bar on all fifteen.",
        "",
        f"**Second by second** over {int(seen.sum())} seconds (mean difference, mean absolute difference): "
        f"running {gap[:, 0].mean():+.2f}, {np.abs(gap[:, 0]).mean():.2f} requests; "
        f"waiting {gap[:, 1].mean():+.2f}, {np.abs(gap[:, 1]).mean():.2f} requests"
        + (f"; KV used {gap[:, 2].mean():+.2f}, {np.abs(gap[:, 2]).mean():.2f} percentage points" if kv else "")
        + ". The record holds values after the last iteration of each second.",
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
