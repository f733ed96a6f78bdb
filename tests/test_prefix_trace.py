"""Traces that say what prompts have in common: reading, beginnings, turns, and the statistics that ship."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmsched_env.cli import build_statistics
from llmsched_env.errors import ConfigError
from llmsched_env.workload import build_sessions, load_scenario
from llmsched_env.workload.build_statistics import Source
from llmsched_env.workload.prefix_trace import PrefixTrace, common_beginnings, read_prefix_trace
from llmsched_env.workload.session_statistics import load_session_statistics
from llmsched_env.workload.sessions import RecordedCalls

SHIPPED = Path(__file__).resolve().parents[1] / "llmsched_env/workload/statistics/mooncake-sessions.json"


def raw_mooncake() -> Path:
    """The raw trace, or skip. It is not part of the project; ``LLMSCHED_TRACES`` names its folder."""
    file = Path(os.environ.get("LLMSCHED_TRACES", "not set")) / "mooncake_conversation.jsonl.gz"
    if not file.is_file():
        pytest.skip(f"raw trace {file.name} not found (set LLMSCHED_TRACES to its folder)")
    return file


def row(timestamp: Any, prompt: Any, output: Any, blocks: Any) -> dict[str, Any]:
    return {"timestamp": timestamp, "input_length": prompt, "output_length": output, "hash_ids": blocks}


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    file = folder / "trace.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return file


ROWS = [
    row(0, 1100, 100, [0, 1, 2]),
    row(3000, 600, 10, [0, 3]),
    row(6000, 1300, 50, [0, 1, 4]),  # goes on with the first: 100 new tokens
    row(9000, 1100, 30, [0, 1, 2]),  # repeats the first
    row(9000, 2000, 5, [0, 1, 4, 5]),  # goes on with the third, or so it seems: whole blocks are what counts
]


# --- reading ----------------------------------------------------------------------------------------


def test_rows_and_their_blocks(tmp_path: Path) -> None:
    trace = read_prefix_trace(write(tmp_path, ROWS))
    assert len(trace) == 5 and trace.arrival.tolist() == [0, 3, 6, 9, 9]
    assert trace.blocks == ((0, 1, 2), (0, 3), (0, 1, 4), (0, 1, 2), (0, 1, 4, 5))
    short = trace.at_most(1_200)
    assert short.prompt_tokens.tolist() == [1100, 600, 1100] and short.blocks == ((0, 1, 2), (0, 3), (0, 1, 2))


def test_a_late_row_is_put_in_order_with_its_blocks(tmp_path: Path) -> None:
    rows = [row(0, 10, 1, [7]), row(5200, 20, 1, [8]), row(5100, 30, 1, [9])]
    trace = read_prefix_trace(write(tmp_path, rows))
    assert trace.prompt_tokens.tolist() == [10, 30, 20] and trace.blocks == ((7,), (9,), (8,))


def test_gzip_is_read(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl.gz"
    file.write_bytes(gzip.compress(write(tmp_path, ROWS).read_bytes()))
    assert read_prefix_trace(file).blocks == read_prefix_trace(tmp_path / "trace.jsonl").blocks


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 4),
    st.sampled_from(["timestamp", "input_length", "output_length", "hash_ids"]),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
        lambda inner: st.lists(inner, max_size=4),
        max_leaves=5,
    ),
)
def test_whatever_a_row_holds_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, which: int, column: str, value: Any) -> None:
    rows = [dict(one) for one in ROWS]
    rows[which][column] = value
    file = write(tmp_path_factory.mktemp("rows"), rows)
    try:
        trace = read_prefix_trace(file)
    except ConfigError as error:
        assert str(file) in str(error)
    else:
        common_beginnings(trace)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hash_ids": [0]}, r"trace.jsonl:3: column 'hash_ids': value '\[0\]' has 1 blocks, must have 3"),
        ({"hash_ids": "0 1 2"}, r":3: column 'hash_ids': value '0 1 2' is not a list of block numbers"),
        ({"hash_ids": [0, 1, 2.5]}, r":3: column 'hash_ids': value .* must hold integers from 0"),
        ({"hash_ids": [0, -1, 2]}, r":3: column 'hash_ids': value .* must hold integers from 0"),
        ({"hash_ids": [0, True, 2]}, r":3: column 'hash_ids': value .* must hold integers from 0"),
        ({"input_length": -5}, r":3: column 'input_length': value '-5' is negative"),
        ({"output_length": 0}, r":3: column 'output_length': value '0' must be a number of tokens >= 1"),
    ],
)
def test_corrupt_rows_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    rows = [dict(one) for one in ROWS]
    rows[2] |= change
    with pytest.raises(ConfigError, match=message):
        read_prefix_trace(write(tmp_path, rows))


def test_other_files_are_refused(tmp_path: Path) -> None:
    missing = [dict(one) for one in ROWS]
    del missing[1]["hash_ids"]
    with pytest.raises(ConfigError, match=r":2: column 'hash_ids': value is missing"):
        read_prefix_trace(write(tmp_path, missing))
    with pytest.raises(ConfigError, match="no column 'hash_ids'"):
        read_prefix_trace(write(tmp_path, [{k: v for k, v in one.items() if k != "hash_ids"} for one in ROWS]))
    vidur = tmp_path / "v.csv"
    vidur.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0,1,1\n")
    with pytest.raises(ConfigError, match=r"vidur format, must be mooncake's"):
        read_prefix_trace(vidur)
    with pytest.raises(ConfigError, match="block_tokens: 0, must be an integer from 1"):
        read_prefix_trace(vidur, block_tokens=0)


# --- beginnings -------------------------------------------------------------------------------------


def test_beginnings_in_common(tmp_path: Path) -> None:
    partner, shared = common_beginnings(read_prefix_trace(write(tmp_path, ROWS)))
    assert partner.tolist() == [-1, 0, 0, 0, 2]
    assert shared.tolist() == [0, 512, 1024, 1100, 1300], "a whole prompt is its tokens, not its blocks'"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=30), st.integers(1, 5))
def test_beginnings_are_the_longest(prompts: list[list[int]], size: int) -> None:
    count = len(prompts)
    tokens = np.array([len(one) * size for one in prompts], np.int32)
    trace = PrefixTrace("made", np.arange(count, dtype=np.float64), tokens, np.ones(count, np.int32), tuple(map(tuple, prompts)), size)
    partner, shared = common_beginnings(trace)

    def common(a: list[int], b: list[int]) -> int:
        return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))

    for i, prompt in enumerate(prompts):
        lengths = [common(prompt, other) for other in prompts[:i]]
        longest = max(lengths, default=0)
        assert shared[i] == longest * size
        assert partner[i] == (lengths.index(longest) if longest else -1)


# --- recorded calls ---------------------------------------------------------------------------------


def test_a_trace_as_calls(tmp_path: Path) -> None:
    source = RecordedCalls.read(write(tmp_path, ROWS))
    (chunk,) = source.chunks(0)
    chunk.check()
    assert chunk.lasting and source.app_tokens.size == 0
    assert chunk.start.tolist() == [0, 3, 6, 9, 9] and chunk.prompt_tokens.tolist() == [1100, 600, 1300, 1100, 2000]
    assert chunk.node_parent.tolist() == [-1, 0, 0, 0, 2] and (chunk.parent == -1).all()
    (few,) = source.chunks(0, num_calls=2)
    assert len(few) == 2 and few.node_parent.tolist() == [-1, 0]
    (fast,) = source.chunks(0, rate=2 * source.rate)
    np.testing.assert_allclose(fast.start, chunk.start / 2)
    assert len(next(iter(source.chunks(0, num_calls=10**6)))) == 5
    assert source.statistics.prompt @ source.statistics.weight == pytest.approx(chunk.prompt_tokens.mean())


def test_what_is_too_long_is_left_out_and_is_nobodys_parent(tmp_path: Path) -> None:
    (chunk,) = RecordedCalls.read(write(tmp_path, ROWS), max_tokens=1_150).chunks(0)
    assert chunk.prompt_tokens.tolist() == [600, 1100] and chunk.node_parent.tolist() == [-1, 0] and chunk.node_shared.tolist() == [0, 512]
    with pytest.raises(ConfigError, match=r"recorded.max_tokens: 100, but every request of .* is longer"):
        RecordedCalls.read(tmp_path / "trace.jsonl", max_tokens=100)
    with pytest.raises(ConfigError, match=r"recorded.trace: 'x', must be a PrefixTrace"):
        RecordedCalls("x")  # type: ignore[arg-type]


def test_jitter_is_drawn_from_the_seed(tmp_path: Path) -> None:
    source = RecordedCalls.read(write(tmp_path, ROWS), jitter_seconds=3.0)
    first, again, other = (next(iter(source.chunks(seed))) for seed in (1, 1, 2))
    assert first.start.tobytes() == again.start.tobytes() != other.start.tobytes()
    spread = first.start - np.array([0, 3, 6, 9, 9])
    assert (spread >= 0).all() and (spread < 3).all()
    first.check()


# --- turns ------------------------------------------------------------------------------------------


def test_turns_are_found_by_whole_blocks(tmp_path: Path) -> None:
    turns = build_sessions.find_turns(read_prefix_trace(write(tmp_path, ROWS)))
    assert turns.before.tolist() == [-1, -1, 0, -1, 3]
    assert turns.edited.tolist() == [False, False, False, True, False], "the repeated request"
    assert turns.number.tolist() == [1, 1, 2, 1, 2] and turns.head.tolist() == [0, 1, 0, 3, 3]
    assert turns.begins.tolist() == [True, False, False, False, False], "too short, a next turn, repeated, a next turn"


def test_statistics_need_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    arguments = [str(write(tmp_path, ROWS)), "--sessions", "--name", "mooncake-sessions", "--out", str(out)]
    assert build_statistics.main(arguments) == 2 and not out.exists()
    assert "2 requests go on with an earlier one, must be at least 100" in capsys.readouterr().err
    assert build_statistics.main([*arguments, "--max-total", "4096"]) == 2 and "--max-total: not with --sessions" in capsys.readouterr().err
    arguments[3] = "mooncake"
    assert build_statistics.main(arguments) == 2 and "give --source and --licence" in capsys.readouterr().err


def test_sessions_of_known_shape_are_found(tmp_path: Path) -> None:
    """60 sessions of three turns: 1,200 tokens, then 50 new after answers of 40; 30 s apart."""
    rows = []
    for session in range(60):
        ids = [0] + [10 * session + i for i in range(1, 9)]
        for turn in range(3):
            prompt = 1_200 + 90 * turn
            filled = [*ids[: prompt // 512], 10**6 + 10 * session + turn]
            rows.append(row(100_000 * session + 30_000 * turn, prompt, 40, filled))
    trace = read_prefix_trace(write(tmp_path, rows))
    record = build_sessions.build_sessions(trace, "mine", Source("made up", "none"))
    assert record["turn_shares"] == [0.0, 0.0, 1.0]
    assert record["means"] == {"turns": 3.0, "seconds": 30.0, "first_prompt": 688.0, "new_tokens": 50.0, "output_tokens": 40.0}
    assert set(record["quantiles"]["new_tokens"]) == {50.0}


def test_the_shipped_statistics_say_where_they_are_from() -> None:
    text = SHIPPED.read_text(encoding="utf-8")
    record = json.loads(text)
    provenance = record["provenance"]
    assert len(text) < 10_000 and record["name"] == SHIPPED.stem
    assert "kvcache-ai/Mooncake @ 3b5a594133958449a1feaf1c9e0fc1b553e34a28" in provenance["source"]
    assert provenance["licence"].startswith("Apache-2.0") and provenance["rows"] == 12_031
    assert "3 s" in provenance["seconds"] and provenance["turns"]
    known = load_session_statistics()
    assert known.mean_turns == pytest.approx(record["means"]["turns"], rel=1e-3)
    for name, mean in record["means"].items():
        if name != "turns":  # Hazen's quantiles keep the mean under linear interpolation, and rounding costs little
            middle = (np.arange(100_000) + 0.5) / 100_000
            assert known.at(name, middle).mean() == pytest.approx(mean, rel=0.06)


def test_the_script_rebuilds_the_statistics_byte_for_byte(tmp_path: Path) -> None:
    out = tmp_path / "sessions.json"
    assert build_statistics.main([str(raw_mooncake()), "--sessions", "--name", "mooncake-sessions", "--out", str(out)]) == 0
    assert out.read_bytes() == SHIPPED.read_bytes()


def test_the_real_trace_as_calls() -> None:
    source = RecordedCalls.read(raw_mooncake())
    (chunk,) = source.chunks(0)
    chunk.check()
    known = load_scenario("mooncake").lengths.record["provenance"]
    assert len(chunk) == known["rows_kept"] == 11_185
    assert chunk.prompt_tokens.mean() == pytest.approx(known["mean_prompt"], abs=0.01)
    # One request begins like no other; all others have at least the block that all begin with.
    assert (chunk.node_parent == -1).sum() == 1 and (chunk.node_shared[1:] >= 512).all()
    assert (chunk.node_shared <= chunk.prompt_tokens).all()
