"""A learned policy: what ``llmsched_env.runner`` asks of one, on every backend, without torch."""

from __future__ import annotations

from typing import cast

import numpy as np
import numpy.typing as npt

from llmsched_agents import kernel as k
from llmsched_agents.interface import Interface, agent_record
from llmsched_agents.network import Network
from llmsched_agents.recipe import Recipe
from llmsched_baselines import Setting
from llmsched_env.backend import View
from llmsched_env.engine.rules import Rule
from llmsched_env.errors import ConfigError
from llmsched_env.types import Decision


class Agent:
    """A network and its recipe in one setting; has the form of ``llmsched_env.runner.Policy``.

    Decisions are one compiled rule, so whole episodes run without Python. A stochastic policy may hold
    a queue with small probability each time; its likeliest choice then holds it for ever. So a segment
    or boundary queue held for ``kernel.HELD_ITERATIONS`` in a row advances in the next, and after
    ``kernel.IDLE_ITERATIONS`` in a row in which a decision asked for nothing though something waits,
    the next one is greedy. ``interventions`` counts both. Under ``reserve`` and ``peak`` residents
    always run and an empty engine takes a request at any level above 0.

    Args:
        network: the actor.
        recipe: queues, engine options, action set.
        setting: lengths, rate and engine it stands in; any, not only those of its training.
        name: in tables.
        deterministic: the likeliest action in place of a drawn one.
        seed: of the draws; each episode begins with it anew.

    Raises:
        ConfigError: the network's inputs or outputs are not those of the recipe in this setting.
    """

    def __init__(
        self,
        network: Network,
        recipe: Recipe,
        setting: Setting,
        *,
        name: str = "agent",
        deterministic: bool = False,
        seed: int = 0,
    ) -> None:
        self.name, self.notes = name, ""
        self.network, self.recipe, self.setting = network, recipe, setting
        self.deterministic, self.seed = deterministic, seed
        self.known_lengths = recipe.known_lengths
        self.interface = Interface(recipe, setting)
        self.layout, self.engine = self.interface.layout, self.interface.engine
        if network.width != self.interface.width:
            raise ConfigError(
                f"agent {name!r}: reads {network.width} numbers, but the observation of {self.layout.num_classes} classes and "
                f"{self.layout.num_segments} segments has {self.interface.width}"
            )
        if network.components != self.interface.components:
            raise ConfigError(
                f"agent {name!r}: action components {network.components}, but {recipe.action_set!r} has {self.interface.components}"
            )
        self.rule = Rule(k.agent_rule, self.layout.num_queues, self._record(), known_lengths=self.known_lengths)
        self.reset()

    def _record(self) -> k.AgentRecord:
        """Everything the rule reads."""
        i, n = self.interface, self.network
        layers = [*n.layers, n.head]
        weights = [np.asarray(part, dtype=np.float64).ravel() for layer in layers for part in layer]
        record = agent_record(
            self.recipe,
            self.layout,
            i.forecast,
            i.tables,
            mean=np.array(n.mean, dtype=np.float64),
            scale=np.array(n.scale, dtype=np.float64),
            layers=np.array([weight.shape[0] for weight, _ in layers], dtype=np.int64),
            weights=np.concatenate(weights),
        )
        record.drawn = not self.deterministic
        record.guarded = self.recipe.action_set in ("admit", "admit-only") or 0.0 in self.recipe.choices
        record.seed = int(np.random.SeedSequence(self.seed).generate_state(1, np.uint64)[0] >> np.uint64(11))  # not negative
        return record

    def reset(self) -> None:
        """Forget the last episode."""
        self.rule.reset()
        self._rng = np.random.default_rng(self.seed)

    @property
    def interventions(self) -> int:
        """How often the guard changed a decision in this episode."""
        return int(cast(k.AgentRecord, self.rule.policy).interventions)

    def decide(self, view: View) -> Decision:
        """The decision for the next iteration. The object returned is reused by the next call."""
        return self.rule.decide(view)

    def predict(
        self, observations: npt.NDArray[np.float32], masks: npt.NDArray[np.bool_] | None = None
    ) -> npt.NDArray[np.int64]:
        """(N, components) actions for (N, D) observations of ``AgentVecEnv``; what is hidden after D is not read.

        Draws are numpy's, others than those of ``decide``. There is no guard.
        """
        rng = None if self.deterministic else self._rng
        return self.network.choose(observations[:, : self.network.width], masks, rng)
