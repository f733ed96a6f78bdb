"""One policy object on several backends: an expert and a network with random weights, every step compared."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium.wrappers import FlattenObservation

from llmsched_baselines import Policy
from llmsched_env import LLMSchedEnv
from llmsched_env.backend import Backend, View
from llmsched_env.backends import make_backend
from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import require
from llmsched_env.metrics import Summary, summarize
from llmsched_env.runner import run_episode
from llmsched_env.types import IterationReport, RequestLog
from llmsched_env.workload import Scenario
from llmsched_hardware.validation import ENGINE, SIM
from llmsched_hardware.validation_runs import Clock

TIMES = ("admitted", "first_token", "completed", "evictions", "forced_evictions")
"""Columns of a request log that must agree."""


class RandomNetwork:
    """A small network with random weights over the flattened observation; illegal actions are masked.

    Args:
        num_inputs: length of the flattened observation.
        sizes: values of each component of the ``MultiDiscrete`` action.
    """

    name = "torch (random weights)"

    def __init__(self, num_inputs: int, sizes: Sequence[int], seed: int) -> None:
        self._torch = torch = require("torch", "agents")
        torch.manual_seed(seed)
        self._sizes = [int(size) for size in sizes]
        self._layers = torch.nn.Sequential(
            torch.nn.Linear(num_inputs, 64),
            torch.nn.Tanh(),
            torch.nn.Linear(64, 64),
            torch.nn.Tanh(),
            torch.nn.Linear(64, sum(self._sizes)),
        )
        self._generator = torch.Generator()
        self._seed = seed
        self.reset()

    def reset(self) -> None:
        """The same stream of samples for every episode."""
        self._generator.manual_seed(self._seed)

    def act(self, observation: npt.NDArray[np.float32], mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        """A legal action, sampled component by component."""
        torch = self._torch
        with torch.no_grad():
            logits = self._layers(torch.from_numpy(observation)).masked_fill(~torch.from_numpy(mask), -torch.inf)
            parts = [torch.softmax(part, 0) for part in torch.split(logits, self._sizes)]
            return np.array([int(torch.multinomial(part, 1, generator=self._generator)) for part in parts], dtype=np.int64)


class Schedule:
    """A digest of every step: its report, and the tokens of each request in it."""

    def __init__(self, backend: Backend) -> None:
        self._backend: Any = backend
        self._digest = hashlib.sha256()
        self.steps = 0

    def add(self, report: IterationReport, view: View | None = None) -> None:
        self.steps += 1
        self._digest.update(repr(report).encode())
        if not report.idle:
            for values in self._backend.scheduled():
                self._digest.update(values.tobytes())

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Episode:
    """One episode.

    Attributes:
        schedule: digest of all steps.
    """

    log: RequestLog
    summary: Summary
    schedule: str
    steps: int


@dataclass(frozen=True, slots=True)
class Swap:
    """The episodes that are run: the same on every backend.

    Attributes:
        engine: of the environment.
        rate: requests/s.
        requests: of an episode.
        model, clock: of the real engine.
        seed: of workload, network and sampling.
    """

    scenario: Scenario
    engine: EngineConfig
    rate: float
    requests: int
    model: str = "tiny"
    clock: Clock = "virtual"
    seed: int = 0

    def backend_config(self, backend: str) -> dict[str, Any]:
        real = {"model": self.model, "clock": self.clock} if backend == ENGINE else {}
        return {"trace": True, **real}

    def environment(self, backend: str) -> LLMSchedEnv:
        return LLMSchedEnv(
            self.scenario,
            rate=self.rate,
            num_requests=self.requests,
            engine=self.engine,
            action_set="admit",
            backend=backend,
            backend_config=self.backend_config(backend),
        )

    def network(self) -> RandomNetwork:
        """A network for this environment."""
        env = self.environment(SIM)
        sizes = env.action_space.nvec  # type: ignore[attr-defined]
        inputs = FlattenObservation(env).observation_space.shape
        env.close()
        assert inputs is not None
        return RandomNetwork(inputs[0], sizes, self.seed)

    def run_expert(self, policy: Policy, name: str) -> Episode:
        """The expert decides from the view that every backend keeps."""
        backend = make_backend(name, **self.backend_config(name))
        schedule = Schedule(backend)
        try:
            workload = self.scenario.generate(self.seed, rate=self.rate, num_requests=self.requests)
            result = run_episode(policy, workload, backend=backend, on_step=schedule.add)
        finally:
            backend.close()
        return Episode(result.log, result.summary, schedule.hexdigest(), schedule.steps)

    def run_network(self, network: RandomNetwork, name: str) -> Episode:
        """The network acts on observation and mask of the environment."""
        env = self.environment(name)
        backend: Any = env.backend
        schedule = Schedule(backend)
        flat: Any = FlattenObservation(env)
        try:
            network.reset()
            observation, info = flat.reset(seed=self.seed)
            done = False
            while not done:
                observation, _, terminated, truncated, info = flat.step(network.act(observation, info["action_mask"]))
                schedule.add(backend.report())
                done = terminated or truncated
            log = backend.log()
            summary = summarize(log, backend.counters(), kv_capacity=self.engine.kv_capacity)
        finally:
            env.close()
        return Episode(log, summary, schedule.hexdigest(), schedule.steps)


def difference(episodes: Mapping[str, Episode]) -> str:
    """Every step, log and summary of every backend against the first: what differs, in words; empty where all is the same."""
    (first, reference), *others = episodes.items()
    for name, episode in others:
        same_log = all(np.array_equal(getattr(reference.log, t), getattr(episode.log, t), equal_nan=True) for t in TIMES)
        if episode.schedule != reference.schedule or not same_log or repr(episode.summary) != repr(reference.summary):
            return f"{first} and {name} did not schedule the same ({reference.steps} and {episode.steps} steps)"
    return ""
