"""Named scenarios of a cluster."""

from __future__ import annotations

from itertools import pairwise

import pytest

from llmsched_env import ConfigError
from llmsched_env.bench.suite import ENGINES
from llmsched_env.cluster.scenarios import (
    CONTEXT,
    LOADS,
    MIXED,
    REPLICAS,
    SECONDS,
    cluster_scenario_names,
    gpu,
    load_cluster_scenario,
    slow_periods,
    slow_periods_of_each,
)

NAMES = cluster_scenario_names()


def test_names() -> None:
    assert NAMES == ["equal", "heterogeneous", "drifting", "drifting-all", "failing"]
    assert set(LOADS) == set(NAMES)
    with pytest.raises(ConfigError, match=r"scenario: 'drift' is unknown; did you mean 'drifting'\?"):
        load_cluster_scenario("drift")


@pytest.mark.parametrize("name", NAMES)
def test_a_scenario_is_the_same_for_equal_seeds_and_fits_any_number_of_replicas(name: str) -> None:
    scenario = load_cluster_scenario(name)
    for replicas in (1, 4, 9):
        first, again = (scenario.cluster(3, replicas=replicas) for _ in range(2))
        assert len(first.replicas) == replicas
        assert first.events == again.events
        assert all(replica.engine.enable_prefix_caching and replica.engine.max_model_len == CONTEXT for replica in first.replicas)
    assert scenario.cluster(4).events != scenario.cluster(3).events or not scenario.cluster(3).events


def test_rates_are_shares_of_boundaries() -> None:
    for name in NAMES:
        scenario = load_cluster_scenario(name)
        assert scenario.total_rate(REPLICAS) == pytest.approx(LOADS[name].boundary * LOADS[name].share)
        assert scenario.num_calls / scenario.total_rate() == pytest.approx(SECONDS, rel=1e-3)


def test_gpus_are_engines_of_the_suite() -> None:
    for name, key in (("a100-80GB", "llama3-80GB"), ("a100-40GB", "llama3-40GB"), ("rtx4090", "rtx4090")):
        engine, known = gpu(name).engine, ENGINES[key]
        assert (engine.time_model.provenance.name, engine.num_blocks) == (known.calibration, known.num_blocks)
    assert [replica.engine for replica in load_cluster_scenario("heterogeneous").cluster(0).replicas] == [
        gpu(name).engine for name in MIXED
    ]


def test_slow_periods_of_each_are_a_fifth_of_its_time() -> None:
    events = slow_periods_of_each(50, 7, 20_000.0)
    slow = 0.0
    for i in range(50):
        own = [event for event in events if event.replica == i]
        assert all(a.time < b.time for a, b in pairwise(own))
        for begins, ends in zip(own[::2], own[1::2], strict=True):
            assert 2.0 <= begins.value <= 4.0 and ends.value == 1.0 and 60.0 <= ends.time - begins.time <= 180.0
            slow += ends.time - begins.time
    assert slow / (50 * 20_000.0) == pytest.approx(0.2, abs=0.02)


def test_one_replica_at_a_time_is_slow_for_half_of_the_time() -> None:
    events = slow_periods(50, 7, 40_000.0)
    starts, ends = events[::2], events[1::2]
    for start, end in zip(starts, ends, strict=True):
        assert start.replica == end.replica and end.value == 1.0 and 2.0 <= start.value <= 4.0
    lengths = [end.time - start.time for start, end in zip(starts, ends, strict=True)]
    assert min(lengths) >= 60.0 and max(lengths) <= 180.0
    assert all(end.time < start.time for end, start in zip(ends, starts[1:], strict=False))
    assert 0.45 < sum(lengths) / 40_000.0 < 0.55
    assert len({start.replica for start in starts}) > 30
    assert slow_periods(50, 7, 40_000.0) == events != slow_periods(50, 8, 40_000.0)


def test_who_fails_and_who_is_drained_come_back() -> None:
    for seed in range(5):
        events = load_cluster_scenario("failing").cluster(seed).events
        assert [event.kind for event in events] == ["fail", "come_back", "drain", "come_back"]
        assert events[0].replica == events[1].replica != events[2].replica == events[3].replica
