"""Benchmark files of a server whose truth is known: the simulator with noisy iterations, a front end, and clients with a jitter."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from llmsched_baselines import Setting, make_policy
from llmsched_env.backend import View
from llmsched_env.compiled import compiled
from llmsched_env.engine_config import EngineConfig
from llmsched_env.perf import FormulaTime, IterationTimeModel, Provenance
from llmsched_env.perf.base import FloatArray
from llmsched_env.perf.batch import BatchSums
from llmsched_env.runner import run_episode
from llmsched_env.types import IterationReport, LengthStatistics, Workload

NOISE = 0.3  # an iteration takes from 1 - NOISE / 2 to 1 + NOISE / 2 of what the formula says


@compiled
def noisy_seconds(batch: BatchSums) -> float:
    """``FormulaTime``, times a number that looks random from batch to batch."""
    m = batch.model
    n = batch.decodes
    tokens = n + batch.prefill_tokens
    seconds = m[0] + m[1] * tokens if tokens <= m[5] else m[6] + m[7] * tokens
    seconds += m[2] * batch.decode_kv + m[3] * batch.prefill_work + m[4] * n
    mixed = math.sin(12.9898 * batch.load + 78.233 * n + 3.7 * batch.prefill_tokens) * 43758.5453
    return seconds * (1.0 + 0.3 * (mixed - math.floor(mixed) - 0.5))


@dataclass(frozen=True, slots=True)
class NoisyTime(IterationTimeModel):
    """A formula with noise."""

    compiled_seconds: ClassVar[Any] = noisy_seconds
    truth: FormulaTime
    provenance: Provenance = dataclasses.field(default=Provenance(name="noisy"), compare=False)

    def pack(self) -> FloatArray:
        t = self.truth
        return np.array([t.a, t.b, t.d1, t.d3, t.d4, t.knee, t.s, t.c])


TRUTH = FormulaTime(a=8e-3, b=2e-4, s=8e-3, c=2e-4, d1=1e-6, d2=0.0, d3=3e-7, d4=4e-4, knee=0.0)
FRONTEND = 0.012
ENGINE = EngineConfig.vllm(max_num_batched_tokens=512, max_num_seqs=64, max_model_len=2048, num_blocks=2048, block_size=16)


@dataclass(frozen=True, slots=True)
class Served:
    """What clients saw: when each request was sent (s), its lengths, and when each of its tokens came."""

    arrival: FloatArray
    prompt: list[int]
    output: list[int]
    tokens: list[FloatArray]


def serve(rate: float, count: int, seed: int, engine: EngineConfig = ENGINE, truth: FormulaTime = TRUTH) -> Served:
    """Poisson arrivals, uniform lengths."""
    rng = np.random.default_rng(seed)
    arrival = np.cumsum(rng.exponential(1 / rate, count))
    prompt, output = rng.integers(40, 400, count), rng.integers(12, 110, count)
    workload = Workload.of(arrival - arrival[0], prompt, output)
    statistics = LengthStatistics.of(prompt, output, np.ones(count))
    policy = make_policy("vllm", Setting(statistics, rate, engine.replace(time_model=NoisyTime(truth))))
    ends: list[float] = []
    times: list[list[float]] = [[] for _ in range(count)]

    def on_step(report: IterationReport, view: View) -> None:
        ends.append(report.start + report.duration)
        residents = view.resident_requests()
        for r, generated in zip(residents.id.tolist(), residents.generated.tolist(), strict=True):
            if generated > len(times[r]):
                times[r].append(ends[-1])

    log = run_episode(policy, workload, on_step=on_step).log
    if engine.async_scheduling:  # a view counts the tokens of the iteration in flight
        assert log.forced_evictions.sum() == 0
        spans = zip(log.first_token, log.completed, strict=True)
        times = [sorted({end for end in ends if first - 1e-12 <= end <= last + 1e-12}) for first, last in spans]
    else:
        times = [[*own, float(last)] for own, last in zip(times, log.completed, strict=True)]  # who has completed is no resident
    assert [len(own) for own in times] == output.tolist()
    tokens = [np.array(own) + FRONTEND + rng.exponential(2e-4) for own in times]
    return Served(workload.arrival + 1000.0, prompt.tolist(), output.tolist(), [t + 1000.0 for t in tokens])


def vllm_result(served: Served, **changes: Any) -> dict[str, Any]:
    """What ``vllm bench serve --save-result --save-detailed`` writes."""
    return {
        "date": "20261129-120000",
        "backend": "vllm",
        "num_prompts": len(served.prompt),
        "request_rate": 3.0,
        "max_concurrency": None,
        "completed": len(served.prompt),
        "failed": 0,
        "request_throughput": 3.0,
        "input_lens": served.prompt,
        "output_lens": served.output,
        "ttfts": [float(t[0] - a) for t, a in zip(served.tokens, served.arrival, strict=True)],
        "itls": [np.diff(t).tolist() for t in served.tokens],
        "start_times": served.arrival.tolist(),
        "generated_texts": ["" for _ in served.prompt],
        "errors": ["" for _ in served.prompt],
    } | changes


def guidellm_report(served: Served) -> dict[str, Any]:
    """What GuideLLM writes, the fields of other use left out."""
    requests = [
        {
            "type_": "generative_request_stats",
            "request_id": str(i),
            "info": {
                "status": "completed",
                "timings": {
                    "request_start": float(a),
                    "first_token_iteration": float(t[0]),
                    "last_token_iteration": float(t[-1]),
                    "token_iterations": len(t),
                    "request_end": float(t[-1]) + 1e-3,
                },
            },
            "prompt_tokens": p,
            "output_tokens": o,
        }
        for i, (a, p, o, t) in enumerate(zip(served.arrival, served.prompt, served.output, served.tokens, strict=True))
    ]
    benchmark = {"type_": "generative_benchmark", "requests": {"successful": requests, "errored": [], "incomplete": [], "total": None}}
    return {"metadata": {"version": 2, "guidellm_version": "0.7.3"}, "config": {}, "benchmarks": [benchmark]}


def aiperf_records(served: Served) -> list[dict[str, Any]]:
    """The lines of AIPerf's ``profile_export.jsonl``."""
    start = 1_759_813_207_532_900_363
    return [
        {
            "metadata": {
                "session_num": i,
                "request_start_ns": start + round(1e9 * float(a)),
                "request_end_ns": start + round(1e9 * float(t[-1])),
                "worker_id": "worker_1",
                "record_processor_id": "record_processor_1",
                "benchmark_phase": "profiling",
                "was_cancelled": False,
            },
            "metrics": {
                "input_sequence_length": {"value": p, "unit": "tokens"},
                "output_sequence_length": {"value": o, "unit": "tokens"},
                "time_to_first_token": {"value": 1e3 * float(t[0] - a), "unit": "ms"},
                "request_latency": {"value": 1e3 * float(t[-1] - a), "unit": "ms"},
                "inter_chunk_latency": {"value": (1e3 * np.diff(t)).tolist(), "unit": "ms"},
            },
            "error": None,
        }
        for i, (a, p, o, t) in enumerate(zip(served.arrival, served.prompt, served.output, served.tokens, strict=True))
    ]


def write(path: Path, value: Any) -> Path:
    """JSON, a list as one object a line."""
    path.write_text("\n".join(json.dumps(v) for v in value) if isinstance(value, list) else json.dumps(value))
    return path
