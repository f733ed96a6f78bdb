"""Arrivals piece by piece are those of one process."""

from __future__ import annotations

import numpy as np
import pytest

from llmsched_env.types import FloatArray
from llmsched_env.workload import MMPP2, ArrivalProcess, Gamma, PiecewiseConstant, Poisson, TraceArrivals
from llmsched_env.workload.arrival_stream import ArrivalStream

PHASES = MMPP2(0.0, 9.0, 20.0, 10.0)


def pieces(stream: ArrivalStream, sizes: list[int]) -> FloatArray:
    return np.concatenate([stream.take(size) for size in sizes])


@pytest.mark.parametrize("process", [Poisson(3.0), Gamma(3.0, 2.0), PiecewiseConstant((5.0, 2.0, 1.0), (1.0, 0.0, 8.0))], ids=str)
@pytest.mark.parametrize("sizes", [[1] * 500, [7, 0, 493], [250, 250]])
def test_pieces_are_the_whole(process: ArrivalProcess, sizes: list[int]) -> None:
    whole = process.sample(np.random.default_rng(5), 500)
    np.testing.assert_allclose(pieces(ArrivalStream(process, np.random.default_rng(5)), sizes), whole, rtol=1e-9)


@pytest.mark.parametrize("size", [1, 17, 80_000])
def test_phases_go_on_however_small_the_pieces(size: int) -> None:
    times = pieces(ArrivalStream(PHASES, np.random.default_rng(2)), [size] * (80_000 // size))
    assert (np.diff(times) >= 0).all()
    # Some 900 cycles: the standard error of the realised rate is 3 %.
    assert times.size / times[-1] == pytest.approx(PHASES.rate, rel=0.1)
    counts = np.bincount((times / 5.0).astype(np.int64))
    reference = PHASES.sample(np.random.default_rng(3), 80_000)
    expected = np.bincount((reference / 5.0).astype(np.int64))
    # Were the phase drawn anew with each piece, single arrivals would be far more even.
    assert counts.var() / counts.mean() == pytest.approx(expected.var() / expected.mean(), rel=0.15)
    assert (np.diff(times) > 5.0).mean() == pytest.approx((np.diff(reference) > 5.0).mean(), rel=0.25)


def test_a_stream_begins_where_it_is_told() -> None:
    cycle = PiecewiseConstant((10.0, 10.0), (0.0, 5.0))
    times = ArrivalStream(cycle, np.random.default_rng(0), after=35.0).take(5_000)
    assert times[0] >= 35.0 and (times % 20.0 >= 10.0).all()
    for process in (Poisson(1.0), PHASES):
        assert ArrivalStream(process, np.random.default_rng(0), after=100.0).take(10)[0] > 100.0


def test_recorded_times_end() -> None:
    stream = ArrivalStream(TraceArrivals(np.array([0.0, 1.0, 1.0, 4.0])), np.random.default_rng(0))
    assert stream.take(3).tolist() == [0.0, 1.0, 1.0] and stream.take(3).tolist() == [4.0] and stream.take(3).size == 0
