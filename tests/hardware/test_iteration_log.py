"""The file of a real engine's iterations: what is written is read, damage is named, a disk that takes nothing costs rows alone."""

from __future__ import annotations

import dataclasses
import gzip
import json
import logging
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llmsched_env.errors import ConfigError
from llmsched_env.perf import Batch
from llmsched_hardware.calibration import iteration_log as module
from llmsched_hardware.calibration.batches import BatchFollower, Chunk, batch_of
from llmsched_hardware.calibration.iteration_log import (
    COLUMNS,
    IterationLogWriter,
    IterationRow,
    read_iteration_log,
    read_iteration_logs,
)
from llmsched_hardware.calibration.iteration_watch import IterationWatch

ENGINE = {"device": "none", "vllm": "0.32.0", "model": "tiny", "threads": 1, "num_blocks": 512, "max_num_seqs": 8}


def row(i: int, segment: int = 0, **changes: Any) -> IterationRow:
    """An iteration of 10 ms, the i-th without a gap."""
    batch = batch_of([100 + i, 7], [Chunk(3, 65 * i, True)], started=1)
    made = IterationRow(batch, 0.01 * i, 0.01 * (i + 1), 0.00912345678, 12, 3, 2, 0, segment)
    return dataclasses.replace(made, **changes)


@pytest.fixture
def records() -> Iterator[list[logging.LogRecord]]:
    """What the writers log."""
    found: list[logging.LogRecord] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = found.append  # type: ignore[method-assign]
    before = module.logger.level
    module.logger.addHandler(handler)
    module.logger.setLevel(logging.INFO)
    yield found
    module.logger.removeHandler(handler)
    module.logger.setLevel(before)


def written(path: Path, count: int = 5, segments: int = 1, engine: dict[str, Any] | None = None, **options: Any) -> IterationLogWriter:
    """A log, closed."""
    writer = IterationLogWriter(path, engine or ENGINE, **options)
    for segment in range(segments):
        writer.begin_segment(policy="vllm", repeat=segment)
        for i in range(count):
            writer.append(row(i))
    assert writer.close(30.0)
    return writer


# --- sums -------------------------------------------------------------------------------------------------
def test_sums_of_a_batch() -> None:
    batch = batch_of([9, 0, 20], [Chunk(5, 0, False), Chunk(2, 65, True)], started=2, finished=1)
    assert (batch.decodes, batch.decode_kv) == (3, 32)
    assert (batch.prefills, batch.prefill_tokens, batch.prefill_squares) == (2, 7, 29)
    assert (batch.prefill_context, batch.prefill_context64, batch.prefill_work) == (65, 128, 12.5 + 132)
    assert (batch.sampled, batch.load, batch.batch_size) == (4, 32 + 5 + 67, 5)
    assert (batch.decode_longest, batch.decode_shortest, batch.decode_squares) == (21, 1, 100 + 1 + 441)
    assert (batch.started, batch.finished) == (2, 1)
    assert batch_of([]) == Batch()


def test_a_request_decodes_after_an_iteration_that_caught_up_with_it() -> None:
    """Also where the last chunk after a preemption has one token, which looks like a decode."""
    follower, requests = BatchFollower(), {"a": SimpleNamespace(is_prefill_chunk=True)}

    def output(tokens: int, new: int | None = None, cached: int | None = None, resumed: bool = False, ended: str = "") -> Any:
        return SimpleNamespace(
            num_scheduled_tokens={"a": tokens} if tokens else {},
            scheduled_new_reqs=[] if new is None else [SimpleNamespace(req_id="a", num_computed_tokens=new)],
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=[] if cached is None else ["a"],
                num_computed_tokens=[] if cached is None else [cached],
                resumed_req_ids={"a"} if resumed else set(),
            ),
            finished_req_ids=set(ended),
        )

    assert follower.follow(output(8, new=16), requests) == batch_of([], [Chunk(8, 16, False)], started=1)  # 16 from the prefix cache
    requests["a"].is_prefill_chunk = False
    assert follower.follow(output(6, cached=24), requests) == batch_of([], [Chunk(6, 24, True)])
    assert follower.follow(output(1, cached=30), requests) == batch_of([30])
    assert follower.follow(output(0), requests) is None
    requests["a"].is_prefill_chunk = True
    assert follower.follow(output(30, cached=0, resumed=True), requests) == batch_of([], [Chunk(30, 0, False)], started=1)
    requests["a"].is_prefill_chunk = False
    assert follower.follow(output(1, cached=30), requests) == batch_of([], [Chunk(1, 30, True)])
    assert follower.follow(output(1, cached=31), requests) == batch_of([31])
    assert follower.follow(output(0, ended="ab"), requests) is None  # b has never been in a batch
    assert follower.follow(output(4, new=0), requests) == batch_of([], [Chunk(4, 0, True)], started=1, finished=1)


# --- what is written is read ------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["log.csv", "log.csv.gz"])
def test_what_is_written_is_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    written(path, 250, segments=2)
    found = read_iteration_log(path)
    assert found.engine == ENGINE and len(found) == 500
    assert {k: dict(v) for k, v in found.segments.items()} == {k: {"policy": "vllm", "repeat": k, "file": str(path)} for k in (0, 1)}
    expected = [row(i, segment, execute_seconds=0.0091235) for segment in (0, 1) for i in range(250)]
    for a, b in zip(found.rows(), expected, strict=True):
        assert a.batch == b.batch and a.end == pytest.approx(b.end, abs=1e-7) and a.execute_seconds == b.execute_seconds
        assert (a.blocks, a.waiting, a.running, a.preempted, a.segment) == (12, 3, 2, 0, b.segment)
    assert found.batches()[3] == pytest.approx(row(3).batch.array(), abs=0) and found.batches().shape == (500, row(0).batch.array().size)
    assert found.seconds() == pytest.approx(np.full(500, 0.01), abs=1e-6)


def test_an_iteration_begins_at_the_end_of_the_one_before_it_where_both_run_at_once(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    writer = IterationLogWriter(path, ENGINE)
    for begin, end in ((0.0, 1.0), (0.5, 1.5), (2.0, 2.25)):
        writer.append(row(0, begin=begin, end=end, execute_seconds=-1.0))
    writer.begin_segment()
    writer.append(row(0, begin=0.25, end=1.0))
    writer.close()
    assert read_iteration_log(path).seconds().tolist() == [1.0, 0.5, 0.25, 0.75]


def test_a_file_is_gone_on_with_in_a_new_segment(tmp_path: Path) -> None:
    for name in ("log.csv", "log.csv.gz"):
        path = tmp_path / name
        written(path)
        path.write_bytes(path.read_bytes()[:-7])  # a kill
        writer = IterationLogWriter(path, ENGINE)
        IterationWatch(writer, ENGINE | {"max_num_seqs": 4}, rate=2.0)
        for i in range(5):
            writer.append(row(i))
        assert writer.close(30.0)
        found = read_iteration_log(path)
        left = 5 if name.endswith("gz") else 4  # what is cut off a packed piece here is its checksum
        assert found.column("segment").tolist() == [0.0] * left + [1.0] * 5
        assert found.segments[1] == {"rate": 2.0, "engine": {"max_num_seqs": 4}, "file": str(path)}


def test_a_file_of_another_engine_is_not_gone_on_with(tmp_path: Path) -> None:
    written(tmp_path / "log.csv")
    with pytest.raises(ConfigError, match=r"log\.csv holds iterations of another engine \(threads 1, now 2\)"):
        IterationLogWriter(tmp_path / "log.csv", ENGINE | {"threads": 2})


def test_files_of_one_engine_are_read_together(tmp_path: Path) -> None:
    paths = [tmp_path / "a.csv", tmp_path / "b.csv.gz"]
    written(paths[0], 3, segments=2)
    written(paths[1], 2, engine=ENGINE | {"num_blocks": 500})
    found = read_iteration_logs(paths)
    assert found.column("segment").tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert [found.segments[k]["file"] for k in range(3)] == [str(paths[0])] * 2 + [str(paths[1])]
    written(tmp_path / "c.csv", engine=ENGINE | {"model": "other"})
    with pytest.raises(ConfigError, match=r"c\.csv: engine\.model is 'other', but 'tiny' in .*a\.csv"):
        read_iteration_logs([*paths, tmp_path / "c.csv"])
    with pytest.raises(ConfigError, match="none given"):
        read_iteration_logs([])


# --- damage -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["log.csv", "log.csv.gz"])
def test_a_last_line_that_a_kill_cut_off_is_left_out(tmp_path: Path, name: str) -> None:
    whole = tmp_path / name
    written(whole, 20)
    data = whole.read_bytes()
    table = read_iteration_log(whole).table
    cut = tmp_path / f"cut{name}"
    heading = 0 if name.endswith("gz") else data.index(b"\n") + 1
    for size in random.Random(0).sample(range(heading, len(data)), 25):
        cut.write_bytes(data[:size])
        try:
            rows = read_iteration_log(cut).table
        except ConfigError as error:
            assert name.endswith("gz") and "empty" in str(error)  # not even the heading is there
        else:
            assert len(rows) < 20 + name.endswith("gz") and (rows == table[: len(rows)]).all()


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("1,2,3", f"3 numbers, must be {len(COLUMNS)}"),
        (",".join(["x"] * len(COLUMNS)), "not a row of numbers"),
        (",".join(["nan"] * len(COLUMNS)), "a number that is not finite"),
        (",".join(["-2"] * len(COLUMNS)), "a number below 0"),
        (",".join(["0.5"] * len(COLUMNS)), "must be whole numbers"),
        (",".join(["1e300"] * len(COLUMNS)), "must be whole numbers"),
        ("", "numbers, must be"),
        ("{", "not JSON"),
        ("{}", "segment: None, must be an integer"),
        ("\xff", "not text"),
        (None, "it ends before the iteration before it"),
        ("begin", "it ends before it begins"),
    ],
)
def test_any_other_broken_line_is_named(tmp_path: Path, line: str | None, why: str) -> None:
    path = tmp_path / "log.csv"
    written(path, 6)
    lines = path.read_bytes().split(b"\n")
    place = COLUMNS.index("begin")
    if line is None:
        lines[4], lines[5] = lines[5], lines[4]
    elif line == "begin":
        cells = lines[5].split(b",")
        cells[place] = b"9"
        lines[5] = b",".join(cells)
    else:
        lines[5] = line.encode("latin-1")
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(ConfigError, match=rf"log\.csv, line 6: .*{why}" if why != "segment" else why):
        read_iteration_log(path)


@pytest.mark.parametrize("name", ["log.csv", "log.csv.gz"])
def test_whatever_bytes_are_changed_the_file_is_read_or_refused_by_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    written(path, 4, segments=2)
    data, choice = path.read_bytes(), random.Random(1)
    read = 0
    for _ in range(600):
        changed = bytearray(data)
        for _ in range(choice.randint(1, 3)):
            at = choice.randrange(len(changed))
            changed[at : at + choice.randint(0, 2)] = bytes(choice.choice(b'0123456789,.-+e{}[]":\nx') for _ in range(choice.randint(0, 2)))
        path.write_bytes(changed)
        try:
            found = read_iteration_log(path)
        except ConfigError as error:
            assert str(path) in str(error)
        else:
            read += 1
            assert np.isfinite(found.table).all() and (found.seconds() >= 0).all() and len(list(found.rows())) == len(found)
    assert read > 20 * (name == "log.csv")


def test_what_is_no_log_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    for text, why in (
        ("", "empty"),
        ("a,b\n1,2\n", "line 1: not JSON"),
        ('{"format": 2}\n', "line 1: not the heading"),
        ('{"format": 1, "engine": {}, "columns": ["a"]}\n', "line 1: columns: those of another version"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=why):
            read_iteration_log(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_iteration_log(tmp_path / "missing.csv")
    (tmp_path / "log.gz").write_bytes(b"no gzip")
    with pytest.raises(ConfigError, match="not a gzip file"):
        read_iteration_log(tmp_path / "log.gz")
    (tmp_path / "log.gz").write_bytes(gzip.compress(json.dumps({"format": 1, "engine": {}, "columns": list(COLUMNS)}).encode() + b"\n"))
    assert len(read_iteration_log(tmp_path / "log.gz")) == 0


# --- the writer's limits ----------------------------------------------------------------------------------
def test_a_log_ends_at_its_most_rows_and_says_so_once(tmp_path: Path, records: list[logging.LogRecord]) -> None:
    path = tmp_path / "log.csv"
    writer = written(path, 6, segments=2, max_rows=4)
    writer._write()
    assert writer.full and len(read_iteration_log(path)) == 4
    assert [r.getMessage() for r in records] == [f"iteration log {path} has its 4 rows and ends"]
    again = IterationLogWriter(path, ENGINE, max_rows=4)
    assert again.full and again.close()


def test_a_disk_that_takes_nothing_is_waited_for_and_warned_of_once(
    tmp_path: Path, records: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_WAITING", 10)
    monkeypatch.setattr(module, "_FLUSH_SECONDS", 0.001)
    folder = tmp_path / "disk"
    folder.mkdir()
    writer = IterationLogWriter(folder / "log.csv", ENGINE)
    writer.begin_segment(policy="vllm")
    writer.append(row(0))
    folder_away = tmp_path / "away"
    while writer._rows or writer._unwritten:
        pass
    folder.rename(folder_away)
    for i in range(1, 20):
        writer.append(row(i))
    failures = writer._background.failures
    while writer._background.failures < failures + 3:
        pass
    assert [r.levelname for r in records] == ["WARNING"] and "No such file" in records[0].getMessage()
    folder_away.rename(folder)
    while writer._rows or writer._unwritten:
        pass
    writer.append(row(30))
    assert writer.close(30.0) and len(records) == 1
    found = read_iteration_log(folder / "log.csv")
    kept = int((found.column("segment") == 0).sum())
    assert found.segments[1]["lost"] == 20 - kept > 0 and found.segments[1]["policy"] == "vllm"
    assert found.column("end")[:kept] == pytest.approx([0.01 * (i + 1) for i in range(kept)]) and len(found) == kept + 1


def test_half_a_line_is_taken_back_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.csv"
    writer = written(path, 3)
    before = path.read_bytes()
    real = Path.open

    class Full:
        """A file whose disk has room for ten bytes more."""

        def __init__(self, file: Any) -> None:
            self._file, self.fileno, self.truncate = file, file.fileno, file.truncate

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            self._file.close()

        def write(self, data: bytes) -> int:
            if self._file.tell() > len(before):
                raise OSError(28, "No space left on device")
            return int(self._file.write(data[:10]))

    writer.append(row(3))
    for _ in range(2):
        monkeypatch.setattr(Path, "open", lambda path, *a, **k: Full(real(path, *a, **k)))
        with pytest.raises(OSError, match="No space left"):
            writer._write()
        monkeypatch.undo()
        assert path.read_bytes() == before
    writer._write()
    assert len(read_iteration_log(path)) == 4


def test_places_that_cannot_be_written_to_are_refused(tmp_path: Path) -> None:
    for path, why in (
        (tmp_path, "is a folder, must be a file"),
        (tmp_path / "no" / "log.csv", "its folder does not exist"),
        (Path("/dev/full/log.csv"), "its folder does not exist"),
    ):
        with pytest.raises(ConfigError, match=f"iteration_log: .*{why}"):
            IterationLogWriter(path, ENGINE)
    with pytest.raises(ConfigError, match="iteration_log_max_rows: 0"):
        IterationLogWriter(tmp_path / "log.csv", ENGINE, max_rows=0)


def test_a_watch_that_fails_ends_the_log_and_nothing_else(tmp_path: Path, records: list[logging.LogRecord]) -> None:
    watch = IterationWatch(IterationLogWriter(tmp_path / "log.csv", ENGINE), ENGINE, policy="vllm")
    for _ in range(3):
        watch.enter()
        watch.scheduled(SimpleNamespace(requests={}), SimpleNamespace(), 0)
        watch.updated(SimpleNamespace(num_scheduled_tokens={"a": 1}), 0.1)
    watch.close()
    assert [r.levelname for r in records] == ["WARNING"] and "ends here: AttributeError" in records[0].getMessage()
    assert len(read_iteration_log(tmp_path / "log.csv")) == 0
