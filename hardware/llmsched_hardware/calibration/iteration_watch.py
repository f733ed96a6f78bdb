"""What an iteration log is told by a scheduler: who was in each batch, and when.

`llmsched_hardware.gated_scheduler.GatedScheduler` calls an ``IterationWatch`` where an iteration begins, where it is scheduled and where
its outputs have been processed. Nothing of vLLM is imported.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from llmsched_env.perf import Batch
from llmsched_hardware import versions
from llmsched_hardware.calibration.batches import BatchFollower
from llmsched_hardware.calibration.iteration_log import IterationLogWriter, IterationRow

logger = logging.getLogger("vllm.llmsched")  # below vLLM's logger: its format, its level


class _Scheduled(NamedTuple):
    """An iteration whose outputs are not back."""

    output: Any
    batch: Batch
    begin: float
    blocks: int
    waiting: int
    running: int
    preempted: int


class IterationWatch:
    """Writes the iterations of one scheduler to a log. Whatever goes wrong ends the log, not the engine.

    Attributes:
        writer: the log; other watches may write to it, too, one after the other.
        clock: seconds; tests replace it.

    Args:
        whole_steps: an iteration ends where ``stepped`` is called, not where its outputs are processed: whoever steps the engine counts
            what it does around its scheduler, too.
        engine: the scheduler's, as ``real_engine.describe_scheduler`` says it.
        about: plain values that say what the first segment is of.

    Raises:
        ConfigError: the log is of an engine that cannot share a file with this one.
    """

    def __init__(self, writer: IterationLogWriter, engine: Mapping[str, Any], *, whole_steps: bool = False, **about: Any) -> None:
        self.writer = writer
        different = writer.differing(engine)
        self._engine = {"engine": different} if different else {}
        self.clock: Callable[[], float] = time.perf_counter
        self._origin = self.clock()
        self._follower = BatchFollower()
        self._begin: float | None = None
        self._scheduled: deque[_Scheduled] = deque()
        self._whole_steps = whole_steps
        self._processed: tuple[_Scheduled, float] | None = None
        self._failed = False
        self.begin_segment(**about)

    def begin_segment(self, **about: Any) -> None:
        """Another run begins; ``about`` says which. Its engine may have been idle in between, and the clock begins anew."""
        self._scheduled.clear()
        self._begin = self._processed = None
        self._origin = self.clock()
        self.writer.begin_segment(**about, **self._engine)

    def enter(self) -> None:
        """An iteration begins, unless it has begun already."""
        if self._begin is None:
            self._begin = self.clock()

    def scheduled(self, scheduler: Any, output: Any, preempted: int) -> None:
        """``schedule`` of a vLLM scheduler has put this out; it has preempted so many requests."""
        begin, self._begin = self._begin, None
        if self._failed or begin is None:
            return
        try:
            batch = self._follower.follow(output, scheduler.requests)
            if batch is not None:
                pool = scheduler.kv_cache_manager.block_pool
                blocks = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
                counts = blocks, versions.num_waiting(scheduler), len(scheduler.running), preempted
                self._scheduled.append(_Scheduled(output, batch, begin, *counts))
        except Exception as error:  # nor what vLLM puts out and this version does not know
            self._fail(error)

    def updated(self, output: Any, execute_seconds: float) -> None:
        """``update_from_output`` has processed the tokens of this output, known by its identity.

        Args:
            execute_seconds: execution and sampling alone; -1 where they are not known.
        """
        if self._failed or not output.num_scheduled_tokens:
            return
        while self._scheduled:
            done = self._scheduled.popleft()
            if done.output is output:  # others never came back
                if self._whole_steps:
                    self._processed = done, execute_seconds
                else:
                    self._append(done, execute_seconds)
                return

    def stepped(self) -> None:
        """The step has ended that ``enter`` began (``whole_steps``)."""
        self._begin = None
        if self._processed is None:
            return
        (done, execute_seconds), self._processed = self._processed, None
        self._append(done, execute_seconds)

    def _append(self, done: _Scheduled, execute_seconds: float) -> None:
        row = IterationRow(
            batch=done.batch,
            begin=done.begin - self._origin,
            end=self.clock() - self._origin,
            execute_seconds=execute_seconds,
            blocks=done.blocks,
            waiting=done.waiting,
            running=done.running,
            preempted=done.preempted,
            segment=self.writer.segment,
        )
        try:
            self.writer.append(row)
        except Exception as error:  # a log must not end a server, whatever is wrong with it
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._failed = True
        logger.warning("iteration log %s ends here: %s: %s", self.writer.path, type(error).__name__, error)

    def close(self) -> None:
        """Write what waits; a disk that hangs is waited for two seconds at most."""
        self.writer.close()
