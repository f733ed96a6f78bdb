"""Things named from outside: entry points of installed packages, ``register_*``, ``module:attribute``, shipped agents, TOML files."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest

from llmsched_agents.checkpoint import load_checkpoint, shipped_agents
from llmsched_agents.lookup import named_policies, named_policy, option_owners
from llmsched_baselines import Policy, Setting, make_policy, policy_names
from llmsched_baselines.overrides import parse_overrides
from llmsched_env import ConfigError, Decision, LLMSchedEnv, registry
from llmsched_env.backend import View
from llmsched_env.backends import make_backend
from llmsched_env.engine.simulator import SimBackend
from llmsched_env.perf import LinearTime, calibration_names, load_calibration
from llmsched_env.registry import BACKENDS, POLICIES, Registry
from llmsched_env.reward import CompiledReward, LatencyReward, latency_reward, make_reward
from llmsched_env.runner import run_episode
from llmsched_env.workload import load_scenario, scenario_names
from llmsched_env.workload.scenario import Scenario

MODULE = "llmsched_test_things"

SOURCE = """
from dataclasses import replace

from llmsched_baselines import Policy
from llmsched_env import Decision
from llmsched_env.engine.simulator import SimBackend
from llmsched_env.perf import LinearTime
from llmsched_env.workload import load_scenario


class AtMost(Policy):
    name = "at-most"

    def __init__(self, setting, limit: int = 64):
        super().__init__(setting)
        self.limit = limit

    def decide(self, view):
        return Decision.of(run=[1], admit=[max(self.limit - view.num_residents, 0)])


class NoPolicy:
    name = "no-policy"

    def __init__(self, setting):
        pass


def fails(setting):
    raise KeyError("tables")


def busy():
    return replace(load_scenario("azure-conv"), name="busy")


def minus_evictions(outcome):
    return -float(outcome.evictions)


def weighted(weight=1.0):
    factor = float(weight)
    return lambda outcome: -factor * outcome.evictions


def slow():
    return LinearTime(1.0, 0.0)


number = 3
"""


@pytest.fixture
def things(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The module is found, and what is registered in the test is forgotten after it."""
    (tmp_path / f"{MODULE}.py").write_text(SOURCE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    kept = {one: dict(one._here) for one in (POLICIES, BACKENDS, registry.SCENARIOS, registry.CALIBRATIONS, registry.REWARDS)}
    yield
    for one, here in kept.items():
        one._here = here
    sys.modules.pop(MODULE, None)


@pytest.fixture
def offered(things: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module's things as entry points of an installed package."""
    groups = {
        "policies": {"at-most": "AtMost", "broken": "missing"},
        "scenarios": {"busy": "busy", "no-scenario": "number"},
        "calibrations": {"slow": "slow"},
        "backends": {"my-sim": "SimBackend"},
        "rewards": {"minus-evictions": "minus_evictions"},
    }
    owner = SimpleNamespace(name="llmsched-test-things")

    def offers(group: str) -> dict[str, tuple[EntryPoint, ...]]:
        own = groups[group.partition(".")[2]]
        points = {name: EntryPoint(name, f"{MODULE}:{value}", group) for name, value in own.items()}
        for point in points.values():
            vars(point)["dist"] = owner
        return {name: (point,) for name, point in points.items()}

    monkeypatch.setattr(registry, "_offers", offers)


def setting() -> Setting:
    scenario = load_scenario("azure-conv")
    return Setting(scenario.statistics, 5.0, scenario.engine)


@pytest.mark.usefixtures("offered")
def test_an_installed_package_adds_one_of_each_kind() -> None:
    assert "at-most" in policy_names() and "busy" in scenario_names() and "slow" in calibration_names()
    policy = make_policy("at-most", setting(), limit=3)
    assert run_episode(policy, load_scenario("busy").generate(0, num_requests=20)).summary.completed == 20
    assert load_scenario("busy").name == "busy"
    assert isinstance(load_calibration("slow"), LinearTime)
    assert isinstance(make_backend("my-sim"), SimBackend)
    env = gym.make("llmsched_env:LLMSched-v1", scenario="busy", reward="minus-evictions", num_requests=10)
    env.reset(seed=0)
    assert env.step(env.action_space.sample())[1] == 0.0


@pytest.mark.usefixtures("offered")
def test_a_package_that_cannot_be_imported_is_named_with_its_error() -> None:
    assert "broken" in policy_names()  # listing imports nothing
    with pytest.raises(ConfigError, match=r"policy: 'broken' of llmsched-test-things \(.*:missing\): AttributeError"):
        make_policy("broken", setting())
    with pytest.raises(ConfigError, match="scenario: 'no-scenario' is 3, must be a Scenario"):
        load_scenario("no-scenario")


def test_what_ships_comes_before_what_a_package_offers(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("wait", "nowhere:Nothing", "llmsched_env.policies")
    monkeypatch.setattr(registry, "_offers", lambda group: {"wait": (point,)})
    assert make_policy("wait", setting(), overload=True).name == "wait"
    assert policy_names().count("wait") == 1


def test_two_packages_with_one_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    points = tuple(EntryPoint("mine", f"{module}:Mine", "llmsched_env.policies") for module in ("a", "b"))
    monkeypatch.setattr(registry, "_offers", lambda group: {"mine": points})
    with pytest.raises(ConfigError, match=r"'mine' is offered by .*a:Mine.* and by .*b:Mine"):
        make_policy("mine", setting())


@pytest.mark.usefixtures("things")
def test_a_program_registers_one_of_each_kind() -> None:
    class Nothing(Policy):
        name = "nothing"

        def decide(self, view: View) -> Decision:
            return Decision(1)

    scenario = load_scenario("sharegpt")
    registry.register_policy("nothing", Nothing)
    registry.register_scenario("own", scenario)
    registry.register_calibration("own", LinearTime(1.0, 1e-3))
    registry.register_backend("own", SimBackend)
    registry.register_reward("own", lambda outcome: 1.0)
    assert isinstance(make_policy("nothing", setting()), Nothing)
    assert load_scenario("own") is scenario
    assert isinstance(load_calibration("own"), LinearTime)
    assert isinstance(make_backend("own"), SimBackend)
    assert make_reward("own")(None) == 1.0  # type: ignore[arg-type]
    registry.register_policy("nothing", Nothing)  # the same again is no conflict
    with pytest.raises(ConfigError, match="'wait' is taken"):
        registry.register_policy("wait", Nothing)
    for name in ("", "a b", "a:b", "../x", "-x"):
        with pytest.raises(ConfigError, match="must be letters, digits"):
            registry.register_policy(name, Nothing)


def test_an_unknown_name_gives_the_nearest_and_all_there_are() -> None:
    with pytest.raises(ConfigError, match=r"policy: 'sarathy' is unknown; did you mean 'sarathi'\? \(known: fcfs, .*module:attribute\)"):
        make_policy("sarathy", setting())
    with pytest.raises(ConfigError, match=r"backend: 'simm' is unknown; did you mean 'sim'\?"):
        make_backend("simm")
    with pytest.raises(ConfigError, match="backend: 3"):
        Registry("backend", "nothing").find(3)


def test_the_real_engines_are_entry_points_of_this_project() -> None:
    assert {"sim", "sim-prefix-cache", "vllm", "vllm-scheduler"} <= set(BACKENDS.names())


# --- module:attribute ------------------------------------------------------------------------------------
@pytest.mark.usefixtures("things")
def test_a_policy_by_module_and_attribute() -> None:
    named = named_policy(f"{MODULE}:AtMost")
    assert (named.name, named.kind) == ("at-most", "own")
    owners = option_owners({named.name: named})
    options = parse_overrides(["policy.at-most.limit=2"], owners).options("at-most")
    assert options == {"limit": 2}
    policy = named.build(setting(), **options)
    result = run_episode(policy, load_scenario("azure-conv").generate(0, num_requests=12))
    assert result.summary.completed == 12
    plain = run_episode(make_policy("vllm", setting()), load_scenario("azure-conv").generate(0, num_requests=12))
    assert result.summary.latency_mean > plain.summary.latency_mean


@pytest.mark.usefixtures("things")
@pytest.mark.parametrize(
    ("attribute", "expected"),
    [
        ("Atmost", r"no 'Atmost' there; did you mean 'AtMost'"),
        ("number", "3, must be a class or function of a setting"),
        ("NoPolicy", "NoPolicy has no 'layout'"),
        ("fails", "KeyError: 'tables'"),
    ],
)
def test_what_is_no_policy_is_refused(attribute: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        named_policy(f"{MODULE}:{attribute}").build(setting())


def test_a_module_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="ModuleNotFoundError"):
        named_policy("no_such_module:Policy")
    with pytest.raises(ConfigError, match="unknown"):
        named_policy("no such module:Policy")


@pytest.mark.usefixtures("things")
def test_a_reward_by_module_and_attribute() -> None:
    reward = make_reward(f"{MODULE}:minus_evictions")
    assert reward(SimpleNamespace(evictions=3)) == -3.0  # type: ignore[arg-type]
    env = LLMSchedEnv(num_requests=5, reward=f"{MODULE}:minus_evictions")
    env.reset(seed=0)
    with pytest.raises(ConfigError, match="reward"):
        make_reward(f"{MODULE}:number")


def test_rewards_behind_names_are_factories_or_the_thing_itself() -> None:
    assert isinstance(make_reward("llmsched_env.reward:LatencyReward"), LatencyReward)
    assert isinstance(make_reward("llmsched_env.reward:latency_reward"), CompiledReward)
    assert make_reward({"name": "llmsched_env.reward:SloGoodputReward", "ttft": 1.0, "tpot": 0.1}) is not None
    with pytest.raises(ConfigError, match="SloGoodputReward"):
        make_reward({"name": "llmsched_env.reward:SloGoodputReward", "ttfx": 1.0})
    assert latency_reward is not None


# --- agents that ship ------------------------------------------------------------------------------------
def test_a_shipped_agent_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("safetensors", reason="safetensors is not installed (extra: checkpoints)")
    assert shipped_agents() == ["generalist", "slo"]
    workload = load_scenario("azure-conv").generate(0, num_requests=30)
    by_name = run_episode(load_checkpoint("generalist", setting()), workload)
    named = named_policy("generalist")
    assert (named.name, named.kind) == ("generalist", "checkpoint")
    built = run_episode(named.build(setting()), workload)
    np.testing.assert_array_equal(by_name.log.completed, built.log.completed)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "generalist").mkdir()
    with pytest.raises(ConfigError, match="is not one"):  # a path, where the name would be the shipped one's
        load_checkpoint("./generalist", setting())
    assert load_checkpoint("generalist", setting()).name == "generalist"
    with pytest.raises(ConfigError, match=r"did you mean 'generalist'\?"):
        named_policy("generalst")


def test_several_policies_need_different_names(tmp_path: Path) -> None:
    (tmp_path / "wait").mkdir()
    with pytest.raises(ConfigError, match="would both be 'wait' in the tables"):
        named_policies("--policies", ["wait", str(tmp_path / "wait")])
    assert list(named_policies("--policies", ["wait", "vllm", "wait"])) == ["wait", "vllm"]


# --- scenario files ------------------------------------------------------------------------------------
FILE = """
description = "Chat at night"
num_requests = 40
ttft_slo = 2.0

[lengths]
lognormal = { prompt_mean = 180, prompt_sigma = 1.0, output_mean = 320, output_sigma = 0.8, max_total = 4096 }

[arrivals]
process = "gamma"
rate = 5.0
cv = 3.0

[engine]
num_blocks = 2816
time_model = "a100-llama2-7b-vllm"

[layout]
by = "prompt"
edges = [128, 512]
"""


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_scenario_file_is_a_scenario_everywhere(tmp_path: Path) -> None:
    path = write(tmp_path / "night.toml", FILE)
    scenario = load_scenario(path)
    assert isinstance(scenario, Scenario)
    assert (scenario.name, scenario.rate, scenario.num_requests, scenario.ttft_slo) == ("night", 5.0, 40, 2.0)
    assert scenario.engine.num_blocks == 2816 and scenario.layout.num_classes == 3
    for env in (gym.make("llmsched_env:LLMSched-v1", scenario=path), gym.make_vec("llmsched_env:LLMSched-v1", 2, scenario=path)):
        env.reset(seed=0)
    assert scenario.generate(0).arrival.shape == (40,)


@pytest.mark.parametrize(
    ("lengths", "mean_prompt"),
    [
        ('table = "azure-conv"', 878.0),
        ("types = { prompt = [10, 10], output = [10, 20], weight = [2.0, 1.0] }", 10.0),
        ('trace = "trace.csv"', 200.0),
    ],
)
def test_lengths_of_every_kind(tmp_path: Path, lengths: str, mean_prompt: float) -> None:
    write(tmp_path / "trace.csv", "arrived_at,num_prefill_tokens,num_decode_tokens\n0,100,5\n1,300,6\n")
    text = f"[lengths]\n{lengths}\n[arrivals]\nrate = 2.0\n"
    statistics = load_scenario(write(tmp_path / "x.toml", text)).statistics
    assert statistics.mean_prompt == pytest.approx(mean_prompt, rel=0.01)


@pytest.mark.parametrize(
    ("arrivals", "rate"),
    [
        ('process = "mmpp2"\nrate_low = 2.0\nrate_high = 6.0\nmean_low_seconds = 60.0\nmean_high_seconds = 60.0', 4.0),
        ('process = "piecewise"\ndurations = [10.0, 10.0]\nrates = [1.0, 3.0]', 2.0),
        ('process = "trace"\nfile = "trace.csv"', 1.0),
        ('process = "trace"\nfile = "trace.csv"\nrate = 5.0', 5.0),
    ],
)
def test_arrivals_of_every_kind(tmp_path: Path, arrivals: str, rate: float) -> None:
    write(tmp_path / "trace.csv", "arrived_at,num_prefill_tokens,num_decode_tokens\n0,100,5\n1,300,6\n2,300,6\n")
    text = f'[lengths]\ntable = "sharegpt"\n[arrivals]\n{arrivals}\n'
    assert load_scenario(write(tmp_path / "x.toml", text)).rate == pytest.approx(rate)


def test_the_paper_preset_in_a_file(tmp_path: Path) -> None:
    text = """
    [lengths]
    types = { prompt = [10, 10], output = [10, 20], weight = [2.0, 1.0] }
    [arrivals]
    rate = 3.0
    [engine]
    preset = "paper"
    capacity_tokens = 3750
    d0 = 1.0
    d1 = 1e-3
    """
    own, shipped = load_scenario(write(tmp_path / "two.toml", text)), load_scenario("two-type")
    assert own.engine == shipped.engine and own.known_layout == shipped.known_layout
    np.testing.assert_array_equal(own.generate(0).arrival, shipped.generate(0).arrival)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("num_requests = 40", "num_requets = 40"), r"num_requets: unknown field; did you mean 'num_requests'\?"),
        (("num_requests = 40", "num_requests = 0"), "num_requests: 0"),
        (("cv = 3.0", ""), "arrivals.cv: missing"),
        (("cv = 3.0", "cv = -1.0"), "arrivals.cv: -1"),
        (('process = "gamma"', 'process = "gama"'), "arrivals.process"),
        (("prompt_mean = 180, ", ""), "lengths.lognormal.prompt_mean: missing"),
        (("lognormal = {", "lognorml = {"), r"lengths.lognorml: unknown field; did you mean 'lognormal'\?"),
        (("num_blocks = 2816", "num_block = 2816"), r"engine.num_block: unknown field; did you mean 'num_blocks'\?"),
        (("num_blocks = 2816", "num_blocks = 0"), "engine.num_blocks"),
        (("a100-llama2-7b-vllm", "a100-llama2-7b-vllmm"), "did you mean 'a100-llama2-7b-vllm'"),
        (('by = "prompt"', 'by = "output"'), "reveals hidden lengths"),
        (("edges = [128, 512]", "edges = [512, 128]"), "edges"),
        (("[arrivals]", "[arrivals"), "is not TOML"),
    ],
)
def test_a_mistake_in_a_file_is_named(tmp_path: Path, change: tuple[str, str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        load_scenario(write(tmp_path / "night.toml", FILE.replace(*change)))
    assert "night.toml" in str(caught.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml"):
        load_scenario(str(tmp_path / "none.toml"))
    with pytest.raises(ConfigError, match="lengths: missing"):
        load_scenario(write(tmp_path / "x.toml", "name = 'x'\n"))


# --- what breaks is named ------------------------------------------------------------------------------------
@pytest.mark.usefixtures("things")
def test_scenarios_calibrations_and_backends_by_module_and_attribute() -> None:
    assert load_scenario(f"{MODULE}:busy").name == "busy"
    assert isinstance(load_calibration(f"{MODULE}:slow"), LinearTime)
    assert isinstance(make_backend(f"{MODULE}:SimBackend"), SimBackend)
    with pytest.raises(ConfigError, match=r"no 'buzy' there; did you mean 'busy'\?"):
        load_scenario(f"{MODULE}:buzy")


def test_a_module_that_ends_the_program_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llmsched_test_exits.py").write_text("raise SystemExit(0)\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="SystemExit: 0"):
        named_policy("llmsched_test_exits:X")


def test_a_factory_must_be_callable() -> None:
    with pytest.raises(ConfigError, match="policy: 'five' is 5, must be a class or a function"):
        registry.register_policy("five", 5)  # type: ignore[arg-type]


def test_the_nearest_name_is_found_however_it_is_capitalised() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'vllm'\?"):
        named_policy("VLLM")
    with pytest.raises(ConfigError, match=r"did you mean 'generalist'\?"):
        load_checkpoint("generalst")
    for nothing in (lambda: load_checkpoint(""), lambda: named_policy("")):
        with pytest.raises(ConfigError):
            nothing()


@pytest.mark.usefixtures("things")
def test_a_reward_refuses_an_argument_in_its_own_name() -> None:
    with pytest.raises(ConfigError, match=f"reward '{MODULE}:weighted': could not convert string to float: 'a'"):
        make_reward({"name": f"{MODULE}:weighted", "weight": "a"})


@pytest.mark.usefixtures("things")
def test_a_policy_is_known_again_by_what_it_is(tmp_path: Path) -> None:
    own = named_policy(f"{MODULE}:AtMost")
    before = own.digest()
    assert len(before) == 16 and named_policy("wait").digest() == ""
    (tmp_path / f"{MODULE}.py").write_text(SOURCE.replace("limit: int = 64", "limit: int = 2"), encoding="utf-8")
    assert own.digest() != before
    assert len(named_policy("generalist").digest()) == 16
