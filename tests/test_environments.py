"""The environments by name: registered alike for one and for many, and with something to learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from llmsched_env import ENVIRONMENTS, ConfigError, EngineConfig
from llmsched_env.bench.headroom import MEASURED, Headroom, headroom
from llmsched_env.environments import FORMER_ENVIRONMENTS, NamedEnvironment
from llmsched_env.perf import LinearTime, load_calibration, save_calibration
from llmsched_env.spec import EnvSpec

SIMULATED = [environment.id for environment in ENVIRONMENTS if environment.simulated]


@pytest.mark.parametrize("name", SIMULATED)
def test_one_and_many_begin_alike(name: str) -> None:
    one, many = gym.make(f"llmsched_env:{name}"), gym.make_vec(f"llmsched_env:{name}", num_envs=2)
    observed, _ = one.reset(seed=5)
    together, _ = many.reset(seed=5)
    assert all((together[field][0] == observed[field]).all() for field in observed)
    assert one.action_space == many.single_action_space


@pytest.mark.parametrize("name", SIMULATED)
@pytest.mark.filterwarnings("error")
def test_the_checker_of_gymnasium_finds_nothing(name: str) -> None:
    check_env(gym.make(f"llmsched_env:{name}", num_requests=40).unwrapped, skip_render_check=True)


@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=lambda e: e.id)
def test_each_says_what_it_is(environment: NamedEnvironment) -> None:
    assert "## Description" in environment.kind.__doc__
    assert gym.spec(environment.id).reward_threshold == environment.reward_threshold


@pytest.mark.parametrize("environment", MEASURED, ids=lambda e: e.id)
def test_docstrings_say_what_the_page_says(environment: NamedEnvironment) -> None:
    """``docs/environments.md`` is generated; docstrings repeat its row."""
    page = (Path(__file__).resolve().parents[1] / "docs" / "environments.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith(f"| `{environment.id}`"))
    _, greedy, _, constant, _, best, gap, threshold = (cell.strip() for cell in row.strip("|").split("|"))

    def said(cell: str) -> str:
        mean, _, name = cell.partition(" ± ")
        return f"{mean} s" + (f" ({name.partition(' (')[2]}" if "(" in name else "")

    words = " ".join((environment.kind.__doc__ or "").split())
    headroom = f"admitting everything {said(greedy)}, best constant action {said(constant)}, best policy {said(best)}, gap {gap}"
    assert f"{headroom}; reward threshold {threshold}." in words
    assert float(threshold) == environment.reward_threshold


def test_naming_the_kind_of_classes_keeps_their_edges() -> None:
    given, other = gym.make("LLMSched-v1", class_by="prompt"), gym.make("LLMSched-v1")
    assert given.unwrapped.layout == other.unwrapped.layout and given.action_space == other.action_space


def test_a_trace_is_the_workload(tmp_path: Path) -> None:
    path = tmp_path / "requests.csv"
    path.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,10,5\n1.0,20,5\n")
    with pytest.raises(ConfigError, match="scenario: 'two-type' beside trace="):
        gym.make("LLMSched-v1", trace=str(path), scenario="two-type")
    env = gym.make("LLMSched-v1", trace=str(path))
    env.reset(seed=0)
    assert env.unwrapped.num_requests == 2


def test_a_summary_needs_an_episode() -> None:
    with pytest.raises(gym.error.ResetNeeded):
        gym.make("LLMSched-v1").unwrapped.summary()


# --- versions -----------------------------------------------------------------------------------

PLAYED = {
    "LLMSched-v0": (-14.46610300615682, 27, 106.81262675670907),
    "LLMSchedEasy-v0": (-108.3002181721514, 39, 531.5499999999998),
    "LLMSchedEasy-v1": (-108.3002181721514, 39, 531.5499999999998),
    "LLMSchedOverload-v0": (-38.11333517351206, 52, 209.0772744468962),
    "LLMSchedBursty-v0": (-16.14338084774128, 29, 115.05952417171555),
    "LLMSchedKnown-v0": (-14.94379608045345, 27, 106.4590704847907),
}
"""(return, steps, seconds) of the episode of seed 3 under drawn actions, recorded before there was a version 1."""


def played(env: Any) -> tuple[float, int, float]:
    """An episode of seed 3; every component of an action is drawn."""
    env, rng = env.unwrapped, np.random.default_rng(5)
    sizes = getattr(env.action_space, "nvec", None)
    env.reset(seed=3)
    total, steps = 0.0, 0
    while True:
        action = int(rng.integers(env.action_space.n)) if sizes is None else np.array([rng.integers(size) for size in sizes])
        _, reward, terminated, truncated, info = env.step(action)
        total, steps = total + reward, steps + 1
        if terminated or truncated:
            return total, steps, info["clock"]


@pytest.mark.filterwarnings("ignore:.*out of date:DeprecationWarning")
@pytest.mark.parametrize("name", PLAYED)
def test_a_version_plays_as_it_always_did(name: str) -> None:
    assert played(gym.make(name)) == PLAYED[name]


def test_version_one_has_the_measured_table() -> None:
    table, formula = load_calibration("a100-llama2-7b-vllm"), load_calibration("a100-llama2-7b-c10")
    for environment in ENVIRONMENTS:
        if environment.id != "LLMSchedEasy-v1":
            assert EnvSpec.of(**plain(environment)).engine.time_model is table
    for environment in FORMER_ENVIRONMENTS:
        if environment.id != "LLMSchedEasy-v0":
            assert EnvSpec.of(**plain(environment)).engine.time_model is formula


def plain(environment: NamedEnvironment) -> dict[str, Any]:
    """Settings without the backend, which is no field of ``EnvSettings``."""
    return {name: value for name, value in environment.settings.items() if name != "backend"}


def test_every_environment_has_its_former_version() -> None:
    began_with_1 = ("LLMSchedTenants-v1", "LLMSchedPredicted-v1")
    present = [e for e in ENVIRONMENTS if e.id not in began_with_1]
    assert [e.id.replace("-v0", "-v1") for e in FORMER_ENVIRONMENTS] == [e.id for e in present]
    for old, new in zip(FORMER_ENVIRONMENTS, present, strict=True):
        assert old.kind is new.kind and "* v0: " in new.kind.__doc__ and "* v1: " in new.kind.__doc__
        assert {k: v for k, v in old.settings.items() if k != "calibration"} == dict(new.settings)


@pytest.mark.parametrize("make", [gym.make, gym.make_vec])
def test_a_former_version_is_out_of_date(make: Any) -> None:
    with pytest.warns(DeprecationWarning, match="LLMSched-v0 is out of date"):
        env = make("llmsched_env:LLMSched-v0", num_requests=5)
    env.close()


# --- calibration --------------------------------------------------------------------------------


def test_a_calibration_sets_the_iteration_times_alone(tmp_path: Path) -> None:
    one = EnvSpec.of("azure-conv-40gb", calibration="a100-llama2-7b-c10", engine={"max_num_seqs": 64})
    own = EnvSpec.of("azure-conv-40gb", engine={"max_num_seqs": 64})
    assert one.engine == own.engine.replace(time_model=load_calibration("a100-llama2-7b-c10"))
    h100 = EnvSpec.of("azure-conv-40gb", calibration="h100-llama31-8b-vllm").engine
    assert h100.num_blocks == 2_816 and h100.time_model.provenance.name == "h100-llama31-8b-vllm"
    file = tmp_path / "mine.json"
    save_calibration(LinearTime(0.1, 1e-6, load_calibration("a100-llama2-7b-c10").provenance), file)
    assert EnvSpec.of(calibration=str(file)).engine.time_model.d0 == 0.1
    many = gym.make_vec("LLMSched-v1", num_envs=2, calibration="a100-llama2-7b-c10", num_requests=5).unwrapped
    assert {spec.engine.time_model.provenance.name for spec in many._specs} == {"a100-llama2-7b-c10"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"engine": {"time_model": "a100-llama2-7b"}}, r"calibration: 'a100-llama2-7b-c10' beside engine.time_model='a100-llama2-7b'"),
        ({"engine": {"d0": 0.1, "d1": 0.0}}, r"calibration: 'a100-llama2-7b-c10' beside engine.d0=0.1"),
        ({"engine": {"d1": 0.5, "d0": 0.1}, "scenario": "two-type"}, r"calibration: 'a100-llama2-7b-c10' beside engine.d0=0.1"),
        ({"engine": EngineConfig.vllm()}, r"calibration: 'a100-llama2-7b-c10' beside an EngineConfig as engine"),
        ({"scenario": "two-type"}, r"calibration: 'a100-llama2-7b-c10', must be None with the paper preset"),
        ({"calibration": "a100-llama2-7b-c11"}, r"calibration 'a100-llama2-7b-c11' is unknown; did you mean 'a100-llama2-7b-c10'"),
        ({"calibration": 3}, r"calibration: 3, must be a text"),
    ],
)
def test_a_calibration_that_cannot_be(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        EnvSpec.of(**{"calibration": "a100-llama2-7b-c10", **settings})


def test_the_formula_of_version_zero_gives_way_to_a_time_model_of_ones_own() -> None:
    with pytest.warns(DeprecationWarning, match="out of date"):
        env = gym.make("LLMSched-v0", calibration=None, scenario="two-type")
    assert env.unwrapped.engine == EnvSpec.of("two-type").engine


@pytest.mark.slow
@pytest.mark.parametrize("environment", MEASURED, ids=lambda e: e.id)
def test_there_is_something_to_learn(environment: NamedEnvironment) -> None:
    found: Headroom = headroom(environment, 24)
    assert found.gap >= 0.25
    assert -found.greedy.latency.mean < found.threshold < -found.constant.latency.mean
    if found.id == "LLMSchedEasy-v1":  # greedy admission evicts every request once and more, WAIT none
        wait = next(score for score in found.knowing if score.name == "wait")
        assert found.greedy.evictions > 1000 and wait.evictions == 0
        assert wait.latency.mean < 0.75 * found.greedy.latency.mean
