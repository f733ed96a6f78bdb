"""What knowing every output length would be worth: a bound, not a policy a server could run."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from llmsched_baselines.policy import RulePolicy, Setting, output_classes, prompt_classes
from llmsched_baselines.walk import admit_and_go_on, begin_walk
from llmsched_env.compiled import compiled
from llmsched_env.engine.rules import Rule
from llmsched_env.engine.state import Engine
from llmsched_env.errors import ConfigError
from llmsched_env.records import Numbers
from llmsched_env.types import Decision


@compiled
def reserve_true(engine: Engine, policy: Numbers, decision: Decision) -> None:
    """Admit in the engine's order until one does not fit. ``policy.parameters``: tokens that final lengths may add up to."""
    requests = engine.requests
    q = begin_walk(engine, decision)
    if q < 0:
        return
    room = policy.parameters[0]
    r = engine.oldest
    while r >= 0:
        room -= requests.prompt[r] + requests.output[r]
        r = requests.next[r]
    empty = engine.num_residents == 0
    while q >= 0:
        r = engine.queues.left[q]
        room -= requests.prompt[r] + requests.output[r]
        # An empty engine takes the first request whatever it needs.
        if room < 0.0 and not empty:
            return
        empty = False
        q = admit_and_go_on(engine, q, decision)


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
        self.rule = Rule(reserve_true, self.layout.num_queues, [theta * self.engine.kv_capacity_tokens], known_lengths=True)
