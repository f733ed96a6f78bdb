"""The live server's mirror of vLLM's queues against the record of backend ``vllm-scheduler``.

The same workload and the same decisions on both: before every decision the policy must see the same
queues, requests and observation, though one side is told everything beforehand and the other learns
of arrivals and completions as they happen.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed here (make test-vllm)", allow_module_level=True)

from serve_inprocess import make_server

from llmsched_env.action import fill_mask
from llmsched_env.engine_config import EngineConfig, EpisodeLimits
from llmsched_env.forecast import Forecast, make_forecast
from llmsched_env.observation import ObservationLayout, encode
from llmsched_env.types import ADMIT_ALL, Decision, LengthStatistics, QueueLayout, Workload
from llmsched_hardware.vllm_scheduler import VllmSchedulerBackend

CASES = int(os.environ.get("LLMSCHED_SERVE_CASES", "24"))


@dataclass(frozen=True)
class Case:
    """One random episode."""

    seed: int
    engine: EngineConfig
    layout: QueueLayout
    workload: Workload
    greedy: float

    @classmethod
    def of(cls, seed: int) -> Case:
        g = np.random.default_rng((seed, 77))
        block = int(g.choice([4, 8, 16]))
        num_blocks = int(g.integers(16, 90))
        max_len = min(num_blocks * block, int(g.integers(40, 400)))
        seqs = int(g.integers(3, 40))
        chunked = bool(g.random() < 0.7)
        budget = int(g.integers(max(seqs, 8), 240))
        num_classes, num_segments = int(g.integers(1, 4)), int(g.integers(1, 4))
        order = str(g.choice(["arrival", "class"]))
        engine = EngineConfig.vllm(
            block_size=block,
            num_blocks=num_blocks,
            max_num_seqs=seqs,
            max_num_batched_tokens=budget if chunked else max(budget, max_len),
            max_model_len=max_len,
            enable_chunked_prefill=chunked,
            watermark=float(g.choice([0, 0, 0.01, 0.05, 0.1])),
            scheduler_reserve_full_isl=bool(g.random() < 0.5),
            admission_order=order,
            late_after=float(g.choice([0.0, 0.0, 0.01, 0.1, 1.0])),
        )
        ends = tuple(sorted({int(e) for e in g.integers(1, 40, num_segments - 1)}))
        edges = tuple(sorted({int(e) for e in g.integers(1, max(2, max_len // 3), num_classes - 1)}))
        layout = QueueLayout("prompt" if edges else "single", edges, segment_ends=ends)
        if order == "class" and g.random() < 0.7:
            engine = engine.replace(class_rank=tuple(g.integers(0, 3, layout.num_classes)))
        n = int(g.integers(60, 160))
        prompt = g.integers(1, max(2, max_len // 3), n)
        output = np.minimum(g.integers(1, max(2, max_len // 2), n), max_len - prompt)
        times = np.cumsum(g.exponential(float(g.choice([0.002, 0.02, 0.1])), n))
        return cls(seed, engine, layout, Workload.of(times, prompt, output), float(g.choice([0.3, 0.5, 0.75, 0.95])))

    def decision(self, step: int) -> Decision:
        g = np.random.default_rng((self.seed, step))
        q = self.layout.num_queues
        if g.random() < self.greedy:
            return Decision.greedy(q)
        evict = g.choice([0, 0, 1, 2], q) if g.random() < 0.3 else np.zeros(q, int)
        return Decision.of(g.random(q) < 0.8, g.choice([0, 1, 2, ADMIT_ALL], q), evict)


ENGINE = (
    "clock", "rate_seconds", "last_iteration", "num_residents", "num_waiting", "num_boundary", "num_prefilling", "kv_tokens", "kv_blocks",
    "lowest_key", "evictions", "forced_evictions", "iterations", "run_all",
)  # fmt: skip
REPORT = ("evicted", "preempted", "admitted")
QUEUES = (
    "waiting", "residents", "resident_kv", "boundary_kv", "head_tokens", "head_key", "late", "rank", "segment_end", "runs", "steps",
    "members",
)  # fmt: skip
ENDS_OF_LISTS = ("head", "tail", "timely", "first_peer", "last_peer")
RESIDENTS = ("queue", "status", "base_computed", "base_generated", "target", "prompt", "outside", "group", "output")


def seen(view: Any, name: Callable[[int], str], forecast: Forecast) -> dict[str, Any]:
    """Everything a policy can read, requests by name."""
    record = view._whole
    requests, queues = record.requests, record.queues

    def names(listed: Any) -> list[str]:
        return [name(int(r)) if r >= 0 else "-" for r in listed]

    observation = np.zeros(ObservationLayout.of(view.layout).size, np.float32)
    encode(record, forecast, observation)
    mask = np.zeros(view.layout.num_queues * 7, np.bool_)
    fill_mask(record, 4, mask)
    outside = slice(0, view.layout.num_queues, view.layout.num_segments)
    residents = view.resident_requests()
    at = residents.id
    out: dict[str, Any] = {f"engine {field}": getattr(record, field) for field in ENGINE}
    out |= {f"report {field}": getattr(record.report, field) for field in REPORT}
    out |= {f"queue {field}": getattr(queues, field).tolist() for field in QUEUES}
    for field in ENDS_OF_LISTS:
        listed = getattr(queues, field)
        out[f"queue {field}"] = names(listed if "peer" in field else listed[outside])
    out |= {f"resident {field}": getattr(requests, field)[at].tolist() for field in RESIDENTS}
    out["resident blocks"] = [-(-int(c) // view.engine.block_size) for c in residents.computed]
    out["resident order"] = np.argsort(requests.sequence[at]).tolist()
    out["residents"] = names(at)
    for field in ("next", "previous", "next_peer", "previous_peer"):
        out[f"resident {field}"] = names(getattr(requests, field)[at])
    out["observation"], out["mask"] = observation, mask.tolist()
    out["arrival_rate"] = view.arrival_rate
    out["head_arrival"] = view.head_arrival.tolist()
    for j in range(view.layout.num_classes):
        w = view.waiting_requests(j, 10**6)
        out[f"waiting {j}"] = names(w.id)
        for field in ("prompt_tokens", "generated", "key", "arrival"):
            out[f"waiting {j} {field}"] = getattr(w, field).tolist()
        for field in ("status", "queue", "outside", "group"):
            out[f"waiting {j} {field}"] = getattr(requests, field)[w.id].tolist()
    return out


def assert_same(ours: dict[str, Any], theirs: dict[str, Any], where: str) -> None:
    for name in theirs:
        a, b = ours[name], theirs[name]
        if name.startswith(("observation", "arrival_rate", "engine", "head_arrival")) or name.endswith("arrival"):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9, err_msg=f"{where}: {name}")
        else:
            assert a == b, f"{where}: {name}: server {a}, backend {b}"


@dataclass
class Tally:
    iterations: int = 0
    preemptions: int = 0
    evictions: int = 0
    idle: int = 0


def follow(case: Case, monkeypatch: pytest.MonkeyPatch, folder: Path) -> Tally:
    """Run one case on both sides."""
    backend = VllmSchedulerBackend(trace=True)
    workload = case.workload
    view = backend.reset(workload, case.layout, case.engine, EpisodeLimits(drain=False, max_iterations=20_000))
    forecast = forecast_of(case)
    shown: list[dict[str, Any]] = []
    asked = {"step": 0}

    def script(live: Any) -> Decision:
        shown.append(seen(live, lambda r: server.scheduler.mirror.names[r], forecast))
        return case.decision(asked["step"])

    changes = {name: getattr(case.engine, name) for name in ("admission_order", "class_rank", "late_after")}
    server = make_server(monkeypatch, folder, case.engine, case.layout, script, changes)
    tally, submitted = Tally(), 0

    def submit() -> None:
        nonlocal submitted
        server.clock = backend.record.clock
        while submitted < backend.record.next_arrival:
            i = submitted
            server.add(str(i), int(workload.prompt_tokens[i]), int(workload.output_tokens[i]), float(workload.arrival[i]), ignore_eos=True)
            submitted += 1

    submit()
    for step in range(20_000):
        if backend.done:
            break
        asked["step"] = step
        expected = seen(view, str, forecast)
        report = backend.step(case.decision(step))
        output = server.schedule()
        assert len(shown) == step + 1, f"step {step}: the policy was asked {len(shown)} times"
        assert_same(shown[-1], expected, f"seed {case.seed}, step {step}")
        ids, tokens = backend.scheduled() if not report.idle else (np.array([]), np.array([]))
        assert {int(r): k for r, k in output.num_scheduled_tokens.items()} == dict(zip(ids.tolist(), tokens.tolist(), strict=True))
        server.clock = report.start + report.duration
        server.finish()
        submit()
        tally.iterations += not report.idle
        tally.idle += report.idle
        tally.preemptions += len(report.preempted)
        tally.evictions += len(report.evicted)
    assert backend.done
    backend.close()
    mirror = server.scheduler.mirror
    assert mirror.resyncs == 0
    assert server.scheduler.policy_metrics.errors == 0
    assert server.scheduler.gatekeeper.releases == {"outside": 0, "boundary": 0, "held": 0}
    return tally


def forecast_of(case: Case) -> Forecast:
    w = case.workload
    return make_forecast(LengthStatistics.of(w.prompt_tokens, w.output_tokens, np.ones(len(w))), 5.0, case.engine, case.layout)


def test_the_mirror_equals_the_backend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    total = Tally()
    for seed in range(CASES):
        tally = follow(Case.of(seed), monkeypatch, tmp_path)
        for name in vars(total):
            setattr(total, name, getattr(total, name) + getattr(tally, name))
    print(f"\n{CASES} cases: {total}")
    assert total.preemptions > 10 * CASES and total.evictions > CASES and total.idle > 10 * CASES
