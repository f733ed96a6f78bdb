"""Backend ``vllm-scheduler``: vLLM's scheduler and KV cache manager without a model, on a virtual clock."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
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

from llmsched_env.engine_config import EngineConfig
from llmsched_hardware.external import Executed, ExternalBackend
from llmsched_hardware.gate import Gate
from llmsched_hardware.gated_scheduler import Admission, GatedScheduler
from llmsched_hardware.options import scheduler_arguments
from llmsched_hardware.real_engine import write_tiny_llama

_FAKE_TOKEN = 7
_STOP_TOKEN = 8


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


@dataclass(frozen=True, slots=True)
class _Batch:
    """A batch that has been scheduled: what vLLM said, who is in it, and who of them gets a token."""

    output: Any
    ids: list[str]
    sampled: list[bool]


def _name(request: int) -> str:
    """vLLM's id of a request; at equal priority and arrival ids decide, as texts."""
    return f"{request:08d}"


class VllmSchedulerBackend(ExternalBackend):
    """vLLM's ``Scheduler`` and ``KVCacheManager`` under our decisions; every sampled token is faked.

    Iteration times come from the engine's time model, so an episode is deterministic and comparable
    with ``sim`` step by step. With ``async_scheduling`` it is vLLM's ``AsyncScheduler``, which gets the tokens of a batch after
    it has scheduled the next one; requests then end by a stop token, not by ``max_tokens``, which it would know beforehand.
    """

    overlaps = True
    prioritizes = True

    def __init__(self, trace: bool = False) -> None:
        super().__init__(trace)
        self._folder = tempfile.TemporaryDirectory(prefix="llmsched-")
        self._configs: dict[tuple[Any, ...], Any] = {}

    def start(self, engine: EngineConfig) -> None:
        self._overlaps = engine.async_scheduling
        self._longest = engine.max_model_len
        self._in_flight: _Batch | None = None
        self._scheduler = self.scheduler_of(engine)

    def scheduler_of(self, engine: EngineConfig) -> Any:
        """vLLM's scheduler with these settings, empty."""
        return faked_scheduler(GatedScheduler, self.vllm_config(engine), engine)

    def vllm_config(self, engine: EngineConfig) -> Any:
        """vLLM's configuration for these settings, built once."""
        arguments = scheduler_arguments(engine)
        key = (*arguments.values(), engine.async_scheduling)
        if key not in self._configs:
            folder = write_tiny_llama(Path(self._folder.name) / str(engine.max_model_len), engine.max_model_len)
            config = self._configs[key] = faked_config(folder, engine, arguments)
            config.scheduler_config.async_scheduling = engine.async_scheduling  # as an argument it is switched off without a GPU
        return self._configs[key]

    def submit(self, request: int, prompt_tokens: int, output_tokens: int, arrival: float) -> None:
        self._scheduler.add_request(
            Request(
                request_id=_name(request),
                prompt_token_ids=[_FAKE_TOKEN] * prompt_tokens,
                sampling_params=SamplingParams(
                    max_tokens=self._longest - prompt_tokens if self._overlaps else output_tokens,
                    ignore_eos=True,
                    stop_token_ids=[_STOP_TOKEN],
                ),
                pooling_params=None,
                arrival_time=arrival,
                priority=self.priority_of(request),
            )
        )

    def iterate(self, gate: Gate) -> Executed:
        scheduler = self._scheduler
        scheduler.gate = admission = Admission(
            admit=list(map(_name, gate.admit.tolist())),
            hold=frozenset(map(_name, gate.hold.tolist())),
            evict=list(map(_name, gate.evict.tolist())),
            token_budget=gate.token_budget,
        )
        output = scheduler.schedule()
        ids = list(admission.tokens)
        pool = scheduler.kv_cache_manager.block_pool
        used = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
        if used != sum(admission.blocks.values()):
            raise RuntimeError(f"vLLM's block pool has {used} blocks in use, its requests hold {sum(admission.blocks.values())}")
        # One token for every request whose tokens are now all computed, none for an unfinished prefill.
        batch = _Batch(output, ids, [not scheduler.requests[i].is_prefill_chunk for i in ids])
        ended = self._in_flight if self._overlaps else batch
        self._in_flight = batch
        return Executed(
            tokens={int(r): k for r, k in admission.tokens.items()},
            admitted=[int(r) for r in admission.admitted],
            preempted=[int(r) for r in admission.preempted],
            blocks={int(r): k for r, k in admission.blocks.items()},
            finished=set() if ended is None else self._update(ended),
        )

    def _update(self, batch: _Batch) -> set[int]:
        """The tokens of a batch reach the scheduler. Returns the requests that end by them."""
        requests = self._scheduler.requests
        there = [i for i in batch.ids if i in requests]
        self._scheduler.update_from_output(
            batch.output,
            ModelRunnerOutput(
                req_ids=batch.ids,
                req_id_to_index={request_id: i for i, request_id in enumerate(batch.ids)},
                sampled_token_ids=[[self._token(i)] if sampled else [] for i, sampled in zip(batch.ids, batch.sampled, strict=True)],
                logprobs=None,
                prompt_logprobs_dict={},
                pooler_output=[],
            ),
        )
        return {int(i) for i in there if i not in requests}

    def _token(self, request_id: str) -> int:
        """The next token of a request: a stop token where it is the last."""
        request = self._scheduler.requests.get(request_id)
        if request is None:  # it has ended, the token is thrown away
            return _FAKE_TOKEN
        return _STOP_TOKEN if request.num_output_tokens + 1 == self.record.hidden.output[int(request_id)] else _FAKE_TOKEN

    def close(self) -> None:
        super().close()
        self._configs.clear()
        self._folder.cleanup()
