"""The clock of a trace: its origin, unit, order and offsets, in every format that has one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmsched_env.errors import ConfigError
from llmsched_env.workload import Trace, read_trace, scenario_from_trace

HEADERS = {
    "vidur": "arrived_at,num_prefill_tokens,num_decode_tokens",
    "replay": "arrived_at,prompt_tokens,output_tokens",
    "burstgpt": "Timestamp,Request tokens,Response tokens",
    "bailian": "timestamp,input_length,output_length,chat_id",
    "mooncake": "timestamp,input_length,output_length",
    "vllm": "queued_ts,input_toks,output_toks",
}
PER_SECOND = {"mooncake": 1000}
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def trace_file(folder: Path, name: str, times: list[Any], lengths: list[tuple[int, int]] | None = None) -> Path:
    """A file of one format; request i has 10 + i prompt and 5 output tokens unless said otherwise."""
    lengths = lengths or [(10 + i, 5) for i in range(len(times))]
    rows = [f"{t},{p},{o}" + (",1" if name == "bailian" else "") for t, (p, o) in zip(times, lengths, strict=True)]
    file = folder / f"{name}.csv"
    file.write_text("\n".join([HEADERS[name], *rows]) + "\n", encoding="utf-8")
    return file


def json_file(folder: Path, rows: list[dict[str, Any]]) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def arrivals(trace: Trace) -> list[float]:
    assert trace.arrival is not None
    times: list[float] = trace.arrival.tolist()
    return times


# --- origin ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADERS)
@pytest.mark.parametrize("origin", [0, 7, 3600, 86_400 * 3])
def test_the_first_request_arrives_at_0_whatever_the_origin(tmp_path: Path, name: str, origin: int) -> None:
    scale = PER_SECOND.get(name, 1)
    trace = read_trace(trace_file(tmp_path, name, [(origin + t) * scale for t in (0, 1, 4, 4)]))
    assert trace.format == name and trace.reordered == 0
    assert arrivals(trace) == [0.0, 1.0, 4.0, 4.0] and trace.origin == origin


@pytest.mark.parametrize("name", [n for n in HEADERS if n != "mooncake"])
def test_unix_times_in_seconds_become_relative(tmp_path: Path, name: str) -> None:
    trace = read_trace(trace_file(tmp_path, name, [1_700_000_000.25, 1_700_000_001.5, 1_700_000_300]))
    assert arrivals(trace) == [0.0, 1.25, 299.75] and trace.origin == 1_700_000_000.25


def test_the_origin_is_that_of_the_first_request_left(tmp_path: Path) -> None:
    trace = read_trace(trace_file(tmp_path, "burstgpt", [3, 5, 45], [(9, 0), (4, 5), (4, 5)]))
    assert arrivals(trace) == [0.0, 40.0] and trace.origin == 5 and trace.dropped == 1
    dropped = read_trace(trace_file(tmp_path, "vidur", [0, 1.7e9, 1.7e9 + 2], [(9, 0), (4, 5), (4, 5)]), invalid_rows="drop")
    assert arrivals(dropped) == [0.0, 2.0], "a row that is left out sets no clock"


def test_a_scenario_does_not_depend_on_the_origin(tmp_path: Path) -> None:
    for origin in (0, 4096):
        scenario = scenario_from_trace(trace_file(tmp_path, "replay", [origin, origin + 0.25, origin + 1]))
        assert scenario.generate(0).arrival.tolist() == [0.0, 0.25, 1.0] and scenario.rate == 2.0
        assert scenario.generate(0, rate=4.0).arrival.tolist() == [0.0, 0.125, 0.5]
        assert len(scenario.generate(0, horizon=0.5)) == 2
        assert scenario.trace is not None and scenario.trace.origin == origin


def test_times_ten_years_apart_are_two_clocks(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"vidur\.csv:3: column 'arrived_at': value '1700000000' is 1.7e\+09 s after the first row"):
        read_trace(trace_file(tmp_path, "vidur", [0, 1_700_000_000, 1_700_000_001]))
    with pytest.raises(ConfigError, match="within 10 years"):
        read_trace(trace_file(tmp_path, "vidur", [1_700_000_000, 0]), reorder_seconds=math.inf)


# --- unit -----------------------------------------------------------------------------------------

REQUEST = {"input_length": 9, "output_length": 9}


@pytest.mark.parametrize("mark", [{"chat_id": 7}, {"parent_chat_id": -1}, {"turn": 1}])
@pytest.mark.parametrize("times", [[0.0, 1.5, 3.25], [0, 3, 6], [5, 5, 7200]])
def test_bailian_counts_seconds(tmp_path: Path, mark: dict[str, int], times: list[float]) -> None:
    trace = read_trace(json_file(tmp_path, [{"timestamp": t} | REQUEST | mark for t in times]))
    assert trace.format == "bailian" and arrivals(trace) == [t - times[0] for t in times]


def test_mooncake_counts_milliseconds(tmp_path: Path) -> None:
    for times in ([0, 3000, 6000], [27_482, 27_482, 30_535], [0, 0, 0], [5]):
        trace = read_trace(json_file(tmp_path, [{"timestamp": t, "hash_ids": [1]} | REQUEST for t in times]))
        assert trace.format == "mooncake" and arrivals(trace) == [(t - times[0]) / 1000 for t in times]


@pytest.mark.parametrize(
    ("name", "times", "message"),
    [
        ("mooncake", [0.0, 1.5, 3.0], r":3: column 'timestamp': value '1.5' is not whole"),
        ("mooncake", [0, 3, 6], r":2: column 'timestamp': value '0' is followed by gaps of 3 on average"),
        ("mooncake", [1_700_000_000, 1_700_000_003], r"is a date if it is in seconds"),
        ("mooncake", [1_700_000_000_000_000, 1_700_000_003_000_000], r"is no time in milliseconds"),
        ("vidur", [1_700_000_000_000, 1_700_000_003_000], r"value '1700000000000' is no time in seconds"),
        ("burstgpt", [1_700_000_000_000_000, 1_700_000_000_500_000], r"is no time in seconds"),
        ("vllm", [1_700_000_000_000_000_000, 1_700_000_000_000_500_000], r"is no time in seconds"),
    ],
)
def test_times_unlikely_in_the_formats_unit_are_refused(tmp_path: Path, name: str, times: list[float], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read_trace(trace_file(tmp_path, name, times))
    assert "time_unit (--time-unit), one of 's', 'ms', 'us', 'ns'" in str(caught.value)


@pytest.mark.parametrize("name", HEADERS)
@pytest.mark.parametrize(("unit", "scale"), [("s", 1), ("ms", 10**3), ("us", 10**6), ("ns", 10**9)])
@pytest.mark.parametrize("origin", [0, 1_700_000_000])
def test_the_unit_can_be_said(tmp_path: Path, name: str, unit: Any, scale: int, origin: int) -> None:
    file = trace_file(tmp_path, name, [(origin + t) * scale for t in (0, 3, 6)])
    trace = read_trace(file, time_unit=unit)
    assert arrivals(trace) == [0.0, 3.0, 6.0] and trace.origin == origin
    assert scenario_from_trace(file, time_unit=unit).rate == pytest.approx(1 / 3)


def test_nanoseconds_since_1970_are_exact(tmp_path: Path) -> None:
    base = 1_700_000_000_123_456_789
    assert arrivals(read_trace(trace_file(tmp_path, "vllm", [base, base + 1, base + 1001]), time_unit="ns")) == [0.0, 1e-9, 1.001e-6]


def test_a_unit_needs_a_clock_that_has_one(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("question_length,answer_length\n4,5\n")
    with pytest.raises(ConfigError, match=r"time_unit: 'ms', but .* has no arrival times"):
        read_trace(tmp_path / "t.csv", time_unit="ms")
    (tmp_path / "t.csv").write_text(AZURE + "2023-11-16 18:17:03,4,5\n")
    with pytest.raises(ConfigError, match=r":2: column 'TIMESTAMP': value '2023-11-16 18:17:03' is not a number"):
        read_trace(tmp_path / "t.csv", time_unit="ms")
    with pytest.raises(ConfigError, match="time_unit: 'h', must be one of 's', 'ms', 'us', 'ns'"):
        read_trace(trace_file(tmp_path, "vidur", [0]), time_unit="h")  # type: ignore[arg-type]


# --- order ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADERS)
def test_small_inversions_are_put_in_order(tmp_path: Path, name: str) -> None:
    scale = PER_SECOND.get(name, 1)
    seconds = [2.0, 2.125, 2.0, 2.25, 2.125, 9.0]
    times = [round(t * scale) if scale > 1 else t * scale for t in seconds]
    trace = read_trace(trace_file(tmp_path, name, times))
    order = [0, 2, 1, 4, 3, 5]  # equal times stay in file order
    assert trace.prompt_tokens.tolist() == [10 + i for i in order]
    assert arrivals(trace) == [seconds[i] - 2.0 for i in order] and trace.reordered == 2
    assert "2 rows put in order" in scenario_from_trace(trace.path).description


def test_a_row_moves_with_its_name_type_and_lengths(tmp_path: Path) -> None:
    text = "request_id,arrived_at,num_prefill_tokens,num_decode_tokens,type\nc,5.1,3,30,2\na,5,1,10,1\nb,5.05,2,20,2\n"
    (tmp_path / "t.csv").write_text(text)
    trace = read_trace(tmp_path / "t.csv")
    assert trace.request_id == ("a", "b", "c") and trace.type_id.tolist() == [0, 1, 1]
    assert trace.prompt_tokens.tolist() == [1, 2, 3] and trace.output_tokens.tolist() == [10, 20, 30]
    assert arrivals(trace) == pytest.approx([0.0, 0.05, 0.1]) and trace.origin == 5 and trace.reordered == 2


@pytest.mark.parametrize("name", HEADERS)
@pytest.mark.parametrize("back", [0.5, 60, 7200])
def test_a_step_back_beyond_the_tolerance_names_the_row(tmp_path: Path, name: str, back: float) -> None:
    scale = PER_SECOND.get(name, 1)
    file = trace_file(tmp_path, name, [8000 * scale, 8001 * scale, int(1000 * (8001 - back)) * scale / 1000, 8002 * scale])
    with pytest.raises(ConfigError, match=rf":4: column '\w+': value '.*' is earlier than the row before, by {back:g} s") as caught:
        read_trace(file)
    assert "reorder_seconds (--reorder-seconds)" in str(caught.value)
    with pytest.raises(ConfigError, match=r":4: .* earlier than the row before"):
        read_trace(file, invalid_rows="drop")
    for allowed in (back, math.inf):
        assert read_trace(file, reorder_seconds=allowed, time_unit="ms" if scale > 1 else "s").reordered == 1
    for bad in (-1, math.nan, "1", None, True):
        with pytest.raises(ConfigError, match=r"reorder_seconds: .*, must be >= 0 seconds"):
            read_trace(file, reorder_seconds=bad)  # type: ignore[arg-type]


def test_many_small_steps_do_not_add_up_to_a_large_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r":4: .* by 0.4 s"):
        read_trace(trace_file(tmp_path, "vidur", [10.0, 9.8, 9.6]))


@given(st.lists(st.integers(0, 4000), min_size=1, max_size=12), st.sampled_from([0.0, 0.25, 1.0, math.inf]), st.sampled_from([0, 10**9]))
@settings(max_examples=150, deadline=None)
def test_order_and_origin_by_definition(tmp_path_factory: pytest.TempPathFactory, times: list[int], tolerance: float, origin: int) -> None:
    file = trace_file(tmp_path_factory.getbasetemp(), "mooncake", [origin + t for t in times])
    latest = np.maximum.accumulate(times)
    if np.max(latest - times) > 1000 * tolerance:
        with pytest.raises(ConfigError, match="earlier than the row before"):
            read_trace(file, time_unit="ms", reorder_seconds=tolerance)
        return
    trace = read_trace(file, time_unit="ms", reorder_seconds=tolerance)
    order = sorted(range(len(times)), key=lambda i: times[i])
    assert arrivals(trace) == [(times[i] - min(times)) / 1000 for i in order]
    assert trace.prompt_tokens.tolist() == [10 + i for i in order]
    assert trace.reordered == int(np.count_nonzero(times < latest)) and trace.origin == (origin + min(times)) / 1000


def test_no_tolerance_refuses_every_step_back(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r":3: .* earlier"):
        read_trace(trace_file(tmp_path, "vllm", [100.0, 99.9999]), reorder_seconds=0)


def test_dates_are_put_in_order_too(tmp_path: Path) -> None:
    file = tmp_path / "azure.csv"
    file.write_text(AZURE + "2023-11-16 18:17:04,4,5\n2023-11-16 18:17:03.9999999,6,5\n2023-11-16 18:17:05,8,5\n")
    trace = read_trace(file)
    assert trace.prompt_tokens.tolist() == [6, 4, 8] and arrivals(trace) == pytest.approx([0.0, 1e-7, 1.0000001], abs=1e-12)
    file.write_text(AZURE + "2023-11-16 18:17:04,4,5\n2023-11-16 17:17:04,6,5\n")
    with pytest.raises(ConfigError, match=r":3: column 'TIMESTAMP': .* by 3600 s"):
        read_trace(file)


def test_jitter_on_a_log_out_of_order(tmp_path: Path) -> None:
    trace = read_trace(trace_file(tmp_path, "vllm", [1.0, 0.9, 5.0]), jitter_seconds=0.5)
    assert trace.prompt_tokens.tolist() == [11, 10, 12] and arrivals(trace)[0] == 0.0 and np.all(np.diff(arrivals(trace)) >= 0)
    with pytest.raises(ConfigError, match="jitter_seed: -1"):
        read_trace(trace_file(tmp_path, "vllm", [1.0]), jitter_seconds=0.5, jitter_seed=-1)


# --- dates with offsets ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "second",
    [
        "2024-05-10 00:00:01.5", "2024-05-10T00:00:01.500000Z", "2024-05-10t00:00:01.5z", "2024-05-10 00:00:01.5+00:00",
        "2024-05-10 02:00:01.5+02:00", "2024-05-10 02:00:01.5 +0200", "2024-05-09T19:00:01.500-05", "2024-05-10 05:30:01.5+05:30",
        "2024-05-10 00:00:01.5 UTC", "2024-05-09 23:59:01.5-00:01",
    ],
)  # fmt: skip
def test_offsets_are_taken_off(tmp_path: Path, second: str) -> None:
    file = tmp_path / "azure.csv"
    file.write_text(AZURE + f"2024-05-10 00:00:00+00:00,4,5\n{second},4,5\n2024-05-10 01:00:02+01:00,4,5\n")
    trace = read_trace(file)
    assert arrivals(trace) == [0.0, 1.5, 2.0] and trace.origin == 1_715_299_200


def test_dates_before_1970(tmp_path: Path) -> None:
    file = tmp_path / "azure.csv"
    file.write_text(AZURE + "1969-12-31 23:59:58,4,5\n1969-12-31 23:59:59.9,6,5\n1969-12-31 23:59:59.8,8,5\n1970-01-01 00:00:01,4,5\n")
    trace = read_trace(file)
    assert arrivals(trace) == [0.0, 1.8, 1.9, 3.0] and trace.origin == -2 and trace.reordered == 1


def test_numbers_in_a_format_of_dates_need_a_unit(tmp_path: Path) -> None:
    file = tmp_path / "azure.csv"
    file.write_text(AZURE + "10.5,4,5\n12,4,5\n")
    with pytest.raises(
        ConfigError, match=r":2: column 'TIMESTAMP': value '10.5' is not a time .*\(time_unit, --time-unit, reads numbers\)"
    ):
        read_trace(file)
    assert arrivals(read_trace(file, time_unit="s")) == [0.0, 1.5] and arrivals(read_trace(file, time_unit="ms")) == [0.0, 0.0015]


@pytest.mark.parametrize("name", HEADERS)
def test_dates_in_a_format_of_numbers(tmp_path: Path, name: str) -> None:
    times: list[Any] = ["2024-05-10 00:00:00Z", "2024-05-10T02:00:01.5+02:00", "2024-05-10 00:00:01.4", "2024-05-10 00:01:00"]
    trace = read_trace(trace_file(tmp_path, name, times))
    assert arrivals(trace) == [0.0, 1.4, 1.5, 60.0] and trace.origin == 1_715_299_200 and trace.reordered == 1
    for bad in ("", "x"):
        late = trace_file(tmp_path, name, [bad, *times])
        assert arrivals(read_trace(late, invalid_rows="drop")) == arrivals(trace), "the first time that can be read says what they are"
    with pytest.raises(ConfigError, match=r":3: column '\w+': value '5' is not a time"):
        read_trace(trace_file(tmp_path, name, [times[0], 5]))
    with pytest.raises(ConfigError, match=r":3: column '\w+': value '2024.*' is not a number"):
        read_trace(trace_file(tmp_path, name, [5, times[0]]))


@pytest.mark.parametrize(
    "text",
    ["2024-05-10 00:00:00+24:00", "2024-05-10 00:00:00+01:60", "2024-05-10 25:00:00", "2024-05-10", "2024-05-10 00:00:60",
     "10.05.2024 00:00:00", "2024-05-10 00:00:00 CEST", "1715299200", ""],
)  # fmt: skip
def test_other_dates_are_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "azure.csv"
    file.write_text(AZURE + f"{text},4,5\n")
    with pytest.raises(ConfigError, match=r":2: column 'TIMESTAMP': value '.*' is not a time"):
        read_trace(file)


# --- rows that cannot be right --------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in HEADERS if n != "burstgpt"])
@pytest.mark.parametrize("bad", ["0", "-3", "", "nan", "2.5", "4294967296"])
def test_one_bad_row_is_refused_or_dropped_and_counted(tmp_path: Path, name: str, bad: str) -> None:
    file = trace_file(tmp_path, name, [0, 1000, 2000, 3000])
    file.write_text(file.read_text().replace(",12,5", f",12,{bad}"))
    with pytest.raises(ConfigError, match=r":4: column .*invalid_rows='drop' \(on the command line --invalid-rows drop\)"):
        read_trace(file)
    trace = read_trace(file, invalid_rows="drop")
    assert trace.prompt_tokens.tolist() == [10, 11, 13] and trace.dropped == 1
    assert trace.dropped_reason.startswith("1 invalid, the first at line 4: column ")
    scenario = scenario_from_trace(file, invalid_rows="drop")
    assert scenario.dropped == 1 and scenario.num_requests == 3 and "1 rows dropped: 1 invalid" in scenario.description


def test_failures_and_invalid_rows_are_counted_apart(tmp_path: Path) -> None:
    file = trace_file(tmp_path, "burstgpt", [0, 1, 2, 3], [(4, 0), (4, -1), (4, 5), (0, 5)])
    trace = read_trace(file, invalid_rows="drop")
    assert len(trace) == 1 and trace.dropped == 3
    assert trace.dropped_reason.startswith("2 with 0 prompt or output tokens (failed requests), 1 invalid, the first at line 3: column ")


def test_lines_that_hold_no_row_are_dropped_too(tmp_path: Path) -> None:
    row = '{"queued_ts": 1, "input_toks": 4, "output_toks": 5}'
    file = tmp_path / "log.jsonl"
    file.write_text(f"{row}\nnot json\n[1]\n{row}\n{row[:20]}")  # the last line: a log that is being written
    with pytest.raises(ConfigError, match=r":2: is not a JSON object.*invalid_rows='drop'"):
        read_trace(file)
    trace = read_trace(file, invalid_rows="drop")
    assert len(trace) == 2 and trace.dropped == 3
    file.write_text(HEADERS["vidur"] + "\n0,4,5\n1,4,5,6\n2,4\n")
    assert read_trace(file, invalid_rows="drop").dropped == 2


def test_a_file_of_bad_rows_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no request \(2 rows dropped: 2 invalid, the first at line 2: column"):
        read_trace(trace_file(tmp_path, "vidur", [0, 1], [(0, 5), (0, 5)]), invalid_rows="drop")
    with pytest.raises(ConfigError, match="invalid_rows: 'skip', must be 'error' or 'drop'"):
        read_trace(trace_file(tmp_path, "vidur", [0]), invalid_rows="skip")  # type: ignore[arg-type]
