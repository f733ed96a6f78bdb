"""When the episodes of a native vector environment begin anew, and the generators that draw them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode

from llmsched_env.errors import ConfigError

Observations = dict[str, npt.NDArray[np.float32]]


class AutoresetVectorEnv(gym.vector.VectorEnv[Observations, npt.NDArray[np.int64], npt.NDArray[Any]]):
    """Base of the vector environments: environment i is seeded with ``seed + i``, and an episode follows another by ``autoreset_mode``."""

    metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012 - gymnasium's form

    autoreset_mode: AutoresetMode

    def _set_up(self, num_envs: int, autoreset_mode: AutoresetMode | str, render_mode: str | None) -> None:
        """What every vector environment checks and keeps.

        Raises:
            ConfigError: a number of environments, a mode or a render mode that is refused.
        """
        if isinstance(num_envs, bool) or not isinstance(num_envs, int | np.integer) or num_envs < 1:
            raise ConfigError(f"num_envs: {num_envs!r}, must be an integer >= 1")
        if render_mode is not None:
            raise ConfigError(f"render_mode: {render_mode!r}, must be None in a vector environment")
        self._generators: list[np.random.Generator] = []
        self.set_autoreset_mode(autoreset_mode)
        self.num_envs = int(num_envs)
        self._ended = np.zeros(self.num_envs, dtype=np.bool_)
        self._any_ended = False

    def set_autoreset_mode(self, mode: AutoresetMode | str) -> None:
        """Choose when episodes begin anew; before the first ``reset``.

        Raises:
            ConfigError: another mode than SAME_STEP or NEXT_STEP, or too late.
        """
        known = [m for m in AutoresetMode if mode in (m, m.value)]
        if not known or known[0] not in (AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP):
            raise ConfigError(f"autoreset_mode: {mode!r}, must be SAME_STEP or NEXT_STEP")
        if self._generators and known[0] != self.autoreset_mode:
            raise ConfigError(f"autoreset_mode: {mode!r}, must be set before the first reset()")
        self.autoreset_mode = known[0]
        self.metadata = {**self.metadata, "autoreset_mode": known[0]}
        self._same_step = known[0] == AutoresetMode.SAME_STEP

    @abstractmethod
    def _start(self, i: int) -> None:
        """The next episode of environment i, and its first observation."""

    @abstractmethod
    def _last_of(self, i: int) -> dict[str, Any]:
        """``final_obs`` and ``final_info`` of environment i, whose episode has ended with this step; copies."""

    def _start_all(self, seed: int | Sequence[int | None] | None, options: dict[str, Any] | None) -> None:
        """All episodes begin.

        Raises:
            ConfigError: options, or another number of seeds.
        """
        if options:
            raise ConfigError(f"options: {sorted(options)} unknown (a vector environment takes none)")
        if seed is not None or not self._generators:
            base = [None if seed is None else seed + i for i in range(self.num_envs)] if not isinstance(seed, Sequence) else list(seed)
            if len(base) != self.num_envs:
                raise ConfigError(f"seed: {len(base)} seeds for {self.num_envs} environments")
            kept: Sequence[np.random.Generator | None] = self._generators or [None] * self.num_envs
            pairs = zip(base, kept, strict=True)
            self._generators = [old if s is None and old is not None else seeding.np_random(s)[0] for s, old in pairs]
        for i in range(self.num_envs):
            self._start(i)
        self._ended[:] = False
        self._any_ended = False

    def _begin_anew(self, over: npt.NDArray[np.bool_]) -> dict[str, Any]:
        """After a step in which the episodes ``over`` (num_envs,) have ended. Returns what ``infos`` gets of it."""
        infos: dict[str, Any] = {}
        if not self._same_step and self._any_ended:
            for i in np.flatnonzero(self._ended):  # NEXT_STEP: this step was the reset, its action was ignored
                self._start(int(i))
                self._ended[i] = False
        self._any_ended = bool(over.any())
        for i in np.flatnonzero(over) if self._any_ended else ():
            if self._same_step:
                infos = self._add_info(infos, self._last_of(int(i)), int(i))
                self._start(int(i))
            else:
                self._ended[i] = True
        return infos

    def _need_reset(self, method: str) -> None:
        if not self._generators:
            raise gym.error.ResetNeeded(f"call reset() before {method}()")
