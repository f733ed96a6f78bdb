"""Rewards that count every tenant by its weight, however many requests it sends.

Let omega_j be the weights of the tenants that have requests in the episode, divided by their sum, and N_j the number of these requests.

* ``fair_latency``: minus the sum over tenants of omega_j / N_j times the number of tenant j's requests in the system, integrated over
  the step (seconds). By Little's law the return of a drained episode is minus the weighted mean of the tenants' mean latencies.
* ``weighted_goodput``: the sum over tenants of omega_j / N_j times the number of tenant j's requests completed in the step within
  the tenant's own TTFT and TPOT limits. The return is the weighted mean of the tenants' goodputs, in [0, 1].

With one tenant they are ``latency`` and ``slo_goodput``. Rejected requests count among the N_j.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np

from llmsched_env.compiled import compiled
from llmsched_env.engine.state import REJECTED, Engine
from llmsched_env.errors import ConfigError
from llmsched_env.records import Numbers
from llmsched_env.registry import REWARDS
from llmsched_env.reward import CompiledReward
from llmsched_env.tenant_terms import TenantTerms
from llmsched_env.types import QueueLayout


@compiled
def count_requests(engine: Engine, own: Numbers) -> float:
    """Write the requests of each tenant into ``own.memory`` (J,), at the first step of an episode; the weight of those that have any."""
    num_classes, num_segments = engine.settings.num_classes, engine.settings.num_segments
    total = 0
    for j in range(num_classes):
        total += own.memory[j]
    if total == 0:
        for r in range(engine.num_requests):
            own.memory[engine.hidden.outside[r] // num_segments] += 1
    weight = 0.0
    for j in range(num_classes):
        if own.memory[j] > 0:
            weight += own.parameters[3 * j]
    return weight


@compiled
def fair_latency_reward(engine: Engine, own: Numbers) -> float:
    """``fair_latency``; ``own.parameters``: weight and limits of each tenant, ``own.memory``: its requests."""
    requests, queues, hidden, report, settings = engine.requests, engine.queues, engine.hidden, engine.report, engine.settings
    weight = count_requests(engine, own)
    segments = settings.num_segments
    value = 0.0
    for q in range(settings.num_queues):
        j = q // segments
        inside = queues.residents[q] + queues.waiting[q]
        if inside > 0:
            value += own.parameters[3 * j] / own.memory[j] * inside * (engine.clock - report.start)
    for i in range(report.completed):  # they were in the system all through the step
        j = hidden.outside[engine.events.finished[i]] // segments
        value += own.parameters[3 * j] / own.memory[j] * (engine.clock - report.start)
    for r in range(engine.next_arrival - report.arrived, engine.next_arrival):  # these for a part of it
        if requests.status[r] != REJECTED:
            j = hidden.outside[r] // segments
            absent = max(hidden.arrival[r] - report.start, 0.0)
            value -= own.parameters[3 * j] / own.memory[j] * min(absent, engine.clock - report.start)
    return -value / weight


@compiled
def weighted_goodput_reward(engine: Engine, own: Numbers) -> float:
    """``weighted_goodput``; ``own`` as for ``fair_latency_reward``."""
    hidden = engine.hidden
    weight = count_requests(engine, own)
    value = 0.0
    for i in range(engine.report.completed):
        r = engine.events.finished[i]
        j = hidden.outside[r] // engine.settings.num_segments
        first = hidden.first_token[r] - hidden.arrival[r]
        rest = hidden.output[r] - 1
        each = (hidden.completed[r] - hidden.arrival[r] - first) / rest if rest > 0 else 0.0
        if first <= own.parameters[3 * j + 1] and each <= own.parameters[3 * j + 2]:
            value += own.parameters[3 * j] / own.memory[j]
    return value / weight


class TenantReward:
    """A reward by name whose tenants an environment fills in (``EnvSpec``)."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name, self.function = name, function

    def __call__(self, outcome: object) -> NoReturn:
        raise ConfigError(f"reward: {self.name!r} needs the tenants of an environment")

    def of(self, tenants: Sequence[TenantTerms], layout: QueueLayout) -> CompiledReward:
        """The reward for these tenants.

        Raises:
            ConfigError: the layout's classes are not the tenants.
        """
        if layout.by != "tenant" or (tenants and len(tenants) != layout.num_classes):
            raise ConfigError(f"reward: {self.name!r} with classes by {layout.by}, needs class_by='tenant'")
        terms = tuple(tenants) or (TenantTerms("everybody"),) * layout.num_classes
        parameters = np.array([[one.weight, one.ttft, one.tpot] for one in terms]).ravel()
        return CompiledReward(self.function, parameters, layout.num_classes)


def fair_latency() -> TenantReward:
    """The reward ``fair_latency``."""
    return TenantReward("fair_latency", fair_latency_reward)


def weighted_goodput() -> TenantReward:
    """The reward ``weighted_goodput``."""
    return TenantReward("weighted_goodput", weighted_goodput_reward)


REWARDS.built_in({"fair_latency": fair_latency, "weighted_goodput": weighted_goodput})
