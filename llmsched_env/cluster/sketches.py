"""Figures of any number of calls in memory that does not grow: counts and sums beside quantile sketches.

The sketches are those of Apache DataSketches, KLL over float64 (Karnin, Lang and Liberty, "Optimal quantile approximation in streams", FOCS
2016). KLL rather than the two others that the library has: its error is a number known beforehand for all quantiles, where a t-digest
has no bound, and REQ takes float32 alone. With ``k`` = 4096 the rank of a quantile is off by at most 0.071 % of the calls in 99 of 100
sketches, as the library states it, so what is reported as P99 lies between the P98.92 and the P99.08; a sketch takes 95 kB.

KLL draws lots, and the library takes no seed: once a sketch holds more values than it can keep whole (a few thousand), two runs of one seed
report quantiles that differ within that error. Counts, means, maxima and the shares of calls within the limits are equal.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from llmsched_env import checks
from llmsched_env.cluster.metrics import METRICS, SHARES, ClusterSummary, Rows, Sum, Tally, Terms
from llmsched_env.cluster.sinks import Sink
from llmsched_env.errors import ConfigError, require
from llmsched_env.files import replacing

FORM = "llmsched sketches 1"
K = 4096
LARGEST_K = 65_535


class SketchSink(Sink):
    """Estimated quantiles and exact counts, means and maxima of latency, TTFT, TPOT and program latency.

    It can be pickled, so that a worker process can hand it back.

    Args:
        terms: which calls count, and the limits.
        k: size of each sketch, 8 to 65,535: the error falls, and the memory rises, in proportion.

    Raises:
        ConfigError: ``k`` outside its range.
        MissingExtraError: datasketches is not installed.
    """

    def __init__(self, terms: Terms, *, k: int = K) -> None:
        self._kind: Any = require("datasketches", "cluster").kll_doubles_sketch
        self.k = checks.integer("k", k, low=8, high=LARGEST_K)
        self._tally = Tally(terms)
        self._sketches = {name: self._kind(self.k) for name in METRICS}

    @property
    def terms(self) -> Terms:
        return self._tally.terms

    @property
    def rank_error(self) -> float:
        """By how much the rank of a quantile can be off, as a share of the calls, in 99 of 100 sketches; the library's own figure."""
        return float(self._kind.get_normalized_rank_error(self.k, False))

    def write(self, rows: Rows) -> None:
        """Count a batch.

        Raises:
            ConfigError: see ``Tally.add``.
        """
        for name, values in self._tally.add(rows).items():
            if values.size:
                self._sketches[name].update(np.ascontiguousarray(values))

    def ended(self, clock: float) -> None:
        """The run ended at ``clock`` seconds; without it, at its last completion.

        Raises:
            ConfigError: negative or not finite.
        """
        self._tally.ended(clock)

    def close(self) -> None:
        pass

    def merge(self, other: SketchSink) -> None:
        """Add the calls of another run: other seeds, other machines. Rates are then per second of all runs together.

        Raises:
            ConfigError: the other one has other terms or another ``k``. Nothing was added then.
        """
        if other is self:
            raise ConfigError("merge: the sink itself, must be another one")
        if other.k != self.k:
            raise ConfigError(f"merge: sketches of k = {other.k}, must be {self.k}")
        self._tally.merge(other._tally)
        for name, sketch in self._sketches.items():
            sketch.merge(other._sketches[name])

    def quantiles(self, name: str, shares: Sequence[float] = SHARES) -> list[float]:
        """Estimates of a metric's quantiles, interpolated as numpy does between values the sketch kept; NaN of none.

        Args:
            name: one of ``METRICS``.
            shares: from 0 to 1.

        Raises:
            ConfigError: another name, or a share outside its range.
        """
        sketch = self._sketches[checks.one_of("name", name, METRICS)]
        return [_quantile(sketch, checks.number("shares", share, high=1.0)) for share in shares]

    def summary(self) -> ClusterSummary:
        """The figures of the calls so far."""
        return self._tally.summary(self.quantiles)

    def to_bytes(self) -> bytes:
        """All of it as JSON, sketches in base64."""
        tally = self._tally
        kept = {
            "form": FORM,
            "terms": dataclasses.asdict(tally.terms),
            "k": self.k,
            "counts": tally.counts,
            "present": tally.present,
            "sums": {name: [total.total, total.lost] for name, total in tally.sums.items()},
            "largest": tally.largest,
            "by_replica": tally.by_replica.tolist(),
            "seconds": [tally.last, tally.other_counted, tally.other_seconds],
            "sketches": {name: base64.b64encode(sketch.serialize()).decode("ascii") for name, sketch in self._sketches.items()},
        }
        return json.dumps(kept).encode("ascii")

    @classmethod
    def from_bytes(cls, kept: bytes, name: str = "sketches") -> SketchSink:
        """What ``to_bytes`` made.

        Raises:
            ConfigError: it is something else, or damaged; ``name`` stands before the reason.
            MissingExtraError: datasketches is not installed.
        """
        require("datasketches", "cluster")
        try:
            found = json.loads(kept)
            if found["form"] != FORM:
                raise ValueError(f"form {found['form']!r}, must be {FORM!r}")
            sink = cls(Terms(**found["terms"]), k=found["k"])
            sink._restore(found)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
            raise ConfigError(f"{name}: not what SketchSink wrote ({type(error).__name__}: {error})") from error
        return sink

    def _restore(self, found: dict[str, Any]) -> None:
        tally = self._tally
        for mine, theirs in ((tally.counts, found["counts"]), (tally.present, found["present"])):
            mine.update({name: checks.integer(name, theirs[name], high=2**62) for name in mine})
        tally.sums = {name: Sum(*map(float, found["sums"][name])) for name in tally.sums}
        tally.largest = {name: float(found["largest"][name]) for name in METRICS}
        by_replica = np.array(found["by_replica"], dtype=np.int64)
        if by_replica.shape != tally.by_replica.shape:
            raise ValueError(f"by_replica has {by_replica.size} numbers, must have {tally.by_replica.size}")
        tally.by_replica = by_replica
        tally.last, tally.other_counted, tally.other_seconds = map(float, found["seconds"])
        for name in METRICS:
            sketch = self._kind.deserialize(base64.b64decode(found["sketches"][name], validate=True))
            if sketch.n != tally.present[name] or sketch.k != self.k:
                expected = f"{self.k} and {tally.present[name]}"
                raise ValueError(f"the sketch of {name} has k = {sketch.k} and {sketch.n} values, must have {expected}")
            self._sketches[name] = sketch

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``to_bytes`` to a file, in one step."""
        with replacing(checks.path("path", path)) as file:
            file.write(self.to_bytes().decode("ascii"))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SketchSink:
        """What ``save`` wrote.

        Raises:
            ConfigError: the file cannot be read, or is something else.
        """
        try:
            kept = checks.path("path", path).read_bytes()
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
        return cls.from_bytes(kept, name=str(path))

    def __reduce__(self) -> tuple[Any, tuple[bytes]]:
        return SketchSink.from_bytes, (self.to_bytes(),)


def _quantile(sketch: Any, share: float) -> float:
    """As ``numpy.quantile`` of the values, exact as long as the sketch holds all of them."""
    if sketch.n == 0:
        return math.nan
    position = share * (sketch.n - 1)
    below = math.floor(position)
    ranks = [(i + 0.5) / sketch.n for i in (below, min(below + 1, sketch.n - 1))]
    low, high = sketch.get_quantiles(ranks, inclusive=True)
    return float(low + (high - low) * (position - below))
