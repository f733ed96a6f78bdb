"""Benchmark files of a server whose truth is known: its iterations are seen, its coefficients found, another rate predicted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_files import ENGINE, FRONTEND, NOISE, TRUTH, Served, aiperf_records, guidellm_report, serve, vllm_result, write

from llmsched_env.errors import ConfigError
from llmsched_env.perf import FormulaTime
from llmsched_hardware.calibration.bench_fit import Fit, fit
from llmsched_hardware.calibration.bench_metrics import ServerCounters
from llmsched_hardware.calibration.bench_results import BenchResult, read_results
from llmsched_hardware.calibration.from_bench import FIGURES, calibrate
from llmsched_hardware.calibration.token_times import DECODES, ITERATIONS, KV, TOKENS, WORK, equations

RATES, OTHER = (3.0, 5.5), 4.5
TRUE = {"a": TRUTH.a, "b": TRUTH.b, "d1": TRUTH.d1, "d3": TRUTH.d3, "d4": TRUTH.d4, "frontend": FRONTEND}


def read(folder: Path, served: Served, form: Any = vllm_result, name: str = "r") -> BenchResult:
    (result,) = read_results(write(folder / name, form(served)))
    return result


@pytest.fixture(scope="module")
def runs() -> tuple[list[Served], Served]:
    return [serve(rate, 400, seed) for seed, rate in enumerate(RATES)], serve(OTHER, 400, 7)


def test_the_iterations_are_those_of_the_server(tmp_path: Path, runs: tuple[list[Served], Served]) -> None:
    result = read(tmp_path, runs[0][1])
    seen = equations(result, ENGINE)
    rows = seen.rows[seen.single]
    assert len(rows) > 3000 and seen.stalled == 0
    true = rows[:, ITERATIONS] * TRUTH.a + rows[:, TOKENS] * TRUTH.b + rows[:, KV] * TRUTH.d1 + rows[:, WORK] * TRUTH.d3
    ratio = seen.seconds[seen.single] / (true + rows[:, DECODES] * TRUTH.d4)
    # The times that clients see have a jitter of 0.2 ms, so a few iterations lie beyond the noise.
    assert np.mean(np.abs(ratio - 1.0) < NOISE / 2 + 0.05) > 0.97
    assert abs(ratio.mean() - 1.0) < 0.01


def test_prompts_longer_than_the_budget_are_seen_in_chunks(tmp_path: Path) -> None:
    engine = ENGINE.replace(max_num_batched_tokens=128, max_num_seqs=64)
    served = serve(2.0, 200, 3, engine)
    seen = equations(read(tmp_path, served), engine)
    rows = seen.rows[seen.single]
    assert seen.longest_chunk == 128 and rows[:, TOKENS].max() <= 128
    mixed = rows[rows[:, TOKENS] > rows[:, DECODES]]
    true = TRUTH.a + mixed[:, TOKENS] * TRUTH.b + mixed[:, KV] * TRUTH.d1 + mixed[:, WORK] * TRUTH.d3 + mixed[:, DECODES] * TRUTH.d4
    ratio = seen.seconds[seen.single][rows[:, TOKENS] > rows[:, DECODES]] / true
    assert abs(ratio.mean() - 1.0) < 0.02 and np.mean(np.abs(ratio - 1.0) < NOISE / 2 + 0.05) > 0.95


def held(found: Fit) -> dict[str, bool]:
    """Whether the truth lies within each interval, a tenth of its width allowed for: 95 % of them is not all."""
    inside = {}
    for i in found.intervals:
        slack = 0.1 * (i.high - i.low)
        inside[i.name] = i.low - slack <= TRUE[i.name] <= i.high + slack
    return inside


def test_the_truth_is_found_and_another_rate_predicted(tmp_path: Path, runs: tuple[list[Served], Served]) -> None:
    results = [read(tmp_path, served, name=f"r{i}.json") for i, served in enumerate(runs[0])]
    other = read(tmp_path, runs[1], name="other.json")
    found = calibrate(results, ENGINE, "synthetic", None, [other])
    assert found.fit.parameters.knee == 0
    assert all(held(found.fit).values()), found.fit.intervals
    (unseen,) = found.held_out
    assert abs(unseen.error("latency_mean")) < 0.05 and abs(unseen.error("tpot_mean")) < 0.05
    assert abs(unseen.error("latency_p99")) < 0.1 and abs(unseen.error("ttft_mean")) < 0.1
    assert 0.05 < found.fit.spread < 0.2 and max(map(abs, found.fit.drift)) < 0.05
    by_name = {i.name: i for i in found.fit.intervals}
    assert by_name["a"].determined and by_name["b"].determined
    assert sum(i.share for i in found.fit.intervals if i.name != "frontend") == pytest.approx(1.0)
    provenance = found.model.provenance
    assert "no prefill chunk above 39" in provenance.valid_range
    assert "Held out: other.json (400 requests" in provenance.fit_error and provenance.num_blocks is None
    assert "The front end adds" in provenance.notes


def test_a_term_that_the_data_cannot_tell_is_said_to_be_undetermined(tmp_path: Path) -> None:
    # One request after another, all alike: decodes, tokens and KV never change.
    count = 60
    arrival = 1000.0 + 2.0 * np.arange(count)
    rng = np.random.default_rng(0)
    tokens = []
    for a in arrival:
        gaps = TRUTH.a * rng.uniform(0.85, 1.15, 39)
        tokens.append(a + FRONTEND + 0.03 + np.concatenate([[0.0], np.cumsum(gaps)]))
    served = Served(arrival, [100] * count, [40] * count, tokens)
    found = calibrate([read(tmp_path, served)], ENGINE, "alike")
    determined = {i.name: i.determined for i in found.fit.intervals}
    assert not determined["d1"] and not determined["d3"] and not determined["d4"]
    assert "not determined" in found.model.provenance.notes


@pytest.mark.parametrize("form", [guidellm_report, aiperf_records], ids=["guidellm", "aiperf"])
def test_files_of_other_tools_predict_as_well(tmp_path: Path, runs: tuple[list[Served], Served], form: Any) -> None:
    results = [read(tmp_path, served, form, f"r{i}") for i, served in enumerate(runs[0])]
    found = calibrate(results, ENGINE, "other", None, [read(tmp_path, runs[1], form, "other")])
    (unseen,) = found.held_out
    assert all(abs(unseen.error(name)) < 0.1 for name in FIGURES)
    assert all(held(found.fit).values()), found.fit.intervals
    told = "no times of single tokens" in " ".join(found.notes)
    assert told == (form is guidellm_report)


def test_the_same_files_give_the_same_fit(tmp_path: Path, runs: tuple[list[Served], Served]) -> None:
    result = read(tmp_path, runs[0][0])
    first, second = fit([result], ENGINE), fit([result], ENGINE)
    assert str(first.intervals) == str(second.intervals) and np.array_equal(first.parameters.values, second.parameters.values)


def test_what_the_server_counted_is_set_against_the_replay(tmp_path: Path, runs: tuple[list[Served], Served]) -> None:
    result = read(tmp_path, runs[0][0])
    notes = calibrate([result], ENGINE, "n", ServerCounters(10, 2, None, None, None, None, None)).notes
    assert "preemptions: 2 on the server, 0 simulated" in notes
    assert any(note.endswith("the server counted 10") for note in notes)


def test_requests_that_the_engine_cannot_hold(tmp_path: Path, runs: tuple[list[Served], Served]) -> None:
    result = read(tmp_path, runs[0][0])
    with pytest.raises(ConfigError, match=r"tokens, the engine takes 256; set engine\.max_model_len"):
        calibrate([result], ENGINE.replace(max_model_len=256), "n")


def test_asynchronous_scheduling_is_replayed_as_such(tmp_path: Path) -> None:
    engine = ENGINE.replace(async_scheduling=True)
    results = [read(tmp_path, serve(rate, 400, seed, engine), name=f"r{seed}") for seed, rate in enumerate(RATES)]
    found = calibrate(results, engine, "async", None, [read(tmp_path, serve(OTHER, 400, 7, engine), name="other")])
    assert all(held(found.fit).values()), found.fit.intervals
    assert all(abs(found.held_out[0].error(name)) < 0.06 for name in FIGURES)
    assert "asynchronous scheduling" in found.model.provenance.engine


def test_a_step_in_the_token_line_is_found(tmp_path: Path) -> None:
    truth = FormulaTime(a=9e-3, b=0.0, s=7e-3, c=1.5e-4, d1=4e-7, d2=0.0, d3=0.0, d4=0.0, knee=128.0)
    results = [read(tmp_path, serve(rate, 400, seed, truth=truth), name=f"r{seed}") for seed, rate in enumerate((3.0, 10.0))]
    found = calibrate(results, ENGINE, "knee", None, [read(tmp_path, serve(6.0, 400, 7, truth=truth), name="other")])
    assert found.model.knee == 128.0
    values = {i.name: i for i in found.fit.intervals}
    assert values["c"].low <= truth.c <= values["c"].high and values["a"].value == pytest.approx(truth.a, rel=0.1)
    assert all(abs(found.held_out[0].error(name)) < 0.1 for name in FIGURES)


def test_an_engine_that_is_never_idle(tmp_path: Path) -> None:
    served = serve(12.0, 250, 5)
    result = read(tmp_path, served)
    found = calibrate([result], ENGINE, "overload", None, [read(tmp_path, serve(4.0, 300, 6), name="other")])
    low, delay, high = equations(result, ENGINE).delay
    assert low < delay < high and delay == pytest.approx(FRONTEND, abs=2e-3)
    assert found.frontend == pytest.approx(FRONTEND, abs=4e-3)


def test_all_requests_at_once(tmp_path: Path) -> None:
    result = read(tmp_path, serve(1e6, 150, 3))
    found = calibrate([result], ENGINE, "burst", None, [read(tmp_path, serve(4.0, 300, 6), name="other")])
    assert abs(found.runs[0].error("latency_mean")) < 0.03
    assert all(i.low <= i.value <= i.high and np.isfinite(i.high) for i in found.fit.intervals)


def test_outputs_of_one_token_say_too_little(tmp_path: Path) -> None:
    arrival = 1000.0 + 0.01 * np.arange(40)
    served = Served(arrival, [100] * 40, [1] * 40, [np.array([a + 0.5]) for a in arrival])
    with pytest.raises(ConfigError, match="outputs of several tokens"):
        calibrate([read(tmp_path, served)], ENGINE, "one")


def test_preempted_requests_are_seen_and_simulated(tmp_path: Path) -> None:
    engine = ENGINE.replace(max_model_len=512, num_blocks=200)
    served = [serve(rate, 300, seed, engine) for seed, rate in enumerate((4.0, 9.0))]
    results = [read(tmp_path, s, name=f"r{i}") for i, s in enumerate(served)]
    found = calibrate(results, engine, "small", ServerCounters(None, 100, None, None, None, None, None))
    assert found.runs[1].preemptions > 20 and found.fit.equations[1].stalled > 0
    assert any(note.startswith("preemptions: 100 on the server, ") for note in found.notes)
    values = {i.name: i.value for i in found.fit.intervals}
    assert values["a"] == pytest.approx(TRUTH.a, rel=0.05) and values["b"] == pytest.approx(TRUTH.b, rel=0.15)
    assert abs(found.runs[1].error("latency_mean")) < 0.05 and max(map(abs, found.fit.drift)) < 0.03
