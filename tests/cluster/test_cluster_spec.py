"""Clusters, scenarios and rewards of the wrong kinds are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from llmsched_env.cluster.reward import make_cluster_reward
from llmsched_env.cluster.scenario import ClusterScenario
from llmsched_env.cluster.scenarios import chat_sessions, load_cluster_scenario
from llmsched_env.cluster.spec import ClusterSpec, ReplicaEvent, ReplicaSpec, Transfer
from llmsched_env.errors import ConfigError


def scenario(**settings: Any) -> ClusterScenario:
    given = {"name": "mine", "description": "", "make": load_cluster_scenario("equal").make, "source": chat_sessions(), "rate": 1.0}
    return ClusterScenario(**{**given, **settings})


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: ClusterSpec(4), r"replicas: 4, must be a sequence of ReplicaSpec"),
        (lambda: ClusterSpec(None), r"replicas: None, must be a sequence"),
        (lambda: ClusterSpec(ReplicaSpec()), r"replicas: ReplicaSpec\(.*must be a sequence"),
        (lambda: ClusterSpec((ReplicaSpec(), "a100")), r"replicas: 'a100' as number 1, must be a ReplicaSpec"),
        (lambda: ClusterSpec.equal(2, events=None), r"events: None, must be a sequence of ReplicaEvent"),
        (lambda: ClusterSpec.equal(2, events=ReplicaEvent(1.0, 0, "fail")), r"events: ReplicaEvent\(.*must be a sequence"),
        (lambda: ClusterSpec.equal(2, events=(3,)), r"events: 3 as number 0, must be a ReplicaEvent"),
        (lambda: ClusterSpec.equal(2, transfer=3), r"transfer: 3, must be a Transfer"),
        (lambda: ReplicaEvent(1, 0, "fail", 5.0), r"event\.value: 5 of 'fail', must be left out"),
        (lambda: ReplicaEvent(1, 0, "come_back", 0.5), r"event\.value: 0\.5 of 'come_back'"),
        (lambda: make_cluster_reward({"name": ["latency"]}), r"reward: \['latency'\] is unknown"),
        (lambda: make_cluster_reward({}), r"reward: None is unknown"),
        (lambda: scenario(make=None), r"scenario\.make: None, must be a function"),
        (lambda: scenario(source="chat"), r"scenario\.source: 'chat', must be a CallSource"),
        (lambda: scenario(name=3), r"scenario\.name: 3, must be a text"),
        (lambda: scenario(rate=0.0), r"scenario\.rate: 0\.0"),
    ],
)
def test_refused(make: Callable[[], Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        make()


def test_taken() -> None:
    events = [ReplicaEvent(2.0, 0, "come_back"), ReplicaEvent(1.0, 0, "fail"), ReplicaEvent(3.0, 1, "slow_down", 2.0)]
    spec = ClusterSpec([ReplicaSpec(), ReplicaSpec()], events, Transfer(0.1))  # type: ignore[arg-type]
    assert [event.kind for event in spec.events] == ["fail", "come_back", "slow_down"] and isinstance(spec.replicas, tuple)
    assert scenario().total_rate(2) == 2.0
