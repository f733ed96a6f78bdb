"""Sinks keep what they are given, whatever becomes of the caller's array, and a broken run is not taken for a whole one."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from call_rows import drawn

from llmsched_env.cluster.finished import FINISHED_DTYPE
from llmsched_env.cluster.metrics import Rows, summarize_calls
from llmsched_env.cluster.parquet import RUN_FILE, ParquetSink, read_calls
from llmsched_env.cluster.sinks import KeepAll, Several, Sink
from llmsched_env.errors import ConfigError, MissingExtraError, install_command


def batches(rows: Rows, size: int) -> Iterator[Rows]:
    """As a cluster hands rows over: one array, filled again and again."""
    buffer = np.zeros(size, dtype=FINISHED_DTYPE)
    for begin in range(0, len(rows), size):
        part = rows[begin : begin + size]
        buffer[: len(part)] = part
        yield buffer[: len(part)]
        buffer[:] = np.zeros(1, dtype=FINISHED_DTYPE)


def same(found: Rows, expected: Rows) -> bool:
    """Equal to the byte, in order of the calls' numbers."""
    return found.dtype == expected.dtype and found.tobytes() == expected[np.argsort(expected["number"])].tobytes()


def test_all_rows_are_kept_in_order() -> None:
    rows = drawn(1000, 4)
    with KeepAll() as sink:
        assert len(sink.rows()) == 0 == len(sink)
        for part in batches(rows, 64):
            sink.write(part)
    assert len(sink) == 1000 and same(sink.rows(), rows)


class Failing(Sink):
    def __init__(self) -> None:
        self.left: list[object] = []

    def write(self, rows: Rows) -> None:
        pass

    def close(self) -> None:
        raise OSError("disk full")

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.left.append(kind)
        if kind is None:
            self.close()


def test_several_sinks_each_get_everything_and_all_are_closed() -> None:
    rows, first, last = drawn(200, 5), KeepAll(), KeepAll()
    with Several(first, last) as sink:
        for part in batches(rows, 60):
            sink.write(part)
    assert same(first.rows(), rows) and same(last.rows(), rows)
    failing, other = Failing(), Failing()
    with pytest.raises(OSError, match="disk full"):
        Several(failing, other).close()
    assert failing.left == other.left == [None]
    with pytest.raises(KeyboardInterrupt), Several(failing, other):
        raise KeyboardInterrupt
    assert failing.left[1:] == other.left[1:] == [KeyboardInterrupt]


@pytest.mark.parametrize("rows", [np.zeros(3), [1]])
def test_other_arrays_are_refused(rows: Rows, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed (extra: cluster)")
    for sink in (KeepAll(), ParquetSink(tmp_path / "run", seed=0)):
        with pytest.raises(ConfigError, match=r"rows: .*FINISHED_DTYPE"):
            sink.write(rows)


@pytest.fixture
def parquet() -> object:
    return pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed (extra: cluster)")


def test_parquet_holds_the_same_bytes(tmp_path: Path, parquet: object) -> None:
    rows, folder = drawn(1000, 6), tmp_path / "deep" / "run"
    with ParquetSink(folder, seed=3, settings={"router": "least-loaded"}, part_rows=256) as sink:
        for part in batches(rows, 100):
            sink.write(part)
        sink.write(rows[:0])
        assert not (folder / RUN_FILE).exists()
    sink.close()
    names = sorted(path.name for path in folder.iterdir())
    assert names == [RUN_FILE, "part-00000.parquet", "part-00001.parquet", "part-00002.parquet", "part-00003.parquet"]
    described = {"seed": 3, "settings": {"router": "least-loaded"}}
    assert json.loads((folder / RUN_FILE).read_text()) == {**described, "rows": 1000, "parts": 4}
    assert same(read_calls(folder), rows)
    part = parquet.ParquetFile(folder / "part-00000.parquet")  # type: ignore[attr-defined]
    assert (part.num_row_groups, part.metadata.row_group(0).num_rows) == (3, 100)
    assert part.metadata.row_group(0).column(0).compression == "ZSTD"
    assert json.loads(part.schema_arrow.metadata[b"llmsched"]) == described
    types = {field.name: str(field.type).replace("float", "float64") for field in part.schema_arrow}
    assert {name: kind.replace("double", "float64") for name, kind in types.items()} == {
        name: str(FINISHED_DTYPE[name]) for name in FINISHED_DTYPE.names or ()
    }
    assert parquet.read_table(folder).num_rows == 1000, "the folder is read as it is"  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="closed"):
        sink.write(rows)


def test_an_interrupted_run_keeps_its_batches_and_is_not_whole(tmp_path: Path, parquet: object) -> None:
    rows, folder = drawn(500, 8), tmp_path / "run"
    with pytest.raises(KeyboardInterrupt), ParquetSink(folder, seed=0, part_rows=250) as sink:
        for number, part in enumerate(batches(rows, 100)):
            if number == 4:
                raise KeyboardInterrupt
            sink.write(part)
    assert sorted(path.name for path in folder.iterdir()) == ["part-00000.parquet", "part-00001.parquet"]
    with pytest.raises(ConfigError, match="broke off"):
        read_calls(folder)
    assert same(read_calls(folder, broken=True), rows[:400])
    with pytest.raises(ConfigError, match="holds a run that broke off; remove it or name another place"):
        ParquetSink(folder, seed=0)


def test_a_killed_run_loses_the_part_it_was_writing(tmp_path: Path, parquet: object) -> None:
    rows, folder = drawn(500, 9), tmp_path / "run"
    sink = ParquetSink(folder, seed=0, part_rows=200)
    for part in batches(rows, 100):
        sink.write(part)
    assert (folder / ".part-00002.parquet").exists() and not (folder / "part-00002.parquet").exists()
    assert same(read_calls(folder, broken=True), rows[:400])


def test_a_part_that_could_not_be_written_never_gets_its_name(tmp_path: Path, parquet: object, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, folder = drawn(300, 9), tmp_path / "run"

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"), ParquetSink(folder, seed=0, part_rows=100) as sink:
        sink.write(rows[:100])
        sink.write(rows[100:150])
        monkeypatch.setattr(parquet.ParquetWriter, "write_table", full)  # type: ignore[attr-defined]
        sink.write(rows[150:])
    assert [path.name for path in sorted(folder.glob("[!.]*"))] == ["part-00000.parquet"]
    sink.close()
    assert not (folder / RUN_FILE).exists() and same(read_calls(folder, broken=True), rows[:100])


def test_a_run_without_calls(tmp_path: Path, parquet: object) -> None:
    with ParquetSink(tmp_path / "run", seed=0):
        pass
    assert read_calls(tmp_path / "run").shape == (0,)


def test_parquet_refuses_before_any_work(tmp_path: Path, parquet: object) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    for name in ("file", "folder"):
        with pytest.raises(ConfigError, match=rf"folder: .*{name} exists already; remove it or name another place"):
            ParquetSink(tmp_path / name, seed=0)
    with pytest.raises(ConfigError, match="cannot be a folder"):
        ParquetSink(tmp_path / "file" / "run", seed=0)
    for settings, named in (({"seed": -1}, "seed: -1"), ({"part_rows": 0}, "part_rows: 0"), ({"settings": {"a": 1}}, r"settings\.a: 1")):
        with pytest.raises(ConfigError, match=named):
            ParquetSink(tmp_path / "new", **{"seed": 0, **settings})  # type: ignore[arg-type]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_what_is_no_such_folder_is_refused(tmp_path: Path, parquet: object) -> None:
    with pytest.raises(ConfigError, match="must be a folder that ParquetSink wrote"):
        read_calls(tmp_path / "none")
    with ParquetSink(tmp_path / "run", seed=0) as sink:
        sink.write(drawn(10))
    (tmp_path / "run" / "part-00000.parquet").write_bytes(b"PAR1 but not")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_calls(tmp_path / "run")


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match="pyarrow is not installed; run: " + re.escape(install_command("cluster"))):
        ParquetSink(tmp_path / "run", seed=0)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def folder(tmp_path: Path, parquet: object) -> Path:
    """A whole run of two parts."""
    with ParquetSink(str(tmp_path / "run"), seed=0, part_rows=500) as sink:
        for part in batches(drawn(1000, 6), 100):
            sink.write(part)
    return tmp_path / "run"


def test_texts_are_paths(folder: Path) -> None:
    assert same(read_calls(str(folder)), read_calls(folder))
    for place in (None, 3, ""):
        with pytest.raises(ConfigError, match=r"folder: .*must be a path"):
            read_calls(place)  # type: ignore[arg-type]


def test_a_bit_that_has_changed_is_found(folder: Path, parquet: Any) -> None:
    path = folder / "part-00001.parquet"
    whole, group = bytearray(path.read_bytes()), parquet.ParquetFile(path).metadata.row_group(0)
    for column in map(group.column, range(group.num_columns)):
        begin = column.dictionary_page_offset if column.has_dictionary_page else column.data_page_offset
        spoilt = whole.copy()
        spoilt[begin + column.total_compressed_size - 1] ^= 1  # the last byte of its last page
        path.write_bytes(spoilt)
        with pytest.raises(ConfigError, match=r"folder: .*part-00001\.parquet cannot be read .*CRC"):
            read_calls(folder)


def test_a_run_is_held_to_what_it_states(folder: Path) -> None:
    stated = json.loads((folder / RUN_FILE).read_text())
    assert (stated["rows"], stated["parts"]) == (1000, 2)
    for text, named in (
        ("nothing", "not JSON"),
        ("[]", "must be a JSON object"),
        ("{}", "rows: None, must be an integer"),
        (json.dumps({**stated, "parts": "2"}), "parts: '2', must be an integer"),
        (json.dumps({**stated, "rows": 999}), "has 1000 rows, _run.json states 999"),
        (json.dumps({**stated, "parts": 1}), "has 2 parts, _run.json states 1"),
        (json.dumps({**stated, "parts": 3}), "lacks part-00002.parquet"),
    ):
        (folder / RUN_FILE).write_text(text)
        for broken in (False, True):
            with pytest.raises(ConfigError, match=rf"folder: .*{re.escape(named)}"):
                read_calls(folder, broken=broken)
    (folder / RUN_FILE).write_text(json.dumps(stated))
    (folder / "part-00000.parquet").unlink()
    with pytest.raises(ConfigError, match=r"lacks part-00000\.parquet"):
        read_calls(folder)
    (folder / RUN_FILE).unlink()
    with pytest.raises(ConfigError, match=r"lacks part-00000\.parquet"):
        read_calls(folder, broken=True)


def test_columns_of_other_types_are_refused(folder: Path, parquet: Any) -> None:
    path = folder / "part-00000.parquet"
    table = parquet.read_table(path)
    number = table.column_names.index("number")
    parquet.write_table(table.set_column(number, "number", table.column("number").cast("string")), path)
    with pytest.raises(ConfigError, match=r"part-00000\.parquet has number as string, must be int64 without nulls"):
        read_calls(folder)


def test_rows_that_no_run_gives_are_refused_when_they_are_read(tmp_path: Path, parquet: object) -> None:
    twice, early = drawn(20, 1), drawn(20, 1, rejected=0.0)
    twice["number"][3] = twice["number"][7]
    early["completed"][5] = early["arrival"][5] - 1.0
    for name, rows, named in (
        ("twice", twice, rf"rows\.number: {twice['number'][7]} twice, must be one row a call"),
        ("early", early, rf"rows\.completed: .* of call {early['number'][5]}, must be >= .*, its arrival"),
    ):
        kept = KeepAll()
        with ParquetSink(tmp_path / name, seed=0) as sink:
            for one in (kept, sink):
                one.write(rows[:10])
                one.write(rows[10:])
        for read in (kept.rows, lambda name=name: read_calls(tmp_path / name)):
            with pytest.raises(ConfigError, match=named):
                read()
        with pytest.raises(ConfigError, match=named):
            summarize_calls(rows, replicas=3)
