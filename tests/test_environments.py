"""The environments by name: registered alike for one and for many, and with something to learn."""

from __future__ import annotations

from pathlib import Path

import gymnasium as gym
import pytest
from gymnasium.utils.env_checker import check_env

from llmsched_env import ENVIRONMENTS, ConfigError
from llmsched_env.bench.headroom import MEASURED, Headroom, headroom
from llmsched_env.environments import NamedEnvironment

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
    given, other = gym.make("LLMSched-v0", class_by="prompt"), gym.make("LLMSched-v0")
    assert given.unwrapped.layout == other.unwrapped.layout and given.action_space == other.action_space


def test_a_trace_is_the_workload(tmp_path: Path) -> None:
    path = tmp_path / "requests.csv"
    path.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,10,5\n1.0,20,5\n")
    with pytest.raises(ConfigError, match="scenario: 'two-type' beside trace="):
        gym.make("LLMSched-v0", trace=str(path), scenario="two-type")
    env = gym.make("LLMSched-v0", trace=str(path))
    env.reset(seed=0)
    assert env.unwrapped.num_requests == 2


def test_a_summary_needs_an_episode() -> None:
    with pytest.raises(gym.error.ResetNeeded):
        gym.make("LLMSched-v0").unwrapped.summary()


@pytest.mark.slow
@pytest.mark.parametrize("environment", MEASURED, ids=lambda e: e.id)
def test_there_is_something_to_learn(environment: NamedEnvironment) -> None:
    found: Headroom = headroom(environment, 24)
    assert found.gap >= 0.25
    assert -found.greedy.latency.mean < found.threshold < -found.constant.latency.mean
    if found.id == "LLMSchedEasy-v0":  # greedy admission evicts every request once and more, WAIT none
        wait = next(score for score in found.knowing if score.name == "wait")
        assert found.greedy.evictions > 1000 and wait.evictions == 0
        assert wait.latency.mean < 0.75 * found.greedy.latency.mean
