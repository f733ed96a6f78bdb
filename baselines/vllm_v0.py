"""vLLM's first scheduler: prefill has priority, in batches of its own."""

from __future__ import annotations

from typing import ClassVar

from baselines.policy import Policy, Setting
from llmsched_env.backend import View
from llmsched_env.types import ADMIT_ALL, Decision, QueueLayout


class VllmV0(Policy):
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
        self._prefill = Decision.of([0], [ADMIT_ALL])
        self._decode = Decision.of([1], [0])

    def decide(self, view: View) -> Decision:
        return self._prefill if view.num_waiting and self._head_fits(view) else self._decode

    def _head_fits(self, view: View) -> bool:
        engine = self.engine
        tokens = int(view.head_tokens[0])
        if engine.preset == "paper":  # every resident is charged one token more than it holds
            return tokens <= view.kv_free - view.num_residents
        blocks = -(-tokens // engine.block_size)
        return blocks + engine.watermark_blocks <= view.kv_free and view.num_residents < engine.max_num_seqs
