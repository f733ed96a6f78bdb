"""Measures batches on a vLLM engine that stands in this process, one engine step at a time.

The engine is stepped as the backend ``vllm`` steps it. Requests are synthetic: token ids of the
wanted number, greedy sampling, no stop token. Requests that must keep their context while others
are prefilled are held by the gate of ``llmsched_hardware.gated_scheduler``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmsched_env.perf import Batch
from llmsched_hardware.calibration.batches import Chunk, batch_of
from llmsched_hardware.calibration.plan import CHUNK_STEPS, DECODE_STEPS, WARM_STEPS, EngineLimits, Group
from llmsched_hardware.calibration.points import Point, Probe
from llmsched_hardware.gated_scheduler import Admission
from llmsched_hardware.real_engine import add_request, engine_scheduler, prompt_token_ids, timed_step, vocabulary_size

WARM_UP_STEPS = 10


class NotReachedError(RuntimeError):
    """The engine did not run the batch that was asked for."""


@dataclass(frozen=True, slots=True)
class Step:
    """One engine step: what it executed, seconds of the whole step and of execution and sampling alone."""

    batch: Batch
    seconds: float
    execute_seconds: float


class Stepper:
    """Steps an engine of ``llmsched_hardware.real_engine`` and describes every step."""

    def __init__(self, engine: Any) -> None:
        self._engine, self._scheduler = engine, engine_scheduler(engine)
        self._vocabulary = vocabulary_size(engine)
        self._number = itertools.count()
        self._sizes = np.random.default_rng(0)
        self._prompts: dict[str, int] = {}
        self._computed: dict[str, int] = {}
        self._ended = 0  # requests, since the last batch

    def add(self, prompt_tokens: int, output_tokens: int) -> str:
        """A new request; its id in the scheduler."""
        number = next(self._number)
        prompt = prompt_token_ids(0, number, prompt_tokens, self._vocabulary)
        request_id = add_request(self._engine, f"calibrate-{number}", prompt, output_tokens)
        self._prompts[request_id] = prompt_tokens
        self._computed[request_id] = 0
        return request_id

    def step(self, hold: Iterable[str] = ()) -> Step:
        """One engine step in which ``hold`` do not advance.

        Raises:
            EngineError: the engine has died.
        """
        self._scheduler.gate = gate = Admission(hold=frozenset(hold))
        outputs, seconds = timed_step(self._engine)
        if gate.preempted:
            raise NotReachedError(f"the KV memory was full, {len(gate.preempted)} requests were preempted")
        batch = self._batch(gate.tokens, len(gate.admitted))
        self._ended += len(outputs)
        return Step(batch, seconds.whole, seconds.execute)

    def _batch(self, scheduled: dict[str, int], started: int) -> Batch:
        """The sums of one step's tokens. Nobody is preempted, so a request decodes once its prompt is computed."""
        decodes: list[int] = []
        chunks: list[Chunk] = []
        for request_id, tokens in scheduled.items():
            context, prompt = self._computed[request_id], self._prompts[request_id]
            self._computed[request_id] = context + tokens
            if context >= prompt:
                decodes.append(context)
            else:
                chunks.append(Chunk(tokens, context, context + tokens >= prompt))
        finished = self._ended
        if scheduled:
            self._ended = 0
        return batch_of(decodes, chunks, started=started, finished=finished)

    def other_chunk(self) -> None:
        """A step with a chunk of random size alone, everybody else held.

        In service two prefill chunks in a row rarely have the same size. On a CPU the second of two equal
        ones is up to a third faster, which nobody would see again.
        """
        free = self._scheduler.kv_cache_manager.block_pool.get_num_free_blocks() * self._scheduler.block_size
        most = min(self.budget // 2, free, self._scheduler.max_model_len - 1)
        if most > 0 and len(self._scheduler.running) < self._scheduler.max_num_running_reqs:
            self.add(int(self._sizes.integers(1, most + 1)), 1)
            self.step(hold=[r.request_id for r in self._scheduler.running])

    def in_decode(self) -> list[str]:
        """Running requests whose prompt is computed."""
        ids = [r.request_id for r in self._scheduler.running]
        return [i for i in ids if self._computed[i] >= self._prompts[i]]

    def computed(self, request_id: str) -> int:
        """Tokens computed of a request."""
        return self._computed[request_id]

    @property
    def budget(self) -> int:
        """Most tokens of a step."""
        return int(self._scheduler.max_num_scheduled_tokens)

    @contextmanager
    def token_budget(self, tokens: int) -> Iterator[None]:
        """At most so many tokens a step, which sets the size of a prompt's next chunk."""
        before = self._scheduler.max_num_scheduled_tokens
        self._scheduler.max_num_scheduled_tokens = tokens
        try:
            yield
        finally:
            self._scheduler.max_num_scheduled_tokens = before

    def clear(self) -> None:
        """Abort whatever is left and let the engine forget it."""
        left = list(self._scheduler.requests)
        if left:
            self._engine.abort_request(left, internal=True)
            self._ended += len(left)
        self._scheduler.gate = Admission()
        timed_step(self._engine)
        self._prompts.clear()
        self._computed.clear()


def measure(stepper: Stepper, group: Group, max_model_len: int, record: Callable[[Point], bool]) -> dict[Probe, str]:
    """Measure a group's probes in order.

    Args:
        record: takes each point as it is measured; False ends the group.

    Returns:
        Probes that could not be measured, and why.
    """
    if group.is_prefill:
        failed = _measure_chunks(stepper, group, record)
    else:
        failed = _measure_stack(stepper, group, max_model_len, record)
    stepper.clear()
    return failed


def warm_up(stepper: Stepper, limits: EngineLimits) -> None:
    """The first steps of an engine are slower than all others, whatever their batch."""
    for _ in range(2):
        stepper.add(min(limits.budget, limits.max_model_len - WARM_UP_STEPS), WARM_UP_STEPS)
        for _ in range(WARM_UP_STEPS):
            stepper.step()
    stepper.clear()


def _point(probe: Probe, steps: list[Step]) -> Point:
    for step in steps:
        ran = (step.batch.decodes, step.batch.prefill_tokens)
        if ran != (probe.decodes, probe.chunk):
            raise NotReachedError(f"the engine ran {ran[0]:g} decodes and {ran[1]:g} prefill tokens")
    return Point.of(probe, [s.batch for s in steps], [s.seconds for s in steps], [s.execute_seconds for s in steps])


def _measure_stack(stepper: Stepper, group: Group, max_model_len: int, record: Callable[[Point], bool]) -> dict[Probe, str]:
    """Decodes that grow in number; earlier ones are held while the new ones are prefilled, so contexts stay close."""
    size = 0
    for i, probe in enumerate(group.probes):
        try:
            for _ in range(probe.decodes - size):
                stepper.add(group.context, max_model_len - group.context)
            size = max(size, probe.decodes)
            while len(ready := stepper.in_decode()) < size:
                if not stepper.step(hold=ready).batch.prefill_tokens:
                    raise NotReachedError(f"{len(ready)} of {size} prompts of {group.context:,} tokens fit the KV memory")
            steps = []
            for _ in range(WARM_STEPS + DECODE_STEPS if probe.kind == "decode" else 1 + CHUNK_STEPS):
                if probe.chunk:
                    stepper.other_chunk()
                    stepper.add(probe.chunk, 1)
                steps.append(stepper.step())
            if not record(_point(probe, steps[WARM_STEPS if probe.kind == "decode" else 1 :])):
                break
        except NotReachedError as error:
            return dict.fromkeys(group.probes[i:], str(error))  # requests may be left half done, and the next ask for more
    return {}


def _measure_chunks(stepper: Stepper, group: Group, record: Callable[[Point], bool]) -> dict[Probe, str]:
    """One prompt passes through all contexts of the group; the first prompt warms the shapes."""
    chunk = group.probes[0].chunk
    length = max(probe.chunk_context for probe in group.probes) + chunk
    timed: dict[Probe, list[Step]] = {probe: [] for probe in group.probes}
    for prompt in range(1 + CHUNK_STEPS):
        stepper.other_chunk()
        request = stepper.add(length, 1)
        computed = 0
        for probe in sorted(group.probes, key=lambda p: p.chunk_context):
            while computed < probe.chunk_context:
                with stepper.token_budget(min(stepper.budget, probe.chunk_context - computed)):
                    stepper.step()
                computed = stepper.computed(request)
            if computed:
                stepper.other_chunk()
            with stepper.token_budget(chunk):
                step = stepper.step()
            computed += chunk
            if prompt:
                timed[probe].append(step)
    failed: dict[Probe, str] = {}
    for probe, steps in timed.items():
        try:
            if not record(_point(probe, steps)):
                break
        except NotReachedError as error:
            failed[probe] = str(error)
    return failed


__all__ = ["NotReachedError", "Step", "Stepper", "measure", "warm_up"]
