"""What a real engine did, on disk as it happens: one JSON object a line, so that a run that dies loses nothing.

==========  ======================================================================================
kind        holds
==========  ======================================================================================
episode     model, machine, clock, engine settings, segment ends, number of requests
step        ``start`` and ``duration`` on the episode's clock; measured seconds (``whole``, ``schedule``,
            ``execute``, ``update``, ``thinking``); ``tokens`` scheduled by request; the batch's sums;
            requests admitted (number), preempted and evicted (ids)
request     a finished request: lengths in tokens, times on the episode's clock, evictions
error       the cause
end         the episode's counters
==========  ======================================================================================

Requests are named by their index in the workload; all times are seconds.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, TextIO

from llmsched_env.engine.record_backend import RecordBackend
from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import ConfigError
from llmsched_env.types import QueueLayout
from llmsched_hardware.real_engine import Machine, StepSeconds


class Recorder:
    """Appends to a file and flushes after every line.

    Raises:
        ConfigError: the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO | None = None
        self._open()
        self.close()

    def _open(self) -> TextIO:
        if self._file is None:
            try:
                self._file = self.path.open("a", encoding="utf-8")
            except OSError as error:
                raise ConfigError(f"backend_config.record: {self.path}, cannot be written ({error.strerror})") from error
        return self._file

    def _write(self, kind: str, values: dict[str, Any]) -> None:
        file = self._open()
        file.write(json.dumps({"kind": kind, **values}, separators=(",", ":")) + "\n")
        file.flush()

    def episode(self, model: str, machine: Machine, clock: str, engine: EngineConfig, layout: QueueLayout, num_requests: int) -> None:
        settings = {f.name: getattr(engine, f.name) for f in dataclasses.fields(engine) if f.name != "time_model"}
        self._write(
            "episode",
            {
                "model": model,
                "machine": dataclasses.asdict(machine),
                "clock": clock,
                "engine": settings,
                "segment_ends": list(layout.segment_ends),
                "requests": num_requests,
            },
        )

    def step(self, backend: RecordBackend, tokens: dict[int, int], seconds: StepSeconds, thinking: float) -> None:
        """The last step of ``backend``, its ``tokens`` scheduled by request."""
        report = backend.report()
        self._write(
            "step",
            {
                "start": report.start,
                "duration": report.duration,
                **dataclasses.asdict(seconds),
                "thinking": thinking,
                "tokens": tokens,
                "decode_requests": report.decode_requests,
                "prefill_requests": report.prefill_requests,
                "prefill_tokens": report.prefill_tokens,
                "load": report.load,
                "kv_used": report.kv_used,
                "admitted": report.admitted,
                "preempted": report.preempted,
                "evicted": report.evicted,
            },
        )
        hidden = backend.record.hidden
        for r in report.finished:
            self._write(
                "request",
                {
                    "request": r,
                    "prompt_tokens": int(hidden.prompt[r]),
                    "output_tokens": int(hidden.output[r]),
                    "arrival": float(hidden.arrival[r]),
                    "admitted": float(hidden.admitted[r]),
                    "first_token": float(hidden.first_token[r]),
                    "completed": float(hidden.completed[r]),
                    "evictions": int(hidden.evictions[r]),
                    "forced_evictions": int(hidden.forced[r]),
                },
            )
        if backend.done:
            self._write("end", dataclasses.asdict(backend.counters()))

    def error(self, error: BaseException) -> None:
        self._write("error", {"cause": f"{type(error).__name__}: {error}"})

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
