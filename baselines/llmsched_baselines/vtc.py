"""The virtual token counter: the tenant that has received least service is admitted next."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from llmsched_baselines.policy import RulePolicy, Setting
from llmsched_baselines.tenant_walk import Room, find_room, grant, room_of, tenant_layout
from llmsched_env.compiled import compiled
from llmsched_env.engine.rules import Rule
from llmsched_env.engine.state import INPUT_PRICE, Engine
from llmsched_env.peak import run_everything
from llmsched_env.records import Record, Vector
from llmsched_env.types import Decision


class VtcRecord(Record):
    room: Room
    counter: Vector  # (J,) scratch: counters with the admissions decided so far


@compiled
def vtc(engine: Engine, policy: VtcRecord, decision: Decision) -> None:
    """arXiv 2401.00588, Algorithm 2, execution stream; the counters are the engine's (``queues.counter``)."""
    run_everything(engine, False, decision)
    requests, queues, settings = engine.requests, engine.queues, engine.settings
    room = policy.room
    if engine.num_waiting == 0:
        return
    find_room(engine, room)
    if room.open == 0:
        return
    for j in range(settings.num_classes):
        policy.counter[j] = queues.counter[j * settings.num_segments]
    while True:
        least = -1
        for j in range(settings.num_classes):
            if room.following[j] >= 0 and (least < 0 or policy.counter[j] < policy.counter[least]):
                least = j
        if least < 0:
            return
        r = room.following[least]
        if not grant(engine, room, least, decision):
            return
        if requests.key[r] >= 0:  # below 0: it was admitted before, and its prompt was counted then
            policy.counter[least] += INPUT_PRICE * requests.prompt[r] / queues.weight[least * settings.num_segments]


class Vtc(RulePolicy):
    """Virtual token counter (Sheng et al., OSDI 2024, arXiv 2401.00588, Algorithm 2).

    The next request is the oldest of the tenant, among those with requests outside, whose counter is least: service received over
    weight, w_p = 1 a prompt token, counted when the request is first admitted, and w_q = 2 an output token, counted as it is
    generated. A tenant that comes back to the queue is lifted to the least counter there (``llmsched_env.engine.queues``).
    It is work-conserving: whoever is next enters as soon as it fits.
    """

    name: ClassVar[str] = "vtc"

    def __init__(self, setting: Setting) -> None:
        self.layout = tenant_layout(setting.statistics)
        self.engine = setting.engine_for()
        record = VtcRecord(room=room_of(self.layout, self.engine), counter=np.zeros(self.layout.num_classes))
        self.rule = Rule(vtc, self.layout.num_queues, record)
