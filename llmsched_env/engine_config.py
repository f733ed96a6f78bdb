"""``EngineConfig``: one engine's settings, checked; ``EpisodeLimits``: when an episode on it ends.

Units are seconds and tokens unless a name says otherwise.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from llmsched_env import checks
from llmsched_env.errors import ConfigError
from llmsched_env.perf import IterationTimeModel, LinearTime, load_calibration
from llmsched_env.perf.base import check_model
from llmsched_env.types import MOST_QUEUES

MAX_BLOCK_SIZE = 65_536
"""Tokens; vLLM's own block sizes end far below."""

Preset = Literal["paper", "vllm"]
AdmissionOrder = Literal["arrival", "class"]
SchedulingPolicy = Literal["fcfs", "priority"]


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """One engine, two presets (``EngineConfig.paper(...)`` and ``EngineConfig.vllm(...)``).

    Attributes:
        preset: ``paper`` (KV in tokens, whole prompts, eviction loses all progress) or ``vllm``
            (KV in blocks, chunked prefill, recompute preemption).
        time_model: seconds of one iteration from its batch; the default is measured on an A100 with Llama-2-7B (``llmsched_env.perf``).
        admission_order: global order of outside requests: queue key (``arrival``: arrival order,
            evicted requests first) or class first (``class``), requests of one class by queue key.
        class_rank: order of the classes under ``class``, one rank a class, smallest first; classes of
            equal rank by queue key. Empty: by index.
        late_after: seconds: a request that has waited longer for its first admission is admitted after
            all others. 0: no request is late.
        scheduling_policy: ``priority``: vLLM's ``--scheduling-policy priority`` (0.33; ``vllm`` preset). Requests enter by
            (``Workload.priority``, arrival), and where blocks lack the running one that is last in this order is preempted, whichever was
            admitted first (``docs/engine-rules.md``, rule 23).
        capacity_tokens: KV capacity C of the ``paper`` preset.
        boundary_slot: variant A of Nested WAIT: entering from a boundary queue costs one iteration
            that yields no token (``paper`` only).
        num_blocks: usable KV blocks (vLLM's ``num_gpu_blocks`` counts one null block more).
        block_size: tokens per block.
        max_num_batched_tokens: token budget of an iteration.
        max_num_seqs: most residents at once, held and boundary requests included.
        max_num_active_seqs: residents at which admission ends, at most ``max_num_seqs``; None: ``max_num_seqs`` (vLLM 0.31 on).
        long_prefill_token_threshold: most prompt tokens of one request in an iteration, while more than one request may run
            or enter; 0: no such limit (vLLM 0.31 on; 0.28 and 0.30 apply it to a request alone as well). vLLM 0.28 to 0.33 have
            no ``max_num_partial_prefills`` any more, so there is none here.
        prefill_schedule_interval: prefill waits until so many iterations have passed since the last one that carried prefill, while
            somebody decodes; an interval whose release could not drain the queue ends at once. 1: never (vLLM 0.33).
        prefill_interval_release: that early end. False: SGLang's ``--prefill-decode-interval`` N as an interval of N + 1,
            which keeps prefill back however long the queue is.
        max_model_len: longest prompt + output.
        enable_chunked_prefill: a prompt longer than the budget left is split.
        scheduler_reserve_full_isl: admit a prompt only if all its blocks are free (vLLM 0.28 default).
        watermark: fraction of blocks kept free at admissions while something runs.
        padded_prefill: Vidur's accounting of prefill batches: count x longest prompt <= budget.
        decode_needs_free_block: Vidur's accounting: every decode needs one free block.
        eviction: what a preempted request keeps in the ``vllm`` preset: its generated tokens, whose KV is
            rebuilt (``recompute``, vLLM), or nothing (``lose_progress``, as always in the ``paper`` preset).
        enable_prefix_caching: freed blocks keep their contents until they are taken again, and whoever enters takes
            over those that hold the head of its tokens (vLLM's default; off here as in the paper's model).
        async_scheduling: the next iteration is scheduled while one runs (vLLM's default on a GPU; ``vllm`` preset): it sees what the
            running one computes in number, not in value. So a request is scheduled once more after its last token, as one that ends by
            an end-of-sequence token is; one that ends by its ``max_tokens``, which vLLM knows beforehand, would be spared that token.
            See ``docs/engine-rules.md``, rule 22.
        oversize: requests above ``max_model_len`` (``paper``: above ``capacity_tokens``) are an
            ``error`` before the episode or are ``reject``-ed on arrival, as a server answers 400.
    """

    preset: Preset = "vllm"
    time_model: IterationTimeModel = field(default_factory=lambda: load_calibration("a100-llama2-7b-vllm"))
    admission_order: AdmissionOrder = "arrival"
    class_rank: tuple[int, ...] = ()
    late_after: float = 0.0
    scheduling_policy: SchedulingPolicy = "fcfs"
    capacity_tokens: int = 137_000
    boundary_slot: bool = False
    num_blocks: int = 7_424
    block_size: int = 16
    max_num_batched_tokens: int = 2_048
    max_num_seqs: int = 256
    max_num_active_seqs: int | None = None
    long_prefill_token_threshold: int = 0
    prefill_schedule_interval: int = 1
    prefill_interval_release: bool = True
    max_model_len: int = 4_096
    enable_chunked_prefill: bool = True
    scheduler_reserve_full_isl: bool = True
    watermark: float = 0.0
    padded_prefill: bool = False
    decode_needs_free_block: bool = False
    eviction: Literal["recompute", "lose_progress"] = "recompute"
    enable_prefix_caching: bool = False
    async_scheduling: bool = False
    oversize: Literal["error", "reject"] = "error"

    @classmethod
    def paper(cls, capacity_tokens: int, d0: float, d1: float, **options: Any) -> EngineConfig:
        """The model of arXiv 2504.11320: tau = d0 + d1 * KV tokens of the batch."""
        return cls(preset="paper", time_model=LinearTime(d0, d1), capacity_tokens=capacity_tokens, **options)

    @classmethod
    def vllm(cls, **options: Any) -> EngineConfig:
        """vLLM 0.28's scheduler for Llama-2-7B on one A100-80GB; defaults are vLLM's for that GPU
        (``vllm/engine/arg_utils.py`` 0.28.0: 2,048 tokens and 256 sequences for the API server)."""
        return cls(preset="vllm", **options)

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        for name, words in (
            ("preset", ("paper", "vllm")),
            ("admission_order", ("arrival", "class")),
            ("oversize", ("error", "reject")),
            ("eviction", ("recompute", "lose_progress")),
            ("scheduling_policy", ("fcfs", "priority")),
        ):
            checks.one_of(f"engine.{name}", getattr(self, name), words)
        put("class_rank", checks.integers("engine.class_rank", self.class_rank, high=2**29 - 1, most=MOST_QUEUES))
        if self.class_rank and self.admission_order != "class":
            raise ConfigError(f"engine.class_rank: {self.class_rank}, needs admission_order='class'")
        put("late_after", checks.number("engine.late_after", self.late_after, unit="seconds"))
        check_model(self.time_model)
        for name in ("capacity_tokens", "num_blocks", "block_size", "max_num_batched_tokens", "max_num_seqs", "max_model_len"):
            put(name, checks.integer(f"engine.{name}", getattr(self, name), low=1))
        self._check_prefill(put)
        for name in (
            "boundary_slot", "enable_chunked_prefill", "scheduler_reserve_full_isl", "padded_prefill", "decode_needs_free_block",
            "enable_prefix_caching", "async_scheduling",
        ):  # fmt: skip
            put(name, checks.flag(f"engine.{name}", getattr(self, name)))
        if self.scheduling_policy == "priority":
            self._check_priority()
        if self.block_size > MAX_BLOCK_SIZE:
            raise ConfigError(f"engine.block_size: {self.block_size}, must be from 1 to {MAX_BLOCK_SIZE} tokens")
        if checks.number("engine.watermark", self.watermark, high=1.0) == 1.0:
            raise ConfigError(f"engine.watermark: {self.watermark}, must be in [0, 1)")
        if self.preset == "paper":
            for name in ("padded_prefill", "decode_needs_free_block", "enable_prefix_caching", "async_scheduling"):
                if getattr(self, name):
                    raise ConfigError(f"engine.{name}: True, but it is an option of the vllm preset")
            return
        if self.enable_prefix_caching:
            for name in ("padded_prefill", "decode_needs_free_block"):
                if getattr(self, name):
                    raise ConfigError(f"engine.{name}: True, must be False with prefix caching (not a rule of vLLM)")
        if self.async_scheduling:
            for name in ("padded_prefill", "decode_needs_free_block"):
                if getattr(self, name):
                    raise ConfigError(f"engine.{name}: True, must be False with async_scheduling (not a rule of vLLM)")
        if self.boundary_slot:
            raise ConfigError("engine.boundary_slot: True, but it is an option of the paper preset")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"engine.max_num_batched_tokens: {self.max_num_batched_tokens}, must be >= max_num_seqs = {self.max_num_seqs}"
            )
        if (self.padded_prefill or not self.enable_chunked_prefill) and self.max_num_batched_tokens < self.max_model_len:
            why = "padded_prefill" if self.padded_prefill else "chunked prefill off"
            raise ConfigError(
                f"engine.max_num_batched_tokens: {self.max_num_batched_tokens} with {why}, must be >= max_model_len = {self.max_model_len}"
            )
        # A request of max_model_len tokens computes max_model_len - 1 of them, but vLLM asks for all.
        spare = int(self.decode_needs_free_block)
        if self.max_model_len > (self.num_blocks - spare) * self.block_size:
            raise ConfigError(
                f"engine.max_model_len: {self.max_model_len}, must fit the KV cache: <= "
                f"{(self.num_blocks - spare) * self.block_size} tokens ({self.num_blocks} blocks of {self.block_size})"
            )

    def _check_priority(self) -> None:
        """Options that do not combine with requests in the order of their priority."""
        if self.preset == "paper":
            raise ConfigError("engine.scheduling_policy: 'priority', but it is an option of the vllm preset")
        others = {"admission_order": "arrival", "late_after": 0.0, "padded_prefill": False, "decode_needs_free_block": False}
        for name, off in others.items():
            value = getattr(self, name)
            if value != off:
                raise ConfigError(f"engine.{name}: {value!r}, must be {off!r} with scheduling_policy='priority' (not a rule of vLLM)")

    def _check_prefill(self, put: Callable[[str, object], None]) -> None:
        """The settings that keep requests or prompt tokens back."""
        put("prefill_schedule_interval", checks.integer("engine.prefill_schedule_interval", self.prefill_schedule_interval, low=1))
        threshold = checks.integer("engine.long_prefill_token_threshold", self.long_prefill_token_threshold)
        put("long_prefill_token_threshold", threshold)
        put("prefill_interval_release", checks.flag("engine.prefill_interval_release", self.prefill_interval_release))
        if self.max_num_active_seqs is not None:
            put("max_num_active_seqs", checks.integer("engine.max_num_active_seqs", self.max_num_active_seqs, low=1))
        if not self.prefill_interval_release and self.prefill_schedule_interval == 1:
            raise ConfigError("engine.prefill_interval_release: False, needs prefill_schedule_interval above 1")
        given = {"prefill_schedule_interval": 1, "long_prefill_token_threshold": 0, "max_num_active_seqs": None}
        for name, off in given.items():
            if getattr(self, name) == off:
                continue
            if self.preset == "paper":
                raise ConfigError(f"engine.{name}: {getattr(self, name)}, but it is an option of the vllm preset")
            if self.padded_prefill or self.decode_needs_free_block:
                rule = "padded_prefill" if self.padded_prefill else "decode_needs_free_block"
                raise ConfigError(f"engine.{name}: {getattr(self, name)}, must be {off} with {rule} (not a rule of vLLM)")
        if self.preset == "paper":
            return
        if self.max_num_active_seqs is not None and self.max_num_active_seqs > self.max_num_seqs:
            raise ConfigError(f"engine.max_num_active_seqs: {self.max_num_active_seqs}, must be <= max_num_seqs = {self.max_num_seqs}")
        if threshold > self.max_model_len:
            raise ConfigError(f"engine.long_prefill_token_threshold: {threshold}, must be <= max_model_len = {self.max_model_len}")

    @property
    def most_active(self) -> int:
        """Residents at which admission ends."""
        return self.max_num_seqs if self.max_num_active_seqs is None else self.max_num_active_seqs

    @property
    def kv_capacity(self) -> int:
        """KV units: tokens (``paper``) or blocks (``vllm``)."""
        return self.capacity_tokens if self.preset == "paper" else self.num_blocks

    @property
    def kv_capacity_tokens(self) -> int:
        return self.capacity_tokens if self.preset == "paper" else self.num_blocks * self.block_size

    @property
    def watermark_blocks(self) -> int:
        """vLLM 0.28 ``kv_cache_manager.py``: int(watermark * num_blocks), the null block counted."""
        return 0 if self.preset == "paper" else int(self.watermark * (self.num_blocks + 1))

    @property
    def longest_request(self) -> int:
        """Largest prompt + output (tokens) the engine can ever serve."""
        return self.capacity_tokens if self.preset == "paper" else self.max_model_len

    def replace(self, **changes: Any) -> EngineConfig:
        """The same with other fields; raises ``ConfigError`` for an unknown one or a refused value."""
        names = [f.name for f in dataclasses.fields(self)]
        for name in changes:
            if name not in names:
                raise ConfigError(f"engine.{name}: unknown field (allowed: {', '.join(names)})")
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, slots=True)
class EpisodeLimits:
    """When an episode ends.

    Attributes:
        drain: after the last arrival, a decision that schedules nothing is replaced by one greedy
            iteration, so that every request completes (design rule 14); otherwise the episode ends
            with the requests that no decision moves left where they stand.
        horizon: seconds; an iteration that ends later does not count.
        max_iterations: safety net, idle steps counted; reaching it truncates the episode and is reported.
    """

    drain: bool = True
    horizon: float = math.inf
    max_iterations: int = 10_000_000

    def __post_init__(self) -> None:
        object.__setattr__(self, "drain", checks.flag("limits.drain", self.drain))
        checks.number("limits.horizon", self.horizon, high=math.inf, unit="seconds", open_low=True)
        object.__setattr__(self, "max_iterations", checks.integer("limits.max_iterations", self.max_iterations, low=1, high=2**62))
