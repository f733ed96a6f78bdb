"""The page of routers: bars met and missed, tables in the order of latency, the scale, the course of an episode and its picture."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from llmsched_env.bench.cluster import episode_seed
from llmsched_env.bench.cluster_course import Course, record_course
from llmsched_env.bench.cluster_rows import ClusterRow
from llmsched_env.bench.cluster_scale import ScaleRow
from llmsched_env.cluster.spec import ReplicaEvent
from llmsched_env.pages.cluster.page import ClusterPage
from llmsched_env.pages.cluster.picture import AWAY, SLOW, draw, spans

pytest.importorskip("scipy")

NUMBERS = {name: 0.0 for name in ("latency_p99", "program_latency_mean", "ttft_mean", "ttft_p99", "tpot_mean", "tpot_p99", "wall_seconds")}


def row(scenario: str, router: str, seed: int, latency: float, misses: float) -> ClusterRow:
    counts = dict.fromkeys(("num_calls", "requests", "completed", "rejected", "rerouted", "evictions"), 1)
    texts = {"options": "{}", "purpose": "evaluation", "digest": "", "sources": "x"}
    return ClusterRow(
        scenario=scenario, router=router, seed=seed, replicas=4, latency_mean=latency, slo_misses=misses, cached_share=0.5,
        replica_jain=0.9, **texts, **counts, **NUMBERS,
    )  # fmt: skip


def page(better: float, fewer: float, worse: float = 0.0) -> ClusterPage:
    rows = []
    for seed in range(3):
        for scenario in ("equal", "drifting"):
            rows.append(row(scenario, "prefix-affinity", seed, 4.0 + seed, 0.10))
        rows.append(row("drifting", "learned-router", seed, (4.0 + seed) * (1 - better), 0.10 * (1 - fewer)))
        rows.append(row("equal", "learned-router", seed, (4.0 + seed) * (1 + worse), 0.10))
    return ClusterPage(
        rows, ["equal", "drifting"], ["prefix-affinity", "learned-router"], "prefix-affinity", "learned-router", [], "llmsched cluster"
    )


def test_bars_are_met_and_missed() -> None:
    met = page(0.04, 0.35).verdicts()
    assert "**met**" in met["drifting"] and "-4.0 ± " in met["drifting"] and "-35.0 ± " in met["drifting"] and "**met**" in met["equal"]
    assert "**missed**" in page(0.04, 0.2).verdicts()["drifting"]
    assert "**missed**" in page(0.02, 0.4).verdicts()["drifting"]
    assert "**missed**" in page(0.04, 0.4, worse=0.01).verdicts()["equal"]


def test_the_table_has_the_fastest_first() -> None:
    lines = page(0.04, 0.35).lines()
    table = lines[lines.index("## drifting") :]
    shown = [line for line in table if line.startswith("| ")]
    assert shown[2].startswith("| **learned-router** | 4.80 ± ") and shown[3].startswith("| prefix-affinity | 5.00 ± ")
    assert "## Scale" not in lines


def test_the_scale_is_a_section() -> None:
    measured = ScaleRow(1_000, "power-of-two", 0.8, 10**8, 20_000.0, 1_000.0, 7 * 10**8, 8 * 10**8, 440.0, 3_700.0, 6.0, 17.0, 0.3, 1.0)
    lines = dataclasses.replace(page(0.04, 0.35), scale=[measured]).lines()
    assert "| 1,000 | 100,000,000 | 20,000 | 1,000.0 | 0.80 M | 100,000 | 440 | 3.61 GiB |" in lines


def test_a_course_says_where_calls_went_and_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    course = record_course("failing", "round-robin", {}, episode_seed("tuning", 1), num_calls=400)
    assert course.clock.shape == course.chosen.shape and (np.diff(course.clock) >= 0).all()
    assert course.kv_share.shape == course.outstanding.shape == (course.clock.size, 4)
    assert course.kv_share.min() >= 0.0 and course.kv_share.max() <= 1.0 and set(course.chosen) == {0, 1, 2, 3}
    path = tmp_path / "course.png"
    draw([course], path)
    assert path.read_bytes()[1:4] == b"PNG"


def test_spans_of_slow_times_and_of_times_away() -> None:
    events = (
        ReplicaEvent(1.0, 0, "slow_down", 3.0),
        ReplicaEvent(2.0, 0, "slow_down", 1.0),
        ReplicaEvent(3.0, 0, "fail"),
        ReplicaEvent(4.0, 0, "come_back"),
        ReplicaEvent(5.0, 0, "drain"),
        ReplicaEvent(6.0, 1, "slow_down", 2.0),
    )
    course = Course("s", "r", np.array([0.0, 8.0]), np.zeros(2, np.int32), np.zeros((2, 2)), np.zeros((2, 2), np.int64), events)
    assert list(spans(course, 0)) == [(1.0, 2.0, SLOW), (3.0, 4.0, AWAY), (5.0, 8.0, AWAY)]
    assert list(spans(course, 1)) == [(6.0, 8.0, SLOW)]
