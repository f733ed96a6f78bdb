"""Recorded traces at greedy FIFO's boundary."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llmsched_agents.lookup import named_policies
from llmsched_env.bench.traces import BLOCKS, TraceCase, against, lines_of, run_case
from llmsched_env.cli import traces
from llmsched_env.errors import ConfigError


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Conversations with a lull, and one request that no engine of the suite can hold."""
    g = np.random.default_rng(0)
    gaps = np.where(np.arange(400) < 200, 0.2, 0.8) * g.exponential(size=400)
    rows = zip(np.cumsum(gaps), g.integers(20, 1_500, 400), g.integers(5, 300, 400), strict=True)
    lines = ["arrived_at,num_prefill_tokens,num_decode_tokens", *(f"{t:.4f},{p},{o}" for t, p, o in rows), "999.0,400000,5"]
    path = tmp_path / "calls.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_times_are_stretched_to_the_boundary_and_keep_their_shape(trace: Path) -> None:
    one, half = TraceCase.of(trace, "40GB", 1.0, None), TraceCase.of(trace, "40GB", 0.5, None)
    assert one.left_out == 1 and len(one.workload) == 400
    assert half.rate == pytest.approx(one.rate / 2) and half.workload.arrival[-1] == pytest.approx(2 * one.workload.arrival[-1])
    assert len(one.workload) / one.workload.arrival[-1] == pytest.approx(one.rate, rel=0.02)
    gaps = np.diff(one.workload.arrival)
    assert gaps[:190].mean() < 0.5 * gaps[-190:].mean()
    assert len(TraceCase.of(trace, "40GB", 1.0, 60).workload) == 60


def test_every_policy_serves_the_same_requests(trace: Path) -> None:
    rows = run_case(TraceCase.of(trace, "rtx4090", 1.0, None), named_policies("--policies", ["vllm", "adaptive"]))
    assert [row.policy for row in rows] == ["vllm", "adaptive"] and all(len(row.blocks) == BLOCKS for row in rows)
    assert all(np.mean(row.blocks) == pytest.approx(row.mean) and row.mean < row.p99 <= row.longest for row in rows)
    difference = against(rows[1], rows[0])
    assert difference.value == pytest.approx(rows[1].mean / rows[0].mean - 1) and difference.low <= difference.value <= difference.high
    lines = lines_of(rows, "vllm")
    assert lines[0][4] == "" and "%" in lines[1][4]


def test_bad_input_is_named(trace: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="engine: '90GB'"):
        TraceCase.of(trace, "90GB", 1.0, None)
    with pytest.raises(ConfigError, match="at least 40"):
        TraceCase.of(trace, "40GB", 1.0, 30)
    assert traces.main(["--traces", str(trace), "--load", "0"]) == 2
    assert traces.main(["--traces", str(tmp_path / "none.csv")]) == 2


def test_the_page(trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "traces.md"
    assert traces.main(["--traces", str(trace), "--engines", "40GB", "--policies", "vllm", "sarathi", "--out", str(out), "--quiet"]) == 0
    page = out.read_text()
    assert page.count("| calls | 40 GB |") == 2 and "400 requests" in page and "1 left out" in page
