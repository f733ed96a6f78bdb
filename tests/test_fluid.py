"""Fluid equilibrium, stability boundary, WAIT thresholds and time-varying rates (arXiv 2504.11320 v4).

The expected numbers are the paper's worked examples, or come from loops over requests and stages that
know nothing of the closed formulas under test.
"""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as some

from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import ConfigError, InfeasibleError
from llmsched_env.fluid import (
    Fluid,
    WaitThresholds,
    check_wait,
    class_profiles,
    equilibrium_of,
    find_boundary,
    fluid_equilibrium,
    rotation_quota,
    stability_boundary,
    wait_thresholds,
    wait_thresholds_of,
    window_rates,
)
from llmsched_env.fluid.equilibrium import charge_sum
from llmsched_env.perf import LinearTime, load_calibration
from llmsched_env.perf.batch import BATCH_FIELDS
from llmsched_env.types import LengthStatistics, QueueLayout

TWO_TYPES = ([10, 10], [10, 20])

FORMULA = load_calibration("a100-llama2-7b-c10")
"""Its time by request falls as batches grow, as the fluid model assumes; that of measured tables has stairs."""


def paper(capacity: int = 137_000, d0: float = 1.0, d1: float = 1e-3) -> EngineConfig:
    return EngineConfig.paper(capacity, d0, d1)


# --- one request, stage by stage ------------------------------------------------------------------


def passage(prompt: int, output: int, engine: EngineConfig) -> tuple[np.ndarray, list[int]]:
    """The Batch sums of a request over its life, and the tokens it holds after each iteration."""
    sums = np.zeros(BATCH_FIELDS)
    held: list[int] = []
    computed, generated = 0, 0
    while generated < output:
        if computed == 0:
            chunk, sampled = prompt, int(engine.preset == "vllm")
            sums[[2, 3, 4, 7]] += 1, chunk, chunk**2, chunk * (chunk / 2)
        else:
            chunk, sampled = 1, 1
            sums[[0, 1]] += 1, computed + 1
        computed += chunk
        generated += sampled
        sums[[8, 9, 10]] += sampled, computed, 1
        held.append(computed)
    return sums, held


@pytest.mark.parametrize("engine", [paper(), EngineConfig.vllm()], ids=["paper", "vllm"])
@pytest.mark.parametrize(("prompt", "output"), [(1, 1), (10, 1), (10, 2), (7, 33), (512, 20)])
def test_sums_are_those_of_the_passage_of_one_request(engine: EngineConfig, prompt: int, output: int) -> None:
    fluid = Fluid.of(prompt, output, 1.0, engine)
    sums, held = passage(prompt, output, engine)
    assert fluid.sums[0, :BATCH_FIELDS] == pytest.approx(sums)
    assert len(held) == (output + 1 if engine.preset == "paper" else output)
    rounding = 0 if engine.preset == "paper" else 7.5 * len(held)
    assert fluid.load.kv_tokens == pytest.approx(sum(held) + rounding)


def test_mean_block_rounding_is_exact_on_average_over_a_block_of_prompts() -> None:
    engine, prompts = EngineConfig.vllm(), range(100, 116)
    exact = np.mean([sum(-(-t // 16) * 16 for t in passage(p, 30, engine)[1]) for p in prompts])
    mean = np.mean([Fluid.of(p, 30, 1.0, engine).load.kv_tokens for p in prompts])
    assert mean == pytest.approx(exact)


@given(some.integers(1, 200), some.integers(0, 80), some.integers(0, 80))
def test_charge_sum_counts_whole_blocks(prompt: int, first: int, width: int) -> None:
    last = first + width - 1
    assert charge_sum(prompt, first, last, EngineConfig.vllm()) == sum(-(-(prompt + s) // 16) * 16 for s in range(first, last + 1))
    assert charge_sum(prompt, first, last, paper()) == sum(prompt + s for s in range(first, last + 1))


@pytest.mark.parametrize(
    ("prompt", "output", "expected"),
    [(10, 10, 165), (10, 20, 420), (1, 1, 3), (1, 2, 6), (512, 20, 10_962), (512, 50, 27_387), (512, 1000, 1_013_012)],
)
def test_kv_iterations_of_a_request(prompt: int, output: int, expected: float) -> None:
    assert fluid_equilibrium([prompt], [output], [1.0], paper()).kv_rate == expected


# --- equilibrium ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("types", "d0", "d1", "a", "rho", "cycle", "per_stage", "memory", "throughput"),
    [
        ([(10, 10, 2), (10, 20, 1)], 0.1, 1e-3, 750, 0.75, 0.4, (0.8, 0.4), 300, 40),
        ([(10, 10, 2), (10, 20, 1)], 1.0, 1e-3, 750, 0.75, 4, (8, 4), 3000, 40),
        ([(1, 1, 1), (1, 2, 1)], 0.5, 1 / 18, 9, 0.5, 1, (1, 1), 9, 3),
        ([(1, 1, 4)], 1.0, 0.0, 12, 0.0, 1, (4,), 12, 4),
    ],
)
def test_worked_examples(types, d0, d1, a, rho, cycle, per_stage, memory, throughput) -> None:  # type: ignore[no-untyped-def]
    prompt, output, rate = zip(*types, strict=True)
    found = fluid_equilibrium(prompt, output, rate, paper(d0=d0, d1=d1))
    assert found.kv_rate == pytest.approx(a, rel=1e-14)
    assert found.rho == pytest.approx(rho, rel=1e-14)
    assert found.iteration_seconds == pytest.approx(cycle, rel=1e-14)
    assert found.per_stage == pytest.approx(per_stage, rel=1e-14)
    assert found.kv_tokens == pytest.approx(memory, rel=1e-14)
    assert found.load == pytest.approx(memory, rel=1e-14)
    assert found.throughput_tokens == throughput
    assert found.stable and found.fits and found.feasible


def test_per_iteration_coefficients_of_lmsys_leave_p512d20_nearly_idle() -> None:
    found = fluid_equilibrium([512], [20], [23.0], paper(d0=10.6e-3, d1=0.401e-6))
    assert found.rho == pytest.approx(0.10, abs=0.005)
    assert found.kv_tokens == pytest.approx(2900, rel=0.03)


def test_unstable_and_too_large() -> None:
    unstable = fluid_equilibrium(*TWO_TYPES, [3, 1], paper(d1=2e-3))
    assert not unstable.stable and not unstable.fits
    assert math.isinf(unstable.iteration_seconds) and math.isinf(unstable.kv_tokens) and np.isinf(unstable.per_stage).all()
    edge = fluid_equilibrium(*TWO_TYPES, [2, 1], paper(3000))
    assert edge.fits and edge.kv_usage == pytest.approx(1)
    assert not fluid_equilibrium(*TWO_TYPES, [2, 1], paper(2999)).fits


def test_a_class_without_arrivals_changes_nothing() -> None:
    two, three = fluid_equilibrium(*TWO_TYPES, [2, 1], paper()), fluid_equilibrium([10, 10, 99], [10, 20, 99], [2, 1, 0], paper())
    assert three.per_stage.tolist() == [*two.per_stage.tolist(), 0.0]
    assert three.kv_tokens == two.kv_tokens
    assert fluid_equilibrium([10, 10, 99], [10, 20, 99], [4, 1, 0], paper(d1=2e-3)).per_stage.tolist() == [math.inf, math.inf, 0.0]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (([10], [10, 20], [1, 1]), r"shapes of prompt \(1,\)"),
        (([0, 10], [10, 20], [1, 1]), "fluid.prompt: value 0 is 0.0"),
        (([10, 10], [10, math.nan], [1, 1]), "fluid.output: value 1 is nan"),
        (([10, 10], [10, 20], [1, -1]), "fluid.rate: value 1 is -1.0"),
        (([10, 10], [10, 20], [1, math.nan]), "fluid.rate: value 1 is nan"),
        (([10, 10], [10, 20], [0, 0]), "fluid.rate: all zero"),
    ],
)
def test_bad_input_is_named(arguments: tuple[list[float], list[float], list[float]], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        fluid_equilibrium(*arguments, paper())


TYPES = some.lists(some.tuples(some.integers(1, 600), some.integers(1, 400), some.floats(0.01, 50)), min_size=1, max_size=5)


@given(TYPES, some.floats(1e-4, 1), some.floats(0, 1e-5), some.booleans())
def test_closed_form_equals_the_general_solver(types, d0, d1, vllm) -> None:  # type: ignore[no-untyped-def]
    engine = EngineConfig.vllm(time_model=LinearTime(d0, d1)) if vllm else paper(d0=d0, d1=d1)
    load = Fluid.of(*zip(*types, strict=True), engine).load
    assume(load.rho < 0.999)
    assert load.solve_equilibrium() == pytest.approx(load.equilibrium_seconds(), rel=1e-9)


@given(TYPES, some.floats(0.05, 0.9))
def test_equilibrium_of_the_calibrated_model_balances(types, share) -> None:  # type: ignore[no-untyped-def]
    engine = EngineConfig.vllm()
    prompt, output, rate = zip(*types, strict=True)
    statistics = LengthStatistics.of(prompt, output, rate)
    found = equilibrium_of(statistics, share * stability_boundary(statistics, engine), engine)
    # Not equal where the staircase of the model steps down (more tokens, less time) exactly at DT*.
    assert engine.time_model.seconds(found.batch) <= found.iteration_seconds * (1 + 1e-9)
    assert found.feasible
    shorter = Fluid.of(prompt, output, found.per_stage / found.iteration_seconds, engine).load.times(0.999 * found.iteration_seconds)
    assert shorter.seconds > 0.999 * found.iteration_seconds


@given(TYPES, some.booleans(), some.floats(0.05, 0.9))
def test_memory_grows_with_the_rate(types, vllm, share) -> None:  # type: ignore[no-untyped-def]
    engine = EngineConfig.vllm() if vllm else paper(d0=0.01, d1=1e-6)
    statistics = LengthStatistics.of(*zip(*types, strict=True))
    boundary = stability_boundary(statistics, engine)
    memory = [equilibrium_of(statistics, f * share * boundary, engine).kv_tokens for f in (0.5, 0.9, 1.0, 1.1)]
    assert np.all(np.diff(memory) > 0)


# --- stability boundary ---------------------------------------------------------------------------


@given(TYPES, some.integers(2_000, 200_000), some.floats(1e-4, 1), some.floats(0, 1e-3))
def test_boundary_of_the_paper_preset_is_closed(types, capacity, d0, d1) -> None:  # type: ignore[no-untyped-def]
    engine = paper(capacity, d0, d1)
    statistics = LengthStatistics.of(*zip(*types, strict=True))
    rate = stability_boundary(statistics, engine)
    assert equilibrium_of(statistics, rate, paper(1)).kv_rate == pytest.approx(capacity / (d0 + d1 * capacity), rel=1e-12)


@pytest.mark.parametrize(
    ("engine", "binding"),
    [
        (paper(3750), "kv_capacity"),
        (EngineConfig.vllm(), "max_num_batched_tokens"),
        (EngineConfig.vllm(max_num_seqs=8), "max_num_seqs"),
        (EngineConfig.vllm(num_blocks=256), "kv_capacity"),
    ],
)
def test_boundary_separates_feasible_from_infeasible(engine: EngineConfig, binding: str) -> None:
    statistics = LengthStatistics.of([100, 700], [20, 100], [0.5, 0.5])
    if binding == "max_num_batched_tokens":
        statistics = LengthStatistics.of(512, 20, 1.0)
    boundary = find_boundary(statistics, engine)
    assert boundary.binding == binding
    assert equilibrium_of(statistics, boundary.rate * (1 - 1e-6), engine).feasible
    beyond = equilibrium_of(statistics, boundary.rate * (1 + 1e-6), engine)
    assert not beyond.feasible and beyond.binding == binding
    assert equilibrium_of(statistics, boundary.rate, engine).kv_tokens == pytest.approx(boundary.kv_tokens, rel=1e-6)


# --- WAIT -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("f", "thresholds"),
    [(0.5, (2, 1)), (0.7, (4, 2)), (0.8, (5, 3)), (0.9, (7, 4)), (0.95, (9, 5)), (1.0, (10, 5)), (1.05, (10, 5))],
)
@pytest.mark.parametrize("rounding", ["auto", "integer"])
def test_rate_sweep(f: float, thresholds: tuple[int, int], rounding: str) -> None:
    found = wait_thresholds(*TWO_TYPES, [2 * f, f], paper(3750), rounding=rounding)  # type: ignore[arg-type]
    assert found.thresholds.tolist() == list(thresholds)
    assert found.rounding == "integer" and not found.overload and found.notes == ()
    assert found.kv_tokens == found.kv_tokens_worst == thresholds[0] * 165 + thresholds[1] * 420
    assert found.iteration_seconds == pytest.approx(1 + 1e-3 * found.kv_tokens)
    assert found.cycle_seconds == pytest.approx(min(1.25 / (1 - 0.75 * f), 5 / f))


def test_rate_sweep_beyond_the_boundary() -> None:
    numbers = r"4714\.29 KV tokens .* > C = 3750; .* 3\.15789 requests/s .* engine.capacity_tokens >= 4715"
    with pytest.raises(InfeasibleError, match=numbers):
        wait_thresholds(*TWO_TYPES, [2.2, 1.1], paper(3750))
    found = wait_thresholds(*TWO_TYPES, [2.2, 1.1], paper(3750), overload=True)
    assert found.thresholds.tolist() == [10, 5] and found.overload
    assert found.kv_tokens == 3750
    assert "4714.29" in found.notes[0]


def test_given_thresholds_of_the_example() -> None:
    engine = paper(d0=0.1)
    found = check_wait([2, 1], *TWO_TYPES, [2, 1], engine)
    assert (found.kv_tokens, found.iteration_seconds) == (750, pytest.approx(0.85))
    assert found.cycle_seconds == 1
    numbers = r"DT\(n\) = 0\.685 s > n_j / lam_j = 1 / 2 = 0\.5 s \(class 0\); nearest feasible: n = \(2, 1\)"
    with pytest.raises(InfeasibleError, match=numbers):
        check_wait([1, 1], *TWO_TYPES, [2, 1], engine)
    assert check_wait([1, 1], *TWO_TYPES, [2, 1], engine, overload=True).overload
    assert check_wait([1, 1], *TWO_TYPES, [2, 1], engine, overload=True).kv_tokens == 585
    with pytest.raises(InfeasibleError, match=r"KV memory: 750 KV tokens per iteration > C = 749"):
        check_wait([2, 1], *TWO_TYPES, [2, 1], paper(749, d0=0.1))


def test_conditions_allow_equality() -> None:
    # d0 = 1, d1 = 0: DT = 1 = n / lam, and M^pi = 12 = C.
    found = check_wait([4], [1], [1], [4], paper(12, d0=1, d1=0))
    assert found.kv_tokens == 12 and not found.overload


def test_check_wait_refuses_malformed_thresholds() -> None:
    with pytest.raises(ConfigError, match="3 thresholds for 2 classes"):
        check_wait([1, 2, 3], *TWO_TYPES, [2, 1], paper())
    with pytest.raises(ConfigError, match="threshold 1 is nan"):
        check_wait([1, math.nan], *TWO_TYPES, [2, 1], paper())
    with pytest.raises(ConfigError, match=r"threshold 0 is 0\.0"):
        check_wait([0, 1], *TWO_TYPES, [2, 1], paper())
    with pytest.raises(ConfigError, match="slack"):
        wait_thresholds(*TWO_TYPES, [2, 1], paper(), slack=0.9)
    with pytest.raises(ConfigError, match="rounding"):
        wait_thresholds(*TWO_TYPES, [2, 1], paper(), rounding="up")  # type: ignore[arg-type]


def test_infeasible_integers_name_the_rotation() -> None:
    # n* = (0.8, 0.4): ceil gives (1, 1), and class 0 would gather 1 request in .5 s < DT; memory forbids (2, 1).
    engine = paper(700, d0=0.1)
    where = r"n = \(1, 1\) breaks iteration time.* nearest feasible: n = \(1, 0\.5\) with rounding='rotation'"
    with pytest.raises(InfeasibleError, match="no integer thresholds .*" + where):
        wait_thresholds(*TWO_TYPES, [2, 1], engine, rounding="integer")
    found = wait_thresholds(*TWO_TYPES, [2, 1], engine)
    assert found.rounding == "rotation"
    assert found.thresholds == pytest.approx([1.0, 0.5])


def test_integers_where_the_first_rounding_is_infeasible() -> None:
    # x = 4.04: ceil is (9, 5), whose DT = 4.585 > 9 / 2. x = 4.9987: (10, 5) needs 3750. The next cycle below is 4 = DT(8, 4).
    assert wait_thresholds(*TWO_TYPES, [2, 1], paper(3750), slack=1.01).thresholds.tolist() == [8, 4]
    assert wait_thresholds(*TWO_TYPES, [2, 1], paper(3749)).thresholds.tolist() == [8, 4]


@given(some.floats(0.5, 3), some.floats(0.5, 3), some.integers(300, 3000), some.floats(0.1, 1))
def test_integers_are_found_if_there_are_any(first, second, capacity, d0) -> None:  # type: ignore[no-untyped-def]
    engine, rate = paper(capacity, d0), np.array([first, second])
    box = [np.array([i, j], dtype=float) for i in range(1, capacity // 165 + 2) for j in range(1, capacity // 420 + 2)]
    memory = [float(n @ [165, 420]) for n in box]
    exist = any(m <= capacity and d0 + 1e-3 * m <= min(n / rate) for n, m in zip(box, memory, strict=True))
    try:
        found = wait_thresholds(*TWO_TYPES, rate, engine, rounding="integer")
    except InfeasibleError:
        assert not exist
    else:
        assert exist and found.rounding == "integer"


def numbers_after(pattern: str, text: str) -> float:
    match = re.search(pattern + r"([0-9.e+]+)", text)
    assert match, text
    return float(match[1])


@given(TYPES, some.floats(1.01, 3), some.sampled_from(["paper", "vllm"]))
def test_infeasible_rate_names_values_that_are_feasible(types, excess, preset) -> None:  # type: ignore[no-untyped-def]
    prompt, output, weight = zip(*types, strict=True)
    engine = paper(20_000, 0.01, 1e-6) if preset == "paper" else EngineConfig.vllm(num_blocks=256, max_num_seqs=64, time_model=FORMULA)
    statistics = LengthStatistics.of(prompt, output, weight)
    rate = excess * stability_boundary(statistics, engine) * statistics.weight
    with pytest.raises(InfeasibleError) as caught:
        wait_thresholds(prompt, output, rate, engine, rounding="rotation")
    named = numbers_after("largest total rate at this mix is ", str(caught.value))
    assert named == pytest.approx(stability_boundary(statistics, engine), rel=1e-5)
    wait_thresholds(prompt, output, named * statistics.weight, engine, rounding="rotation")
    field = "capacity_tokens" if preset == "paper" else "num_blocks"
    if field in str(caught.value):
        capacity = int(numbers_after(f"engine.{field} >= ", str(caught.value)))
        wait_thresholds(prompt, output, rate, engine.replace(**{field: capacity}), rounding="rotation")
        with pytest.raises(InfeasibleError):
            wait_thresholds(prompt, output, rate, engine.replace(**{field: capacity - 1}), rounding="rotation")


BUCKETS = some.lists(
    some.tuples(some.integers(1, 300), some.integers(1, 200), some.floats(0.1, 5), some.integers(0, 2)), min_size=1, max_size=6
)


@given(
    BUCKETS,
    some.floats(0.02, 1.3),
    some.sampled_from(["auto", "integer", "rotation"]),
    some.sampled_from(["paper", "vllm"]),
    some.booleans(),
)
def test_returned_thresholds_meet_the_conditions(points, share, rounding, preset, coarse) -> None:  # type: ignore[no-untyped-def]
    prompt, output, weight, ids = (np.array(c) for c in zip(*points, strict=True))
    d0 = 20.0 if coarse else 0.01  # large d0: many requests a stage, integers feasible
    engine = paper(200_000, d0, 1e-6) if preset == "paper" else EngineConfig.vllm(max_num_seqs=64, time_model=FORMULA)
    statistics = LengthStatistics.of(prompt, output, weight)
    rate = share * stability_boundary(statistics, engine) * statistics.weight
    try:
        found = wait_thresholds(prompt, output, rate, engine, class_id=ids, num_classes=3, rounding=rounding)
    except InfeasibleError as error:
        assert share > 1 or ("no integer thresholds" in str(error) and rounding == "integer")
        return
    assert share <= 1 and not found.overload
    verify_wait(found, prompt, output, rate, ids, engine)
    if rounding != "auto":
        assert found.rounding == rounding or np.all(found.thresholds == np.round(found.thresholds))


@given(BUCKETS, some.one_of(some.floats(0.02, 1), some.just(1.0)))
@example([(1, 27, 3.0, 0), (126, 1, 2.0, 0)], 1.0)  # 64 residents fill a tile, and a 65th makes an iteration longer than it adds
def test_stairs_of_a_measured_table_leave_thresholds_up_to_the_boundary(points, share) -> None:  # type: ignore[no-untyped-def]
    prompt, output, weight, ids = (np.array(c) for c in zip(*points, strict=True))
    engine = EngineConfig.vllm(max_num_seqs=64)
    statistics = LengthStatistics.of(prompt, output, weight)
    rate = share * stability_boundary(statistics, engine) * statistics.weight
    found = wait_thresholds(prompt, output, rate, engine, class_id=ids, num_classes=3)
    assert not found.overload
    verify_wait(found, prompt, output, rate, ids, engine)


def verify_wait(found: WaitThresholds, prompt, output, rate, ids, engine: EngineConfig) -> None:  # type: ignore[no-untyped-def]
    """Both conditions, from the passages of single requests."""
    sums, memory, residents, worst = np.zeros(BATCH_FIELDS), 0.0, 0.0, 0.0
    for j in range(3):
        mine = np.flatnonzero(ids == j)
        if not mine.size:
            assert found.thresholds[j] == 1
            continue
        lives = [passage(int(prompt[i]), int(output[i]), engine) for i in mine]
        for i, (one, held) in zip(mine, lives, strict=True):
            n = found.thresholds[j] * rate[i] / rate[mine].sum()
            sums += n * one
            residents += n * len(held)
            memory += n * (sum(held) + (7.5 * len(held) if engine.preset == "vllm" else 0))
        unit = 1 if engine.preset == "paper" else 16
        stages = max(len(held) for _, held in lives)
        worst += found.thresholds[j] * sum(max(-(-h[s] // unit) * unit for _, h in lives if len(h) > s) for s in range(stages))
    seconds = float(engine.time_model.seconds_of(sums[np.newaxis])[0])
    assert found.iteration_seconds == pytest.approx(seconds)
    assert found.kv_tokens == pytest.approx(memory)
    assert memory <= engine.kv_capacity_tokens * (1 + 1e-8)
    for j in range(3):
        arrivals = rate[ids == j].sum()
        assert arrivals == 0 or seconds <= found.thresholds[j] / arrivals * (1 + 1e-8)
    if engine.preset == "vllm":
        assert sums[0] + sums[3] <= engine.max_num_batched_tokens * (1 + 1e-8)
        assert residents <= engine.max_num_seqs * (1 + 1e-8)
    if np.all(found.thresholds == np.round(found.thresholds)):
        assert found.kv_tokens_worst == pytest.approx(worst)
    else:
        assert found.kv_tokens_worst > worst


@given(some.floats(0.01, 30), some.integers(0, 10_000), some.integers(1, 200))
def test_rotation_spreads_the_threshold(n: float, start: int, window: int) -> None:
    quota = [int(rotation_quota([n], [i])[0]) for i in range(start, start + window)]
    assert set(quota) <= {math.floor(n), math.ceil(n), round(n)}
    assert abs(sum(quota) - window * n) < 1 + 1e-4


@pytest.mark.parametrize("n", [1, 7, 12_345])
def test_rotation_of_an_integer_is_that_integer(n: int) -> None:
    assert np.all(rotation_quota(np.full(1000, float(n)), np.arange(9_999_000, 10_000_000)) == n)


@pytest.mark.parametrize(
    ("prompt", "output", "d0"), [((100, 5, 40), (3, 40, 9), 0.3), ((1000, 1, 1), (1, 2, 1), 0.08), ((9, 300, 1), (60, 7, 1), 0.01)]
)
def test_rotation_never_holds_more_than_the_worst_case(prompt: tuple[int, ...], output: tuple[int, ...], d0: float) -> None:
    """WAIT on buckets whose residents are all as long as their stage allows: memory of every iteration."""
    ids = np.array([0, 0, 1])
    found = wait_thresholds(prompt, output, [1.0, 2.0, 1.5], paper(100_000, d0, 1e-7), class_id=ids, rounding="rotation")
    assert np.all(found.thresholds != np.round(found.thresholds))
    charges = []
    for j in (0, 1):
        mine = [(p, o) for p, o, c in zip(prompt, output, ids, strict=True) if c == j]
        charges.append(np.array([max(p + s for p, o in mine if o >= s) for s in range(max(o for _, o in mine) + 1)]))
    iterations = np.arange(2000)
    peak = 0.0
    for j in (0, 1):
        quota = rotation_quota(found.thresholds[j], iterations)
        peak += max(np.convolve(quota, charges[j]))
    assert found.kv_tokens < peak <= found.kv_tokens_worst


def test_classes_of_a_layout() -> None:
    statistics = LengthStatistics.of([10, 10, 10], [10, 20, 400], [2, 1, 1])
    points = class_profiles(statistics, QueueLayout(by="output", edges=(15, 100)))
    assert points.class_id.tolist() == [0, 1, 2] and points.num_classes == 3
    empty = class_profiles(statistics, QueueLayout(by="output", edges=(15, 100, 1000)))
    assert empty.num_classes == 4 and empty.class_id.max() == 2
    engine = paper(10**6, d0=10.0, d1=1e-6)
    by_layout = wait_thresholds_of(statistics, QueueLayout(by="output", edges=(100,)), 4.0, engine)
    alone = wait_thresholds([10, 10, 10], [10, 20, 400], [2, 1, 1], engine, class_id=[0, 0, 1])
    assert by_layout.thresholds.tolist() == alone.thresholds.tolist()
    # Class 0 is two (10, 10) to one (10, 20): S = (2 * 165 + 420) / 3 = 250.
    assert by_layout.kv_tokens == pytest.approx(by_layout.thresholds @ [250, 401 * 210])
    assert by_layout.kv_tokens_worst == pytest.approx(by_layout.thresholds @ [420, 401 * 210])


def test_overload_in_integer_mode_keeps_at_least_one() -> None:
    found = wait_thresholds([100], [100], [50.0], paper(1000, d0=1.0), rounding="integer", overload=True)
    assert found.thresholds.tolist() == [1]
    assert any("breaks KV memory" in note for note in found.notes)
    rotating = wait_thresholds([100], [100], [50.0], paper(1000, d0=1.0), overload=True)
    assert rotating.rounding == "rotation" and rotating.kv_tokens == pytest.approx(1000)


# --- time-varying rates ---------------------------------------------------------------------------


def test_window_rates_of_examples() -> None:
    assert window_rates([10, 10], [1, 3], 5) == 3
    assert window_rates([10, 10], [1, 3], 15) == pytest.approx((5 + 30) / 15)
    assert window_rates([1, 1, 1], [0, 6, 0], 2) == 3
    assert window_rates([1, 1], [4, 0], 4) == 1  # a window longer than the pattern
    assert window_rates([1, 1], [4, 0], 1.5, periodic=True) == pytest.approx(4 / 1.5)
    assert window_rates([1, 1], [4, 0], 3, periodic=True) == pytest.approx(8 / 3)
    assert window_rates([1, 1], [[4, 0], [0, 2]], 1).tolist() == [4, 2]
    for bad in (([0, 1], [1, 1], 1), ([1, 1], [1], 1), ([1, 1], [1, -1], 1), ([1, 1], [1, 1], 0)):
        with pytest.raises(ConfigError, match="window_rates"):
            window_rates(*bad)


@given(some.lists(some.tuples(some.integers(1, 6), some.integers(0, 9)), min_size=1, max_size=5), some.integers(1, 12), some.booleans())
def test_window_rates_against_every_start(pieces, window, periodic) -> None:  # type: ignore[no-untyped-def]
    per_second = np.array([r for span, r in pieces for _ in range(span)], dtype=float)
    assume(periodic or window <= per_second.size)
    tiled = np.tile(per_second, 2 + window // per_second.size + 1) if periodic else per_second
    starts = per_second.size if periodic else per_second.size - window + 1
    best = max(tiled[s : s + window].sum() for s in range(starts)) / window  # integer spans: an extreme start is an integer
    assert window_rates(*zip(*pieces, strict=True), window, periodic=periodic) == pytest.approx(best)
