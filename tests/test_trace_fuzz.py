"""Damaged and odd trace files: every one is a valid trace or a ``ConfigError``, never another error."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from llmsched_env.errors import ConfigError
from llmsched_env.workload import Trace, read_trace, scenario_from_trace

COLUMNS = {
    "vidur": ("arrived_at", "num_prefill_tokens", "num_decode_tokens", "type"),
    "replay": ("request_id", "arrived_at", "prompt_tokens", "output_tokens"),
    "azure": ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
    "burstgpt": ("Timestamp", "Model", "Request tokens", "Response tokens", "Total tokens", "Log Type"),
    "bailian": ("chat_id", "timestamp", "input_length", "output_length", "turn", "type"),
    "mooncake": ("timestamp", "input_length", "output_length", "hash_ids"),
    "vllm": ("request_id", "input_toks", "output_toks", "queued_ts"),
    "wait-lengths": ("question_length", "answer_length"),
    "vidur-lengths": ("num_prefill_tokens", "num_decode_tokens"),
}
TIMES = {"arrived_at", "TIMESTAMP", "Timestamp", "timestamp", "queued_ts"}


def valid_rows(name: str) -> list[dict[str, Any]]:
    rows = []
    for i in range(4):
        row: dict[str, Any] = {}
        for column in COLUMNS[name]:
            if column == "TIMESTAMP":
                row[column] = f"2023-11-16 18:17:0{i}.9799600"
            elif column in TIMES:
                row[column] = 3000 * i if name == "mooncake" else 1.5 * i
            else:
                row[column] = {"request_id": f"r{i}", "hash_ids": [0, i], "type": "text", "Model": "a, b", "Log Type": 'x "y"'}.get(
                    column, 7 + i
                )
        rows.append(row)
    return rows


def as_csv(columns: list[str], rows: list[list[Any]], delimiter: str = ",", newline: str = "\n") -> bytes:
    def cell(value: Any) -> str:
        text = str(value)
        return '"' + text.replace('"', '""') + '"' if any(c in text for c in (delimiter, '"', "\n", "\r")) else text

    return newline.join(delimiter.join(map(cell, row)) for row in [columns, *rows]).encode("utf-8", "surrogatepass")


def as_json_lines(columns: list[str], rows: list[list[Any]], newline: str = "\n") -> bytes:
    return newline.join(json.dumps(dict(zip(columns, row, strict=True))) for row in rows).encode()


def valid_files() -> list[bytes]:
    found = []
    for name in COLUMNS:
        rows = valid_rows(name)
        columns, cells = list(rows[0]), [list(row.values()) for row in rows]
        found += [as_csv(columns, cells), as_csv(columns, cells, ";", "\r\n") + b"\r\n", as_json_lines(columns, cells)]
        found.append(b"\xef\xbb\xbf" + as_csv(columns, cells, "\t"))
    return found


VALID = valid_files()
SPLICES = [
    *(b"NaN Infinity -Infinity nan 1e400 -1e400 1e-400 -0 -0.0 -1 0 5.0 1_000 0x10 true null 2147483648 1e18 1e308".split()),
    *(b'" "" \' , ; \t | \n \r \r\n \0 { } [ ] : \\ \\u0000 \\ud800'.split(b" ")),
    *(c.encode() for c in ("\u0663", "\uff15", "\xa0", "\u2028", "\ufeff", "\x1c", "\x85")),
    b"\xff\xfe", b"\x80", b"\xed\xa0\x80", b"9" * 30, b"9" * 5000, b"[" * 3000, b'{"a":' * 3000, b"x" * 200_000,
    b"2023-11-16 18:17:03+02:00", b"0001-01-01 00:00:00+23:59", b"9999-12-31 23:59:59.999999999-23:59", b"1700000000", b"1700000000000",
]  # fmt: skip

CELLS: st.SearchStrategy[Any] = st.one_of(
    st.integers(-3, 40),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.sampled_from(
        [
            None,
            True,
            False,
            "",
            " ",
            "nan",
            "inf",
            "-inf",
            "1e400",
            "5",
            "5.0",
            " 5 ",
            "5,5",
            "1_000",
            "-0",
            "-0.0",
            -0.0,
            5.0,
            2**31,
            2**30,
        ]
    ),
    st.sampled_from([10**30, 10**4000, "9" * 5000, [5], {"a": 5}, "\ud800", "\0", "\u0663", "x;y", "x\ty", 'x"y', "x\ny", "1e3", "0x10"]),
    st.sampled_from(
        ["2023-11-16 18:17:03", "2023-11-16T18:17:03.5+02:00", "2024-05-10 00:00:00.009930+00:00", "2023-02-30 00:00:00", "1700000000"]
    ),
    st.text(max_size=5),
)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "time_unit": st.sampled_from([None, "s", "ms", "us", "ns"]),
        "invalid_rows": st.sampled_from(["error", "drop"]),
        "reorder_seconds": st.sampled_from([0.0, 1.0, float("inf")]),
        "jitter_seconds": st.sampled_from([0.0, 2.0]),
    },
)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A valid file with a few bytes cut, doubled, overwritten or put in; packed now and then, and then damaged again."""
    data = draw(st.sampled_from(VALID))

    def once(data: bytes) -> bytes:
        at = draw(st.integers(0, len(data)))
        end = min(len(data), at + draw(st.integers(0, 12)))
        kind = draw(st.sampled_from(["cut", "double", "overwrite", "splice", "end"]))
        if kind == "cut":
            return data[:at] + data[end:]
        if kind == "double":
            return data[:end] + data[at:]
        if kind == "overwrite":
            return data[:at] + draw(st.binary(min_size=1, max_size=3)) + data[end:]
        if kind == "splice":
            return data[:at] + draw(st.sampled_from(SPLICES)) + data[end:]
        return data[:at]

    for _ in range(draw(st.integers(0, 4))):
        data = once(data)
    if draw(st.integers(0, 7)) == 0:
        data = gzip.compress(data, mtime=0)
        for _ in range(draw(st.integers(0, 2))):
            data = once(data)
    return data


@st.composite
def structured(draw: st.DrawFn) -> bytes:
    """The rows of a format with a few odd cells, columns in any order, now and then one doubled or left out."""
    rows = valid_rows(draw(st.sampled_from(list(COLUMNS))))
    columns = draw(st.permutations(list(rows[0])))
    cells = [[row[c] for c in columns] for row in rows[: draw(st.integers(0, 4))]]
    for row in cells:
        for _ in range(draw(st.integers(0, 2))):
            row[draw(st.integers(0, len(row) - 1))] = draw(CELLS)
    if cells and draw(st.booleans()):
        cells = draw(st.permutations(cells))
    if draw(st.integers(0, 9)) == 0:
        columns = [*columns[:-1], draw(st.sampled_from([*columns, "other"]))]
    if draw(st.booleans()):
        return as_json_lines(columns, cells)
    return as_csv(columns, cells, draw(st.sampled_from(",;\t|")), draw(st.sampled_from(["\n", "\r\n", "\r"])))


def check_trace(trace: Trace) -> None:
    n = len(trace)
    assert n >= 1 and trace.dropped >= 0 and trace.reordered >= 0 and bool(trace.dropped_reason) == (trace.dropped > 0)
    for tokens in (trace.prompt_tokens, trace.output_tokens):
        assert tokens.dtype == np.int32 and tokens.shape == (n,) and tokens.min() >= 1 and tokens.max() <= 2**30
    assert trace.type_id.shape == (n,) and trace.type_id.dtype == np.int32
    assert len(trace.request_id) in (0, n)
    assert all(name.isprintable() and name == name.strip() for name in (*trace.request_id, *trace.type_names))
    if trace.arrival is not None:
        assert trace.arrival.dtype == np.float64 and trace.arrival.shape == (n,) and trace.arrival[0] == 0.0
        assert np.all(np.isfinite(trace.arrival)) and np.all(np.diff(trace.arrival) >= 0)
        trace.workload()


def check_read_back(trace: Trace, file: Path) -> None:
    """The columns of a replay's output that are its input hold the same trace."""
    if trace.arrival is None:
        return
    with file.open("w", encoding="utf-8", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow(("request_id", "arrived_at", "prompt_tokens", "output_tokens", "type"))
        ids = trace.request_id or range(len(trace))
        types = [trace.type_names[t] for t in trace.type_id.tolist()] if trace.type_names else ["0"] * len(trace)
        writer.writerows(zip(ids, trace.arrival.tolist(), trace.prompt_tokens.tolist(), trace.output_tokens.tolist(), types, strict=True))
    again = read_trace(file)
    assert again.arrival is not None and again.arrival.tobytes() == trace.arrival.tobytes()
    assert (again.format, again.origin, again.dropped, again.reordered) == ("replay", 0.0, 0, 0)
    assert again.request_id == tuple(map(str, ids)) and again.type_names == (trace.type_names or ("0",))
    for name in ("prompt_tokens", "output_tokens", "type_id"):
        assert getattr(again, name).tobytes() == getattr(trace, name).tobytes()


def check_file(file: Path, data: bytes, options: dict[str, Any]) -> bool:
    """Whether the file is a trace. Raises unless it is one or is refused in words that name it."""
    file.write_bytes(data)
    try:
        trace = read_trace(file, **options)
    except ConfigError as error:
        text = str(error)
        assert file.name in text or text.startswith(("time_unit", "jitter_seconds")), text
        assert len(text) < 3000, len(text)
        return False
    check_trace(trace)
    check_read_back(trace, file.with_name("back.csv"))
    scenario = scenario_from_trace(file, rate=None if trace.arrival is not None else 2.0, **options)
    assert len(scenario.generate(0)) == len(trace) and scenario.dropped == trace.dropped
    return True


def fuzz(strategy: st.SearchStrategy[bytes], file: Path, examples: int) -> tuple[int, int]:
    """(valid, refused) among ``examples`` files."""
    counts = [0, 0]

    @settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink]
    )
    @given(data=strategy, options=OPTIONS)
    def attempt(data: bytes, options: dict[str, Any]) -> None:
        counts[not check_file(file, data, options)] += 1

    attempt()
    return counts[0], counts[1]


@pytest.mark.parametrize("strategy", [mutated, structured])
def test_a_damaged_file_is_read_or_refused(strategy: Callable[[], st.SearchStrategy[bytes]], tmp_path: Path) -> None:
    read, refused = fuzz(strategy(), tmp_path / "trace.csv", 300)
    assert read > 10 and refused > 50, "mutations must reach both ends"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [mutated, structured])
def test_many_damaged_files_are_read_or_refused(strategy: Callable[[], st.SearchStrategy[bytes]], tmp_path: Path) -> None:
    fuzz(strategy(), tmp_path / "trace.csv", 20_000)


@pytest.mark.parametrize("i", range(len(VALID)))
def test_the_files_that_are_damaged_are_valid(tmp_path: Path, i: int) -> None:
    assert check_file(tmp_path / "trace.csv", VALID[i], {})
