"""Tenants: mixes, traces, scenario files, queues by tenant and who is admitted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llmsched_baselines import Setting, make_policy
from llmsched_env.engine.simulator import SimBackend
from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import ConfigError
from llmsched_env.fluid.wait import class_profiles
from llmsched_env.forecast import class_weights, expected_output_by_class
from llmsched_env.metrics import latency
from llmsched_env.runner import run_episode
from llmsched_env.tenant_terms import TenantTerms
from llmsched_env.types import LengthStatistics, QueueLayout, Workload
from llmsched_env.workload import MMPP2, Poisson, Tenant, TenantMix, Types, load_scenario, read_scenario, read_trace, scenario_from_trace
from tests.tenant_cases import built, course

SHORT, LONG = Types((10,), (20,), (1.0,)), Types((100,), (50,), (1.0,))
MIX = TenantMix((Tenant("a", share=3.0), Tenant("b", weight=2.0, lengths=LONG), Tenant("c", arrivals=Poisson(2.0), lengths=LONG)))
ENGINE = EngineConfig.vllm(num_blocks=64, max_model_len=256, max_num_seqs=16, max_num_batched_tokens=256)


# --- declaring ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": 0.0}, "tenant.weight: 0"),
        ({"ttft_slo": -1.0}, "tenant.ttft: -1"),
        ({"tpot_slo": 0.0}, "tenant.tpot: 0"),
        ({"share": 0.0}, "tenant.share: 0"),
        ({"arrivals": 3.0}, "tenant.arrivals: 3.0, must be an ArrivalProcess"),
        ({"lengths": "short"}, "tenant.lengths: 'short', must be a LengthModel"),
        ({"name": ""}, "tenant.name"),
    ],
)
def test_a_tenant_is_checked(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Tenant(**{"name": "a", **changes})  # type: ignore[arg-type]


def test_a_mix_is_checked() -> None:
    with pytest.raises(ConfigError, match="must be at least one Tenant"):
        TenantMix(())
    with pytest.raises(ConfigError, match="'a' is named 2 times"):
        TenantMix((Tenant("a"), Tenant("a")))
    with pytest.raises(ConfigError, match="arrivals: missing, tenant 'a' has none of its own"):
        MIX.scenario_parts(None, SHORT)
    with pytest.raises(ConfigError, match="lengths: missing, tenant 'a' has none of its own"):
        MIX.scenario_parts(Poisson(1.0), None)
    alone = TenantMix((Tenant("a", arrivals=Poisson(1.0), lengths=SHORT),))
    with pytest.raises(ConfigError, match="every tenant has arrivals of its own"):
        alone.scenario_parts(Poisson(1.0), None)
    with pytest.raises(ConfigError, match=r"scenario.arrivals: Poisson, must be what TenantMix"):
        import dataclasses

        dataclasses.replace(load_scenario("tenants"), arrivals=Poisson(1.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"by": "tenant", "num_types": 2, "tenant_weights": (1.0,)}, r"layout.tenant_weights: \(1.0,\), must be 2 for 2 tenants"),
        ({"by": "tenant", "num_types": 2, "tenant_weights": (1.0, 0.0)}, r"layout.tenant_weights\[1\]: 0"),
        ({"tenant_weights": (1.0,)}, "must be none unless by='tenant'"),
        ({"by": "tenant", "tenant_weights": 3}, "must be one number > 0 for each tenant"),
        ({"by": "prompt", "num_types": 2}, "must be 1 unless by='type' or by='tenant'"),
    ],
)
def test_a_layout_is_checked(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QueueLayout(**arguments)  # type: ignore[arg-type]


def test_a_workload_is_checked() -> None:
    with pytest.raises(ConfigError, match=r"workload.tenant: shape \(1,\), must be \(2,\)"):
        Workload.of([0.0, 1.0], [1, 1], [1, 1], tenant=[0])
    with pytest.raises(ConfigError, match=r"workload.tenant"):
        Workload.of([0.0], [1], [1], tenant=[-1])
    two = Workload.of([0.0, 1.0], [1, 1], [1, 1], tenant=[0, 2])
    with pytest.raises(ConfigError, match=r"workload.tenant: 2, must be below layout.num_types = 2"):
        course(make_policy("vtc", _setting(2)), two)
    layout = QueueLayout(by="tenant", num_types=2)
    assert layout.classify([1, 1], [1, 1], [0, 0]).tolist() == [0, 0] and layout.class_weights == (1.0, 1.0)


def _setting(tenants: int) -> Setting:
    terms = tuple(TenantTerms(f"t{j}") for j in range(tenants))
    return Setting(
        LengthStatistics.of([10.0] * tenants, [5.0] * tenants, [1.0] * tenants, tenant=range(tenants), tenants=terms), 1.0, ENGINE
    )


# --- drawing --------------------------------------------------------------------------------------
def test_requests_come_in_the_declared_proportions() -> None:
    arrivals, lengths = MIX.scenario_parts(Poisson(4.0), SHORT)
    assert arrivals.rate == 6.0 and lengths.proportions == pytest.approx((0.5, 1 / 6, 1 / 3))
    drawn = MIX.draw((arrivals, lengths), np.random.default_rng(0), np.random.default_rng(1), 60_000, None)
    assert np.bincount(drawn.tenant) / 60_000 == pytest.approx([0.5, 1 / 6, 1 / 3], abs=0.01)
    assert (np.diff(drawn.arrival) >= 0).all() and drawn.arrival[-1] == pytest.approx(10_000, rel=0.02)
    assert set(drawn.prompt_tokens[drawn.tenant == 0]) == {10} and set(drawn.prompt_tokens[drawn.tenant != 0]) == {100}
    statistics = lengths.statistics()
    assert statistics.num_tenants == 3 and [one.weight for one in statistics.tenants] == [1.0, 2.0, 1.0]
    assert statistics.mean_prompt == pytest.approx(drawn.prompt_tokens.mean(), rel=0.02)
    prompt, _, _ = lengths.sample(np.random.default_rng(0), 10_000)
    assert prompt.mean() == pytest.approx(statistics.mean_prompt, rel=0.03)


def test_the_same_seed_gives_each_tenant_the_same_requests_at_any_rate() -> None:
    scenario = load_scenario("tenants")
    one, again, fast = scenario.generate(3), scenario.generate(3), scenario.generate(3, rate=2 * scenario.rate)
    for column in ("arrival", "prompt_tokens", "output_tokens", "tenant"):
        assert getattr(one, column).tobytes() == getattr(again, column).tobytes()
    for j in range(4):
        first, second = one.prompt_tokens[one.tenant == j], fast.prompt_tokens[fast.tenant == j]
        both = min(first.size, second.size)
        assert (first[:both] == second[:both]).all()
    assert len(scenario.generate(3, horizon=50.0)) == np.count_nonzero(scenario.generate(3, horizon=50.0).arrival <= 50.0)
    few = scenario.generate(3, num_requests=20)
    assert (few.arrival == one.arrival[:20]).mean() > 0.1 and len(few) == 20


def test_fluid_and_forecast_see_each_tenants_lengths() -> None:
    statistics = MIX.scenario_parts(Poisson(4.0), SHORT)[1].statistics()
    assert expected_output_by_class(statistics, MIX.layout) == pytest.approx([20, 50, 50])
    assert class_profiles(statistics, MIX.layout).class_id.tolist() == [0, 1, 2]
    assert class_weights(statistics, MIX.layout) @ statistics.prompt == pytest.approx(
        [10 * 0.95 + 0.05 * 55, *[100 * 0.95 + 0.05 * 55] * 2]
    )


# --- files ----------------------------------------------------------------------------------------
FILE = """
[lengths]
types = { prompt = [10], output = [20], weight = [1.0] }
[arrivals]
rate = 4.0
[[tenants]]
name = "a"
share = 3.0
[[tenants]]
name = "b"
weight = 2.0
ttft_slo = 0.5
lengths = { types = { prompt = [100], output = [50], weight = [1.0] } }
[[tenants]]
name = "c"
arrivals = { process = "mmpp2", rate_low = 0.0, rate_high = 4.0, mean_low_seconds = 10.0, mean_high_seconds = 10.0 }
"""


def test_a_scenario_file_declares_tenants(tmp_path: Path) -> None:
    path = tmp_path / "three.toml"
    path.write_text(FILE)
    scenario = read_scenario(path)
    assert scenario.tenants is not None and scenario.tenants.names == ("a", "b", "c") and scenario.num_tenants == 3
    assert scenario.layout == QueueLayout(by="tenant", num_types=3, tenant_weights=(1.0, 2.0, 1.0)) and scenario.rate == 6.0
    assert scenario.statistics.tenants[1] == TenantTerms("b", 2.0, 0.5, 0.1)
    assert isinstance(scenario.tenants.tenants[2].arrivals, MMPP2)
    assert set(scenario.generate(0).tenant) == {0, 1, 2}
    path.write_text(FILE + '[layout]\nby = "tenant"\nsegment_ends = [10]\n')
    assert read_scenario(path).layout == QueueLayout("tenant", num_types=3, segment_ends=(10,), tenant_weights=(1.0, 2.0, 1.0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (FILE.replace("share", "shares"), r"tenants\[0\].shares: unknown field; did you mean 'share'"),
        (FILE.replace("weight = 2.0", "weight = -2.0"), r"tenants\[1\]: tenant.weight: -2"),
        (FILE + "share = 2.0\n", r"tenants\[2\].share: 2.0 beside arrivals of its own"),
        (FILE.replace('"mmpp2"', '"mmpp3"'), r"tenants\[2\].arrivals.process"),
        (FILE.replace('name = "b"', 'name = "a"'), "'a' is named 2 times"),
        ("tenants = 3\n" + FILE.split("[[tenants]]")[0], "tenants: 3, must be tables"),
        (FILE.replace("[arrivals]\nrate = 4.0\n", ""), "arrivals: missing, tenant 'a'"),
    ],
)
def test_a_scenario_file_with_wrong_tenants_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_scenario(path)


def test_a_traces_tenant_column_is_kept_with_its_names(tmp_path: Path) -> None:
    path = tmp_path / "requests.csv"
    path.write_text("arrived_at,prompt_tokens,output_tokens,tenant,type\n0,10,5,zoo,1\n1,20,5,acme,0\n2,30,6,zoo,1\n3,40,7,bank,0\n")
    trace = read_trace(path)
    assert trace.tenant_names == ("acme", "bank", "zoo") and trace.tenant is not None and trace.tenant.tolist() == [2, 0, 2, 1]
    assert trace.type_names == ("0", "1") and trace.workload().tenant is not None
    scenario = scenario_from_trace(path, ttft_slo=2.0)
    assert scenario.layout == QueueLayout(by="tenant", num_types=3, tenant_weights=(1.0, 1.0, 1.0))
    assert scenario.statistics.tenants[2] == TenantTerms("zoo", 1.0, 2.0, 0.1)
    drawn = scenario.generate(0, num_requests=3)
    assert drawn.tenant is not None and drawn.tenant.tolist() == [2, 0, 2] and drawn.prompt_tokens.tolist() == [10, 20, 30]
    plain = tmp_path / "plain.csv"
    plain.write_text("arrived_at,prompt_tokens,output_tokens\n0,10,5\n")
    assert read_trace(plain).tenant is None and scenario_from_trace(plain).tenants is None


# --- who is admitted --------------------------------------------------------------------------------
def test_strict_priority_serves_the_largest_weight_first() -> None:
    requests = Workload.of(np.zeros(60), np.full(60, 100), np.full(60, 50), tenant=np.arange(60) % 3)
    log = run_episode(built("tenant-priority", requests, ENGINE, (1.0, 1.0, 4.0)), requests).log
    last = [log.admitted[requests.tenant == j].max() for j in range(3)]
    first = [log.admitted[requests.tenant == j].min() for j in range(3)]
    assert last[2] <= first[0] and last[0] <= first[1]


@pytest.mark.parametrize("name", ["vtc", "wfq"])
def test_weights_divide_the_service(name: str) -> None:
    """Two backlogged tenants, 3 : 1: so are their shares while both wait."""
    requests = Workload.of(np.zeros(400), np.full(400, 60), np.full(400, 40), tenant=np.arange(400) % 2)
    one = course(built(name, requests, ENGINE, (3.0, 1.0)), requests)
    until = np.flatnonzero(one.stayed.all(axis=1))[-1]
    share = one.service[until, 0] / one.service[until].sum()
    assert share == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize("name", ["vtc", "wfq", "tenant-priority"])
def test_one_tenant_is_first_come_first_served(name: str) -> None:
    """Without declared tenants there is one, and nothing to choose."""
    scenario = load_scenario("azure-conv-40gb")
    setting, requests = Setting(scenario.statistics, scenario.rate, scenario.engine), scenario.generate(0, num_requests=200)
    one = run_episode(make_policy(name, setting), requests).log
    assert one.completed.tobytes() == run_episode(make_policy("fcfs", setting), requests).log.completed.tobytes()


@pytest.mark.parametrize("name", ["vtc", "wfq", "tenant-priority"])
def test_an_episode_repeats_to_the_last_bit(name: str) -> None:
    scenario = load_scenario("tenants")
    policy = make_policy(name, Setting(scenario.statistics, scenario.rate, scenario.engine))
    requests = scenario.generate(1, num_requests=200)
    logs = [run_episode(policy, requests).log for _ in range(2)]
    stepped = course(policy, requests).backend.log()  # rule by rule, with Python between two iterations
    assert logs[0].completed.tobytes() == logs[1].completed.tobytes() == stepped.completed.tobytes()
    assert logs[0].tenant is requests.tenant


def test_rules_read_no_output_length_and_no_future_request() -> None:
    """What nobody knows may change: the decisions until then do not."""
    scenario = load_scenario("tenants")
    setting, requests = Setting(scenario.statistics, scenario.rate, scenario.engine), scenario.generate(1, num_requests=80)
    other = Workload.of(requests.arrival, requests.prompt_tokens, np.minimum(requests.output_tokens + 400, 1_000), tenant=requests.tenant)
    for name in ("vtc", "wfq"):
        seen = []
        for drawn in (requests, other):
            one = course(make_policy(name, setting), drawn)
            seen.append(one.asked[:60])
        shortest = int(min(requests.output_tokens))
        assert (seen[0][:shortest] == seen[1][:shortest]).all()


def test_an_evicted_request_is_charged_for_its_prompt_once() -> None:
    requests = Workload.of(np.zeros(12), np.full(12, 30), np.full(12, 60), tenant=np.arange(12) % 2)
    engine = EngineConfig.vllm(num_blocks=16, max_model_len=128, max_num_seqs=8, max_num_batched_tokens=128)
    backend = SimBackend()
    one = course(built("vtc", requests, engine, (1.0, 1.0)), requests, backend)
    assert one.evictions > 0 and one.service[-1].tolist() == [6 * (30 + 2 * 60)] * 2
    assert np.isfinite(latency(backend.log())).all()
