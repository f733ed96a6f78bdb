"""The adapter for stable-baselines3 equals ``DummyVecEnv`` over scalar environments, and PPO learns on it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from llmsched_env import ConfigError, LLMSchedEnv
from llmsched_env.errors import install_command
from llmsched_env.vector import LLMSchedVectorEnv

pytest.importorskip("torch", reason="torch is not installed (extra: agents)")
pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed (extra: agents)")

from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecMonitor, VecNormalize

from llmsched_agents.sb3_vec import SB3VecEnv
from tests.env_settings import ADMIT

ROOT = Path(__file__).resolve().parents[1]
# Episodes of a few dozen random steps: SHORT's end by completion, CUT's by the horizon of one second.
SHORT: dict[str, Any] = {**ADMIT, "scenario": "nested-two-type", "num_requests": 4, "max_admit": 4}
CUT: dict[str, Any] = {
    **ADMIT,
    "rate": 4.0,
    "num_requests": 4,
    "max_admit": 4,
    "class_by": "prompt",
    "class_edges": (300, 900),
    "segment_ends": (20,),
    "horizon": 1.0,
}
CASES: list[dict[str, Any]] = [SHORT, SHORT | {"scenario": "two-type", "reward": "throughput"}, CUT]


def legal(masks: np.ndarray, sizes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(num_envs, components) random legal actions from (num_envs, sum of sizes) masks."""
    parts = np.split(masks, np.cumsum(sizes)[:-1], axis=1)
    return np.stack([[rng.choice(np.flatnonzero(row)) for row in part] for part in parts], axis=1)


def flat(observed: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate(list(observed.values()), axis=-1)


def same(ours: Any, theirs: Any, flatten: bool) -> bool:
    if flatten:
        return ours.dtype == np.float32 and np.array_equal(ours, flat(theirs))
    return list(ours) == list(theirs) and all(np.array_equal(ours[k], theirs[k]) and ours[k].dtype == np.float32 for k in ours)


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_equal_to_dummy_vec_env(case: dict[str, Any], flatten: bool) -> None:
    n = 3
    ours = SB3VecEnv(LLMSchedVectorEnv(n, **case), flatten=flatten)
    theirs = DummyVecEnv([lambda: Monitor(LLMSchedEnv(**case)) for _ in range(n)])
    assert ours.action_space == theirs.action_space
    if not flatten:
        assert ours.observation_space == theirs.observation_space
    sizes = np.asarray(ours.action_space.nvec)  # type: ignore[attr-defined]
    rng = np.random.default_rng(0)
    assert ours.seed(3) == theirs.seed(3)
    ends = truncations = steps = 0
    for _ in range(2):  # the second reset goes on with the generators of the first
        assert same(ours.reset(), theirs.reset(), flatten)
        before = ends
        for _ in range(1000):
            masks = ours.env_method("action_masks")
            assert np.array_equal(np.stack(masks), np.stack(theirs.env_method("action_masks")))
            actions = legal(np.stack(masks), sizes, rng)
            observed, rewards, dones, infos = ours.step(actions)
            expected, their_rewards, their_dones, their_infos = theirs.step(actions)
            steps += n
            assert same(observed, expected, flatten)
            assert ours.observation_space.contains(observed[0] if flatten else {k: v[0] for k, v in observed.items()})  # type: ignore[index, union-attr]
            assert rewards.dtype == their_rewards.dtype == np.float32
            assert np.array_equal(rewards, their_rewards)
            assert dones.dtype == np.bool_
            assert np.array_equal(dones, their_dones)
            for i, (info, known) in enumerate(zip(infos, their_infos, strict=True)):
                if not dones[i]:
                    assert info == {}
                    continue
                ends += 1
                truncations += info["TimeLimit.truncated"]
                assert same(info["terminal_observation"], known["terminal_observation"], flatten)
                assert info["TimeLimit.truncated"] is known["TimeLimit.truncated"]
                assert info["episode"].keys() == known["episode"].keys() == {"r", "l", "t"}
                assert info["episode"]["r"] == pytest.approx(known["episode"]["r"], abs=1.5e-6)  # both rounded to 6 digits
                assert info["episode"]["l"] == known["episode"]["l"]
                assert info["episode"]["t"] >= 0
            if ends >= before + 4:
                break
    assert ends >= 8
    assert (truncations > 0) == ("horizon" in case)
    ours.close()


def test_infos_are_shared_but_never_stale() -> None:
    env = SB3VecEnv(LLMSchedVectorEnv(2, **SHORT))
    env.reset()
    idle = np.zeros((2, *env.action_space.shape), dtype=np.int64)  # type: ignore[misc]
    first = env.step(idle)[3]
    assert env.step(idle)[3] is first
    first[0]["episode"] = "written by a wrapper"
    assert env.step(idle)[3] == [{}, {}]


def test_arrays_of_a_step_are_fresh() -> None:
    env = SB3VecEnv(LLMSchedVectorEnv(2, **SHORT), flatten=True)
    kept = env.reset()
    assert isinstance(kept, np.ndarray)
    copy = kept.copy()
    rng = np.random.default_rng(0)
    sizes = np.asarray(env.action_space.nvec)  # type: ignore[attr-defined]
    for _ in range(20):
        actions = legal(np.stack(env.env_method("action_masks")), sizes, rng)
        observed, rewards, _, _ = env.step(actions)
        assert np.array_equal(kept, copy)
        assert isinstance(observed, np.ndarray)
        rewards += 1.0  # as collect_rollouts does
        assert np.isfinite(env.vector._rewards).all() and (env.vector._rewards <= 0).all()
        kept, copy = observed, observed.copy()


def test_masks_through_env_method() -> None:
    env = SB3VecEnv(LLMSchedVectorEnv(5, **SHORT))
    env.seed(0)
    env.reset()
    sizes = np.asarray(env.action_space.nvec)  # type: ignore[attr-defined]
    masks = env.env_method("action_masks")
    assert len(masks) == 5
    assert all(mask.shape == (sizes.sum(),) and mask.dtype == np.bool_ for mask in masks)
    assert env.has_attr("action_masks")  # what sb3-contrib asks before it masks
    for chosen, expected in ((3, [3]), ([4, 1], [4, 1]), (-1, [4])):
        rows = env.env_method("action_masks", indices=chosen)
        assert all(np.array_equal(row, masks[i]) for row, i in zip(rows, expected, strict=True))
        called = [method() for method in env.get_attr("action_masks", indices=chosen)]
        assert all(np.array_equal(row, masks[i]) for row, i in zip(called, expected, strict=True))
    with pytest.raises(AttributeError, match="summary"):
        env.env_method("summary")
    with pytest.raises(TypeError, match="no arguments"):
        env.env_method("action_masks", 1)
    with pytest.raises(IndexError):
        env.env_method("action_masks", indices=5)


def test_masks_agree_with_observations() -> None:
    env = SB3VecEnv(LLMSchedVectorEnv(4, **SHORT))
    env.seed(0)
    observed = env.reset()
    queues = env.action_space.nvec.size // 2  # type: ignore[attr-defined]
    sizes = np.asarray(env.action_space.nvec)  # type: ignore[attr-defined]
    rng = np.random.default_rng(0)
    ends = 0
    for _ in range(200):  # beyond ends, so that the masks of new episodes count too
        masks = np.stack(env.env_method("action_masks"))
        parts = np.split(masks, np.cumsum(sizes)[:-1], axis=1)
        assert isinstance(observed, dict)
        for q in range(queues):
            hold, advance = parts[q].T
            none, *_, all_waiting = parts[queues + q].T
            assert advance.all() and none.all()
            assert np.array_equal(hold, observed["segment_residents"][:, q] > 0)
            assert np.array_equal(all_waiting, observed["queue_length"][:, q] > 0)
        observed, _, dones, _ = env.step(legal(masks, sizes, rng))
        ends += int(dones.sum())
    assert ends >= 4


def test_attributes() -> None:
    env = SB3VecEnv(LLMSchedVectorEnv(4, **(CUT | {"rate": [4.0, 8.0]})))
    assert env.get_attr("rate") == [4.0, 8.0, 4.0, 8.0]
    assert env.get_attr("rate", 1) == [8.0]
    with pytest.raises(AttributeError, match="backend"):
        env.get_attr("backend")  # the template's: no state of environment i
    assert not env.has_attr("label")
    env.set_attr("label", "a", indices=[0, 2])
    assert env.get_attr("label", [2]) == ["a"]
    assert not env.has_attr("label"), "environments 1 and 3 have none"
    with pytest.raises(AttributeError, match="fixed"):
        env.set_attr("rate", 1.0)
    with pytest.raises(IndexError):
        env.get_attr("rate", 4)
    assert env.env_is_wrapped(Monitor) == [True] * 4
    assert env.env_is_wrapped(gym.wrappers.TimeLimit, indices=0) == [False]
    assert env.get_images() == [None] * 4
    env.set_options({})
    with pytest.raises(ConfigError, match="rate"):
        env.set_options([{}, {"rate": 3.0}])


def test_refusals() -> None:
    running = LLMSchedVectorEnv(2, autoreset_mode="NextStep", **SHORT)
    running.reset(seed=0)
    with pytest.raises(ConfigError, match=r"autoreset_mode: .*SAME_STEP.*, must be set before the first reset"):
        SB3VecEnv(running)
    assert running.autoreset_mode == running.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP  # refused: as it was
    for chosen in ({}, {"autoreset_mode": "NextStep"}, {"autoreset_mode": "SameStep"}):
        vector = LLMSchedVectorEnv(2, **chosen, **SHORT)
        SB3VecEnv(vector)
        assert vector.autoreset_mode == vector.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    started = LLMSchedVectorEnv(2, autoreset_mode="SameStep", **SHORT)
    started.reset(seed=0)
    SB3VecEnv(started)
    with pytest.raises(ConfigError, match="LLMSchedEnv, must be"):
        SB3VecEnv(LLMSchedEnv(**SHORT))  # type: ignore[arg-type]
    made = gym.make_vec("llmsched_env:LLMSched-v1", num_envs=2, **SHORT)
    assert isinstance(made, LLMSchedVectorEnv)
    env = SB3VecEnv(made)
    env.reset()
    with pytest.raises(gym.error.ResetNeeded, match="step_async"):
        env.step_wait()


@pytest.mark.parametrize(("policy", "flatten"), [("MultiInputPolicy", False), ("MlpPolicy", True)])
def test_ppo_learns(policy: str, flatten: bool) -> None:
    # The horizon makes PPO evaluate terminal observations, which it adds to the rewards.
    env: VecEnv = SB3VecEnv(LLMSchedVectorEnv(16, **CUT), flatten=flatten)
    model = PPO(policy, env, n_steps=64, batch_size=256, n_epochs=2, seed=0, device="cpu")
    before = [p.detach().clone() for p in model.policy.parameters()]
    model.learn(2048)
    assert model.num_timesteps == 2048
    assert model.ep_info_buffer
    assert all(np.isfinite(e["r"]) and e["r"] <= 0 and e["l"] > 0 for e in model.ep_info_buffer)  # 0: no arrival in the horizon
    assert any(e["r"] < 0 for e in model.ep_info_buffer)
    after = list(model.policy.parameters())
    assert all(bool(p.isfinite().all()) for p in after)
    assert any(not p.equal(q) for p, q in zip(before, after, strict=True))
    mean, _ = evaluate_policy(model, env, n_eval_episodes=4)  # warns, and so fails, without episode statistics
    assert np.isfinite(mean)
    env.close()


def test_threads_of_the_environments_leave_torchs_alone() -> None:
    import torch

    before = torch.get_num_threads()
    try:
        for count in (before, 3, 1):
            torch.set_num_threads(count)
            plain = gym.make_vec("llmsched_env:LLMSched-v1", num_envs=4, threads=2, **CUT)
            plain.reset(seed=0)
            for _ in range(20):
                plain.step(np.ones((4, *plain.single_action_space.shape), dtype=np.int64))  # type: ignore[misc]
            assert torch.get_num_threads() == count
            adapted = SB3VecEnv(LLMSchedVectorEnv(4, **CUT, threads=2))
            adapted.reset()
            for _ in range(20):
                adapted.step(np.ones((4, *plain.single_action_space.shape), dtype=np.int64))  # type: ignore[misc]
            assert torch.get_num_threads() == count
            for env in (plain, adapted):
                env.close()
            assert torch.get_num_threads() == count
        torch.set_num_threads(2)
        learning = SB3VecEnv(LLMSchedVectorEnv(4, **CUT, threads=2))
        PPO("MultiInputPolicy", learning, n_steps=8, batch_size=16, n_epochs=1, device="cpu").learn(64)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_wrappers_of_stable_baselines() -> None:
    inner = SB3VecEnv(LLMSchedVectorEnv(3, **SHORT))
    with pytest.warns(UserWarning, match="already wrapped with a `Monitor`"):
        monitored = VecMonitor(inner)
    env = VecNormalize(monitored)
    env.seed(0)
    env.reset()
    sizes = np.asarray(env.action_space.nvec)  # type: ignore[attr-defined]
    rng = np.random.default_rng(0)
    ends = 0
    for _ in range(1000):
        _, _, dones, infos = env.step(legal(np.stack(env.env_method("action_masks")), sizes, rng))
        assert not any(inner._no_infos), "stable-baselines3 wrote to a shared dictionary"
        for i in np.flatnonzero(dones):
            ends += 1
            assert {"terminal_observation", "TimeLimit.truncated", "episode"} <= infos[i].keys()
        if ends >= 3:
            break
    assert ends >= 3


@pytest.mark.parametrize("missing", ["torch", "stable_baselines3"])
def test_missing_extra_says_what_to_install(missing: str) -> None:
    program = (
        f"import sys\nsys.modules[{missing!r}] = None\nimport llmsched_agents\nfrom llmsched_env.errors import MissingExtraError\n"
        "try:\n    import llmsched_agents.sb3_vec\nexcept MissingExtraError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == f"{missing} is not installed; run: {install_command('agents')}\n", done.stderr
