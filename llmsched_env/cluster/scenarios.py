"""Scenarios of a cluster by name: replicas, what happens to them, calls and load.

=============  ==================================================================================================================
name           cluster
=============  ==================================================================================================================
equal          replicas alike
heterogeneous  different GPUs: a fourth is an A100 of 80 GB, a fourth an A100 of 40 GB, the rest are RTX 4090
drifting       alike, one of them slow now and then: for one to three minutes its iterations take two to four times as long
drifting-all   the same, each of them by itself, so that often several are slow at once
failing        alike; one fails and comes back two minutes later, another is drained and comes back after two minutes
=============  ==================================================================================================================

Calls are those of chat sessions that begin in bursts (``chat_sessions``): turns of a session share what was said before, sessions
of an application the head. Prefix caching is on, and the caches together hold less than the sessions that are alive.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from llmsched_env import checks
from llmsched_env.cluster.scenario import ClusterScenario, MakeCluster
from llmsched_env.cluster.spec import ClusterSpec, ReplicaEvent, ReplicaSpec
from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import ConfigError, did_you_mean
from llmsched_env.perf import load_calibration
from llmsched_env.workload.arrivals import MMPP2
from llmsched_env.workload.chat_sessions import ChatSessions
from llmsched_env.workload.programs import Apps

REPLICAS = 4
"""Of a scenario unless others are asked for; its boundary is of so many."""
CONTEXT = 8_192
"""Tokens of the longest prompt with its answer."""
TTFT_LIMIT, TPOT_LIMIT = 1.0, 0.05
"""Seconds.

An idle A100 takes 0.4 s for the longest prompt if nothing of it is cached (5.2e-5 s a token), and 0.011 s for a token of the answer: a
first token may come twice as late as the longest prompt takes, and the others at a fourth of the idle engine's pace.
"""
_EVENTS = 7  # key of the stream from which events are drawn: calls have their own


def engine(calibration: str, num_blocks: int) -> EngineConfig:
    """An engine with prefix caching for the context of these scenarios."""
    return EngineConfig.vllm(
        time_model=load_calibration(calibration), num_blocks=num_blocks, max_model_len=CONTEXT, enable_prefix_caching=True
    )


@functools.cache
def gpu(name: str) -> ReplicaSpec:
    """A replica by its GPU.

    Calibrations and blocks are those of ``llmsched_env.bench.suite.ENGINES``, which says where the blocks come from.
    """
    calibration, num_blocks = {
        "a100-80GB": ("a100-llama3-8b-vllm", 27_413),
        "a100-40GB": ("a100-llama3-8b-vllm", 8_981),
        "rtx4090": ("rtx4090-llama31-8b-vllm", 2_587),
    }[name]
    return ReplicaSpec(engine(calibration, num_blocks))


MIXED = ("a100-80GB", "a100-40GB", "rtx4090", "rtx4090")
"""GPUs of ``heterogeneous``, again and again."""


@functools.cache
def chat_sessions() -> ChatSessions:
    """Chat with long heads and short answers, after Mooncake's conversation trace.

    First messages are a tenth of the trace's length, later messages and answers two fifths, think times a tenth; six turns are drawn on
    average, geometric, of which the context leaves fewer; 16 applications have heads of 500 to 1,250 tokens. Sessions begin by an MMPP-2:
    quiet spells of 30 s and bursts of 15 s, seven times as dense. All these factors are our own.
    """
    return ChatSessions(
        Apps(16, tuple(500 + 50 * i for i in range(16)), 1.0),
        MMPP2(1.0 / 3.0, 7.0 / 3.0, 30.0, 15.0),
        first_scale=0.1,
        turn_scale=0.4,
        think_scale=0.1,
        mean_turns=6.0,
        max_tokens=CONTEXT,
    )


def _cluster(replicas: tuple[ReplicaSpec, ...], events: tuple[ReplicaEvent, ...] = ()) -> ClusterSpec:
    return ClusterSpec(replicas, events, ttft_limit=TTFT_LIMIT, tpot_limit=TPOT_LIMIT)


def equal(replicas: int, seed: int, seconds: float) -> ClusterSpec:
    """A100s of 40 GB."""
    return _cluster((gpu("a100-40GB"),) * replicas)


def heterogeneous(replicas: int, seed: int, seconds: float) -> ClusterSpec:
    """``MIXED``, again and again."""
    return _cluster(tuple(gpu(MIXED[i % len(MIXED)]) for i in range(replicas)))


def slow_periods(replicas: int, seed: int, seconds: float, mean_normal: float = 120.0) -> tuple[ReplicaEvent, ...]:
    """One replica after another: all as calibrated for an exponential time, then one, drawn, slow by a factor of 2 to 4 for 60 to 180 s.

    With 120 s of the first some replica is slow for half of the time.
    """
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_EVENTS,)))
    events: list[ReplicaEvent] = []
    time = float(rng.exponential(mean_normal))
    while time < seconds:
        i, length, factor = int(rng.integers(replicas)), float(rng.uniform(60.0, 180.0)), float(rng.uniform(2.0, 4.0))
        events += [ReplicaEvent(time, i, "slow_down", factor), ReplicaEvent(time + length, i, "slow_down", 1.0)]
        time += length + float(rng.exponential(mean_normal))
    return tuple(events)


def slow_periods_of_each(replicas: int, seed: int, seconds: float, mean_normal: float = 480.0) -> tuple[ReplicaEvent, ...]:
    """Each replica by itself: as calibrated for an exponential time, then slow by a factor of 2 to 4 for 60 to 180 s, and again.

    With 480 s of the first a replica is slow for a fifth of the time.
    """
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_EVENTS,)))
    events: list[ReplicaEvent] = []
    for i in range(replicas):
        time = float(rng.exponential(mean_normal))
        while time < seconds:
            length, factor = float(rng.uniform(60.0, 180.0)), float(rng.uniform(2.0, 4.0))
            events += [ReplicaEvent(time, i, "slow_down", factor), ReplicaEvent(time + length, i, "slow_down", 1.0)]
            time += length + float(rng.exponential(mean_normal))
    return tuple(events)


def drifting_all(replicas: int, seed: int, seconds: float) -> ClusterSpec:
    """A100s of 40 GB, each slow now and then."""
    return _cluster((gpu("a100-40GB"),) * replicas, slow_periods_of_each(replicas, seed, seconds))


def drifting(replicas: int, seed: int, seconds: float) -> ClusterSpec:
    """A100s of 40 GB, one of which is slow now and then."""
    return _cluster((gpu("a100-40GB"),) * replicas, slow_periods(replicas, seed, seconds))


def failing(replicas: int, seed: int, seconds: float) -> ClusterSpec:
    """A100s of 40 GB. One fails between a fifth and two fifths of the time, another is drained between three and four fifths."""
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_EVENTS,)))
    first, second = (int(i) for i in rng.permutation(max(replicas, 2))[:2])
    fails, drains = float(rng.uniform(0.2, 0.4)) * seconds, float(rng.uniform(0.6, 0.8)) * seconds
    second = second if replicas > 1 else 0
    first = first if replicas > 1 else 0
    events = (
        ReplicaEvent(fails, first, "fail"),
        ReplicaEvent(fails + 120.0, first, "come_back"),
        ReplicaEvent(drains, second, "drain"),
        ReplicaEvent(drains + 120.0, second, "come_back"),
    )
    return _cluster((gpu("a100-40GB"),) * replicas, events)


@dataclass(frozen=True, slots=True)
class Load:
    """How much a scenario has to bear.

    Attributes:
        boundary: calls per second that ``REPLICAS`` of its replicas bear: the largest rate at which prefix affinity, tuned, meets both
            limits for nine calls in ten (goodput as in DistServe, OSDI 2024); ``llmsched_env.bench.cluster.boundary`` measures it.
        share: of the boundary, the mean rate of the scenario.
    """

    boundary: float
    share: float


LOADS = {
    "equal": Load(14.9, 0.9),
    "heterogeneous": Load(11.9, 0.9),
    "drifting": Load(11.5, 0.9),
    "drifting-all": Load(11.5, 0.9),
    "failing": Load(12.9, 0.9),
}
SECONDS = 900.0
"""Sessions begin for so long, about."""

_MADE: dict[str, tuple[str, MakeCluster]] = {
    "equal": ("four A100 of 40 GB", equal),
    "heterogeneous": ("an A100 of 80 GB, one of 40 GB and two RTX 4090", heterogeneous),
    "drifting": ("four A100 of 40 GB, one of them slow now and then", drifting),
    "drifting-all": ("four A100 of 40 GB, each of them slow now and then, often several at once", drifting_all),
    "failing": ("four A100 of 40 GB, one of which fails and one is drained", failing),
}


def cluster_scenario_names() -> list[str]:
    """Names of the scenarios that ship."""
    return list(_MADE)


def load_cluster_scenario(name: str) -> ClusterScenario:
    """A scenario by its name.

    Raises:
        ConfigError: unknown; the nearest is given.
    """
    if not isinstance(name, str) or name not in _MADE:
        known = cluster_scenario_names()
        raise ConfigError(f"scenario: {checks.shown(name)} is unknown{did_you_mean(str(name), known)} (known: {', '.join(known)})")
    description, make = _MADE[name]
    rate = LOADS[name].boundary * LOADS[name].share
    return ClusterScenario(name, description, make, chat_sessions(), rate / REPLICAS, REPLICAS, round(rate * SECONDS))
