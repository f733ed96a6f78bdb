"""What every iteration-time model is: a record that packs itself into one array, and where it comes from."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numba
import numpy as np
import numpy.typing as npt

from llmsched_env import checks
from llmsched_env.compiled import compiled
from llmsched_env.errors import ConfigError
from llmsched_env.perf.batch import BATCH_FIELDS, Batch, BatchSums
from llmsched_env.pointers import address_of, call_float
from llmsched_env.records import reader

FloatArray = npt.NDArray[np.float64]

MOST = 1e9
"""Largest coefficient (seconds, seconds per token) and table value (seconds); sums of products with 2**30 tokens stay finite."""
MOST_REMEMBERED = 1_000_000
"""Largest memory of a model, numbers."""
LEAST_STEP = 1e-6
"""Between two points of an axis (tokens, requests): slopes and positions on it stay finite."""


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a calibration comes from, how far it reaches and how well it fits.

    Attributes:
        name, source, licence, gpu, model, engine: as a reader needs them to find and judge the data.
        valid_range: in words; a batch outside is extrapolated and counted (``Counters.out_of_range``).
        fit_error: against what, and how large.
        num_blocks: usable KV blocks of that GPU and model, where the calibration states them.
        block_size: tokens per block, with ``num_blocks``.
        notes: what else a reader must know.
    """

    name: str = ""
    source: str = ""
    licence: str = ""
    gpu: str = ""
    model: str = ""
    engine: str = ""
    valid_range: str = ""
    fit_error: str = ""
    num_blocks: int | None = None
    block_size: int | None = None
    notes: str = ""

    def __post_init__(self) -> None:
        for name in ("name", "source", "licence", "gpu", "model", "engine", "valid_range", "fit_error", "notes"):
            checks.text(f"provenance.{name}", getattr(self, name))
        for name in ("num_blocks", "block_size"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, checks.integer(f"provenance.{name}", value, low=1))


class CalibrationRangeWarning(RuntimeWarning):
    """Some iterations of an episode lie outside the data behind its iteration-time model."""


_batch_at = reader(BatchSums)


@compiled
def _evaluate(address, handle, rows, seconds, valid):  # type: ignore[no-untyped-def]
    """Seconds and validity of each row of (n, BATCH_FIELDS)."""
    batch = _batch_at(handle)
    for i in range(rows.shape[0]):
        batch.decodes = rows[i, 0]
        batch.decode_kv = rows[i, 1]
        batch.prefills = rows[i, 2]
        batch.prefill_tokens = rows[i, 3]
        batch.prefill_squares = rows[i, 4]
        batch.prefill_context = rows[i, 5]
        batch.prefill_context64 = rows[i, 6]
        batch.prefill_work = rows[i, 7]
        batch.sampled = rows[i, 8]
        batch.load = rows[i, 9]
        batch.batch_size = rows[i, 10]
        batch.started = rows[i, 11]
        batch.finished = rows[i, 12]
        batch.decode_longest = rows[i, 13]
        batch.decode_shortest = rows[i, 14]
        batch.decode_squares = rows[i, 15]
        batch.out_of_range = 0
        seconds[i] = call_float(address, batch)
        valid[i] = 1.0 - batch.out_of_range


_warned: set[str] = set()
_MOST_WARNED = 1_000  # names are the user's: a sweep over calibrations must not grow without end


def warn_out_of_range(model: IterationTimeModel, out_of_range: int, iterations: int) -> None:
    """Say what share of an episode's iterations had to be extrapolated; once for each calibration and process."""
    source = model.provenance
    if out_of_range == 0 or source.name in _warned:
        return
    if len(_warned) >= _MOST_WARNED:
        _warned.clear()
    _warned.add(source.name)
    warnings.warn(
        f"{100 * out_of_range / iterations:.3g} % of the iterations ({out_of_range:,} of {iterations:,}) lie outside the range of "
        f"calibration {source.name!r} ({source.valid_range or 'not stated'}); their times go beyond what was measured",
        CalibrationRangeWarning,
        stacklevel=3,
    )


class IterationTimeModel(ABC):
    """Seconds of one iteration as a function of its batch.

    A model of one's own is a subclass with a compiled function of the batch and the numbers it reads::

        @compiled
        def seconds(batch: BatchSums) -> float:
            return batch.model[0] + batch.model[1] * batch.decode_kv

    A model may remember: ``batch.memory`` holds ``memory_size(pack())`` numbers, 0 at the start of an episode, which only
    ``compiled_seconds`` reads and writes. The engine calls it once for each batch, in their order.

    Attributes:
        compiled_seconds: compiled function ``(batch) -> float``, seconds > 0; ``batch.model`` is what ``pack`` returned. It
            sets ``batch.out_of_range`` to 1 where it has to go beyond the data behind it.
        reads_contexts: whether it reads the contexts of single decodes (``Batch.decode_longest`` and the two after it).
    """

    __slots__ = ()

    compiled_seconds: ClassVar[Any]
    provenance: Provenance = Provenance()

    @property
    def reads_contexts(self) -> bool:
        return False

    @abstractmethod
    def pack(self) -> FloatArray:
        """(n,) float64, the numbers of the model. Not to be written to."""

    @classmethod
    def memory_size(cls, numbers: FloatArray) -> int:
        """How many numbers a model of this kind, packed as ``numbers``, keeps from one batch to the next."""
        return 0

    @classmethod
    def address(cls) -> int:
        """Where the engine calls ``compiled_seconds``.

        Raises:
            ConfigError: the class has no such function, or it cannot be compiled.
        """
        owner = f"engine.time_model: {cls.__name__}.compiled_seconds"
        function = getattr(cls, "compiled_seconds", None)
        if function is None:
            raise ConfigError(f"{owner}: missing, must be a compiled function of the batch")
        try:
            return address_of(function, (BatchSums,), float)
        except (TypeError, AttributeError, numba.core.errors.NumbaError) as error:
            raise ConfigError(f"{owner}: cannot be compiled as (batch) -> float: {error}") from error

    def seconds(self, batch: Batch) -> float:
        """Seconds of one iteration."""
        return float(self.seconds_of(batch.array()[np.newaxis])[0])

    def seconds_of(self, batches: FloatArray) -> FloatArray:
        """(n,) seconds of (n, BATCH_FIELDS) batches, which follow one another where the model remembers."""
        return self._evaluate(packed_of(self), batches)[0]

    def in_range(self, batch: Batch) -> bool:
        """Whether the batch lies inside the data behind the model, so that nothing is extrapolated."""
        return bool(self._evaluate(packed_of(self), batch.array()[np.newaxis])[1][0])

    @classmethod
    def evaluate(cls, numbers: FloatArray, batches: FloatArray) -> tuple[FloatArray, FloatArray]:
        """(n,) seconds of (n, BATCH_FIELDS) batches by a model of this kind with these numbers, and (n,) 1.0 where it is valid."""
        check_packed("numbers", numbers, getattr(cls, "compiled_seconds", None))
        return cls._evaluate(numbers, batches)

    @classmethod
    def _evaluate(cls, numbers: FloatArray, batches: FloatArray) -> tuple[FloatArray, FloatArray]:
        rows = np.ascontiguousarray(batches, dtype=np.float64)
        if rows.ndim != 2 or rows.shape[1] != BATCH_FIELDS:
            raise ConfigError(f"batches: shape {rows.shape}, must be (n, {BATCH_FIELDS})")
        record = BatchSums(model=numbers, memory=np.zeros(cls.memory_size(numbers)))
        seconds, valid = np.empty(len(rows)), np.empty(len(rows))
        _evaluate(cls.address(), record.handle, rows, seconds, valid)
        wrong = np.flatnonzero(~((seconds >= 0.0) & (seconds < np.inf)))
        if wrong.size:
            raise ConfigError(f"engine.time_model: {cls.__name__} gives {seconds[wrong[0]]} seconds, must be finite and >= 0")
        return seconds, valid


_SAMPLES = (
    Batch(decodes=1.0, decode_kv=100.0, sampled=1.0, load=100.0, batch_size=1.0),
    Batch(prefills=1.0, prefill_tokens=64.0, prefill_squares=4096.0, prefill_work=2048.0, sampled=1.0, load=64.0, batch_size=1.0),
)
"""What every model must give a time for."""

PACKED_CHECKS: dict[Any, Callable[[str, FloatArray], None]] = {}
"""What ``llmsched_env.perf.packed`` knows of the numbers that a built-in compiled function reads."""
CHECKED_TYPES: set[type[IterationTimeModel]] = set()
"""Models whose constructors have checked all of it."""


def check_model(model: object) -> None:
    """Refuse what is no ``IterationTimeModel``, or one of the user's own that compiled code cannot read.

    Raises:
        ConfigError: says what it gives and what it must give.
    """
    if not isinstance(model, IterationTimeModel):
        raise ConfigError(f"engine.time_model: {checks.shown(model)}, must be an IterationTimeModel")
    check_provenance(model.provenance)
    packed_of(model)
    if type(model) not in CHECKED_TYPES:
        owner = f"engine.time_model: {type(model).__name__}"
        with checks.told(owner):
            seconds = model.seconds_of(np.array([batch.array() for batch in _SAMPLES]))
        if not (seconds > 0).all():
            raise ConfigError(f"{owner} gives {seconds.min():g} seconds for a batch, must be above 0")


def packed_of(model: IterationTimeModel) -> FloatArray:
    """``model.pack()``, which compiled code can read: what one of the user's own gives is checked at every call.

    Raises:
        ConfigError: says what it gives and what it must give.
    """
    if type(model) in CHECKED_TYPES:
        return model.pack()
    owner = f"engine.time_model: {type(model).__name__}.pack()"
    with checks.told(owner):
        packed = model.pack()
    return check_packed(owner, packed, getattr(type(model), "compiled_seconds", None))


def memory_of(model: IterationTimeModel) -> FloatArray:
    """(n,) zeros: what a model remembers at the start of an episode.

    Raises:
        ConfigError: the model does not say how much that is.
    """
    numbers = packed_of(model)
    if type(model) in CHECKED_TYPES:
        return np.zeros(model.memory_size(numbers))
    owner = f"engine.time_model: {type(model).__name__}.memory_size()"
    with checks.told(owner):
        size = model.memory_size(numbers)
    return np.zeros(checks.integer(owner, size, low=0, high=MOST_REMEMBERED))


def check_packed(owner: str, packed: object, reader: object = None) -> FloatArray:
    """The numbers of a model, if they are an array that compiled code can read.

    Args:
        owner: begins the message.
        packed: (n,) float64, contiguous.
        reader: the compiled function that will read them; for a built-in one all that it reads must be there.
    """
    if not isinstance(packed, np.ndarray):
        raise ConfigError(f"{owner} gives a {type(packed).__name__}, must be a float64 array")
    if packed.dtype != np.float64 or packed.ndim != 1 or packed.size == 0 or not packed.flags.c_contiguous:
        raise ConfigError(f"{owner} gives {packed.dtype} of shape {packed.shape}, must be one contiguous row of float64")
    check = next((known for function, known in PACKED_CHECKS.items() if function is reader), None)
    if check is not None:
        check(owner, packed)
    return packed


def check_provenance(value: object) -> None:
    """Refuse what is no ``Provenance``."""
    if not isinstance(value, Provenance):
        raise ConfigError(f"time_model.provenance: {checks.shown(value)}, must be a Provenance")


def check_coefficients(owner: str, values: dict[str, float]) -> None:
    """Refuse coefficients that are not numbers from 0 to ``MOST``."""
    for name, value in values.items():
        checks.number(f"{owner}.{name}", value, high=MOST)


def check_axis(owner: str, name: str, values: npt.ArrayLike, least: int = 2) -> FloatArray:
    """(n,) float64 increasing axis of a table.

    Raises:
        ConfigError: not numbers, not one-dimensional, fewer than ``least`` points, negative, or not increasing.
    """
    axis = checks.numbers(f"{owner}.{name}", values)
    if axis.ndim != 1 or axis.size < least:
        raise ConfigError(f"{owner}.{name}: shape {axis.shape}, must be one-dimensional with >= {least} points")
    if not (np.all(np.isfinite(axis)) and axis[0] >= 0 and np.all(np.diff(axis) > 0)):
        raise ConfigError(f"{owner}.{name}: must be finite, >= 0 and increasing")
    step = np.diff(axis).min(initial=np.inf)
    if axis[-1] > MOST or step < LEAST_STEP:
        raise ConfigError(f"{owner}.{name}: {axis[-1]:g} at most, steps from {step:g}, must be <= {MOST:g}, {LEAST_STEP:g}")
    return _owned(axis, values)


def check_values(owner: str, name: str, values: npt.ArrayLike, shape: tuple[int, ...]) -> FloatArray:
    """float64 table of ``shape``, seconds.

    Raises:
        ConfigError: not numbers, another shape, or a value that is not from 0 to ``MOST``.
    """
    table = checks.numbers(f"{owner}.{name}", values)
    if table.shape != shape:
        raise ConfigError(f"{owner}.{name}: shape {table.shape}, must be {shape}, the lengths of its axes")
    if not (np.all(np.isfinite(table)) and np.all(table >= 0)):
        raise ConfigError(f"{owner}.{name}: must be finite and >= 0 seconds")
    if table.size and table.max() > MOST:
        raise ConfigError(f"{owner}.{name}: {table.max():g} at most, must be <= {MOST:g} seconds")
    return _owned(table, values)


def _owned(array: FloatArray, given: npt.ArrayLike) -> FloatArray:
    """Not the caller's own array, which it may change and which is about to be made read-only."""
    return array.copy() if isinstance(given, np.ndarray) and given.flags.writeable and np.may_share_memory(array, given) else array
