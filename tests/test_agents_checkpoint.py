"""Checkpoints: the same agent comes back, on one engine and on many, without torch; what does not fit is refused."""

from __future__ import annotations

import dataclasses
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

from llmsched_agents import kernel
from llmsched_agents.agent import Agent
from llmsched_agents.checkpoint import CONFIG, WEIGHTS, load_checkpoint, read_record, save_checkpoint
from llmsched_agents.domain import Domain
from llmsched_agents.interface import Interface
from llmsched_agents.kernel import HELD_ITERATIONS, AgentRecord
from llmsched_agents.network import Network
from llmsched_agents.recipe import Recipe
from llmsched_baselines import make_policy
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


@pytest.mark.parametrize("kind", RECIPES)
def test_one_engine_and_many_decide_alike(kind: str) -> None:
    pytest.importorskip("sb3_contrib", reason="sb3-contrib is not installed (extra: agents)")
    from llmsched_agents.training_env import AgentVecEnv
    from llmsched_env.types import Workload

    recipe, setting = RECIPES[kind], DOMAIN.grid()[0]
    agent, batched = (Agent(network_for(recipe, 1), recipe, setting.setting, deterministic=True) for _ in range(2))
    env = AgentVecEnv([setting], recipe, 1, num_requests=12)
    env.seed(11)
    observed: Any = env.reset()
    rows = env.vector.fleet.records[0].hidden.rows.copy()
    workload = Workload.of(rows["arrival"], rows["prompt"], rows["output"])
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


def remembered(agent: Agent) -> dict[str, Any]:
    """What the agent's rule remembers within an episode."""
    record = record_of(agent)
    return {name: np.array(getattr(record, name)) for name, field in AgentRecord.FIELDS.items() if field.memory}


def record_of(agent: Agent) -> AgentRecord:
    assert isinstance(agent.rule.policy, AgentRecord)
    return agent.rule.policy


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("kind", RECIPES)
def test_a_whole_episode_in_one_call_equals_single_decisions(kind: str, deterministic: bool) -> None:
    recipe, setting = RECIPES[kind], DOMAIN.grid()[0]
    workload = setting.scenario.generate(5, rate=setting.rate, num_requests=40)
    agent = Agent(network_for(recipe, 2), recipe, setting.setting, deterministic=deterministic, seed=5)
    whole = run_episode(agent, workload)
    interventions, memory = agent.interventions, remembered(agent)
    assert memory.keys() == {"action", "held", "left", "draws", "idle", "interventions"}
    assert (memory["draws"] == 0) == deterministic
    seen = 0

    def count(*_: object) -> None:  # with a callback every iteration is decided by ``decide``
        nonlocal seen
        seen += 1

    single = run_episode(agent, workload, on_step=count)
    assert seen > 100 and single.summary.completed == 40
    np.testing.assert_array_equal(single.log.completed, whole.log.completed)
    np.testing.assert_array_equal(single.log.first_token, whole.log.first_token)
    assert agent.interventions == interventions
    again = remembered(agent)
    for name, values in memory.items():
        np.testing.assert_array_equal(again[name], values, err_msg=name)
    agent.reset()
    assert not any(values.any() for values in remembered(agent).values())


# --- the compiled network ------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", RECIPES)
def test_the_compiled_network_equals_numpy_and_torch(kind: str) -> None:
    recipe, setting = RECIPES[kind], DOMAIN.grid()[0]
    network = network_for(recipe, 3)
    agent = Agent(network, recipe, setting.setting, deterministic=True)
    record = record_of(agent)
    rng = np.random.default_rng(0)
    observed = rng.uniform(size=(50, network.width)).astype(np.float32)
    masks = rng.random((50, sum(network.components))) < 0.5
    starts = np.cumsum([0, *network.components[:-1]])
    masks[:, starts] |= ~np.stack([part.any(axis=1) for part in np.split(masks, starts[1:], axis=1)], axis=1)
    ours = np.stack([kernel.network_logits(record, row) for row in observed])
    double = {name: value.astype(np.float64) for name, value in network.tensors().items()}  # in float32 the sums differ by some 1e-6
    layers = [(double[f"layers.{k}.weight"], double[f"layers.{k}.bias"]) for k in range(len(network.layers))]
    layers.append((double["head.weight"], double["head.bias"]))
    mean, scale = double["scale.mean"], double["scale.scale"]
    exact = dataclasses.replace(network, mean=mean, scale=scale, layers=tuple(layers[:-1]), head=layers[-1])
    np.testing.assert_allclose(ours, exact.logits(observed), atol=1e-6)
    chosen = np.empty((50, len(network.components)), dtype=np.int64)
    for row in range(50):
        kernel.choose_action(record, ours[row], masks[row])
        chosen[row] = record.action
    np.testing.assert_array_equal(chosen, exact.choose(observed, masks))
    th = pytest.importorskip("torch", reason="torch is not installed (extra: agents)")
    x = th.clamp((th.as_tensor(observed).double() - th.as_tensor(mean)) * th.as_tensor(scale), -5.0, 5.0)
    for weight, bias in layers[:-1]:
        x = th.tanh(th.nn.functional.linear(x, th.as_tensor(weight), th.as_tensor(bias)))
    np.testing.assert_allclose(ours, th.nn.functional.linear(x, th.as_tensor(layers[-1][0]), th.as_tensor(layers[-1][1])), atol=1e-6)


def test_compiled_draws_follow_the_softmax_and_the_mask() -> None:
    recipe = RECIPES["admit"]  # components 2, 2, 4, 4
    agent = Agent(network_for(recipe), recipe, DOMAIN.grid()[0].setting, seed=3)
    record = record_of(agent)
    probability = np.array([0.3, 0.7, 0.5, 0.5, 0.1, 0.2, 0.3, 0.4, 0.4, 0.3, 0.2, 0.1])
    legal = np.ones(12, dtype=np.bool_)
    legal[[1, 4, 11]] = False
    n = 20_000
    drawn = np.empty((n, 4), dtype=np.int64)
    for i in range(n):
        kernel.choose_action(record, np.log(probability), legal)
        drawn[i] = record.action
    for c, (start, size) in enumerate([(0, 2), (2, 2), (4, 4), (8, 4)]):
        expected = np.where(legal, probability, 0.0)[start : start + size]
        found = np.bincount(drawn[:, c], minlength=size) / n
        assert found == pytest.approx(expected / expected.sum(), abs=0.015)
        assert not found[expected == 0.0].any()
    assert abs(np.corrcoef(drawn[:, 2], drawn[:, 3])[0, 1]) < 0.03  # one draw does not tell the next


def test_torch_is_not_needed(tmp_path: Path) -> None:
    saved(tmp_path, "peak")
    code = f"""
import sys
sys.modules["torch"] = None
sys.modules["stable_baselines3"] = None
from llmsched_agents.checkpoint import load_checkpoint
from llmsched_agents.domain import Domain
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
        {0: 1, 1: 1, 2: 3, 3: 0},  # the boundary queue is never admitted
    ],
)
def test_no_likeliest_choice_holds_for_ever(choices: dict[int, int]) -> None:
    recipe, setting = RECIPES["admit"], DOMAIN.grid()[0]
    # Requests keep arriving for longer than the guard waits; after the last arrival the engine itself lets nothing stand.
    workload = setting.scenario.generate(3, rate=setting.rate, num_requests=60)
    agent = Agent(always(recipe, choices), recipe, setting.setting, deterministic=True)
    result = run_episode(agent, workload)
    assert result.summary.completed == 60 and not result.summary.truncated
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
