"""Expert policies: what each decides, what it refuses, and that none loses a request."""

from __future__ import annotations

import numpy as np
import pytest

from llmsched_baselines import Setting, make_policy, policy_names
from llmsched_baselines.mc_sf import fits_forever
from llmsched_baselines.policy import bucket_edges, output_classes, prompt_classes
from llmsched_env.backends import make_backend
from llmsched_env.engine_config import EngineConfig, EpisodeLimits
from llmsched_env.errors import ConfigError, InfeasibleError
from llmsched_env.forecast import expected_output
from llmsched_env.metrics import lost
from llmsched_env.runner import run_episode
from llmsched_env.types import Decision, LengthStatistics, QueueLayout, Workload
from llmsched_env.workload import load_scenario

TWO_TYPES = LengthStatistics.of([10, 10], [10, 20], [2, 1], [0, 1])


def paper_setting(capacity: int = 3750, d0: float = 1.0, rate: float = 3.0) -> Setting:
    return Setting(TWO_TYPES, rate, EngineConfig.paper(capacity, d0, 1e-3), horizon_seconds=2000.0)


@pytest.mark.parametrize("name", policy_names())
@pytest.mark.parametrize("load", [0.6, 1.1])
def test_every_policy_completes_every_request(name: str, load: float) -> None:
    scenario = load_scenario("azure-conv")
    setting = Setting(scenario.statistics, load * 6.0, scenario.engine, horizon_seconds=100.0)
    policy = make_policy(name, setting, overload=True)
    workload = scenario.generate(1, rate=setting.rate, num_requests=300)
    result = run_episode(policy, workload)
    assert result.summary.completed == 300
    assert not lost(result.log).any()
    assert result.summary.end == "finished"
    assert result.summary.kv_max <= 1.0


@pytest.mark.parametrize("name", ["fcfs", "vllm-v0", "wait", "nested-wait", "shortest-prompt", "reserve", "mc-sf"])
def test_paper_preset_runs_too(name: str) -> None:
    scenario = load_scenario("two-type")
    policy = make_policy(name, paper_setting(), overload=True)
    result = run_episode(policy, scenario.generate(0, rate=3.0, num_requests=400))
    assert result.summary.completed == 400


@pytest.mark.parametrize("name", ["vllm", "sarathi"])
def test_token_budget_policies_refuse_the_paper_preset(name: str) -> None:
    with pytest.raises(ConfigError, match=r"engine\.preset is 'paper'"):
        make_policy(name, paper_setting())


def test_wait_takes_the_thresholds_of_the_theory_and_never_evicts() -> None:
    policy = make_policy("wait", paper_setting())
    assert policy.known_lengths
    assert policy.parameters.thresholds.tolist() == [10.0, 5.0]  # type: ignore[attr-defined]
    workload = load_scenario("two-type").generate(3, rate=3.0, horizon=2000.0)
    result = run_episode(policy, workload, limits=EpisodeLimits(drain=False, horizon=2000.0))
    assert result.summary.evictions == 0
    assert result.summary.kv_max <= 1.0
    assert result.summary.completed > 4000


def test_wait_decides_by_threshold() -> None:
    policy = make_policy("wait", paper_setting(), thresholds=[10, 5])
    backend = make_backend("sim")
    arrival = [0.0] * 9 + [1.0] * 6
    workload = Workload.of(arrival, [10] * 15, [10] * 9 + [20] * 6, [0] * 9 + [1] * 6)
    view = backend.reset(workload, policy.layout, policy.engine, EpisodeLimits())
    decision = policy.decide(view)
    assert decision.run.tolist() == [0, 0]
    assert decision.admit.tolist() == [0, 0]
    backend.step(decision)
    decision = policy.decide(view)  # six of type 1 now wait: the class joins alone with its threshold
    assert decision.run.tolist() == [0, 1]
    assert decision.admit.tolist() == [0, 5]


def test_fractional_thresholds_rotate_and_do_not_deadlock() -> None:
    setting = paper_setting(capacity=3750)
    policy = make_policy("wait", setting, thresholds=[0.4, 0.2], overload=True)
    workload = Workload.of([0.0] * 30, [10] * 30, [10] * 20 + [20] * 10, [0] * 20 + [1] * 10)
    result = run_episode(policy, workload)
    assert result.summary.completed == 30
    admissions = np.sort(np.unique(result.log.admitted))
    assert admissions.size >= 20  # one by one, not all at once


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("wait", {"thresholds": [10, 5, 1]}, "3 thresholds for 2"),
        ("wait", {"thresholds": [1, 1]}, "nearest feasible"),
        ("nested-wait", {"thresholds": [10, 5, 2], "segment_ends": (10,)}, "3 "),
        ("nested-wait", {"variant": "C"}, "variant"),
        ("reserve", {"theta": 0.0}, "theta"),
        ("mc-sf", {"margin": 1.0}, "margin"),
        ("wait", {"treshold": [1, 1]}, "did you mean 'thresholds'"),
        ("nested-wai", {}, "did you mean 'nested-wait'"),
    ],
)
def test_refusals(name: str, options: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        make_policy(name, paper_setting(), **options)


def test_rates_outside_the_stability_region_need_the_overload_mode() -> None:
    setting = paper_setting(rate=3.0 * 1.1)
    for name in ("wait", "nested-wait"):
        with pytest.raises(InfeasibleError, match=r"rate|C|M\*"):
            make_policy(name, setting)
        policy = make_policy(name, setting, overload=True)
        assert "overload" in policy.notes


def test_engine_presets_give_way_to_what_the_user_sets() -> None:
    scenario = load_scenario("azure-conv")
    plain = Setting(scenario.statistics, 5.0, scenario.engine)
    assert make_policy("sarathi", plain).engine.max_num_batched_tokens == 512
    assert not make_policy("vllm-v0", plain).engine.enable_chunked_prefill
    mine = Setting(scenario.statistics, 5.0, scenario.engine, overrides={"max_num_batched_tokens": 300, "watermark": 0.0})
    policy = make_policy("sarathi", mine)
    assert (policy.engine.max_num_batched_tokens, policy.engine.watermark) == (300, 0.0)


def test_vllm_v0_never_mixes_prefill_and_decode() -> None:
    scenario = load_scenario("azure-conv")
    policy = make_policy("vllm-v0", Setting(scenario.statistics, 6.0, scenario.engine))
    mixed: list[bool] = []
    run_episode(
        policy,
        scenario.generate(0, rate=6.0, num_requests=200),
        on_step=lambda report, _: mixed.append(report.prefill_requests > 0 and report.decode_requests > 0),
    )
    assert len(mixed) > 200
    assert not any(mixed)


def test_shortest_prompt_admits_short_prompts_first() -> None:
    scenario = load_scenario("azure-conv")
    setting = Setting(scenario.statistics, 9.0, scenario.engine)
    workload = scenario.generate(0, rate=9.0, num_requests=600)
    waits = {}
    for name in ("vllm", "shortest-prompt"):
        log = run_episode(make_policy(name, setting), workload).log
        short = workload.prompt_tokens < np.median(workload.prompt_tokens)
        waits[name] = float(np.mean((log.admitted - log.arrival)[short]))
    assert waits["shortest-prompt"] < 0.5 * waits["vllm"]


def test_reserve_evicts_less_than_greedy() -> None:
    scenario = load_scenario("azure-conv")
    engine = scenario.engine.replace(num_blocks=2816)
    setting = Setting(scenario.statistics, 7.0, engine)
    workload = scenario.generate(0, rate=7.0, num_requests=500)
    evictions = {name: run_episode(make_policy(name, setting), workload).summary.evictions for name in ("vllm", "reserve")}
    assert evictions["vllm"] > 50
    assert evictions["reserve"] < 0.3 * evictions["vllm"]


def test_mc_sf_never_evicts() -> None:
    scenario = load_scenario("azure-conv")
    for engine in (scenario.engine.replace(num_blocks=1500), EngineConfig.paper(20_000, 0.02, 1e-7)):
        setting = Setting(scenario.statistics, 4.0, engine)
        policy = make_policy("mc-sf", setting)
        assert policy.known_lengths
        result = run_episode(policy, scenario.generate(2, rate=4.0, num_requests=300))
        assert result.summary.evictions == 0
        assert result.summary.kv_max > 0.8


def test_fits_forever_is_the_predicted_peak() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        n = int(rng.integers(1, 8))
        held = rng.integers(1, 20, n)
        remaining = np.sort(rng.integers(1, 10, n))
        peak = max(sum(h + t for h, r in zip(held, remaining, strict=True) if r >= t) for t in range(1, 11))
        assert fits_forever(held, remaining, float(peak))
        assert not fits_forever(held, remaining, float(peak - 1))


def test_expected_output_is_the_conditional_mean() -> None:
    statistics = LengthStatistics.of([1, 1, 1], [2, 4, 10], [1, 1, 2])
    expected = expected_output(statistics)
    assert expected.shape == (11,)
    assert expected[0] == pytest.approx((2 + 4 + 2 * 10) / 4)
    assert expected[2] == pytest.approx((4 + 20) / 3)
    assert expected[9] == 10
    assert expected[10] == 11  # nothing longer is known: at least one more


def test_buckets() -> None:
    assert bucket_edges(np.array([1.0, 2, 3, 4]), np.full(4, 0.25), 4) == (1, 2, 3)
    assert bucket_edges(np.array([5.0, 5, 5]), np.full(3, 1 / 3), 4) == ()
    assert output_classes(TWO_TYPES, 7) == QueueLayout(by="type", num_types=2)
    assert prompt_classes(TWO_TYPES, 4) == QueueLayout()


@pytest.mark.parametrize("name", ["fcfs", "vllm", "sarathi", "shortest-prompt"])
def test_constant_policies_run_the_same_without_being_asked(name: str) -> None:
    scenario = load_scenario("azure-conv")
    policy = make_policy(name, Setting(scenario.statistics, 8.0, scenario.engine.replace(num_blocks=2000)))
    workload = scenario.generate(4, rate=8.0, num_requests=300)
    assert policy.constant is not None
    compiled = run_episode(policy, workload)
    policy.constant = None
    asked = run_episode(policy, workload)
    assert compiled.summary == asked.summary
    assert compiled.counters == asked.counters
    assert compiled.log.completed.tobytes() == asked.log.completed.tobytes()


def test_decisions_are_well_formed() -> None:
    scenario = load_scenario("lmsys")
    setting = Setting(scenario.statistics, 30.0, scenario.engine)
    for name in policy_names():
        policy = make_policy(name, setting, overload=True)
        backend = make_backend("sim")
        workload = scenario.generate(5, rate=30.0, num_requests=150)
        view = backend.reset(workload, policy.layout, policy.engine, EpisodeLimits(), reveal_output_length=policy.known_lengths)
        while not backend.done:
            decision = policy.decide(view)
            assert isinstance(decision, Decision)
            assert len(decision) == policy.layout.num_queues
            assert all(getattr(decision, name).dtype == np.int32 for name in ("run", "admit", "evict"))
            assert set(np.unique(decision.run)) <= {0, 1}
            assert (decision.admit >= 0).all()
            assert (decision.evict >= 0).all()
            assert not decision.evict[:: policy.layout.num_segments].any()
            backend.step(decision)
