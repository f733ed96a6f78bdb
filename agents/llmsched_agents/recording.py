"""What an expert is recorded in: settings in turn, each with the expert built for it, and episodes counted from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmsched_agents.agent import Agent
from llmsched_agents.demonstrations import Demonstrations, expert_recipe, record_episode
from llmsched_agents.domain import EnvSetting
from llmsched_agents.lookup import NamedPolicy
from llmsched_agents.network import Network
from llmsched_agents.recipe import Recipe
from llmsched_baselines import Setting
from llmsched_baselines.overrides import Overrides
from llmsched_env.errors import ConfigError
from llmsched_env.runner import Policy
from llmsched_env.types import QueueLayout, Workload

APART = 10_000
"""Seeds of one round of DAgger begin that far after those of the round before."""


@dataclass(frozen=True, slots=True)
class Recorder:
    """One expert in several settings.

    Attributes:
        settings: episodes take them in turn.
        experts: one for each setting.
        recipe: what is recorded: observation and action space.
        num_requests: of an episode.
        seed: of the first episode; the others count up.
    """

    settings: tuple[EnvSetting, ...]
    experts: tuple[Policy, ...]
    recipe: Recipe
    num_requests: int
    seed: int

    @classmethod
    def of(
        cls,
        expert: NamedPolicy,
        settings: Sequence[EnvSetting],
        overrides: Overrides,
        *,
        num_requests: int,
        seed: int,
        max_admit: int,
        features: bool,
    ) -> Recorder:
        """Build the expert in every setting.

        Args:
            overrides: of engine fields and of the expert's options.
            max_admit: largest count in an action.
            features: record the agents' features beside the environment's observation.

        Raises:
            ConfigError: an option refused, or an expert that keeps other queues in one setting than in another.
        """
        experts = []
        for s in settings:
            setting = Setting(s.scenario.statistics, s.rate, s.engine, num_requests / s.rate, overrides.engine)
            experts.append(expert.build(setting, **overrides.options(expert.name)))
            if experts[-1].layout != experts[0].layout:
                first = settings[0].rate
                raise ConfigError(
                    f"loads: {expert.name!r} keeps other queues at {s.rate:.3g} requests/s than at {first:.3g}; record one load"
                )
        return cls(tuple(settings), tuple(experts), expert_recipe(experts[0], max_admit, features), num_requests, seed)

    @property
    def layout(self) -> QueueLayout:
        """The expert's queues, the same in every setting."""
        return self.experts[0].layout

    def episode(self, number: int) -> tuple[Demonstrations, int]:
        """One episode, and how many of its decisions the action space cannot express."""
        which = number % len(self.settings)
        return record_episode(self.experts[which], self.recipe, self.settings[which], self._workload(which, self.seed + number))

    def corrected(self, network: Network, turn: int) -> list[Demonstrations]:
        """One round of DAgger: an episode in each setting in which the clone acts in part and the expert says what it would have done.

        Args:
            network: of the clone.
            turn: of the round, from 1; the share of the expert's own actions halves with each.
        """
        rng = np.random.default_rng((self.seed, turn))
        found = []
        for i, setting in enumerate(self.settings):
            seed = self.seed + APART * turn + i
            actor = Agent(network, self.recipe, setting.setting, seed=seed)
            workload = self._workload(i, seed)
            episode, _ = record_episode(self.experts[i], self.recipe, setting, workload, actor=actor, share=0.5**turn, rng=rng)
            found.append(episode)
        return found

    def _workload(self, which: int, seed: int) -> Workload:
        setting = self.settings[which]
        return setting.scenario.generate(seed, rate=setting.rate, num_requests=self.num_requests)
