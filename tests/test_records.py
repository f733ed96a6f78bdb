"""Records: the same numbers in Python and compiled, levels, copies, refusals."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as hs
from numba.core.errors import NumbaError

from llmsched_env.compiled import compiled
from llmsched_env.engine.state import Engine
from llmsched_env.pointers import address_of, call, call_float, call_int
from llmsched_env.records import (
    Counts,
    Cube,
    Cube32,
    Floats,
    Indices,
    Ints,
    Level,
    Longs,
    Memory,
    Numbers,
    Record,
    RecordType,
    Rows,
    Scratch,
    Vector,
    reader,
)
from llmsched_env.types import Decision

ROOT = Path(__file__).resolve().parents[1]
needs_compiler = pytest.mark.skipif(numba.config.DISABLE_JIT, reason="is about compiled code")


class Table(Rows):
    small: Ints
    wide: Floats
    long: Longs
    known: Annotated[Ints, Level.KNOWN]
    secret: Annotated[Floats, Level.HIDDEN]
    note: Annotated[Ints, Scratch]


class Inner(Record):
    count: int
    flag: bool
    share: float
    table: Table
    weights: Vector


class Outer(Record):
    first: float
    inner: Inner
    table: Table
    weights: Vector
    counts: Counts
    cube: Cube
    cube32: Cube32
    last: int
    mark: Annotated[int, Scratch]
    remembered: Annotated[int, Memory]
    places: Indices
    known: Annotated[int, Level.KNOWN]
    secret: Annotated[float, Level.HIDDEN]
    vault: Annotated[Inner, Level.HIDDEN]


at = reader(Outer)
table_at = reader(Table)


def table(n: int, rng: np.random.Generator) -> np.ndarray:
    rows = np.zeros(n, dtype=Table.DTYPE)
    for name in rows.dtype.names or ():
        bits = rows.dtype[name].itemsize * 8 - 1
        rows[name] = rng.integers(-(2**bits), 2**bits - 1, n) if rows.dtype[name].kind == "i" else rng.normal(size=n)
    return rows


def made(seed: int = 0, n: int = 5) -> Outer:
    rng = np.random.default_rng(seed)

    def inner() -> dict[str, Any]:
        return {"table": table(n + 2, rng), "weights": rng.normal(size=n + 3)}

    record = Outer(
        table=table(n, rng),
        inner=inner(),
        vault=inner(),
        weights=rng.normal(size=n),
        counts=rng.integers(-(2**60), 2**60, n),
        places=rng.integers(0, 2**60, n),
        cube=rng.normal(size=(2, 3, n)),
        cube32=rng.normal(size=(3, 2, 2)).astype(np.float32),
    )
    record.first, record.last, record.mark, record.known, record.secret = rng.normal(), int(rng.integers(2**62)), 3, 4, 0.25
    record.inner.count, record.inner.flag, record.inner.share = -7, True, 0.125
    record.vault.count, record.remembered = 11, 9
    return record


# --- the same in Python and compiled ------------------------------------------------------------------
@compiled
def read_all(handle, columns, scalars):  # type: ignore[no-untyped-def]
    record = at(handle)
    n = columns.shape[1]
    for i in range(n):
        columns[0, i] = record.table.small[i]
        columns[1, i] = record.table.wide[i]
        columns[2, i] = record.table.known[i]
        columns[3, i] = record.table.secret[i]
        columns[4, i] = record.table.note[i]
        columns[5, i] = record.inner.table.small[i + 2]
        columns[6, i] = record.weights[i]
        columns[7, i] = record.cube[1, 2, i]
        columns[8, i] = record.inner.weights[i + 3]
        columns[9, i] = record.vault.table.wide[i + 1]
    scalars[0] = record.first
    scalars[1] = record.inner.count
    scalars[2] = record.inner.flag
    scalars[3] = record.inner.share
    scalars[4] = record.mark
    scalars[5] = record.known
    scalars[6] = record.secret
    scalars[7] = record.vault.count
    scalars[8] = record.cube32[2, 1, 0]
    scalars[9] = record.cube.shape[0] * 100 + record.cube.shape[1] * 10 + record.cube.shape[2]
    longs = record.table.long[n - 1], record.inner.table.long[n + 1]
    return record.last + record.remembered, record.counts[n - 1] + record.places[n - 1], record.counts.shape[0], longs


@given(seed=hs.integers(0, 2**20), n=hs.integers(1, 9))
def test_compiled_code_reads_what_python_reads(seed: int, n: int) -> None:
    record = made(seed, n)
    columns, scalars = np.empty((10, n)), np.empty(10)
    last, count, size, longs = read_all(record.handle, columns, scalars)
    inner, own = record.inner, record.table
    expected: list[Any] = [own.small, own.wide, own.known, own.secret, own.note, inner.table.small[2:], record.weights]
    expected += [record.cube[1, 2], inner.weights[3:], record.vault.table.wide[1:-1]]
    for got, want in zip(columns, expected, strict=True):
        assert got.tolist() == np.asarray(want, dtype=float).tolist()
    singles = [record.first, inner.count, inner.flag, inner.share, record.mark, record.known, record.secret, record.vault.count]
    assert scalars.tolist() == [*singles, float(record.cube32[2, 1, 0]), 230.0 + n]
    assert (last, count, size) == (record.last + 9, record.counts[-1] + record.places[-1], n)
    assert longs == (own.long[-1], inner.table.long[-1])


@compiled
def write_all(handle, i, whole, real):  # type: ignore[no-untyped-def]
    record = at(handle)
    record.first = real
    record.last = whole
    record.inner.count = whole + 1
    record.inner.flag = real > 0
    record.inner.share = whole  # becomes a float
    record.table.small[i] = whole
    record.table.wide[i] = real
    record.table.secret[i] = whole  # becomes a float
    record.table.long[i] = whole * 2**32 + 5
    record.inner.table.note[i] += 1
    record.weights[i] = real
    record.counts[i] += whole
    record.cube[0, 1, i] = real
    record.cube32[1, 1, 1] = real
    record.vault.share -= real


@given(i=hs.integers(0, 4), whole=hs.integers(-(2**31), 2**31 - 2), real=hs.floats(-1e6, 1e6))
def test_compiled_code_writes_what_python_writes(i: int, whole: int, real: float) -> None:
    one, other = made(), made()
    write_all(one.handle, i, whole, real)
    other.inner.table.note[i] += 1
    other.first, other.last, other.inner.count, other.inner.flag, other.inner.share = real, whole, whole + 1, real > 0, float(whole)
    other.table.small[i], other.table.wide[i], other.table.secret[i] = whole, real, whole
    other.table.long[i] = whole * 2**32 + 5
    other.weights[i], other.cube[0, 1, i], other.cube32[1, 1, 1] = real, real, real
    other.counts[i] += whole
    other.vault.share -= real
    assert contents(one) == contents(other)


def contents(record: Record | Rows) -> list[Any]:
    """All values by field, addresses left out."""
    if isinstance(record, Rows):
        return [(name, getattr(record, name).tolist()) for name in type(record).FIELDS]
    found: list[Any] = []
    for name, field in type(record).FIELDS.items():
        value = getattr(record, name)
        found.append((name, contents(value) if field.kind in ("record", "rows") else np.asarray(value).tolist()))
    return found


def test_numbers_of_32_bits_are_64_bits_wide_in_arithmetic() -> None:
    @compiled
    def product(handle):  # type: ignore[no-untyped-def]
        own = table_at(handle)
        return own.small[0] * own.small[1]

    rows = np.zeros(2, dtype=Table.DTYPE)
    rows["small"] = 2**31 - 1
    if not numba.config.DISABLE_JIT:  # numpy's own 32-bit numbers wrap round
        assert product(Table(rows).handle) == (2**31 - 1) ** 2


def test_a_bool_is_a_number_both_ways() -> None:
    record = made()
    record.inner.flag = False
    assert record.inner.flag == 0
    record.inner.flag = np.bool_(True)
    assert record.inner.flag == 1


def test_rows_are_aligned_and_their_columns_are_views() -> None:
    rows = table(4, np.random.default_rng(0))
    own = Table(rows)
    own.small[2] = 99
    assert rows["small"][2] == 99 and len(own) == 4
    offsets: Any = Table.DTYPE.fields
    assert all(offsets[name][1] % offsets[name][0].itemsize == 0 for name in offsets)
    assert [offsets[name][1] for name in ("wide", "long", "secret", "small", "known", "note")] == [0, 8, 16, 24, 28, 32]


def test_records_and_tables_can_be_given_to_compiled_functions_as_they_are() -> None:
    @compiled
    def sum_of(record: Outer, own: Table) -> float:
        return record.first + own.wide[1]

    record = made()
    assert sum_of(record, record.table) == record.first + record.table.wide[1]


def test_a_record_inside_takes_over_the_values_of_one_that_is_given() -> None:
    numbers = Numbers.of([1.0, 2.0], memory=3)

    class Holder(Record):
        before: int
        numbers: Numbers

    holder = Holder(numbers=numbers)
    assert holder.numbers.parameters.tolist() == [1.0, 2.0] and holder.numbers.memory.tolist() == [0, 0, 0]
    numbers.memory[1] = 5
    assert holder.numbers.memory.tolist() == [0, 5, 0]  # the same arrays


def test_what_is_remembered_is_forgotten_and_nothing_else() -> None:
    record = made()
    before = contents(record)
    record.forget()
    assert not record.counts.any() and record.remembered == 0
    kept = [name for name in Outer.FIELDS if name not in ("counts", "remembered")]
    assert [value for name, value in before if name in kept] == [value for name, value in contents(record) if name in kept]


# --- functions behind addresses -----------------------------------------------------------------------
@compiled
def add_to_last(record: Outer, number: int) -> None:
    record.last += number


@compiled
def twice_last(record: Outer) -> int:
    return 2 * record.last


@compiled
def first_of(record: Outer) -> float:
    return record.first


@compiled
def through_addresses(handle, nothing, whole, real):  # type: ignore[no-untyped-def]
    record = at(handle)
    call(nothing, record, 5)
    return call_int(whole, record), call_float(real, record)


def test_functions_called_by_address() -> None:
    record = made()
    record.last, record.first = 10, 0.5
    addresses = address_of(add_to_last, (Outer, int)), address_of(twice_last, (Outer,), int), address_of(first_of, (Outer,), float)
    assert len(set(addresses)) == 3
    assert addresses[0] == address_of(add_to_last, (Outer, int))
    if not numba.config.DISABLE_JIT:
        assert through_addresses(record.handle, *addresses) == (30, 0.5)
        assert record.last == 15


@needs_compiler
def test_an_ordinary_function_has_no_address() -> None:
    with pytest.raises(TypeError, match=r"must be a function decorated with llmsched_env\.compiled\.compiled"):
        address_of(lambda record: None, (Outer,))


# --- levels -------------------------------------------------------------------------------------------
SHOWN = {
    Level.VISIBLE: {"first", "inner", "table", "weights", "counts", "cube", "cube32", "last", "mark", "remembered", "places"},
    Level.KNOWN: {"known"},
    Level.HIDDEN: {"secret", "vault"},
}


@pytest.mark.parametrize("level", Level)
def test_python_shows_a_level_its_fields_alone(level: Level) -> None:
    record = made().at_level(level)
    shown = set().union(*(names for at_least, names in SHOWN.items() if at_least <= level))
    for name in Outer.FIELDS:
        if name in shown:
            getattr(record, name)
        else:
            with pytest.raises(AttributeError, match=rf"Outer\.{name}: not shown to a policy"):
                getattr(record, name)
    # tables and records inside have the level of the whole
    assert (level >= Level.KNOWN) == hasattr(record.table, "known") == hasattr(record.inner.table, "known")
    assert (level >= Level.HIDDEN) == hasattr(record.table, "secret") == hasattr(record.inner.table, "secret")


@pytest.mark.parametrize("level", [Level.VISIBLE, Level.KNOWN])
def test_python_lets_lower_levels_write_scratch_alone(level: Level) -> None:
    original = made()
    record, before = original.at_level(level), contents(original)
    for name in ("first", "last"):
        with pytest.raises(AttributeError, match=rf"Outer\.{name}: a policy cannot write it"):
            setattr(record, name, 1)
    with pytest.raises(AttributeError, match=r"Inner\.count: a policy cannot write it"):
        record.inner.count = 1
    tables = [record.table.small, record.table.wide, record.inner.table.small]
    for column in (*tables, record.weights, record.counts, record.places, record.inner.weights):
        with pytest.raises(ValueError, match="read-only"):
            column[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        record.cube[0, 0, 0] = 1
    with pytest.raises(AttributeError):
        record.secret = 1.0
    with pytest.raises(AttributeError):  # whole tables and records are never replaced
        record.table = record.inner.table  # type: ignore[misc]
    assert contents(original) == before
    record.mark, record.table.note[1] = 77, 78
    assert (original.mark, original.table.note[1]) == (77, 78)


def expect_refusal(function: Callable[..., Any], level: Level, match: str) -> None:
    with pytest.raises(NumbaError, match=match):
        address_of(function, ((Outer, level), Decision))


@needs_compiler
def test_compiled_code_at_a_lower_level_has_no_hidden_field() -> None:
    @compiled
    def scalar(record, decision):  # type: ignore[no-untyped-def]
        decision.run[0] = int(record.secret)

    @compiled
    def column(record, decision):  # type: ignore[no-untyped-def]
        decision.run[0] = int(record.table.secret[0])

    @compiled
    def inside(record, decision):  # type: ignore[no-untyped-def]
        decision.run[0] = int(record.inner.table.secret[0])

    @compiled
    def whole(record, decision):  # type: ignore[no-untyped-def]
        decision.run[0] = record.vault.count

    for level in (Level.VISIBLE, Level.KNOWN):
        expect_refusal(scalar, level, r"Outer\.secret: not shown to a policy")
        expect_refusal(column, level, r"Table\.secret: not shown to a policy")
        expect_refusal(inside, level, r"Table\.secret: not shown to a policy")
        expect_refusal(whole, level, r"Outer\.vault: not shown to a policy")
    for function in (scalar, column, inside, whole):
        assert address_of(function, (Outer, Decision)) != 0


@needs_compiler
def test_compiled_code_reads_known_fields_from_their_level_on_and_is_told_so() -> None:
    @compiled
    def scalar(record, decision):  # type: ignore[no-untyped-def]
        decision.run[0] = record.known

    @compiled
    def column(record, decision):  # type: ignore[no-untyped-def]
        decision.run[0] = record.table.known[0]

    for function in (scalar, column):
        expect_refusal(function, Level.VISIBLE, "known: not shown to a policy unless it declares known_lengths")
        assert address_of(function, ((Outer, Level.KNOWN), Decision)) != 0


@needs_compiler
def test_a_helper_function_is_held_to_the_level_too() -> None:
    @compiled
    def helper(own):  # type: ignore[no-untyped-def]
        return own.secret[0]

    @compiled
    def outer(record, decision):  # type: ignore[no-untyped-def]
        decision.run[0] = int(helper(record.table))

    assert address_of(outer, (Outer, Decision)) != 0
    expect_refusal(outer, Level.VISIBLE, r"Table\.secret: not shown to a policy")


@needs_compiler
def test_compiled_code_at_a_lower_level_writes_scratch_alone() -> None:
    @compiled
    def scalar(record, decision):  # type: ignore[no-untyped-def]
        record.last = 1

    @compiled
    def inside(record, decision):  # type: ignore[no-untyped-def]
        record.inner.count = 1

    @compiled
    def column(record, decision):  # type: ignore[no-untyped-def]
        record.table.small[0] = 1

    @compiled
    def wide_column(record, decision):  # type: ignore[no-untyped-def]
        record.table.wide[0] += 1.0

    @compiled
    def vector(record, decision):  # type: ignore[no-untyped-def]
        record.weights[0] = 1.0

    @compiled
    def inner_vector(record, decision):  # type: ignore[no-untyped-def]
        record.inner.weights[0] = 1.0

    @compiled
    def counts(record, decision):  # type: ignore[no-untyped-def]
        record.counts[0] += 1

    @compiled
    def cube(record, decision):  # type: ignore[no-untyped-def]
        record.cube[0, 0, 0] = 1.0

    @compiled
    def alias(record, decision):  # type: ignore[no-untyped-def]
        view = record.weights[1:]
        view[0] = 1.0

    for function in (scalar, inside, column, wide_column, vector, inner_vector, counts, cube, alias):
        for level in (Level.VISIBLE, Level.KNOWN):
            with pytest.raises(NumbaError):
                address_of(function, ((Outer, level), Decision))
        assert address_of(function, (Outer, Decision)) != 0

    @compiled
    def scratch(record, decision):  # type: ignore[no-untyped-def]
        record.mark = 5
        record.table.note[2] = 6
        record.inner.table.note[0] = 7

    assert address_of(scratch, ((Outer, Level.VISIBLE), Decision)) != 0


@needs_compiler
def test_a_field_that_there_is_not_fails_when_it_is_compiled() -> None:
    @compiled
    def wrong(record, decision):  # type: ignore[no-untyped-def]
        decision.run[0] = record.frist

    with pytest.raises(NumbaError, match="frist"):
        address_of(wrong, (Outer, Decision))
    with pytest.raises(AttributeError):
        made().frist  # type: ignore[attr-defined]  # noqa: B018


@needs_compiler
def test_classes_of_one_name_keep_their_own_layouts() -> None:
    """As where a cell of a notebook that declares a record is run again, changed."""

    def declare(more: bool) -> type[Record]:
        if more:

            class Mine(Record):
                before: float
                value: float

            return Mine

        class Mine(Record):  # type: ignore[no-redef]
            value: float

        return Mine

    long, short = declare(True), declare(False)
    assert RecordType(long) != RecordType(short)

    @compiled
    def value_of(record):  # type: ignore[no-untyped-def]
        return record.value

    one, other = long(), short()
    one.before, one.value, other.value = 1.0, 2.0, 5.0  # type: ignore[attr-defined]
    assert (value_of(one), value_of(other)) == (2.0, 5.0)


# --- copies -------------------------------------------------------------------------------------------
COPIES = [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]


def addresses_are_its_own(record: Record) -> None:
    """Every address in the memory of a record is that of the array it shows."""
    assert record._address == record._memory.ctypes.data
    for name, field in type(record).FIELDS.items():
        if field.kind == "record":
            inner = getattr(record, name)
            assert inner._address == record._address + field.offset
            addresses_are_its_own(inner)
        elif field.kind == "rows":
            own = getattr(record, name)
            assert own._address == own.rows.ctypes.data == record._memory[name]["address"]
            assert record._memory[name]["count"] == len(own)
        elif field.kind == "array":
            array = getattr(record, name)
            assert array.ctypes.data == record._memory[name]["address"]
            assert record._memory[name]["shape"][: array.ndim].tolist() == list(array.shape)


def test_addresses_of_a_new_record() -> None:
    addresses_are_its_own(made())


@pytest.mark.parametrize("copied", COPIES)
def test_copies_of_a_record_have_memory_of_their_own(copied: Callable[[Any], Any]) -> None:
    record = made()
    before = contents(record)
    other = copied(record)
    assert contents(other) == before
    addresses_are_its_own(other)
    write_all(other.handle, 1, 123, 4.5)
    assert contents(record) == before != contents(other)
    after = contents(other)
    del record  # nothing of the copy lies in the original
    gc.collect()
    made(1), made(2)
    assert contents(other) == after


@pytest.mark.parametrize("copied", COPIES)
def test_copies_of_a_table_have_memory_of_their_own(copied: Callable[[Any], Any]) -> None:
    @compiled
    def set_small(handle):  # type: ignore[no-untyped-def]
        table_at(handle).small[0] = 41

    own = made().table
    before = contents(own)
    other = copied(own)
    assert contents(other) == before
    set_small(other.handle)
    assert other.small[0] == 41 and contents(own) == before
    decision = copied(Decision.of([1, 0], [3, 4], [0, 1]))
    assert (decision.run.tolist(), decision.admit.tolist(), decision.evict.tolist()) == ([1, 0], [3, 4], [0, 1])
    assert len(decision) == 2 and decision._address == decision.rows.ctypes.data


@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_keeps_its_level(copied: Callable[[Any], Any]) -> None:
    other = copied(made().at_level(Level.VISIBLE))
    with pytest.raises(AttributeError, match="not shown"):
        other.secret  # noqa: B018
    with pytest.raises(AttributeError, match="cannot write"):
        other.last = 1


# --- refusals -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("parts", "match"),
    [
        ({"table": np.zeros(3, dtype=Decision.DTYPE)}, r"Outer\.table: must be a contiguous \(n,\) array of Table\.DTYPE"),
        ({"table": np.zeros((3, 1), dtype=Table.DTYPE)}, r"Outer\.table: must be"),
        ({"table": np.zeros(6, dtype=Table.DTYPE)[::2]}, r"Outer\.table: must be"),
        ({"weights": np.zeros(3, dtype=np.float32)}, r"Outer\.weights: must be a C-contiguous 1-D array of float64"),
        ({"weights": np.zeros((3, 1))}, r"Outer\.weights: must be"),
        ({"weights": np.zeros(6)[::2]}, r"Outer\.weights: must be"),
        ({"counts": np.zeros(3, dtype=np.int32)}, r"Outer\.counts: must be a C-contiguous 1-D array of int64"),
        ({"places": np.zeros(3, dtype=np.int32)}, r"Outer\.places: must be a C-contiguous 1-D array of int64"),
        ({"cube": np.zeros((2, 2))}, r"Outer\.cube: must be a C-contiguous 3-D array of float64"),
        ({"cube": np.zeros((2, 3, 4)).transpose()}, r"Outer\.cube: must be"),
        ({"cube32": np.zeros((2, 3, 4))}, r"Outer\.cube32: must be a C-contiguous 3-D array of float32"),
        ({"inner": {"weights": np.zeros(3, dtype=np.int64)}}, r"Inner\.weights: must be"),
    ],
)
def test_memory_of_another_kind_is_refused(parts: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Outer(**parts)


@pytest.mark.parametrize("name", ["handle", "at_level", "forget"])
def test_names_of_methods_are_refused_as_fields(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name}: a record has a method of this name"):
        type("Wrong", (Record,), {"__annotations__": {name: int}, "__module__": __name__})


@pytest.mark.parametrize("name", ["handle", "rows"])
def test_a_table_refuses_them_too(name: str) -> None:
    with pytest.raises(TypeError, match=name):
        type("Wrong", (Rows,), {"__annotations__": {name: Ints}, "__module__": __name__})


@pytest.mark.parametrize(("base", "kind"), [(Rows, float), (Rows, int), (Record, str), (Record, list), (Record, Ints)])
def test_a_field_of_no_such_kind_is_refused_by_name(base: type, kind: Any) -> None:
    with pytest.raises(TypeError, match=r"Wrong\.field"):
        type("Wrong", (base,), {"__annotations__": {"field": kind}, "__module__": __name__})


def test_a_hidden_field_of_the_engine_stays_hidden() -> None:
    """The levels of the engine's own record; a new field must be put on one side of the boundary here."""
    hidden = {name for name, field in Engine.FIELDS.items() if field.level == Level.HIDDEN}
    flight = {"flight_seconds", "flight_tokens", "flight_out_of_range", "num_first_tokens", "num_last_tokens"}
    parts = {"pending_seconds", "due", "slowdown", "more", "inbox", "inbox_end", "received", "handed"}
    assert hidden == {"num_requests", "next_arrival", "hidden", "phases", "wheel", "pool", "cadence", "order", "foretold"} | flight | parts
    tables = {name: field.declared.FIELDS for name, field in Engine.FIELDS.items() if field.kind == "rows" and name not in hidden}
    assert {f"{t}.{n}" for t, fields in tables.items() for n, f in fields.items() if f.level > Level.VISIBLE} == {
        "requests.output",
        "events.due",
        "events.first_tokens",
        "events.last_tokens",
    }
    assert {f"{t}.{n}" for t, fields in tables.items() for n, f in fields.items() if f.scratch} == {"queues.left"}
    assert not any(field.scratch for field in Engine.FIELDS.values())


def test_all_of_this_holds_in_plain_python_too() -> None:
    if numba.config.DISABLE_JIT:
        return
    environment = dict(os.environ, NUMBA_DISABLE_JIT="1")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not plain_python", __file__]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
