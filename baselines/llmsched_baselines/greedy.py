"""Work-conserving policies: everything runs, everything is admitted that fits.

They differ by the engine alone: token budget, sequence cap, preset.
"""

from __future__ import annotations

from typing import ClassVar

from llmsched_baselines.policy import Policy, Setting, need_vllm
from llmsched_env.backend import View
from llmsched_env.types import Decision, QueueLayout


class Fcfs(Policy):
    """First come, first served, greedy: the paper's FCFS (arXiv 2504.11320) in the ``paper`` preset."""

    name: ClassVar[str] = "fcfs"

    def __init__(self, setting: Setting) -> None:
        self.layout = QueueLayout()
        self.engine = setting.engine_for()
        self.constant = self._decision = Decision.greedy(1)

    def decide(self, view: View) -> Decision:
        return self._decision


class Vllm(Fcfs):
    """vLLM as it schedules today: chunked prefill, residents first, then the queue (vLLM 0.28, ``v1/core/sched``)."""

    name: ClassVar[str] = "vllm"

    def __init__(self, setting: Setting) -> None:
        need_vllm(type(self).name, setting.engine)
        super().__init__(setting)


class Sarathi(Fcfs):
    """Sarathi-Serve: the same with a small token budget, so that prefill cannot stall decodes.

    Args:
        budget: tokens per iteration (512, as Vidur and arXiv 2403.02310 run it).
        max_num_seqs: sequence cap (128, Vidur's).
    """

    name: ClassVar[str] = "sarathi"

    def __init__(self, setting: Setting, budget: int = 512, max_num_seqs: int = 128) -> None:
        need_vllm(self.name, setting.engine)
        super().__init__(setting)
        self.engine = setting.engine_for(
            max_num_batched_tokens=budget, max_num_seqs=max_num_seqs, enable_chunked_prefill=True, watermark=0.01
        )
