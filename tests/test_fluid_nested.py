"""Nested WAIT: decay rates, memory, safety buffer, thresholds, segment design, cap allocation (arXiv 2504.11320 v4)."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as some

from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import ConfigError, InfeasibleError
from llmsched_env.fluid import (
    NestedThresholds,
    allocate_cap,
    check_nested,
    continuation,
    equal_probability_ends,
    equal_width_ends,
    fluid_equilibrium,
    merge_segments,
    nested_load,
    nested_memory,
    nested_thresholds,
    required_memory,
    safety_buffer,
    segment_design,
    segment_designs,
    theta_lower_bound,
    theta_root,
)
from llmsched_env.perf.batch import BATCH_FIELDS
from llmsched_env.types import LengthStatistics

TWO = LengthStatistics.of([10, 10], [10, 20], [2, 1])
ENDS = (10, 20)


def paper(capacity: int = 137_000, d0: float = 1.0, d1: float = 1e-3) -> EngineConfig:
    return EngineConfig.paper(capacity, d0, d1)


# --- theta ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_prev", "n_k", "p", "root", "bound"),
    [
        (4, 2, 1 / 3, 1.386294, 1.333),
        (18, 7, 1 / 3, 0.478095, 0.444),
        (16, 6, 1 / 3, 0.361916, 0.333),
        (10, 6, 0.5, 0.822163, 0.8),
        (100, 40, 0.3, 0.871061, 0.8),
    ],
)
def test_theta_of_examples(n_prev: float, n_k: float, p: float, root: float, bound: float) -> None:
    assert round(theta_root(n_prev, n_k, p), 6) == root
    assert theta_lower_bound(n_prev, n_k, p) == pytest.approx(bound, abs=5e-4)
    if n_prev == 4:
        assert theta_root(n_prev, n_k, p) == pytest.approx(math.log(4), rel=1e-14)


@given(some.floats(1e-3, 1e3), some.floats(1e-6, 1 - 1e-3), some.floats(1e-3, 1 - 1e-4))
def test_theta_solves_its_equation(n_prev: float, p: float, margin: float) -> None:
    n_k = n_prev * (p + margin * (1 - p))
    theta = theta_root(n_prev, n_k, p)
    assert theta >= theta_lower_bound(n_prev, n_k, p) > 0
    assert theta_root(7 * n_prev, 7 * n_k, p) == pytest.approx(theta, rel=1e-6)

    def log_moment(t: float) -> float:  # of one survivor batch minus one service, per request of n_prev
        return float(np.logaddexp(math.log1p(-p), math.log(p) + t)) - t * n_k / n_prev

    assert log_moment(0.999 * theta) < 1e-12
    assert log_moment(1.001 * theta) > -1e-12


def test_theta_without_a_finite_root() -> None:
    assert theta_root(4, 4, 0.5) == theta_root(4, 5, 0.5) == theta_root(4, 1, 0.0) == math.inf
    with pytest.raises(ConfigError, match=r"n_k / n_prev = 0\.5 must be above p = 0\.5"):
        theta_root(4, 2, 0.5)
    for bad in ((0, 1, 0.5), (1, math.nan, 0.5), (1, 1, 1.5)):
        with pytest.raises(ConfigError, match="theta_root"):
            theta_root(*bad)


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "d0", "horizon", "base", "required"),
    [
        ((4, 2), 0.1, 4_000, 1170, 1406.1),
        ((16, 6), 1.0, 20_000, 4170, 5003),
        ((18, 7), 1.0, 20_000, 4755, 5435),
        ((24, 10), 1.0, 20_000, 6510, 7075),
    ],
)
def test_memory_of_examples(n: tuple[int, int], d0: float, horizon: float, base: float, required: float) -> None:
    engine = paper(d0=d0)
    assert nested_memory(n, ENDS, 10, engine) == base
    found = required_memory(n, ENDS, [1 / 3], 10, engine, horizon_seconds=horizon, delta=0.1)
    assert round(found, 1 if required != int(required) else 0) == required
    buffer = safety_buffer(n, ENDS, [1 / 3], 10, engine, horizon_seconds=horizon, delta=0.1)
    assert buffer.thresholds == 20 * n[1]
    assert found == pytest.approx(base + buffer.thresholds + buffer.fluctuation)


def stages(prompt: int, ends: tuple[int, ...], engine: EngineConfig) -> list[list[tuple[str, int]]]:
    """Per segment (prefill or decode, tokens held after it) of a request that reaches the last end."""
    found: list[list[tuple[str, int]]] = [[] for _ in ends]
    generated, computed, k = 0, 0, 0
    while generated < ends[-1]:
        if computed == 0:
            found[0].append(("prefill", prompt))
            computed, generated = prompt, int(engine.preset == "vllm")
        else:
            computed, generated = computed + 1, generated + 1
            found[k].append(("decode", computed))
        if generated == ends[k]:
            k += 1
    return found


@pytest.mark.parametrize("engine", [paper(), EngineConfig.vllm()], ids=["paper", "vllm"])
@pytest.mark.parametrize(("prompt", "ends"), [(10, (10, 20)), (7, (1, 2, 9)), (100, (33,)), (50, (16, 17, 64, 65))])
def test_load_and_boundary_charge_stage_by_stage(engine: EngineConfig, prompt: int, ends: tuple[int, ...]) -> None:
    n = np.arange(len(ends), 0, -1) * 1.5
    sums, boundary, per_segment = np.zeros(BATCH_FIELDS), 0.0, stages(prompt, ends, engine)
    rounding = 0.0 if engine.preset == "paper" else 7.5
    for k, segment in enumerate(per_segment):
        for kind, held in segment:
            if kind == "prefill":
                sums[[2, 3, 4, 7, 8]] += n[k] * np.array([1, prompt, prompt**2, prompt**2 / 2, engine.preset == "vllm"])
            else:
                sums[[0, 1, 8]] += n[k] * np.array([1, held, 1])
            sums[[9, 10]] += n[k] * np.array([held, 1])
        if k + 1 < len(ends):
            boundary += (segment[-1][1] + rounding) * math.ceil(n[k + 1])  # it waits with what its last stage left
    load = nested_load(n, ends, prompt, engine)
    assert load.sums[:BATCH_FIELDS] == pytest.approx(sums)
    assert load.kv_tokens == pytest.approx(sums[9] + rounding * sums[10])
    p = np.full(len(ends) - 1, 0.1)
    assert safety_buffer(n, ends, p, prompt, engine, horizon_seconds=10, delta=0.1).thresholds == pytest.approx(boundary)


def test_one_segment_needs_no_buffer() -> None:
    assert required_memory([3], [20], [], 10, paper(d0=0), horizon_seconds=10, delta=0.1) == 3 * 420


def test_buffer_refuses_what_has_no_meaning() -> None:
    def call(n=(4, 2), ends=ENDS, p=(1 / 3,), horizon=10.0, delta=0.1, d0=1.0):  # type: ignore[no-untyped-def]
        return required_memory(n, ends, p, 10, paper(d0=d0), horizon_seconds=horizon, delta=delta)

    for change, match in (
        ({"ends": (10, 20, 30)}, "3 ends for 2 thresholds"),
        ({"ends": (20, 10)}, "must be increasing"),
        ({"p": (0.3, 0.3)}, "2 probabilities for 2 segments"),
        ({"horizon": 0}, "horizon_seconds: 0"),
        ({"delta": 1}, "delta: 1"),
        ({"d0": 0}, "number of iterations"),
    ):
        with pytest.raises(ConfigError, match=match):
            call(**change)


# --- segments of a distribution -------------------------------------------------------------------


def test_continuation_and_merging() -> None:
    s = LengthStatistics.of([10] * 4, [5, 10, 20, 40], [4, 3, 2, 1])
    assert continuation(s, (5, 10, 20, 40)) == pytest.approx([6 / 10, 3 / 6, 1 / 3])
    assert continuation(s, (12, 40)) == pytest.approx([0.3])
    assert merge_segments(s, (5, 7, 20, 40)) == (5, 20, 40)  # nobody stops in 6..7
    assert merge_segments(s, (3, 20, 40)) == (20, 40)
    assert merge_segments(s, (5, 40, 60, 80)) == (5, 40)  # nobody survives 40
    assert merge_segments(s, (5, 20)) == (5, 20, 40)
    assert merge_segments(s, (50,)) == (50,)


@given(some.lists(some.tuples(some.integers(1, 300), some.floats(0.01, 1)), min_size=1, max_size=30), some.integers(1, 9))
def test_cuts_are_usable(points, count) -> None:  # type: ignore[no-untyped-def]
    output, weight = zip(*points, strict=True)
    s = LengthStatistics.of(np.full(len(points), 10), output, weight)
    for ends in (equal_width_ends(s, count), equal_probability_ends(s, count)):
        assert len(ends) <= count and ends[-1] >= s.max_output
        assert np.all(np.diff(ends) > 0)
        assert np.all((continuation(s, ends) > 0) & (continuation(s, ends) < 1))


def test_segments_without_survivors_or_stops_are_refused() -> None:
    for ends, what in (((5, 20), r"no request stops in its segment.*: \(20,\)"), ((10, 20, 30), r"no request survives it.*: \(10, 20\)")):
        with pytest.raises(InfeasibleError, match=what):
            nested_thresholds(TWO, 3.0, paper(), ends, horizon_seconds=100)
    with pytest.raises(ConfigError, match="the last is 15, must be >= the longest output, 20"):
        nested_thresholds(TWO, 3.0, paper(), (10, 15), horizon_seconds=100)


# --- thresholds -----------------------------------------------------------------------------------


def verify_nested(found: NestedThresholds, s: LengthStatistics, rate: float, engine: EngineConfig) -> None:
    n, ends = found.thresholds, tuple(int(r) for r in found.segment_ends)
    alive = [1.0, *(s.survival(r) for r in ends[:-1])]
    assert found.continuation == pytest.approx([b / a for a, b in itertools.pairwise(alive)])
    ratio = n[1:] / n[:-1]
    assert np.all((found.continuation < ratio) & (ratio < 1))
    prompts = [float(np.average(s.prompt[s.output > r], weights=s.weight[s.output > r])) for r in (0, *ends[:-1])]
    load = nested_load(n, ends, prompts, engine, prompt_square=float(s.prompt**2 @ s.weight))
    assert found.kv_base == pytest.approx(load.kv_tokens)
    assert found.iteration_seconds == pytest.approx(load.seconds)
    assert found.iteration_seconds < n[0] / rate == found.cycle_seconds
    assert not load.violations()
    buffer = safety_buffer(
        n, ends, found.continuation, prompts, engine, horizon_seconds=1000, delta=0.01, num_types=np.unique(s.output).size
    )
    assert found.theta == pytest.approx(buffer.theta)
    assert found.kv_required == pytest.approx(load.kv_tokens + buffer.total)
    assert found.kv_required <= engine.kv_capacity_tokens * (1 + 1e-8)
    assert found.kv_base_worst >= found.kv_base * (1 - 1e-9) or engine.preset == "vllm"


POINTS = some.lists(some.tuples(some.integers(1, 300), some.integers(1, 100), some.floats(0.1, 1)), min_size=2, max_size=8)


@given(
    POINTS,
    some.integers(1, 5),
    some.floats(0.001, 0.95),
    some.sampled_from(["auto", "integer", "rotation"]),
    some.sampled_from(["paper", "vllm"]),
    some.floats(0.01, 5.0),
    some.floats(0.05, 0.9),
)
def test_returned_thresholds_meet_the_conditions(points, count, share, rounding, preset, d0, eta) -> None:  # type: ignore[no-untyped-def]
    s = LengthStatistics.of(*zip(*points, strict=True))
    engine = paper(300_000, d0, 1e-5) if preset == "paper" else EngineConfig.vllm(num_blocks=30_000)
    ends = equal_probability_ends(s, count)
    rate = share * (300_000 / (d0 + 3) if preset == "paper" else 30_000) / float(((s.output + 1) * (s.prompt + s.output)) @ s.weight)
    options = {"horizon_seconds": 1000, "delta": 0.01, "rounding": rounding, "eta": eta}
    try:
        found = nested_thresholds(s, rate, engine, ends, **options)
    except InfeasibleError as error:
        if "no integers satisfy" in str(error):
            assert rounding == "integer"
            return
        loose = nested_thresholds(s, rate, engine, ends, **options, overload=True)
        assert loose.overload and loose.notes
        if loose.rounding == "rotation":
            assert loose.kv_base <= engine.kv_capacity_tokens * (1 + 1e-8)
        return
    assert not found.overload
    verify_nested(found, s, rate, engine)
    if rounding != "auto" and np.any(found.thresholds != np.round(found.thresholds)):
        assert rounding == "rotation"
    checked = check_nested(found.thresholds, s, rate, engine, ends, horizon_seconds=1000, delta=0.01)
    assert checked.kv_required == pytest.approx(found.kv_required)


@pytest.mark.parametrize(("capacity", "expected"), [(5003, (16, 6)), (5435, (18, 7)), (9000, (19, 8))])
def test_thresholds_of_the_two_types(capacity: int, expected: tuple[int, int]) -> None:
    found = nested_thresholds(TWO, 3.0, paper(capacity), ENDS, horizon_seconds=20_000)
    assert tuple(found.thresholds) == expected
    assert found.kv_base == found.kv_base_worst == 165 * expected[0] + 255 * expected[1]
    assert found.kv_required <= capacity and found.iteration_seconds < found.cycle_seconds


def test_rotation_keeps_the_margin() -> None:
    found = nested_thresholds(TWO, 3.0, paper(9000), ENDS, horizon_seconds=20_000, rounding="rotation", eta=0.25, slack=1.5)
    # Per second of cycle n = (3, 3 q), q = 1/3 + 1/6 = 1/2: M^pi = (495 + 382.5) x, DT(x) = x at x = 1 / (1 - .8775).
    x = 1.5 / (1 - 0.8775)
    assert found.cycle_seconds <= x
    assert found.thresholds[1] / found.thresholds[0] == pytest.approx(0.5)
    wide = nested_thresholds(TWO, 3.0, paper(90_000), ENDS, horizon_seconds=20_000, rounding="rotation", eta=0.25, slack=1.5)
    assert wide.cycle_seconds == pytest.approx(x)
    assert found.kv_required == pytest.approx(9000)  # shortened by M_req <= C, still stable


def test_rotation_never_holds_more_than_the_worst_case() -> None:
    s = LengthStatistics.of([10, 40, 20], [10, 10, 20], [1, 1, 1])
    found = nested_thresholds(s, 0.5, paper(5000, d0=0.5, d1=1e-6), ENDS, horizon_seconds=1000)
    assert found.rounding == "rotation"
    quota = np.array([found.quota(np.full(2, i)) for i in range(2000)])
    peaks = [max(np.convolve(quota[:, 0], 40 + np.arange(11))), max(np.convolve(quota[:, 1], 20 + np.arange(11, 21)))]
    exact = found.thresholds @ [sum(40 + np.arange(11)), sum(20 + np.arange(11, 21))]
    assert exact < sum(peaks) <= found.kv_base_worst


def test_infeasible_names_values_that_are_feasible() -> None:
    with pytest.raises(InfeasibleError, match=r"M_req = 4617\.77 KV tokens > C = 4300") as caught:
        nested_thresholds(TWO, 3.0, paper(4300), ENDS, horizon_seconds=20_000)
    capacity = int(re.search(r"engine\.capacity_tokens >= (\d+)", str(caught.value))[1])  # type: ignore[index]
    rate = float(re.search(r"below ([0-9.]+) requests/s", str(caught.value))[1])  # type: ignore[index]
    nested_thresholds(TWO, 3.0, paper(capacity), ENDS, horizon_seconds=20_000)
    nested_thresholds(TWO, rate * 0.9999, paper(4300), ENDS, horizon_seconds=20_000)
    for worse in ((3.0, capacity - 1), (rate * 1.0001, 4300)):
        with pytest.raises(InfeasibleError):
            nested_thresholds(TWO, worse[0], paper(worse[1]), ENDS, horizon_seconds=20_000)


def test_a_rate_outside_the_fluid_region_names_the_fluid_boundary() -> None:
    with pytest.raises(InfeasibleError, match=r"DT\* = 8 s\) breaks KV memory: 7000 .* largest total rate at this mix is 3\.24528"):
        nested_thresholds(TWO, 3.5, paper(4300), ENDS, horizon_seconds=20_000)


def test_a_rate_the_full_stages_cannot_carry() -> None:
    # One segment counts 3 requests/s at all 21 stages: rho = 3 * 420e-3 > 1, though the fluid rho is .75.
    assert fluid_equilibrium([10, 10], [10, 20], [2, 1], paper()).rho == pytest.approx(0.75)
    with pytest.raises(InfeasibleError, match=r"rho = 1\.26 with n_k at every stage"):
        nested_thresholds(TWO, 3.0, paper(), (20,), horizon_seconds=100)


@pytest.mark.parametrize(
    ("capacity", "rate", "promise", "what"),
    [
        (4300, 3.0, "stable", "M_req does not: overflow probability not bounded"),
        (4100, 3.0, "stable", "evictions are likely"),
        (3750, 3.0, "required", "scaled down until M_req fits"),
        (600, 3.0, "loose", "scaled down until M^pi and boundary thresholds fit"),
    ],
)
@pytest.mark.parametrize("rounding", ["auto", "integer", "rotation"])
def test_overload(capacity: int, rate: float, promise: str, what: str, rounding: str) -> None:
    engine = paper(capacity)
    with pytest.raises(InfeasibleError):
        nested_thresholds(TWO, rate, engine, ENDS, horizon_seconds=20_000)
    found = nested_thresholds(TWO, rate, engine, ENDS, horizon_seconds=20_000, rounding=rounding, overload=True)  # type: ignore[arg-type]
    assert found.overload and what in found.notes[1]
    if any("which breaks" in note for note in found.notes):
        assert rounding == "integer"
        return
    assert found.kv_base <= capacity * (1 + 1e-9)
    assert (found.iteration_seconds < found.cycle_seconds) == (promise == "stable")
    if promise == "required":
        assert found.kv_required <= capacity * (1 + 1e-9)
    if promise == "loose":
        assert found.kv_base + 20 * math.ceil(found.thresholds[1]) <= capacity * (1 + 1e-9)


def test_check_nested() -> None:
    engine = paper(5003)
    found = check_nested([16, 6], TWO, 3.0, engine, ENDS, horizon_seconds=20_000)
    assert (found.kv_base, round(found.kv_required), found.iteration_seconds) == (4170, 5003, pytest.approx(5.17))
    with pytest.raises(ConfigError, match="3 thresholds for 2 segments"):
        check_nested([16, 6, 2], TWO, 3.0, engine, ENDS, horizon_seconds=20_000)
    for n, match in (
        ((15, 5), r"ratio: p_2 = 0\.333333 < n_2 / n_1 = 0\.333333 < 1 does not hold"),
        ((7, 7), r"n_2 / n_1 = 1 < 1 does not hold"),
        ((4, 2), r"DT = 2\.17 s must be < n_1 / Lam_1 = 4 / 3 = 1\.33333 s"),
        ((18, 7), r"safety buffer: M_req = 5434\.61 .* > C = 5003 .*nearest feasible: n = \(16, 6\)"),
        ((24, 10), "KV memory: 6510"),
    ):
        with pytest.raises(InfeasibleError, match=match):
            check_nested(n, TWO, 3.0, engine, ENDS, horizon_seconds=20_000)
    loose = check_nested([16, 6], TWO, 3.0, paper(4170), ENDS, horizon_seconds=20_000, overload=True)
    assert loose.overload and "safety buffer" in loose.notes[0]
    growing = check_nested([15, 5], TWO, 3.0, engine, ENDS, horizon_seconds=20_000, overload=True)
    assert math.isinf(growing.kv_required) and np.isnan(growing.theta).all()


def test_prompts_of_different_length() -> None:
    s = LengthStatistics.of([10, 40, 20], [10, 10, 20], [1, 1, 1])
    engine, n = paper(d0=10.0, d1=1e-6), [30.0, 12.0]
    mean = check_nested(n, s, 0.3, engine, ENDS, horizon_seconds=1000)
    assert mean.kv_base == pytest.approx(30 * 11 * (70 / 3 + 5) + 12 * 10 * (20 + 15.5))
    assert mean.kv_base_worst == pytest.approx(30 * 11 * (40 + 5) + 12 * 10 * (20 + 15.5))
    worst = check_nested(n, s, 0.3, engine, ENDS, horizon_seconds=1000, worst_case=True)
    assert worst.kv_base == worst.kv_base_worst == mean.kv_base_worst
    assert worst.kv_required > mean.kv_required


@pytest.mark.parametrize("change", [{"slack": 1.0}, {"eta": 0.0}, {"eta": 1.0}, {"rounding": "up"}])
def test_malformed_options(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        nested_thresholds(TWO, 3.0, paper(), ENDS, horizon_seconds=100, **change)  # type: ignore[arg-type]


# --- segment design -------------------------------------------------------------------------------


def geometric(mean: float = 60, longest: int = 400) -> LengthStatistics:
    length = np.arange(1, longest + 1)
    return LengthStatistics.of(np.full(longest, 50), length, (1 - 1 / mean) ** length)


def test_design_is_the_smallest_requirement_of_a_u_shape() -> None:
    s, engine = geometric(), paper(10**7, d0=0.5, d1=1e-7)
    options = {"horizon_seconds": 1000.0, "delta": 0.1}
    designs = segment_designs(s, 20.0, engine, candidates=(1, 2, 3, 4, 6, 8, 12, 20), **options)
    width = [d for d in designs if d.cut == "width"]
    base, required = [d.kv_base for d in width], [d.kv_required for d in width]
    assert np.all(np.diff(base[:4]) < 0)  # more segments waste less
    buffer = np.array(required) - np.array(base)
    assert buffer[0] == 0 and np.all(np.diff(buffer) > 0)  # and need more buffer
    best = int(np.argmin(required))
    assert 0 < best < len(width) - 1
    chosen = segment_design(s, 20.0, engine, candidates=(1, 2, 3, 4, 6, 8, 12, 20), **options)
    assert chosen == min(designs, key=lambda d: d.kv_required).ends
    n = nested_thresholds(s, 20.0, engine, chosen, rounding="rotation", **options)
    assert n.kv_required == pytest.approx(min(d.kv_required for d in designs))


def test_design_without_room_for_a_buffer_takes_the_smallest_base() -> None:
    s, engine = geometric(), paper(100_000, d0=0.05, d1=1e-6)
    designs = segment_designs(s, 10.0, engine, horizon_seconds=1e6)
    assert min(d.kv_required for d in designs) < 100_000
    tight = paper(int(min(d.kv_required for d in designs)) - 1, d0=0.05, d1=1e-6)
    loose = min(designs, key=lambda d: d.kv_loose)
    assert loose.ends != min(designs, key=lambda d: d.kv_required).ends
    assert segment_design(s, 10.0, tight, horizon_seconds=1e6) == loose.ends


def test_design_options() -> None:
    s, engine = geometric(), paper(10**7, d0=0.5, d1=1e-6)
    assert len(segment_design(s, 20.0, engine, horizon_seconds=100, num_segments=5)) == 5
    with pytest.raises(InfeasibleError, match="no candidate has a stable cycle"):
        segment_design(s, 1e5, engine, horizon_seconds=100)
    for bad in ((), (0,), (2.5,)):
        with pytest.raises(ConfigError, match="candidates"):
            segment_design(s, 20.0, engine, horizon_seconds=100, candidates=bad)
    assert segment_design(TWO, 3.0, paper(9000), horizon_seconds=20_000) == ENDS


@given(some.floats(0.5, 0.99), some.integers(2, 6))
def test_equal_probability_cuts(keep: float, count: int) -> None:
    length = np.arange(1, 200)
    s = LengthStatistics.of(np.full(199, 5), length, keep**length)
    ends = equal_probability_ends(s, count)
    assume(len(ends) == count)
    for k, r in enumerate(ends[:-1], start=1):
        assert 1 - s.survival(r) >= k / count - 1e-9
        assert 1 - s.survival(r - 1) < k / count + 1e-9


# --- cap allocation -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "p", "widths", "eta", "first", "caps"),
    [
        (30, [0.3], [20, 30], 0.0, 1.0345, [21, 9]),
        (30, [0.3], [20, 30], 0.05, None, [20, 10]),
        (70, [0.482, 0.458, 0.301], [125] * 4, 0.05, None, [37, 20, 10, 4]),
    ],
)
def test_allocation_of_the_paper(limit, p, widths, eta, first, caps) -> None:  # type: ignore[no-untyped-def]
    found = allocate_cap(limit, p, widths, eta)
    assert found.segment_caps.tolist() == caps
    assert float(found.thresholds @ widths) == pytest.approx(limit)
    if first is not None:
        assert found.thresholds[0] == pytest.approx(first, abs=5e-5)
    else:
        assert (found.thresholds * widths)[:2] == pytest.approx([19.7, 10.3] if limit == 30 else [36.9, 19.6], abs=0.05)
    for cap, width, stage in zip(caps, widths, found.stage_caps, strict=True):
        assert stage.size == width and stage.sum() == cap and stage.max() - stage.min() <= 1


def test_allocation_refuses_malformed_input() -> None:
    for arguments, match in (
        ((0, [0.3], [20, 30]), "total_limit"),
        ((30, [0.3, 0.3], [20, 30]), "continuation"),
        ((30, [1.3], [20, 30]), "continuation"),
        ((30, [0.3], [20, 0]), "widths"),
        ((30, [0.3], [20, 30], -0.1), "eta"),
    ):
        with pytest.raises(ConfigError, match=match):
            allocate_cap(*arguments)
    assert allocate_cap(10, [1.0], [1, 1], 0.05).thresholds == pytest.approx([10 / 1.99, 9.9 / 1.99])  # q is cut at .99
