"""The report of a live server: whole at any time, also on an idle server and after the disk was full. Needs no vLLM."""

from __future__ import annotations

import gc
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmsched_hardware import live_background
from llmsched_hardware.live_background import Background
from llmsched_hardware.live_report import ReportWriter

SOON = 20.0


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


class Counting:
    """Something that is called over and over; raises what it is told to."""

    def __init__(self) -> None:
        self.calls = 0
        self.error: BaseException | None = None

    def call(self) -> None:
        self.calls += 1
        if self.error is not None:
            raise self.error

    def summary(self) -> dict[str, object]:
        return {"calls": self.calls}

    def progress(self) -> int:
        return self.calls


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    records: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    monkeypatch.setattr(live_background.logger, "propagate", False)
    live_background.logger.addHandler(handler)
    yield records
    live_background.logger.removeHandler(handler)


def test_a_method_is_called_until_closed_and_once_more(warnings: list[str]) -> None:
    counting = Counting()
    background = Background("counting", counting.call, 0.01)
    wait_until(lambda: counting.calls > 3)
    assert background.close(SOON)
    calls = counting.calls
    assert background.close(SOON)
    time.sleep(0.05)
    assert counting.calls == calls and warnings == []


def test_every_kind_of_failure_is_logged_once_and_the_method_called_again(warnings: list[str]) -> None:
    counting = Counting()
    counting.error = OSError(28, "No space left on device")
    background = Background("counting", counting.call, 0.01)
    wait_until(lambda: background.failures > 3)
    counting.error = ValueError("another")
    wait_until(lambda: len(warnings) == 2)
    counting.error = OSError(28, "No space left on device")
    before = background.failures
    wait_until(lambda: background.failures > before + 2)
    counting.error = None
    assert background.close(SOON)
    assert ["No space left" in warnings[0], "another" in warnings[1], len(warnings)] == [True, True, 2]


def test_a_thread_ends_with_the_object_it_works_for() -> None:
    counting = Counting()
    background = Background("counting", counting.call, 0.01)
    thread = background._thread
    assert thread is not None
    while counting.calls == 0:
        time.sleep(0.005)
    del counting
    gc.collect()
    thread.join(SOON)
    assert not thread.is_alive()


def test_no_more_threads_is_no_error(monkeypatch: pytest.MonkeyPatch, warnings: list[str]) -> None:
    def refuse(self: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(live_background.threading.Thread, "start", refuse)
    background = Background("counting", Counting().call, 0.01)
    assert background.close() and "can't start new thread" in warnings[0]


def test_a_report_is_written_when_due_when_idle_and_at_the_end(tmp_path: Path) -> None:
    counting, path = Counting(), tmp_path / "report.json"
    report = ReportWriter(path, 3600.0, counting.summary, counting.progress)
    wait_until(path.exists)  # there from the start
    counting.calls = 5
    wait_until(lambda: json.loads(path.read_text()) == {"calls": 5})  # nothing is new since: idle
    counting.calls = 6
    assert report.close(SOON)
    assert json.loads(path.read_text()) == {"calls": 6} and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_gone_and_comes_back(tmp_path: Path, warnings: list[str]) -> None:
    folder = tmp_path / "reports"
    folder.mkdir()
    counting, path = Counting(), folder / "report.json"
    report = ReportWriter(path, 0.02, counting.summary, counting.progress)
    wait_until(path.exists)
    shutil.rmtree(folder)
    wait_until(lambda: bool(warnings))
    folder.mkdir()
    counting.calls = 9
    wait_until(lambda: path.exists() and json.loads(path.read_text()) == {"calls": 9})
    assert report.close(SOON)
    assert len(warnings) == 1 and "report.json failed and is tried again" in warnings[0]


def test_half_a_report_is_never_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counting, path = Counting(), tmp_path / "report.json"
    report = ReportWriter(path, 3600.0, counting.summary, counting.progress)
    assert report.close(SOON)
    before = path.read_text()

    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        report.write()
    assert path.read_text() == before and list(tmp_path.iterdir()) == [path]
