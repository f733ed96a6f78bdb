"""A training run: stages that can be repeated bit by bit, so that a run that was killed goes on as if it had not been.

At the start of every stage the environments and all random generators are seeded anew from the run's
seed and the number of steps done. What is kept between stages is then the state of the algorithm
alone (weights, optimizer, running moments), which ``state.pt`` holds as plain tensors and numbers.
DQN's replay buffer is not kept: after a resumption it fills up again.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure
from stable_baselines3.common.utils import set_random_seed

from llmsched_agents.checkpoint import save_checkpoint
from llmsched_agents.domain import Domain, EnvSetting
from llmsched_agents.hyperparameters import Hyperparameters
from llmsched_agents.network import Network, network_of, set_actor
from llmsched_agents.policy import greedy_bias
from llmsched_agents.ppo import make_algorithm, scale_observations
from llmsched_agents.training_env import AgentVecEnv
from llmsched_env import __version__
from llmsched_env.errors import ConfigError

STATE = "state.pt"


@dataclass(slots=True)
class Progress:
    """Where a run stands.

    Attributes:
        steps: decisions, those of every environment counted.
        seconds, env_seconds: wall time of learning, and the environments' part.
        curve: one entry a rollout: steps, seconds, mean number of requests in system, mean reward.
    """

    steps: int = 0
    seconds: float = 0.0
    env_seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a training runs.

    Attributes:
        seed: of everything that is drawn.
        reward: as for ``LLMSchedVectorEnv``.
        threads: of PyTorch and the environments; None leaves both alone.
        name: of the agent, in tables.
        report: called after every rollout with a line of text, what is done and how much there is to do.
        stage_steps: least number of steps between two saves.
        tensorboard: write curves.
    """

    seed: int = 0
    reward: Any = "latency"
    threads: int | None = None
    name: str = "agent"
    report: Callable[[str, int, int], None] | None = None
    stage_steps: int = 500_000
    tensorboard: bool = True


class Training:
    """One run of one algorithm with one seed.

    Args:
        algo: see ``llmsched_agents.ppo.ALGORITHMS``.
        hyper: of the run.
        settings: the environments' settings, in turn.
        domain: what the settings come from, for the record.
        out: folder of the run: ``state.pt``, ``tensorboard/``, ``agent/``.
        clone: the network to start from, and to be pulled towards where ``hyper.kl`` is set.
        options: fields of ``RunOptions``.

    Raises:
        ConfigError: refused hyper-parameters, or a clone with another network.
    """

    def __init__(
        self,
        algo: str,
        hyper: Hyperparameters,
        settings: Sequence[EnvSetting],
        domain: Domain,
        out: Path,
        *,
        clone: Network | None = None,
        **options: Any,
    ) -> None:
        run = RunOptions(**options)
        seed, reward, threads = run.seed, run.reward, run.threads
        self.algo, self.hyper, self.domain, self.out = algo, hyper, domain, out
        self.seed, self.name, self.report, self.stage_steps = seed, run.name, run.report, run.stage_steps
        self.progress = Progress()
        if threads is not None:
            th.set_num_threads(threads)
        self._torch_threads = th.get_num_threads()
        discount = hyper.discounting.discount_seconds
        self.env = AgentVecEnv(
            settings, hyper.recipe, hyper.n_envs, reward=reward, threads=threads, discount_seconds=discount, hidden=hyper.hidden,
            **hyper.env_kwargs,
        )  # fmt: skip
        bias = greedy_bias(self.env.components, hyper.greedy_start) if hyper.greedy_start > 0 else None
        self.model: BaseAlgorithm = make_algorithm(
            algo, self.env, discounting=hyper.discounting, entropy=hyper.entropy, kl=hyper.kl, net_arch=hyper.net_arch, head_bias=bias,
            seed=seed, **hyper.options,
        )  # fmt: skip
        policy: Any = self.model.policy
        self.env.seed(_seed(seed, 0))
        if clone is None:
            scale_observations(self.model, self.env)
        else:
            if algo not in ("ppo", "maskable-ppo"):
                raise ConfigError(f"from-clone: a clone is improved by ppo or maskable-ppo, not by {algo}")
            self._fit_hidden_scale(clone)
            set_actor(policy, clone)
            if hyper.kl is not None:
                policy.follow(copy.deepcopy(policy).requires_grad_(False))
        th.set_num_threads(self._torch_threads)  # numba's first parallel loop sets OpenMP's count for torch, too
        self._formats = ["tensorboard"] if run.tensorboard else []

    def _fit_hidden_scale(self, clone: Network) -> None:
        """The clone brings its own scale; what only the critic reads is scaled here."""
        if self.hyper.hidden:
            scale_observations(self.model, self.env)

    def run(self) -> Progress:
        """Learn until ``hyper.n_timesteps``; from the last save where there was one."""
        self.model.set_logger(configure(str(self.out / "tensorboard"), self._formats))
        callback = _Stages(self)
        left = self.hyper.n_timesteps - self.progress.steps
        self.model.num_timesteps = self.progress.steps
        start, before = time.perf_counter(), self.progress.seconds
        env_before = self.progress.env_seconds - self.env.seconds
        callback.clock = lambda: (before + time.perf_counter() - start, env_before + self.env.seconds)
        if left > 0:
            self.model.learn(left, callback=callback, log_interval=None, reset_num_timesteps=False)  # type: ignore[arg-type]
        callback.note()
        self.save()
        return self.progress

    # --- state ------------------------------------------------------------------------------------
    def state(self) -> dict[str, Any]:
        """Everything a stage begins with, as tensors and plain values."""
        model: Any = self.model
        buffer = getattr(model, "rollout_buffer", None)
        return {
            "policy": model.policy.state_dict(),
            "optimizer": model.policy.optimizer.state_dict(),
            "steps": int(model.num_timesteps),
            "updates": int(model._n_updates),
            "scale": buffer.scale.state() if buffer is not None else {},
            "value_warmup": int(buffer.value_warmup) if buffer is not None else 0,
            "seconds": self.progress.seconds,
            "env_seconds": self.progress.env_seconds,
            "curve": self.progress.curve,
        }

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of ``state``."""
        model: Any = self.model
        model.policy.load_state_dict(state["policy"])
        model.policy.optimizer.load_state_dict(state["optimizer"])
        if hasattr(model, "q_net_target"):
            model.q_net_target.load_state_dict(model.q_net.state_dict())
        model.num_timesteps, model._n_updates = state["steps"], state["updates"]
        buffer = getattr(model, "rollout_buffer", None)
        if buffer is not None:
            buffer.scale.load(state["scale"])
            buffer.value_warmup = state["value_warmup"]
        self.progress = Progress(state["steps"], state["seconds"], state["env_seconds"], list(state["curve"]))

    def save(self) -> None:
        """Write ``state.pt`` in one step, and the agent as it is now."""
        self.out.mkdir(parents=True, exist_ok=True)
        temporary = self.out / f".{STATE}.{os.getpid()}"
        th.save(self.state(), temporary)
        temporary.replace(self.out / STATE)
        save_checkpoint(
            self.out / "agent",
            network_of(self.model.policy),
            self.hyper.recipe,
            self.domain,
            self.env.layout,
            name=self.name,
            deterministic=True,
            record=self.record(),
        )

    def restore(self) -> None:
        """Go on from ``state.pt``.

        Raises:
            ConfigError: there is none, or it belongs to another run.
        """
        state = read_state(self.out / STATE)
        try:
            self.load(state)
        except (KeyError, RuntimeError, ValueError) as error:
            raise ConfigError(f"--resume: {self.out / STATE} belongs to another run ({str(error).splitlines()[0]})") from error

    def record(self) -> dict[str, Any]:
        """How the agent was trained, as plain values."""
        p = self.progress
        return {
            "algorithm": self.algo,
            "seed": self.seed,
            "steps": int(self.model.num_timesteps),
            "iterations_per_step": self.hyper.recipe.hold,
            "wall_seconds": round(p.seconds, 1),
            "environment_seconds": round(p.env_seconds, 1),
            "environments": self.hyper.n_envs,
            "versions": {"llmsched-env": __version__, "torch": th.__version__, "numpy": np.__version__},
            "settings": [s.describe() for s in self.env.settings[:16]],
            "curve": p.curve,
        }


def read_state(path: Path) -> dict[str, Any]:
    """Plain tensors and numbers, nothing unpickled.

    Raises:
        ConfigError: no such file, or not one of ours.
    """
    try:
        state: dict[str, Any] = th.load(path, weights_only=True)
    except FileNotFoundError:
        raise ConfigError(f"--resume: {path} does not exist, nothing was saved there") from None
    except Exception as error:  # torch raises many kinds for a corrupt or foreign file
        raise ConfigError(f"--resume: {path} cannot be read ({type(error).__name__}: {str(error).splitlines()[0]})") from error
    return state


def _seed(seed: int, steps: int) -> int:
    """One seed for each stage of each run; environment i of it takes the i-th after."""
    return int(np.random.SeedSequence((seed, steps)).generate_state(1)[0])


class _Stages(BaseCallback):
    """Begins stages and keeps the curve."""

    clock: Callable[[], tuple[float, float]]

    def __init__(self, training: Training) -> None:
        super().__init__()
        self.training = training
        self._next: int | None = None

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        training, model = self.training, self.model
        if self._next is not None and model.num_timesteps < self._next:
            return
        if self._next is not None:
            self.note()
            training.save()
        self._next = model.num_timesteps + training.stage_steps
        seed = _seed(training.seed, model.num_timesteps)
        set_random_seed(seed)
        training.env.seed(seed)
        model._last_obs = training.env.reset()
        model._last_episode_starts = np.ones(training.env.num_envs, dtype=np.bool_)

    def note(self) -> None:
        """Bring the run's progress up to date."""
        progress = self.training.progress
        progress.steps = self.training.model.num_timesteps
        progress.seconds, progress.env_seconds = self.clock()

    def _on_rollout_end(self) -> None:
        model: Any = self.model
        buffer = getattr(model, "rollout_buffer", None)
        if buffer is None:
            return
        training = self.training
        record = training.env.record
        seconds, env_seconds = self.clock()
        simulated = float((buffer.durations * record.time_scale).sum())
        requests = training.env.vector.spec_of(0).num_requests
        in_system = -float(buffer.rewards.sum()) * requests / max(simulated, 1e-9)
        entry = {"steps": int(model.num_timesteps), "seconds": round(seconds, 2), "reward": float(buffer.rewards.mean())}
        entry["in_system"] = in_system
        training.progress.curve.append(entry)
        share = env_seconds / max(seconds, 1e-9)
        for name, value in (("in_system", in_system), ("environment_share", share), ("simulated_seconds", simulated)):
            self.logger.record(f"rollout/{name}", value)
        self.logger.record("time/steps_per_second", model.num_timesteps / max(seconds, 1e-9))
        self.logger.dump(model.num_timesteps)
        if training.report is not None:
            training.report(
                f"{model.num_timesteps:>12,} of {training.hyper.n_timesteps:,} steps, {seconds:,.0f} s "
                f"({100 * share:.0f} % in the environments), {in_system:.2f} requests in system",
                int(model.num_timesteps),
                training.hyper.n_timesteps,
            )
