"""Replays that serve less than their trace, reject what cannot be served, and read their own output back."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llmsched_baselines import policy_names
from llmsched_env.cli import replay

HEADER = "arrived_at,num_prefill_tokens,num_decode_tokens"

Replay = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Replay:
    """``replay.py`` as a function of its words: (exit status, stdout, stderr)."""

    def call(trace: Path, policy: str, out: Path, *words: object) -> tuple[int, str, str]:
        code = replay.main([str(w) for w in ("--trace", trace, "--policy", policy, "--out", out, *words)])
        text, err = capsys.readouterr()
        return code, text, err

    return call


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: list[tuple[object, ...]], header: str = HEADER) -> Path:
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n", encoding="utf-8")
    return path


def some_rows(origin: float = 0.0, count: int = 40) -> list[tuple[object, ...]]:
    """Requests enough to fill a small cache, two of them longer than 6,400 tokens."""
    rng = np.random.default_rng(3)
    times = np.round(origin + np.cumsum(rng.exponential(0.05, count)), 6).tolist()
    prompts, outputs = rng.integers(5, 700, count), rng.integers(1, 120, count)
    prompts[[7, 21]] = 10_000, 6_390
    return list(zip(times, prompts.tolist(), outputs.tolist(), strict=True))


# --- served in part -------------------------------------------------------------------------------


def test_a_replay_cut_off_fails_and_says_how_to_go_on(tmp_path: Path, run: Replay) -> None:
    trace = write(tmp_path / "t.csv", [(i, 10, 30) for i in range(10)])
    out = tmp_path / "out.csv"
    code, text, err = run(trace, "vllm", out, "--max-iterations", 100)
    rows = rows_of(out)
    left = [r["completed"] for r in rows].count("0")
    assert code == 1 and 0 < left < 10 and len(rows) == 10, "the rows are written all the same"
    assert err.splitlines()[-1].startswith(f"error: {left} of 10 requests were never served: the replay was cut off after 100 iterations; ")
    assert "--max-iterations" in err and f"{left} left" in text
    code, text, err = run(trace, "vllm", out, "--max-iterations", 1000)
    assert code == 0 and err == "" and "10 completed, 0 rejected, 0 left" in text


def test_the_default_limit_grows_with_the_trace(tmp_path: Path) -> None:
    for count, tokens, at_least in ((3, 100, 10_000_000), (1000, 2**29, 4 * 1000 * 2**29)):
        trace = write(tmp_path / "t.csv", [(i, tokens, 10) for i in range(count)])
        options = replay.ReplayTrace(
            trace=trace, policy="fcfs", engine="paper", set=(("engine.oversize=reject",),), out=tmp_path / "out.csv"
        )
        assert replay.plan(options).limits.max_iterations >= at_least


@pytest.mark.parametrize("limit", [0, -1, 10**30])
def test_limits_out_of_range_are_refused(tmp_path: Path, run: Replay, limit: int) -> None:
    code, _, err = run(write(tmp_path / "t.csv", [(0, 4, 5)]), "vllm", tmp_path / "out.csv", "--max-iterations", limit)
    assert code == 2 and err == f"error: --max-iterations: {limit}, must be an integer from 1 to 2**62\n"


@pytest.mark.parametrize(("policy", "words", "reason"), [("vllm", ("--horizon", 2), "--horizon"), ("wait", ("--no-drain",), "--no-drain")])
def test_what_an_option_leaves_out_is_noted(tmp_path: Path, run: Replay, policy: str, words: tuple[object, ...], reason: str) -> None:
    trace = write(tmp_path / "t.csv", [(i, 100, 30) for i in range(10)])
    settings = ("--set", "policy.thresholds=3") if policy == "wait" else ()
    code, text, err = run(trace, policy, tmp_path / "out.csv", *words, *settings)
    left = [r["completed"] for r in rows_of(tmp_path / "out.csv")].count("0")
    assert code == 0 and left > 0 and f"{left} left" in text
    assert f"note: {left} of 10 requests were never served ({reason})" in err


def test_rows_dropped_and_put_in_order_are_reported(tmp_path: Path, run: Replay) -> None:
    trace = write(tmp_path / "t.csv", [(1_700_000_000, 4, 5), (1_700_000_002, 4, 0), (1_700_000_001.9, 6, 5), (1_700_000_001.8, 8, 5)])
    out = tmp_path / "out.csv"
    code, _, err = run(trace, "vllm", out)
    assert code == 2 and ":3: column 'num_decode_tokens': value '0' must be" in err and "--invalid-rows drop" in err and not out.exists()
    code, text, err = run(trace, "vllm", out, "--invalid-rows", "drop")
    assert code == 0 and err == ""
    lines = {line[:12].strip(): line[13:] for line in text.splitlines()}
    assert lines["clock"].startswith("0 is 1700000000 s on the trace's clock")
    assert lines["reordered"].startswith("1 rows")
    assert lines["dropped"].startswith("1 rows of the trace: 1 invalid, the first at line 3: column 'num_decode_tokens'")
    assert lines["requests"].startswith("3 (3 completed")
    assert [r["prompt_tokens"] for r in rows_of(out)] == ["4", "8", "6"]
    assert [float(r["arrived_at"]) for r in rows_of(out)] == pytest.approx([0, 1.8, 1.9], abs=1e-6)


def test_the_clock_options_reach_the_reader(tmp_path: Path, run: Replay) -> None:
    trace = write(tmp_path / "t.csv", [(0, 4, 5), (90_000, 4, 5), (30_000, 4, 5)])
    out = tmp_path / "out.csv"
    assert run(trace, "vllm", out, "--time-unit", "ms")[0] == 2
    assert run(trace, "vllm", out, "--time-unit", "ms", "--reorder-seconds", 60)[0] == 0
    assert [float(r["arrived_at"]) for r in rows_of(out)] == [0.0, 30.0, 90.0]
    code, _, err = run(trace, "vllm", out, "--reorder-seconds", "nan")
    assert code == 2 and "reorder_seconds" in err


# --- requests that are too long -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "words", "rejected", "limit"),
    [
        ("vllm", ("engine.num_blocks=400",), 2, "6400 of the KV capacity"),
        ("vllm", ("engine.num_blocks=200",), 2, "3200 of the KV capacity"),
        ("sarathi", ("engine.num_blocks=600", "engine.decode_needs_free_block=true"), 1, "9584 of the KV capacity"),
        ("vllm", ("engine.max_model_len=7000",), 1, "7000 of engine.max_model_len"),
        ("vllm", ("engine.enable_chunked_prefill=false",), 2, "2048 of engine.max_num_batched_tokens"),
        ("vllm-v0", ("engine.num_blocks=500",), 1, "8000 of the KV capacity"),
        ("fcfs", ("engine.capacity_tokens=5000",), 2, "5000 of engine.capacity_tokens"),
    ],
)
@pytest.mark.filterwarnings("ignore::llmsched_env.perf.CalibrationRangeWarning")
def test_oversize_requests_are_refused_in_words_that_help_or_rejected_alone(
    tmp_path: Path, run: Replay, policy: str, words: tuple[str, ...], rejected: int, limit: str
) -> None:
    trace, out = write(tmp_path / "t.csv", some_rows()), tmp_path / "out.csv"
    engine = ("--engine", "paper" if policy == "fcfs" else "vllm")
    code, _, err = run(trace, policy, out, *engine, "--set", *words)
    assert code == 2 and not out.exists()
    assert f"request 7 needs 10000 prompt + {some_rows()[7][2]} output tokens, more than the {limit}" in err
    assert f"({rejected} such requests)" in err and "--set engine.oversize=reject" in err
    code, text, err = run(trace, policy, out, *engine, "--set", *words, "engine.oversize=reject")
    assert code == 0 and f"{40 - rejected} completed, {rejected} rejected, 0 left" in text
    assert f"note: {rejected} of 40 requests were rejected, longer than {limit.split()[0]} tokens" in err
    rows = rows_of(out)
    assert len(rows) == 40 and [r["completed"] for r in rows].count("0") == rejected
    assert rows[7]["admitted_at"] == rows[7]["ttft"] == rows[7]["e2e"] == ""


def test_a_cache_smaller_than_the_default_model_length_serves_short_requests(tmp_path: Path, run: Replay) -> None:
    code, text, err = run(write(tmp_path / "t.csv", [(0, 90, 9)]), "vllm", tmp_path / "out.csv", "--set", "engine.num_blocks=100")
    assert code == 0 and "1 completed" in text and "engine.max_model_len = 1600, the KV capacity" in err


# --- its own output -------------------------------------------------------------------------------

ORIGINALS = {
    "plain": (HEADER, some_rows(), ()),
    "unix": (HEADER, some_rows(1.7e9), ()),
    "rate": (HEADER, some_rows(50.0), ("--rate", 7.3)),
    "typed": (
        "arrived_at,prompt_tokens,output_tokens,type,request_id",
        [(*row, ("long", "chat")[i % 2], f'"id, {i}"') for i, row in enumerate(some_rows())],
        (),
    ),
    "lengths": ("question_length,answer_length", [row[1:] for row in some_rows()], ("--rate", 20)),
    "cut off": (HEADER, some_rows(), ("--max-iterations", 100)),
}


@pytest.mark.parametrize(
    ("original", "policy"), [*((o, "wait-cp") for o in ORIGINALS), *(("typed", p) for p in policy_names() if p != "wait-cp")]
)
@pytest.mark.filterwarnings("ignore::llmsched_env.perf.CalibrationRangeWarning")
def test_a_replay_of_the_output_gives_the_same_times(tmp_path: Path, run: Replay, original: str, policy: str) -> None:
    header, rows, words = ORIGINALS[original]
    trace, first, second = write(tmp_path / "t.csv", list(rows), header), tmp_path / "first.csv", tmp_path / "second.csv"
    settings = ("--set", "engine.num_blocks=300", "engine.oversize=reject")
    code, _, err = run(trace, policy, first, *settings, *words)
    assert code == (1 if original == "cut off" else 0), err
    kept = words if original == "cut off" else ()
    assert run(first, policy, second, *settings, *kept)[0] == code
    assert first.read_bytes() == second.read_bytes()
    table = rows_of(first)
    assert float(table[0]["arrived_at"]) == 0.0
    if original == "typed":
        assert table[3]["request_id"] == "id, 3" and [r["type"] for r in table[:2]] == ["long", "chat"]
    else:
        assert "type" not in table[0] and table[3]["request_id"] == "3"


@pytest.mark.parametrize("option", ["--out", "--iterations"])
def test_plain_text_is_not_named_gz(tmp_path: Path, run: Replay, option: str) -> None:
    code, _, err = run(write(tmp_path / "t.csv", [(0, 4, 5)]), "vllm", tmp_path / "out.csv", option, tmp_path / "x.csv.gz")
    assert code == 2 and err.startswith(f"error: {option}: ") and "must not be named .gz" in err


def test_a_request_too_long_is_refused_before_tables_of_its_length_are_made(tmp_path: Path, run: Replay) -> None:
    code, _, err = run(write(tmp_path / "t.csv", [(0, 1, 2**30)]), "reserve", tmp_path / "out.csv")
    assert code == 2 and "request 0 needs 1 prompt + 1073741824 output tokens, more than the 118784 of the KV capacity" in err


# --- any policy -----------------------------------------------------------------------------------


def test_a_shipped_agent_and_a_policy_of_ones_own_serve_a_trace(tmp_path: Path, run: Replay, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = write(tmp_path / "t.csv", [(0.1 * i, 100 + i, 20) for i in range(20)])
    code, text, err = run(trace, "generalist", tmp_path / "agent.csv")
    assert code == 0, err
    assert "generalist" in text and "20 completed" in text and len(rows_of(tmp_path / "agent.csv")) == 20
    (tmp_path / "my_policies.py").write_text(
        "from llmsched_baselines.greedy import Vllm\nclass Mine(Vllm):\n    name = 'mine'\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    code, text, err = run(trace, "my_policies:Mine", tmp_path / "mine.csv")
    assert code == 0 and "mine" in text, err
    assert run(trace, "vllm", tmp_path / "vllm.csv")[0] == 0
    assert (tmp_path / "mine.csv").read_bytes() == (tmp_path / "vllm.csv").read_bytes()
    for policy, words in (("generalist", ("--set", "policy.theta=1")), ("my_policies:Other", ()), (tmp_path, ())):
        code, _, err = run(trace, policy, tmp_path / "none.csv", *words)
        assert code == 2 and err.startswith("error: ") and not (tmp_path / "none.csv").exists()


def test_a_replay_can_be_read_by_other_programs(tmp_path: Path, run: Replay) -> None:
    trace = write(tmp_path / "t.csv", [(i, 10, 30) for i in range(10)])
    code, text, _ = run(trace, "vllm", tmp_path / "out.csv", "--json", "-")
    record = json.loads(text)
    assert code == 0 and record["command"].startswith("llmsched replay --trace")
    assert record["found"]["policy"] == "vllm" and record["found"]["summary"]["completed"] == 10
    rows = rows_of(tmp_path / "out.csv")
    mean = sum(float(r["e2e"]) for r in rows) / len(rows)
    assert record["found"]["summary"]["latency_mean"] == pytest.approx(mean)
    code, text, err = run(trace, "vllm", tmp_path / "out.csv", "--quiet")
    assert (code, text, err) == (0, "", "")


def test_rows_of_iterations_scheduled_ahead_hold_the_time_in_which_they_ran(tmp_path: Path, run: Replay) -> None:
    """Where requests come one by one, iterations and their seconds are those of the synchronous engine, but for superfluous tokens."""
    trace = write(tmp_path / "t.csv", [(10.0 * i, 300 + i, 20) for i in range(4)])
    found = {}
    for name, words in (("sync", ()), ("async", ("--set", "engine.async_scheduling=true"))):
        out, steps = tmp_path / f"{name}.csv", tmp_path / f"{name}-iterations.csv"
        assert run(trace, "vllm", out, "--iterations", steps, *words)[0] == 0
        found[name] = [(float(r["start"]), float(r["duration"]), int(r["total_tokens"])) for r in rows_of(steps)]
        assert all(start + seconds <= later[0] + 1e-9 for (start, seconds, _), later in zip(found[name], found[name][1:], strict=False))
    assert len(found["sync"]) == 4 * 20 and len(found["async"]) == 4 * 20 + 3  # the last superfluous token ends after the episode
    assert set(found["sync"]) <= set(found["async"])
