"""Gymnasium's wrappers over one environment, SyncVectorEnv, AsyncVectorEnv and the native vector environment.

    python examples/gymnasium_vectors.py [steps]

The native one runs in both autoreset modes; Gymnasium's vector wrappers of observations take NEXT_STEP alone. Videos go to videos/
where pygame-ce and moviepy are installed.
"""

import sys
from importlib.util import find_spec

import gymnasium as gym
import gymnasium.wrappers as one
import gymnasium.wrappers.vector as many

ID = "llmsched_env:LLMSched-v1"
SETTINGS = {"num_requests": 20}


def run(name, env, steps):
    """Random actions; the returns of the episodes that ended."""
    env.action_space.seed(0)
    env.reset(seed=0)
    returns = []
    for _ in range(steps):
        *_, terminated, truncated, info = env.step(env.action_space.sample())
        vector = isinstance(env, gym.vector.VectorEnv)
        if "episode" in info:
            returns += list(info["episode"]["r"][info["_episode"]]) if vector else [info["episode"]["r"]]
        if not vector and (terminated or truncated):
            env.reset()
    env.close()
    print(f"{name}: {len(returns)} episodes, mean latency {-sum(returns) / max(len(returns), 1):.2f} s")


def main(steps: int = 2000) -> None:
    env = one.FlattenObservation(one.RecordEpisodeStatistics(gym.make(ID, **SETTINGS)))
    run("scalar", one.NormalizeReward(one.NormalizeObservation(env)), steps)
    if find_spec("pygame") and find_spec("moviepy"):
        # Frames are drawn in every step: a short episode.
        filmed = gym.make(ID, render_mode="rgb_array", num_requests=2)
        run("scalar, filmed", one.RecordEpisodeStatistics(one.RecordVideo(filmed, "videos", video_length=20)), min(steps, 40))
    for kind in ("sync", "async", "vector_entry_point"):
        envs = many.RecordEpisodeStatistics(gym.make_vec(ID, num_envs=4, vectorization_mode=kind, **SETTINGS))
        envs = many.NormalizeObservation(many.FlattenObservation(envs))
        run(kind, many.NormalizeReward(envs), steps // 4)
    envs = gym.make_vec(ID, num_envs=4, autoreset_mode="SameStep", **SETTINGS)
    run("native, SAME_STEP", many.NormalizeReward(many.RecordEpisodeStatistics(envs)), steps // 4)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
