"""Simulator against engine, the part that needs no engine: what is run, errors, spread, ranking, files."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmsched_agents.lookup import named_policies
from llmsched_env.backends import make_backend
from llmsched_env.cli import hardware_page, validate
from llmsched_env.engine.simulator import SimBackend
from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import ConfigError, EngineError
from llmsched_env.metrics import Summary
from llmsched_env.perf import FormulaTime, LinearTime, Provenance, save_calibration
from llmsched_env.row_file import RowFile, read_rows
from llmsched_env.types import Decision
from llmsched_env.workload import load_scenario
from llmsched_hardware import validation_runs
from llmsched_hardware.real_engine import Machine
from llmsched_hardware.validation import (
    ENGINE,
    METRICS,
    SIM,
    Gap,
    Run,
    Schedules,
    Task,
    Validation,
    compare_schedules,
    gaps,
    on_engine,
    rankings,
    run_task,
)
from llmsched_hardware.validation_report import error_table, figure_table, measured_page, summary_lines, virtual_page, write_table

SMALL = EngineConfig.vllm(time_model=LinearTime(1e-3, 1e-7), num_blocks=40, max_model_len=256, max_num_seqs=16, max_num_batched_tokens=256)
POLICIES = ("vllm", "wait", "nested-wait")


def small(**changes: Any) -> Validation:
    scenario = on_engine(load_scenario("azure-conv"), SMALL, 0.06, 250)
    changes = {"policies": POLICIES} | changes
    changes["policies"] = named_policies("--policies", changes["policies"])
    arguments: dict[str, Any] = {"scenario": scenario, "rates": (200.0, 400.0), "seeds": (0,), "num_requests": 40}
    return Validation(**(arguments | changes))


# --- workloads ------------------------------------------------------------------------------------


def test_lengths_are_scaled_cut_and_known_to_the_operator_as_such() -> None:
    base = load_scenario("azure-conv")
    scaled = on_engine(base, SMALL, 0.06, 250)
    before, after = base.generate(3, num_requests=200), scaled.generate(3, num_requests=200)
    assert np.array_equal(before.arrival, after.arrival)
    total = after.prompt_tokens + after.output_tokens
    assert total.max() <= 250 and after.prompt_tokens.min() >= 1 and after.output_tokens.min() >= 1
    uncut = (0.06 * before.prompt_tokens).round() + (0.06 * before.output_tokens).round() < 250
    assert np.array_equal(after.prompt_tokens[uncut], np.maximum(np.rint(0.06 * before.prompt_tokens[uncut]), 1))
    assert scaled.statistics.mean_prompt == pytest.approx(0.06 * base.statistics.mean_prompt, rel=0.05)
    assert "lengths times 0.06, at most 250" in scaled.statistics.source
    assert scaled.engine == SMALL and max(scaled.layout.segment_ends) < scaled.statistics.max_output


def test_a_scenario_that_fits_is_left_alone() -> None:
    base = load_scenario("azure-conv")
    assert on_engine(base, EngineConfig.vllm()).lengths is base.lengths


def test_requests_too_long_for_the_engine_are_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match=r"the engine takes 256; give --length-scale 0\.\d+ .* or --max-total-tokens 256"):
        small(scenario=on_engine(load_scenario("azure-conv"), SMALL)).check()
    small().check()


def test_policies_take_turns_and_engines_stay_together() -> None:
    options = {"sarathi": {"max_num_seqs": 8, "budget": 64}}
    tasks = small(policies=("vllm", "sarathi", "wait"), repeats=2, warm_ups=1, options=options).tasks()
    sim = [t for t in tasks if t.backend == SIM]
    real = [t for t in tasks if t.backend == ENGINE]
    assert tasks == sim + real and len(sim) == 6 and len(real) == 18 and len(set(tasks)) == 24
    names = [t.policy for t in real]
    assert names == ["vllm", "wait"] * 6 + ["sarathi"] * 6
    assert [t.warm_up for t in real[:12]] == [True] * 4 + [False] * 8
    assert [t.repeat for t in real[:12]] == [0] * 8 + [1] * 4


# --- runs and the virtual clock -------------------------------------------------------------------


def test_a_run_of_the_simulator_is_a_row_and_the_row_survives_the_file(tmp_path: Path) -> None:
    run = run_task(small(), Task("nested-wait", 400.0, 0, SIM), None)
    assert run.figures.requests == run.figures.completed == 40 and math.isnan(run.thinking_seconds) and run.figures.iterations > 0
    with RowFile(tmp_path / "runs.csv", Run, resume=False) as file:
        file.append(run)
    (again,) = read_rows(tmp_path / "runs.csv", Run)
    assert repr(again) == repr(run) and again.task == run.task  # NaN differs from itself


class OneStepLate(SimBackend):
    """Another engine: it holds every resident in one iteration of the episode."""

    def step(self, decision: Decision) -> Any:
        self.at = getattr(self, "at", 0) + 1
        if self.at == 20:
            decision = Decision.of(np.zeros_like(decision.run), decision.admit)
        return super().step(decision)


def test_schedules_are_compared_step_by_step() -> None:
    validation = small()
    for policy in POLICIES:
        same = compare_schedules(validation, policy, 400.0, 0, SIM, make_backend(SIM))
        assert same.identical and not same.difference and same.steps > 40
    other = compare_schedules(validation, "vllm", 400.0, 0, "late", OneStepLate())
    assert not other.identical and "is " in other.difference and other.difference.startswith("step 19:")


# --- errors, spread, ranking ----------------------------------------------------------------------


def run_of(policy: str, backend: str, latency: float, *, repeat: int = 0, seed: int = 0, rate: float = 1.0, warm_up: bool = False) -> Run:
    values: dict[str, Any] = {f.name: 1 for f in dataclasses.fields(Summary)} | dict.fromkeys(METRICS, latency)
    figures = Summary(**values | {"throughput_tok_s": 1.0 / latency, "evictions": 3})
    return Run(
        policy=policy, rate=rate, seed=seed, backend=backend, repeat=repeat, warm_up=warm_up, figures=figures, thinking_seconds=0.1,
        known_lengths=False, notes="",
    )  # fmt: skip


def test_error_and_spread_are_those_of_the_definition() -> None:
    runs = [run_of("vllm", SIM, 1.1, seed=s) for s in (0, 1)]
    runs += [run_of("vllm", ENGINE, value, repeat=r, seed=s) for r, value in enumerate((0.9, 1.0, 1.1)) for s in (0, 1)]
    runs += [run_of("vllm", ENGINE, 9.0, warm_up=True), run_of("vllm", ENGINE, 9.0, repeat=3, seed=0)]  # not counted; a seed is missing
    by_metric = {gap.metric: gap for gap in gaps(runs, ("vllm", "wait"))}
    assert tuple(by_metric) == METRICS
    gap = by_metric["latency_mean"]
    assert (gap.repeats, gap.sim, gap.real, gap.low, gap.high) == pytest.approx((3, 1.1, 1.0, 0.9, 1.1))
    assert gap.error == pytest.approx(0.1) and gap.spread == pytest.approx(0.2)
    evictions = by_metric["evictions"]
    assert evictions.error == 0.0 and evictions.spread == 0.0
    assert math.isnan(dataclasses.replace(gap, repeats=1).spread)


def gap_of(policy: str, sim: float, low: float, high: float, metric: str = "latency_mean") -> Gap:
    return Gap(policy, 1.0, metric, 3, sim, (low + high) / 2, low, high)


def test_a_swap_counts_as_outside_only_where_the_engine_tells_the_policies_apart() -> None:
    (same,) = rankings([gap_of("a", 1.0, 1.0, 1.1), gap_of("b", 2.0, 2.0, 2.1)])
    assert same.real == same.sim == ("a", "b") and same.tau == 1.0 and (same.swapped_inside, same.swapped_outside) == (0, 0)
    (inside,) = rankings([gap_of("a", 2.0, 1.0, 1.2), gap_of("b", 1.0, 1.1, 1.3)])
    assert inside.real == ("a", "b") and inside.sim == ("b", "a") and inside.tau == -1.0
    assert (inside.swapped_inside, inside.swapped_outside) == (1, 0)
    (outside,) = rankings([gap_of("a", 2.0, 1.0, 1.1), gap_of("b", 1.0, 1.2, 1.3), gap_of("c", 3.0, 3.0, 3.1)])
    assert (outside.swapped_inside, outside.swapped_outside, outside.pairs) == (0, 1, 3)
    assert outside.tau == pytest.approx(1 / 3)
    (throughput,) = rankings([gap_of("a", 5.0, 5.0, 5.1, "throughput_tok_s"), gap_of("b", 4.0, 4.0, 4.1, "throughput_tok_s")])
    assert throughput.real == ("a", "b")
    assert rankings([gap_of("a", 1.0, 1.0, 1.1)]) == []


def test_the_report_says_what_was_found(tmp_path: Path) -> None:
    runs = []
    for policy, factor in (("vllm", 1.0), ("wait", 2.0)):
        runs += [run_of(policy, SIM, 1.1 * factor), *(run_of(policy, ENGINE, factor * x, repeat=r) for r, x in enumerate((0.9, 1.1)))]
    found = gaps(runs, ("vllm", "wait"))
    page = measured_page("Title", [("Engine", "tiny")], found, rankings(found))
    assert page.startswith("# Title\n\n- Engine: tiny\n")
    assert "| 1 | vllm | -10.0 % (20.0 %) | +10.0 % (20.0 %)" in error_table(found)
    assert "6 of 6 rankings" in page and "0 are swapped outside" in page and figure_table(found) in page
    assert any(line.startswith("latency ") and "error 10.0 % in the mean" in line for line in summary_lines(found, rankings(found)))
    write_table(tmp_path / "t.csv", found)
    lines = (tmp_path / "t.csv").read_text().splitlines()
    assert lines[0] == "rate,policy,metric,sim,engine,engine_low,engine_high,repeats,error,spread"
    assert len(lines) == 1 + 2 * len(METRICS)
    checks = [Schedules("vllm", 1.0, 0, "vllm", 10, 2, True, ""), Schedules("vllm", 1.0, 0, "x", 10, 2, False, "step 3: start is")]
    text = virtual_page("T", [], checks)
    assert "1 of 2 episodes" in text and "step 3: start is" in text


# --- files and command line -----------------------------------------------------------------------


def test_rows_survive_a_kill_and_other_columns_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    first, second = Schedules("a", 1.0, 0, "b", 1, 2, True, ""), Schedules("a", 2.0, 0, "b", 1, 2, False, "no, not")
    with RowFile(path, Schedules, resume=True) as file:
        file.append(first)
        assert read_rows(path, Schedules) == [first]
    with path.open("a") as file:
        file.write("a,2.0,")
    with RowFile(path, Schedules, resume=True) as rows:
        assert rows.rows == [first]
        rows.append(second)
    assert read_rows(path, Schedules) == [first, second]
    with pytest.raises(ConfigError, match="the columns are not those"):
        read_rows(path, Run)
    path.write_text(path.read_text().replace("2.0", "two"))
    with pytest.raises(ConfigError, match="line 3: not a row"):
        read_rows(path, Schedules)


@pytest.fixture
def calibration(tmp_path: Path) -> Path:
    source = Provenance(name="c", gpu="g", num_blocks=512, block_size=16)
    model = FormulaTime(1e-3, 1e-5, 1e-3, 1e-5, 1e-7, 0.0, 1e-9, 2e-5, provenance=source)
    save_calibration(model, tmp_path / "c.json")
    return tmp_path / "c.json"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--policies", "vlm"], "did you mean 'vllm'"),
        (["--rates", "0"], "--rates: 0, must be finite and > 0"),
        (["--loads", "-1"], "--loads: -1"),
        (["--length-scale", "nan"], "--length-scale: nan"),
        (["--max-total-tokens", "0"], "--max-total-tokens: 0"),
        (["--num-requests", "0"], "--num-requests: 0"),
        (["--repeats", "0"], "--repeats: 0"),
        (["--warm-ups", "-1"], "--warm-ups: -1"),
        (["--scenario", "azure-con"], "azure-conv"),
        (["--calibration", "none.json"], "--calibration: "),
        (["--set", "policy.vllm.budget=3"], "unknown key"),
        (["--set", "num_blocks=3"], "must be engine.FIELD=VALUE"),
        ([], "the engine takes 1,024; give --length-scale"),
    ],
)
def test_validate_refuses_before_it_builds_anything(
    words: list[str], message: str, calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    base = ["--calibration", str(calibration), "--model", "tiny", "--scenario", "azure-conv", "--policies", "vllm", "--out", str(out)]
    assert validate.main([*base, *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert not out.exists()


def words(calibration: Path, out: Path, *more: object) -> list[str]:
    given = ["--calibration", calibration, "--model", "tiny", "--scenario", "azure-conv", "--length-scale", 0.06, "--out", out, "--quiet"]
    return [str(word) for word in (*given, "--policies", "vllm", "wait", "--num-requests", 20, "--loads", 0.9, *more)]


def test_rates_and_loads_exclude_each_other(calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert validate.main(words(calibration, tmp_path / "out", "--rates", 3)) == 2
    error = capsys.readouterr().err
    assert "--rates" in error and "--loads" in error and not (tmp_path / "out").exists()


class Pretended(SimBackend):
    """The simulator in the engine's place."""

    device = "a pretended engine"
    thinking_seconds = 0.25

    def machine(self) -> Machine:
        return Machine(self.device, None, "0.28.0", "2.9", "tiny", "float32", 512, 16, "2026-01-01T00:00:00+00:00")


class Wrong(Pretended):
    """It reports rejections that never were."""

    def step(self, decision: Decision) -> Any:
        return dataclasses.replace(super().step(decision), rejected=7)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[Pretended]], None]:
    def put(kind: type[Pretended]) -> None:
        for module in (validate, validation_runs):
            monkeypatch.setattr(module, "make_backend", lambda name, **settings: kind())

    put(Pretended)
    return put


Engine = Callable[[type[Pretended]], None]


def test_a_validation_is_kept_resumed_or_overwritten_as_asked(
    calibration: Path, engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, found = tmp_path / "out", tmp_path / "found.json"
    given = words(calibration, out, "--repeats", 2)
    assert validate.main([*given, "--json", str(found)]) == 0
    printed, err = capsys.readouterr()
    assert "error 0.0 % in the mean" in printed and f"Report: {out / 'report.md'}" in printed and err == ""
    runs = read_rows(out / "runs.csv", Run)
    assert len(runs) == 2 * (1 + 1 + 2)
    assert {r.thinking_seconds for r in runs if r.backend == ENGINE} == {0.25}
    record = json.loads(found.read_text())["found"]
    assert {gap["error"] for gap in record["gaps"]} <= {0.0, None} and len(record["rankings"]) == 6
    report = (out / "report.md").read_text()
    assert "- Command: `llmsched validate --calibration" in report and "tiny (float32) on a pretended engine, vLLM 0.28.0" in report
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    assert validate.main(given) == 2
    assert "holds a validation already; use --resume, --overwrite or another place" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert validate.main([*given, "--resume", "--num-requests", "21"]) == 2
    assert "--resume: num_requests is 21, but what" in capsys.readouterr().err
    assert validate.main([*given, "--resume", "--clock", "virtual"]) == 2
    assert "--resume: clock is 'virtual'" in capsys.readouterr().err
    (out / "runs.csv").write_bytes(b"\n".join(before["runs.csv"].split(b"\n")[:4]) + b"\nvllm,")
    assert validate.main([*given, "--resume"]) == 0
    again = read_rows(out / "runs.csv", Run)
    assert [run.task for run in again] == [run.task for run in runs] and list(map(repr, again[:3])) == list(map(repr, runs[:3]))

    (out / "runs.csv").write_bytes(b"\n".join(before["runs.csv"].split(b"\n")[:4]) + b"\n")
    monkeypatch.setattr(Pretended, "device", "another")
    assert validate.main([*given, "--resume"]) == 2
    assert "device is 'another', but runs in" in capsys.readouterr().err
    assert validate.main([*given, "--overwrite"]) == 0
    assert "on another, vLLM" in (out / "report.md").read_text()


def test_an_engine_that_dies_leaves_what_is_finished(
    calibration: Path, engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = words(calibration, tmp_path / "out", "--repeats", 2)

    def dies(error: BaseException, after: int) -> None:
        seen = itertools.count()

        def reset(self: Pretended, *arguments: Any, **options: Any) -> Any:
            if next(seen) >= after:
                raise error
            return SimBackend.reset(self, *arguments, **options)

        monkeypatch.setattr(Pretended, "reset", reset)

    dies(EngineError("the vLLM engine died: out of memory"), 1)
    assert validate.main(given) == 1
    assert "error: the vLLM engine died: out of memory; finished runs are kept, go on with --resume" in capsys.readouterr().err
    assert len(read_rows(tmp_path / "out" / "runs.csv", Run)) == 3
    dies(KeyboardInterrupt(), 2)
    assert validate.main([*given, "--resume"]) == 130
    assert "go on with --resume" in capsys.readouterr().err
    # The warm-up that was missing is a row; the first policy's was run again, because it ran in another process, and is none.
    assert len(read_rows(tmp_path / "out" / "runs.csv", Run)) == 4


def test_schedules_under_the_virtual_clock(calibration: Path, engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert validate.main(words(calibration, out, "--clock", "virtual")) == 0
    assert "4 of 4 schedules identical to the simulator's" in capsys.readouterr().out
    assert {row.backend for row in read_rows(out / "schedules.csv", Schedules)} == {"vllm", "vllm-scheduler"}
    engine(Wrong)
    assert validate.main(words(calibration, out, "--clock", "virtual", "--overwrite")) == 1
    assert "vllm, vllm at " in capsys.readouterr().out


def test_the_hardware_page_says_that_the_gpu_part_is_open(calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "docs" / "llmsched_hardware.md"
    assert hardware_page.main(["--calibrations", str(calibration), "--out", str(out)]) == 0
    text = out.read_text()
    assert "**This part is open.**" in text and "### `c.json`" in text and "512 blocks of 16 tokens" in text
    assert "tau = 1 ms + 10 us a token" in text and "llama-3-8b-shape" in text
    assert hardware_page.main(["--validations", str(tmp_path), "--out", str(out)]) == 2
    assert "holds no report.md" in capsys.readouterr().err
