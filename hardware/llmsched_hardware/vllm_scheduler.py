"""Backend ``vllm-scheduler``: vLLM's scheduler and KV cache manager without a model, on a virtual clock."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from llmsched_hardware.versions import prepare_environment

prepare_environment()  # before vLLM is imported

import torch
from vllm import EngineArgs, SamplingParams
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from llmsched_env.types import EngineConfig
from llmsched_hardware.external import Executed, ExternalBackend
from llmsched_hardware.gate import Gate
from llmsched_hardware.gated_scheduler import Admission, GatedScheduler
from llmsched_hardware.options import engine_arguments
from llmsched_hardware.real_engine import write_tiny_llama

_FAKE_TOKEN = 7


def faked_config(model: Path, engine: EngineConfig, arguments: dict[str, Any]) -> Any:
    """vLLM's configuration of an engine that no model runs on."""
    config = EngineArgs(model=str(model), load_format="dummy", dtype="float32", enforce_eager=True, **arguments).create_engine_config()
    config.cache_config.num_gpu_blocks = engine.num_blocks + 1  # vLLM counts one null block that no request can use
    return config


def faked_scheduler(scheduler_cls: type[Scheduler], config: Any, engine: EngineConfig) -> Any:
    """A scheduler with its KV cache manager, without an engine around it."""
    spec = FullAttentionSpec(block_size=engine.block_size, num_kv_heads=1, head_size=32, dtype=torch.float32)
    return scheduler_cls(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(engine.num_blocks + 1, [], [KVCacheGroupSpec(["layer"], spec)]),
        structured_output_manager=StructuredOutputManager(config),
        block_size=engine.block_size,
        log_stats=False,
    )


class VllmSchedulerBackend(ExternalBackend):
    """vLLM 0.28's ``Scheduler`` and ``KVCacheManager`` under our decisions; every sampled token is faked.

    Iteration times come from the engine's time model, so an episode is deterministic and comparable
    with ``sim`` step by step.
    """

    def __init__(self, trace: bool = False) -> None:
        super().__init__(trace)
        self._folder = tempfile.TemporaryDirectory(prefix="llmsched-")
        self._configs: dict[tuple[Any, ...], Any] = {}

    def start(self, engine: EngineConfig) -> None:
        config = self.vllm_config(engine)
        self._scheduler = faked_scheduler(GatedScheduler, config, engine)

    def vllm_config(self, engine: EngineConfig) -> Any:
        """vLLM's configuration for these settings, built once."""
        arguments = engine_arguments(engine)
        key = tuple(arguments.values())
        if key not in self._configs:
            folder = write_tiny_llama(Path(self._folder.name) / str(engine.max_model_len), engine.max_model_len)
            self._configs[key] = faked_config(folder, engine, arguments)
        return self._configs[key]

    def submit(self, request: int, prompt_tokens: int, output_tokens: int, arrival: float) -> None:
        self._scheduler.add_request(
            Request(
                request_id=str(request),
                prompt_token_ids=[_FAKE_TOKEN] * prompt_tokens,
                sampling_params=SamplingParams(max_tokens=output_tokens, ignore_eos=True),
                pooling_params=None,
                arrival_time=arrival,
            )
        )

    def iterate(self, gate: Gate) -> Executed:
        scheduler = self._scheduler
        scheduler.gate = admission = Admission(
            admit=list(map(str, gate.admit.tolist())),
            hold=frozenset(map(str, gate.hold.tolist())),
            evict=list(map(str, gate.evict.tolist())),
            token_budget=gate.token_budget,
        )
        output = scheduler.schedule()
        ids = list(admission.tokens)
        pool = scheduler.kv_cache_manager.block_pool
        used = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
        if used != sum(admission.blocks.values()):
            raise RuntimeError(f"vLLM's block pool has {used} blocks in use, its requests hold {sum(admission.blocks.values())}")
        # One token for every request whose tokens are now all computed, none for an unfinished prefill.
        caught_up = [scheduler.requests[i].num_computed_tokens >= scheduler.requests[i].num_tokens for i in ids]
        scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=ids,
                req_id_to_index={request_id: i for i, request_id in enumerate(ids)},
                sampled_token_ids=[[_FAKE_TOKEN] if done else [] for done in caught_up],
                logprobs=None,
                prompt_logprobs_dict={},
                pooler_output=[],
            ),
        )
        return Executed(
            tokens={int(r): k for r, k in admission.tokens.items()},
            admitted=[int(r) for r in admission.admitted],
            preempted=[int(r) for r in admission.preempted],
            blocks={int(r): k for r, k in admission.blocks.items()},
            finished={int(r) for r in ids if r not in scheduler.requests},
        )

    def close(self) -> None:
        super().close()
        self._configs.clear()
        self._folder.cleanup()
