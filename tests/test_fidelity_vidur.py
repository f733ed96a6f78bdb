"""Vidur's runs on our engine, exact; the fidelity page; the compiled loop."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from llmsched_baselines import Setting, make_policy
from llmsched_env import EngineConfig, EpisodeLimits
from llmsched_env.cli import fidelity
from llmsched_env.engine.rules import run_constant
from llmsched_env.engine.simulator import SimBackend
from llmsched_env.errors import ConfigError
from llmsched_env.pages.fidelity import page
from llmsched_env.pages.fidelity import vidur as fidelity_vidur
from llmsched_env.pages.fidelity.evidence import MISSED, Check, Paths, check_table, percent
from llmsched_env.perf import load_calibration
from llmsched_env.runner import run_episode
from llmsched_env.types import Decision, LengthStatistics, QueueLayout, Workload
from llmsched_hardware.calibration.importers.vidur import read_iterations

RUNS = (
    "up_sarathi_swconv_q5",
    "up_sarathi_swconv_q7",
    "up_sarathi_swconv_q7_kv2816",
    "up_vllm_swconv_q5",
    "up_vllm_swconv_q7",
    "up_vllm_swconv_q7_kv2816",
)


@pytest.fixture(scope="module")
def paths() -> Paths:
    try:
        return Paths.find()
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def runs(paths: Paths) -> dict[str, fidelity_vidur.Run]:
    return {run.name: run for run in fidelity_vidur.read_runs(paths.peers)}


# --- against Vidur ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_vidur_is_repeated_request_by_request(runs: dict[str, fidelity_vidur.Run], name: str) -> None:
    replay = fidelity_vidur.replay(runs[name], load_calibration(fidelity_vidur.CALIBRATION))
    assert replay.result.counters.iterations == runs[name].batches["start"].size
    for column in ("batch_size", "prefill_tokens", "total_tokens", "alloc_blocks_before_free", "waiting"):
        assert replay.differing_rows(column) == 0, column
    for column in ("restarts", "completed"):
        assert replay.largest_difference(column) == 0, column
    for column in ("scheduled_at", "ttft", "e2e"):  # the files are rounded to 1e-6 s, the tables to 24 bits
        assert replay.largest_difference(column) < 2e-6, column
    assert np.abs(replay.batches["duration"] - runs[name].batches["duration"]).max() < 1e-7
    assert replay.result.counters.out_of_range == 0


def test_the_comparison_sees_a_wrong_time_model_and_a_wrong_accounting(runs: dict[str, fidelity_vidur.Run]) -> None:
    run = runs["up_vllm_swconv_q7_kv2816"]
    formula = dataclasses.replace(load_calibration("a100-llama2-7b-c10"), provenance=load_calibration("a100-llama2-7b-vidur").provenance)
    assert fidelity_vidur.replay(run, formula).largest_difference("e2e") > 1.0
    policy = fidelity_vidur.policy_for(run, load_calibration(fidelity_vidur.CALIBRATION))
    policy.engine = policy.engine.replace(decode_needs_free_block=False)
    assert run_episode(policy, run.workload).counters.iterations != run.batches["start"].size


@pytest.mark.parametrize(
    ("file", "clip", "column"),
    [
        ("vidur_a100_llama2_7b_iterations.csv", True, "seconds"),
        ("vidur_a100_llama2_7b_iterations.csv", False, "extrapolated"),
        ("vidur_a100_llama2_7b_iterations_from_runs.csv", False, "seconds"),
    ],
)
def test_iteration_times_are_vidurs(paths: Paths, file: str, clip: bool, column: str) -> None:
    iterations = read_iterations(paths.calibration / file)
    model = load_calibration(fidelity_vidur.CALIBRATION + (":clip" if clip else ""))
    errors = np.abs(iterations.errors(model, getattr(iterations, column)))
    assert errors.size >= 3000
    assert errors.max() < 1e-5  # the files have six digits
    if "from_runs" not in file:
        other = np.abs(iterations.errors(model, iterations.extrapolated if clip else iterations.seconds))
        assert other.mean() > 0.01  # clip and extrapolate are not the same


# --- the parts without data -------------------------------------------------------------------------


def test_the_compiled_loop_is_the_loop_over_steps() -> None:
    rng = np.random.default_rng(2)
    workload = Workload.of(np.cumsum(rng.exponential(0.1, 120)), rng.integers(1, 800, 120), rng.integers(1, 200, 120))
    engine = EngineConfig.vllm(num_blocks=300, max_model_len=2000, time_model=load_calibration("a100-llama2-7b-vidur"))
    policy = make_policy("vllm", Setting(LengthStatistics.of(400, 100, 1.0), 10.0, engine))
    backend = SimBackend()
    view = backend.reset(workload, policy.layout, policy.engine, EpisodeLimits())
    run_constant(backend, policy.decide(view))
    asked = run_episode(policy, workload)
    assert backend.counters() == asked.counters
    assert asked.counters.evictions > 0
    for name in ("admitted", "first_token", "completed", "evictions"):
        assert np.array_equal(getattr(backend.log(), name), getattr(asked.log, name)), name
    with pytest.raises(RuntimeError, match="the episode has ended"):
        run_constant(backend, policy.decide(view))


def test_the_compiled_loop_ends_where_nothing_can_run() -> None:
    backend = SimBackend()
    backend.reset(Workload.of([0.0], [10], [5]), QueueLayout(), EngineConfig.vllm(), EpisodeLimits(drain=False))
    run_constant(backend, Decision.of([0], [0]))
    assert backend.counters().end == "stranded"


def test_a_workload_repeated_end_to_end_keeps_its_rate() -> None:
    once = Workload.of([1.0, 2.0, 4.0], [1, 2, 3], [4, 5, 6])
    many = fidelity_vidur.repeated(once, 7)
    period = 4.0 * (1 + 1 / 3)
    assert many.arrival == pytest.approx([1, 2, 4, 1 + period, 2 + period, 4 + period, 1 + 2 * period])
    assert many.prompt_tokens.tolist() == [1, 2, 3, 1, 2, 3, 1]


def test_vidurs_speeds_are_read_from_its_table(tmp_path: Path) -> None:
    folder = tmp_path / "vidur"
    folder.mkdir()
    (folder / "README.md").write_text("| run | mean | per second |\n| --- | --- | ---: |\n| up_a_q5 | 1.0 | 1,234 |\n")
    assert fidelity_vidur.vidur_speeds(tmp_path) == {"up_a_q5": 1234.0}
    (folder / "README.md").write_text("nothing\n")
    with pytest.raises(ConfigError, match="no row of a run"):
        fidelity_vidur.vidur_speeds(tmp_path)


def test_missing_runs_and_columns_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no runs in"):
        fidelity_vidur.read_runs(tmp_path)
    (tmp_path / "vidur" / "runs").mkdir(parents=True)
    (tmp_path / "vidur" / "runs" / "up_a.csv").write_text("arrived_at,prompt_tokens\n0,1\n")
    with pytest.raises(ConfigError, match="column 'output_tokens' is missing"):
        fidelity_vidur.read_runs(tmp_path)


def test_machine_names_processor_and_cores() -> None:
    assert "cores (one used)" in fidelity_vidur.machine() and "numba" in fidelity_vidur.machine()


# --- the page ---------------------------------------------------------------------------------------


def test_a_check_holds_up_to_its_bar_and_no_further() -> None:
    assert Check.relative("a", "f", 1.01, 1.0, 0.0101).holds is True
    missed = Check.relative("a", "f", 1.02, 1.0, 0.01)
    assert (missed.holds, missed.verdict, missed.error, missed.bar) == (False, MISSED, "2 %", "within 1 %")
    assert Check.relative("a", "f", 0.98, 1.0, 0.01).holds is False
    assert Check.relative("a", "f", 0.0, 0.0, 0.01).holds is True
    assert Check.relative("a", "f", 1.0, 0.0, 0.01).holds is False
    assert Check.relative("a", "f", float("nan"), 1.0, 0.01).holds is False
    assert (Check.relative("a", "f", 2.0, 1.0, None).holds, Check.relative("a", "f", 2.0, 1.0, None).verdict) == (None, "-")
    assert Check.equal("a", "f", 5, 5).holds is True and Check.equal("a", "f", 4, 5).error == "-1"
    assert check_table([missed])[-1] == f"| a | f | 1.02 s | 1 s | 2 % | within 1 % | {MISSED} |"


@pytest.mark.parametrize(
    ("share", "text"), [(0.00512, "0.512 %"), (0.0, "0 %"), (3.2e-7, "3e-05 %"), (1e-12, "< 0.000001 %"), (-0.02, "-2 %")]
)
def test_percent(share: float, text: str) -> None:
    assert percent(share) == text


def test_the_page_defines_its_words_once_and_takes_every_part_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("LLMSCHED_CALIBRATION", "LLMSCHED_PEERS", "LLMSCHED_TRACES"):
        monkeypatch.setenv(name, str(tmp_path))
    lines = {"zebra": "z", "rtx4090": f"x {MISSED}"}
    parts = {name: lambda paths, name=name, line=line: [f"## {name}", str(paths.peers), line, "", ""] for name, line in lines.items()}
    monkeypatch.setattr(page, "PARTS", parts)
    monkeypatch.setattr(fidelity, "PARTS", parts)
    out = tmp_path / "page.md"
    assert fidelity.main(["--out", str(out)]) == 0
    text = out.read_text()
    assert text.index("## zebra") < text.index("## rtx4090") and str(tmp_path) in text
    assert "\n\n\n" not in text
    assert "TTFT is the end of the iteration that yields the first output token minus arrival" in text
    assert "TPOT (latency - TTFT) / (output_tokens - 1)" in text
    text, err = capsys.readouterr()
    assert f"bars missed: 1\nx {MISSED}" in text and "zebra ..." in err
    assert fidelity.main(["--out", str(out), "--parts", "rtx4090", "--quiet"]) == 0
    assert "## zebra" not in out.read_text() and "zebra" not in capsys.readouterr().err
    assert fidelity.main(["--out", str(out), "--parts", "zebras"]) == 2
    assert "--parts: 'zebras' is no part; did you mean 'zebra'?" in capsys.readouterr().err


def test_missing_raw_data_leave_the_page_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LLMSCHED_PEERS", str(tmp_path / "absent"))
    monkeypatch.setenv("LLMSCHED_CALIBRATION", str(tmp_path))
    out = tmp_path / "page.md"
    out.write_text("old")
    assert fidelity.main(["--out", str(out)]) == 2
    assert "LLMSCHED_PEERS" in capsys.readouterr().err
    assert out.read_text() == "old"
