"""The guarantee of the virtual token counter on the engine: a noisy neighbour takes no more than the bound.

arXiv 2401.00588, Theorem 4.4: for two clients that are backlogged all through an interval the service they receive in it differs by
at most 2 U, U = max(w_p L_input, w_q M), with L_input the longest prompt and M the tokens of a running batch. The proof
needs of M that a client's counter rises by no more than w_q M after its last admission: M is the sum of what the requests of
one batch are in the end. The engine admits by what requests hold now, so that this sum may exceed the KV capacity; it is
measured here. With weights: U / weight of the one + U / weight of the other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmsched_env.engine.simulator import SimBackend
from llmsched_env.engine.state import INPUT_PRICE, OUTPUT_PRICE
from llmsched_env.engine_config import EngineConfig, EpisodeLimits
from llmsched_env.types import ADMIT_ALL, Decision, Workload
from tests.tenant_cases import Course, built, course, workload

BACKEND = SimBackend()


@st.composite
def engines(draw: st.DrawFn) -> EngineConfig:
    """Small engines of both presets: memory for a few requests."""
    if draw(st.integers(0, 4)) == 0:
        return EngineConfig.paper(draw(st.integers(120, 400)), d0=0.01, d1=1e-5)
    block_size = draw(st.sampled_from((1, 3, 16)))
    seqs = draw(st.integers(1, 12))
    chunked = draw(st.booleans())
    return EngineConfig.vllm(
        num_blocks=-(-draw(st.integers(128, 400)) // block_size),
        block_size=block_size,
        max_model_len=120,
        max_num_seqs=seqs,
        max_num_batched_tokens=draw(st.integers(max(seqs, 12), 200)) if chunked else draw(st.integers(120, 200)),
        enable_chunked_prefill=chunked,
        scheduler_reserve_full_isl=draw(st.booleans()),
        watermark=draw(st.sampled_from((0.0, 0.05))),
        late_after=draw(st.sampled_from((0.0, 0.5))),
    )


weights_of = st.lists(st.sampled_from((0.25, 1.0, 1.0, 2.0, 5.0)), min_size=2, max_size=5).map(tuple)


def counted(one: Course, requests: Workload, tenants: int) -> None:
    """The engine's service is the prompts and outputs of the requests, all of which completed; with lost progress more comes out."""
    final, lost = one.service[-1], BACKEND.record.settings.lose_progress
    for j in range(tenants):
        mine = requests.tenant == j
        received = INPUT_PRICE * requests.prompt_tokens[mine].sum() + OUTPUT_PRICE * requests.output_tokens[mine].sum()
        assert final[j] == received or (lost and final[j] > received)
    assert (np.diff(one.service, axis=0) >= 0).all()


@settings(max_examples=150, deadline=None)
@given(engine=engines(), weights=weights_of, seed=st.integers(0, 2**31 - 1), count=st.integers(1, 80))
def test_service_of_backlogged_tenants_differs_by_no_more_than_the_bound(
    engine: EngineConfig, weights: tuple[float, ...], seed: int, count: int
) -> None:
    requests = workload(np.random.default_rng(seed), count, len(weights))
    one = course(built("vtc", requests, engine, weights), requests, BACKEND)
    assert BACKEND.end == "finished" and BACKEND.record.drain_iterations == 0
    np.testing.assert_array_equal(one.asked, one.admitted)  # so the order decided is the order of admission
    counted(one, requests, len(weights))
    assert one.largest_gap(weights)[1] <= 1.0


@settings(max_examples=60, deadline=None)
@given(engine=engines(), weights=weights_of, seed=st.integers(0, 2**31 - 1), count=st.integers(1, 80))
def test_weighted_fair_queueing_admits_what_it_decides(engine: EngineConfig, weights: tuple[float, ...], seed: int, count: int) -> None:
    requests = workload(np.random.default_rng(seed), count, len(weights))
    one = course(built("wfq", requests, engine, weights), requests, BACKEND)
    assert BACKEND.end == "finished" and BACKEND.record.drain_iterations == 0
    np.testing.assert_array_equal(one.asked, one.admitted)


NOISY = EngineConfig.vllm(num_blocks=24, max_model_len=128, max_num_seqs=8, max_num_batched_tokens=128)


def noisy_neighbour(count: int = 300) -> Workload:
    """Tenant 1 sends ten times as many requests as tenant 0, all at once."""
    tenant = np.array([0] * (count // 10) + [1] * count)
    order = np.random.default_rng(0).permutation(tenant.size)
    return Workload.of(np.zeros(tenant.size), np.full(tenant.size, 40), np.full(tenant.size, 30), tenant=tenant[order])


def test_first_come_first_served_breaks_the_bound_and_vtc_keeps_it() -> None:
    requests, weights = noisy_neighbour(), (1.0, 1.0)
    shares = {}
    for name in ("vtc", "wfq", "tenant-priority"):
        shares[name] = course(built(name, requests, NOISY, weights), requests).largest_gap(weights)[1]
    policy = built("vtc", requests, NOISY, weights)

    class Greedy:
        """First come, first served over the same queues, whose service is counted."""

        name, known_lengths, notes = "fcfs", False, ""
        layout, engine = policy.layout, policy.engine

        def reset(self) -> None: ...

        def decide(self, view: object) -> Decision:
            return Decision.of([1] * 2, [ADMIT_ALL] * 2)

    shares["fcfs"] = course(Greedy(), requests).largest_gap(weights)[1]
    assert shares["vtc"] <= 1.0 < shares["fcfs"], shares
    assert shares["wfq"] <= 1.0 < shares["tenant-priority"], shares


@pytest.mark.parametrize(
    "changes",
    [
        {"enable_prefix_caching": True},
        {"async_scheduling": True},
        {"prefill_schedule_interval": 3},
        {"long_prefill_token_threshold": 16},
        {"scheduling_policy": "priority"},
        {"decode_needs_free_block": True},
        {"padded_prefill": True},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_where_the_room_is_uncertain_one_request_an_iteration_keeps_the_bound(changes: dict[str, object]) -> None:
    engine, weights = NOISY.replace(**changes), (1.0, 3.0, 1.0)
    for seed in range(12):
        requests = workload(np.random.default_rng(seed), 60, 3)
        for name in ("vtc", "wfq"):
            one = course(built(name, requests, engine, weights), requests, BACKEND)
            assert BACKEND.end == "finished" and one.asked.sum(axis=1).max() <= 1
            assert name != "vtc" or one.largest_gap(weights)[1] <= 1.0


def test_a_tenant_that_was_away_has_no_claim_on_what_it_did_not_ask_for() -> None:
    """Without the lift the tenant that comes at 2 s would be served alone until it had received as much as the other."""
    early, late = 200, 60
    requests = Workload.of(
        np.repeat([0.0, 2.0], [early, late]), np.full(early + late, 40), np.full(early + late, 30), tenant=np.repeat([0, 1], [early, late])
    )
    one = course(built("vtc", requests, NOISY, (1.0, 1.0)), requests)
    both = np.flatnonzero(one.stayed.all(axis=1))
    gained = one.service[both[-1] + 1] - one.service[both[0]]
    assert gained.min() > 0.7 * gained.max()


@settings(max_examples=40, deadline=None)
@given(engine=engines(), weights=weights_of, seed=st.integers(0, 2**31 - 1))
def test_each_choice_is_the_tenant_with_the_least_counter(engine: EngineConfig, weights: tuple[float, ...], seed: int) -> None:
    """The execution stream of Algorithm 2: one choice after the other, each prompt charged when its request is chosen."""
    requests = workload(np.random.default_rng(seed), 60, len(weights))
    policy = built("vtc", requests, engine, weights)
    policy.reset()
    view = BACKEND.reset(requests, policy.layout, engine, EpisodeLimits())
    while not BACKEND.done:
        counters = BACKEND.record.queues.rows["counter"][: len(weights)].copy()
        queues = [view.waiting_requests(j, 1_000) for j in range(len(weights))]
        asked = policy.decide(view).admit.tolist()
        chosen = [0] * len(weights)
        for _ in range(sum(asked)):
            waiting = [j for j, queue in enumerate(queues) if chosen[j] < queue.id.size]
            j = min(waiting, key=lambda j: counters[j])
            if queues[j].key[chosen[j]] >= 0:
                counters[j] += queues[j].prompt_tokens[chosen[j]] * INPUT_PRICE / weights[j]
            chosen[j] += 1
        assert chosen == asked
        assert policy.rule is not None
        BACKEND.step(policy.rule.decision)


@pytest.mark.parametrize("seed", range(10))
def test_counters_are_those_of_the_monitoring_stream(seed: int) -> None:
    """Algorithm 2 step by step in Python, on an engine that never preempts: arrivals lift, prompts and tokens charge."""
    weights = (1.0, 2.0, 0.5, 1.0)
    requests = workload(np.random.default_rng(seed), 120, 4, seconds=6.0)
    engine = EngineConfig.vllm(num_blocks=500, max_model_len=128, max_num_seqs=4, max_num_batched_tokens=64)
    policy = built("vtc", requests, engine, weights)
    policy.reset()
    view = BACKEND.reset(requests, policy.layout, engine, EpisodeLimits())
    record = BACKEND.record
    assert requests.tenant is not None
    counters, waiting, last, arrived, lifts = np.zeros(4), np.zeros(4, dtype=int), -1, 0, 0

    def arrive() -> int:
        nonlocal arrived
        count = 0
        while arrived < len(requests) and requests.arrival[arrived] <= record.clock:
            u = int(requests.tenant[arrived])  # type: ignore[index]
            if waiting[u] == 0:
                others = counters[waiting > 0]
                least = others.min() if others.size else counters[last] if last >= 0 else 0.0
                count += least > counters[u]
                counters[u] = max(counters[u], least)
            waiting[u] += 1
            arrived += 1
        return count

    arrive()
    while not BACKEND.done:
        before = record.next_sequence
        generated = _generated(record)
        BACKEND.step(policy.decide(view))
        rows = record.requests.rows
        new = np.flatnonzero((rows["sequence"] >= before) & (rows["status"] > 1)) if record.next_sequence > before else []
        for r in sorted(new, key=lambda r: rows["sequence"][r]):
            j = int(requests.tenant[r])
            counters[j] += INPUT_PRICE * requests.prompt_tokens[r] / weights[j]
            waiting[j] -= 1
            last = j if waiting[j] == 0 else last
        more = _generated(record) - generated
        for j in range(4):
            counters[j] += OUTPUT_PRICE * more[requests.tenant == j].sum() / weights[j]
        lifts += arrive()
        np.testing.assert_allclose(record.queues.rows["counter"][:4], counters, rtol=1e-12)
    assert record.evictions == 0 and lifts > 0


def _generated(record: Any) -> np.ndarray:
    """(N,) output tokens of each request so far."""
    rows = record.requests.rows
    tokens: np.ndarray = rows["base_generated"] + record.queues.rows["steps"][rows["group"]]
    return tokens
