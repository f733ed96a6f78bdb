"""Many engines of one shape in memory: what the vector environment steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llmsched_env.engine import state as st
from llmsched_env.engine.link import link
from llmsched_env.engine.prefix_cache import pool_tables, reset_pool
from llmsched_env.engine.record_backend import (
    engine_tables,
    load_order,
    load_predictions,
    load_queues,
    load_requests,
    load_settings,
    most_residents,
)
from llmsched_env.engine_config import EngineConfig, EpisodeLimits
from llmsched_env.perf.base import memory_of, packed_of
from llmsched_env.types import QueueLayout, Workload


class EngineSpec(Protocol):
    """What an engine is built from; ``llmsched_env.spec.EnvSpec`` has it."""

    @property
    def engine(self) -> EngineConfig: ...
    @property
    def layout(self) -> QueueLayout: ...
    @property
    def limits(self) -> EpisodeLimits: ...
    @property
    def num_requests(self) -> int: ...
    @property
    def reveal_output_length(self) -> bool: ...


class Fleet:
    """``count`` engines; engine i is built from specification i modulo their number, all of equal queues and requests.

    Attributes:
        records: one ``Engine`` each.
        clocks: (count,) float64 seconds, live.
    """

    def __init__(self, count: int, specs: Sequence[EngineSpec]) -> None:
        self._specs = list(specs)
        n, queues = specs[0].num_requests, specs[0].layout.num_queues
        residents = max(most_residents(spec.engine, n, 1) for spec in specs)
        block_size = max(spec.engine.block_size for spec in specs)
        by_priority = any(spec.engine.scheduling_policy == "priority" for spec in specs)
        self._tables = engine_tables(n, queues, residents, block_size, (count,), by_priority=by_priority)
        self._memory = np.zeros(count, dtype=st.Engine.DTYPE)
        self._models = [packed_of(spec.engine.time_model) for spec in specs]
        self._memories = [memory_of(specs[i % len(specs)].engine.time_model) for i in range(count)]
        self._pools: list[dict[str, npt.NDArray[Any]] | None] = [None] * count
        self._build()

    def _build(self) -> None:
        self.records = [self._record(i) for i in range(len(self._memory))]
        self.clocks: npt.NDArray[np.float64] = self._memory["clock"]
        for i, record in enumerate(self.records):
            spec = self.spec_of(i)
            load_settings(record.settings, spec.engine, spec.layout, spec.limits)
            record.settings.reveal = spec.reveal_output_length
            load_queues(record.queues, spec.engine, spec.layout)
            link(record.code, spec.engine, spec.layout)

    def _record(self, i: int) -> st.Engine:
        parts: dict[str, Any] = {name: table[i] for name, table in self._tables.items()}
        parts["batch"] = {"model": self._models[i % len(self._models)], "memory": self._memories[i]}
        pool = self._pools[i]
        if pool is not None:
            parts["pool"] = pool
        return st.Engine(self._memory[i : i + 1].reshape(()), **parts)

    def spec_of(self, i: int) -> EngineSpec:
        """What engine i is built from."""
        return self._specs[i % len(self._specs)]

    def load(self, i: int, workload: Workload) -> None:
        """The requests of engine i's next episode; ``llmsched_env.engine.step.reset`` starts it."""
        spec, record = self.spec_of(i), self.records[i]
        load_requests(self._tables["hidden"][i], workload, spec.layout)
        load_predictions(self._tables["foretold"][i], workload)
        if "order" in self._tables:
            load_order(self._tables["order"][i], workload)
        record.num_requests = len(workload)
        if spec.engine.enable_prefix_caching:  # its tables are as long as the requests
            self._pools[i] = pool_tables(workload, spec.engine.num_blocks, spec.engine.block_size, self._tables["events"].shape[1])
            record = self.records[i] = self._record(i)
            reset_pool(record.pool, spec.engine.num_blocks, True)

    def save(self, i: int) -> list[npt.NDArray[Any]]:
        """Engine i as it is, for ``restore``."""
        return [part.copy() for part in self._memory_of(i)]

    def restore(self, i: int, saved: list[npt.NDArray[Any]]) -> None:
        """Put engine i back to where it was saved, within the same episode."""
        for part, kept in zip(self._memory_of(i), saved, strict=True):
            part[...] = kept

    def _memory_of(self, i: int) -> list[npt.NDArray[Any]]:
        pool = self._pools[i]
        return [self._memory[i : i + 1], self._memories[i], *(table[i] for table in self._tables.values()), *(pool or {}).values()]

    @property
    def nbytes(self) -> int:
        """Memory of all engines."""
        pools = sum(a.nbytes for pool in self._pools if pool is not None for a in pool.values())
        return (
            self._memory.nbytes
            + sum(memory.nbytes for memory in self._memories)
            + sum(table.nbytes for table in self._tables.values())
            + pools
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("records", "clocks")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._build()  # addresses do not outlive their arrays
