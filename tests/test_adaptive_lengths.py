"""Output lengths learned while requests run: the estimate by hand, its moments, and changes that are seen or not."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from llmsched_agents.adaptive import Adaptive
from llmsched_agents.adaptive_lengths import (
    POOL_REQUESTS,
    PRIOR_MEAN,
    PRIOR_REQUESTS,
    REMEMBERED,
    LengthsRecord,
    bin_edges,
    fill_forecast,
    forget_lengths,
    learn_lengths,
    lengths_record,
    met_hazard,
    moments_of,
    note_completions,
    survival_at,
)
from llmsched_baselines import Setting
from llmsched_env.bench.suite import one_after_the_other
from llmsched_env.engine.simulator import SimBackend
from llmsched_env.engine_config import EngineConfig, EpisodeLimits
from llmsched_env.perf import LinearTime
from llmsched_env.runner import run_episode
from llmsched_env.types import Decision, LengthStatistics, QueueLayout, Workload
from llmsched_env.workload import load_scenario

LONGEST = 400
LAYOUT = QueueLayout("prompt", (10, 20, 30))
GROUPS = [0, 0, 1, 2]
ENGINE = EngineConfig.vllm(num_blocks=4_000, max_model_len=500, time_model=LinearTime(0.01, 0.0))


def observed(workload: Workload, iterations: int, engine: EngineConfig = ENGINE) -> tuple[LengthsRecord, SimBackend, list[tuple[int, int]]]:
    """What is known after so many greedy iterations, the engine, and (class, output) of the completions in their order."""
    lengths = lengths_record(GROUPS, LONGEST)
    backend = SimBackend()
    backend.reset(workload, LAYOUT, engine, EpisodeLimits())
    greedy = Decision.greedy(LAYOUT.num_queues)
    forget_lengths(lengths)
    learn_lengths(backend.record, lengths)
    completed: list[tuple[int, int]] = []
    for _ in range(iterations):
        report = backend.step(greedy)
        note_completions(backend.record, lengths)
        ended = backend.record.events.finished[: report.completed].tolist()
        completed += [(int(np.searchsorted(LAYOUT.edges, workload.prompt_tokens[r])), int(workload.output_tokens[r])) for r in ended]
    learn_lengths(backend.record, lengths)
    return lengths, backend, completed


def reference(completed: list[tuple[int, int]], residents: list[tuple[int, int]]) -> dict[int, list[float]]:
    """Survival at the edges of every group: (class, output) completed, (class, tokens so far) resident."""
    edges = bin_edges(LONGEST)
    weights = [(1.0 + 1.0 / REMEMBERED) ** (i - len(completed)) for i in range(len(completed))]

    def counts(low: int, high: int, groups: set[int]) -> tuple[float, float]:
        mine = [(w, o) for w, (j, o) in zip(weights, completed, strict=True) if GROUPS[j] in groups]
        ended = sum(w for w, o in mine if low < o <= high)
        reached = sum(w for w, o in mine if o > low) + sum(1 for j, g in residents if GROUPS[j] in groups and g >= high)
        return ended, reached

    found = {}
    for group in sorted(set(GROUPS)):
        survival = [1.0]
        for low, high in pairwise(edges):
            ended, reached = counts(low, high, set(GROUPS))
            prior = 1.0 - math.exp(-(high - low) / PRIOR_MEAN)
            pooled = (ended + PRIOR_REQUESTS * prior) / (reached + PRIOR_REQUESTS)
            ended, reached = counts(low, high, {group})
            survival.append(survival[-1] * (1.0 - (ended + POOL_REQUESTS * pooled) / (reached + POOL_REQUESTS)))
        found[group] = survival
    return found


def test_bins_are_single_lengths_first_and_quarters_of_an_octave_then() -> None:
    assert bin_edges(20) == [0, 1, 2, 3, 4, 5, 6, 8, 9, 11, 13, 16, 19, 22]
    lengths = lengths_record([0], 20)
    held = [int(lengths.place[g]) for g in range(21)]  # of one that has generated g, whose output is above g
    assert held == [0, 1, 2, 3, 4, 5, 6, 6, 7, 8, 8, 9, 9, 10, 10, 10, 11, 11, 11, 12, 12]


@pytest.mark.parametrize("iterations", [1, 12, 60, 250])
def test_the_estimate_is_kaplan_and_meiers(iterations: int) -> None:
    g = np.random.default_rng(iterations)
    n = 90
    workload = Workload.of(np.sort(g.uniform(0, 2, n)), g.integers(1, 45, n), g.choice([1, 2, 3, 7, 8, 9, 40, 64, 65, 200, 380], n))
    lengths, backend, completed = observed(workload, iterations)
    seen = backend.snapshot().resident_requests()
    residents = list(zip(seen.queue.tolist(), seen.generated.tolist(), strict=True))
    assert iterations != 60 or (completed and residents)
    for group, survival in reference(completed, residents).items():
        size = len(survival)
        np.testing.assert_allclose(lengths.survival[group * size : (group + 1) * size], survival, rtol=1e-12, atol=1e-15)


def test_nothing_seen_is_the_prior() -> None:
    lengths, _, completed = observed(Workload.of([0.0], [5], [300]), 0)
    assert not completed
    edges = np.array(bin_edges(LONGEST), dtype=float)
    for group in range(3):
        at = np.array([survival_at(lengths, group, edge) for edge in edges])
        np.testing.assert_allclose(at, np.exp(-edges / PRIOR_MEAN), rtol=1e-12)


def with_survival(survival: Any, longest: int = LONGEST) -> LengthsRecord:
    """One group with this survival at the edges."""
    lengths = lengths_record([0], longest)
    values = np.array([survival(edge) for edge in lengths.edges])
    lengths.survival[:] = values
    lengths.before[1:] = np.cumsum(1.0 - values[1:] / np.maximum(values[:-1], 1e-300))
    return lengths


@pytest.mark.parametrize(
    "survival",
    [lambda x: math.exp(-x / 90), lambda x: 1 / (1 + x / 50), lambda x: float(x < 1), lambda x: max(0.0, 1 - x / 64), lambda x: 1.0],
)
def test_moments_are_those_of_the_distribution(survival: Callable[[float], float]) -> None:
    """Token by token: every whole length has what the survival loses there, and what survives the last edge is as long as that."""
    lengths = with_survival(survival)
    moments_of(lengths, 0)
    last = int(lengths.edges[-1])
    above = np.array([survival_at(lengths, 0, float(k)) for k in range(last + 1)])
    outputs = np.arange(1, last + 1)
    mass = above[:-1] - above[1:]
    assert lengths.mean[0] == pytest.approx((mass * outputs).sum() + above[-1] * last, rel=1e-12)
    assert lengths.square[0] == pytest.approx((mass * outputs**2).sum() + above[-1] * last**2, rel=1e-12)


def test_moments_are_near_the_integrals_of_the_survival() -> None:
    lengths = with_survival(lambda x: math.exp(-x / 300), 10_000)
    moments_of(lengths, 0)
    x = np.linspace(0, 10_000, 1_000_001)
    assert lengths.mean[0] == pytest.approx(np.trapezoid(np.exp(-x / 300), x), rel=0.01)
    assert lengths.square[0] == pytest.approx(np.trapezoid(2 * x * np.exp(-x / 300), x), rel=0.02)


def test_one_token_is_one_token() -> None:
    lengths = with_survival(lambda x: float(x < 1))
    moments_of(lengths, 0)
    assert lengths.mean[0] == lengths.square[0] == 1.0


def test_the_forecast_is_a_ratio_of_survivals() -> None:
    lengths = with_survival(lambda x: math.exp(-x / 90))
    steps = np.array([0.0, 1.0, 8.0, 100.0, 5_000.0])
    bins = lengths.edges.size - 1
    table = np.zeros((1, bins, steps.size), dtype=np.float32)
    fill_forecast(lengths, steps, table)
    assert (table[:, :, 0] == 1.0).all() and (np.diff(table, axis=2) <= 0).all() and (table >= 0).all()
    for b in range(bins):
        middle = (lengths.edges[b] + lengths.edges[b + 1]) // 2
        inside = middle + steps < lengths.edges[-1]
        np.testing.assert_allclose(table[0, b][inside], np.exp(-steps[inside] / 90), rtol=0.03)


@pytest.mark.parametrize("survival", [lambda x: math.exp(-x / 20), lambda x: max(0.0, 1 - x / 22), lambda x: max(0.0, 1 - x / 128)])
def test_completions_equal_hazards_in_the_mean(survival: Callable[[float], float]) -> None:
    """After any number of tokens: those that have ended, less what counts against them and those that are still there."""
    lengths = with_survival(survival)
    above = [survival_at(lengths, 0, float(k)) for k in range(LONGEST)]
    for tokens in (1, 2, 5, 7, 10, 12, 15, 18, 19, 40, 100, 127, 128, 200):
        ended = expected = 0.0
        for output in range(1, tokens + 1):
            mass = above[output - 1] - above[output]
            ended += mass
            expected += mass * lengths.before[int(lengths.place[output - 1]) + 1]
        if above[tokens] > 0:
            expected += above[tokens] * met_hazard(lengths, 0, tokens)
        assert ended == pytest.approx(expected, abs=1e-12)


# --- in episodes ------------------------------------------------------------------------------------------
STATISTICS = LengthStatistics.of([100.0], [100.0], [1.0])
LARGE = EngineConfig.vllm(num_blocks=30_000, max_num_seqs=1_024, max_model_len=16_000, time_model=LinearTime(0.02, 1e-7))


def adaptive(engine: EngineConfig) -> Adaptive:
    return Adaptive(Setting(STATISTICS, 1.0, engine))


def outputs(kind: str, seed: int, n: int) -> Any:
    """Lengths of mean 400 (geometric) and about 450 (log-normal)."""
    g = np.random.default_rng(seed)
    if kind == "geometric":
        return g.geometric(1 / 400, n).clip(1, 6_000)
    return np.ceil(g.lognormal(math.log(270), 1.0, n)).astype(int).clip(1, 8_000)


def workload_of(output: Any, seed: int, rate: float = 6.0) -> Workload:
    g = np.random.default_rng((seed, 1))
    n = len(output)
    return Workload.of(np.cumsum(g.exponential(1 / rate, n)), g.integers(40, 60, n), output)


def expected_output(policy: Adaptive) -> float:
    record = policy.rule.policy
    weight = record.arrivals
    return float((weight * record.lengths.mean[record.lengths.group]).sum() / weight.sum())


@pytest.mark.parametrize("kind", ["geometric", "heavy"])
def test_requests_that_are_still_resident_are_not_missed(kind: str) -> None:
    """Early on the mean of what has completed is far too low, the estimate is not; five seeds, the mean of their ratios to the truth."""
    truth = outputs(kind, 99, 400_000).mean()
    naive, early, late = [], [], []
    for seed in range(5):
        output = outputs(kind, seed, 3_000)
        workload = workload_of(output, seed)
        for seconds, found in ((25.0, early), (300.0, late)):
            policy = adaptive(LARGE)
            log = run_episode(policy, workload, limits=EpisodeLimits(horizon=seconds)).log
            found.append(expected_output(policy) / truth)
            if found is early:
                naive.append(output[log.completed > 0].mean() / truth)
    assert np.mean(naive) < 0.65
    assert abs(np.mean(early) - 1) < (0.05 if kind == "geometric" else 0.2)
    assert abs(np.mean(late) - 1) < 0.05 and np.abs(np.array(late) - 1).max() < 0.12


@pytest.mark.parametrize("name", ["azure-conv", "sharegpt"])
@pytest.mark.parametrize("seed", range(4))
def test_no_change_is_seen_where_there_is_none(name: str, seed: int) -> None:
    scenario = load_scenario(name)
    policy = adaptive(scenario.engine)
    run_episode(policy, scenario.generate(seed, num_requests=3_000))
    assert policy.rule.policy.lengths.changes == 0
    assert policy.rule.policy.lengths.finished > 2_500


@pytest.mark.parametrize("seed", range(3))
def test_nor_where_hundreds_complete_before_anything_is_learned(seed: int) -> None:
    """Large batches of prompts with short outputs: the first completions are expected by the prior alone."""
    policy = adaptive(load_scenario("azure-code").engine.replace(num_blocks=27_413, max_num_batched_tokens=8_192))
    scenario = load_scenario("azure-code")
    run_episode(policy, scenario.generate(seed, num_requests=2_000))
    assert policy.rule.policy.lengths.changes == 0


@pytest.mark.parametrize("output", [1, 2, 8, 100, 128, 129, "two", "short", "even"])
def test_nor_where_lengths_are_constant_short_or_few(output: int | str) -> None:
    """Lengths at the very end of a bin, and bins in which nearly everybody ends."""
    g, n = np.random.default_rng(0), 2_500
    drawn = {"two": g.choice([64, 512], n), "short": g.geometric(0.4, n), "even": g.integers(1, 500, n)}
    policy = adaptive(load_scenario("azure-conv").engine)
    run_episode(policy, workload_of(drawn[output] if isinstance(output, str) else np.full(n, output), 3, rate=4.0))
    assert policy.rule.policy.lengths.changes == 0
    assert policy.rule.policy.lengths.finished > 2_000


@pytest.mark.parametrize("seed", range(3))
def test_nor_in_the_paper_preset(seed: int) -> None:
    scenario = load_scenario("two-type")
    policy = adaptive(scenario.engine)
    run_episode(policy, scenario.generate(seed, num_requests=3_000))
    assert policy.rule.policy.lengths.changes == 0


@pytest.mark.parametrize("names", [("azure-conv", "sharegpt"), ("sharegpt", "azure-conv")])
@pytest.mark.parametrize("seed", range(2))
def test_a_shift_of_the_workload_is_followed(names: tuple[str, str], seed: int) -> None:
    """As the suite's part ``shift`` goes from one scenario to the other. Shorter lengths are so near that not every seed shows a change."""
    first, second = (load_scenario(name) for name in names)
    workload = one_after_the_other(
        first.generate(seed, rate=0.8 * first.rate, num_requests=2_000),
        second.generate(seed + 9, rate=0.8 * second.rate, num_requests=2_000),
    )
    shift, end = workload.arrival[1_999], workload.arrival[-1]
    seen = {}
    for share in (0.0, 0.3, 1.0):
        policy = adaptive(first.engine)
        run_episode(policy, workload, limits=EpisodeLimits(horizon=shift + share * (end - shift)))
        seen[share] = (policy.rule.policy.lengths.changes, expected_output(policy) / second.statistics.mean_output)
    assert seen[0.0][0] == 0 and seen[1.0][0] <= 1
    assert abs(seen[1.0][1] - 1) < 0.1
    if names[0] == "azure-conv":
        assert seen[0.3][0] == 1 and abs(seen[0.3][1] - 1) < 0.1


@pytest.mark.parametrize(("before", "after"), [(100, 400), (400, 100)])
def test_a_change_of_lengths_is_seen_soon(before: int, after: int) -> None:
    """Geometric lengths whose mean changes fourfold."""
    g = np.random.default_rng(5)
    n = 1_500
    output = np.concatenate([g.geometric(1 / before, n), g.geometric(1 / after, n)]).clip(1, 4_000)
    workload = workload_of(output, 5)
    change = workload.arrival[n - 1]
    seen = []
    for seconds in (0.0, 30.0, 150.0):
        policy = adaptive(LARGE)
        run_episode(policy, workload, limits=EpisodeLimits(horizon=change + seconds))
        seen.append(policy.rule.policy.lengths.changes)
    assert seen[:2] == [0, 1] and seen[2] <= 2  # the residents of before end as they would have
    assert abs(expected_output(policy) / after - 1) < 0.25  # a twentieth of what was learned before still counts
