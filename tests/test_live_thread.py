"""Calls with a limit: answers and errors come back, what does not return is left behind and ended where Python can. Needs no vLLM."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from llmsched_hardware import live_thread
from llmsched_hardware.live_thread import CallThread, Overdue, left_behind

SOON = 20.0
"""seconds: far above what anything here takes."""


@pytest.fixture(autouse=True)
def nobody_is_left_behind() -> Iterator[None]:
    yield
    wait_until(lambda: left_behind() == 0)


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_answers_come_back_from_one_other_thread() -> None:
    thread = CallThread("test")
    found = [thread.call(lambda i=i: (i, threading.get_ident()), seconds=SOON) for i in range(100)]
    assert [i for i, _ in found] == list(range(100))
    assert {ident for _, ident in found} != {threading.get_ident()} and len({ident for _, ident in found}) == 1


@pytest.mark.parametrize("error", [ArithmeticError("mine"), SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
def test_whatever_is_raised_is_raised_here_and_the_thread_goes_on(error: BaseException) -> None:
    def fail() -> None:
        raise error

    thread = CallThread("test")
    with pytest.raises(type(error)) as raised:
        thread.call(fail, seconds=SOON)
    assert raised.value is error
    assert thread.call(lambda: 7) == 7 and not thread.lost


def test_an_overdue_call_is_left_behind() -> None:
    never, begun = threading.Event(), threading.Event()
    thread = CallThread("test")
    with pytest.raises(Overdue, match=r"no answer within 0\.05 s"):
        thread.call(lambda: (begun.set(), never.wait(SOON)), seconds=0.05)
    assert thread.lost and begun.wait(SOON) and left_behind() == 1
    with pytest.raises(RuntimeError, match="left behind"):
        thread.call(lambda: 1)
    never.set()


def test_a_loop_in_python_is_ended() -> None:
    steps: list[int] = []

    def spin() -> None:
        while True:
            try:
                steps.append(1)
                del steps[:]
            except ValueError:  # a handler of the policy's own does not keep it alive
                continue

    thread = CallThread("test")
    with pytest.raises(Overdue):
        thread.call(spin, seconds=0.05)
    wait_until(lambda: left_behind() == 0)


def test_an_answer_that_comes_too_late_is_nobodys() -> None:
    gate, made = threading.Event(), []

    def late() -> str:
        gate.wait(SOON)
        made.append(1)
        return "late"

    first = CallThread("test")
    with pytest.raises(Overdue):
        first.call(late, seconds=0.02)
    second = CallThread("test")
    gate.set()
    assert second.call(lambda: "own", seconds=SOON) == "own"


def test_a_call_may_be_begun_and_looked_for_later() -> None:
    gate = threading.Event()
    thread = CallThread("test")
    thread.begin(lambda: (gate.wait(SOON), "built")[1])
    assert not thread.wait(0.0)
    gate.set()
    wait_until(lambda: thread.wait(0.0))
    assert thread.result() == "built"


def test_a_thread_ends_with_its_owner_and_keeps_nothing_alive() -> None:
    class Kept:
        pass

    thread = CallThread("test")
    kept = Kept()
    there = weakref.ref(kept)
    thread.call(lambda value: None, kept)
    del kept
    wait_until(lambda: gc.collect() is not None and there() is None)
    worker = thread._thread
    del thread
    gc.collect()
    worker.join(SOON)
    assert not worker.is_alive()


def test_the_list_of_those_left_behind_forgets_the_dead() -> None:
    thread = CallThread("test")
    with pytest.raises(Overdue):
        thread.call(time.sleep, 0.2, seconds=0.01)
    assert left_behind() == 1
    wait_until(lambda: left_behind() == 0)
    assert live_thread._left == []
