"""A learned policy: what ``llmsched_env.runner`` asks of one, on every backend, without torch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from agents import kernel as k
from agents.interface import Interface
from agents.network import Network
from agents.recipe import Recipe
from baselines import Setting
from llmsched_env.backend import View
from llmsched_env.engine.fleet import Rule
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
        memory = k.M_ACTION + len(network.components) + self.layout.num_queues
        self.rule = Rule(k.agent_rule, self.layout.num_queues, self._parameters(), memory)
        self.reset()

    def _parameters(self) -> npt.NDArray[np.float64]:
        """Everything the rule reads, in the order ``agents.kernel`` states."""
        i, n, t = self.interface, self.network, self.interface.tables
        layers = [*n.layers, n.head]
        if len(layers) > k.MAX_LAYERS:
            raise ConfigError(f"agent {self.name!r}: {len(layers)} layers, must be at most {k.MAX_LAYERS}")
        header = np.zeros(k.P_ROWS)
        values = {
            k.P_KIND: i.kind,
            k.P_MAX_ADMIT: self.recipe.max_admit,
            k.P_HOLD: self.recipe.hold,
            k.P_DRAWN: not self.deterministic,
            k.P_HEADROOM: t.headroom,
            k.P_WHOLE: i.whole,
            k.P_COLUMNS: i.columns.size,
            k.P_BOUNDARY_RATE: t.boundary_rate,
            k.P_WIDTH: i.width,
            k.P_EXTENDED: self.recipe.features,
            k.P_GUARDED: self.recipe.action_set in ("admit", "admit-only") or 0.0 in self.recipe.choices,
            k.P_LEVELS: i.levels.size,
            k.P_CONTEXT: i.context.size,
            k.P_STATICS: t.statics.size,
            k.P_CLASSES: t.survival.shape[0],
            k.P_SIZE: t.survival.shape[1],
            k.P_COMPONENTS: len(n.components),
            k.P_LAYERS: len(layers),
            # 53 bits, which a float64 holds
            k.P_SEED: np.random.SeedSequence(self.seed).generate_state(1, np.uint64)[0] >> np.uint64(11),
        }
        for row, value in values.items():
            header[row] = value
        header[k.P_LAYER : k.P_LAYER + len(layers)] = [weight.shape[0] for weight, _ in layers]
        parts = [header, i.levels, i.context, t.statics, t.steps, t.survival, t.remaining, i.columns]
        parts += [n.mean, n.scale, np.array(n.components)]
        parts += [part for layer in layers for part in layer]
        return np.concatenate([np.asarray(part, dtype=np.float64).ravel() for part in parts])

    def reset(self) -> None:
        """Forget the last episode."""
        self.rule.reset()
        self._rng = np.random.default_rng(self.seed)

    @property
    def interventions(self) -> int:
        """How often the guard changed a decision in this episode."""
        return int(self.rule.memory[k.M_INTERVENTIONS])

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
