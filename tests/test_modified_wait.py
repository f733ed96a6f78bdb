"""Modified WAIT, WAIT-CP and the variants of WAIT and Nested WAIT."""

from __future__ import annotations

import numpy as np
import pytest

from llmsched_baselines import Setting, make_policy
from llmsched_baselines.modified_wait import cycle_of
from llmsched_baselines.wait_cp import WaitCp
from llmsched_env.backends import make_backend
from llmsched_env.engine_config import EngineConfig, EpisodeLimits
from llmsched_env.errors import ConfigError, InfeasibleError
from llmsched_env.fluid import equilibrium_of, wait_thresholds_of
from llmsched_env.metrics import lost
from llmsched_env.runner import run_episode
from llmsched_env.types import LengthStatistics, Workload
from llmsched_env.workload import MMPP2, load_scenario

TWO_TYPES = LengthStatistics.of([10, 10], [10, 20], [2, 1], [0, 1])
HORIZON = EpisodeLimits(drain=False, horizon=3000.0)


def paper_setting(capacity: int = 3750, rate: float = 3.0) -> Setting:
    return Setting(TWO_TYPES, rate, EngineConfig.paper(capacity, 1.0, 1e-3), horizon_seconds=3000.0)


def vllm_setting(rate: float, **overrides: object) -> Setting:
    scenario = load_scenario("p512d20")
    return Setting(scenario.statistics, rate, scenario.engine, horizon_seconds=100.0, overrides=overrides)


def test_first_thresholds_are_those_of_wait() -> None:
    setting = paper_setting()
    policy = make_policy("modified-wait", setting)
    n = wait_thresholds_of(TWO_TYPES, policy.layout, 3.0, setting.engine, rounding="rotation").thresholds
    view = make_backend("sim").reset(
        Workload.of([0.0] * 40, [10] * 40, [10] * 20 + [20] * 20, [0] * 20 + [1] * 20), policy.layout, policy.engine, EpisodeLimits()
    )
    # At time 0 the window is empty of seconds; the 20 + 20 arrivals of that instant count beside the expected rate.
    seen = np.array([2.0 + 20 / 30, 1.0 + 20 / 30])
    work = np.array([165.0, 420.0])
    x = min(1.25 / (1 - 1e-3 * float(seen @ work)) if float(seen @ work) < 1000 else np.inf, 3750 / float(seen @ work))
    assert policy.decide(view).admit.tolist() == [int(seen[0] * x), int(seen[1] * x)]
    assert n.tolist() == pytest.approx([10.0, 5.0])


def test_cycle_is_linear_between_the_points_and_held_outside() -> None:
    grid, cycles = np.array([1.0, 2.0, 4.0]), np.array([1.0, 3.0, 4.0])
    assert [cycle_of(w, cycles, grid) for w in (0.5, 1.5, 3.0, 9.0)] == pytest.approx([1.0, 2.0, 3.5, 4.0])


def test_modified_wait_follows_a_rate_it_was_not_planned_for() -> None:
    scenario = load_scenario("two-type")
    workload = scenario.generate(3, rate=3.0, horizon=3000.0)
    planned, following = (
        run_episode(make_policy(name, paper_setting(rate=1.5)), workload, limits=HORIZON) for name in ("wait", "modified-wait")
    )
    # Thresholds for half the rate cap throughput below the load; those that follow do not.
    assert following.summary.completed > 1.05 * planned.summary.completed
    assert following.summary.kv_max <= 1.0


def test_modified_wait_survives_bursts_without_losing_a_request() -> None:
    scenario = load_scenario("two-type")
    times = MMPP2(0.5, 8.0, 60.0, 20.0).with_rate(2.0).sample(np.random.default_rng(1), 1500)
    base = scenario.generate(1, num_requests=1500)
    workload = Workload.of(times, base.prompt_tokens, base.output_tokens, base.type_id)
    result = run_episode(make_policy("modified-wait", paper_setting(rate=2.0)), workload)
    assert not lost(result.log).any()
    assert result.summary.kv_max <= 1.0


@pytest.mark.parametrize("name", ["any-trigger", "cap-releases", "implemented", "no-wait"])
def test_wait_variants_never_evict_and_keep_the_throughput(name: str) -> None:
    workload = load_scenario("two-type").generate(5, rate=3.0, horizon=3000.0)
    plain = run_episode(make_policy("wait", paper_setting()), workload, limits=HORIZON)
    result = run_episode(make_policy("wait", paper_setting(), variant=name), workload, limits=HORIZON)
    assert result.summary.evictions == 0
    assert result.summary.completed > 0.97 * plain.summary.completed


def test_rules_of_the_variants_on_one_decision() -> None:
    def admit(variant: str, waiting: tuple[int, int]) -> tuple[list[int], list[int]]:
        policy = make_policy("wait", paper_setting(), thresholds=[10, 5], variant=variant)
        count = sum(waiting)
        types = [0] * waiting[0] + [1] * waiting[1]
        workload = Workload.of([0.0] * count, [10] * count, [20 if t else 10 for t in types], types)
        view = make_backend("sim").reset(workload, policy.layout, policy.engine, EpisodeLimits())
        decision = policy.decide(view)
        return decision.run.tolist(), decision.admit.tolist()

    assert admit("paper", (10, 2)) == ([1, 0], [10, 0])
    assert admit("any-trigger", (10, 2)) == ([1, 1], [10, 5])
    assert admit("any-trigger", (9, 4)) == ([0, 0], [0, 0])
    assert admit("cap-releases", (9, 4)) == ([0, 0], [0, 0])
    assert admit("no-wait", (1, 0)) == ([1, 1], [10, 5])


def test_a_cap_that_is_used_up_stops_waiting() -> None:
    def decide(variant: str, requests: int) -> int:
        # Threshold 0.5 for 11 iterations: at most one enters an iteration and the cap is 5 residents.
        policy = make_policy("wait", paper_setting(), thresholds=[0.5, 0.5], variant=variant, overload=True)
        backend = make_backend("sim")
        workload = Workload.of([0.0] * requests + [900.0], [10] * (requests + 1), [10] * (requests + 1))
        view = backend.reset(workload, policy.layout, policy.engine, EpisodeLimits(drain=False))
        for _ in range(requests):
            backend.step(policy.decide(view))
        assert view.num_residents == requests
        return int(policy.decide(view).run[0])

    assert decide("cap-releases", 5) == 1
    assert decide("cap-releases", 4) == 0
    assert decide("any-trigger", 5) == 0
    with pytest.raises(ConfigError, match=r"policy\.variant"):
        make_policy("wait", paper_setting(), variant="all")


@pytest.mark.parametrize("rule", ["implemented", "no-wait"])
def test_nested_rules_complete_everything(rule: str) -> None:
    workload = load_scenario("nested-two-type").generate(2, rate=3.0, num_requests=600)
    policy = make_policy("nested-wait", paper_setting(5003), thresholds=[16, 6], segment_ends=[10], rule=rule, overload=True)
    result = run_episode(policy, workload)
    assert result.summary.completed == 600
    assert result.summary.kv_max <= 1.0
    with pytest.raises(ConfigError, match=r"policy\.rule"):
        make_policy("nested-wait", paper_setting(5003), rule="none")


@pytest.mark.parametrize("wait", [True, False])
def test_wait_cp_keeps_its_cap(wait: bool) -> None:
    policy = make_policy("wait-cp", vllm_setting(18.0), cap=9, wait=wait)
    workload = load_scenario("p512d20").generate(0, rate=18.0, num_requests=200)
    most = 0

    def watch(report: object, view: object) -> None:
        nonlocal most
        most = max(most, view.num_residents)  # type: ignore[attr-defined]

    assert run_episode(policy, workload, on_step=watch).summary.completed == 200
    assert most == 9


def test_wait_cp_does_not_wait_where_the_cap_is_used_up() -> None:
    setting = Setting(LengthStatistics.of([16], [20], [1.0]), 50.0, EngineConfig.vllm())
    policy = WaitCp(setting, cap=50)  # P = 50 / 21: two or three new requests an iteration
    backend = make_backend("sim")
    view = backend.reset(Workload.of([0.0] * 50 + [99.0], [16] * 51, [20] * 51), policy.layout, policy.engine, EpisodeLimits())
    while view.num_residents < 50:
        backend.step(policy.decide(view))
    assert view.num_waiting == 0
    assert policy.decide(view).run.tolist() == [1]


def test_fractions_of_modified_thresholds_are_carried_over() -> None:
    workload = load_scenario("two-type").generate(1, rate=0.6, horizon=3000.0)
    result = run_episode(make_policy("modified-wait", paper_setting(rate=0.6)), workload, limits=HORIZON)
    assert result.summary.completed > 0.97 * len(workload)


def test_cap_without_the_wait_is_vllm_with_another_configuration() -> None:
    capped = make_policy("wait-cp", vllm_setting(20.0), cap=12, wait=False)
    engine = capped.engine
    plain = make_policy("vllm", vllm_setting(20.0, max_num_seqs=engine.max_num_seqs, max_num_batched_tokens=engine.max_num_batched_tokens))
    workload = load_scenario("p512d20").generate(0, rate=20.0, num_requests=300)
    a, b = run_episode(capped, workload), run_episode(plain, workload)
    np.testing.assert_array_equal(a.log.completed, b.log.completed)


def test_wait_cp_budget_and_default_cap() -> None:
    policy = WaitCp(vllm_setting(18.0), cap=22)
    # K = 2 chunks of 256, P = 22 / (2 + 20) = 1: 22 - 2 + 512 tokens.
    assert policy.engine.max_num_batched_tokens == 532
    assert policy.engine.max_num_seqs == 22
    setting = vllm_setting(18.0)
    residents = equilibrium_of(setting.statistics, 18.0, setting.engine).batch.batch_size
    assert WaitCp(setting).cap == int(np.ceil(1.25 * residents))
    with pytest.raises(InfeasibleError, match="above the stability boundary"):
        WaitCp(vllm_setting(100.0))
    assert "overload" in WaitCp(vllm_setting(100.0), overload=True).notes
    for options in ({"cap": 0}, {"chunk": 0}, {"slack": 0.5}):
        with pytest.raises(ConfigError, match=r"policy\."):
            WaitCp(vllm_setting(18.0), **options)  # type: ignore[arg-type]


def test_lost_progress_is_an_option_of_the_vllm_preset() -> None:
    scenario = load_scenario("p512d20")
    engine = EngineConfig.vllm(num_blocks=200, max_model_len=2048)
    statistics = LengthStatistics.of([512], [600], [1.0])
    workload = Workload.of(np.arange(20) * 0.1, [512] * 20, [600] * 20)
    generated = {}
    for eviction in ("recompute", "lose_progress"):
        setting = Setting(statistics, 10.0, engine.replace(eviction=eviction))
        tokens = []
        result = run_episode(
            make_policy("vllm", setting), workload, on_step=lambda report, view, t=tokens: t.append(report.generated_tokens)
        )
        assert result.summary.completed == 20
        assert result.summary.evictions > 0
        generated[eviction] = sum(tokens)
    assert generated["recompute"] == 20 * 600
    assert generated["lose_progress"] > 20 * 600
    with pytest.raises(ConfigError, match=r"engine\.eviction"):
        EngineConfig.vllm(eviction="forget")
    assert scenario.engine.eviction == "recompute"
