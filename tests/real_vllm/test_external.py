"""What a backend does with an engine that fails, or says what cannot be. The engine is made up: needs no vLLM."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from llmsched_env.backends import make_backend
from llmsched_env.engine_config import EngineConfig, EpisodeLimits
from llmsched_env.perf import LinearTime
from llmsched_env.types import ADMIT_ALL, Decision, QueueLayout, Workload
from llmsched_hardware.external import Executed, ExternalBackend
from llmsched_hardware.gate import Gate
from tests.engine_walk import check_engine

BLOCK = 4
ENGINE = EngineConfig.vllm(
    block_size=BLOCK, num_blocks=64, max_num_seqs=8, max_num_batched_tokens=256, max_model_len=64, time_model=LinearTime(1.0, 0.0)
)
SEGMENTS = QueueLayout(segment_ends=(3,))
WORK = Workload.of([0.0, 0.0, 0.5, 9.0], [5, 7, 9, 6], [6, 2, 4, 5])


class MadeUp(ExternalBackend):
    """Prefills in one piece, decodes, never runs out of memory; ``fault`` changes what it says."""

    def __init__(self) -> None:
        super().__init__(trace=True)
        self.fault: Callable[[Executed], Any] = lambda done: done
        self.gates: list[Gate] = []

    def start(self, engine: EngineConfig) -> None:
        self.lengths: dict[int, tuple[int, int]] = {}
        self.running: dict[int, int] = {}  # tokens computed, by admission
        self.kept: dict[int, int] = {}  # tokens generated

    def submit(self, request: int, prompt_tokens: int, output_tokens: int, arrival: float) -> None:
        self.lengths[request], self.kept[request] = (prompt_tokens, output_tokens), 0

    def iterate(self, gate: Gate) -> Executed:
        self.gates.append(gate)
        for r in gate.evict.tolist():
            del self.running[r]
        admitted = gate.admit.tolist()
        self.running |= dict.fromkeys(admitted, 0)
        tokens = {r: self.lengths[r][0] + self.kept[r] - held for r, held in self.running.items() if r not in gate.hold}
        for r, count in tokens.items():
            self.running[r] += count
            self.kept[r] += 1
        blocks = {r: -(-held // BLOCK) for r, held in self.running.items()}
        finished = {r for r in tokens if self.kept[r] == self.lengths[r][1]}
        for r in finished:
            del self.running[r]
        done: Executed = self.fault(Executed(tokens, admitted, [], blocks, finished))
        return done


def changed(**values: Any) -> Callable[[Executed], Executed]:
    return lambda done: Executed(**{**{name: getattr(done, name) for name in Executed.__slots__}, **values})


def started(layout: QueueLayout = SEGMENTS, limits: EpisodeLimits | None = None) -> MadeUp:
    backend = MadeUp()
    backend.reset(WORK, layout, ENGINE, limits or EpisodeLimits())
    return backend


def test_equals_the_simulator_through_holds_boundaries_evictions_and_a_drain_iteration() -> None:
    ours, sim = started(), make_backend("sim", trace=True)
    sim.reset(WORK, SEGMENTS, ENGINE, EpisodeLimits())
    script = [
        ([1, 1], [1, 0], 0), ([1, 1], [ADMIT_ALL, 0], 0), ([0, 1], [0, 0], 0), ([1, 1], [0, 0], 0), ([1, 0], [0, 1], [0, 0]),
        ([1, 1], [0, 0], [0, 1]), ([1, 1], [0, 0], 0), ([0, 0], [0, 0], 0),
    ]  # fmt: skip
    step = 0
    while not sim.done:
        decision = Decision.of(*script[step]) if step < len(script) else Decision(2)
        assert ours.step(decision) == sim.step(decision), step
        assert ours.counters() == sim.counters()
        check_engine(ours)
        step += 1
    assert ours.done and ours.counters().drain_iterations > 0 and ours.counters().evictions > 0
    # Evictions are told once: the drain iteration after an attempt under the same decision has none.
    assert sum(gate.evict.size for gate in ours.gates) == ours.counters().evictions


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (changed(admitted=[1]), "admitted request 1, which is not the oldest of its queue"),
        (changed(blocks={0: 3, 1: 2}), "request 0: the engine holds 3 KV blocks for it, its tokens take 2"),
        (changed(finished={0}), r"the engine finished requests \[0\], its output lengths say \[\]"),
    ],
)
def test_what_cannot_be_is_an_error(fault: Callable[[Executed], Executed], message: str) -> None:
    backend = started()
    backend.fault = fault
    with pytest.raises(RuntimeError, match=message):
        backend.step(Decision.greedy(2))


@pytest.mark.parametrize("error", [MemoryError("no memory left"), KeyboardInterrupt()])
def test_what_the_engine_raises_comes_out_of_the_step_and_nobody_gets_a_token(error: BaseException) -> None:
    def failing(done: Executed) -> Executed:
        raise error

    backend = started()
    backend.step(Decision.greedy(2))
    backend.fault = failing
    before, asked = backend.counters(), len(backend.gates)
    with pytest.raises(type(error)) as raised:
        backend.step(Decision.greedy(2))
    assert raised.value is error
    assert len(backend.gates) == asked + 1  # no drain iteration after it
    after = backend.counters()
    assert (after.finished, after.iterations) == (before.finished, before.iterations)
    assert backend.reset(WORK, SEGMENTS, ENGINE, EpisodeLimits()).num_waiting == 2  # a new episode can begin


def test_measured_seconds_move_the_clock_and_the_time_model_is_not_asked() -> None:
    backend = started()
    backend.fault = changed(seconds=0.125)
    assert backend.step(Decision.greedy(2)).duration == 0.125
    assert backend.record.clock == 0.125


def test_an_engine_is_freed_with_the_last_that_knows_it() -> None:
    backend = started()
    known = weakref.ref(backend)
    with pytest.raises(TypeError, match="cannot be pickled or copied"):
        copy.deepcopy(backend)
    del backend
    assert known() is None
