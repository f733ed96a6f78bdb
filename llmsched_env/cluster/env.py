"""The routing environment: many engines behind one door, and a step is one call."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn, cast

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from llmsched_env import checks
from llmsched_env.action import as_integers
from llmsched_env.cluster.env_step import TOTALS, hand_on_at, look, totals_at
from llmsched_env.cluster.metrics import summarize_calls
from llmsched_env.cluster.observation import CALL_COLUMNS, REPLICA_COLUMNS, observation_space
from llmsched_env.cluster.reward import Outcome
from llmsched_env.cluster.settings import ClusterSettings
from llmsched_env.cluster.simulator import EVENTS_PER_CALL, ClusterSim
from llmsched_env.cluster.sinks import KeepAll
from llmsched_env.compiled import entry
from llmsched_env.errors import ConfigError

Observation = dict[str, npt.NDArray[np.float32]]


class LLMSchedCluster(gym.Env[Observation, Any]):
    """Routing of calls to the replicas of a cluster.

    ## Description
    Calls arrive at a cluster of R engines, each with its own queues, KV memory, prefix cache, calibration and speed, and every call must
    be handed to one of them at once. The turns of a chat session share their prefix: a replica that has it in its cache need not compute
    it again, but the one that has it may be busy. Programs fork into several calls and end with the last one. A replica may be another
    GPU than its neighbour, slow down for a while, fail and come back. Between two calls every engine runs by itself, under
    vLLM's rules or a policy of one's own.

    One step is one call, so steps take different times: ``info["seconds"]``.

    ## Action Space
    ``Discrete(R)``: the replica that gets the call. With ``levels`` ``MultiDiscrete([R, L])``: the replica, and the level of predicted KV
    memory up to which it admits from now on (``llmsched_env.peak``). ``action_masks()`` and ``info["action_mask"]`` say which replicas
    take the call: not one that has failed, is being drained, is for the other part of a call, or cannot hold a call so long. A call
    for such a one goes to the next that takes it, all round, and ``info["redirected"]`` says so.

    ## Observation Space
    ``Dict(call=(8,), replicas=(R, 14))``, float32 in [0, 1]; the table is in ``llmsched_env.cluster.observation``.

    ## Rewards
    ``latency`` (default): minus the number in system integrated since the call before, over the number of calls: the return is minus
    the mean latency; a call that is rejected counts as 0 s, and so does one that never comes because of it. ``throughput``: output
    tokens of completed calls. ``slo_goodput``: share of the episode's calls that completed within both limits. Or a callable, see
    ``llmsched_env.cluster.reward``. With ``discount_seconds`` ``info["discount"]`` is exp(-seconds / discount_seconds).

    ## Starting State
    An empty cluster at time 0. Programs, and what happens to replicas, are drawn with the environment's generator.

    ## Episode End
    Terminated when every call has ended: completed, or rejected because no replica can serve it or will come back. Calls too long for all
    replicas are refused at ``reset`` unless an engine says ``oversize="reject"``. Truncated at ``horizon`` seconds: no call is routed
    later.

    ## Arguments
    | argument | default | meaning |
    | --- | --- | --- |
    | scenario | "equal" | a name of ``cluster_scenario_names()`` or a ``ClusterScenario`` |
    | replicas | scenario's | number of replicas, or a ``ClusterSpec`` |
    | source | scenario's | where calls come from: a name of ``source_names()`` or a ``CallSource`` |
    | rate | scenario's | calls per second to expect |
    | num_calls | scenario's | no further program begins once so many calls have been drawn |
    | policy | None | admission on each replica, ``policy(engine, statistics, rate)``, of a name by ``replica_policy``; None: vLLM's |
    | levels | () | choices of the second component |
    | reward | "latency" | a name, ``{"name": ..., "ttft": ..., "tpot": ...}``, or a callable |
    | ttft_limit, tpot_limit | scenario's | seconds, of ``slo_goodput`` |
    | discount_seconds | inf | time constant of the discount in ``info`` |
    | horizon | inf | seconds |

    ``reset(options={"rate": ..., "num_calls": ...})`` changes one episode; ``options={"chunks": [CallChunk, ...]}`` gives its calls.

    ## Version History
    * v0: the first.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 - gymnasium's form

    def __init__(self, scenario: Any = "equal", *, render_mode: str | None = None, **settings: Any) -> None:
        if render_mode is not None:
            raise ConfigError(f"render_mode: {render_mode!r}, must be None in the routing environment")
        self.render_mode = None
        self.settings = ClusterSettings.of(scenario, **settings)
        self.num_replicas, self.levels = self.settings.num_replicas, self.settings.levels
        self.observation_space = cast("gym.Space[Observation]", observation_space(self.num_replicas))
        self.action_space = action_space(self.num_replicas, len(self.levels))
        self._width = 2 if self.levels else 1
        self.sim: ClusterSim | None = None
        self._row = False
        self._broken = False

    # --- Gymnasium API ----------------------------------------------------------------------------
    def reset(self, *, seed: int | None = None, options: Mapping[str, Any] | None = None) -> tuple[Observation, dict[str, Any]]:
        super().reset(seed=seed)
        episode = self.settings.episode(self.np_random, options)
        self.sim, self._kept = ClusterSim(episode.spec), KeepAll()
        self.sim.reset(episode.chunks, episode.app_tokens, self._kept)
        self._num_calls = episode.num_calls
        self._broken = True  # until all is there
        self._row = self.sim.advance()
        check_any_call(self._row, self.sim)
        self._broken = False
        self._totals = self._read()
        return self._observe(0.0)

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        sim = self._running()
        values = as_integers(action, self._width, lambda: self.action_space)
        reason = entry(hand_on_at)(sim.record.handle, sim.handles, values, len(self.levels), EVENTS_PER_CALL)
        if reason < 0:
            refuse(values, self.num_replicas, len(self.levels))
        redirected = not self._legal[values[0]]
        self._broken = True  # until the step is done: whatever interrupts it, the episode cannot go on
        self._row = sim.go_on(reason)
        before, self._totals = self._totals, self._read()
        outcome = Outcome.of(self._num_calls, self._totals - before)
        observation, info = self._observe(outcome.duration)
        info["redirected"] = bool(redirected)
        reward = checks.finite("reward", self.settings.reward(outcome))
        self._broken = False
        ended = not self._row
        if ended:
            info["summary"] = self.summary()
        cut = ended and sim.cut
        return observation, reward, ended and not cut, cut, info

    def _read(self) -> npt.NDArray[np.float64]:
        """(6,) totals so far."""
        assert self.sim is not None
        out = np.empty(len(TOTALS))
        entry(totals_at)(self.sim.record.handle, out)
        return out

    def _running(self) -> ClusterSim:
        if self.sim is None:
            raise gym.error.ResetNeeded("call reset() first")
        if self._broken:
            raise RuntimeError("the last step was interrupted or failed, the episode cannot go on; call reset()")
        if not self._row:
            raise RuntimeError("the episode has ended; call reset()")
        return self.sim

    def _observe(self, seconds: float) -> tuple[Observation, dict[str, Any]]:
        assert self.sim is not None
        call = np.empty(len(CALL_COLUMNS), dtype=np.float32)
        replicas = np.empty((self.num_replicas, len(REPLICA_COLUMNS)), dtype=np.float32)
        legal = np.empty(self.num_replicas + len(self.levels), dtype=np.bool_)
        entry(look)(self.sim.record.handle, self.sim.handles, call, replicas, legal)
        self._legal = legal
        info = {
            "clock": float(self._totals[0]),
            "seconds": seconds,
            "discount": self.settings.discount(seconds),
            "action_mask": legal,
            "redirected": False,
            "summary": {},
        }
        return {"call": call, "replicas": replicas}, info

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """(R + number of levels,) bool, components concatenated (sb3-contrib's convention)."""
        if self.sim is None:
            raise gym.error.ResetNeeded("call reset() before action_masks()")
        return self._legal.copy()

    def sample_mask(self) -> Any:
        """The same in the form that ``env.action_space.sample(mask=...)`` takes."""
        return split_mask(self.action_masks(), self.num_replicas)

    def summary(self) -> dict[str, float]:
        """Figures of the calls that have ended so far, undefined ones left out."""
        if self.sim is None:
            raise gym.error.ResetNeeded("call reset() before summary()")
        return summary_of(self.sim, self._kept)

    def close(self) -> None:
        self.sim = None


def summary_of(sim: ClusterSim, kept: KeepAll) -> dict[str, float]:
    """Figures of the calls that have ended, undefined ones left out."""
    found = summarize_calls(
        kept.rows(),
        replicas=len(sim.machines),
        ttft_limit=sim.spec.ttft_limit,
        tpot_limit=sim.spec.tpot_limit,
        separated=sim.spec.separated,
    )
    return {name: float(value) for name, value in found.as_dict().items() if math.isfinite(value)}


def check_any_call(any_call: bool, sim: ClusterSim) -> None:
    """Refuse an episode without a decision, in which there would be nothing to do.

    Raises:
        ConfigError: no call can be routed.
    """
    if not any_call:
        why = f"{sim.record.rejected} are rejected" if sim.record.rejected else f"none comes before the horizon of {sim.spec.horizon:g} s"
        raise ConfigError(f"episode: no call in it can be routed, must be at least one: {why}")


def refuse(values: npt.NDArray[np.int64], num_replicas: int, levels: int, who: str = "") -> NoReturn:
    """Raise the error of an action outside its space."""
    if not 0 <= values[0] < num_replicas:
        raise ConfigError(f"action: {who}replica {values[0]}, must be from 0 to {num_replicas - 1}")
    raise ConfigError(f"action: {who}level {values[1]}, must be from 0 to {levels - 1}")


def action_space(num_replicas: int, levels: int) -> gym.Space[Any]:
    """``Discrete(R)``, with levels ``MultiDiscrete([R, levels])``."""
    return gym.spaces.MultiDiscrete([num_replicas, levels]) if levels else gym.spaces.Discrete(num_replicas)


def split_mask(legal: npt.NDArray[np.bool_], num_replicas: int) -> Any:
    """(R + levels,) bool as ``sample(mask=...)`` of the space takes it."""
    flags = legal.view(np.int8)
    return flags if flags.size == num_replicas else (flags[:num_replicas], flags[num_replicas:])
