"""Policies that servers ship as settings: everything runs and enters as with ``vllm``, but prefill or admission is kept back.

Three are vLLM's own flags and run on any policy as engine options, too (``EngineConfig``; rules 19 to 21 of
``docs/engine-rules.md``). Each is a greedy policy on an engine with that one setting. Defaults are, of the values that do
something, those with the least mean latency over the stationary cells of ``bench-v1`` (tuning seed 0, 2,000 requests, the
engine's own token budget): 2 of 2 to 16 iterations, 1 of 1 to 7 rounds, 192 of 32 to 192 residents, 1,024 of 64 to 1,024 tokens.
"""

from __future__ import annotations

from typing import ClassVar

from llmsched_baselines.greedy import Vllm
from llmsched_baselines.policy import Setting
from llmsched_env import checks


class PrefillCadence(Vllm):
    """vLLM's ``--prefill-schedule-interval`` (0.33): prefill in every ``interval``-th iteration only, while somebody decodes.

    An interval whose release could not drain the queue ends at once.

    Args:
        interval: iterations from one that carries prefill to the next; 1 is ``vllm``.

    Raises:
        ConfigError: an interval below 1.
    """

    name: ClassVar[str] = "prefill-cadence"

    def __init__(self, setting: Setting, interval: int = 2) -> None:
        super().__init__(setting)
        self.engine = setting.engine_for(prefill_schedule_interval=checks.integer("policy.interval", interval, low=1))


class PrefillDecodeInterval(Vllm):
    """The cadence of SGLang's ``--prefill-decode-interval``: after prefill so many iterations without any, however long the queue is.

    Source: sgl-project/sglang @ 0003215, ``managers/scheduler.py`` ``_should_defer_prefill``. The cadence is SGLang's, the batches stay
    vLLM's: SGLang computes prefills in batches of their own.

    Args:
        rounds: iterations in which decodes run alone; 0 is ``vllm``.

    Raises:
        ConfigError: a number below 0.
    """

    name: ClassVar[str] = "prefill-decode-interval"

    def __init__(self, setting: Setting, rounds: int = 1) -> None:
        super().__init__(setting)
        rounds = checks.integer("policy.rounds", rounds)
        self.engine = setting.engine_for(prefill_schedule_interval=rounds + 1, prefill_interval_release=rounds == 0)


class ActiveCap(Vllm):
    """vLLM's ``--max-num-active-seqs`` (0.31): admission ends below the sequence cap. On the simulator that is a smaller ``max_num_seqs``.

    Args:
        cap: residents at which admission ends; one above ``max_num_seqs`` is none.

    Raises:
        ConfigError: a cap below 1.
    """

    name: ClassVar[str] = "active-cap"

    def __init__(self, setting: Setting, cap: int = 192) -> None:
        super().__init__(setting)
        cap = checks.integer("policy.cap", cap, low=1)
        self.engine = setting.engine_for(max_num_active_seqs=min(cap, self.engine.max_num_seqs))


class PrefillThreshold(Vllm):
    """vLLM's ``--long-prefill-token-threshold``: at most so many prompt tokens of one request in an iteration.

    Args:
        threshold: tokens; 0 is ``vllm``, as is one above ``max_model_len``.

    Raises:
        ConfigError: a threshold below 0.
    """

    name: ClassVar[str] = "prefill-threshold"

    def __init__(self, setting: Setting, threshold: int = 1_024) -> None:
        super().__init__(setting)
        threshold = checks.integer("policy.threshold", threshold)
        self.engine = setting.engine_for(long_prefill_token_threshold=min(threshold, self.engine.max_model_len))
