"""Trace files as people have them: delimiters, long cells, line ends, encodings, packing, and what JSON calls a number."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pytest

from llmsched_env.errors import ConfigError
from llmsched_env.workload import read_trace

HEADER = "arrived_at,num_prefill_tokens,num_decode_tokens"
MOON = '{"timestamp": 0, "input_length": 4, "output_length": 5}\n'


def lengths(folder: Path, content: str | bytes) -> list[tuple[int, int]]:
    file = folder / "trace.csv"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    trace = read_trace(file)
    return list(zip(trace.prompt_tokens.tolist(), trace.output_tokens.tolist(), strict=True))


def refusal(folder: Path, content: str | bytes) -> str:
    with pytest.raises(ConfigError) as caught:
        lengths(folder, content)
    assert str(folder / "trace.csv") in str(caught.value)
    return str(caught.value).removeprefix(str(folder / "trace.csv"))


# --- CSV ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("end", ["", "\n", "\n\n \n\t\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_delimiters_line_ends_and_a_byte_order_mark(tmp_path: Path, delimiter: str, newline: str, end: str, mark: bytes) -> None:
    text = f"\n{HEADER},note\n0,4,5,\n\n1,6,7,x\n  \n1,8,9".replace(",", delimiter) + end
    assert lengths(tmp_path, mark + text.replace("\n", newline).encode()) == [(4, 5), (6, 7), (8, 9)]


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_every_csv_format_may_have_another_delimiter(tmp_path: Path, delimiter: str) -> None:
    for header, row in (
        ("TIMESTAMP,ContextTokens,GeneratedTokens", "2023-11-16 18:17:03.5,4,5"),
        ("Timestamp,Model,Request tokens,Response tokens", "3,GPT,4,5"),
        ("question_length,answer_length", "4,5"),
        ("num_prefill_tokens,num_decode_tokens", "4,5"),
    ):
        assert lengths(tmp_path, f"{header}\n{row}\n".replace(",", delimiter)) == [(4, 5)]


def test_rows_of_empty_cells_are_blank_lines(tmp_path: Path) -> None:
    assert lengths(tmp_path, f",,\n{HEADER}\n0,4,5\n,,\n1,6,7\n , ,\n") == [(4, 5), (6, 7)]
    assert refusal(tmp_path, f"{HEADER}\n0,4,5\n,,7\n").startswith(":3: column 'arrived_at': value '' is empty")


def test_a_decimal_comma_is_named(tmp_path: Path) -> None:
    text = refusal(tmp_path, HEADER.replace(",", ";") + "\n0,5;4;5\n")
    assert text.startswith(":2: column 'arrived_at': value '0,5' is not a number (a decimal comma")
    assert "value '1,000' is not a number (a decimal comma, or commas between thousands? write 1234.5)" in refusal(
        tmp_path, HEADER + '\n0,"1,000",5\n'
    )


def test_cells_of_any_length_and_the_limit_is_never_lowered(tmp_path: Path) -> None:
    before = csv.field_size_limit(1000)
    try:
        for size in (1001, 131_073, 2_000_000):
            prompt = "a, b\n" * (size // 5)
            assert lengths(tmp_path, f'{HEADER},prompt\n0,4,5,"{prompt}"\n1,6,7,short\n') == [(4, 5), (6, 7)]
        rows = [{"timestamp": 0, "input_length": 4, "output_length": 5, "prompt": "x" * 300_000}]
        assert lengths(tmp_path, json.dumps(rows[0])) == [(4, 5)]
        assert csv.field_size_limit() >= 2_000_000
    finally:
        csv.field_size_limit(max(before, csv.field_size_limit()))


def test_a_long_value_is_shown_in_part(tmp_path: Path) -> None:
    text = refusal(tmp_path, f"{HEADER}\n0,{'x' * 200_000},5\n")
    assert text.startswith(f":2: column 'num_prefill_tokens': value '{'x' * 60}' is not a number") and len(text) < 400


@pytest.mark.parametrize("column", ["arrived_at", "num_decode_tokens", "type", "request_id"])
def test_a_column_that_counts_must_occur_once(tmp_path: Path, column: str) -> None:
    text = f"{HEADER},type,request_id,{column}\n0,4,5,1,a,1\n"
    assert refusal(tmp_path, text) == f":1: column '{column}' occurs 2 times, must occur once"
    assert lengths(tmp_path, f"{HEADER},note,note\n0,4,5,1,2\n") == [(4, 5)]


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("\uff15", "is not a number"), ("\u0665", "is not a number"), ("5_000", "is not a number"), ("0x10", "is not a number"),
        ("true", "is not a number"), ("-0.5", "is negative"), ("Infinity", "is not finite"), ("1e400", "is not finite"),
        ("2147483648", "is too large, must be at most 2**30 tokens"), ("1e30", "is too large"), ("9" * 5000, "is not finite"),
        ("-0", "must be a number of tokens >= 1"), ("-0.0", "must be a number of tokens >= 1"), ("5.5", "is not a whole number"),
    ],
)  # fmt: skip
def test_what_is_no_number_of_tokens(tmp_path: Path, cell: str, message: str) -> None:
    text = refusal(tmp_path, f"{HEADER}\n0,4,5\n1,4,{cell}\n")
    assert text.startswith(f":3: column 'num_decode_tokens': value '{cell[:60]}' {message}")


@pytest.mark.parametrize(
    ("header", "hint"),
    [
        ("Arrived_At,Num_Prefill_Tokens,Num_Decode_Tokens", "num_prefill_tokens, num_decode_tokens (is it 'Arrived_At'?)."),
        ("timestamp,Request tokens,Response tokens", "For burstgpt, missing: Timestamp (is it 'timestamp'?)."),
        ("queued_ts,input_toks", "For vllm, missing: output_toks."),
        ("sep=;", "Known formats: vidur"),
    ],
)  # fmt: skip
def test_a_header_that_is_nearly_right_gets_a_hint(tmp_path: Path, header: str, hint: str) -> None:
    text = refusal(tmp_path, f"{header}\n0,4,5\n")
    assert hint in text and "bailian (timestamp, input_length, output_length, and one of chat_id, parent_chat_id, turn)" in text


def test_numbers_in_other_spellings(tmp_path: Path) -> None:
    assert lengths(tmp_path, HEADER + '\n-0.0, 5.0 ,"+6"\n1e0,1e3,1073741824\n') == [(5, 6), (1000, 2**30)]


# --- JSON -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("NaN", "value 'nan' is not finite"), ("Infinity", "value 'inf' is not finite"), ("-Infinity", "value '-inf' is not finite"),
        ("1e400", "value '1e400' is not finite"), ("-1e400", "value '-1e400' is not finite"), ("true", "value 'True' is not a number"),
        ('"five"', "value 'five' is not a number"), ('""', "value '' is empty"), ("-0", "value '0' must be"),
        ("-7", "value '-7' is negative"),
        ("2147483648", "value '2147483648' is too large"), ("1" + "0" * 30, f"value '1{'0' * 30}' is too large"),
        ("1" * 5000, f"value '{'1' * 60}' is not finite"), ("{}", "value '{}' is not a number"), ("[5]", "value '[5]' is not a number"),
        ('4, "input_length": 5', "value is given more than once"), ("5.5", "value '5.5' is not a whole number"),
    ],
)  # fmt: skip
def test_what_json_holds_instead_of_a_number(tmp_path: Path, value: str, message: str) -> None:
    text = refusal(tmp_path, MOON + f'{{"timestamp": 1, "input_length": {value}, "output_length": 5}}\n')
    assert text.startswith(f":2: column 'input_length': {message}")


def test_json_numbers_in_other_spellings(tmp_path: Path) -> None:
    assert lengths(tmp_path, MOON.replace("4", '"4"').replace(": 5", ": 5.0")) == [(4, 5)]
    long = "1" * 5000
    assert lengths(tmp_path, MOON.replace("}", f', "hash": {long}, "score": NaN}}')) == [(4, 5)], "columns not read may hold anything"


@pytest.mark.parametrize("depth", [500, 3_000, 100_000])
@pytest.mark.parametrize("inner", ["[", '{"a":'])
def test_deep_nesting_is_refused_or_shown(tmp_path: Path, depth: int, inner: str) -> None:
    nested = inner * depth + ("1" if inner != "[" else "") + ("]" if inner == "[" else "}") * depth
    text = refusal(tmp_path, MOON + f'{{"timestamp": 1, "input_length": {nested}, "output_length": 5}}\n')
    assert text.startswith(":2: ") and len(text) < 400


def test_a_json_array_is_told_how_to_be_written(tmp_path: Path) -> None:
    rows = [json.loads(MOON), json.loads(MOON)]
    assert "is not a JSON object, but list, write one object on each line" in refusal(tmp_path, json.dumps(rows))
    assert "is not a JSON object on one line" in refusal(tmp_path, json.dumps(rows, indent=1))
    assert lengths(tmp_path, "\ufeff" + MOON.replace("\n", "\r\n") + "\r\n \r\n" + MOON.strip()) == [(4, 5), (4, 5)]


@pytest.mark.parametrize("name", ['"\\ud800"', '"a\\u0000b"', '"a\\nb"', "null", "true", "1.5", '" "', "[1]"])
def test_names_can_be_written_to_a_file_again(tmp_path: Path, name: str) -> None:
    text = refusal(tmp_path, f'{{"request_id": {name}, "queued_ts": 1, "input_toks": 4, "output_toks": 5}}')
    assert text.startswith(":1: column 'request_id': value ")


# --- bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"PK\x03\x04" + b"\0" * 30, "a zip archive"), (b"\x28\xb5\x2f\xfd" + b"\0" * 9, "zstd data"), (b"\xfd7zXZ\0\0", "xz data"),
        (b"BZh91AY&SY", "bzip2 data"), (b"PAR1\0\0", "a Parquet file"), (HEADER.encode("utf-16"), "UTF-16 text"),
        (HEADER.encode("utf-16-le"), "it holds NUL bytes"),
        (HEADER.encode() + b"\n0,4,\xe9\n", ":2: is not a text file in UTF-8 (byte 52: invalid continuation byte"),
        (gzip.compress(gzip.compress(HEADER.encode())), "is not a text file"),
    ],
)  # fmt: skip
def test_what_is_no_text_is_named(tmp_path: Path, content: bytes, kind: str) -> None:
    text = refusal(tmp_path, content)
    assert "is not a text file" in text and kind in text and "UTF-8" in text


@pytest.mark.parametrize("content", ["", "\n", " \r\n\t\n", "\ufeff", "\x1c", '""\n', '" "'])
def test_empty_files(tmp_path: Path, content: str) -> None:
    text = refusal(tmp_path, content)
    assert text.startswith(": is empty, must hold a header and at least one request")


def test_packed_files_under_any_name_and_cut_anywhere(tmp_path: Path) -> None:
    whole = gzip.compress(f"{HEADER}\n0,4,5\n".encode())
    assert lengths(tmp_path, whole) == lengths(tmp_path, gzip.compress(HEADER.encode()) + gzip.compress(b"\n0,4,5")) == [(4, 5)]
    for end in range(2, len(whole)):
        assert "damaged gzip file" in refusal(tmp_path, whole[:end])
    assert "damaged gzip file" in refusal(tmp_path, whole + b"rest")


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    for path, shown in ((tmp_path, f"{tmp_path}: "), ("a\0b", r"'a\x00b': "), ("", "'': "), (tmp_path / ("x" * 300), "x: ")):
        with pytest.raises(ConfigError, match="cannot be read") as caught:
            read_trace(path)
        assert shown in str(caught.value)


def test_an_open_quote_names_the_row_it_is_in(tmp_path: Path) -> None:
    text = f'{HEADER},prompt\n0,4,5,"two\nlines"\n1,6,7,"open\n2,8,9,x\n3,8,9,x\n'
    assert refusal(tmp_path, text).startswith(":4: is not CSV, in the row that begins here (unexpected end of data)")
    assert refusal(tmp_path, text.replace("1,6,7,", "1,-6,7,").replace('"open', "open")).startswith(":4: column 'num_prefill_tokens'")
