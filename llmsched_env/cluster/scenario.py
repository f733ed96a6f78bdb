"""``ClusterScenario``: replicas, what happens to them, and the calls that come; ``llmsched_env.cluster.scenarios`` has the named ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llmsched_env import checks
from llmsched_env.cluster.calls import CallSource
from llmsched_env.cluster.spec import ClusterSpec
from llmsched_env.errors import ConfigError

MakeCluster = Callable[[int, int, float], ClusterSpec]


@dataclass(frozen=True, slots=True, eq=False)
class ClusterScenario:
    """A cluster and its workload.

    Attributes:
        name, description: for people.
        make: ``make(replicas, seed, seconds)`` gives the cluster: so many replicas, and what happens to them within so many seconds, drawn
            from the seed; the same for every router.
        source: where calls come from.
        rate: calls per second and replica to expect.
        replicas: how many, unless others are asked for.
        num_calls: of an episode.

    Raises:
        ConfigError: a field of another kind, or a number that is not positive.
    """

    name: str
    description: str
    make: MakeCluster
    source: CallSource
    rate: float
    replicas: int = 4
    num_calls: int = 4_000

    def __post_init__(self) -> None:
        checks.text("scenario.name", self.name, empty=False)
        checks.text("scenario.description", self.description)
        if not callable(self.make):
            raise ConfigError(f"scenario.make: {checks.shown(self.make)}, must be a function of replicas, seed and seconds")
        if not callable(getattr(self.source, "chunks", None)):
            raise ConfigError(f"scenario.source: {checks.shown(self.source)}, must be a CallSource")
        checks.number("scenario.rate", self.rate, open_low=True, unit="calls/s")
        checks.integer("scenario.replicas", self.replicas, low=1)
        checks.integer("scenario.num_calls", self.num_calls, low=1)

    def cluster(self, seed: int, *, replicas: int | None = None, rate: float | None = None, num_calls: int | None = None) -> ClusterSpec:
        """The cluster of an episode.

        Args:
            seed: of what happens to replicas.
            replicas: how many; rate: calls per second in all; num_calls: of the episode. None: the scenario's own.
        """
        count = self.replicas if replicas is None else replicas
        calls = self.num_calls if num_calls is None else num_calls
        seconds = calls / (self.total_rate(count) if rate is None else rate)
        made = self.make(count, seed, seconds)
        if not isinstance(made, ClusterSpec) or len(made.replicas) != count:
            raise ConfigError(f"scenario.make: {self.name!r} gives {made!r:.80}, must be a ClusterSpec of {count} replicas")
        return made

    def total_rate(self, replicas: int | None = None) -> float:
        """Calls per second to expect at so many replicas."""
        return self.rate * (self.replicas if replicas is None else replicas)
