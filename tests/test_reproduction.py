"""The reproduction: its statistics on tiny configurations, recomputed by other means, and its results on disk."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from llmsched_env.cli import reproduce
from llmsched_env.engine_config import EngineConfig
from llmsched_env.metrics import Interval
from llmsched_env.pages.reproduction.cases import (
    Case,
    Group,
    Outcome,
    drift,
    group_from_json,
    group_to_json,
    measure,
    run_case,
    without_prefill,
)
from llmsched_env.pages.reproduction.lab import Claim, Lab, Section, number, stable_rate
from llmsched_env.pages.reproduction.memory import buffer, toy
from llmsched_env.pages.reproduction.stability import fit, fluid_rate, growth
from llmsched_env.pages.reproduction.systems import LOADS, PLANS, evaluate, of_plan, stable_on_grid
from llmsched_env.perf import load_calibration
from llmsched_env.runner import run_episode

TINY = Case(
    "wait",
    3.0,
    engine=(("capacity_tokens", 3750), ("d0", 1.0), ("d1", 1e-3)),
    types=((10, 10, 2.0), (10, 20, 1.0)),
    horizon=400.0,
    seeds=2,
)


def outcome(**changes: float) -> Outcome:
    return Outcome(**{**{name: 0 for name in Outcome.__slots__}, **changes})  # type: ignore[arg-type]


def test_the_figures_of_a_run_recomputed_from_its_log() -> None:
    policy = TINY.build()
    result = run_episode(policy, TINY.workload(0), limits=TINY.limits())
    log, found = result.log, run_case(TINY).outcomes[0]
    rows = [(a, c, t, o) for a, c, t, o in zip(log.arrival, log.completed, log.first_token, log.output_tokens, strict=True)]
    window = [c - a for a, c, _, _ in rows if 80 <= a <= 360 and c == c]
    assert found.latency == pytest.approx(sum(window) / len(window))
    assert found.ttft == pytest.approx(np.mean([t - a for a, _, t, _ in rows if 80 <= a <= 360 and t == t]))
    assert found.completed == pytest.approx(sum(80 <= c <= 400 for _, c, _, _ in rows) / 320)
    assert found.tokens == pytest.approx(sum(int(o) for _, c, _, o in rows if 80 <= c <= 400) / 320)
    assert found.gap == sum(int(o) for _, c, _, o in rows if c != c)
    assert found.evictions == 0
    assert found.kv_peak <= 3750


def test_drift_is_the_rate_at_which_requests_pile_up() -> None:
    arrival = np.arange(0.0, 1000.0, 0.1)
    assert drift(arrival, arrival + 5.0, 1000.0) == pytest.approx(0.0, abs=0.01)
    served = np.arange(0.0, 1000.0, 0.125)  # 8 a second of 10
    assert drift(arrival, served, 1000.0) == pytest.approx(2.0, rel=0.01)


def test_overload_drifts_and_a_light_load_does_not() -> None:
    light, heavy = (run_case(TINY.but(policy="fcfs", rate=rate, horizon=3000.0)) for rate in (1.5, 6.0))
    assert abs(light.mean("drift")) < 0.02
    assert heavy.mean("drift") > 0.3


def test_the_search_brackets_the_largest_stable_rate() -> None:
    def group(rate: float, *drifts: float) -> Group:
        return Group(TINY.but(rate=rate), "", tuple(outcome(drift=d) for d in drifts), 0.0)

    found = stable_rate([group(1, 0.0, 0.001), group(2, 0.004, 0.02), group(3, 0.2, 0.21), group(2.5, -0.1, 0.1)], 0.01)
    assert found.rate == 2.5  # the mean decides; the intervals of 2 and 2.5 hold the bar
    assert found.low == 1
    assert found.high == 3


def test_largest_stable_rate_of_wait_is_near_the_fluid_boundary(tmp_path: Path) -> None:
    lab = Lab(tmp_path, tmp_path, quick=True, jobs=1)
    edge = fluid_rate(TINY.types, 3750)
    (found,) = lab.largest_stable("test", [(TINY.but(horizon=4000.0), 0.5 * edge, 1.3 * edge)], 4)
    assert 0.9 * edge <= found.rate <= 1.05 * edge


def test_fits_recover_known_powers() -> None:
    x = [1000.0, 2000.0, 4000.0, 8000.0, 16000.0, 32000.0]
    slope = fit(x, [3.0 * t**-0.5 for t in x])
    assert slope.mean == pytest.approx(-0.5)
    assert slope.half_width < 1e-6
    power = growth(x, [50.0 + 0.7 * t**0.5 for t in x])
    assert power.mean == pytest.approx(0.5, abs=1e-3)
    noisy = growth(x, [50.0, 50.1, 49.9, 50.05, 49.95, 50.0])
    assert math.isnan(noisy.mean) or noisy.low < 0.5


def test_toy_system_from_six_three_cycles_and_from_four_four_does_not() -> None:
    bad, good = toy((6, 3), "backlog", 40), toy((4, 4), "backlog", 40)
    assert bad.completed[1:9].tolist() == [3, 6, 0, 6, 0, 6, 0, 6]
    assert set(good.completed[1:40].tolist()) == {4.0}
    assert good.evictions.sum() == 0


def test_toy_system_with_four_arrivals_an_iteration_is_unstable() -> None:
    run = toy((6, 3), "4", 402)
    assert run.completed[1:401].mean() == pytest.approx(3.0075, abs=0.02)


def test_overflow_probability_is_below_delta_on_a_tiny_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab(tmp_path, tmp_path / "figures", quick=True, jobs=1)
    monkeypatch.setattr(lab, "pick", lambda full, quick: {1000: 20, 20000.0: 2000.0}.get(full, quick))
    claims, _ = buffer(lab)
    assert claims[0].verdict == "agrees"


def test_results_are_kept_by_configuration_and_survive_damage(tmp_path: Path) -> None:
    lab = Lab(tmp_path, tmp_path, quick=True, jobs=1)
    (first,) = lab.run("test", [TINY])
    assert lab.computed == 1
    again = Lab(tmp_path, tmp_path, quick=True, jobs=1)
    assert again.run("test", [TINY, TINY]) == [first, first]
    assert (again.computed, set(again.seconds)) == (0, {TINY.key})
    assert TINY.but(rate=3.1).key != TINY.key
    path = tmp_path / f"{TINY.key}.json"
    path.write_text(path.read_text()[:100], encoding="utf-8")
    broken = Lab(tmp_path, tmp_path, quick=True, jobs=1)
    assert broken.run("test", [TINY])[0].outcomes == first.outcomes
    assert broken.computed == 1


def test_a_group_survives_json() -> None:
    case = TINY.but(arrivals=("mmpp", 0.2, 3.4, 60.0, 20.0), options=(("thresholds", (10, 5)),))
    group = run_case(case)
    assert group_from_json(json.loads(json.dumps(group_to_json(group)))) == group


def test_tuning_takes_the_best_trial_on_seeds_of_its_own(tmp_path: Path) -> None:
    lab = Lab(tmp_path, tmp_path, quick=True, jobs=1)
    plan = next(p for p in PLANS if p.label == "WAIT-CP, tuned")
    base = Case("", 12.0, preset="vllm", types=((512, 20, 1.0),), requests=100, seeds=1)
    results, chosen = evaluate(lab, "test", {12.0: base}, [plan])
    latencies = [run_case(of_plan(base, plan, i).but(first_seed=1000)).mean("latency") for i in range(len(plan.trials))]
    assert chosen[plan.label, 12.0] == int(np.argmin(latencies))
    assert results[plan.label, 12.0].case.first_seed == 0
    kept = [json.loads(path.read_text(encoding="utf-8"))["case"] for path in tmp_path.glob("*.json")]
    assert sorted(case["first_seed"] for case in kept) == [0] + [1000] * len(plan.trials)


def test_every_tuned_plan_has_as_many_trials() -> None:
    assert {len(plan.trials) for plan in PLANS if plan.tuned} == {8}
    for load in LOADS:
        for plan in PLANS:
            for trial in range(len(plan.trials)):
                base = Case("", load.rates[0], engine=load.engine, preset="vllm", types=load.types, lengths=load.lengths, requests=10)
                of_plan(base, plan, trial).build()


def test_largest_stable_rate_on_a_grid_ends_at_the_first_unstable_one() -> None:
    results = {("p", r): Group(TINY, "", (outcome(drift=d),), 0.0) for r, d in ((1.0, 0.0), (2.0, 0.05), (3.0, 0.0))}
    assert stable_on_grid(results, "p", [1.0, 2.0, 3.0], 0.01) == (1.0, 2.0)


def test_decode_only_engine_takes_no_time_for_prompts() -> None:
    engine = EngineConfig.vllm(time_model=load_calibration("a100-llama2-7b-c10"))
    packed = without_prefill(engine)
    assert packed.d3 == 0 == packed.b == packed.c
    assert packed.d4 == pytest.approx(engine.time_model.b + engine.time_model.d4)  # type: ignore[attr-defined]


def test_engine_that_loses_progress_computes_more_tokens() -> None:
    case = Case("vllm", 2.0, engine=(("num_blocks", 400),), preset="vllm", types=((512, 600, 1.0),), requests=40, seeds=1)
    case = case.but(engine=(("num_blocks", 400), ("max_model_len", 2048)))
    keep, lose = run_case(case), run_case(case.but(engine=(*case.engine, ("eviction", "lose_progress"))))
    assert keep.outcomes[0].evictions > 0
    assert lose.outcomes[0].iterations > keep.outcomes[0].iterations


def test_measure_leaves_out_what_has_not_completed() -> None:
    policy = TINY.build()
    result = run_episode(policy, TINY.workload(1), limits=TINY.limits())
    found = measure(result.log, result.counters, 200.0, 3750)
    assert math.isfinite(found.latency)
    assert found.completed * 160 == np.count_nonzero((result.log.completed >= 40) & (result.log.completed <= 200))


def test_page_lists_every_claim_and_refuses_bad_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    claims = [Claim("a | b", "1", "2", "differs", "because"), Claim("c", "3", "3", "agrees")]
    monkeypatch.setattr(reproduce, "SECTIONS", {"one": lambda lab: Section("One", claims, ["text"])})
    out = tmp_path / "page.md"
    assert reproduce.main(["--quick", "--out", str(out), "--results", str(tmp_path / "results"), "--jobs", "1"]) == 0
    text = out.read_text()
    assert "| a \\| b | 1 | 2 | **differs** (because) |" in text
    assert "1 claims agree, 1 differ, 0 are not comparable" in text
    assert reproduce.main(["--jobs", "0", "--out", str(out)]) == 2
    assert "--jobs" in capsys.readouterr().err


def test_finished_configurations_are_resumed_or_discarded_as_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(lab: Lab) -> Section:
        lab.run("first", [TINY])
        raise KeyboardInterrupt

    def whole(lab: Lab) -> Section:
        lab.run("both", [TINY, TINY.but(rate=2.0)])
        return Section("One", [], ["text"], {"fact": 1.0})

    results, out = tmp_path / "results", tmp_path / "page.md"
    words = ["--quick", "--out", str(out), "--results", str(results), "--jobs", "1"]
    monkeypatch.setattr(reproduce, "SECTIONS", {"one": interrupted})
    assert reproduce.main(words) == 130
    assert "go on with --resume" in capsys.readouterr().err and not out.exists()
    assert [path.stem for path in results.glob("*.json")] == [TINY.key]
    monkeypatch.setattr(reproduce, "SECTIONS", {"one": whole})
    assert reproduce.main(words) == 2
    assert capsys.readouterr().err.startswith(f"error: --results: {results} holds finished configurations already")
    assert reproduce.main([*words, "--resume", "--quiet"]) == 0
    assert "1 configurations run, 1 read from" in capsys.readouterr().out
    assert reproduce.main([*words, "--overwrite", "--json", str(tmp_path / "found.json")]) == 0
    text, err = capsys.readouterr()
    assert "2 configurations run, 0 read from" in text and "both" in err
    assert json.loads((tmp_path / "found.json").read_text())["found"] == {"claims": [], "facts": {"fact": 1.0}}
    for word, hint in (("ones", "did you mean 'one'"), ("systems", "parts: one")):
        assert reproduce.main([*words, "--resume", "--only", word]) == 2
        assert hint in capsys.readouterr().err


@pytest.mark.parametrize(("value", "text"), [(0.0123456, "0.0123"), (123456.0, "123,456"), (math.nan, "-"), (0.0, "0"), (math.inf, "inf")])
def test_numbers_have_significant_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_interval_type_is_the_projects() -> None:
    assert isinstance(fit([1, 2, 4], [1, 2, 4.1]), Interval)
