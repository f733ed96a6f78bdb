"""A learned policy: what ``llmsched_env.runner`` asks of one, on every backend, without torch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from agents.interface import Interface
from agents.network import Network
from agents.recipe import Recipe
from baselines import Setting
from llmsched_env.backend import View
from llmsched_env.errors import ConfigError
from llmsched_env.types import ADMIT_ALL, Decision

HELD_ITERATIONS = 200
IDLE_ITERATIONS = 20


class Agent:
    """A network and its recipe in one setting; has the form of ``llmsched_env.runner.Policy``.

    A stochastic policy may hold a queue with small probability each time; its likeliest choice then
    holds it for ever. So a segment or boundary queue held for ``HELD_ITERATIONS`` in a row advances
    in the next, and after ``IDLE_ITERATIONS`` in a row in which a decision asked for nothing though
    something waits, the next one is greedy. ``interventions`` counts both. Under ``reserve`` and
    ``peak`` residents always run and an empty engine always takes a request.

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
        self._decision = Decision(self.layout.num_queues)
        self._boundary = np.arange(self.layout.num_queues) % self.layout.num_segments != 0
        self._guarded = recipe.action_set in ("admit", "admit-only") or 0.0 in recipe.choices
        self.reset()

    def reset(self) -> None:
        """Forget the last episode."""
        self._rng = np.random.default_rng(self.seed)
        self._left = 0
        self._action = np.zeros(len(self.network.components), dtype=np.int64)
        self._held = np.zeros(self.layout.num_queues, dtype=np.int64)
        self._idle = 0
        self.interventions = 0

    def predict(
        self, observations: npt.NDArray[np.float32], masks: npt.NDArray[np.bool_] | None = None
    ) -> npt.NDArray[np.int64]:
        """(N, components) actions for (N, D) observations of ``AgentVecEnv``; what is hidden after D is not read."""
        rng = None if self.deterministic else self._rng
        return self.network.choose(observations[:, : self.network.width], masks, rng)

    def decide(self, view: View) -> Decision:
        """The decision for the next iteration. The object returned is reused by the next call."""
        if self._left == 0:
            self._action[:] = self.predict(*self.interface.observe(view))[0]
            self._left = self.recipe.hold
        self._left -= 1
        decision = self.interface.decode(view, self._action, self._decision)
        if self._guarded:
            self._guard(view, decision)
        return decision

    def _guard(self, view: View, decision: Decision) -> None:
        run, admit = decision.run, decision.admit
        residents, waiting = view.residents.ravel(), view.waiting.ravel()
        held = ((run == 0) & (residents > 0)) | (self._boundary & (admit == 0) & (waiting > 0))
        self._held = np.where(held, self._held + 1, 0)
        long = self._held > HELD_ITERATIONS
        if long.any():
            run[long] = 1
            admit[long & self._boundary] = ADMIT_ALL
            self._held[long] = 0
            self.interventions += 1
        active = bool(((run != 0) & (residents > 0)).any() or ((admit > 0) & (waiting > 0)).any())
        self._idle = 0 if active or not (residents.any() or waiting.any()) else self._idle + 1
        if self._idle > IDLE_ITERATIONS:
            run[:], admit[:] = 1, ADMIT_ALL
            self._idle = 0
            self.interventions += 1
