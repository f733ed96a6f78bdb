"""Columns of 64 bits: in a table beside narrow ones, in Python and compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np

from llmsched_env.compiled import compiled
from llmsched_env.records import Ints, Longs, RecordType, Rows

ROOT = Path(__file__).resolve().parents[1]


class Two(Rows):
    SATURATES = True

    narrow: Ints
    long: Longs


class Narrow(Rows):
    value: Ints


class Wide(Rows):
    value: Longs


def test_a_long_column_holds_64_bits_beside_a_narrow_one() -> None:
    @compiled
    def write(own: Two, i: int, value: int) -> None:
        own.long[i] = value
        own.long[i] += 1
        own.narrow[i] = i

    own = Two(np.zeros(3, dtype=Two.DTYPE))
    for i, value in enumerate((2**62, -(2**62), 2**31)):  # a table that saturates its narrow columns leaves them alone
        write(own, i, value)
    assert own.long.tolist() == [2**62 + 1, 1 - 2**62, 2**31 + 1]
    assert own.narrow.tolist() == [0, 1, 2]


def test_tables_that_differ_in_the_width_of_a_column_are_two_types() -> None:
    assert Wide.DTYPE.itemsize == 2 * Narrow.DTYPE.itemsize
    names = [str(RecordType(table)).partition("[")[2] for table in (Narrow, Wide)]
    assert names[0] != names[1]

    @compiled
    def last_of(own):  # type: ignore[no-untyped-def]
        return own.value[1]

    for declared in (Narrow, Wide):
        rows = np.zeros(2, dtype=declared.DTYPE)
        rows["value"] = 7, -8
        assert last_of(declared(rows)) == -8


def test_all_of_this_holds_in_plain_python_too() -> None:
    if numba.config.DISABLE_JIT:
        return
    environment = dict(os.environ, NUMBA_DISABLE_JIT="1")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not plain_python", __file__]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
