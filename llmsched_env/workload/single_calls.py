"""Requests that stand alone: the workload of a scenario as calls."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from llmsched_env import checks
from llmsched_env.cluster.calls import CallChunk
from llmsched_env.errors import ConfigError
from llmsched_env.types import IntArray, LengthStatistics, Workload
from llmsched_env.workload.arrival_stream import ArrivalStream
from llmsched_env.workload.arrivals import TraceArrivals
from llmsched_env.workload.programs import CHUNK_CALLS, check_request
from llmsched_env.workload.scenario import Scenario

_FIRST_KEY = 2
"""``Scenario.generate`` spawns children 0 and 1 of a seed; those of later chunks come after them."""


@dataclass(frozen=True, slots=True, eq=False)
class SingleCalls:
    """Every request of a scenario is a program of one call; a ``CallSource``.

    The first chunk is exactly ``Scenario.generate(seed, rate=rate, num_requests=n)`` with n the smaller of ``num_calls`` and 50,000, so
    that a cluster of one replica can be held against the single engine. Each later chunk of 50,000 is drawn from a child of the seed,
    and its arrivals go on where those before ended (``ArrivalStream``): gaps follow the last arrival and a cycle goes on; an MMPP-2
    draws its phase once anew after the first chunk, whose phase ``generate`` does not tell, and keeps it from then on. The joined
    processes of tenants begin anew with each chunk.

    A recorded trace is handed out once. Types and tenants of requests are dropped, predictions of their lengths are kept.

    Attributes:
        scenario: whose requests.

    Raises:
        ConfigError: something that is no scenario.
    """

    scenario: Scenario

    def __post_init__(self) -> None:
        if not isinstance(self.scenario, Scenario):
            raise ConfigError(f"single.scenario: {checks.shown(self.scenario)}, must be a Scenario")

    @property
    def app_tokens(self) -> IntArray:
        """There are no applications: (0,) int32."""
        return np.zeros(0, np.int32)

    @property
    def statistics(self) -> LengthStatistics:
        """Those of the scenario."""
        return self.scenario.statistics

    @property
    def rate(self) -> float:
        """Requests per second of the scenario."""
        return self.scenario.rate

    def chunks(self, seed: int, *, rate: float | None = None, num_calls: int | None = None) -> Iterator[CallChunk]:
        """The requests of an episode, in chunks of 50,000; see ``CallSource``.

        Raises:
            ConfigError: a value out of range.
        """
        root = check_request(seed, num_calls)
        if rate is not None:
            checks.number("rate", rate, unit="calls/s", open_low=True)
            self.scenario.arrivals.with_rate(rate)  # recorded times may have no rate to change
        return self._chunks(root, rate, num_calls)

    def _most(self) -> int | None:
        """Requests of a recorded trace; None where there is no end to them."""
        scenario = self.scenario
        if scenario.rows is not None:
            return len(scenario.rows.arrival)
        return scenario.arrivals.times.size if isinstance(scenario.arrivals, TraceArrivals) else None

    def _chunks(self, seed: int, rate: float | None, num_calls: int | None) -> Iterator[CallChunk]:
        scenario, most = self.scenario, self._most()
        left = num_calls if most is None else min(num_calls or most, most)
        if scenario.rows is not None:  # recorded rows: drawn at once, as they are all there is
            assert left is not None
            whole = scenario.generate(seed, rate=rate, num_requests=left)
            for begin in range(0, left, CHUNK_CALLS):
                yield _as_calls(whole, begin, begin + CHUNK_CALLS)
            return
        times: ArrivalStream | None = None
        last, chunk = 0.0, 0
        while left is None or left > 0:
            count = CHUNK_CALLS if left is None else min(CHUNK_CALLS, left)
            drawn = scenario.generate(_seed_of(seed, chunk), rate=rate, num_requests=count)
            if chunk and scenario.tenants is not None:
                drawn = replace(drawn, arrival=last + drawn.arrival)  # owners and times belong together
            elif chunk:
                times = times or self._later_times(seed, rate, last)
                drawn = replace(drawn, arrival=times.take(count))
            last = float(drawn.arrival[-1])
            left = None if left is None else left - count
            chunk += 1
            yield _as_calls(drawn, 0, count)

    def _later_times(self, seed: int, rate: float | None, last: float) -> ArrivalStream:
        """Arrivals after the first chunk, which ended at ``last`` seconds."""
        process = self.scenario.arrivals if rate is None else self.scenario.arrivals.with_rate(rate)
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_FIRST_KEY,)))
        if isinstance(process, TraceArrivals):  # some may arrive together with the last of the first chunk
            return ArrivalStream(TraceArrivals(process.times[CHUNK_CALLS:]), rng)
        return ArrivalStream(process, rng, last)


def _seed_of(seed: int, chunk: int) -> np.random.SeedSequence:
    return np.random.SeedSequence(seed, spawn_key=(_FIRST_KEY + chunk,) if chunk else ())


def _as_calls(requests: Workload, begin: int, end: int) -> CallChunk:
    predicted = requests.predicted_tokens
    return CallChunk.single(
        requests.arrival[begin:end],
        requests.prompt_tokens[begin:end],
        requests.output_tokens[begin:end],
        None if predicted is None else predicted[begin:end],
    )
