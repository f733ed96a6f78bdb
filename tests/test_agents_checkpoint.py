"""Checkpoints: the same agent comes back, on one engine and on many, without torch; what does not fit is refused."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("safetensors", reason="safetensors is not installed (extra: agents)")

from agents.agent import HELD_ITERATIONS, Agent
from agents.checkpoint import CONFIG, WEIGHTS, load_checkpoint, read_record, save_checkpoint
from agents.domain import Domain
from agents.interface import Interface
from agents.network import Network
from agents.recipe import Recipe
from baselines import make_policy
from llmsched_env import ConfigError
from llmsched_env.runner import run_episode

ROOT = Path(__file__).resolve().parents[1]
DOMAIN = Domain(("azure-conv",), (1.0,), (300,))
RECIPES = {
    "peak": Recipe(action_set="peak", num_classes=4, num_segments=1, order="work", features=True, hold=3),
    "reserve": Recipe(action_set="reserve", num_classes=2, num_segments=2, order="class", levels=(0.8, 1.0, 1.2)),
    "admit": Recipe(action_set="admit", num_segments=2, max_admit=3),
    "admit-only": Recipe(action_set="admit-only", num_segments=2, max_admit=3, features=True),
}


def network_for(recipe: Recipe, seed: int = 0) -> Network:
    """Random, but of a size that makes choices differ."""
    interface = Interface(recipe, DOMAIN.grid()[0].setting)
    rng = np.random.default_rng(seed)
    widths = [interface.width, 8, 6]
    weights = lambda out, inside: rng.normal(size=(out, inside)).astype(np.float32)  # noqa: E731
    layers = tuple((weights(b, a), weights(1, b)[0]) for a, b in itertools.pairwise(widths))
    out = sum(interface.components)
    mean, scale = weights(1, interface.width)[0] * 0.1 + 0.5, np.full(interface.width, 2.0, dtype=np.float32)
    return Network(mean, scale, layers, (weights(out, 6), weights(1, out)[0]), interface.components)


def saved(folder: Path, kind: str) -> Network:
    recipe = RECIPES[kind]
    network = network_for(recipe)
    layout = recipe.layout_for(DOMAIN.grid()[0].scenario.statistics)
    save_checkpoint(folder, network, recipe, DOMAIN, layout, name=kind, deterministic=True, record={"seed": 7, "steps": 1})
    return network


@pytest.mark.parametrize("kind", RECIPES)
def test_what_comes_back_is_what_was_saved(kind: str, tmp_path: Path) -> None:
    network = saved(tmp_path, kind)
    agent = load_checkpoint(tmp_path)
    assert agent.name == kind and agent.deterministic and agent.recipe == RECIPES[kind]
    for name, value in network.tensors().items():
        np.testing.assert_array_equal(agent.network.tensors()[name], value)
    assert read_record(tmp_path)["seed"] == 7
    other = load_checkpoint(tmp_path, DOMAIN.grid()[0].setting, deterministic=False, seed=3, name="drawn")
    assert not other.deterministic and other.name == "drawn"


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("kind", RECIPES)
def test_one_engine_and_many_decide_alike(kind: str, deterministic: bool) -> None:
    pytest.importorskip("sb3_contrib", reason="sb3-contrib is not installed (extra: agents)")
    from agents.training_env import AgentVecEnv

    recipe, setting = RECIPES[kind], DOMAIN.grid()[0]
    agent = Agent(network_for(recipe, 1), recipe, setting.setting, deterministic=deterministic, seed=5)
    batched = Agent(network_for(recipe, 1), recipe, setting.setting, deterministic=deterministic, seed=5)
    env = AgentVecEnv([setting], recipe, 1, num_requests=12)
    env.seed(11)
    observed: Any = env.reset()
    vector = env.vector
    requests = vector._requests[0, 0].copy(), vector._requests[0, 1].copy(), vector._times[0, 0].copy()
    from llmsched_env.types import Workload

    workload = Workload.of(requests[2], requests[0], requests[1])
    total, done = 0.0, False
    for _ in range(3000):
        actions = batched.predict(observed, env.action_masks())
        observed, rewards, dones, _ = env.step(actions if actions.shape[1] > 1 else actions[:, 0])
        total += float(rewards[0])
        done = bool(dones[0])
        if done:
            break
    if not done:
        pytest.skip("this network holds for ever; the guard is tested apart")
    result = run_episode(agent, workload)
    if agent.interventions == 0:
        assert result.summary.latency_mean == pytest.approx(-total, rel=1e-4)


def test_torch_is_not_needed(tmp_path: Path) -> None:
    saved(tmp_path, "peak")
    code = f"""
import sys
sys.modules["torch"] = None
sys.modules["stable_baselines3"] = None
from agents.checkpoint import load_checkpoint
from agents.domain import Domain
from llmsched_env.runner import run_episode
agent = load_checkpoint({str(tmp_path)!r})
setting = Domain(("azure-conv",), (1.0,), (300,)).grid()[0]
result = run_episode(agent, setting.scenario.generate(0, rate=setting.rate, num_requests=5))
print(result.summary.completed)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "5"


def always(recipe: Recipe, choices: dict[int, int]) -> Network:
    """A network whose likeliest choice of component i is ``choices[i]``."""
    interface = Interface(recipe, DOMAIN.grid()[0].setting)
    bias = np.zeros(sum(interface.components), dtype=np.float32)
    starts = np.cumsum([0, *interface.components])
    for i, choice in choices.items():
        bias[starts[i] + choice] = 1.0
    width = interface.width
    head = (np.zeros((bias.size, width), dtype=np.float32), bias)
    return Network(np.zeros(width, np.float32), np.ones(width, np.float32), (), head, interface.components)


@pytest.mark.parametrize(
    "choices",
    [
        {0: 0, 1: 0, 2: 0, 3: 0},  # holds everything, admits nothing
        {0: 1, 1: 0, 2: 3, 3: 3},  # the second segment never advances
    ],
)
def test_no_likeliest_choice_holds_for_ever(choices: dict[int, int]) -> None:
    recipe, setting = RECIPES["admit"], DOMAIN.grid()[0]
    workload = setting.scenario.generate(3, rate=setting.rate, num_requests=5)
    agent = Agent(always(recipe, choices), recipe, setting.setting, deterministic=True)
    result = run_episode(agent, workload)
    assert result.summary.completed == 5 and not result.summary.truncated
    assert agent.interventions > 0
    greedy = Agent(always(recipe, {0: 1, 1: 1, 2: 3, 3: 3}), recipe, setting.setting, deterministic=True)
    best = run_episode(greedy, workload)
    assert greedy.interventions == 0
    vllm = run_episode(make_policy("vllm", setting.setting), workload)
    assert best.summary.latency_mean == pytest.approx(vllm.summary.latency_mean)
    assert result.summary.latency_mean > best.summary.latency_mean
    assert HELD_ITERATIONS > 1


def test_draws_repeat_with_the_seed() -> None:
    recipe, setting = RECIPES["peak"], DOMAIN.grid()[0]
    workload = setting.scenario.generate(4, rate=setting.rate, num_requests=30)
    network = network_for(recipe, 2)
    a, b = (Agent(network, recipe, setting.setting, seed=1) for _ in range(2))
    first = run_episode(a, workload).log
    for agent in (a, b):  # a second episode of one agent, the first of another
        np.testing.assert_array_equal(run_episode(agent, workload).log.completed, first.completed)
    other = run_episode(Agent(network, recipe, setting.setting, seed=2), workload).log
    assert not np.array_equal(other.completed, first.completed)


def test_choices_follow_their_probabilities_and_masks() -> None:
    logits = np.log(np.array([0.2, 0.8, 0.1, 0.3, 0.6], dtype=np.float32))
    network = Network(np.zeros(1, np.float32), np.ones(1, np.float32), (), (np.zeros((5, 1), np.float32), logits), (2, 3))
    n = 20_000
    observed = np.zeros((n, 1), dtype=np.float32)
    drawn = network.choose(observed, rng=np.random.default_rng(0))
    assert np.bincount(drawn[:, 0], minlength=2) / n == pytest.approx([0.2, 0.8], abs=0.02)
    assert np.bincount(drawn[:, 1], minlength=3) / n == pytest.approx([0.1, 0.3, 0.6], abs=0.02)
    masks = np.tile([True, False, True, True, False], (n, 1))
    drawn = network.choose(observed, masks, np.random.default_rng(0))
    assert not drawn[:, 0].any() and np.bincount(drawn[:, 1], minlength=3) / n == pytest.approx([0.25, 0.75, 0.0], abs=0.02)
    np.testing.assert_array_equal(network.choose(observed[:1], masks[:1]), [[0, 1]])


# --- refusals -----------------------------------------------------------------------------------------
def changed(folder: Path, **values: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    for path, value in values.items():
        *parents, last = path.split("__")
        target = config
        for name in parents:
            target = target[name]
        target[last] = value
    (folder / CONFIG).write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": 99}, "format 99"),
        ({"environment__id": "LLMSched-v7"}, "LLMSched-v7"),
        ({"environment__package": "9.9.0"}, "9.9.0"),
        ({"observation__fields": [["kv", 3]]}, "another observation"),
        ({"observation__features": None}, "another observation"),
        ({"components": [3]}, "outputs"),
        ({"recipe__action_set": "peeks"}, "action_set"),
        ({"recipe__num_classes": 5}, "another observation"),
        ({"recipe__levels": [0.5, 1.0]}, "action components"),
    ],
)
def test_a_checkpoint_for_something_else_is_refused(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    saved(tmp_path, "peak")
    changed(tmp_path, **values)
    with pytest.raises(ConfigError, match=message):
        load_checkpoint(tmp_path, DOMAIN.grid()[0].setting)


def test_broken_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not one"):
        load_checkpoint(tmp_path / "nothing")
    good = tmp_path / "good"
    saved(good, "peak")
    cases = {
        "json": (CONFIG, b"{"),
        "list": (CONFIG, b"[]"),
        "lacks": (CONFIG, b"{}"),
        "weights": (WEIGHTS, b"not safetensors"),
        "cut": (WEIGHTS, (good / WEIGHTS).read_bytes()[:-40]),
    }
    for name, (file, content) in cases.items():
        folder = tmp_path / name
        shutil.copytree(good, folder)
        (folder / file).write_bytes(content)
        with pytest.raises(ConfigError, match="checkpoint"):
            load_checkpoint(folder)
    (good / WEIGHTS).unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        load_checkpoint(good)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    tensors = saved(tmp_path, "peak").tensors()
    components = network_for(RECIPES["peak"]).components
    bad = {
        "missing": {k: v for k, v in tensors.items() if k != "head.bias"},
        "unknown": {**tensors, "extra": tensors["head.bias"]},
        "float32": {**tensors, "head.bias": tensors["head.bias"].astype(np.float64)},
        "finite": {**tensors, "head.bias": np.full_like(tensors["head.bias"], np.nan)},
        "width": {**tensors, "layers.1.weight": tensors["layers.1.weight"][:, :-1]},
        "scale": {**tensors, "scale.scale": tensors["scale.scale"][:-1]},
    }
    for message, changed_tensors in bad.items():
        with pytest.raises(ConfigError, match=message):
            Network.from_tensors(changed_tensors, components)
    assert Network.from_tensors(tensors, components).width == network_for(RECIPES["peak"]).width
