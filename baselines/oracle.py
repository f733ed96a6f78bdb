"""What knowing every output length would be worth: a bound, not a policy a server could run."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from baselines.policy import RulePolicy, Setting, output_classes, prompt_classes
from llmsched_env.compiled import compiled
from llmsched_env.engine.fleet import Rule
from llmsched_env.engine.moves import next_in_order, start_of_queues
from llmsched_env.engine.state import I_RESIDENTS, I_WAITING, Q_LEFT, R_NEXT, R_OUTPUT, R_PROMPT, S_OUTPUT, S_PROMPT
from llmsched_env.errors import ConfigError


@compiled
def reserve_true(parameters, memory, settings, requests, slots, queues, queue_f, scalars, clocks, decision):  # type: ignore[no-untyped-def]
    """Admit in the engine's order until one does not fit. ``parameters``: tokens that final lengths may add up to."""
    decision[0, :] = 1
    decision[1, :] = 0
    decision[2, :] = 0
    if scalars[I_WAITING] == 0:
        return
    room = parameters[0]
    for i in range(scalars[I_RESIDENTS]):
        room -= slots[S_PROMPT, i] + slots[S_OUTPUT, i]
    empty = scalars[I_RESIDENTS] == 0
    start_of_queues(settings, queues)
    q = next_in_order(settings, requests, queues)
    while q >= 0:
        r = queues[Q_LEFT, q]
        room -= requests[R_PROMPT, r] + requests[R_OUTPUT, r]
        # An empty engine takes the first request whatever it needs.
        if room < 0.0 and not empty:
            return
        empty = False
        decision[1, q] += 1
        queues[Q_LEFT, q] = requests[R_NEXT, r]
        q = next_in_order(settings, requests, queues)


class OracleSjf(RulePolicy):
    """Shortest job first, with a reservation by true final lengths (output lengths known).

    Unlike ``mc-sf`` it does not look at when memory is needed: theta above 1 stands for residents
    that end before others have grown.

    Args:
        num_classes: buckets of equal probability (types where the workload has types and ``by`` is ``output``).
        by: what makes a job short: its true output, or its prompt where prefill is most of the work.
        theta: sum(prompt + output) of residents stays within theta * C.

    Raises:
        ConfigError: an argument out of range.
    """

    name: ClassVar[str] = "oracle-sjf"
    known_lengths: ClassVar[bool] = True

    def __init__(self, setting: Setting, num_classes: int = 32, by: Literal["output", "prompt"] = "output", theta: float = 1.1) -> None:
        if num_classes < 1:
            raise ConfigError(f"policy.num_classes: {num_classes}, must be >= 1")
        if by not in ("output", "prompt"):
            raise ConfigError(f"policy.by: {by!r}, must be 'output' or 'prompt'")
        if not (math.isfinite(theta) and theta > 0):
            raise ConfigError(f"policy.theta: {theta}, must be finite and > 0")
        classes = output_classes if by == "output" else prompt_classes
        self.layout = classes(setting.statistics, num_classes)
        self.engine = setting.engine_for(admission_order="class")
        self.rule = Rule(reserve_true, self.layout.num_queues, [theta * self.engine.kv_capacity_tokens])
