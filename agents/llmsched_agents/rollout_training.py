"""A training by paired roll-outs, kept and resumed like the others."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from torch import nn

from llmsched_agents.checkpoint import save_checkpoint
from llmsched_agents.domain import Domain, EnvSetting
from llmsched_agents.hyperparameters import Hyperparameters
from llmsched_agents.policy import AgentPolicy
from llmsched_agents.rollouts import PairedRollouts
from llmsched_agents.training import STATE, Progress, RunOptions, read_state
from llmsched_agents.training_env import AgentVecEnv
from llmsched_env import __version__
from llmsched_env.errors import ConfigError


class RolloutTraining:
    """A training by paired roll-outs (``llmsched_agents.rollouts``) with the files of ``Training``; stages are its rounds."""

    def __init__(
        self,
        hyper: Hyperparameters,
        settings: Sequence[EnvSetting],
        domain: Domain,
        out: Path,
        **options: Any,
    ) -> None:
        run = RunOptions(**options)
        seed, reward, threads = run.seed, run.reward, run.threads
        if hyper.rollouts is None:
            raise ConfigError("hyperparameters.rollouts: missing, must be a mapping for paired-rollouts")
        self.hyper, self.domain, self.out, self.seed, self.name, self.report = hyper, domain, out, seed, run.name, run.report
        self.progress = Progress()
        if threads is not None:
            th.set_num_threads(threads)
        count = th.get_num_threads()
        self.env = AgentVecEnv(settings, hyper.recipe, hyper.n_envs, reward=reward, threads=threads, **hyper.env_kwargs)
        th.manual_seed(seed)
        self.policy = AgentPolicy(
            self.env.observation_space, self.env.action_space, lambda _: 1e-3, net_arch=list(hyper.net_arch), activation_fn=nn.Tanh
        )
        first = min(range(self.env.components[0]), key=lambda i: abs(self._level(i) - hyper.first_level))
        self.rollouts = PairedRollouts(self.env, self.policy, hyper.rollouts, first=first, folder=out / "rounds", seed=seed)
        self.env.seed(seed)
        self.env.reset()
        self.env.step(np.zeros(self.env.num_envs, dtype=np.int64))
        th.set_num_threads(count)

    def _level(self, action: int) -> float:
        recipe = self.hyper.recipe
        return float(action) if recipe.action_set == "admit-only" else recipe.choices[action]

    def run(self) -> Progress:
        """The rounds that are left."""
        plan = self.rollouts.plan
        while self.rollouts.done < plan.rounds:
            figures = self.rollouts.round()
            assert self.rollouts.data is not None
            self.progress.steps = len(self.rollouts.data)
            self.progress.seconds += figures["seconds"]
            self.progress.env_seconds += figures["collect_seconds"]
            self.progress.curve.append(figures)
            self.save()
            if self.report is not None:
                named = (("choice", "chosen_percent"), ("best fixed", "best_fixed_percent"), ("best of each state", "best_percent"))
                held = ", ".join(f"{word} {figures[key]:+.2f} %" for word, key in named if key in figures)
                self.report(
                    f"round {self.rollouts.done} of {plan.rounds}: {self.progress.steps:,} states, {figures['seconds']:.0f} s; "
                    f"cost of what was followed, held out: {held}",
                    self.rollouts.done,
                    plan.rounds,
                )
        return self.progress

    def save(self) -> None:
        """Write ``state.pt`` in one step, and the agent as it is now."""
        self.out.mkdir(parents=True, exist_ok=True)
        temporary = self.out / f".{STATE}.{os.getpid()}"
        p = self.progress
        state = {"policy": self.policy.state_dict(), "rounds": self.rollouts.done, "seconds": p.seconds, "env_seconds": p.env_seconds}
        th.save({**state, "curve": p.curve}, temporary)
        temporary.replace(self.out / STATE)
        record = {
            "algorithm": "paired-rollouts",
            "seed": self.seed,
            "steps": p.steps,
            "wall_seconds": round(p.seconds, 1),
            "environment_seconds": round(p.env_seconds, 1),
            "environments": self.hyper.n_envs,
            "versions": {"llmsched-env": __version__, "torch": th.__version__, "numpy": np.__version__},
            "settings": [s.describe() for s in self.env.settings[:16]],
            "curve": p.curve,
        }
        save_checkpoint(
            self.out / "agent",
            self.rollouts.network(),
            self.hyper.recipe,
            self.domain,
            self.env.layout,
            name=self.name,
            deterministic=True,
            record=record,
        )

    def restore(self) -> None:
        """Go on after the last round that ``state.pt`` knows.

        Raises:
            ConfigError: there is none, or it belongs to another run.
        """
        state = read_state(self.out / STATE)
        try:
            self.policy.load_state_dict(state["policy"])
            rounds = int(state["rounds"])
            self.progress = Progress(0, state["seconds"], state["env_seconds"], list(state["curve"]))
        except (KeyError, RuntimeError) as error:
            raise ConfigError(f"--resume: {self.out / STATE} belongs to another run ({str(error).splitlines()[0]})") from error
        self.rollouts.restore(rounds)
        self.progress.steps = len(self.rollouts.data) if self.rollouts.data is not None else 0
