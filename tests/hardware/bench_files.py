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
from llmsched_env.compiled import compiled
from llmsched_env.perf import FormulaTime, IterationTimeModel, Provenance
from llmsched_env.perf.base import FloatArray
from llmsched_env.perf.batch import BatchSums
from llmsched_env.runner import run_episode
from llmsched_env.types import EngineConfig, LengthStatistics, Workload

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
    """Poisson arrivals, uniform lengths; ``engine`` with enough KV that nobody is preempted."""
    rng = np.random.default_rng(seed)
    arrival = np.cumsum(rng.exponential(1 / rate, count))
    prompt, output = rng.integers(40, 400, count), rng.integers(12, 110, count)
    workload = Workload.of(arrival - arrival[0], prompt, output)
    statistics = LengthStatistics.of(prompt, output, np.ones(count))
    policy = make_policy("vllm", Setting(statistics, rate, engine.replace(time_model=NoisyTime(truth))))
    ends: list[float] = []
    log = run_episode(policy, workload, on_step=lambda report, _: ends.append(report.start + report.duration)).log
    assert log.forced_evictions.sum() == 0
    steps = np.array(ends)
    tokens = []
    for first, last, n in zip(log.first_token, log.completed, log.output_tokens, strict=True):
        own = np.unique(steps[(steps >= first - 1e-12) & (steps <= last + 1e-12)])
        assert len(own) == n
        tokens.append(own + FRONTEND + np.sort(rng.exponential(2e-4, 1)))
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
