"""What a calibration measures on an engine, and the file that keeps it as it is measured.

The file is JSON lines: a heading that says which engine was measured, then one point a line, each on
disk before the next one begins. A last line cut off by a kill is dropped when the file is read again.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np

from llmsched_env.errors import ConfigError
from llmsched_env.perf import Batch
from llmsched_env.perf.base import FloatArray

Kind = Literal["decode", "prefill", "mixed"]
FORMAT = 1


@dataclass(frozen=True, slots=True, order=True)
class Probe:
    """A batch to measure.

    Attributes:
        kind: decodes alone, one prefill chunk alone, or a chunk behind decodes.
        decodes: decode requests; context: tokens that each has computed.
        chunk: tokens of the prefill chunk; chunk_context: tokens computed of its prompt before.
    """

    kind: Kind
    decodes: int = 0
    context: int = 0
    chunk: int = 0
    chunk_context: int = 0

    def __str__(self) -> str:
        words = []
        if self.decodes:
            words.append(f"{self.decodes} decode{'s' if self.decodes > 1 else ''} at {self.context:,}")
        if self.chunk:
            words.append(f"chunk {self.chunk:,}" + (f" at {self.chunk_context:,}" if self.chunk_context else ""))
        return " + ".join(words)


@dataclass(frozen=True, slots=True)
class Point:
    """A measured batch.

    Attributes:
        probe: what was asked for.
        batch: what the engine executed, the mean over the timed steps (contexts grow by a token a step).
        seconds: median of whole engine steps: scheduling, execution, sampling, bookkeeping.
        execute_seconds: median of execution and sampling alone.
        spread: (75th - 25th percentile) / median of the whole steps.
        steps: timed steps.
        sweep: which pass through the plan measured it; a machine's speed drifts.
    """

    probe: Probe
    batch: Batch
    seconds: float
    execute_seconds: float
    spread: float
    steps: int
    sweep: int = 0

    @classmethod
    def of(cls, probe: Probe, batches: Sequence[Batch], seconds: Sequence[float], execute_seconds: Sequence[float]) -> Point:
        """From the timed steps of one probe."""
        low, middle, high = np.percentile(seconds, (25, 50, 75))
        mean = np.mean([batch.array() for batch in batches], axis=0)
        return cls(
            probe=probe,
            batch=Batch(*mean.tolist()),
            seconds=float(middle),
            execute_seconds=float(np.median(execute_seconds)),
            spread=float((high - low) / middle),
            steps=len(seconds),
        )


def combined(points: Sequence[Point]) -> list[Point]:
    """One point a probe: of several sweeps the median time, on the mean of their batches."""
    by_probe: dict[Probe, list[Point]] = {}
    for point in points:
        by_probe.setdefault(point.probe, []).append(point)
    return [
        Point(
            probe=probe,
            batch=Batch(*np.mean([p.batch.array() for p in own], axis=0).tolist()),
            seconds=float(np.median([p.seconds for p in own])),
            execute_seconds=float(np.median([p.execute_seconds for p in own])),
            spread=float(np.median([p.spread for p in own])),
            steps=sum(p.steps for p in own),
        )
        for probe, own in by_probe.items()
    ]


def drift(points: Sequence[Point]) -> float:
    """How much one probe's time differs between sweeps: mean over probes of (longest - shortest) / median; NaN for one sweep."""
    by_probe: dict[Probe, list[float]] = {}
    for point in points:
        by_probe.setdefault(point.probe, []).append(point.seconds)
    ranges = [(max(own) - min(own)) / float(np.median(own)) for own in by_probe.values() if len(own) > 1]
    return float(np.mean(ranges)) if ranges else math.nan


def seconds_of(points: Sequence[Point]) -> FloatArray:
    """(n,) whole-step seconds."""
    return np.array([point.seconds for point in points])


class PointsFile:
    """Points on disk. Open with ``with``; ``append`` returns when the point is on disk.

    Args:
        path: the file.
        engine: what the points belong to, as plain values; a file of another engine is refused.
        resume: go on with the points in the file; otherwise it begins anew.

    Raises:
        ConfigError: with ``resume``, a file that is no points file or was measured on another engine.
    """

    def __init__(self, path: Path, engine: Mapping[str, Any], *, resume: bool) -> None:
        self._path = path
        self._heading: dict[str, Any] = {"format": FORMAT, "engine": dict(engine)}
        self.points: list[Point] = []
        self._whole = 0
        if resume and path.exists():
            self.points, self._whole = read_points(path, self._heading["engine"])

    def __enter__(self) -> PointsFile:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("r+b" if self._whole else "wb")
        self._file.truncate(self._whole)  # a line that a kill cut off
        self._file.seek(self._whole)
        if not self._whole:
            self._write(self._heading)
        return self

    def append(self, point: Point) -> None:
        self.points.append(point)
        self._write(dataclasses.asdict(point))

    def _write(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(record).encode("utf-8") + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()


def read_points(path: Path, engine: Mapping[str, Any] | None = None) -> tuple[list[Point], int]:
    """Points of a file and the number of its bytes that are whole lines.

    Raises:
        ConfigError: not a points file, a line that is no point, or a heading that names another engine.
    """
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if not whole:
        return [], 0
    points = []
    for number, line in enumerate(data[:whole].splitlines(), start=1):
        try:
            record = json.loads(line)
            if number > 1:
                points.append(_point(record))
            elif record["format"] != FORMAT:
                raise ValueError(f"format {record['format']}")
            else:
                _check_engine(path, record["engine"], engine)
        except (ValueError, TypeError, KeyError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{path}, line {number}: not a line of a points file ({type(error).__name__}: {error})") from error
    return points, whole


def _check_engine(path: Path, kept: Mapping[str, Any], engine: Mapping[str, Any] | None) -> None:
    for name, value in (engine or {}).items():
        if kept.get(name) != value:
            raise ConfigError(f"--resume: {name} is {value!r}, but the points in {path} were measured with {kept.get(name)!r}")


def _point(record: Mapping[str, Any]) -> Point:
    values = dict(record)
    return Point(**{**values, "probe": Probe(**values["probe"]), "batch": Batch(**values["batch"])})
