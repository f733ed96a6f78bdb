"""``ClusterSettings``: every setting of a routing environment, checked once; and the calls of one episode."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llmsched_env import checks
from llmsched_env.cluster.calls import CallChunk, CallSource
from llmsched_env.cluster.env_step import LevelRecord, admit_to_level
from llmsched_env.cluster.reward import ClusterReward, make_cluster_reward
from llmsched_env.cluster.scenario import ClusterScenario
from llmsched_env.cluster.scenarios import load_cluster_scenario
from llmsched_env.cluster.spec import ClusterSpec, ReplicaSpec
from llmsched_env.engine.rules import Rule
from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import ConfigError, UnknownSettingError, did_you_mean
from llmsched_env.peak import peak_tables
from llmsched_env.runner import Policy
from llmsched_env.types import Decision, LengthStatistics, QueueLayout
from llmsched_env.workload.sessions import load_source

PolicyFactory = Callable[[EngineConfig, LengthStatistics, float], Policy]
"""``policy(engine, statistics, rate)`` gives the policy of one replica; rate: calls per second that it is to expect."""

OPTIONS = ("chunks", "num_calls", "rate")


class LevelPolicy:
    """Admission up to a level of predicted KV memory that the router chooses (``llmsched_env.peak``)."""

    name = "level"
    known_lengths = False
    layout = QueueLayout()
    notes = ""

    def __init__(self, engine: EngineConfig, statistics: LengthStatistics, levels: tuple[float, ...]) -> None:
        self.engine = engine
        tables = peak_tables(statistics, self.layout, engine)
        record = LevelRecord(peak=tables.record(), levels=np.array(levels), chosen=np.zeros(1, dtype=np.int64))
        self.rule = Rule(admit_to_level, 1, record)

    def decide(self, view: Any) -> Decision:
        return self.rule.decide(view)

    def reset(self) -> None:
        self.rule.reset()


@dataclass(frozen=True, slots=True)
class ClusterEpisode:
    """What one episode runs on.

    Attributes:
        spec: the cluster; chunks: its calls; app_tokens: prompt heads of applications.
        num_calls: in all chunks.
    """

    spec: ClusterSpec
    chunks: tuple[CallChunk, ...]
    app_tokens: npt.NDArray[np.int32]
    num_calls: int


@dataclass(frozen=True, slots=True)
class _Given:
    replicas: int | ClusterSpec | None = None
    source: str | CallSource | None = None
    rate: float | None = None
    num_calls: int | None = None
    policy: PolicyFactory | None = None
    levels: Sequence[float] = ()
    reward: Any = "latency"
    ttft_limit: float | None = None
    tpot_limit: float | None = None
    discount_seconds: float = math.inf
    horizon: float = math.inf


@dataclass(frozen=True, slots=True, eq=False)
class ClusterSettings:
    """The settings of a routing environment; ``LLMSchedCluster`` says what each means.

    Attributes:
        fixed: the cluster, where it was given whole.
        limits: ``ttft_limit`` and ``tpot_limit`` where they were given, seconds.
    """

    scenario: ClusterScenario
    fixed: ClusterSpec | None
    num_replicas: int
    source: CallSource
    rate: float
    num_calls: int
    policy: PolicyFactory | None
    levels: tuple[float, ...]
    reward: ClusterReward
    limits: Mapping[str, float]
    discount_seconds: float
    horizon: float

    @classmethod
    def of(cls, scenario: str | ClusterScenario = "equal", **settings: Any) -> ClusterSettings:
        """Check every setting.

        Raises:
            ConfigError: a setting unknown or refused, with its name, value and what is allowed.
        """
        known = _Given.__dataclass_fields__
        for name in settings:
            if name not in known:
                allowed = f"allowed: scenario, {', '.join(known)}"
                words = f"{name}: unknown setting of a routing environment, unexpected keyword argument '{name}'"
                raise UnknownSettingError(f"{words}{did_you_mean(name, ('scenario', *known))} ({allowed})")
        given = _Given(**settings)
        chosen = load_cluster_scenario(scenario) if isinstance(scenario, str) else scenario
        if not isinstance(chosen, ClusterScenario):
            raise ConfigError(f"scenario: {checks.shown(scenario)}, must be a name or a ClusterScenario")
        fixed = given.replicas if isinstance(given.replicas, ClusterSpec) else None
        count: Any = len(fixed.replicas) if fixed is not None else chosen.replicas if given.replicas is None else given.replicas
        count = checks.integer("replicas", count, low=1, high=65_536)
        source = load_source(given.source) if isinstance(given.source, str) else chosen.source if given.source is None else given.source
        if not callable(getattr(source, "chunks", None)):
            raise ConfigError(f"source: {checks.shown(source)}, must be a name or a CallSource")
        reward, limits = make_cluster_reward(given.reward)
        for name in ("ttft_limit", "tpot_limit"):
            if getattr(given, name) is not None:
                limits[name] = checks.number(name, getattr(given, name), high=math.inf, unit="seconds", open_low=True)
        if given.policy is not None and not callable(given.policy):
            raise ConfigError(
                f"policy: {checks.shown(given.policy)}, must be a callable of engine, statistics and rate "
                f"(of a policy by its name: llmsched_agents.lookup.replica_policy), or None for vLLM's own admission"
            )
        settled = cls(
            scenario=chosen,
            fixed=fixed,
            num_replicas=count,
            source=source,
            rate=chosen.total_rate(count) if given.rate is None else checks.number("rate", given.rate, open_low=True, unit="calls/s"),
            num_calls=chosen.num_calls if given.num_calls is None else checks.integer("num_calls", given.num_calls, low=1),
            policy=given.policy,
            levels=_checked_levels(given.levels),
            reward=reward,
            limits=limits,
            discount_seconds=checks.number("discount_seconds", given.discount_seconds, high=math.inf, unit="seconds", open_low=True),
            horizon=checks.number("horizon", given.horizon, high=math.inf, unit="seconds", open_low=True),
        )
        if settled.levels and settled.policy is not None:
            raise ConfigError("levels: given beside policy, must be empty with it: both decide about admission")
        settled.cluster(0, settled.rate, settled.num_calls)  # refuses now what every episode would refuse
        return settled

    def discount(self, seconds: float) -> float:
        """What a reward is worth that comes so much later."""
        return 1.0 if self.discount_seconds == math.inf else math.exp(-seconds / self.discount_seconds)

    def cluster(self, seed: int, rate: float, num_calls: int) -> ClusterSpec:
        """The cluster of an episode; the seed is of what happens to its replicas."""
        spec = self.fixed
        if spec is None:
            spec = self.scenario.cluster(seed, replicas=self.num_replicas, rate=rate, num_calls=num_calls)
        replicas = spec.replicas
        if self.levels or self.policy is not None:
            replicas = tuple(self._with_policy(replica, rate / len(replicas)) for replica in replicas)
        changes: dict[str, Any] = {**self.limits, "replicas": replicas, "horizon": min(self.horizon, spec.horizon)}
        return dataclasses.replace(spec, **changes)

    def _with_policy(self, replica: ReplicaSpec, rate: float) -> ReplicaSpec:
        statistics = self.source.statistics
        if self.levels:
            return dataclasses.replace(replica, policy=LevelPolicy(replica.engine, statistics, self.levels))
        assert self.policy is not None
        return dataclasses.replace(replica, policy=self.policy(replica.engine, statistics, rate))

    def episode(self, rng: np.random.Generator, options: Mapping[str, Any] | None = None) -> ClusterEpisode:
        """The cluster and the calls of the next episode.

        Raises:
            ConfigError: an option unknown or refused.
        """
        chosen = checks.mapping("options", options) if options is not None else {}
        rate = checks.number("options.rate", chosen.pop("rate", self.rate), open_low=True, unit="calls/s")
        count = checks.integer("options.num_calls", chosen.pop("num_calls", self.num_calls), low=1)
        chunks = chosen.pop("chunks", None)
        if chosen:
            raise ConfigError(f"options: {sorted(chosen)} unknown (allowed: {', '.join(OPTIONS)})")
        # Drawn even for given calls: the generator's state then depends on the seed alone.
        seeds = [int(seed) for seed in rng.integers(2**63, size=2)]
        if chunks is not None and not isinstance(chunks, list | tuple):
            raise ConfigError(f"options.chunks: {checks.shown(chunks)}, must be a list of CallChunk")
        drawn = tuple(self.source.chunks(seeds[0], rate=rate, num_calls=count) if chunks is None else chunks)
        spec = self.cluster(seeds[1], rate, count)
        for chunk in drawn:
            if not isinstance(chunk, CallChunk):
                raise ConfigError(f"options.chunks: {type(chunk).__name__} among them, must be CallChunk")
            chunk.check()  # now, not when its calls come
            spec.check_served(chunk)
        calls = sum(map(len, drawn))
        if calls == 0:
            raise ConfigError("options.chunks: no call in them, must be at least one")
        apps = np.asarray(self.source.app_tokens, dtype=np.int32)
        return ClusterEpisode(spec, drawn, apps, calls)


def _checked_levels(levels: Any) -> tuple[float, ...]:
    if not isinstance(levels, list | tuple | np.ndarray):
        raise ConfigError(f"levels: {checks.shown(levels)}, must be numbers >= 0, or empty")
    return tuple(checks.number("levels", level, high=math.inf) for level in levels)
