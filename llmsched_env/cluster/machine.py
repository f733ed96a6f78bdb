"""One replica in memory: its engine, whose rows of requests are used again, its policy's rule, and the handles of both."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import numpy.typing as npt

from llmsched_env.cluster.spec import ReplicaSpec
from llmsched_env.cluster.speed import Speed
from llmsched_env.engine import state as st
from llmsched_env.engine.link import link
from llmsched_env.engine.prefix_cache import empty_pool, reset_pool
from llmsched_env.engine.record_backend import engine_tables, load_queues, load_settings
from llmsched_env.engine.rules import Rule
from llmsched_env.engine.step import reset_at
from llmsched_env.engine_config import EpisodeLimits
from llmsched_env.perf.base import memory_of, packed_of
from llmsched_env.runner import rule_of
from llmsched_env.types import Decision, QueueLayout

FIRST_ROWS = 512
"""Rows of requests to begin with; they double where more are waiting."""

_BY_REQUEST = ("requests", "arrived", "hidden", "foretold", "handed")


class Machine:
    """An engine to which requests are handed in one by one.

    Attributes:
        engine, layout: its settings and queues.
        record: the engine, from ``reset`` on; read anew after ``grow`` and ``move_nodes``.
        most_residents: requests that can be resident at once.
    """

    def __init__(self, spec: ReplicaSpec) -> None:
        self.engine = spec.engine
        self.layout = QueueLayout() if spec.policy is None else spec.policy.layout
        rule = None if spec.policy is None else rule_of(spec.policy)
        self.rule = Rule.constant(Decision.greedy(1)) if rule is None else copy.deepcopy(rule)
        self.most_residents = self.engine.max_num_seqs
        self.speed = Speed.of(self.engine)
        self._pool: dict[str, npt.NDArray[Any]] | None = None
        self._sizes = (self.layout.num_queues, self.most_residents, self.engine.block_size)

    def reset(self, horizon: float, nodes: npt.NDArray[Any]) -> None:
        """An empty engine at time 0, its policy without memory.

        Args:
            nodes: the cluster's ``Nodes``.
        """
        engine = self.engine
        self._tables = self._rows(FIRST_ROWS)
        self._memory = np.zeros((), dtype=st.Engine.DTYPE)
        self._batch = {"model": packed_of(engine.time_model), "memory": memory_of(engine.time_model)}
        self._pool = None
        if engine.enable_prefix_caching:
            blocks = -(-engine.longest_request // engine.block_size)
            self._pool = empty_pool(FIRST_ROWS, engine.num_blocks, self.most_residents, blocks, nodes)
        self._connect()
        record = self.record
        load_settings(record.settings, engine, self.layout, EpisodeLimits(horizon=horizon, max_iterations=2**62))
        record.settings.handed_in = True
        link(record.code, engine, self.layout, in_parts=True)
        load_queues(record.queues, engine, self.layout)
        if self._pool is not None:
            reset_pool(record.pool, engine.num_blocks, True)
        record.num_requests, record.more = 0, True
        reset_at(record.handle)
        self.rule.reset()
        record.hidden.rows["next_due"] = _chain(0, FIRST_ROWS, -1)

    def _rows(self, count: int) -> dict[str, npt.NDArray[Any]]:
        tables = engine_tables(count, *self._sizes)
        tables["handed"] = np.zeros(count, st.Handed.DTYPE)
        return tables

    def _connect(self) -> None:
        parts: dict[str, Any] = {**self._tables, "batch": self._batch}
        if self._pool is not None:
            parts["pool"] = self._pool
        self.record = st.Engine(self._memory, **parts)

    def grow(self) -> int:
        """Twice as many rows of requests; returns the first of the new ones, all of which are free."""
        before = self._tables["requests"].shape[0]
        longer = self._rows(2 * before)
        for name in _BY_REQUEST:
            longer[name][:before] = self._tables[name]
            self._tables[name] = longer[name]
        if self._pool is not None:
            files = np.zeros(2 * before, st.Files.DTYPE)
            files[:before] = self._pool["files"]
            files["seat"][before:] = -1
            self._pool["files"] = files
        self._tables["hidden"]["next_due"][before:] = _chain(before, 2 * before, -1)
        self._connect()
        return before

    def move_nodes(self, nodes: npt.NDArray[Any]) -> None:
        """The cluster's nodes lie elsewhere now."""
        if self._pool is not None:
            self._pool["nodes"] = nodes
            self._connect()

    def handles(self) -> tuple[Any, Any, Any, int]:
        """A row of the cluster's handles (``llmsched_env.cluster.kernel``)."""
        rule = self.rule
        return self.record.handle, rule.policy.handle, rule.decision.handle, 0 if rule.is_constant else rule.address

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "record"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if hasattr(self, "_memory"):  # addresses do not outlive their arrays
            self._connect()
            link(self.record.code, self.engine, self.layout, in_parts=True)

    @property
    def nbytes(self) -> int:
        """Memory of its tables; the cluster's nodes are not among them."""
        pool = {} if self._pool is None else {name: rows for name, rows in self._pool.items() if name != "nodes"}
        return self._memory.nbytes + sum(rows.nbytes for rows in (*self._tables.values(), *pool.values()))


def _chain(first: int, end: int, last: int) -> npt.NDArray[np.int32]:
    """Each row's next free one."""
    rows = np.arange(first + 1, end + 1, dtype=np.int32)
    rows[-1] = last
    return rows
