"""Sources of calls: what programs are made of, that they fit, and that a seed is a seed."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmsched_env.cluster.calls import NO_PARENT, CallChunk, CallSource, app_parent
from llmsched_env.errors import ConfigError
from llmsched_env.workload import MMPP2, Lognormal, PiecewiseConstant, Poisson, TraceArrivals, Types, load_scenario, scenario_names
from llmsched_env.workload.programs import CHUNK_CALLS, first_programs
from llmsched_env.workload.session_statistics import SessionStatistics, load_session_statistics
from llmsched_env.workload.sessions import AgentPrograms, Apps, ChatSessions, Forks, SingleCalls, load_source, source_names

COLUMNS = [field.name for field in dataclasses.fields(CallChunk) if field.name != "lasting"]
NAMED = ["chat", "chat-bursts", "agents", "azure-conv"]


def digest(chunks: Iterable[CallChunk]) -> list[bytes]:
    return [getattr(chunk, name).tobytes() for chunk in chunks for name in COLUMNS]


def node_lengths(chunk: CallChunk) -> np.ndarray:
    """(M,) tokens that are known of each node: of the longest prompt and answer of its calls."""
    known = np.zeros(chunk.node_program.size, np.int64)
    np.maximum.at(known, chunk.node, chunk.prompt_tokens.astype(np.int64) + chunk.output_tokens)
    return known


def check_programs(chunk: CallChunk, app_tokens: np.ndarray, max_tokens: int) -> None:
    """What holds of every source: histories are contained, shares are within both lengths, everything fits."""
    chunk.check()
    prompt, output = chunk.prompt_tokens.astype(np.int64), chunk.output_tokens.astype(np.int64)
    assert (prompt + output).max() <= max_tokens
    forked = chunk.parent >= 0
    parent = chunk.parent[forked]
    assert (chunk.program[parent] == chunk.program[forked]).all(), "a parent is of the same program"
    assert (prompt[forked] >= prompt[parent] + output[parent] + 1).all(), "the history and at least one new token"
    assert (chunk.think[~forked] == 0).all()
    assert np.array_equal(np.unique(chunk.program[~forked]), np.arange(chunk.start.size)), "one root a program"
    assert (~forked).sum() == chunk.start.size
    assert np.array_equal(chunk.node_program[chunk.node], chunk.program)
    known = node_lengths(chunk)
    inner = chunk.node_parent >= 0
    assert (chunk.node_shared[inner] <= known[chunk.node_parent[inner]]).all()
    assert (chunk.node_shared < known).all()
    heads = chunk.node_parent <= -2
    assert (chunk.node_parent[heads] == app_parent(0) - chunk.app[chunk.node_program[heads]]).all()
    assert (chunk.node_shared[heads] == app_tokens[chunk.app[chunk.node_program[heads]]]).all()
    assert (chunk.node_shared[chunk.node_parent == NO_PARENT] == 0).all()


# --- chat -------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**63 - 1),
    calls=st.integers(1, 3_000),
    apps=st.one_of(st.none(), st.builds(Apps, st.integers(1, 5), st.integers(1, 400), st.floats(0.0, 3.0))),
    max_tokens=st.integers(402, 20_000),
    scales=st.tuples(st.floats(0.01, 2.0), st.floats(0.01, 3.0), st.floats(0.0, 2.0)),
    mean_turns=st.one_of(st.none(), st.floats(1.0, 20.0)),
)
def test_chat_sessions(
    seed: int, calls: int, apps: Apps | None, max_tokens: int, scales: tuple[float, float, float], mean_turns: float | None
) -> None:
    source = ChatSessions(apps, Poisson(2.0), load_session_statistics(), *scales, mean_turns, max_tokens)
    chunk = CallChunk.joined(source.chunks(seed, num_calls=calls))
    check_programs(chunk, source.app_tokens, max_tokens)
    assert np.array_equal(chunk.node, chunk.program), "one node a session"
    turn = np.flatnonzero(chunk.parent >= 0)
    assert (chunk.parent[turn] == turn - 1).all(), "a chain"
    assert calls <= len(chunk) and (chunk.program < chunk.program[-1]).sum() < calls


def test_a_session_ends_before_it_outgrows_the_context() -> None:
    fixed = SessionStatistics([0, 0, 0, 0, 1.0], [0, 1], [10, 10], [100, 100], [20, 20], [50, 50])
    source = ChatSessions(Apps(1, 30), Poisson(1.0), fixed, max_tokens=330)
    (chunk,) = source.chunks(0, num_calls=1)
    assert chunk.prompt_tokens.tolist() == [130, 200, 270] and chunk.output_tokens.tolist() == [50] * 3
    assert chunk.think.tolist() == [0, 10, 10] and chunk.node_shared.tolist() == [30]
    short = dataclasses.replace(source, max_tokens=70)
    (cut,) = short.chunks(0, num_calls=1)
    assert (cut.prompt_tokens.tolist(), cut.output_tokens.tolist()) == ([31], [39]), "the answer leaves a token for the prompt"


def test_chat_draws_the_shipped_distributions() -> None:
    known = load_session_statistics()
    means = known.record["means"]
    source = ChatSessions(None, Poisson(1.0), max_tokens=2**24)
    chunk = CallChunk.joined(source.chunks(3, num_calls=50_000))
    first, later = chunk.parent < 0, np.flatnonzero(chunk.parent >= 0)
    new = chunk.prompt_tokens[later] - chunk.prompt_tokens[later - 1] - chunk.output_tokens[later - 1]
    drawn = {
        "turns": len(chunk) / chunk.start.size,
        "seconds": chunk.think[later].mean(),
        "first_prompt": chunk.prompt_tokens[first].mean(),
        "new_tokens": new.mean(),
        "output_tokens": chunk.output_tokens.mean(),
    }
    # Some 31,000 sessions: the standard error of the widest, new_tokens, is 4 %.
    assert drawn == pytest.approx({name: means[name] for name in drawn}, rel=0.12)
    assert np.median(new) == pytest.approx(np.interp(0.5, known.levels, known.new_tokens), rel=0.1)


def test_popularity_of_applications_is_zipfs() -> None:
    apps = Apps(4, (10, 20, 30, 40), 1.0)
    drawn = apps.draw(np.random.default_rng(0), 100_000)
    np.testing.assert_allclose(np.bincount(drawn) / drawn.size, np.array([12, 6, 4, 3]) / 25, atol=0.006)
    assert np.allclose(Apps(3, 5, 0.0).shares, 1 / 3) and apps.tokens.tolist() == [10, 20, 30, 40]


# --- agents -----------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**63 - 1),
    calls=st.integers(1, 2_000),
    depth=st.integers(0, 4),
    children=st.tuples(st.integers(0, 4), st.integers(0, 4)).map(sorted),
    apps=st.one_of(st.none(), st.builds(Apps, st.integers(1, 5), st.integers(1, 300))),
    max_tokens=st.integers(302, 6_000),
)
def test_agent_programs(seed: int, calls: int, depth: int, children: list[int], apps: Apps | None, max_tokens: int) -> None:
    source = AgentPrograms(apps, Poisson(1.0), forks=Forks(depth, *children), max_tokens=max_tokens)
    chunk = CallChunk.joined(source.chunks(seed, num_calls=calls))
    check_programs(chunk, source.app_tokens, max_tokens)
    assert np.array_equal(chunk.node, np.arange(len(chunk))), "one node a call"
    forked = chunk.parent >= 0
    parent = chunk.parent[forked]
    assert np.array_equal(chunk.node_parent[forked], parent)
    assert np.array_equal(chunk.node_shared[forked], chunk.prompt_tokens[parent] + chunk.output_tokens[parent])
    level = np.zeros(len(chunk), np.int64)
    for call in np.flatnonzero(forked).tolist():
        level[call] = level[chunk.parent[call]] + 1
    assert level.max() <= depth
    assert (np.bincount(parent, minlength=len(chunk)) <= children[1]).all()


def test_a_whole_tree() -> None:
    source = AgentPrograms(Apps(1, 10), Poisson(1.0), Types((100,), (20,), (1.0,)), Types((5,), (7,), (1.0,)), Forks(2, 2, 2), 1.5, 0.0)
    (chunk,) = source.chunks(0, num_calls=8)
    assert chunk.start.size == 2 and len(chunk) == 14
    assert chunk.parent.tolist() == [-1, 0, 0, 1, 1, 2, 2, -1, 7, 7, 8, 8, 9, 9]
    assert chunk.prompt_tokens[:7].tolist() == [110, 135, 135, 147, 147, 147, 147]
    assert chunk.output_tokens[:7].tolist() == [20] + [7] * 6
    assert chunk.node_shared[:7].tolist() == [10, 130, 130, 142, 142, 142, 142]
    np.testing.assert_allclose(chunk.think[:7], [0] + [1.5] * 6)
    # Grandchildren do not fit and are left out; their parents stay.
    (small,) = dataclasses.replace(source, max_tokens=150).chunks(0, num_calls=3)
    assert small.parent.tolist() == [-1, 0, 0]


def test_tool_seconds_have_their_mean() -> None:
    chunk = CallChunk.joined(AgentPrograms(tool_seconds=3.0, tool_sigma=1.0).chunks(5, num_calls=50_000))
    assert chunk.think[chunk.parent >= 0].mean() == pytest.approx(3.0, rel=0.03)


# --- single calls -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", scenario_names())
@pytest.mark.parametrize("rate", [None, 2.5])
def test_single_calls_are_the_scenarios_requests(name: str, rate: float | None) -> None:
    scenario = load_scenario(name)
    (chunk,) = load_source(name).chunks(7, rate=rate, num_calls=300)
    chunk.check()
    requests = scenario.generate(7, rate=rate, num_requests=300)
    assert chunk.start.tobytes() == requests.arrival.tobytes()
    assert chunk.prompt_tokens.tobytes() == requests.prompt_tokens.tobytes()
    assert chunk.output_tokens.tobytes() == requests.output_tokens.tobytes()


def test_predictions_come_along() -> None:
    scenario = dataclasses.replace(load_scenario("azure-conv"), predictions={"sigma": 0.5})
    (chunk,) = SingleCalls(scenario).chunks(7, num_calls=50)
    requests = scenario.generate(7, num_requests=50)
    assert requests.predicted_tokens is not None and np.array_equal(chunk.predicted_tokens, requests.predicted_tokens)


@pytest.mark.parametrize(
    "arrivals",
    [Poisson(5.0), MMPP2(2.0, 11.0, 30.0, 15.0), PiecewiseConstant((60.0, 30.0), (2.0, 11.0))],
    ids=lambda process: type(process).__name__,
)
def test_arrivals_go_on_from_chunk_to_chunk(arrivals: Poisson) -> None:
    source = SingleCalls(dataclasses.replace(load_scenario("p512d20"), arrivals=arrivals))
    chunks = list(source.chunks(1, num_calls=2 * CHUNK_CALLS + 10))
    assert [len(chunk) for chunk in chunks] == [CHUNK_CALLS, CHUNK_CALLS, 10]
    first = source.scenario.generate(1, num_requests=CHUNK_CALLS)
    assert chunks[0].start.tobytes() == first.arrival.tobytes()
    assert all(0 <= b.start[0] - a.start[-1] < 30 for a, b in itertools.pairwise(chunks))
    assert chunks[2].start[-1] == pytest.approx(100_000 / arrivals.rate, rel=0.03)
    assert not np.array_equal(chunks[0].start[1:10] - chunks[0].start[0], chunks[1].start[1:10] - chunks[1].start[0])
    if isinstance(arrivals, PiecewiseConstant):
        phase = chunks[1].start % 90.0
        assert (phase < 60).mean() == pytest.approx(120 / 450, abs=0.01), "the cycle goes on"


def test_requests_of_tenants_go_on_too() -> None:
    chunks = list(load_source("tenants").chunks(1, num_calls=CHUNK_CALLS + 10))
    assert [len(chunk) for chunk in chunks] == [CHUNK_CALLS, 10] and chunks[1].start[0] >= chunks[0].start[-1]


def test_recorded_times_are_handed_out_once() -> None:
    times = np.arange(CHUNK_CALLS + 7) * 0.5
    source = SingleCalls(dataclasses.replace(load_scenario("p512d20"), arrivals=TraceArrivals(times)))
    assert np.array_equal(np.concatenate([chunk.start for chunk in source.chunks(0)]), times)
    assert sum(len(chunk) for chunk in source.chunks(0, num_calls=10**6)) == times.size
    faster = np.concatenate([chunk.start for chunk in source.chunks(0, rate=4.0)])
    np.testing.assert_allclose(faster, times / 2)


# --- every source -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMED)
def test_a_seed_is_a_seed(name: str) -> None:
    first, second = load_source(name), load_source(name)
    ours = digest(first.chunks(11, num_calls=120_000))
    assert ours == digest(second.chunks(11, num_calls=120_000)) == digest(first.chunks(11, num_calls=120_000))
    assert ours != digest(first.chunks(12, num_calls=120_000))


@pytest.mark.parametrize("name", ["chat", "agents"])
def test_more_calls_begin_with_the_same_and_a_rate_changes_the_times_alone(name: str) -> None:
    source = load_source(name)
    few, many = (CallChunk.joined(source.chunks(3, num_calls=count)) for count in (100, 3_000))
    assert digest([few]) == digest([first_programs(many, 100)])
    slow = CallChunk.joined(source.chunks(3, rate=source.rate / 2, num_calls=100))
    np.testing.assert_allclose(slow.start, 2 * few.start, rtol=1e-12)
    assert digest([dataclasses.replace(slow, start=few.start)]) == digest([few])


@pytest.mark.parametrize("name", NAMED)
def test_the_rate_is_that_of_calls(name: str) -> None:
    source = load_source(name)
    assert source.rate > 0
    for rate in (None, 40.0):
        chunks = list(source.chunks(2, rate=rate, num_calls=200_000))
        realised = sum(map(len, chunks)) / chunks[-1].start[-1]
        assert realised == pytest.approx(rate or source.rate, rel=0.05)
        assert all(a.start[-1] <= b.start[0] for a, b in itertools.pairwise(chunks))


@pytest.mark.parametrize("name", NAMED)
def test_statistics_are_those_of_the_calls(name: str) -> None:
    source = load_source(name)
    chunk = CallChunk.joined(source.chunks(9, num_calls=CHUNK_CALLS))
    known = source.statistics
    assert known.source
    assert known.prompt @ known.weight == pytest.approx(chunk.prompt_tokens.mean(), rel=0.03)
    assert known.output @ known.weight == pytest.approx(chunk.output_tokens.mean(), rel=0.03)


def test_calls_go_on_for_ever_unless_somebody_counts() -> None:
    chunks = load_source("agents").chunks(0)
    for most in (1_000, 4_000, 16_000, CHUNK_CALLS, CHUNK_CALLS):
        chunk = next(chunks)
        chunk.check()
        assert 0.8 * most < len(chunk) < 1.2 * most


def test_chunks_joined_are_one() -> None:
    parts = list(load_source("agents").chunks(0, num_calls=9_000))
    whole = CallChunk.joined(parts)
    whole.check()
    assert len(parts) == 3 and len(whole) == sum(map(len, parts)) and whole.start.size == sum(part.start.size for part in parts)
    first = len(parts[0])
    own = whole.parent[first:][: len(parts[1])]
    assert np.array_equal(np.where(own >= 0, own - first, own), parts[1].parent)
    with pytest.raises(ConfigError, match="chunks: none"):
        CallChunk.joined([])


def test_programs_start_as_recorded_and_only_once() -> None:
    source = ChatSessions(arrivals=TraceArrivals(np.array([0.0, 1.0, 5.0])))
    (chunk,) = source.chunks(0)
    assert chunk.start.tolist() == [0.0, 1.0, 5.0]
    chunk.check()


def test_cutting_a_chunk_keeps_whole_programs() -> None:
    chunk = next(load_source("agents").chunks(0, num_calls=500))
    ends = np.searchsorted(chunk.program, np.arange(chunk.start.size), side="right")
    for calls in (1, int(ends[0]), int(ends[0]) + 1, int(ends[5])):
        cut = first_programs(chunk, calls)
        cut.check()
        assert len(cut) == ends[np.searchsorted(ends, calls)] and cut.start.size == np.searchsorted(ends, calls) + 1


def test_sources_by_name() -> None:
    assert source_names()[:3] == ["chat", "chat-bursts", "agents"] and set(scenario_names()) <= set(source_names())
    for name in ("chat", "chat-bursts", "agents"):
        source: CallSource = load_source(name)
        check_programs(next(iter(source.chunks(0, num_calls=5_000))), source.app_tokens, 4_096)
    with pytest.raises(ConfigError, match="did you mean 'chat-bursts'"):
        load_source("chat-burst")
    with pytest.raises(ConfigError, match="source: 7 is unknown"):
        load_source(7)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Apps(0), r"apps.count: 0, must be an integer from 1"),
        (lambda: Apps(2, (5,)), r"apps.head_tokens: 1 of them, must be 2"),
        (lambda: Apps(2, (5, 0)), r"apps.head_tokens\[1\]: 0, must be an integer from 1"),
        (lambda: Apps(zipf=-1.0), r"apps.zipf: -1.0, must be a number >= 0"),
        (lambda: Forks(depth=-1), r"forks.depth: -1, must be an integer from 0"),
        (lambda: Forks(fewest=4, most=3), r"forks.fewest: 4, must be an integer from 0 to 3"),
        (lambda: Forks(depth=30, most=3), r"forks: depth 30 with 3 children, a program must have at most 65536 calls"),
        (lambda: AgentPrograms(tool_seconds=-1.0), r"agents.tool_seconds: -1.0, must be a number >= 0"),
        (lambda: AgentPrograms(step=None), r"agents.step: None, must be of type LengthModel"),  # type: ignore[arg-type]
        (lambda: AgentPrograms(max_tokens=200), r"agents.max_tokens: 200, must be at least 258: a head of 256"),
        (lambda: ChatSessions(max_tokens=True), r"chat.max_tokens: True, must be an integer"),
        (lambda: ChatSessions(apps=3), r"chat.apps: 3, must be Apps or None"),  # type: ignore[arg-type]
        (lambda: ChatSessions(arrivals=2.0), r"chat.arrivals: 2.0, must be of type ArrivalProcess"),  # type: ignore[arg-type]
        (lambda: ChatSessions(first_scale=0.0), r"chat.first_scale: 0.0, must be a number > 0"),
        (lambda: ChatSessions(mean_turns=0.5), r"chat.mean_turns: 0.5, must be a number >= 1"),
        (lambda: ChatSessions().chunks(-1), r"seed: -1, must be an integer from 0"),
        (lambda: ChatSessions().chunks(0, num_calls=0), r"num_calls: 0, must be an integer from 1"),
        (lambda: ChatSessions().chunks(0, rate=0.0), r"rate: 0.0, must be a number > 0"),
        (lambda: SingleCalls(3), r"single.scenario: 3, must be a Scenario"),  # type: ignore[arg-type]
        (lambda: load_source("p512d20").chunks(0, rate=float("nan")), r"rate: nan, must be a number > 0"),
        (lambda: SessionStatistics([0.5], [0, 1], [1, 1], [1, 1], [1, 1], [1, 1]), r"sessions.turn_shares: must be shares"),
        (lambda: SessionStatistics([1], [0, 0.5], [1, 1], [1, 1], [1, 1], [1, 1]), r"sessions.levels: must increase from 0 to 1"),
        (lambda: SessionStatistics([1], [0, 1], [2, 1], [1, 1], [1, 1], [1, 1]), r"sessions.seconds: must be 2 finite numbers >= 0"),
        (lambda: load_session_statistics("nobody"), r"sessions 'nobody': "),
        (lambda: load_session_statistics("mooncake"), r"sessions 'mooncake': form: 'joint', must be 'sessions'"),
    ],
)
def test_bad_settings_are_refused(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()  # type: ignore[operator]


def test_huge_programs_are_known_from_fewer() -> None:
    source = AgentPrograms(forks=Forks(15, 2, 2), task=Types((1,), (1,), (1.0,)), step=Types((1,), (1,), (1.0,)))
    assert source.calls_per_program == 2**16 - 1
    (chunk,) = source.chunks(0, num_calls=1)
    chunk.check()
    assert len(chunk) == 2**16 - 1 and chunk.prompt_tokens.max() == 257 + 15 * 2


def test_lengths_may_be_any_model() -> None:
    source = AgentPrograms(task=Types((1,), (1,), (1.0,)), step=Lognormal(2.0, 0.1, 2.0, 0.1), apps=None, max_tokens=8)
    check_programs(next(source.chunks(0, num_calls=100)), source.app_tokens, 8)
