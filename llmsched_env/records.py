"""Named records that compiled code reads and writes as ordinary objects: ``engine.clock``, ``engine.requests.prompt[r]``.

A record is declared once, as a class with annotations, and exists in two forms with the same names:

* In Python it is an object over numpy memory: a scalar field reads and writes one element of a structured
  array, a column of ``Rows`` is a view of a structured array. Under ``NUMBA_DISABLE_JIT=1`` the kernel runs on it.
* In compiled code it is an address. A field is a load or a store at a fixed offset; nothing is counted, copied
  or checked, so a function takes one word where arrays of numba would take a dozen each, and compiles as fast
  as it reads.

==============================  =====================  ===========================================
annotation                      memory                 in compiled code
==============================  =====================  ===========================================
``int``, ``bool``, ``float``    int64, int64, float64  ``record.name``, ``record.name = x``
a subclass of ``Record``        inside this one        ``record.name.field``
a subclass of ``Rows``          address and count      ``record.name.column[i]``
``Vector``, ``Counts``,         address and shape      a numpy array (C order) of one dimension or three
``Indices``, ``Cube``,
``Cube32``
==============================  =====================  ===========================================

Columns of ``Rows`` are ``Ints`` (int32), ``Longs`` (int64) or ``Floats`` (float64); an ``int`` read from one is 64 bits wide. A
number of the whole table is annotated ``int``; it is an int32 in front of the first row (``table.name``, ``table.name = x``).

**Levels.** A field may be marked ``Annotated[..., Level.KNOWN]`` or ``Level.HIDDEN``. Code that is given a record
at a lower level has no such field: in Python reading it is an ``AttributeError``, in compiled code an error when
it is compiled. At a level below ``HIDDEN`` only fields marked ``Scratch`` can be written.
"""

from __future__ import annotations

import enum
import hashlib
import operator
import typing
from typing import Any, ClassVar, NamedTuple, TypeVar

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.datamodel import models, register_default
from numba.core.errors import NumbaTypeError
from numba.core.imputils import lower_builtin, lower_getattr_generic, lower_setattr_generic
from numba.core.typing.templates import AbstractTemplate, AttributeTemplate, infer_getattr, infer_global, signature
from numba.extending import NativeValue, intrinsic, typeof_impl, unbox

Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class Vector(np.ndarray[Any, np.dtype[np.float64]]):
    """(n,) float64."""


class Counts(np.ndarray[Any, np.dtype[np.int64]]):
    """(n,) int64, memory: zeros at the start of an episode."""


class Indices(np.ndarray[Any, np.dtype[np.int64]]):
    """(n,) int64."""


class Cube(np.ndarray[Any, np.dtype[np.float64]]):
    """(a, b, c) float64."""


class Cube32(np.ndarray[Any, np.dtype[np.float32]]):
    """(a, b, c) float32."""


class Level(enum.IntEnum):
    """How much of a record a reader has."""

    VISIBLE = 0
    KNOWN = 1
    HIDDEN = 2


class Scratch:
    """Marks a field that readers of every level may write to."""


class Memory:
    """Marks a scalar that a policy remembers within an episode: 0 at its start, as every ``Counts`` is."""


class _Field(NamedTuple):
    name: str
    kind: str  # scalar, record, rows, array, column, head
    declared: Any
    offset: int
    level: Level
    scratch: bool
    is_float: bool
    memory: bool = False
    wide: bool = True  # 8 bytes; columns of ``Ints`` and heads have 4


_COLUMNS: dict[Any, str] = {Ints: "<i4", Longs: "<i8", Floats: "<f8"}
_SCALARS: dict[Any, str] = {int: "<i8", bool: "<i8", float: "<f8"}
_ARRAYS: dict[Any, tuple[Any, int]] = {
    Vector: (np.float64, 1),
    Counts: (np.int64, 1),
    Indices: (np.int64, 1),
    Cube: (np.float64, 3),
    Cube32: (np.float32, 3),
}


def _marks(hint: Any) -> tuple[Any, Level, bool, bool]:
    if typing.get_origin(hint) is not typing.Annotated:
        return hint, Level.VISIBLE, False, hint is Counts
    declared, *marks = typing.get_args(hint)
    level = next((m for m in marks if isinstance(m, Level)), Level.VISIBLE)
    return declared, level, Scratch in marks, Memory in marks or declared is Counts


class _Declared:
    """What both kinds of declaration share: an attribute above the object's level does not exist."""

    FIELDS: ClassVar[dict[str, _Field]]
    TYPES: ClassVar[dict[Any, Any]]
    SATURATES: ClassVar[bool] = False
    """A table whose ``Ints`` take what 32 bits hold of a larger number, its largest value, rather than its last bits."""
    FIXED: ClassVar[bool] = False
    """A record that compiled code does not write to; only Python does, between two calls."""
    DTYPE: ClassVar[np.dtype[Any]]
    _level: Level

    def _field(self, name: str) -> _Field:
        field = type(self).FIELDS[name]
        if field.level > self._level:
            raise AttributeError(f"{type(self).__name__}.{name}: not shown to a policy{_HINTS[field.level]}")
        return field


_HINTS = {Level.VISIBLE: "", Level.KNOWN: " unless it declares known_lengths", Level.HIDDEN: ""}


_TAKEN_BY_ROWS = ("rows", "handle", "empty", "FIELDS", "DTYPE", "FIXED", "HEADS", "SATURATES", "TYPES")


class Rows(_Declared):
    """A table, one row an item: ``table.column[i]``. Rows lie in memory one after the other.

    Args:
        rows: (n,) of ``DTYPE``, of ``empty`` where the table has numbers of its own.
    """

    HEADS: ClassVar[int] = 0
    """How many numbers belong to the whole table."""

    def __init_subclass__(cls) -> None:
        hints = typing.get_type_hints(cls, include_extras=True)
        own = {n: _marks(h) for n, h in hints.items() if n in cls.__annotations__}
        for name, (declared, *_) in own.items():
            if declared not in (*_COLUMNS, int):
                raise TypeError(f"{cls.__name__}.{name}: {declared!r}, a column must be Ints, Longs or Floats")
            if name in _TAKEN_BY_ROWS:
                raise TypeError(f"{cls.__name__}.{name}: a table has a method of this name")
        heads = [n for n in own if own[n][0] is int]
        # Wide columns first: every column is aligned, and a row stays as short as it can be.
        order = sorted((n for n in own if n not in heads), key=lambda n: own[n][0] == Ints)
        cls.TYPES = {}
        cls.DTYPE = np.dtype([(n, _COLUMNS[own[n][0]]) for n in order], align=True)
        # What belongs to the whole table stands before the first row, in a row of its own.
        if len(heads) * 4 > cls.DTYPE.itemsize:
            raise TypeError(f"{cls.__name__}.{heads[-1]}: {len(heads)} numbers of the whole table, must fit {cls.DTYPE.itemsize} bytes")
        cls.HEADS = len(heads)
        offsets: Any = cls.DTYPE.fields
        places = {n: ("head", -4 * (1 + i)) if n in heads else ("column", 0) for i, n in enumerate((*heads, *order))}
        cls.FIELDS = {}
        for name, (declared, level, scratch, _) in own.items():
            kind, place = places[name]
            at = place if kind == "head" else offsets[name][1]
            wide = kind == "column" and declared != Ints
            cls.FIELDS[name] = _Field(name, kind, declared, at, level, scratch, declared == Floats, wide=wide)
            setattr(cls, name, property(*_head(name)) if kind == "head" else property(_column(name)))

    @classmethod
    def empty(cls, count: int) -> npt.NDArray[Any]:
        """(count,) rows of zeros, with room before the first for the numbers of the whole table."""
        return np.zeros(count + 1, dtype=cls.DTYPE)[1:] if cls.HEADS else np.zeros(count, dtype=cls.DTYPE)

    def __init__(self, rows: npt.NDArray[Any], level: Level = Level.HIDDEN) -> None:
        self.rows, self._level = rows, level
        self._address = rows.ctypes.data
        if self.HEADS:  # ``rows`` is of ``empty``: the numbers of the table end where it begins
            self._heads = np.ndarray(self.HEADS, np.int32, rows.base, rows.dtype.itemsize - 4 * self.HEADS)

    @property
    def handle(self) -> Any:
        """The table as compiled functions take it: its address; the table itself where nothing is compiled."""
        return self if numba.config.DISABLE_JIT else self._address

    def __len__(self) -> int:
        return int(self.rows.shape[0])

    def __getstate__(self) -> tuple[Any, ...]:
        return self.rows.copy(), self._level, self._heads.copy() if self.HEADS else None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        rows, level, heads = state
        if self.HEADS:
            rows, kept = self.empty(rows.shape[0]), rows
            rows[:] = kept
        Rows.__init__(self, rows, level)  # an address does not outlive its array
        if self.HEADS:
            self._heads[:] = heads


def _head(name: str) -> tuple[Any, Any]:
    def get(self: Rows) -> int:
        return int(self._heads[self.HEADS + self._field(name).offset // 4])

    def put(self: Rows, value: Any) -> None:
        field = self._field(name)
        if self._level < Level.HIDDEN and not field.scratch:
            raise AttributeError(f"{type(self).__name__}.{name}: a policy cannot write it")
        self._heads[self.HEADS + field.offset // 4] = min(max(int(value), -(2**31)), 2**31 - 1)

    return get, put


def _column(name: str) -> Any:
    def get(self: Rows) -> npt.NDArray[Any]:
        column: npt.NDArray[Any] = self.rows[self._field(name).name]
        if self._level < Level.HIDDEN and not type(self).FIELDS[name].scratch:
            column.flags.writeable = False
        return column

    return get


R = TypeVar("R", bound="Record")


class Record(_Declared):
    """Named scalars, records, tables and arrays. ``record.handle`` is what compiled functions take.

    Args:
        memory: () of ``DTYPE``; new where not given.
        parts: tables and arrays by field name, which the record keeps alive; of a record inside this one a dict of them.
    """

    def __init_subclass__(cls) -> None:
        hints = typing.get_type_hints(cls, include_extras=True)
        layout: list[tuple[str, Any]] = []
        kinds: dict[str, str] = {}
        marked = {n: _marks(h) for n, h in hints.items() if n in cls.__annotations__}
        for name, (declared, *_) in marked.items():
            if declared in _SCALARS:
                kinds[name] = "scalar"
                form: Any = _SCALARS[declared]
            elif declared in _ARRAYS:
                kinds[name], form = "array", [("address", "<i8"), ("shape", "<i8", (3,))]
            elif isinstance(declared, type) and issubclass(declared, Rows):
                kinds[name], form = "rows", [("address", "<i8"), ("count", "<i8")]
            elif isinstance(declared, type) and issubclass(declared, Record):
                kinds[name], form = "record", declared.DTYPE
            else:
                allowed = ", ".join(kind.__name__ for kind in (*_SCALARS, *_ARRAYS, Rows, Record))
                raise TypeError(f"{cls.__name__}.{name}: {declared!r}, must be one of {allowed}")
            layout.append((name, form))
        cls.TYPES = {}
        cls.DTYPE = np.dtype(layout)
        offsets: Any = cls.DTYPE.fields
        cls.FIELDS = {n: _Field(n, kinds[n], d, offsets[n][1], level, s, d is float, m) for n, (d, level, s, m) in marked.items()}
        for name, field in cls.FIELDS.items():
            if hasattr(Record, name):
                raise TypeError(f"{cls.__name__}.{name}: a record has a method of this name")
            setattr(cls, name, property(*_scalar(name) if field.kind == "scalar" else (_part(name),)))

    def __init__(self, memory: npt.NDArray[Any] | None = None, level: Level = Level.HIDDEN, /, **parts: Any) -> None:
        self._build(np.zeros((), dtype=self.DTYPE) if memory is None else memory, level, parts)

    def _build(self, memory: npt.NDArray[Any], level: Level, parts: dict[str, Any]) -> None:
        self._memory, self._level, self._parts = memory, level, parts
        self._address = memory.ctypes.data
        self._scalars = {n: memory[n] for n, f in self.FIELDS.items() if f.kind == "scalar"}
        self._objects: dict[str, Any] = {}
        for name, field in self.FIELDS.items():
            if field.kind == "record":
                part = parts.get(name, {})
                if isinstance(part, Record):  # its values are taken over
                    memory[name] = part._memory
                    part = parts[name] = part._parts
                self._objects[name] = field.declared(memory[name], level, **part)
            elif field.kind == "rows" and name in parts:
                rows = parts[name]
                if rows.dtype != field.declared.DTYPE or rows.ndim != 1 or not rows.flags.c_contiguous:
                    raise ValueError(f"{type(self).__name__}.{name}: must be a contiguous (n,) array of {field.declared.__name__}.DTYPE")
                memory[name]["address"], memory[name]["count"] = rows.ctypes.data, rows.shape[0]
                self._objects[name] = field.declared(rows, level)
            elif field.kind == "array" and name in parts:
                dtype, ndim = _ARRAYS[field.declared]
                array = parts[name]
                if array.dtype != dtype or array.ndim != ndim or not array.flags.c_contiguous:
                    raise ValueError(f"{type(self).__name__}.{name}: must be a C-contiguous {ndim}-D array of {np.dtype(dtype)}")
                memory[name]["address"] = array.ctypes.data
                memory[name]["shape"][:ndim] = array.shape
                if level < Level.HIDDEN and not field.scratch:
                    array = array.view()
                    array.flags.writeable = False
                self._objects[name] = array

    @property
    def handle(self) -> Any:
        """The record as compiled functions take it: its address; the record itself where nothing is compiled."""
        return self if numba.config.DISABLE_JIT else self._address

    def at_level(self: R, level: Level) -> R:
        """The same record for a reader who has less of it.

        Raises:
            AttributeError: a level above the record's own.
        """
        if level > self._level:
            raise AttributeError(f"{type(self).__name__}: more of it is not shown here")
        other = object.__new__(type(self))
        other._build(self._memory, level, self._parts)
        return other

    def forget(self) -> None:
        """Set everything that is remembered within an episode (``Counts``, ``Memory``) to 0."""
        for name, field in self.FIELDS.items():
            if field.memory and field.kind == "scalar":
                self._scalars[name][()] = 0
            elif field.memory and name in self._parts:
                self._parts[name][:] = 0

    def __getstate__(self) -> tuple[Any, ...]:
        return self._memory.copy(), self._level, self._parts

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._build(*state)  # addresses do not outlive their arrays


def _scalar(name: str) -> tuple[Any, Any]:
    def get(self: Record) -> Any:
        self._field(name)
        return self._scalars[name].item()

    def put(self: Record, value: Any) -> None:
        if self._level < Level.HIDDEN and not self._field(name).scratch:
            raise AttributeError(f"{type(self).__name__}.{name}: a policy cannot write it")
        self._scalars[name][()] = value

    return get, put


def _part(name: str) -> Any:
    def get(self: Record) -> Any:
        self._field(name)
        return self._objects[name]

    return get


class Numbers(Record):
    """The record of a policy or reward that needs no names of its own: numbers that never change, and numbers it remembers."""

    parameters: Vector
    memory: Counts  # zeros at the start of an episode

    @classmethod
    def of(cls, parameters: npt.ArrayLike = (), memory: int = 0) -> Numbers:
        """(P,) parameters and room for ``memory`` counts."""
        return cls(parameters=np.array(parameters, dtype=np.float64).reshape(-1), memory=np.zeros(memory, dtype=np.int64))


# --- compiled code -----------------------------------------------------------------------------------
def _layout_digest(declared: type[Record] | type[Rows]) -> str:
    parts = []
    for field in declared.FIELDS.values():
        inner = _layout_digest(field.declared) if field.kind in ("record", "rows") else f"{field.is_float} {field.wide}"
        parts.append(f"{field.name} {field.kind} {field.offset} {field.level} {field.scratch} {inner} {field.declared in _ARRAYS}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


class RecordType(types.Type):
    """A ``Record`` or ``Rows`` at a level: an address."""

    def __init__(self, declared: type[Record] | type[Rows], level: Level = Level.HIDDEN) -> None:
        self.declared, self.level = declared, level
        # The layout is part of the name: a class declared anew with other fields is another type, in the disk cache too.
        super().__init__(name=f"{declared.__module__}.{declared.__qualname__}[{level.name.lower()}, {_layout_digest(declared)}]")

    def field(self, name: str) -> _Field | None:
        field = self.declared.FIELDS.get(name)
        return field if field is not None and field.level <= self.level else None


def record_type(declared: type[Record] | type[Rows], level: Level = Level.HIDDEN) -> RecordType:
    """The numba type of a class at a level, made once."""
    if level not in declared.TYPES:
        declared.TYPES[level] = RecordType(declared, level)
    found: RecordType = declared.TYPES[level]
    return found


class ColumnType(types.Type):
    """One column of ``Rows``: the address of its first element; the rest is known when code is compiled."""

    def __init__(self, stride: int, is_float: bool, wide: bool, writable: bool, saturates: bool) -> None:
        self.stride, self.is_float, self.wide, self.writable, self.saturates = stride, is_float, wide, writable, saturates
        super().__init__(name=f"column({stride}, {is_float}, {wide}, {writable}, {saturates})")


@register_default(RecordType)
@register_default(ColumnType)
class _Address(models.OpaqueModel):
    pass


def _field_type(record: RecordType, field: _Field) -> Any:
    if field.kind in ("scalar", "head"):
        return types.float64 if field.is_float else types.int64
    if field.kind == "column":
        writable = record.level == Level.HIDDEN or field.scratch
        return ColumnType(record.declared.DTYPE.itemsize, field.is_float, field.wide, writable, record.declared.SATURATES)
    if field.kind == "array":
        dtype, ndim = _ARRAYS[field.declared]
        return types.Array(numba.from_dtype(np.dtype(dtype)), ndim, "C", readonly=record.level < Level.HIDDEN and not field.scratch)
    return record_type(field.declared, record.level)


@infer_getattr
class _RecordAttributes(AttributeTemplate):
    key = RecordType

    def generic_resolve(self, record: RecordType, name: str) -> Any:
        field = record.field(name)
        if field is None:
            if name in record.declared.FIELDS:
                hint = _HINTS[record.declared.FIELDS[name].level]
                raise NumbaTypeError(f"{record.declared.__name__}.{name}: not shown to a policy{hint}")
            return None
        return _field_type(record, field)


def _address(builder: Any, base: Any, offset: int) -> Any:
    return builder.gep(builder.bitcast(base, cgutils.voidptr_t), [ir.Constant(ir.IntType(64), offset)]) if offset else base


@lower_getattr_generic(RecordType)
def _load_field(context: Any, builder: Any, record: Any, value: Any, name: str) -> Any:
    field = record.field(name)
    place = _address(builder, value, field.offset)
    if field.kind in ("record", "column"):
        return place
    if field.kind == "head":
        return builder.sext(builder.load(builder.bitcast(place, ir.IntType(32).as_pointer())), ir.IntType(64))
    word = ir.DoubleType() if field.kind == "scalar" and field.is_float else ir.IntType(64)
    loaded = builder.load(builder.bitcast(place, word.as_pointer()))
    if field.kind != "scalar" or record.declared.FIXED:
        # Compiled code never moves a table: one load serves a whole function, whatever is stored meanwhile.
        loaded.set_metadata("invariant.load", builder.module.add_metadata([]))
    if field.kind == "scalar":
        return loaded
    if field.kind == "rows":
        return builder.inttoptr(loaded, cgutils.voidptr_t)
    return _array(context, builder, _field_type(record, field), place, loaded)


def _array(context: Any, builder: Any, array: Any, place: Any, address: Any) -> Any:
    from numba.np import arrayobj

    words = builder.bitcast(place, ir.IntType(64).as_pointer())
    shape = [builder.load(builder.gep(words, [ir.Constant(ir.IntType(64), 1 + d)])) for d in range(array.ndim)]
    item = context.get_abi_sizeof(context.get_data_type(array.dtype))
    strides: list[Any] = []
    stride = ir.Constant(ir.IntType(64), item)
    for size in reversed(shape):
        strides.insert(0, stride)
        stride = builder.mul(stride, size)
    made = arrayobj.make_array(array)(context, builder)
    data = builder.inttoptr(address, made.data.type)
    arrayobj.populate_array(made, data=data, shape=shape, strides=strides, itemsize=ir.Constant(ir.IntType(64), item), meminfo=None)
    return made._getvalue()


@lower_setattr_generic(RecordType)
def _store_field(context: Any, builder: Any, sig: Any, args: Any, name: str) -> None:
    record = sig.args[0]
    field = record.field(name)
    if field.kind not in ("scalar", "head") or record.declared.FIXED or not (record.level == Level.HIDDEN or field.scratch):
        raise NumbaTypeError(f"{record.declared.__name__}.{name}: cannot be written here")
    place = _address(builder, args[0], field.offset)
    if field.kind == "head":
        value = _saturated(builder, context.cast(builder, args[1], sig.args[1], types.int64))
        builder.store(builder.trunc(value, ir.IntType(32)), builder.bitcast(place, ir.IntType(32).as_pointer()))
        return
    word = ir.DoubleType() if field.is_float else ir.IntType(64)
    builder.store(args[1], builder.bitcast(place, word.as_pointer()))


@infer_global(operator.getitem)
class _ColumnItem(AbstractTemplate):
    def generic(self, args: Any, kws: Any) -> Any:
        column, index = args
        if isinstance(column, ColumnType) and isinstance(index, types.Integer):
            return signature(types.float64 if column.is_float else types.int64, column, types.int64)
        return None


@infer_global(operator.setitem)
class _ColumnSet(AbstractTemplate):
    def generic(self, args: Any, kws: Any) -> Any:
        column, index = args[:2]
        if isinstance(column, ColumnType) and isinstance(index, types.Integer):
            if not column.writable:
                raise NumbaTypeError("a policy cannot write to the engine")
            return signature(types.none, column, types.int64, types.float64 if column.is_float else types.int64)
        return None


def _element(builder: Any, column: Any, base: Any, index: Any) -> Any:
    offset = builder.mul(index, ir.Constant(ir.IntType(64), column.stride))
    place = builder.gep(builder.bitcast(base, cgutils.voidptr_t), [offset])
    word = ir.DoubleType() if column.is_float else ir.IntType(64 if column.wide else 32)
    return builder.bitcast(place, word.as_pointer())


@lower_builtin(operator.getitem, ColumnType, types.Integer)
def _load_item(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    loaded = builder.load(_element(builder, sig.args[0], args[0], args[1]))
    return loaded if sig.args[0].wide else builder.sext(loaded, ir.IntType(64))


def _saturated(builder: Any, value: Any) -> Any:
    """An int64 at what 32 bits hold of it."""
    for compare, bound in ((">", 2**31 - 1), ("<", -(2**31))):
        limit = ir.Constant(ir.IntType(64), bound)
        value = builder.select(builder.icmp_signed(compare, value, limit), limit, value)
    return value


@lower_builtin(operator.setitem, ColumnType, types.Integer, types.Float)
@lower_builtin(operator.setitem, ColumnType, types.Integer, types.Integer)
def _store_item(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    value = args[2]
    if not sig.args[0].wide:
        if sig.args[0].saturates:  # people write to it: a larger count than 32 bits hold is the largest, not another one
            value = _saturated(builder, value)
        value = builder.trunc(value, ir.IntType(32))
    builder.store(value, _element(builder, sig.args[0], args[0], args[1]))
    return context.get_dummy_value()


@typeof_impl.register(_Declared)
def _type_of(value: _Declared, c: Any) -> RecordType:
    return record_type(type(value), value._level)  # type: ignore[arg-type]


@unbox(RecordType)
def _unbox(typ: Any, value: Any, c: Any) -> NativeValue:
    number = c.pyapi.object_getattr_string(value, "_address")
    address = c.pyapi.long_as_longlong(number)
    c.pyapi.decref(number)
    return NativeValue(c.builder.inttoptr(address, cgutils.voidptr_t))


def _retype(target: Any) -> Any:
    """An intrinsic that takes an address or a record for ``target``."""

    def typed(typingctx: Any, handle: Any) -> Any:
        if isinstance(handle, RecordType) and (handle.declared is not target.declared or handle.level < target.level):
            raise NumbaTypeError(f"{handle.declared.__name__}: more of it is not shown here")

        def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], cgutils.voidptr_t) if isinstance(sig.args[0], types.Integer) else args[0]

        return target(types.int64 if isinstance(handle, types.Integer) else handle), build

    return typed


def reader(declared: type[Record] | type[Rows], level: Level = Level.HIDDEN) -> Any:
    """A function ``handle -> record`` for compiled code; in Python it is ``at_level``.

    Every record type that compiled functions are entered with has one, at the top of its module.
    """
    target = record_type(declared, level)
    if numba.config.DISABLE_JIT:
        return lambda record: record if level == Level.HIDDEN else record.at_level(level)
    return intrinsic(_retype(target))
