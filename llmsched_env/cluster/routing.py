"""Routers as compiled rules: which replica gets the call.

A rule is a function decorated with ``llmsched_env.compiled.compiled``::

    @compiled
    def shortest(cluster, own):
        best = first_legal(cluster)
        for i in range(best + 1, cluster.num_replicas):
            if may_take(cluster, i) and outstanding(cluster, i) < outstanding(cluster, best):
                best = i
        return best

    router = RouterRule(shortest)

``cluster`` is ``llmsched_env.cluster.state.Cluster`` as a router sees it: ``cluster.call`` is the call to be routed, ``cluster.replicas``
has one row a replica, ``cluster.clock`` the time. It has no answer's length, no call to come and nothing of an engine but what its server
tells. ``own`` is a record of the router's own: its parameters and what it remembers within an episode. A rule that looks at two replicas
costs the same in a cluster of two and of a thousand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy.typing as npt

from llmsched_env.cluster.kernel import cluster_at, policy_at
from llmsched_env.cluster.replicas import may_take
from llmsched_env.cluster.simulator import ClusterSim, Sink
from llmsched_env.cluster.state import Cluster
from llmsched_env.compiled import compiled
from llmsched_env.errors import ConfigError
from llmsched_env.pointers import call_int, given_address, name_of
from llmsched_env.records import Level, Numbers, Record

__all__ = ["RouterRule", "chance", "first_legal", "may_take", "outstanding"]

_MODULUS, _FACTOR = 2**31 - 1, 48_271
"""Of the generator ``chance``: Park, Miller and Stockmeyer, "Another test for randomness", CACM 36(7), 1993."""
_WARM = 3
"""Draws of the generator that are thrown away at the start."""


# --- for rules ------------------------------------------------------------------------------------------
@compiled
def outstanding(cluster: Cluster, i: int) -> int:
    """Calls that replica i has and that have not ended."""
    return cluster.replicas.waiting[i] + cluster.replicas.running[i]


@compiled
def first_legal(cluster: Cluster) -> int:
    """The first replica that the call can go to."""
    i = 0
    while not may_take(cluster, i):
        i += 1
    return i


@compiled
def chance(own: Any, place: int, count: int) -> int:
    """A number from 0 to ``count`` - 1 (at most 2^31 - 2), all about equally likely; the generator's state is ``own.memory[place]``."""
    state = own.memory[place]
    if state <= 0:
        state = 1
    state = state * _FACTOR % _MODULUS
    own.memory[place] = state
    return state * count // _MODULUS


@compiled
def _choose(router: int, cluster: Any, own: Any) -> int:
    return call_int(router, cluster_at(cluster), policy_at(own))


class RouterRule:
    """A compiled rule with its parameters and its memory.

    Args:
        function: as described above.
        parameters: (P,) numbers for ``own.parameters``, or a record of the router's own; its ``Counts`` and ``Memory`` are what it
            remembers, and it may draw by ``chance`` if it has ``memory: Counts``.
        memory: length of ``own.memory``.
        reads_cache: it reads ``cluster.replicas.cached``, which costs a search in every replica's prefix cache.

    Attributes:
        num_replicas: for how many replicas its record has room; None: for any number.
    """

    def __init__(
        self, function: Callable[..., Any], parameters: npt.ArrayLike | Record = (), memory: int = 0, *, reads_cache: bool = False
    ) -> None:
        self.own: Record = parameters if isinstance(parameters, Record) else Numbers.of(parameters, memory)
        self.function, self.reads_cache = function, reads_cache
        self.num_replicas: int | None = None
        self._address: int | None = None

    @property
    def address(self) -> int:
        """Where compiled code calls the rule; compiled at the first use.

        Raises:
            ConfigError: it cannot be compiled, for example because it reads what a router is not shown.
        """
        if self._address is None:
            arguments = ((Cluster, Level.VISIBLE), type(self.own))
            self._address = given_address(f"router {name_of(self.function)}", self.function, arguments, int)
        return self._address

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_address": None}  # good in its own process only

    def reset(self, seed: int = 0) -> None:
        """Forget the last episode; ``seed`` starts the generator of a rule that draws by ``chance`` from place 0."""
        self.own.forget()
        memory: Any = getattr(self.own, "memory", None)
        if memory is not None and len(memory):
            state = 1 + seed % (_MODULUS - 1)
            for _ in range(_WARM):  # or near seeds would draw alike at first
                state = state * _FACTOR % _MODULUS
            memory[0] = state

    def check_size(self, sim: ClusterSim) -> None:
        """Refuse a cluster that the rule's record has no room for: compiled code would read and write beyond its end.

        Raises:
            ConfigError: another number of replicas than the rule was made for.
        """
        count = len(sim.machines)
        if self.num_replicas is not None and self.num_replicas != count:
            raise ConfigError(f"router: made for {self.num_replicas} replicas, the cluster has {count}; make one with Door.of(the cluster)")

    def choose(self, sim: ClusterSim) -> int:
        """The replica for the call that ``sim`` has stopped at; raises as ``check_size``."""
        self.check_size(sim)
        return int(_choose(self.address, sim.record.handle, self.own.handle))

    def play(self, sim: ClusterSim) -> None:
        """Route every call of ``sim``, which has been reset, to the end of the episode; raises as ``check_size``."""
        self.check_size(sim)
        sim.record.shows_cached = self.reads_cache
        sim.play(self.address, self.own)


def run_cluster(
    sim: ClusterSim, rule: RouterRule, chunks: Any, app_tokens: npt.ArrayLike = (), sink: Sink | None = None, seed: int = 0
) -> None:
    """One episode of ``sim`` under a rule, from an empty cluster to the last call."""
    rule.check_size(sim)
    sim.reset(chunks, app_tokens, sink)
    rule.reset(seed)
    rule.play(sim)
