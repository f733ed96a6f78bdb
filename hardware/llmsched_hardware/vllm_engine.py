"""Backend ``vllm``: a real vLLM engine under our decisions, one ``LLMEngine.step()`` an iteration."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from llmsched_hardware.versions import prepare_environment

prepare_environment()  # before vLLM is imported

from llmsched_env.engine.record_backend import RecordView
from llmsched_env.engine_config import EngineConfig, EpisodeLimits
from llmsched_env.errors import ConfigError, EngineError, did_you_mean
from llmsched_env.types import Decision, QueueLayout, Workload
from llmsched_hardware.calibration.iteration_log import IterationLogWriter, check_log_path
from llmsched_hardware.calibration.iteration_watch import IterationWatch
from llmsched_hardware.external import Executed, ExternalBackend
from llmsched_hardware.gate import Gate
from llmsched_hardware.gated_scheduler import Admission
from llmsched_hardware.real_engine import (
    EngineOptions,
    Machine,
    StepSeconds,
    add_request,
    build_engine,
    check_sampling,
    describe_machine,
    describe_scheduler,
    engine_scheduler,
    free_engine,
    num_usable_blocks,
    prompt_token_ids,
    timed_step,
    vocabulary_size,
)
from llmsched_hardware.recorder import Recorder

Clock = Literal["measured", "virtual", "wall"]
CLOCKS = ("measured", "virtual", "wall")


class VllmEngineBackend(ExternalBackend):
    """A real vLLM engine in this process, CPU build or CUDA (``llmsched_env.backend.Backend``).

    The engine is built at the first ``reset`` with the scheduling settings of the environment's
    ``EngineConfig``, kept for the following episodes and rebuilt only when those settings change.
    Requests are random token ids of the workload's lengths. Queues, holds, evictions and reports are
    those of every other backend; under the ``virtual`` clock whole episodes are equal to ``sim``.

    Clocks:
        ``measured``: an iteration takes as long as its ``LLMEngine.step()``; arrivals come on the sum of
        those times. Time that the agent thinks is not in it but in ``thinking_seconds``.
        ``virtual``: the engine's time model, deterministic; the engine computes, its times are not used.
        ``wall``: real time with real sleeping until the next arrival; thinking delays the engine.

    Args:
        model, load_format, dtype, gpu_memory_utilization, enforce_eager, seed, extra: see
            ``llmsched_hardware.real_engine.EngineOptions``.
        clock: one of the above.
        real_stopping: the model ends its requests itself (end-of-sequence and stop tokens); the workload's
            output lengths are then only the ``max_tokens`` of each request, and the log holds the
            lengths found. Otherwise every request generates exactly its output length.
        stop_token_ids: with ``real_stopping``, further token ids that end a request.
        temperature: of the sampling; 0 is greedy. Each request has a seed of its own. Above 0 it is refused on a CPU with chunked
            prefill, where vLLM 0.28.0 to 0.32.0 end their engine at a seeded request whose prompt is computed in parts.
        prompt_seed: of the random prompts. The i-th request of every episode has the same ids.
        keep_tokens: keep the generated token ids of finished requests in ``tokens``.
        record: a file to which every iteration and every finished request is appended at once, one
            JSON object a line (``llmsched_hardware.recorder``).
        iteration_log: a file to which every iteration's sums and times are appended (``llmsched_hardware.calibration.iteration_log``); each
            episode is a segment, described by ``about_episode``.
        trace: keep (request, tokens) of the last iteration for ``scheduled()``.

    Attributes:
        about_episode: plain values that the iteration log says of the episodes to come.
        last_seconds: where the time of the last step went; zero for one that ran nothing.
        total_seconds: the same, summed over the episode.
        thinking_seconds: time between steps in this episode, which is the agent's.
        batch_tokens: tokens scheduled by request in the last iteration.
        tokens: generated token ids by request, with ``keep_tokens``.

    Raises:
        MissingExtraError: vLLM is not installed.
        ConfigError: an argument that is unknown or out of range; at ``reset``, settings or requests
            that vLLM refuses.
        EngineError: the engine cannot start or dies. What was recorded stays; the next ``reset`` builds a
            new engine.
    """

    def __init__(
        self,
        *,
        clock: Clock = "measured",
        real_stopping: bool = False,
        stop_token_ids: Sequence[int] = (),
        temperature: float = 0.0,
        prompt_seed: int = 0,
        keep_tokens: bool = False,
        record: str | Path | None = None,
        iteration_log: str | Path | None = None,
        **options: Any,
    ) -> None:
        super().__init__(bool(options.pop("trace", False)))
        if clock not in CLOCKS:
            hint = did_you_mean(str(clock), CLOCKS)
            raise ConfigError(f"backend_config.clock: {clock!r}, must be one of {', '.join(CLOCKS)}{hint}")
        if stop_token_ids and not real_stopping:
            raise ConfigError(f"backend_config.stop_token_ids: {list(stop_token_ids)}, needs real_stopping=True")
        if not (math.isfinite(temperature) and temperature >= 0.0):
            raise ConfigError(f"backend_config.temperature: {temperature!r}, must be finite and >= 0")
        own = [name for name in EngineOptions.__dataclass_fields__ if name not in EngineConfig.__dataclass_fields__]
        arguments = ["clock", "real_stopping", "stop_token_ids", "temperature", "prompt_seed", "keep_tokens", "record", "trace"]
        arguments.append("iteration_log")
        for name in options:
            if name not in own and name not in EngineConfig.__dataclass_fields__:
                hint = did_you_mean(name, (*own, *arguments))
                raise ConfigError(f"backend_config.{name}: unknown{hint} (allowed: {', '.join((*arguments, *own))})")
        EngineOptions.of(EngineConfig.vllm(), **options)  # refused now, not at the first episode
        self.clock: Clock = clock
        self.discovers_lengths = real_stopping
        self.tokens: dict[int, list[int]] = {}
        self.last_seconds = self.total_seconds = StepSeconds()
        self.thinking_seconds = 0.0
        self.batch_tokens: dict[int, int] = {}
        self._settings = options
        self._stop_token_ids = tuple(int(t) for t in stop_token_ids)
        self._temperature = float(temperature)
        self._prompt_seed = prompt_seed
        self._keep_tokens = keep_tokens
        self._record = None if record is None else Recorder(Path(record))
        self.about_episode: dict[str, Any] = {}
        self._log_path = None if iteration_log is None else Path(iteration_log)
        if self._log_path is not None:
            check_log_path("backend_config.iteration_log", self._log_path)
        self._log: IterationLogWriter | None = None
        self._engine: Any = None
        self._built: EngineOptions | None = None
        self._cause = ""
        self._episode = 0
        self._internal: dict[int, str] = {}
        self._number: dict[str, int] = {}

    # --- episodes ---------------------------------------------------------------------------------
    def reset(
        self,
        workload: Workload,
        layout: QueueLayout,
        engine: EngineConfig,
        limits: EpisodeLimits,
        *,
        reveal_output_length: bool = False,
    ) -> RecordView:
        if self.discovers_lengths and reveal_output_length:
            raise ConfigError("reveal_output_length: True, but with real_stopping nobody knows the lengths before the model ends")
        if self.discovers_lengths and layout.reveals_output_length:
            raise ConfigError(f"layout.by: {layout.by!r}, but with real_stopping nobody knows the lengths before the model ends")
        self.last_seconds = self.total_seconds = StepSeconds()
        self.thinking_seconds = 0.0
        self.tokens = {}
        view = super().reset(workload, layout, engine, limits, reveal_output_length=reveal_output_length)
        if self._record is not None:
            model = EngineOptions.of(engine, **self._settings).model
            self._record.episode(model, self.machine(), self.clock, engine, layout, len(workload))
        self._ready = self._origin = time.perf_counter()
        self._wait_for_clock()
        return view

    def start(self, engine: EngineConfig) -> None:
        options = EngineOptions.of(engine, **self._settings)
        if self._temperature > 0.0:
            check_sampling(options)
        self._episode += 1
        if self._engine is not None and (self._cause or options != self._built or not self._cleared()):
            self._free()
        self._internal, self._number = {}, {}
        if self._engine is None:
            self._engine = build_engine(options)
            self._finalizer = weakref.finalize(self, free_engine, self._engine)  # at the latest when the program ends
            self._built, self._cause = options, ""
            self._vocabulary = vocabulary_size(self._engine)
        self._watch()

    def _watch(self) -> None:
        """The log knows of this episode."""
        scheduler = engine_scheduler(self._engine)
        if self._log_path is None:
            return
        if scheduler.watch is not None:
            scheduler.watch.begin_segment(**self.about_episode)
            return
        found = describe_scheduler(scheduler, self._built.model if self._built else None) | {"steps": "whole"}
        if self._log is None:
            self._log = IterationLogWriter(self._log_path, found)
        scheduler.watch = IterationWatch(self._log, found, whole_steps=True, **self.about_episode)

    def _cleared(self) -> bool:
        """Abort what is left of the last episode; False where the engine does not come back empty."""
        engine, scheduler = self._engine, engine_scheduler(self._engine)
        left = [f"{self._episode - 1}.{r}" for r, internal in self._internal.items() if internal in scheduler.requests]
        try:
            if left:
                engine.abort_request(left)
            scheduler.gate = Admission(admit=[])
            if scheduler.has_requests():  # the model runner hears of the aborted ones in the next step
                timed_step(engine)
        except Exception:  # whatever is wrong with it: a new engine is built
            return False
        pool = scheduler.kv_cache_manager.block_pool
        return not scheduler.requests and pool.get_num_free_blocks() == num_usable_blocks(engine)

    def submit(self, request: int, prompt_tokens: int, output_tokens: int, arrival: float) -> None:
        internal = add_request(
            self._engine,
            f"{self._episode}.{request}",
            prompt_token_ids(self._prompt_seed, request, prompt_tokens, self._vocabulary),
            output_tokens,
            ignore_eos=not self.discovers_lengths,
            stop_token_ids=self._stop_token_ids,
            temperature=self._temperature,
            seed=None if self._temperature == 0.0 else request,
        )
        self._internal[request] = internal
        self._number[internal] = request

    # --- iterations -------------------------------------------------------------------------------
    def advance(self, decision: Decision) -> None:
        if self._cause:
            raise EngineError(f"{self._cause}; call reset() for a new engine")
        self.check_running()
        thinking = time.perf_counter() - self._ready
        self.thinking_seconds += thinking
        self.last_seconds = StepSeconds()
        self.batch_tokens = {}
        try:
            super().advance(decision)
        except BaseException as error:  # Ctrl-C as well: the record is between two states, only a new episode is safe
            self._cause = self._cause or f"the step was broken off: {type(error).__name__}: {error}"
            if self._record is not None:
                self._record.error(error)
            raise
        self.total_seconds += self.last_seconds
        if self._record is not None:
            self._record.step(self, self.batch_tokens, self.last_seconds, thinking)
        self._wait_for_clock()
        self._ready = time.perf_counter()

    def iterate(self, gate: Gate) -> Executed:
        names, numbers = self._internal, self._number
        scheduler = engine_scheduler(self._engine)
        scheduler.gate = admission = Admission(
            admit=[names[r] for r in gate.admit.tolist()],
            hold=frozenset(names[r] for r in gate.hold.tolist()),
            evict=[names[r] for r in gate.evict.tolist()],
            token_budget=gate.token_budget,
        )
        if scheduler.watch is not None:
            scheduler.watch.enter()
        try:
            outputs, seconds = timed_step(self._engine)
        except EngineError as error:
            self._cause = str(error)
            raise
        if scheduler.watch is not None:
            scheduler.watch.stepped()
        self.last_seconds += seconds
        self.batch_tokens = {numbers[i]: k for i, k in admission.tokens.items()}
        admitted, preempted = ([numbers[i] for i in ids] for ids in (admission.admitted, admission.preempted))
        blocks = {numbers[i]: k for i, k in admission.blocks.items()}
        finished = set()
        for output in outputs:
            request = int(output.request_id.partition(".")[2])
            finished.add(request)
            del numbers[names.pop(request)]
            if self._keep_tokens:
                self.tokens[request] = list(output.outputs[0].token_ids)
        used = num_usable_blocks(self._engine) - scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        held = sum(k for r, k in blocks.items() if r not in finished)
        if used != held:
            raise RuntimeError(f"vLLM's block pool has {used} blocks in use, its requests hold {held}")
        return Executed(self.batch_tokens, admitted, preempted, blocks, finished, self._duration())

    def _duration(self) -> float | None:
        """What the episode's clock moves by; None leaves it to the time model."""
        if self.clock == "measured":
            return self.last_seconds.whole  # an empty attempt before a forced drain iteration included
        if self.clock == "virtual":
            return None
        # From the end of the last iteration to the end of this one, thinking included.
        return max(time.perf_counter() - self._origin - self.record.clock, self.last_seconds.whole)

    def _wait_for_clock(self) -> None:
        """Under the wall clock, sleep to the time that an idle step has jumped to."""
        if self.clock == "wall":
            time.sleep(max(self._origin + self.record.clock - time.perf_counter(), 0.0))

    # --- the engine ---------------------------------------------------------------------------------
    def machine(self) -> Machine:
        """Device, driver, versions and KV blocks of the running engine.

        Raises:
            RuntimeError: there is no engine before the first ``reset`` or after ``close``.
        """
        if self._engine is None:
            raise RuntimeError("no engine is running; call reset() first")
        return describe_machine(self._engine)

    def _free(self) -> None:
        """Give the engine's memory back; what it still held is lost."""
        self._finalizer()
        self._engine = self._built = None

    def close(self) -> None:
        super().close()
        if self._engine is not None:
            self._free()
        if self._record is not None:
            self._record.close()
        if self._log is not None:
            self._log.close()
            self._log = None
