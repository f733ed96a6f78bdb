"""Weighted fair queueing of tenants by what their requests are expected to cost; and strict priority of tenants."""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np

from llmsched_baselines.policy import Policy, RulePolicy, Setting
from llmsched_baselines.tenant_walk import Room, find_room, grant, room_of, tenant_layout
from llmsched_env.backend import View
from llmsched_env.compiled import compiled
from llmsched_env.engine.rules import Rule
from llmsched_env.engine.state import INPUT_PRICE, OUTPUT_PRICE, Engine
from llmsched_env.forecast import expected_output_by_class
from llmsched_env.peak import run_everything
from llmsched_env.records import Counts, Memory, Record, Vector
from llmsched_env.types import ADMIT_ALL, Decision

TAG_UNITS = 1024
"""Tags are whole numbers, so many to a token of weight 1."""


class WfqRecord(Record):
    room: Room
    output_cost: Vector  # (J,) OUTPUT_PRICE x E[output | tenant]
    finish: Counts  # (J,) finish tag of the tenant's latest admission; at least the virtual time at which it came back
    tag: Counts  # (J,) scratch: the same with the admissions decided so far
    waited: Counts  # (J,) requests that were left outside after the last decision was carried out
    virtual: Annotated[int, Memory]  # time: the largest finish tag of all admissions
    seen: Annotated[int, Memory]  # ``engine.next_sequence`` at the last decision


@compiled
def cost_of(engine: Engine, policy: WfqRecord, r: int, j: int) -> int:
    """What request r of tenant j is expected to cost over the tenant's weight, in units of tags; 0 where it was counted before."""
    if engine.requests.key[r] < 0 and engine.settings.by_priority == 0:  # evicted since
        return 0
    cost = INPUT_PRICE * engine.requests.prompt[r] + policy.output_cost[j]
    return max(int(cost * TAG_UNITS / engine.queues.weight[j * engine.settings.num_segments]), 1)


@compiled
def note_admitted(engine: Engine, policy: WfqRecord, r: int) -> None:
    """Request r has been admitted since the last decision."""
    j = engine.requests.outside[r] // engine.settings.num_segments
    policy.finish[j] += cost_of(engine, policy, r, j)
    policy.virtual = max(policy.virtual, policy.finish[j])
    policy.waited[j] -= 1


@compiled
def follow(engine: Engine, policy: WfqRecord) -> None:
    """Tags after what the engine did since the last decision; a tenant that comes back begins at the virtual time."""
    requests, queues, settings, events = engine.requests, engine.queues, engine.settings, engine.events
    r = engine.newest
    while r >= 0 and requests.sequence[r] >= policy.seen:
        note_admitted(engine, policy, r)
        r = requests.previous[r]
    for i in range(engine.report.completed):
        if requests.sequence[events.finished[i]] >= policy.seen:
            note_admitted(engine, policy, events.finished[i])
    for j in range(settings.num_classes):
        waiting = queues.waiting[j * settings.num_segments]
        if waiting > 0 and policy.waited[j] <= 0:
            policy.finish[j] = max(policy.finish[j], policy.virtual)
        policy.waited[j] = waiting
    policy.seen = engine.next_sequence


@compiled
def wfq(engine: Engine, policy: WfqRecord, decision: Decision) -> None:
    """The request with the least finish tag is next."""
    run_everything(engine, False, decision)
    room, settings = policy.room, engine.settings
    follow(engine, policy)
    if engine.num_waiting == 0:
        return
    find_room(engine, room)
    if room.open == 0:
        return
    for j in range(settings.num_classes):
        policy.tag[j] = policy.finish[j]
    while True:
        least, least_tag = -1, 0
        for j in range(settings.num_classes):
            if room.following[j] >= 0:
                tag = policy.tag[j] + cost_of(engine, policy, room.following[j], j)
                if least < 0 or tag < least_tag:
                    least, least_tag = j, tag
        if least < 0 or not grant(engine, room, least, decision):
            return
        policy.tag[least] = least_tag


class Wfq(RulePolicy):
    """Self-clocked weighted fair queueing over tenants by expected cost.

    The k-th request of a tenant has the finish tag F_k = max(v, F_(k-1)) + cost / weight, and the least tag is next; v, the virtual
    time at which the tenant came back to the queue, is the largest finish tag admitted by then (Golestani, "A self-clocked fair
    queueing scheme for broadband applications", INFOCOM 1994; fair queueing by finish tags is Demers, Keshav and Shenker,
    SIGCOMM 1989). The cost of a request is that of ``vtc`` with the output to expect of the tenant: unlike ``vtc`` it charges
    before the tokens have come out, and is wrong by what a request differs from its tenant's mean.
    """

    name: ClassVar[str] = "wfq"

    def __init__(self, setting: Setting) -> None:
        self.layout = tenant_layout(setting.statistics)
        self.engine = setting.engine_for()
        j = self.layout.num_classes
        record = WfqRecord(
            room=room_of(self.layout, self.engine),
            output_cost=OUTPUT_PRICE * expected_output_by_class(setting.statistics, self.layout),
            finish=np.zeros(j, dtype=np.int64),
            tag=np.zeros(j, dtype=np.int64),
            waited=np.zeros(j, dtype=np.int64),
        )
        self.rule = Rule(wfq, self.layout.num_queues, record)


class TenantPriority(Policy):
    """Strict priority: the tenant with the largest weight first, of equal ones the one declared first; greedy.

    What a tier of service without fairness does: whoever stands last may wait forever.
    """

    name: ClassVar[str] = "tenant-priority"

    def __init__(self, setting: Setting) -> None:
        self.layout = tenant_layout(setting.statistics)
        rank = np.argsort(np.argsort(-np.asarray(self.layout.class_weights), kind="stable"), kind="stable")
        self.engine = setting.engine_for(admission_order="class", class_rank=tuple(int(r) for r in rank))
        self.constant = Decision.of([1] * self.layout.num_queues, [ADMIT_ALL] * self.layout.num_queues)
        self.rule = Rule.constant(self.constant)

    def decide(self, view: View) -> Decision:
        """Always the same."""
        assert self.rule is not None
        return self.rule.decide(view)
