"""`llmsched advise`: what is asked, what is searched, what is said of it, and how a server is started with it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmsched_agents.lookup import named_policies
from llmsched_agents.statistics import relative_difference
from llmsched_baselines import Setting
from llmsched_env.bench import advice_result
from llmsched_env.bench.advice import DEFAULT, Case, Choice, Objective, Row, parse_objective
from llmsched_env.bench.advice_check import ENGINE, SIM, Check, Run, check_summary, seen
from llmsched_env.bench.advice_search import Study, around, check_budget, grid_around
from llmsched_env.bench.advice_serve import check_server, flags_of, longest_stay, start_of
from llmsched_env.cli import advise
from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import ConfigError
from llmsched_env.metrics import Summary
from llmsched_env.perf import FormulaTime, Provenance, save_calibration
from llmsched_env.row_file import RowFile, read_rows
from llmsched_env.workload import load_scenario
from llmsched_hardware.live_config import LiveConfig, build_policy
from llmsched_hardware.serve_defaults import serve_limits, served

# An iteration lasts 10 ms whatever is in it: the more that is in it, the better.
SOURCE = Provenance(name="flat", gpu="none", num_blocks=4_000, block_size=16)
FLAT = FormulaTime(0.01, 0.0, 0.01, 0.0, 0.0, 0.0, 0.0, 0.0, provenance=SOURCE)
# Every prompt token beside a decode costs 1 ms: the fewer there are in an iteration, the sooner the decodes come.
DEAR = replace(FLAT, b=1e-3, c=1e-3, provenance=replace(FLAT.provenance, name="dear", gpu="A100"))
SCENARIO = """
num_requests = 150
ttft_slo = 1.0
tpot_slo = 0.05
[lengths]
types = { prompt = [200, 40], output = [20, 60], weight = [1.0, 2.0] }
[arrivals]
process = "poisson"
rate = 8.0
"""
SMALL = ("--selection", "2", "--evaluation", "4", "--finalists", "2", "--jobs", "1", "--quiet")


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    path = tmp_path / "service.toml"
    path.write_text(SCENARIO)
    return path


def calibrated(model: FormulaTime, folder: Path) -> str:
    path = folder / f"{model.provenance.name}.json"
    save_calibration(model, path)
    return str(path)


def called(model: FormulaTime, scenario: Path, *words: object) -> list[str]:
    out = scenario.parent / "out"
    given = ("--calibration", calibrated(model, scenario.parent), "--scenario", scenario, "--out", out, *SMALL, *words)
    return [str(word) for word in given]


def found(scenario: Path, words: list[str], code: int = 0) -> dict[str, Any]:
    path = scenario.parent / "found.json"
    assert advise.main([*words, "--json", str(path)]) == code
    record: dict[str, Any] = json.loads(path.read_text())["found"]
    return record


def case_of(scenario: Path, model: FormulaTime = FLAT, policies: tuple[str, ...] = ("vllm",), **changes: Any) -> Case:
    workload = load_scenario(str(scenario))
    engine = EngineConfig.vllm(time_model=model, num_blocks=4_000)
    given = {"rate": 8.0, "num_requests": 60, "selection": 2, "evaluation": 4, "objective": parse_objective("latency")}
    return Case(replace(workload, engine=engine), named_policies("--policies", policies), **{**given, **changes})


# --- what is asked --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "metric"), [("latency", "latency_mean"), ("p99", "latency_p99"), ("ttft", "ttft_mean"), ("tpot", "tpot_mean")]
)
def test_an_objective_is_a_word(text: str, metric: str) -> None:
    assert parse_objective(text) == Objective(text, metric)
    assert not parse_objective(text).higher_is_better


def test_an_objective_is_limits() -> None:
    both = parse_objective("slo:ttft=1.0, tpot=0.05")
    assert (both.metric, both.ttft_limit, both.tpot_limit, both.higher_is_better) == ("slo_goodput", 1.0, 0.05, True)
    assert both.name == "share of requests with TTFT <= 1 s and TPOT <= 0.05 s"
    one = parse_objective("slo:tpot=0.05")
    assert one.ttft_limit == math.inf and one.name == "share of requests with TPOT <= 0.05 s"
    assert "slo_goodput" in one.metrics and "slo_goodput" not in parse_objective("p99").metrics


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("latancy", "did you mean 'latency'"),
        ("", "must be one of latency, p99, ttft, tpot, slo:"),
        ("latency:1", "must be one of"),
        ("slo", "names no limit"),
        ("slo:", "names no limit"),
        ("slo:ttft", "'ttft' in 'slo:ttft', must be slo:ttft=SECONDS"),
        ("slo:tfft=1", "did you mean 'ttft'"),
        ("slo:ttft=1,ttft=2", "ttft is there twice"),
        ("slo:ttft=0", "ttft='0', must be a number of seconds > 0"),
        ("slo:ttft=nan", "must be a number of seconds > 0"),
        ("slo:tpot=fast", "tpot='fast', must be a number of seconds > 0"),
    ],
)
def test_another_objective_is_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match="--objective") as refusal:
        parse_objective(text)
    assert says in str(refusal.value)


def test_the_cost_of_unserved_requests_is_infinite() -> None:
    figures = replace(Summary.absent(), requests=10, completed=10, latency_mean=2.0, slo_goodput=0.5)
    assert parse_objective("latency").cost(figures) == 2.0
    assert parse_objective("slo:ttft=1").cost(figures) == -0.5
    assert parse_objective("latency").cost(replace(figures, completed=9)) == math.inf
    assert parse_objective("latency").cost(replace(figures, completed=9, rejected=1)) == 2.0
    assert parse_objective("tpot").cost(figures) == math.inf


@pytest.mark.parametrize(
    ("device", "limits"),
    [
        ("NVIDIA A100-SXM4-80GB", (2_048, 256)),
        ("NVIDIA H100 80GB HBM3, driver 550", (8_192, 1_024)),
        ("NVIDIA B200", (16_384, 1_024)),
        ("NVIDIA GeForce RTX 4090", (2_048, 256)),
        ("Intel(R) Xeon(R) Processor", (2_048, 128)),
        ("", (2_048, 256)),
    ],
)
def test_the_default_is_what_vllm_serve_chooses_by_the_device(device: str, limits: tuple[int, int]) -> None:
    chosen = serve_limits(device)
    assert (chosen.max_num_batched_tokens, chosen.max_num_seqs) == limits and chosen.why
    engine = served(EngineConfig.vllm(max_model_len=4), device)
    assert engine.max_num_batched_tokens == min(limits[0], 4 * limits[1])


# --- what is searched -----------------------------------------------------------------------------
def test_grids_reach_around_the_default_and_hold_it() -> None:
    assert around((4, 10, 100, 1_000), 40) == (4, 10, 40, 100)
    engine = EngineConfig.vllm(max_num_batched_tokens=1_000, max_num_seqs=100)
    setting = Setting(load_scenario("lmsys").statistics, 1.0, engine)
    own_options = {"vllm": set(), "sarathi": {"budget", "max_num_seqs"}, "active-cap": {"cap"}, "prefill-threshold": {"threshold"}}
    for name, own in own_options.items():
        shipped = named_policies("--policies", [name])[name].build(setting)
        grid = grid_around(name, shipped, engine, 1.0)
        engine_axes = {"engine.max_num_batched_tokens", "engine.max_num_seqs"}
        assert set(grid) - engine_axes == own
        assert ("engine.max_num_batched_tokens" in grid) == (name != "sarathi")
        if "engine.max_num_batched_tokens" in grid:
            assert 1_000 in grid["engine.max_num_batched_tokens"] and max(grid["engine.max_num_batched_tokens"]) <= 4_000


def test_parts_of_the_selection_and_of_the_evaluation_are_different_requests(scenario: Path) -> None:
    case = case_of(scenario)
    assert len(case.selection_seeds) == 2 and len(case.evaluation_seeds) == 4
    assert not set(case.selection_seeds) & set(case.evaluation_seeds)
    times = [tuple(case.workload(seed).arrival) for seed in case.all_seeds]
    assert len(set(times)) == 6


def test_windows_of_a_trace_are_its_requests_in_order_and_spread(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "trace.csv", 250)
    scenario = advise.Advise(calibration="x", trace=path, out=tmp_path).read(path, None)
    case = Case(scenario, {}, scenario.rate, 40, 2, 4, parse_objective("latency"))
    assert case.windows and case.selection_seeds == (1, 4) and case.evaluation_seeds == (0, 2, 3, 5)
    assert scenario.rows is not None
    window = case.workload(4)
    np.testing.assert_array_equal(window.prompt_tokens, scenario.rows.prompt_tokens[160:200])
    np.testing.assert_allclose(window.arrival, scenario.rows.arrival[160:200] - scenario.rows.arrival[160])
    seen_lengths = {*scenario.rows.prompt_tokens[40:80].tolist(), *scenario.rows.prompt_tokens[160:200].tolist()}
    assert set(case.statistics.prompt.tolist()) <= seen_lengths | set(np.arange(min(seen_lengths), max(seen_lengths) + 1))
    assert case.statistics.prompt.max() <= max(seen_lengths)


def write_trace(path: Path, count: int) -> Path:
    rng = np.random.default_rng(3)
    times = np.cumsum(rng.exponential(0.1, count))
    lines = [f"{t:.4f},{p},{o}" for t, p, o in zip(times, rng.integers(8, 300, count), rng.integers(2, 60, count), strict=True)]
    path.write_text("\n".join(["arrived_at,prompt_tokens,output_tokens", *lines]) + "\n")
    return path


def test_where_an_iteration_costs_the_same_whatever_is_in_it_more_is_better(scenario: Path) -> None:
    """Two residents at once and 64 tokens hold the service back; nothing else does."""
    limits = ("--set", "engine.max_num_seqs=4", "engine.max_num_batched_tokens=64")
    out = found(scenario, called(FLAT, scenario, "--policies", "vllm", "--budget", 150, *limits))
    options = dict(out["advised"]["options"])
    assert options["engine.max_num_seqs"] > 4
    first, default = out["advice"]["entries"][0], out["advice"]["entries"][-1]
    assert out["advice"]["shown"] and first["gains"]["latency_mean"]["high"] < 0
    assert default["choice"] == {"policy": "vllm", "options": []}
    assert "--max-num-seqs " + str(options["engine.max_num_seqs"]) in out["command"] and "LLMSCHED" not in out["command"]
    assert not (scenario.parent / "out" / "policy.json").exists()


def test_where_prompt_tokens_keep_decodes_waiting_fewer_in_an_iteration_are_better_for_tpot(
    scenario: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = called(DEAR, scenario, "--policies", "vllm", "prefill-threshold", "--budget", 150, "--objective", "tpot", "--rate", 2)
    out = found(scenario, words)
    assert out["advice"]["shown"]
    flags = out["flags"]
    budget = int(next(flag for flag in flags if flag.startswith("--max-num-batched-tokens")).split()[1])
    threshold = [int(flag.split()[1]) for flag in flags if flag.startswith("--long-prefill-token-threshold")]
    assert min([budget, *threshold]) <= 256 < 2_048
    first = out["advice"]["entries"][0]["gains"]
    assert first["tpot_mean"]["high"] < 0 < first["ttft_mean"]["value"]
    monkeypatch.setattr(advice_result, "DEAR", 0.0)
    kept = found(scenario, [*words, "--overwrite", "--at-most", "ttft=1.001"])
    assert any("break a limit of --at-most" in text for text in kept["advice"]["warnings"])
    assert all(one["gains"]["ttft_mean"]["value"] < first["ttft_mean"]["value"] for one in kept["advice"]["entries"])
    dear = found(scenario, [*words, "--resume"])  # the same rows, without that limit
    assert any("has a price: " in text and "TTFT +" in text for text in dear["advice"]["warnings"])
    assert dear["advice"]["entries"] == out["advice"]["entries"]


# --- what is said ---------------------------------------------------------------------------------
def test_intervals_are_paired_and_of_requests_that_chose_nothing(scenario: Path) -> None:
    limits = ("--set", "engine.max_num_seqs=4")
    out = found(scenario, called(FLAT, scenario, "--policies", "vllm", "sarathi", "--budget", 150, *limits))
    rows = read_rows(scenario.parent / "out" / "rows.csv", Row)
    case = case_of(scenario)
    entries = out["advice"]["entries"]
    judged = {(e["choice"]["policy"], Choice("", tuple(map(tuple, e["choice"]["options"]))).options_text) for e in entries}
    assert {(r.policy, r.options) for r in rows if r.seed in case.evaluation_seeds} == judged and len(judged) == 3
    key = (entries[0]["choice"]["policy"], Choice("", tuple(map(tuple, entries[0]["choice"]["options"]))).options_text)
    values = {r.seed: r.figures.latency_mean for r in rows if (r.policy, r.options) == key}
    default = {r.seed: r.figures.latency_mean for r in rows if (r.policy, r.options) == ("vllm", "")}
    assert sorted(values) == sorted(default) == list(range(6))
    by_hand = relative_difference([values[s] for s in case.evaluation_seeds], [default[s] for s in case.evaluation_seeds])
    gain = entries[0]["gains"]["latency_mean"]
    assert (gain["value"], gain["low"], gain["high"], gain["seeds"]) == (by_hand.value, by_hand.low, by_hand.high, 4)
    assert entries[0]["selected"] == pytest.approx(np.mean([values[s] for s in case.selection_seeds]))
    report = (scenario.parent / "out" / "report.md").read_text()
    assert "so that the choice does not flatter them" in report and "![" in report
    assert (scenario.parent / "out" / "advice.png").stat().st_size > 5_000


def test_where_nothing_is_better_the_default_is_kept(scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A request a minute: no setting changes anything."""
    out = found(scenario, called(FLAT, scenario, "--policies", "vllm", "--budget", 150, "--rate", 0.02, "--num-requests", 20))
    assert not out["advice"]["shown"] and out["advised"] == {"policy": "vllm", "options": []}
    assert "keep the default" in capsys.readouterr().out
    assert "--max-num-batched-tokens 2048 --max-num-seqs 256" in out["command"]


def test_a_load_above_the_boundary_is_said(scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = found(scenario, called(DEAR, scenario, "--policies", "vllm", "--budget", 150, "--rate", 50))
    assert any("not below the stability boundary" in text for text in out["advice"]["warnings"])
    assert "queues grow" in capsys.readouterr().out


def test_leaving_the_calibration_is_said_and_not_advised(scenario: Path) -> None:
    model = replace(FLAT, max_decodes=6.0, provenance=replace(FLAT.provenance, valid_range="up to 6 decodes", fit_error="MAPE 4 %"))
    out = found(scenario, called(model, scenario, "--policies", "vllm", "--budget", 150, "--set", "engine.max_num_seqs=4"))
    advised = out["advice"]["entries"][0]
    assert dict(advised["choice"]["options"]).get("engine.max_num_seqs", 4) <= 6 and advised["outside"] <= 0.05
    text = " ".join(out["advice"]["warnings"])
    assert "of the settings tried are not advised, as they go further beyond the calibration" in text and "MAPE 4 %" in text
    wide = found(scenario, [*called(model, scenario, "--policies", "vllm", "--budget", 150), "--overwrite"])
    assert any("lie outside the range of the calibration (up to 6 decodes)" in text for text in wide["advice"]["warnings"])


def test_a_gain_below_the_engines_own_spread_is_said(scenario: Path) -> None:
    limits = ("--set", "engine.max_num_seqs=4")
    for spread, says in ((99, "is below it: do not expect to see it"), (1, "A gain below it cannot be seen")):
        notes = f"Made up. The same batch differs by {spread} % between sweeps (mean of range over median). Else nothing."
        model = replace(FLAT, provenance=replace(SOURCE, name=f"spread{spread}", notes=notes))
        words = called(model, scenario, "--policies", "vllm", "--budget", 80, *limits)
        text = " ".join(found(scenario, [*words, "--overwrite"])["advice"]["warnings"])
        assert f"The same batch differs by {spread} % between sweeps" in text and says in text and "Else" not in text


def test_a_setting_that_cannot_carry_the_load_is_not_advised(scenario: Path) -> None:
    """Fewer residents make every iteration shorter, and TPOT with it, until they no longer keep up."""
    model = replace(FLAT, b=5e-3, c=1e-5, provenance=replace(FLAT.provenance, name="steep"))
    words = called(model, scenario, "--policies", "vllm", "--budget", 200, "--objective", "tpot", "--rate", 3)
    out = found(scenario, words)
    first = out["advice"]["entries"][0]
    assert first["boundary"] > 3.0
    assert any("cannot carry the load, which the default can" in text for text in out["advice"]["warnings"])


def test_limits_that_no_request_can_meet_end_with_1(scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = found(scenario, called(FLAT, scenario, "--policies", "vllm", "--budget", 150, "--objective", "slo:ttft=0.001"), code=1)
    assert not out["advice"]["possible"] and out["advised"] == {"policy": "vllm", "options": []}
    assert "No request of any setting tried met the limits (slo:ttft=0.001)" in capsys.readouterr().out


def test_a_share_is_made_large(scenario: Path) -> None:
    words = called(FLAT, scenario, "--policies", "vllm", "--budget", 150, "--objective", "slo:ttft=0.1,tpot=0.02", "--set")
    out = found(scenario, [*words, "engine.max_num_seqs=4"])
    first = out["advice"]["entries"][0]
    assert out["advice"]["shown"] and first["gains"]["slo_goodput"]["low"] > 0
    assert 0 < first["figures"]["slo_goodput"]["value"] <= 1


# --- broken off and gone on with ------------------------------------------------------------------
def test_ctrl_c_keeps_rows_and_resume_ends_as_if_nothing_had_been(
    scenario: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = called(FLAT, scenario, "--policies", "vllm", "sarathi", "--budget", 150, "--set", "engine.max_num_seqs=4")
    whole = found(scenario, words)
    total = len(read_rows(scenario.parent / "out" / "rows.csv", Row))
    run, left = Case.run, [25]

    def interrupted(self: Case, choice: Choice, policy: Any, seed: int) -> Row:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return run(self, choice, policy, seed)

    monkeypatch.setattr(Case, "run", interrupted)
    assert advise.main([*words, "--overwrite"]) == 130
    assert "go on with --resume" in capsys.readouterr().err
    assert len(read_rows(scenario.parent / "out" / "rows.csv", Row)) == 25
    left[0] = 10_000
    assert advise.main(words) == 2  # it says neither --resume nor --overwrite
    again = found(scenario, [*words, "--resume"])
    assert 10_000 - left[0] == total - 25
    assert again["advice"] == whole["advice"] and again["command"] == whole["command"]


def test_more_threads_find_the_same(scenario: Path) -> None:
    words = called(FLAT, scenario, "--policies", "vllm", "sarathi", "prefill-threshold", "--budget", 200, "--set", "engine.max_num_seqs=4")
    one = found(scenario, words)
    words[words.index("--jobs") + 1] = "3"
    assert found(scenario, [*words, "--overwrite"])["advice"] == one["advice"]


def test_resume_refuses_other_settings(scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = called(FLAT, scenario, "--policies", "vllm", "--budget", 80)
    assert advise.main(words) == 0
    assert advise.main([*words, "--resume", "--rate", "3"]) == 2
    assert "but what" in capsys.readouterr().err
    assert advise.main([*words[:-1], "120", "--resume"]) == 0  # a larger budget goes on


# --- refused before any work ----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--objective", "slo:ttft=-1"], "--objective: ttft='-1', must be a number of seconds > 0"),
        (["--at-most", "latancy=2"], "--at-most: 'latancy=2', must be METRIC=FACTOR with one of latency, p99, ttft, ttft-p99, tpot; did"),
        (["--at-most", "p99=0"], "--at-most: p99='0', must be a factor > 0, such as p99=1.2"),
        (["--at-most", "p99=2", "p99=3"], "--at-most: p99 is there twice"),
        (["--budget", "20"], "--budget: 20 simulations, must be >="),
        (["--evaluation", "1"], "--evaluation: 1, must be >= 2"),
        (["--finalists", "0"], "--finalists: 0, must be >= 1"),
        (["--rate", "0"], "--rate: 0, must be finite and > 0"),
        (["--vllm", "0.1.0"], "--vllm: '0.1.0', must be one of 0.28.0"),
        (["--set", "policy.theta=1"], "--set policy.theta=1: options of policies are searched"),
        (["--set", "engine.max_num_seq=1"], "did you mean 'max_num_seqs'"),
        (["--set", "engine.max_model_len=100"], "--set engine.max_model_len: 100, but requests have up to 220 tokens"),
        (["--policies", "vlm"], "did you mean 'vllm'"),
        (["--policies", "wait"], "give --assume-max-tokens"),
        (["--policies", "prefill-cadence", "--vllm", "0.32.0"], "prefill_schedule_interval = 2 needs vLLM 0.33, the server has 0.32.0"),
        (["--policies", "prefill-decode-interval", "--vllm", "0.33.0"], "for which no vLLM has a setting"),
        (["--calibration", "nowhere"], "--calibration: calibration 'nowhere' is unknown"),
        (["--model", ""], "an empty word"),
    ],
)
def test_what_cannot_be_searched_is_refused(words: list[str], says: str, scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = called(FLAT, scenario, *words)
    if words[0] == "--calibration":
        given = given[2:]
    assert advise.main(given) == 2
    assert says in capsys.readouterr().err
    assert not (scenario.parent / "out").exists()


def test_a_trace_that_is_too_short_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_trace(tmp_path / "trace.csv", 60)
    words = ["--calibration", calibrated(FLAT, tmp_path), "--trace", str(path), "--out", str(tmp_path / "out"), *SMALL]
    assert advise.main(words) == 2
    assert "60 requests in 6 windows are 10 each, must be at least 20" in capsys.readouterr().err
    assert advise.main([*words, "--num-requests", "50"]) == 2
    assert "--num-requests: 50, must be <= 10" in capsys.readouterr().err


def test_a_budget_covers_the_evaluation(scenario: Path) -> None:
    case = case_of(scenario)
    check_budget(case, 3 * 4 + 6 * 2, 2)
    with pytest.raises(ConfigError, match="must be >= 24"):
        check_budget(case, 23, 2)


# --- how a server is started ----------------------------------------------------------------------
def test_flags_are_the_limits_what_differs_and_what_was_given() -> None:
    engine = EngineConfig.vllm(max_num_batched_tokens=512, watermark=0.01, num_blocks=100, max_model_len=1_024)
    assert flags_of(engine) == ["--max-num-batched-tokens 512", "--max-num-seqs 256", "--watermark 0.01", "--max-model-len 1024"]
    assert flags_of(engine, ("num_blocks",))[-2:] == ["--max-model-len 1024", "--num-gpu-blocks-override 101"]
    assert "--block-size 16" in flags_of(engine, ("num_blocks",))


def test_a_policy_of_this_project_comes_with_its_configuration(scenario: Path, tmp_path: Path) -> None:
    case = case_of(scenario, policies=("vllm", "reserve"))
    begin = start_of(case, Choice("reserve", (("theta", 0.9), ("engine.max_num_batched_tokens", 512))))
    command = begin.command("a model", "policy.json")
    variables = "LLMSCHED_POLICY=reserve LLMSCHED_POLICY_CONFIG=policy.json"
    assert command.startswith(f"{variables} vllm serve 'a model' --scheduler-cls llmsched_hardware.serve.PolicyScheduler")
    assert "--max-num-batched-tokens 512" in command
    begin.write(tmp_path / "policy.json")
    config = LiveConfig.from_environment({"LLMSCHED_POLICY": begin.policy, "LLMSCHED_POLICY_CONFIG": str(tmp_path / "policy.json")})
    live = build_policy(config, case.scenario.engine.replace(max_num_batched_tokens=512))
    assert live.policy.name == "reserve" and live.setting.rate == 8.0 and config.options == {"theta": 0.9}
    assert live.setting.statistics.mean_output == pytest.approx(case.statistics.mean_output)
    start_of(case, DEFAULT).write(tmp_path / "policy.json")
    assert not (tmp_path / "policy.json").exists()


@pytest.mark.parametrize("name", ["nested-wait", "wait", "expected-work", "generalist", "slo"])
def test_what_is_searched_can_be_started(name: str, scenario: Path, tmp_path: Path) -> None:
    """Every setting that a search tries and that is not refused: a server with those flags takes the policy."""
    case = case_of(scenario, policies=("vllm", name))
    with RowFile(tmp_path / "rows.csv", Row, resume=False) as rows:
        study = Study(case, 120, 1, rows)
        study.search(1)
    served_too = [one.choice for one in study.tried.values() if one.figures and one.choice.policy == name]
    assert served_too
    for choice in served_too[:6]:
        begin = start_of(case, choice)
        assert begin.policy == name and begin.config is not None
        fixed = name in ("generalist", "slo")  # an agent brings its token budget
        assert not fixed or not any(option == "engine.max_num_batched_tokens" for option, _ in choice.options)


def test_the_guard_is_longer_than_what_was_simulated() -> None:
    figures = replace(Summary.absent(), ttft_p99=30.2)
    assert longest_stay([figures]) == 61.0 and longest_stay([Summary.absent()]) == 10.0


def test_a_server_of_another_version_lacks_settings(scenario: Path) -> None:
    case = case_of(scenario, policies=("prefill-cadence",))
    policy = case.build(Choice("prefill-cadence"))
    check_server(policy, "0.33.0")
    with pytest.raises(ConfigError, match=r"needs vLLM 0\.33"):
        check_server(policy, "0.31.0")


# --- the check on an engine -----------------------------------------------------------------------
def test_a_check_takes_turns_and_compares(scenario: Path, tmp_path: Path) -> None:
    case = case_of(scenario, policies=("vllm",))
    check = Check(case, "tiny", Choice("vllm", (("engine.max_num_seqs", 8),)), (1, 2), 2, 30)
    order = [(choice.text, repeat) for choice, repeat in check.visits()]
    advised = check.advised.text
    assert order == [(DEFAULT.text, 0), (advised, 0), (advised, 1), (DEFAULT.text, 1)]
    assert len(check.workload(1)) == 30
    figures = replace(Summary.absent(), requests=30, completed=30)
    rows = [Run(DEFAULT.text, SIM, s, 0, False, replace(figures, latency_mean=2.0)) for s in (1, 2)]
    rows += [Run(advised, SIM, s, 0, False, replace(figures, latency_mean=1.0)) for s in (1, 2)]
    rows += [Run(DEFAULT.text, ENGINE, s, r, False, replace(figures, latency_mean=2.0 + r)) for s in (1, 2) for r in (0, 1)]
    rows += [Run(advised, ENGINE, s, r, False, replace(figures, latency_mean=1.5)) for s in (1, 2) for r in (0, 1)]
    rows += [Run(advised, ENGINE, 1, 0, True, replace(figures, latency_mean=99.0))]
    one = next(each for each in seen(check, rows) if each.metric == "latency_mean")
    assert one.predicted == -0.5 and one.measured.value == pytest.approx(-0.4) and one.measured.seeds == 4
    assert -0.5 <= one.measured.low < -0.4 < one.measured.high <= -0.25 and one.spread == pytest.approx(0.4)
    assert "they agree in sign, and the prediction lies in the interval" in check_summary(check, [one])
    against = replace(one, predicted=0.1)
    assert "they do NOT agree in sign, and the prediction does not lie in the interval" in check_summary(check, [against])
    unsure = replace(one, measured=replace(one.measured, high=0.1))
    assert "shows neither gain nor loss: the same setting differs by 40.0 %" in check_summary(check, [unsure])


# --- large ----------------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_trace_of_20_000_requests(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "trace.csv", 20_000)
    words = ["--calibration", calibrated(DEAR, tmp_path), "--trace", str(path), "--out", str(tmp_path / "out"), "--quiet", "--jobs", "2"]
    words += ["--policies", "vllm", "sarathi", "prefill-threshold", "nested-wait", "--budget", "300", "--objective", "p99", "--rate", "2"]
    assert advise.main([*words, "--json", str(tmp_path / "found.json")]) == 0
    record = json.loads((tmp_path / "found.json").read_text())["found"]
    rows = read_rows(tmp_path / "out" / "rows.csv", Row)
    assert {r.figures.requests for r in rows if r.figures.end} == {1_000}
    assert record["advice"]["entries"][-1]["gains"]["latency_p99"]["seeds"] == 16
