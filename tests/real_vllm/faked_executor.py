"""A model that sleeps: vLLM's whole server, asynchronous scheduling included, on a machine without a GPU.

``--distributed-executor-backend faked_executor.FakedExecutor`` puts it beneath vLLM's engine. An iteration takes ``FAKED_SECONDS``
(environment variable, default 0.005) in a thread of its own, as a GPU would; a token follows from the prompt and its position alone, so
whatever order requests are scheduled in, the text of a request is the same. A choice that a grammar allows is made where there is one.

``python faked_executor.py [--async-scheduling ...]`` runs vLLM's API server, with this executor or with the real one. vLLM switches
asynchronous scheduling off on a CPU, whose model runner computes while it is called; what was asked for is put back.
"""

from __future__ import annotations

import os
import time
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.v1.executor.abstract import Executor
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import ModelRunnerOutput

END_OF_TEXT = 2
FIRST, VOCABULARY = 3, 1_000
LINES = 48
"""One token in so many ends its request, unless the client ignores it."""


def token_at(prompt: int, position: int) -> int:
    """The token of a prompt (its checksum) at an output position, from 0."""
    mixed = zlib.crc32(position.to_bytes(4, "little"), prompt)
    return END_OF_TEXT if mixed % LINES == 0 else FIRST + mixed // LINES % (VOCABULARY - FIRST)


@dataclass
class _Row:
    """A request as the model knows it: checksum and length of its prompt, tokens sampled, tokens computed."""

    prompt: int
    length: int
    sampled: int = 0
    computed: int = 0


class FakedExecutor(Executor):
    """Executes nothing and takes its time."""

    def _init_executor(self) -> None:
        self._seconds = float(os.environ.get("FAKED_SECONDS", "0.005"))
        self._rows: dict[str, _Row] = {}
        self._gpu = ThreadPoolExecutor(1, thread_name_prefix="faked-gpu")
        self._batch: Any = None
        self._ready = 0.0

    @classmethod
    def supports_async_scheduling(cls) -> bool:
        return True

    # --- what vLLM asks before the first batch ------------------------------------------------------------
    def get_kv_cache_specs(self) -> list[dict[str, Any]]:
        spec = FullAttentionSpec(block_size=self.cache_config.block_size, num_kv_heads=1, head_size=32, dtype=torch.float32)
        return [{"layer": spec}]

    def get_supported_kv_cache_layouts(self) -> list[list[str]]:
        return [["NHD", "HND"]]

    def set_kv_cache_layout(self, *args: Any) -> None:
        pass

    def determine_available_memory(self) -> list[int]:
        return [2**30]

    def initialize_from_config(self, kv_cache_configs: Any) -> None:
        pass

    def compile_or_warm_up_model(self) -> None:
        pass

    @property
    def supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    def collective_rpc(self, method: Any, *args: Any, **kwargs: Any) -> Any:
        return [None]

    def check_health(self) -> None:
        pass

    def shutdown(self) -> None:
        self._gpu.shutdown(wait=False, cancel_futures=True)

    # --- batches ------------------------------------------------------------------------------------------
    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        """Nothing is known before ``sample_tokens``; an empty batch has no tokens."""
        self._follow(scheduler_output)
        if scheduler_output.total_num_scheduled_tokens == 0:
            empty = ModelRunnerOutput(req_ids=[], req_id_to_index={})
            return _done(empty) if non_block else empty
        self._batch = scheduler_output
        return _done(None) if non_block else None

    def sample_tokens(self, grammar_output: Any, non_block: bool = False) -> Any:
        batch, self._batch = self._batch, None
        output = self._sample(batch, grammar_output)
        # Batches follow each other without a gap, whenever they were handed over.
        future = self._gpu.submit(self._take_time, output)
        return future if non_block else future.result()

    def _take_time(self, output: Any) -> Any:
        self._ready = max(self._ready, time.monotonic()) + self._seconds
        time.sleep(max(self._ready - time.monotonic(), 0.0))
        self._ready = time.monotonic()
        return output

    def _follow(self, output: Any) -> None:
        for request_id in output.finished_req_ids:
            self._rows.pop(request_id, None)
        for new in output.scheduled_new_reqs:
            if new.req_id not in self._rows:  # vLLM's second model runner is told of resumed requests as of new ones
                tokens = np.array(new.prompt_token_ids, dtype=np.int64)
                self._rows[new.req_id] = _Row(zlib.crc32(tokens.tobytes()), tokens.size)
            self._rows[new.req_id].computed = new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        for request_id, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            self._rows[request_id].computed = computed

    def _sample(self, batch: Any, grammar: Any) -> Any:
        ids = list(batch.num_scheduled_tokens)
        allowed = {} if grammar is None else dict(zip(grammar.structured_output_request_ids, grammar.grammar_bitmask, strict=False))
        sampled: list[list[int]] = []
        for request_id in ids:
            row = self._rows[request_id]
            row.computed += batch.num_scheduled_tokens[request_id]
            if row.computed < row.length + row.sampled:  # a chunk that is not the last
                sampled.append([])
                continue
            token = token_at(row.prompt, row.sampled)
            if request_id in allowed:
                bits = np.unpackbits(allowed[request_id].view(np.uint8), bitorder="little")[:VOCABULARY]
                choices = np.flatnonzero(bits)
                token = int(choices[token % choices.size])
            row.sampled += 1
            sampled.append([token])
        return ModelRunnerOutput(req_ids=ids, req_id_to_index={r: i for i, r in enumerate(ids)}, sampled_token_ids=sampled)


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


def keep_asynchronous() -> None:
    """Let the CPU platform leave ``async_scheduling`` as it was asked for."""
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config

    def check(vllm_config: Any) -> None:
        asked = vllm_config.scheduler_config.async_scheduling
        original(vllm_config)
        vllm_config.scheduler_config.async_scheduling = asked

    CpuPlatform.check_and_update_config = staticmethod(check)


def main() -> None:
    import runpy

    keep_asynchronous()
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")


if __name__ == "__main__":
    main()
