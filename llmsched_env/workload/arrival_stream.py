"""Arrivals that go on: the next n of a process, again and again, without end.

``ArrivalProcess.sample`` draws a given number at once. A stream draws them piece by piece, and the process goes on where the piece before
ended: gaps follow the last arrival, a modulated process stays in its phase, and a cycle is not begun anew.
"""

from __future__ import annotations

import numpy as np

from llmsched_env.types import FloatArray
from llmsched_env.workload.arrivals import MMPP2, ArrivalProcess, PiecewiseConstant, TraceArrivals


class ArrivalStream:
    """The arrivals of one process in order of time.

    Recorded times are handed out once; then ``take`` gives fewer, and none at last. A process that is not of
    ``llmsched_env.workload.arrivals`` begins anew with each piece, at the last arrival.

    Args:
        process: whose arrivals.
        rng: is consumed.
        after: seconds, nothing comes earlier. A piecewise process is in that place of its cycle, an ``MMPP2`` in its stationary phase.
    """

    def __init__(self, process: ArrivalProcess, rng: np.random.Generator, after: float = 0.0) -> None:
        self._process = process
        self._rng = rng
        self._last = after
        self._mass = 0.0  # cumulated intensity up to the last arrival, of a modulated process
        self._times, self._masses = np.full(1, after), np.zeros(1)  # phase changes of an MMPP2
        self._phases: tuple[tuple[float, float], tuple[float, float]] | None = None
        self._row = 0
        if isinstance(process, PiecewiseConstant):
            times, masses = _cycle(process)
            cycles, rest = divmod(after, float(times[-1]))
            self._mass = cycles * float(masses[-1]) + float(np.interp(rest, times, masses))

    def take(self, count: int) -> FloatArray:
        """The next arrivals: (count,) float64 seconds, non-decreasing; fewer at the end of recorded times."""
        process = self._process
        if isinstance(process, TraceArrivals):
            times: FloatArray = process.times[self._row : self._row + count].copy()
            self._row += times.size
        elif isinstance(process, MMPP2):
            times = self._of_phases(process, count)
        elif isinstance(process, PiecewiseConstant):
            step_ends, masses = _cycle(process)
            cycles, rest = np.divmod(self._unit(count), masses[-1])
            times = cycles * step_ends[-1] + np.interp(rest, masses, step_ends)
        else:
            times = self._last + process.sample(self._rng, count)
        if times.size:
            times = np.maximum.accumulate(np.maximum(times, self._last))
            self._last = float(times[-1])
        return times

    def _unit(self, count: int) -> FloatArray:
        """The next arrivals of a Poisson process of unit rate, on the scale of the cumulated intensity."""
        unit = self._mass + np.cumsum(self._rng.standard_exponential(count))
        if count:
            self._mass = float(unit[-1])
        return unit

    def _of_phases(self, process: MMPP2, count: int) -> FloatArray:
        seconds, rates = (process.mean_low_seconds, process.mean_high_seconds), (process.rate_low, process.rate_high)
        if self._phases is None:
            first = int(self._rng.random() * sum(seconds) >= seconds[0])
            self._phases = ((seconds[first], seconds[1 - first]), (rates[first], rates[1 - first]))
        means, intensities = self._phases
        unit = self._unit(count)
        while self._masses[-1] < self._mass:
            missing = (self._mass - self._masses[-1]) / process.rate
            # In pairs, so that the next one begins with the first phase again.
            sojourns = self._rng.standard_exponential((int(1.2 * missing / sum(means)) + 8, 2)) * means
            self._times = np.concatenate([self._times, self._times[-1] + np.cumsum(sojourns)])
            self._masses = np.concatenate([self._masses, self._masses[-1] + np.cumsum(sojourns * intensities)])
        times = np.interp(unit, self._masses, self._times)
        past = max(int(np.searchsorted(self._masses, self._mass, side="right")) - 1, 0)
        self._times, self._masses = self._times[past:], self._masses[past:]
        return np.asarray(times)


def _cycle(process: PiecewiseConstant) -> tuple[FloatArray, FloatArray]:
    """(M+1,) step ends and (M+1,) cumulated intensity within one cycle, both from 0."""
    durations, rates = np.asarray(process.durations, dtype=np.float64), np.asarray(process.rates, dtype=np.float64)
    return np.concatenate([[0.0], np.cumsum(durations)]), np.concatenate([[0.0], np.cumsum(durations * rates)])
