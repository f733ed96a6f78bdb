"""The symbols of vLLM that this project depends on: what the adapters call or override, and the rules that the simulator mirrors.

A symbol is a function, a method, a field, or a class. A class stands for its bases, decorators and fields alone: the methods that
matter are symbols of their own. Attributes that an ``__init__`` sets belong to that ``__init__``. Not every version has every symbol.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from llmsched_env.errors import ConfigError

Use = Literal["called", "mirrored", "called and mirrored"]


@dataclass(frozen=True, slots=True)
class Symbol:
    """One symbol of vLLM.

    Attributes:
        file: below ``vllm/``.
        name: qualified, such as ``Scheduler.schedule``.
        use: ``called``: an adapter calls, overrides, reads or sets it. ``mirrored``: the simulator follows its rule.
        why: what for, in a few words.
    """

    file: str
    name: str
    use: Use
    why: str

    @property
    def key(self) -> str:
        """``FILE:NAME``, as the record of digests has it."""
        return f"{self.file}:{self.name}"

    @classmethod
    def of(cls, key: str) -> Symbol:
        """A symbol by its key, also one that is not listed here.

        Raises:
            ConfigError: not of the form ``FILE.py:NAME``.
        """
        file, _, name = key.partition(":")
        if not (file.endswith(".py") and name and all(part.isidentifier() for part in name.split("."))):
            raise ConfigError(f"symbol {key!r}, must be FILE.py:NAME with the file below vllm/, such as {SYMBOLS[0].key}")
        return BY_KEY.get(key, cls(file, name, "called", "not listed"))


def _of(file: str, use: Use, why: str, names: str, inside: str = "") -> Iterator[Symbol]:
    """Symbols of one file that serve one purpose; ``inside`` is the class that holds them."""
    return (Symbol(file, f"{inside}.{name}" if inside else name, use, why) for name in names.split())


_SCHEDULER = "v1/core/sched/scheduler.py"
_ASYNC = "v1/core/sched/async_scheduler.py"
_QUEUE = "v1/core/sched/request_queue.py"
_MANAGER = "v1/core/kv_cache_manager.py"
_POOL = "v1/core/block_pool.py"
_COORDINATOR = "v1/core/kv_cache_coordinator.py"
_SINGLE = "v1/core/single_type_kv_cache_manager.py"
_BLOCKS = "v1/core/kv_cache_utils.py"
_REQUEST = "v1/request.py"
_CORE = "v1/engine/core.py"
_CLIENT = "v1/engine/core_client.py"
_ENGINE = "v1/engine/llm_engine.py"
_SPECS = "v1/kv_cache_interface.py"
_ARGUMENTS = "engine/arg_utils.py"
_SAMPLING = "sampling_params.py"

SYMBOLS: tuple[Symbol, ...] = (
    # --- one iteration ---------------------------------------------------------------------------------------
    *_of(_SCHEDULER, "called and mirrored", "one iteration: the gate wraps it, rules 5, 6 and 12 follow it", "schedule", "Scheduler"),
    *_of(_SCHEDULER, "called and mirrored", "evictions that a decision asks for; rule 8", "_preempt_request", "Scheduler"),
    *_of(_SCHEDULER, "called and mirrored", "queues, limits and counts that the gate rearranges", "__init__", "Scheduler"),
    *_of(_SCHEDULER, "called", "the class that the gate extends", "Scheduler", ""),
    *_of(_SCHEDULER, "called", "extended by the plug-in", "add_request finish_requests update_from_output shutdown", "Scheduler"),
    *_of(
        _SCHEDULER,
        "called",
        "requests that wait for something else, such as a grammar",
        "_is_blocked_waiting_status _try_promote_blocked_waiting_request _handle_blocked_waiting_request _holds_kv_blocks "
        "_enqueue_waiting_request _select_waiting_queue_for_scheduling",
        "Scheduler",
    ),
    *_of(
        _SCHEDULER,
        "called",
        "read by the plug-in or by the engine's loop around it",
        "pause_state set_pause_state has_requests has_finished_requests get_num_unfinished_requests get_request_counts",
        "Scheduler",
    ),
    *_of(
        _SCHEDULER,
        "mirrored",
        "tokens computed, completion and its blocks; rule 1",
        "_update_after_schedule _update_request_with_output _handle_stopped_request _free_request _free_blocks _free_request_blocks "
        "_request_blocks_can_be_freed _drain_deferred_frees",
        "Scheduler",
    ),
    *_of(
        _SCHEDULER,
        "mirrored",
        "blocks and tokens that an admission is tested for; rule 12",
        "_request_remaining_blocks _inflight_prefill_reserved_blocks _reserve_prefill_lookahead _get_local_prefix_cache_hit",
        "Scheduler",
    ),
    *_of(
        _ASYNC,
        "called and mirrored",
        "scheduling while the last iteration runs",
        "AsyncScheduler AsyncScheduler.__init__ AsyncScheduler._update_after_schedule AsyncScheduler._update_request_with_output",
    ),
    *_of("v1/core/sched/interface.py", "called", "pauses are left to vLLM", "PauseState SchedulerInterface"),
    *_of("v1/core/sched/utils.py", "mirrored", "when a request is complete, and how it leaves", "check_stop remove_all"),
    *_of("v1/core/sched/output.py", "called", "what an iteration scheduled", "SchedulerOutput NewRequestData CachedRequestData"),
    # --- queues and requests ---------------------------------------------------------------------------------
    *_of(_QUEUE, "called", "the queue that a gate shows", "create_request_queue SchedulingPolicy RequestQueue"),
    *_of(
        _QUEUE,
        "called and mirrored",
        "order of the waiting; rule 7",
        "FCFSRequestQueue FCFSRequestQueue.add_request FCFSRequestQueue.pop_request FCFSRequestQueue.peek_request "
        "FCFSRequestQueue.prepend_request FCFSRequestQueue.prepend_requests FCFSRequestQueue.remove_request "
        "FCFSRequestQueue.remove_requests FCFSRequestQueue.__iter__ FCFSRequestQueue.__bool__ FCFSRequestQueue.__len__",
    ),
    *_of(
        _QUEUE,
        "called and mirrored",
        "order of the waiting by priority; rule 23",
        "PriorityRequestQueue PriorityRequestQueue.add_request PriorityRequestQueue.pop_request PriorityRequestQueue.peek_request "
        "PriorityRequestQueue.prepend_request PriorityRequestQueue.remove_requests PriorityRequestQueue.__iter__ "
        "PriorityRequestQueue.__bool__",
    ),
    *_of(
        _REQUEST,
        "called",
        "requests, their tokens and their state",
        "Request Request.__init__ Request.num_tokens Request.num_tokens_with_spec Request.num_output_tokens "
        "Request.append_output_token_ids Request.is_finished Request.__lt__ RequestStatus RequestStatus.is_finished",
    ),
    # --- KV blocks -------------------------------------------------------------------------------------------
    *_of(
        _MANAGER,
        "called and mirrored",
        "blocks of a request and the watermark; rules 5 and 12",
        "KVCacheManager KVCacheManager.__init__ KVCacheManager.allocate_slots KVCacheManager.free KVCacheManager.get_blocks "
        "KVCacheManager.get_computed_blocks KVCacheManager.pop_blocks_for_free KVCacheManager.cache_blocks KVCacheBlocks",
    ),
    *_of(
        _POOL,
        "called and mirrored",
        "which blocks are free, in which order; what they still hold",
        "BlockPool BlockPool.__init__ BlockPool.get_num_free_blocks BlockPool.get_new_blocks BlockPool.touch BlockPool.free_blocks "
        "BlockPool.cache_full_blocks BlockPool.get_cached_block BlockPool._maybe_evict_cached_block BlockHashToBlockMap.get_one_block "
        "BlockHashToBlockMap.insert BlockHashToBlockMap.pop",
    ),
    *_of(
        _COORDINATOR,
        "mirrored",
        "one group of full attention: which manager of blocks, and what it does",
        "get_kv_cache_coordinator KVCacheCoordinator.get_num_blocks_to_allocate KVCacheCoordinator.allocate_new_computed_blocks "
        "KVCacheCoordinator.allocate_new_blocks KVCacheCoordinator.cache_blocks KVCacheCoordinator.free "
        "KVCacheCoordinatorNoPrefixCache.find_longest_cache_hit UnitaryKVCacheCoordinator.__init__ "
        "UnitaryKVCacheCoordinator.find_longest_cache_hit",
    ),
    *_of(
        _SINGLE,
        "mirrored",
        "how many blocks a request takes and keeps, and what counts as a hit",
        "SingleTypeKVCacheManager.__init__ SingleTypeKVCacheManager.get_num_blocks_to_allocate "
        "SingleTypeKVCacheManager.add_local_computed_blocks SingleTypeKVCacheManager.allocate_new_blocks "
        "SingleTypeKVCacheManager.cache_blocks SingleTypeKVCacheManager.pop_blocks_for_free SingleTypeKVCacheManager.free "
        "FullAttentionManager FullAttentionManager.find_longest_cache_hit FullAttentionManager.cache_blocks",
    ),
    *_of(
        _BLOCKS,
        "mirrored",
        "the queue of free blocks, and what a block's contents are",
        "KVCacheBlock FreeKVCacheBlockQueue.__init__ FreeKVCacheBlockQueue.popleft FreeKVCacheBlockQueue.popleft_n "
        "FreeKVCacheBlockQueue.remove FreeKVCacheBlockQueue.append FreeKVCacheBlockQueue.append_n FreeKVCacheBlockQueue.prepend_n "
        "hash_block_tokens get_request_block_hasher",
    ),
    *_of(
        _SPECS,
        "called",
        "the layout of KV caches that is supported, and the one the backend makes",
        "KVCacheSpec AttentionSpec FullAttentionSpec MLAAttentionSpec KVCacheGroupSpec KVCacheConfig",
    ),
    # --- the engine around the scheduler -----------------------------------------------------------------------
    *_of(
        _CORE,
        "called and mirrored",
        "the order of an iteration: schedule, execute, update; one batch ahead",
        "EngineCore.__init__ EngineCore.step EngineCore.post_step EngineCore.step_with_batch_queue EngineCore._process_aborts_queue "
        "EngineCore._should_throttle_prefills",
    ),
    *_of(
        _CORE,
        "called",
        "requests come and go, and the end of an engine",
        "EngineCore.add_request EngineCore.abort_requests EngineCore.preprocess_add_request EngineCore.shutdown",
    ),
    *_of(_CORE, "called", "the loop of a server's engine", "run_busy_loop _process_engine_step has_work", "EngineCoreProc"),
    *_of(_CLIENT, "called", "the engine in this process", "__init__ get_output add_request abort_requests shutdown", "InprocClient"),
    *_of(_ENGINE, "called", "an engine in this process", "__init__ from_engine_args add_request abort_request step", "LLMEngine"),
    *_of("v1/outputs.py", "called", "tokens that the backend fakes", "ModelRunnerOutput"),
    *_of("v1/structured_output/__init__.py", "called", "a part of every scheduler", "StructuredOutputManager.__init__"),
    *_of("distributed/parallel_state.py", "called", "the end of an engine that could not start", "cleanup_dist_env_and_memory"),
    # --- settings ----------------------------------------------------------------------------------------------
    *_of(
        "config/scheduler.py",
        "called and mirrored",
        "settings of the scheduler; rules 18 to 21",
        "SchedulerConfig SchedulerConfig.get_scheduler_cls SchedulerConfig.__post_init__ SchedulerConfig.verify_max_model_len",
    ),
    *_of("config/cache.py", "called", "number of KV blocks", "num_gpu_blocks num_gpu_blocks_override enable_prefix_caching", "CacheConfig"),
    *_of(
        "config/parallel.py",
        "called",
        "parallelism that the plug-in refuses",
        "pipeline_parallel_size data_parallel_size decode_context_parallel_size prefill_context_parallel_size",
        "ParallelConfig",
    ),
    *_of(
        "config/model.py",
        "called",
        "models that the plug-in refuses, and sizes of the vocabulary",
        "is_encoder_decoder is_diffusion supports_multimodal_inputs _get_runner_type get_vocab_size",
        "ModelConfig",
    ),
    *_of(
        "config/vllm.py",
        "called",
        "where the settings stand",
        "scheduler_config parallel_config model_config cache_config speculative_config lora_config kv_transfer_config ec_transfer_config",
        "VllmConfig",
    ),
    *_of(
        _ARGUMENTS,
        "called",
        "arguments that the adapters give",
        "model load_format dtype seed enforce_eager gpu_memory_utilization use_tqdm_on_load scheduler_cls scheduling_policy "
        "max_num_batched_tokens max_num_seqs enable_chunked_prefill watermark scheduler_reserve_full_isl block_size max_model_len "
        "num_gpu_blocks_override enable_prefix_caching async_scheduling skip_tokenizer_init disable_log_stats speculative_config "
        "max_num_active_seqs long_prefill_token_threshold prefill_schedule_interval",
        "EngineArgs",
    ),
    *_of(
        _ARGUMENTS,
        "mirrored",
        "defaults of a server",
        "get_batch_defaults _set_default_max_num_seqs_and_batched_tokens_args _set_default_chunked_prefill_and_prefix_caching_args",
        "EngineArgs",
    ),
    *_of(_SAMPLING, "called", "how the tokens of a request are sampled", "RequestOutputKind SamplingParams"),
    *_of("multimodal/registry.py", "called", "models that the plug-in refuses", "MultiModalRegistry.supports_multimodal_inputs"),
    *_of(
        "v1/attention/backends/cpu_attn.py",
        "mirrored",
        "block sizes of a CPU build",
        "CPUAttentionBackend.get_supported_kernel_block_sizes",
    ),
    *_of("triton_utils/dispatcher.py", "called", "a CPU build's look at every module, which numba must stand", "_rebind_kernels"),
    *_of("platforms/interface.py", "called", "CPU build or CUDA, and the device's name", "Platform.is_cpu Platform.get_device_name"),
)
BY_KEY = {symbol.key: symbol for symbol in SYMBOLS}
