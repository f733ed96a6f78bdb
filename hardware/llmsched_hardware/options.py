"""vLLM's scheduling settings, once: what ``EngineConfig`` calls them, what vLLM does, and where a running scheduler has them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from llmsched_env.errors import ConfigError
from llmsched_hardware.versions import release


@dataclass(frozen=True, slots=True)
class SchedulingSetting:
    """One setting on both sides.

    Attributes:
        name: field of ``EngineConfig`` and of ``llmsched_hardware.real_engine.EngineOptions``.
        found: its value in a running vLLM scheduler, in our terms.
        argument: of ``vllm.EngineArgs``; the flag of ``vllm serve`` is the same with dashes.
        added: what vLLM's value counts more than ours.
        since: first version of vLLM that does what ours does; () for every one that is supported.
        off: our value where it is not used, which is all that earlier versions have.
    """

    name: str
    found: Callable[[Any], Any]
    argument: str
    added: int = 0
    since: tuple[int, ...] = ()
    off: Any = None

    def known(self) -> bool:
        """Whether the installed vLLM has it."""
        return not self.since or release() >= self.since

    def check(self, value: Any) -> None:
        """Refuse a value that the installed vLLM cannot have.

        Raises:
            ConfigError: naming the setting, the value and the version it needs.
        """
        if value != self.off and not self.known():
            need, have = (".".join(map(str, version)) for version in (self.since, release()))
            raise ConfigError(f"engine.{self.name}: {value}, must be {self.off} with vLLM {have} (needs {need} or later)")

    def to_vllm(self, value: Any) -> Any:
        """A value of ours as vLLM takes it; None leaves it to vLLM."""
        return value + self.added if self.added and value is not None else value

    def flag(self, value: Any) -> str:
        """The words of ``vllm serve`` that set it."""
        word = self.argument.replace("_", "-")
        if value is None:
            return f"(without --{word})"
        if isinstance(value, bool):
            return f"--{'' if value else 'no-'}{word}"
        return f"--{word} {self.to_vllm(value)}"

    def differs(self, a: Any, b: Any) -> bool:
        """Whether two values of ours are not the same setting; shares went through text on their way to vLLM."""
        if isinstance(a, float) or isinstance(b, float):
            return not math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)
        return bool(a != b)


SETTINGS = (
    SchedulingSetting("max_num_batched_tokens", lambda s: s.max_num_scheduled_tokens, "max_num_batched_tokens"),
    SchedulingSetting("max_num_seqs", lambda s: s.max_num_running_reqs, "max_num_seqs"),
    SchedulingSetting("enable_chunked_prefill", lambda s: s.scheduler_config.enable_chunked_prefill, "enable_chunked_prefill"),
    SchedulingSetting("watermark", lambda s: s.scheduler_config.watermark, "watermark"),
    SchedulingSetting("scheduler_reserve_full_isl", lambda s: s.scheduler_reserve_full_isl, "scheduler_reserve_full_isl"),
    SchedulingSetting("block_size", lambda s: s.block_size, "block_size"),
    SchedulingSetting("max_model_len", lambda s: s.max_model_len, "max_model_len"),
    # vLLM counts one null block that no request can use.
    SchedulingSetting("num_blocks", lambda s: s.kv_cache_manager.block_pool.num_gpu_blocks - 1, "num_gpu_blocks_override", added=1),
    SchedulingSetting("max_num_active_seqs", lambda s: s.scheduler_config.max_num_active_seqs, "max_num_active_seqs", since=(0, 31)),
    # Before 0.31 the limit holds for a request alone, too, which ours does not.
    SchedulingSetting(
        "long_prefill_token_threshold",
        lambda s: s.scheduler_config.long_prefill_token_threshold,
        "long_prefill_token_threshold",
        since=(0, 31),
        off=0,
    ),
    # Earlier versions have the argument, and use it between data-parallel ranks alone.
    SchedulingSetting("prefill_schedule_interval", lambda s: s.local_prefill_interval, "prefill_schedule_interval", since=(0, 33), off=1),
)

# Of the backend ``vllm-scheduler`` alone: a server's priorities are not seen by the policies in it, and a real engine is given none.
# Up to 0.32 a request that preempts itself ends the running loop.
PRIORITY = SchedulingSetting("scheduling_policy", lambda s: s.policy.value, "scheduling_policy", since=(0, 33), off="fcfs")

FIXED: dict[str, Any] = {
    "enable_prefix_caching": False,  # blocks that several requests share are not accounted for
    "async_scheduling": False,  # CUDA's default is a queue of two batches, where step() may return before its results
    "skip_tokenizer_init": True,
    "disable_log_stats": True,
}
"""``vllm.EngineArgs`` under which one step is one iteration that we can describe."""


SCHEDULER_CLASS = "llmsched_hardware.serve.PolicyScheduler"
"""``vllm serve --scheduler-cls``."""
POLICY_FLAGS = (f"--scheduler-cls {SCHEDULER_CLASS}",)
"""Words of ``vllm serve`` without which no policy runs in it."""


def setting_names() -> tuple[str, ...]:
    return tuple(setting.name for setting in SETTINGS)


def engine_arguments(settings: Any) -> dict[str, Any]:
    """``vllm.EngineArgs`` by name for an object with the fields of ``SETTINGS``, with ``FIXED``.

    Raises:
        ConfigError: a value that the installed vLLM cannot have.
    """
    for setting in SETTINGS:
        setting.check(getattr(settings, setting.name))
    return {s.argument: s.to_vllm(getattr(settings, s.name)) for s in SETTINGS if s.known()} | FIXED


def scheduler_arguments(engine: Any) -> dict[str, Any]:
    """The same for a scheduler alone, which can be given priorities.

    Raises:
        ConfigError: a value that the installed vLLM cannot have.
    """
    arguments = engine_arguments(engine)
    if engine.scheduling_policy != PRIORITY.off:  # what is off is left to vLLM
        PRIORITY.check(engine.scheduling_policy)
        arguments[PRIORITY.argument] = engine.scheduling_policy
    return arguments


def settings_of(scheduler: Any) -> dict[str, Any]:
    """What a running vLLM scheduler really has, by our names."""
    return {setting.name: setting.found(scheduler) if setting.known() else setting.off for setting in SETTINGS}


def differing(wanted: Any, found: Any) -> Iterable[tuple[SchedulingSetting, Any, Any]]:
    """(setting, wanted, found) where two objects with the fields of ``SETTINGS`` differ; None is wanted where it does not matter."""
    for setting in SETTINGS:
        a, b = getattr(wanted, setting.name), getattr(found, setting.name)
        if (a is not None or setting.since) and setting.differs(a, b):
            yield setting, a, b
