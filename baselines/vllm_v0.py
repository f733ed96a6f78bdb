"""vLLM's first scheduler: prefill has priority, in batches of its own."""

from __future__ import annotations

from typing import ClassVar

from baselines.policy import RulePolicy, Setting
from llmsched_env.compiled import compiled
from llmsched_env.engine.fleet import Rule, kv_free
from llmsched_env.engine.state import (
    C_BLOCK_SIZE,
    C_MAX_SEQS,
    C_PRESET,
    C_WATERMARK,
    I_RESIDENTS,
    I_WAITING,
    PRESET_PAPER,
    Q_HEAD_TOKENS,
)
from llmsched_env.types import ADMIT_ALL, QueueLayout


@compiled
def prefill_first(parameters, memory, settings, requests, slots, queues, queue_f, scalars, clocks, decision):  # type: ignore[no-untyped-def]
    """Everything that waits and nothing that runs where the head fits, else the reverse."""
    fits = False
    if scalars[I_WAITING] > 0:
        tokens = queues[Q_HEAD_TOKENS, 0]
        if settings[C_PRESET] == PRESET_PAPER:  # every resident is charged one token more than it holds
            fits = tokens <= kv_free(settings, scalars) - scalars[I_RESIDENTS]
        else:
            blocks = (tokens + settings[C_BLOCK_SIZE] - 1) // settings[C_BLOCK_SIZE]
            fits = blocks + settings[C_WATERMARK] <= kv_free(settings, scalars) and scalars[I_RESIDENTS] < settings[C_MAX_SEQS]
    decision[0, 0] = 0 if fits else 1
    decision[1, 0] = ADMIT_ALL if fits else 0
    decision[2, 0] = 0


class VllmV0(RulePolicy):
    """If the head of the queue fits, an iteration of prefills alone; otherwise all residents decode.

    Design rule 16: the head fits if its blocks and the watermark are free and a sequence slot is.
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
