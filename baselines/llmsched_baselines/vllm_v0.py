"""vLLM's first scheduler: prefill has priority, in batches of its own."""

from __future__ import annotations

from typing import ClassVar

from llmsched_baselines.policy import RulePolicy, Setting
from llmsched_env.compiled import compiled
from llmsched_env.engine.rules import Rule, kv_free
from llmsched_env.engine.state import Engine
from llmsched_env.records import Numbers
from llmsched_env.types import ADMIT_ALL, Decision, QueueLayout


@compiled
def prefill_first(engine: Engine, policy: Numbers, decision: Decision) -> None:
    """Everything that waits and nothing that runs where the head fits, else the reverse."""
    settings = engine.settings
    fits = False
    if engine.num_waiting > 0:
        tokens = engine.queues.head_tokens[0]
        if settings.paper != 0:  # every resident is charged one token more than it holds
            fits = tokens <= kv_free(engine) - engine.num_residents
        else:
            blocks = (tokens + settings.block_size - 1) // settings.block_size
            fits = blocks + settings.watermark_blocks <= kv_free(engine) and engine.num_residents < settings.most_active
    decision.run[0] = 0 if fits else 1
    decision.admit[0] = ADMIT_ALL if fits else 0
    decision.evict[0] = 0


class VllmV0(RulePolicy):
    """If the head of the queue fits, an iteration of prefills alone; otherwise all residents decode.

    Rule 16 of ``docs/engine-rules.md``: the head fits if its blocks and the watermark are free and a sequence slot is.
    Engine: chunked prefill off, 1 % watermark, a budget of at least ``budget`` tokens (4,096 in
    Vidur) and never below the longest request, which vLLM would refuse.

    Args:
        budget: token budget of a prefill iteration.
        max_num_seqs: sequence cap (128, Vidur's).
    """

    name: ClassVar[str] = "vllm-v0"

    def __init__(self, setting: Setting, budget: int = 4096, max_num_seqs: int = 128) -> None:
        self.layout = QueueLayout()
        if setting.engine.preset == "paper":
            self.engine = setting.engine_for()
        else:
            longest = int(setting.overrides.get("max_model_len", setting.engine.max_model_len))
            self.engine = setting.engine_for(
                enable_chunked_prefill=False,
                max_num_batched_tokens=max(budget, longest),
                max_num_seqs=max_num_seqs,
                watermark=0.01,
            )
        self.rule = Rule(prefill_first, self.layout.num_queues)
