"""The figures of a cluster against numpy's own of the same rows, and the edges."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from call_rows import drawn
from hypothesis import given
from hypothesis import strategies as hs

from llmsched_env.backend import Counters
from llmsched_env.cluster.finished import FINISHED_DTYPE
from llmsched_env.cluster.metrics import ClusterSummary, Rows, Sum, Tally, Terms, summarize_calls
from llmsched_env.errors import ConfigError
from llmsched_env.metrics import jain_index, summarize
from llmsched_env.types import RequestLog

REPLICAS = 3


def by_hand(rows: Rows, warmup: float = 0.0, ttft_limit: float = 1.0, tpot_limit: float = 0.1, separated: bool = False) -> dict[str, Any]:
    """Every figure again, row by row."""
    counted = [row for row in rows if row["arrival"] >= warmup]
    done = [row for row in counted if math.isfinite(row["completed"])]
    last = max((float(row["completed"]) for row in rows if math.isfinite(row["completed"])), default=0.0)
    seconds = max(last - warmup, 0.0)

    def per_token(row: Any) -> float:
        return float((row["completed"] - row["first_token"]) / (row["output"] - 1)) if row["output"] > 1 else math.nan

    latency = [float(row["completed"] - row["arrival"]) for row in done]
    programs = [row for row in done if row["ends_program"] and row["program_start"] >= warmup]
    values = {
        "latency": latency,
        "ttft": [float(row["first_token"] - row["arrival"]) for row in done],
        "tpot": [per_token(row) for row in done if row["output"] > 1],
        "program_latency": [float(row["completed"] - row["program_start"]) for row in programs],
    }
    within = [r for r in done if r["first_token"] - r["arrival"] <= ttft_limit and not per_token(r) > tpot_limit]
    prompt = sum(int(row["prompt"]) for row in done)
    shares = [sum(int(row["replica"] == i) for row in done) for i in range(REPLICAS)]
    found: dict[str, Any] = {
        "requests": len(counted),
        "completed": len(done),
        "rejected": sum(int(row["rejected"]) for row in counted),
        "programs": len(programs),
        "throughput_tok_s": sum(int(row["output"]) for row in done) / seconds if seconds else math.nan,
        "throughput_req_s": len(done) / seconds if seconds else math.nan,
        "slowdown_jain": jain_index(np.array([v / row["output"] for v, row in zip(latency, done, strict=True)])),
        "slo_goodput": len(within) / len(counted) if counted else math.nan,
        "evictions": sum(int(row["evictions"]) for row in counted),
        "rerouted": sum(int(row["routed"] > (2 if separated else 1)) for row in counted),
        "cached_share": sum(int(row["cached"]) for row in done) / prompt if prompt else math.nan,
        "replica_requests": tuple(shares),
        "replica_jain": jain_index(np.array(shares, dtype=float)) if done else math.nan,
        "sim_seconds": last,
    }
    for name, numbers in values.items():
        found[f"{name}_mean"] = math.fsum(numbers) / len(numbers) if numbers else math.nan
        found[f"{name}_max"] = max(numbers, default=math.nan)
        for share in (50, 95, 99):
            found[f"{name}_p{share}"] = float(np.percentile(numbers, share)) if numbers else math.nan
    return found


def agrees(summary: ClusterSummary, expected: dict[str, Any]) -> None:
    found = dataclasses.asdict(summary)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name] == (pytest.approx(value, rel=1e-12, abs=1e-15, nan_ok=True) if isinstance(value, float) else value), name


@given(
    n=hs.integers(0, 60),
    seed=hs.integers(0, 2**31),
    rejected=hs.sampled_from([0.0, 0.1, 1.0]),
    warmup=hs.sampled_from([0.0, 0.2, 1e6]),
    limits=hs.tuples(hs.floats(0.05, 3.0), hs.floats(0.01, 0.2)),
    separated=hs.booleans(),
)
def test_against_figures_by_hand(n: int, seed: int, rejected: float, warmup: float, limits: tuple[float, float], separated: bool) -> None:
    rows = drawn(n, seed, rejected=rejected)
    rows["routed"] += separated
    settings: dict[str, Any] = {"warmup": warmup, "ttft_limit": limits[0], "tpot_limit": limits[1], "separated": separated}
    agrees(summarize_calls(rows, replicas=REPLICAS, **settings), by_hand(rows, **settings))


@given(n=hs.integers(0, 50), seed=hs.integers(0, 2**31), cuts=hs.lists(hs.integers(0, 50), max_size=5))
def test_batches_do_not_matter(n: int, seed: int, cuts: list[int]) -> None:
    rows = drawn(n, seed)
    tally = Tally(Terms(REPLICAS, warmup=0.1))
    for part in np.split(rows, sorted(cuts)):
        tally.add(part)
    parts = tally.summary(lambda name: (0.0, 0.0, 0.0))
    whole = summarize_calls(rows, replicas=REPLICAS, warmup=0.1)
    same = [field.name for field in dataclasses.fields(whole) if not field.name.endswith(("_p50", "_p95", "_p99"))]
    assert len(same) == len(dataclasses.fields(whole)) - 12
    for name in same:
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-12, nan_ok=True), name


def test_shared_names_mean_what_they_mean_of_one_engine() -> None:
    """Without a warm-up, on calls that all ended, ``metrics.summarize`` says the same."""
    rows = drawn(500, 7)
    log = RequestLog(
        arrival=rows["arrival"].copy(),
        prompt_tokens=rows["prompt"].copy(),
        output_tokens=rows["output"].copy(),
        class_id=np.zeros(500, np.int32),
        admitted=rows["admitted"].copy(),
        first_token=rows["first_token"].copy(),
        completed=rows["completed"].copy(),
        evictions=rows["evictions"].copy(),
        forced_evictions=np.zeros(500, np.int32),
        rejected=rows["rejected"].astype(bool),
    )
    clock = float(np.nanmax(rows["completed"])) + 2.0
    numbers = dict.fromkeys(("iterations", "idle_steps", "drain_iterations", "forced_evictions", "kv_peak", "finished", "rejected"), 0)
    seconds = {"kv_seconds": 0.0, "busy_seconds": 0.0, "system_seconds": 0.0}
    counters = Counters(clock=clock, end="finished", evictions=int(rows["evictions"].sum()), **numbers, **seconds)  # type: ignore[arg-type]
    one, many = summarize(log, counters, kv_capacity=1), summarize_calls(rows, replicas=REPLICAS, clock=clock)
    shared = {field.name for field in dataclasses.fields(one)} & {field.name for field in dataclasses.fields(many)}
    assert shared >= {"requests", "throughput_tok_s", "latency_p99", "slowdown_jain", "ttft_p50", "tpot_mean", "slo_goodput", "sim_seconds"}
    for name in shared:
        assert getattr(many, name) == pytest.approx(getattr(one, name), rel=1e-12), name


def test_nothing_ended() -> None:
    found = dataclasses.asdict(summarize_calls(np.empty(0, dtype=FINISHED_DTYPE), replicas=2))
    assert found.pop("replica_requests") == (0, 0) and found.pop("sim_seconds") == 0.0
    counts = {"requests", "completed", "rejected", "programs", "evictions", "rerouted"}
    assert {name for name, value in found.items() if value == 0} == counts
    assert all(math.isnan(value) for value in found.values() if value != 0)


def test_a_program_that_began_in_the_warm_up_has_no_latency() -> None:
    rows = drawn(2, 1, rejected=0.0)
    rows["ends_program"] = 1
    rows["arrival"], rows["program_start"] = 5.0, (3.0, 5.0)
    rows["first_token"], rows["completed"] = 6.0, 9.0
    found = summarize_calls(rows, replicas=REPLICAS, warmup=4.0)
    assert (found.requests, found.programs, found.program_latency_mean, found.program_latency_max) == (2, 1, 4.0, 4.0)
    assert found.throughput_req_s == pytest.approx(2 / 5)


def test_the_end_of_a_run_may_lie_after_the_last_completion() -> None:
    rows = drawn(50, 2)
    last = float(np.nanmax(rows["completed"]))
    assert summarize_calls(rows, replicas=REPLICAS, clock=2 * last).throughput_req_s == pytest.approx(
        summarize_calls(rows, replicas=REPLICAS).throughput_req_s / 2
    )
    assert summarize_calls(rows, replicas=REPLICAS, clock=0.0).sim_seconds == last


def test_sums_keep_what_rounding_takes_away() -> None:
    total = Sum()
    for value in (1e16, 1.0, 1.0, -1e16):
        total.add(value)
    assert float(total) == 2.0


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"replicas": 0}, "replicas: 0"),
        ({"replicas": 2, "warmup": -1.0}, "warmup: -1.0"),
        ({"replicas": 2, "warmup": math.nan}, "warmup: nan"),
        ({"replicas": 2, "ttft_limit": 0.0}, "ttft_limit: 0.0"),
        ({"replicas": 2, "tpot_limit": -0.1}, "tpot_limit: -0.1"),
        ({"replicas": 2, "clock": math.inf}, "clock: inf"),
        ({"replicas": 2, "separated": 1}, "separated: 1, must be true or false"),
        ({"replicas": 2}, r"rows.replica: 2 of a completed call, must be from 0 to 1"),
    ],
)
def test_refused(settings: dict[str, Any], named: str) -> None:
    rows = drawn(30, 3)
    if "clock" in settings:
        rows["replica"] = 0
    with pytest.raises(ConfigError, match=named):
        summarize_calls(rows, **settings)


@pytest.mark.parametrize("rows", [np.zeros(3), np.zeros((2, 2), dtype=FINISHED_DTYPE), [1, 2], None])
def test_other_arrays_are_refused(rows: Any) -> None:
    with pytest.raises(ConfigError, match=r"rows: .*FINISHED_DTYPE"):
        summarize_calls(rows, replicas=1)
