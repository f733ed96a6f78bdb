"""Trace readers: every format, every refusal, and the published statistics of the real files."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmsched_env.errors import ConfigError
from llmsched_env.workload import read_trace


def raw_trace(name: str) -> Path:
    """A raw trace, or skip. The files are not part of the project; ``LLMSCHED_TRACES`` names their folder."""
    folder = Path(os.environ.get("LLMSCHED_TRACES", "not set"))
    if not (folder / name).is_file():
        pytest.skip(f"raw trace {name} not found (set LLMSCHED_TRACES to its folder)")
    return folder / name


def write(folder: Path, text: str, name: str = "trace.csv") -> Path:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


VIDUR = "arrived_at,num_prefill_tokens,num_decode_tokens\n"
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
BURST = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
WAIT = "question_length,answer_length\n"


# --- formats --------------------------------------------------------------------------------------


def test_vidur_clock_counts_from_the_first_request(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path, VIDUR + "0.125,4,5\n0.5,6,7\n\n0.5,8,9\n"))
    assert trace.format == "vidur" and len(trace) == 3 and trace.dropped == 0
    assert trace.arrival is not None and trace.arrival.tolist() == [0.0, 0.375, 0.375] and trace.arrival.dtype == np.float64
    assert trace.origin == 0.125 and trace.reordered == 0
    assert trace.prompt_tokens.tolist() == [4, 6, 8] and trace.prompt_tokens.dtype == np.int32
    assert trace.output_tokens.tolist() == [5, 7, 9] and trace.output_tokens.dtype == np.int32
    assert trace.type_id.tolist() == [0, 0, 0] and trace.type_names == () and trace.request_id == ()
    workload = trace.workload()
    assert workload.arrival.tolist() == [0.0, 0.375, 0.375] and workload.output_tokens.tolist() == [5, 7, 9]


@pytest.mark.parametrize(
    ("labels", "ids", "names"),
    [
        (["0", "1", "0"], [0, 1, 0], ("0", "1")),
        (["2", "10", "2"], [0, 1, 0], ("2", "10")),
        (["long", "chat", "long"], [1, 0, 1], ("chat", "long")),
        (["1", "chat", "1"], [0, 1, 0], ("1", "chat")),
    ],
)
def test_types_are_numbered_by_value(tmp_path: Path, labels: list[str], ids: list[int], names: tuple[str, ...]) -> None:
    rows = "".join(f"{i},4,5,{label}\n" for i, label in enumerate(labels))
    trace = read_trace(write(tmp_path, VIDUR.strip() + ",type\n" + rows))
    assert trace.type_id.tolist() == ids and trace.type_names == names


def test_replay_output_can_be_replayed(tmp_path: Path) -> None:
    header = "request_id,arrived_at,prompt_tokens,output_tokens,admitted_at,ttft,e2e,evictions,completed\n"
    text = header + "r7,0.25,4,5,,,,0,0\nr8,1,6,7,1,2,3,0,1\n"
    trace = read_trace(write(tmp_path, text))
    assert trace.format == "replay" and trace.request_id == ("r7", "r8")
    assert trace.arrival is not None and trace.arrival.tolist() == [0.0, 0.75] and trace.origin == 0.25


def test_columns_in_any_order_spaces_quotes_and_bom(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_bytes(b'\xef\xbb\xbf num_decode_tokens ,"arrived_at",num_prefill_tokens\r\n" 5",0,4.0\r\n')
    trace = read_trace(file)
    assert (trace.prompt_tokens.tolist(), trace.output_tokens.tolist()) == ([4], [5])


def test_azure_times_are_exact_to_the_tenth_of_a_microsecond(tmp_path: Path) -> None:
    text = AZURE + "2023-12-31 23:59:59.9799601,4808,10\n2024-01-01 00:00:00.0000001,5,6\n2024-01-01T00:00:00.5Z,7,8\n"
    trace = read_trace(write(tmp_path, text))
    assert trace.format == "azure" and trace.arrival is not None
    assert trace.arrival == pytest.approx([0.0, 0.02004, 0.5200399], abs=1e-12)


def test_burstgpt_drops_failures_and_starts_at_the_first_request_left(tmp_path: Path) -> None:
    rows = "3,ChatGPT,9,0,9,Conversation log\n5,ChatGPT,472,18,490,Conversation log\n45,GPT-4,1087,230,1317,API log\n"
    trace = read_trace(write(tmp_path, BURST + rows))
    assert trace.format == "burstgpt" and trace.arrival is not None and trace.arrival.tolist() == [0.0, 40.0]
    assert trace.dropped == 1 and "0 prompt or output tokens" in trace.dropped_reason


def test_lengths_only_files(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path, WAIT + "24,10\n6,0\n0,4\n20,297\n"))
    assert trace.format == "wait-lengths" and trace.arrival is None and trace.dropped == 2
    assert trace.prompt_tokens.tolist() == [24, 20]
    assert read_trace(write(tmp_path, "num_prefill_tokens,num_decode_tokens\n2,0\n2,3\n")).dropped == 1
    with pytest.raises(ConfigError, match="has lengths only"):
        trace.workload()


def test_mooncake_milliseconds_and_jitter(tmp_path: Path) -> None:
    stamps = [3000] * 50 + [6000] * 50 + [12000]
    rows = [json.dumps({"timestamp": t, "input_length": i + 1, "output_length": 5, "hash_ids": [0]}) for i, t in enumerate(stamps)]
    file = write(tmp_path, "\n".join(rows), "m.jsonl")
    trace = read_trace(file)
    assert trace.format == "mooncake" and trace.arrival is not None
    assert trace.arrival.tolist() == [0.0] * 50 + [3.0] * 50 + [9.0]
    spread = read_trace(file, jitter_seconds=3.0)
    assert spread.arrival is not None and spread.arrival[0] == 0.0 and np.all(np.diff(spread.arrival) > 0)
    assert np.all(np.abs(spread.arrival - trace.arrival - 1.5) <= 1.6 + spread.arrival[1])
    assert spread.prompt_tokens.tolist() == trace.prompt_tokens.tolist(), "jitter keeps the order of requests"
    assert spread.arrival.tobytes() == read_trace(file, jitter_seconds=3.0).arrival.tobytes()  # type: ignore[union-attr]
    assert spread.arrival.tobytes() != read_trace(file, jitter_seconds=3.0, jitter_seed=1).arrival.tobytes()  # type: ignore[union-attr]
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="jitter_seconds"):
            read_trace(file, jitter_seconds=bad)
    with pytest.raises(ConfigError, match="no arrival times"):
        read_trace(write(tmp_path, WAIT + "24,10\n"), jitter_seconds=1.0)


def test_vllm_log(tmp_path: Path) -> None:
    rows = [
        {"request_id": "a", "input_toks": 4, "output_toks": 5, "arrival_time": 9.0, "queued_ts": 27536.5},
        {"request_id": "b", "input_toks": 6, "output_toks": 7, "arrival_time": 8.0, "queued_ts": 27537.0},
    ]
    trace = read_trace(write(tmp_path, "\n".join(map(json.dumps, rows)) + "\n\n", "log.jsonl"))
    assert trace.format == "vllm" and trace.request_id == ("a", "b")
    assert trace.arrival is not None and trace.arrival.tolist() == [0.0, 0.5]


def test_gzip_is_told_by_content(tmp_path: Path) -> None:
    for name in ("trace.csv.gz", "trace.csv"):
        file = tmp_path / name
        file.write_bytes(gzip.compress((VIDUR + "0,4,5\n").encode()))
        assert len(read_trace(file)) == 1


@given(st.lists(st.tuples(st.integers(0, 10**7), st.integers(1, 2**30), st.integers(1, 2**30)), min_size=1, max_size=30))
@settings(max_examples=30, deadline=None)
def test_every_well_formed_file_reads_back(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, int, int]]) -> None:
    rows = sorted(rows, key=lambda r: r[0])
    text = VIDUR + "".join(f"{t / 1000},{p},{o}\n" for t, p, o in rows)
    trace = read_trace(write(tmp_path_factory.mktemp("t"), text))
    assert trace.arrival is not None and trace.arrival.tolist() == [t / 1000 - rows[0][0] / 1000 for t, _, _ in rows]
    assert list(zip(trace.prompt_tokens.tolist(), trace.output_tokens.tolist(), strict=True)) == [(p, o) for _, p, o in rows]


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (VIDUR + "0,4,5\n1,x,5\n", r":3: column 'num_prefill_tokens': value 'x' is not a number"),
        (VIDUR + "0,4,5\n1,4,\n", r":3: column 'num_decode_tokens': value '' is empty"),
        (VIDUR + "0,4,5\n1,4\n", r":3: column 'num_decode_tokens': value is missing"),
        (VIDUR + "0,4,5\n1,4,5,6\n", r":3: 4 fields, the header has 3"),
        (VIDUR + "0,4,5\n1,-4,5\n", r":3: column 'num_prefill_tokens': value '-4' is negative"),
        (VIDUR + "0,4,5\n1,0,5\n", r":3: column 'num_prefill_tokens': value '0' must be a number of tokens >= 1"),
        (VIDUR + "0,4,5\n1,4,0\n", r":3: column 'num_decode_tokens': value '0' must be a number of tokens >= 1"),
        (VIDUR + "0,4,5\n1,4.5,5\n", r":3: column 'num_prefill_tokens': value '4.5' is not a whole number"),
        (VIDUR + "0,4,5\n1,nan,5\n", r":3: column 'num_prefill_tokens': value 'nan' is not finite"),
        (VIDUR + "0,4,5\n1,inf,5\n", r":3: column 'num_prefill_tokens': value 'inf' is not finite"),
        (VIDUR + "0,4,5\n1,1_000,5\n", r":3: column 'num_prefill_tokens': value '1_000' is not a number"),
        (VIDUR + "0,4,5\n1,9999999999,5\n", r":3: column 'num_prefill_tokens': value '9999999999' is too large"),
        (VIDUR + "0,4,5\n1," + "9" * 40 + ",5\n", r":3: column 'num_prefill_tokens': value '9{40}' is too large"),
        (VIDUR + "9" * 400 + ",4,5\n", r":2: column 'arrived_at': value '9{60}' is not finite"),
        (VIDUR + "nan,4,5\n", r":2: column 'arrived_at': value 'nan' is not finite"),
        (VIDUR + "-0.5,4,5\n", r":2: column 'arrived_at': value '-0.5' is negative"),
        (VIDUR + "0,4,5\n2,4,5\n\n1,4,5\n", r":5: column 'arrived_at': value '1' is earlier than the row before"),
        (VIDUR + '0,4,5\n1,"4,5\n', r"is not CSV"),
        (VIDUR, r"trace\.csv: holds no request \(no rows under the header\)"),
        (VIDUR.strip(), r"holds no request"),
        (VIDUR.replace("arrived_at", "arrived_at,arrived_at"), r":1: column 'arrived_at' occurs 2 times"),
        (VIDUR.strip() + ",type\n0,4,5,\n", r":2: column 'type': value ''"),
        (WAIT + "3,0\n", r"all 1 rows have 0 prompt or output tokens"),
        (
            AZURE + "2023-11-16 18:17:03.97,4,5\n2023-11-31 18:17:03,4,5\n",
            r":3: column 'TIMESTAMP': value '2023-11-31 18:17:03' is not a time",
        ),
        (AZURE + "12.5,4,5\n", r":2: column 'TIMESTAMP': value '12.5' is not a time such as"),
        (AZURE + "2023-11-16 18:17:04,4,5\n2023-11-16 18:17:03.5,4,5\n", r":3: column 'TIMESTAMP': .* earlier than the row before"),
        (AZURE + "2023-11-16 18:17:04,4,0\n", r":2: column 'GeneratedTokens': value '0' must be"),
        (BURST + "5,a,472,18,490,b\n4,a,472,0,490,b\n", r":3: column 'Timestamp': value '4' is earlier"),
        ("", r"trace\.csv: is empty"),
        ("\n  \n", r"trace\.csv: is empty"),
        ("a,b\n1,2\n", r"unknown columns: a, b\..*Known formats: vidur \(arrived_at, num_prefill_tokens, num_decode_tokens\); replay"),
        ("TIMESTAMP,ContextTokens,Generated\n", r"For azure, missing: GeneratedTokens \(is it 'Generated'\?\)"),
        ("1,2,3\n", r"unknown columns: 1, 2, 3\."),
    ],
)
def test_malformed_csv_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read_trace(write(tmp_path, text))
    assert str(tmp_path / "trace.csv") in str(caught.value)


MOON = '{"timestamp": 0, "input_length": 4, "output_length": 5}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MOON + "{nonsense}\n", r":2: is not a JSON object on one line"),
        (MOON + "[1]\n", r":2: is not a JSON object, but list"),
        ("[1]\n", r":1: is not a JSON object, but list"),
        ('{"a": ' + "[" * 100_000 + "\n", r":1: is not a JSON object on one line"),
        ("{\n", r":1: is not a JSON object on one line"),
        ("{}\n", r"unknown columns: \."),
        (MOON + '{"timestamp": 1, "input_length": 4}\n', r":2: column 'output_length': value is missing"),
        (MOON + '{"timestamp": 1, "input_length": null, "output_length": 5}\n', r":2: column 'input_length': value 'None' is not a number"),
        (MOON + '{"timestamp": 1, "input_length": true, "output_length": 5}\n', r":2: column 'input_length': value 'True' is not a number"),
        (MOON + '{"timestamp": NaN, "input_length": 4, "output_length": 5}\n', r":2: column 'timestamp': value 'nan' is not finite"),
        (MOON + '{"timestamp": 1, "input_length": 4.5, "output_length": 5}\n', r":2: column 'input_length': value '4.5' is not a whole"),
        (
            MOON + '{"timestamp": 1, "input_length": 4, "output_length": [5]}\n',
            r":2: column 'output_length': value '\[5\]' is not a number",
        ),
        (
            MOON + '{"timestamp": ' + "9" * 400 + ', "input_length": 4, "output_length": 5}\n',
            r":2: column 'timestamp': value '9{60}' is too large",
        ),
        (MOON + '{"timestamp": -1, "input_length": 4, "output_length": 5}\n', r":2: column 'timestamp': value '-1' is negative"),
        (MOON.replace("0", "5000") + MOON, r":2: column 'timestamp': value '0' is earlier"),
    ],
)
def test_malformed_json_lines_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_trace(write(tmp_path, text, "trace.jsonl"))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    whole = gzip.compress((VIDUR + "0,4,5\n" * 100).encode())
    cases = {
        "short.csv.gz": (whole[:-10], "damaged gzip"),
        "head.csv.gz": (whole[:5], "damaged gzip"),
        "crc.csv.gz": (whole[:-8] + b"\0" * 8, "damaged gzip"),
        "body.csv.gz": (whole[:12] + b"\xff" * 20 + whole[32:], "damaged gzip"),
        "plain.csv.gz": (VIDUR.encode(), "named .gz but holds no gzip data"),
        "garbage.csv": (bytes(range(128, 256)), "is not a text file"),
        "nul.csv": (b"a,b\n\0\0\0\n", "is not a text file"),
        "empty.csv.gz": (gzip.compress(b""), "is empty"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=message) as caught:
            read_trace(tmp_path / name)
        assert name in str(caught.value)


def test_unreadable_paths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.csv: cannot be read"):
        read_trace(tmp_path / "none.csv")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(tmp_path)


@given(st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_arbitrary_bytes_never_escape_as_another_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "bytes.csv"
    for content in (data, VIDUR.encode() + data, MOON.encode() + data):
        file.write_bytes(content)
        try:
            trace = read_trace(file)
        except ConfigError as error:
            assert "bytes.csv" in str(error)
        else:
            assert len(trace) >= 1


# --- the real files -------------------------------------------------------------------------------

# Format, rows, dropped, (mean, median, max) of prompt and output, rate, gap CV: two or three printed digits of a
# description of the files. BurstGPT's means were taken over all 400 rows, failures of 0 tokens among them.
PUBLISHED = {
    "azure_2023_code.csv.gz": ("azure", 8819, 0, (2048, 1469, 7437), (27.9, 13, 1899), 2.57, 13.2),
    "azure_2023_conv.csv.gz": ("azure", 19366, 0, (1155, 1020, 14050), (211, 129, 1000), 5.53, 1.09),
    "vidur_splitwise_code.csv.gz": ("vidur", 8819, 0, (2048, 1469, 7437), (27.9, 13, 1899), 2.57, 13.2),
    "vidur_splitwise_conv.csv.gz": ("vidur", 19366, 0, (1155, 1020, 14050), (211, 129, 1000), 5.53, 1.09),
    "mooncake_conversation.jsonl.gz": ("mooncake", 12031, 0, (12035, 6909, 126195), (343, 350, 2000), 3.40, 3.0),
    "burstgpt_1_head.csv.gz": ("burstgpt", 383, 17, (521 * 400 / 383, None, 2126), (277 * 400 / 383, None, 2019), 0.0102, None),
    "sharegpt_lengths_10k.csv.gz": ("vidur-lengths", 10000, 0, (246, 35, 3973), (326, 286, 1734), None, None),
    "vidur_arxiv_summarization_lengths.csv.gz": ("vidur-lengths", 28257, 0, (2588, 2730, 4054), (291, 167, 4056), None, None),
    "lmsys_lengths_wait_100k.csv.gz": ("wait-lengths", 99849, 151, (59, 21, 499), (160, 124, 599), None, None),
    "lmsys_lengths_wait_20k.csv.gz": ("vidur-lengths", 19983, 17, (34.8, 19, 199), (147, 116, 499), None, None),
    "vllm_measured_RTX4090_llama31-8b_requests.jsonl.gz": ("vllm", 300, 0, (None,) * 3, (None,) * 3, None, None),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_real_traces_read_with_their_published_statistics(name: str) -> None:
    kind, rows, dropped, prompt, output, rate, gap_cv = PUBLISHED[name]
    trace = read_trace(raw_trace(name))
    assert (trace.format, len(trace), trace.dropped) == (kind, rows, dropped)
    for values, (mean, median, largest) in ((trace.prompt_tokens, prompt), (trace.output_tokens, output)):
        assert values.min() >= 1
        if mean is not None:
            assert values.mean() == pytest.approx(mean, rel=0.01)
        if median is not None:
            assert np.median(values) == pytest.approx(median, abs=1.0)
        if largest is not None:
            assert values.max() == largest
    if kind.endswith("lengths"):
        assert trace.arrival is None
    else:
        assert trace.arrival is not None and trace.arrival[0] == 0.0 and np.all(np.diff(trace.arrival) >= 0)
        gaps = np.diff(trace.arrival)
        if rate is not None:
            assert 1 / gaps.mean() == pytest.approx(rate, rel=0.01)
        if gap_cv is not None:
            assert gaps.std() / gaps.mean() == pytest.approx(gap_cv, rel=0.015)


@pytest.mark.parametrize("kind", ["conv", "code"])
def test_azure_and_vidur_copies_of_one_trace_agree(kind: str) -> None:
    """Two formats of the same rows: lengths equal, times to Vidur's microsecond."""
    azure, vidur = read_trace(raw_trace(f"azure_2023_{kind}.csv.gz")), read_trace(raw_trace(f"vidur_splitwise_{kind}.csv.gz"))
    assert azure.prompt_tokens.tobytes() == vidur.prompt_tokens.tobytes()
    assert azure.output_tokens.tobytes() == vidur.output_tokens.tobytes()
    assert azure.arrival is not None and vidur.arrival is not None
    assert np.abs(azure.arrival - vidur.arrival).max() <= 1.001e-6


@pytest.mark.parametrize("name", ["meta.json.gz", "timeseries.csv.gz"])
def test_files_that_are_no_traces_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"unknown columns|not a JSON object on one line"):
        read_trace(raw_trace(f"vllm_measured_RTX4090_llama31-8b_{name}"))
