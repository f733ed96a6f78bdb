"""The programs a person runs: what they write, what they refuse, and what Ctrl-C leaves behind."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llmsched_agents.lookup import NamedPolicy, named_policies, option_owners
from llmsched_baselines.overrides import Overrides, parse_overrides
from llmsched_env import parallel
from llmsched_env.backend import View
from llmsched_env.bench.comparison import Comparison, Row, Task, chunks, record, run_tasks
from llmsched_env.bench.tables import cells
from llmsched_env.cli import compare, replay
from llmsched_env.errors import require
from llmsched_env.files import replacing
from llmsched_env.parallel import _in_waves
from llmsched_env.row_file import RowFile, columns, read_rows
from llmsched_env.runner import run_episode
from llmsched_env.types import IterationReport
from llmsched_env.workload import load_scenario

ROOT = Path(__file__).resolve().parents[1]
SUMMARY_HEADING = (
    "scenario,policy,rate,seed,requests,completed,rejected,throughput_tok_s,throughput_req_s,latency_mean,latency_p50,latency_p95,"
    "latency_p99,latency_max,slowdown_jain,ttft_mean,ttft_p50,ttft_p95,ttft_p99,tpot_mean,tpot_p50,tpot_p95,tpot_p99,slo_goodput,evictions,forced_evictions,"
    "kv_mean,kv_max,sim_seconds,iterations,idle_steps,drain_iterations,out_of_range,truncated,end,wall_seconds,known_lengths,notes"
)
REQUESTS_HEADING = "request_id,arrived_at,prompt_tokens,output_tokens,admitted_at,ttft,e2e,evictions,completed"
ITERATIONS_HEADING = "start,duration,batch_size,prefill_tokens,total_tokens,kv_used,queue_length"

Program = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run_compare(capsys: pytest.CaptureFixture[str]) -> Program:
    return in_process(compare.main, capsys)


@pytest.fixture
def run_replay(capsys: pytest.CaptureFixture[str]) -> Program:
    return in_process(replay.main, capsys)


def in_process(main: Callable[[Sequence[str]], int], capsys: pytest.CaptureFixture[str]) -> Program:
    """A program as a function of its words: (exit code, stdout, stderr)."""

    def call(*words: object) -> tuple[int, str, str]:
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


def subprocess_run(script: str, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"scripts/{script}.py", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def write_trace(path: Path, rows: Sequence[tuple[object, ...]], header: str = "arrived_at,num_prefill_tokens,num_decode_tokens") -> Path:
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    rng = np.random.default_rng(5)
    times = np.round(np.cumsum(rng.exponential(0.25, 60)), 6)
    rows = zip(times.tolist(), rng.integers(1, 900, 60).tolist(), rng.integers(1, 200, 60).tolist(), strict=True)
    return write_trace(tmp_path / "trace.csv", list(rows))


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def named(*texts: str) -> dict[str, NamedPolicy]:
    return named_policies("--policies", texts)


SMALL = ("--scenario", "azure-conv", "--seeds", 2, "--num-requests", 40, "--jobs", 1)


# --- compare --------------------------------------------------------------------------------------


def test_compare_writes_rows_plots_and_a_report_that_needs_nothing_else(tmp_path: Path, run_compare: Program) -> None:
    out = tmp_path / "deep" / "folder"
    code, text, _ = run_compare(*SMALL, "--rates", 4, 12, "--policies", "vllm", "wait", "nested-wait", "--out", out)
    assert code == 0
    assert sorted(p.name for p in out.iterdir()) == sorted(["summary.csv", "settings.json", "report.html", *compare.FIGURES])
    rows = read_csv(out / "summary.csv")
    assert ",".join(rows[0]) == SUMMARY_HEADING == ",".join(columns(Row))
    assert [(r["rate"], r["policy"], r["seed"]) for r in rows] == [
        (rate, policy, seed) for rate in ("4.0", "12.0") for policy in ("vllm", "wait", "nested-wait") for seed in "01"
    ]
    assert all(r["requests"] == r["completed"] == "40" for r in rows)
    assert {r["policy"]: r["known_lengths"] for r in rows} == {"vllm": "False", "wait": "True", "nested-wait": "False"}
    for name in compare.FIGURES:
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert "wait [known lengths" in text and "known lengths: the policy is told" in text
    assert str(out / "report.html") in text
    html = (out / "report.html").read_text(encoding="utf-8")
    assert html.count("data:image/png;base64,") == 4
    assert not re.search(r"""(src|href)=["'](?!data:)""", html)
    assert "latency max (s)" in html and "Jain&#39;s index of latency per output token" in html
    assert "known lengths" in html and "overload" in html and "llmsched compare --scenario azure-conv" in html


def test_the_same_seed_gives_every_policy_the_same_requests(tmp_path: Path, run_compare: Program) -> None:
    # On this engine fcfs and vllm decide alike, so equal requests must give equal figures, and another seed others.
    assert run_compare(*SMALL, "--rates", 5, "--policies", "vllm", "fcfs", "--out", tmp_path, "--quiet")[0] == 0
    rows = {(r["policy"], r["seed"]): r for r in read_csv(tmp_path / "summary.csv")}
    apart = {"policy", "wall_seconds"}
    for seed in "01":
        first, second = rows["vllm", seed], rows["fcfs", seed]
        assert {k: v for k, v in first.items() if k not in apart} == {k: v for k, v in second.items() if k not in apart}
    assert rows["vllm", "0"]["latency_mean"] != rows["vllm", "1"]["latency_mean"]


def test_worker_processes_and_one_process_give_the_same_rows(tmp_path: Path, run_compare: Program) -> None:
    for jobs in (1, 2):
        words = (*SMALL[:-1], jobs, "--rates", 5, "--policies", "sarathi", "mc-sf", "--out", tmp_path / str(jobs), "--quiet")
        assert run_compare(*words)[0] == 0
    one, two = (read_rows(tmp_path / jobs / "summary.csv", Row) for jobs in "12")
    assert [dataclasses.replace(r, wall_seconds=0) for r in one] == [dataclasses.replace(r, wall_seconds=0) for r in two]


def test_an_existing_comparison_is_kept_resumed_or_overwritten_as_asked(tmp_path: Path, run_compare: Program) -> None:
    words = (*SMALL, "--policies", "vllm", "sarathi", "--out", tmp_path, "--quiet")
    assert run_compare(*words, "--rates", 5)[0] == 0
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    code, _, err = run_compare(*words, "--rates", 5)
    assert code == 2 and err.startswith("error: --out:") and "--resume" in err
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    # other settings must not be mixed in
    code, _, err = run_compare(*words, "--rates", 5, "--resume", "--set", "engine.num_blocks=2816")
    assert code == 2 and "engine.num_blocks" in err
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    kept = (tmp_path / "summary.csv").read_text(encoding="utf-8").splitlines()
    # a kill may cut the last line off: it is run again
    (tmp_path / "summary.csv").write_text("\n".join([*kept[:3], kept[3][:20]]), encoding="utf-8")
    assert run_compare(*words, "--rates", 5, 6, "--resume")[0] == 0
    resumed = (tmp_path / "summary.csv").read_text(encoding="utf-8").splitlines()
    assert len(resumed) == 1 + 8
    assert set(kept[:3]) <= set(resumed)  # the rows that were finished are not run again: even their wall time is the same
    assert kept[3] not in resumed
    assert run_compare(*words, "--rates", 6, "--overwrite")[0] == 0
    assert {r.rate for r in read_rows(tmp_path / "summary.csv", Row)} == {6.0}


def test_a_trace_is_compared_at_its_own_rate_and_at_others(tmp_path: Path, trace: Path, run_compare: Program) -> None:
    own = tmp_path / "own"
    assert run_compare("--trace", trace, "--policies", "vllm", "--jobs", 1, "--out", own, "--quiet")[0] == 0
    (row,) = read_rows(own / "summary.csv", Row)
    times = np.loadtxt(trace, delimiter=",", skiprows=1)[:, 0]
    assert row.figures.requests == row.figures.completed == 60
    assert row.rate == pytest.approx(59 / (times[-1] - times[0]))
    assert row.scenario == "trace"
    scaled = tmp_path / "scaled"
    assert run_compare("--trace", trace, "--rates", 1, 2, "--seeds", 2, "--policies", "vllm", "--jobs", 1, "--out", scaled)[0] == 0
    rows = {(r.rate, r.seed): r for r in read_rows(scaled / "summary.csv", Row)}
    assert rows[1.0, 0].figures.sim_seconds > 1.5 * rows[2.0, 0].figures.sim_seconds
    assert rows[1.0, 0].figures.latency_mean == rows[1.0, 1].figures.latency_mean
    assert "every seed is the same run" in (scaled / "report.html").read_text(encoding="utf-8")


def test_rows_that_cannot_be_right_are_refused_or_left_out_and_counted(tmp_path: Path, run_compare: Program) -> None:
    path = write_trace(tmp_path / "bad.csv", [(0.0, 10, 5), (1.0, 0, 5), (2.0, 10, 5)])
    words = ("--trace", path, "--policies", "vllm", "--jobs", 1, "--quiet", "--out", tmp_path / "out")
    code, _, err = run_compare(*words)
    assert code == 2 and "--invalid-rows drop" in err
    code, text, _ = run_compare(*words, "--invalid-rows", "drop")
    assert code == 0 and "1 rows of the trace are left out" in text
    (row,) = read_rows(tmp_path / "out" / "summary.csv", Row)
    assert row.figures.requests == 2


def test_user_settings_reach_engine_and_policy(tmp_path: Path, run_compare: Program) -> None:
    words = ("--rates", 5, "--policies", "sarathi", "reserve", "--out", tmp_path, "--quiet")
    settings = ("engine.num_blocks=400", "policy.sarathi.budget=256", "policy.reserve.theta=0.3")
    assert run_compare(*SMALL, *words, "--set", *settings)[0] == 0
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "num_blocks = 400" in html and "policy.reserve.theta = 0.3" in html
    assert "max_num_batched_tokens = 256" in html
    policies = named("sarathi", "reserve")
    overrides = parse_overrides(settings, option_owners(policies))
    comparison = Comparison(load_scenario("azure-conv"), policies, (5.0,), (0,), 40, overrides)
    engine = comparison.policy("sarathi", 5.0).engine
    assert (engine.num_blocks, engine.max_num_batched_tokens) == (400, 256)
    # the memory of the rows is that of the setting: the same KV is a larger share of it
    assert all(row.figures.kv_max > 0.5 for row in read_rows(tmp_path / "summary.csv", Row) if row.policy == "sarathi")


def test_a_row_is_on_disk_as_soon_as_it_is_appended(tmp_path: Path, run_compare: Program) -> None:
    assert run_compare(*SMALL, "--rates", 5, "--policies", "vllm", "--out", tmp_path, "--quiet")[0] == 0
    path = tmp_path / "summary.csv"
    first, second = read_rows(path, Row)
    with RowFile(path, Row, resume=False) as file:
        file.append(second)
        assert read_rows(path, Row) == [second]
        file.append(first)
        assert read_rows(path, Row) == [second, first]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--rates", "-1"), ["--rates", "-1", "> 0"]),
        (("--rates", "nan"), ["--rates", "nan"]),
        (("--rates", "4", "inf"), ["--rates", "inf"]),
        (("--policies", "saraty"), ["saraty", "'sarathi'"]),
        (("--scenario", "azure-con"), ["azure-con", "'azure-conv'"]),
        (("--seeds", "0"), ["--seeds", ">= 1"]),
        (("--num-requests", "-5"), ["--num-requests", ">= 1"]),
        (("--jobs", "0"), ["--jobs"]),
        (("--set", "engine.num_block=3"), ["engine.num_block", "'num_blocks'"]),
        (("--set", "engine.num_blocks=3.5"), ["engine.num_blocks", "3.5", "integer"]),
        (("--set", "engine.num_blocks=10"), ["max_model_len"]),
        (("--set", "policy.wait.slack=2"), ["policy.wait.slack", "wait"]),
        (("--set", "policy.budget=2"), ["policy.budget", "policy.vllm.budget"]),
        (("--set", "num_blocks=2"), ["num_blocks"]),
        (("--policies", "wait", "--set", "policy.thresholds=1,2,3"), ["thresholds", "3"]),
        (("--policies", "wait", "--set", "policy.slack=-1"), ["slack"]),
    ],
)
def test_compare_refuses_before_any_work(tmp_path: Path, run_compare: Program, words: tuple[str, ...], expected: list[str]) -> None:
    base = {"--scenario": ["azure-conv"], "--rates": ["5"], "--policies": ["vllm", "sarathi"], "--out": [str(tmp_path / "out")]}
    base["--num-requests"] = ["20"]
    option = ""
    for word in words:
        if word.startswith("--"):
            option = word
            base[option] = []
        else:
            base[option].append(word)
    code, out, err = run_compare(*(word for name, values in base.items() for word in (name, *values)))
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1
    assert out == ""
    for part in expected:
        assert part in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--rates", "zero"), ["--rates", "zero"]),
        (("--backend", "rai"), ["--backend", "rai", "ray"]),
        (("--polices", "vllm"), ["--polices"]),
        (("--trace", "x.csv"), ["--scenario", "--trace"]),
        (("--resume", "--overwrite"), ["--resume", "--overwrite"]),
    ],
)
def test_words_that_cannot_be_read_are_refused(tmp_path: Path, run_compare: Program, words: tuple[str, ...], expected: list[str]) -> None:
    out = tmp_path / "out"
    code, text, err = run_compare("--scenario", "azure-conv", "--policies", "vllm", "--out", out, *words)
    assert code == 2 and text == ""
    assert all(part in err for part in expected)
    assert not out.exists()


def test_json_holds_the_rows_and_nothing_else_is_on_standard_output(tmp_path: Path, run_compare: Program) -> None:
    words = (*SMALL, "--rates", 5, "--policies", "vllm", "--out", tmp_path / "out", "--json", "-")
    code, text, _ = run_compare(*words)
    assert code == 0
    record = json.loads(text)
    assert record["command"].startswith("llmsched compare --scenario azure-conv")
    assert [row["seed"] for row in record["found"]] == [0, 1]
    rows = read_rows(tmp_path / "out" / "summary.csv", Row)
    assert [row["figures"]["latency_mean"] for row in record["found"]] == [row.figures.latency_mean for row in rows]


def own_policy(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> str:
    """A policy in a module of one's own, as ``module:attribute``."""
    name = f"llmsched_own_{folder.name.replace('-', '_')}"
    source = "from llmsched_baselines import Policy\nfrom llmsched_env import Decision\n\n\nclass Own(Policy):\n    name = 'own'\n\n"
    (folder / f"{name}.py").write_text(f"{source}    def decide(self, view):\n        {body}\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder))
    sys.modules.pop(name, None)
    return f"{name}:Own"


GREEDY = "return Decision.of(run=[1], admit=[100])"


def test_a_policy_that_fails_is_named_with_its_own_traceback_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_compare: Program
) -> None:
    given = own_policy(tmp_path, monkeypatch, "return {}['load'] if view.clock > 1 else Decision.of(run=[1], admit=[100])")
    for jobs in (1, 2):
        words = (*SMALL[:-1], jobs, "--rates", 5, "--policies", "vllm", given, "--out", f"out{jobs}", "--quiet")
        command = [sys.executable, "-m", "llmsched_env.cli", "compare", *map(str, words)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        err = done.stderr
        assert done.returncode == 1
        assert err.splitlines()[-1].startswith("error: policy 'own' at rate 5, seed ") and "KeyError: 'load'" in err.splitlines()[-1]
        assert "return {}['load']" in err and "joblib" not in err
    for body, expected in (("return 3", "decision: int, must be a Decision"), ("raise SystemExit(0)", "SystemExit: 0")):
        given = own_policy(tmp_path, monkeypatch, body)
        code, _, err = run_compare(*SMALL, "--rates", 5, "--policies", given, "--out", tmp_path / "other", "--quiet")
        assert code == 1 and "policy 'own'" in err and expected in err


def test_a_policy_that_never_schedules_is_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_compare: Program) -> None:
    given = own_policy(tmp_path, monkeypatch, "return Decision.of(run=[0], admit=[0])")
    assert run_compare(*SMALL, "--rates", 5, "--policies", given, "--out", tmp_path / "out", "--quiet")[0] == 0
    assert all("scheduled nothing in" in row.notes for row in read_rows(tmp_path / "out" / "summary.csv", Row))


def test_what_stands_for_something_else_by_now_is_not_mixed_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_compare: Program
) -> None:
    text = "[lengths]\nlognormal = { prompt_mean = 180, prompt_sigma = 1.0, output_mean = 320, output_sigma = 0.8, max_total = 4096 }\n"
    file = tmp_path / "own.toml"
    file.write_text(text + "[arrivals]\nrate = 5.0\n", encoding="utf-8")
    given = own_policy(tmp_path, monkeypatch, GREEDY)
    words = ("--scenario", file, "--num-requests", 30, "--jobs", 1, "--quiet", "--out", tmp_path / "out", "--policies", "vllm", given)
    assert run_compare(*words, "--seeds", 1)[0] == 0
    assert run_compare(*words, "sarathi", "--seeds", 2, "--resume")[0] == 0  # more seeds and policies may come
    own_policy(tmp_path, monkeypatch, "return Decision.of(run=[1], admit=[1])")
    code, _, err = run_compare(*words, "--seeds", 3, "--resume")
    assert code == 2 and "--resume: policy 'own' is" in err
    own_policy(tmp_path, monkeypatch, GREEDY)
    file.write_text(text.replace("180", "900") + "[arrivals]\nrate = 5.0\n", encoding="utf-8")
    code, _, err = run_compare(*words, "--seeds", 3, "--resume")
    assert code == 2 and "--resume: content is" in err


def test_one_file_is_not_taken_for_two_purposes(tmp_path: Path, trace: Path, run_compare: Program, run_replay: Program) -> None:
    kept = trace.read_bytes()
    out = tmp_path / "out.csv"
    for words in (("--json", trace), ("--out", trace), ("--iterations", out)):
        code, _, err = run_replay("--trace", trace, "--policy", "vllm", "--out", out, *words)
        assert code == 2 and str(words[0]) in err and trace.read_bytes() == kept and not out.exists()
    base = (*SMALL, "--rates", 5, "--policies", "vllm", "--out", tmp_path / "folder")
    for words, expected in ((("--json", tmp_path), "--json"), (("--json", trace / "below"), "--json"), (("--calibration", ""), "empty")):
        code, _, err = run_compare(*base, *words)
        assert code == 2 and expected in err and not (tmp_path / "folder").exists()


def test_compare_refusals_as_a_person_sees_them(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    policies = ("--policies", "vllm")
    cases = [
        (("--scenario", "azure-conv", "--rates", "-2", *policies, "--out", tmp_path / "a"), "--rates"),
        (("--scenario", "lmsis", "--rates", "2", *policies, "--out", tmp_path / "a"), "'lmsys'"),
        (("--scenario", "azure-conv", "--rates", "2", *policies, "--out", tmp_path / "file" / "out"), "is a file"),
        (("--trace", tmp_path / "none.csv", *policies, "--out", tmp_path / "a"), "none.csv"),
    ]
    for words, expected in cases:
        done = subprocess_run("compare", *words)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith("error: ") and expected in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_a_trace_that_runs_back_or_can_never_be_served_is_refused(tmp_path: Path, run_compare: Program, run_replay: Program) -> None:
    back = write_trace(tmp_path / "back.csv", [(0.0, 10, 5), (2.0, 10, 5), (1.5, 10, 5)])
    long = write_trace(tmp_path / "long.csv", [(0.0, 10, 5), (2.0, 200_000, 5)])
    for path, expected in ((back, "back.csv"), (long, "200000")):
        code, _, err = run_compare("--trace", path, "--policies", "vllm", "--out", tmp_path / "out")
        assert code == 2 and err.startswith("error: ") and expected in err
        code, _, err = run_replay("--trace", path, "--policy", "vllm", "--out", tmp_path / "out")
        assert code == 2 and err.startswith("error: ") and expected in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back.csv", "long.csv"]


@pytest.mark.parametrize("jobs", [1, 2])
def test_ctrl_c_keeps_the_finished_rows(tmp_path: Path, jobs: int) -> None:
    words = ["--scenario", "azure-conv", "--rates", "4", "6", "--policies", "vllm", "nested-wait", "--seeds", "500"]
    command = [sys.executable, "scripts/compare.py", *words, "--jobs", str(jobs), "--out", str(tmp_path)]
    # its own session: the signal goes to the program and its workers, as from a terminal, and not to the tests
    process = subprocess.Popen(
        command, cwd=ROOT, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell without job control has it ignored in the background
    )  # fmt: skip
    summary = tmp_path / "summary.csv"
    try:
        deadline = time.monotonic() + 300
        while not (summary.exists() and summary.read_text(encoding="utf-8").count("\n") > 4):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            process.kill()
    assert process.returncode == 130
    assert "Traceback" not in err
    rows = read_rows(summary, Row)
    assert 4 <= len(rows) < 2000
    assert all(row.figures.completed == row.figures.requests for row in rows)
    assert f"Interrupted: {len(rows)} of 2000 runs are finished" in out
    assert f"Interrupted: {len(rows)} of 2000 runs" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_work_is_handed_out_whole_in_chunks_of_one_policy_and_rate() -> None:
    comparison = Comparison(load_scenario("azure-conv"), named("vllm", "wait"), (4.0, 6.0), tuple(range(7)), 10)
    tasks = comparison.tasks()
    for size in (1, 3, 100):
        parts = chunks(tasks, size)
        assert sorted(task for part in parts for task in part) == sorted(tasks)
        assert all(1 <= len(part) <= size and len({(t.policy, t.rate) for t in part}) == 1 for part in parts)
        assert [part[0].rate for part in parts] == sorted((part[0].rate for part in parts), reverse=True)
    # an interrupted comparison has the same seeds of every policy
    assert [(part[0].policy, part[0].seed) for part in chunks(tasks, 4)[:4]] == [("vllm", 0), ("wait", 0), ("vllm", 4), ("wait", 4)]
    assert chunks([], 3) == []


def test_a_policy_is_built_once_for_all_its_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[tuple[str, float]] = []
    make = Comparison.policy

    def counted(self: Comparison, name: str, rate: float) -> Any:
        built.append((name, rate))
        return make(self, name, rate)

    monkeypatch.setattr(Comparison, "policy", counted)
    comparison = Comparison(load_scenario("azure-conv"), named("vllm", "wait"), (4.0, 6.0), (0, 1, 2), 10)
    rows = list(run_tasks(comparison, comparison.tasks()))
    assert [row.task for row in rows] == comparison.tasks()
    assert sorted(built) == [("vllm", 4.0), ("vllm", 6.0), ("wait", 4.0), ("wait", 6.0)]


def test_extrapolated_iterations_are_named_with_their_share(tmp_path: Path, run_compare: Program) -> None:
    # 128 requests decode at once in the data behind these iteration times; at this rate far more do.
    words = ("--scenario", "lmsys", "--rates", 1, 60, "--seeds", 1, "--num-requests", 400, "--jobs", 1, "--policies", "vllm", "reserve")
    code, text, err = run_compare(*words, "--calibration", "a100-llama2-7b-c10", "--out", tmp_path)
    assert code == 0
    assert "CalibrationRangeWarning" not in err  # the report says it instead
    rows = {(row.policy, row.rate): row for row in read_rows(tmp_path / "summary.csv", Row)}
    share = 100 * rows["vllm", 60.0].figures.out_of_range / rows["vllm", 60.0].figures.iterations
    assert 1 < share < 100 and rows["vllm", 1.0].figures.out_of_range == 0
    line = f"extrapolated: vllm at 60 req/s ({share:.2g} %), share of iterations outside the range"
    assert line in " ".join(text.split())
    assert line in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_same_rows_come_from_a_local_ray_cluster(tmp_path: Path, run_compare: Program) -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    words = ("--scenario", "azure-conv", "--seeds", 2, "--num-requests", 40, "--rates", 4, 6, "--policies", "vllm", "wait", "--quiet")
    assert run_compare(*words, "--jobs", 1, "--out", tmp_path / "here")[0] == 0
    # a program of its own: Ray keeps processes and changes joblib's pool for good
    done = subprocess_run("compare", *words, "--jobs", 2, "--backend", "ray", "--out", tmp_path / "ray")
    assert done.returncode == 0, done.stderr
    one, two = (read_rows(tmp_path / name / "summary.csv", Row) for name in ("here", "ray"))
    assert [dataclasses.replace(r, wall_seconds=0) for r in one] == [dataclasses.replace(r, wall_seconds=0) for r in two]
    assert (tmp_path / "ray" / "kv.png").exists()


def test_a_cluster_that_cannot_be_reached_is_refused_before_anything_is_written(
    tmp_path: Path, run_compare: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**_: object) -> None:
        raise ConnectionError("nobody there")

    modules = {"ray": SimpleNamespace(init=init), "ray.util.joblib": SimpleNamespace(register_ray=lambda: None)}
    monkeypatch.setattr(parallel, "require", lambda name, extra: modules[name])
    monkeypatch.setattr(compare, "require", lambda name, extra: modules.get(name) or require(name, extra))
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    code, _, err = run_compare(*SMALL, "--rates", 5, "--policies", "vllm", "--backend", "ray", "--out", tmp_path / "out")
    assert code == 2 and err.startswith("error: --backend ray") and "192.0.2.1:6379" in err and "nobody there" in err
    assert not (tmp_path / "out").exists()


def test_waves_deliver_everything_in_between() -> None:
    class Parallel(list[list[int]]):
        def __enter__(self) -> Parallel:
            return self

        def __exit__(self, *_: object) -> None:
            self.append([])

        def __call__(self, wave: list[int]) -> list[int]:
            self.append(wave)
            return [10 * x for x in wave]

    seen = Parallel()
    results = _in_waves(seen, iter(range(5)), 2)
    assert next(results) == 0
    assert seen == [[0, 1]]
    assert list(results) == [10, 20, 30, 40]
    assert seen == [[0, 1], [2, 3], [4], []]


def test_a_recording_is_the_run_itself() -> None:
    # A full memory: evictions, and the peak at capacity.
    scenario = load_scenario("azure-conv")
    comparison = Comparison(scenario, named("vllm"), (7.0,), (0,), 400, Overrides(engine={"num_blocks": 2000}))
    one = record(comparison, Task("vllm", 7.0, 0))
    assert np.all(np.diff(one.time) >= 0)
    assert one.kv.min() >= 0
    assert 0.9 < one.kv.max() <= 1.0
    assert one.eviction_times.size > 0
    assert one.ttft.size == 400 and np.all(np.diff(one.ttft) >= 0)
    # step by step what the reports of the run say
    times: list[float] = []
    kv: list[float] = []
    evicted: list[float] = []

    def note(report: IterationReport, view: View) -> None:
        times.append(report.start + report.duration)
        kv.append((view.kv_used if report.idle else report.kv_used) / 2000)
        evicted.extend([report.start] * (len(report.evicted) + len(report.preempted)))

    run_episode(comparison.policy("vllm", 7.0), comparison.workload(7.0, 0), on_step=note)
    np.testing.assert_allclose(one.time, times, rtol=1e-12)
    assert one.kv.tolist() == kv
    assert one.eviction_times.tolist() == evicted


def test_cells_average_over_seeds(tmp_path: Path, run_compare: Program) -> None:
    assert run_compare(*SMALL, "--rates", 5, "--policies", "vllm", "--out", tmp_path, "--quiet")[0] == 0
    rows = read_rows(tmp_path / "summary.csv", Row)
    (cell,) = cells(rows, ["vllm"])
    assert cell.seeds == 2 and cell.requests == 80
    assert cell["latency_mean"].mean == pytest.approx((rows[0].figures.latency_mean + rows[1].figures.latency_mean) / 2)


# --- replay ---------------------------------------------------------------------------------------


def test_replay_serves_exactly_the_requests_given(tmp_path: Path, trace: Path, run_replay: Program) -> None:
    out, steps = tmp_path / "requests.csv", tmp_path / "iterations.csv"
    code, text, _ = run_replay("--trace", trace, "--policy", "sarathi", "--out", out, "--iterations", steps)
    assert code == 0
    rows = read_csv(out)
    assert ",".join(rows[0]) == REQUESTS_HEADING
    given = np.loadtxt(trace, delimiter=",", skiprows=1)
    given[:, 0] -= given[0, 0]  # times count from the first arrival
    got = np.array([[float(r[c]) for c in ("arrived_at", "prompt_tokens", "output_tokens")] for r in rows])
    np.testing.assert_array_equal(got, given)
    assert [r["completed"] for r in rows] == ["1"] * 60
    for r in rows:
        assert 0 < float(r["ttft"]) <= float(r["e2e"])
        assert float(r["arrived_at"]) <= float(r["admitted_at"]) < float(r["arrived_at"]) + float(r["ttft"])
    iterations = read_csv(steps)
    assert ",".join(iterations[0]) == ITERATIONS_HEADING
    assert sum(int(r["evictions"]) for r in rows) == 0
    assert sum(int(r["prefill_tokens"]) for r in iterations) == given[:, 1].sum()
    # a request of o output tokens decodes o - 1 times: the first token comes with the prefill
    assert sum(int(r["total_tokens"]) for r in iterations) == (given[:, 1] + given[:, 2] - 1).sum()
    assert max(int(r["total_tokens"]) for r in iterations) <= 512
    assert "60 completed" in text and "requests/s" in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iterations.csv", "requests.csv", "trace.csv"]


def test_replay_rescales_time_and_repeats_itself(tmp_path: Path, trace: Path, run_replay: Program) -> None:
    for name in ("a", "b"):
        assert run_replay("--trace", trace, "--policy", "vllm", "--rate", 2, "--out", tmp_path / name)[0] == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    times = [float(r["arrived_at"]) for r in read_csv(tmp_path / "a")]
    assert 59 / (times[-1] - times[0]) == pytest.approx(2.0)


def test_replay_of_the_paper_engine_by_hand(tmp_path: Path, run_replay: Program) -> None:
    # One request (l, l') = (3, 2): prefill takes 1 + .1 * 3 s, then stages 1 and 2 hold 4 and 5 tokens.
    # The engine is idle until it arrives, which is no iteration.
    path = write_trace(tmp_path / "one.csv", [(0.5, 3, 2)])
    settings = ("engine.capacity_tokens=10", "engine.d0=1", "engine.d1=0.1")
    words = ("--trace", path, "--policy", "fcfs", "--engine", "paper", "--set", *settings, "--out", tmp_path / "r.csv")
    assert run_replay(*words, "--iterations", tmp_path / "i.csv")[0] == 0
    (row,) = read_csv(tmp_path / "r.csv")
    assert float(row["ttft"]) == pytest.approx(1.3 + 1.4)
    assert float(row["e2e"]) == pytest.approx(1.3 + 1.4 + 1.5)
    assert [float(r["duration"]) for r in read_csv(tmp_path / "i.csv")] == pytest.approx([1.3, 1.4, 1.5])


def test_replay_takes_classes_from_the_type_column_and_may_strand(tmp_path: Path, run_replay: Program) -> None:
    header = "arrived_at,num_prefill_tokens,num_decode_tokens,type"
    path = write_trace(tmp_path / "t.csv", [(0.0, 3, 2, 0), (0.0, 3, 4, 1), (0.1, 3, 2, 0)], header)
    settings = ("engine.capacity_tokens=200", "engine.d0=1", "engine.d1=0.01", "policy.thresholds=2,2")
    words = ("--trace", path, "--policy", "wait", "--engine", "paper", "--set", *settings, "--out", tmp_path / "r.csv", "--no-drain")
    code, text, _ = run_replay(*words)
    assert code == 0 and "[known lengths]" in text
    rows = read_csv(tmp_path / "r.csv")
    # type 0 collects its two at 0.1 s; type 1 never does
    assert [r["admitted_at"] for r in rows] == ["0.1", "", "0.1"]
    assert rows[1]["completed"] == "0"
    assert rows[1]["admitted_at"] == rows[1]["ttft"] == rows[1]["e2e"] == ""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--policy", "sarathy"), ["sarathy", "'sarathi'"]),
        (("--rate", "-1"), ["--rate", "-1"]),
        (("--rate", "nan"), ["--rate", "nan"]),
        (("--horizon", "nan"), ["horizon"]),
        (("--policy", "wait", "--set", "policy.thresholds=1,2,3"), ["thresholds", "3"]),
        (("--policy", "wait", "--set", "policy.thresholds=a"), ["policy.thresholds", "'a'"]),
        (("--set", "policy.thresholds=1"), ["policy.thresholds", "budget"]),
        (("--set", "engine.preset=paper"), ["engine.preset"]),
        (("--set", "engine.enable_chunked_prefill=maybe"), ["enable_chunked_prefill", "true or false"]),
        (("--set", "engine.time_model=a100"), ["a100"]),
        (("--engine", "paper", "--policy", "sarathi"), ["paper"]),
        (("--engine", "tpu"), ["--engine", "tpu"]),
        (("--out", "{folder}"), ["--out", "folder"]),
        (("--out", "{trace}"), ["--out", "trace"]),
        (("--out", "{trace}/below"), ["--out", "is a file"]),
        (("--iterations", "{folder}/out.csv"), ["--iterations", "--out"]),
        (("--trace", "{folder}/none.csv"), ["none.csv"]),
    ],
)
def test_replay_refuses_before_any_work(
    tmp_path: Path, trace: Path, run_replay: Program, words: tuple[str, ...], expected: list[str]
) -> None:
    base = {"--trace": str(trace), "--policy": "sarathi", "--out": str(tmp_path / "out.csv")}
    base |= {k: v.format(folder=tmp_path, trace=trace) for k, v in zip(words[::2], words[1::2], strict=True)}
    code, _, err = run_replay(*(word for pair in base.items() for word in pair))
    assert code == 2
    if words[0] != "--engine":  # the parser's own words
        assert err.splitlines()[-1].startswith("error: ")
    for part in expected:
        assert part in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["trace.csv"]


def test_a_replay_that_fails_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "kept.csv").write_text("old", encoding="utf-8")
    with pytest.raises(RuntimeError), replacing(tmp_path / "kept.csv") as file:
        file.write("new")
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["kept.csv"]
    assert (tmp_path / "kept.csv").read_text(encoding="utf-8") == "old"
