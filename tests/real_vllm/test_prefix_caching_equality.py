"""The simulator with prefix caching against vLLM's own scheduler with ``enable_prefix_caching=True``, no difference allowed.

Run by ``make test-vllm`` in an environment with vLLM; skipped elsewhere. Random prompts with common
heads, random engine settings and run / admit decisions; after every step the tokens scheduled per
request, the preemptions in order, the free blocks and the tokens found in the cache must be equal. So with asynchronous scheduling,
where a block of output tokens has contents only when the iteration of its last token has ended. So with chats, whose later turns begin
with the prompt and the answer of an earlier one, which has ended or still answers.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

if importlib.util.find_spec("vllm") is None:  # importing it would read its settings before the backend has made them
    pytest.skip("vLLM is not installed here (make test-vllm)", allow_module_level=True)

from llmsched_env.engine.prefix_cache import SharedPrompts
from llmsched_env.engine.simulator import PrefixCachingBackend
from llmsched_env.engine_config import EngineConfig, EpisodeLimits
from llmsched_env.perf import LinearTime
from llmsched_env.types import ADMIT_ALL, Decision, QueueLayout, Workload
from llmsched_hardware import vllm_scheduler as hw
from llmsched_hardware.gated_scheduler import Admission, GatedScheduler
from llmsched_hardware.options import scheduler_arguments
from llmsched_hardware.real_engine import write_tiny_llama

STOP = 5
WORKLOADS = int(os.environ.get("LLMSCHED_VLLM_PREFIX_WORKLOADS", "60"))


def answer_token(request: int, place: int) -> int:
    """The faked token of a request at a place of prompt and answer, the last one excepted: no other request and no other place has it."""
    return 10**9 + 10**5 * request + place


class VllmScheduler:
    """vLLM's scheduler with prefix caching on faked tokens that never repeat but in common heads."""

    def __init__(self, engine: EngineConfig, folder: Any) -> None:
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash

        model = write_tiny_llama(folder / str(engine.max_model_len), engine.max_model_len)
        config = hw.faked_config(model, engine, scheduler_arguments(engine) | {"enable_prefix_caching": True})
        config.scheduler_config.async_scheduling = engine.async_scheduling  # as an argument it is switched off without a GPU
        self.overlaps, self.longest = engine.async_scheduling, engine.max_model_len
        self.in_flight: Any = None
        self.output: dict[str, int] = {}
        self.given: dict[int, dict[int, int]] = {}  # by request: its output tokens by place
        init_none_hash(sha256)
        self.hasher = get_request_block_hasher(engine.block_size, sha256)
        self.scheduler = hw.faked_scheduler(GatedScheduler, config, engine)

    def add(self, request: int, prompt: list[int], output: int, priority: int = 0) -> None:
        self.output[str(request)] = output
        self.scheduler.add_request(
            hw.Request(
                request_id=str(request),
                prompt_token_ids=prompt,
                sampling_params=hw.SamplingParams(
                    max_tokens=self.longest - len(prompt) if self.overlaps else output, ignore_eos=True, stop_token_ids=[STOP]
                ),
                pooling_params=None,
                arrival_time=float(request),
                block_hasher=self.hasher,
                priority=priority,
            )
        )

    def step(self, admit: list[int], hold: list[int]) -> tuple[dict[int, int], list[int], dict[int, int]]:
        """(tokens by request, preempted, tokens already there by admitted request)."""
        scheduler = self.scheduler
        scheduler.gate = gate = Admission(admit=[str(r) for r in admit], hold=frozenset(map(str, hold)))
        output = scheduler.schedule()
        ids = list(output.num_scheduled_tokens)
        self.free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        hits = {int(r): scheduler.requests[r].num_computed_tokens - output.num_scheduled_tokens[r] for r in gate.admitted}
        batch = output, [(r, not scheduler.requests[r].is_prefill_chunk) for r in ids]
        ended, self.in_flight = (self.in_flight if self.overlaps else batch), batch
        if ended is not None:
            self.update(*ended)
        return {int(r): k for r, k in output.num_scheduled_tokens.items()}, [int(r) for r in gate.preempted], hits

    def update(self, output: Any, samples: list[tuple[str, bool]]) -> None:
        """The tokens of a batch reach the scheduler."""
        self.scheduler.update_from_output(
            output,
            hw.ModelRunnerOutput(
                req_ids=[r for r, _ in samples],
                req_id_to_index={r: i for i, (r, _) in enumerate(samples)},
                sampled_token_ids=[[self.token(r)] if done else [] for r, done in samples],
                logprobs=None,
                prompt_logprobs_dict={},
                pooler_output=[],
            ),
        )

    def token(self, name: str) -> int:
        """A token that no other request has, and no other place in this one; a stop token at its end."""
        request = self.scheduler.requests.get(name)
        if request is None:  # it has ended: superfluous
            return STOP
        given = STOP if request.num_output_tokens + 1 == self.output[name] else answer_token(int(name), request.num_tokens)
        self.given.setdefault(int(name), {})[request.num_tokens] = given
        return given


def common_heads(prompts: list[list[int]], wholes: list[list[int]]) -> SharedPrompts:
    """For each prompt the first of the earlier requests whose tokens, ``wholes``, have the longest common head with it."""
    donor, tokens = [], []
    for i, prompt in enumerate(prompts):
        best, length = -1, 0
        for j in range(i):
            n = 0
            while n < min(len(prompt), len(wholes[j])) and prompt[n] == wholes[j][n]:
                n += 1
            if n > length:
                best, length = j, n
        donor.append(best)
        tokens.append(length)
    return SharedPrompts.of(donor, tokens)


def random_prompts(g: np.random.Generator, n: int, longest: int) -> list[list[int]]:
    """Some begin like an earlier one, some are the same."""
    prompts: list[list[int]] = []
    for i in range(n):
        size = int(g.integers(1, longest))
        head: list[int] = []
        if prompts and g.random() < 0.5:
            other = prompts[int(g.integers(len(prompts)))]
            head = other[: int(g.integers(1, len(other) + 1))][:size]
        prompts.append(head + [10**6 + 10**4 * i + k for k in range(size - len(head))])
    return prompts


@dataclass(frozen=True, slots=True)
class Asked:
    """The requests of an episode.

    Attributes:
        wholes: prompts, and the answers behind them where a later prompt may hold one.
        parent: earlier turn of the same chat, -1 for none.
    """

    prompts: list[list[int]]
    output: list[int]
    arrival: list[float]
    wholes: list[list[int]]
    parent: list[int] = field(default_factory=list)


def random_chats(g: np.random.Generator, n: int, longest: int) -> Asked:
    """Turns that begin with prompt and answer of an earlier one, or with part of them, and come before it has ended or after."""
    first, gap = float(g.choice([0.01, 0.05])), float(g.choice([0.05, 0.5, 4.0]))
    parent, arrival = [-1] * n, np.cumsum(g.exponential(first, n))
    for i in range(1, n):
        if g.random() < 0.7:
            parent[i] = int(g.integers(i))
            arrival[i] = arrival[parent[i]] + g.exponential(gap)
    order = np.argsort(arrival, kind="stable").tolist()
    rank = {row: i for i, row in enumerate(order)}
    parent = [rank[parent[row]] if parent[row] >= 0 else -1 for row in order]
    prompts: list[list[int]] = []
    wholes: list[list[int]] = []
    output: list[int] = []
    for i in range(n):
        head: list[int] = []
        if parent[i] >= 0:
            head = wholes[parent[i]]
            if g.random() < 0.3:
                head = head[: int(g.integers(1, len(head) + 1))]
        new = int(g.integers(0 if head else 1, max(2, longest // (8 if head else 4))))
        prompt = (head + [10**6 + 10**4 * i + k for k in range(new)])[: longest - 1]
        output.append(int(g.integers(1, min(max(2, longest // 3), longest - len(prompt) + 1))))
        prompts.append(prompt)
        wholes.append(prompt + [answer_token(i, len(prompt) + k) for k in range(output[i] - 1)] + [STOP])
    return Asked(prompts, output, arrival[order].tolist(), wholes, parent)


def random_requests(g: np.random.Generator, n: int, longest: int) -> Asked:
    """Prompts with common heads."""
    prompts = random_prompts(g, n, max(2, longest // 2))
    output = [int(g.integers(1, max(2, longest - len(p)))) for p in prompts]
    return Asked(prompts, output, np.cumsum(g.exponential(float(g.choice([0.002, 0.05])), n)).tolist(), prompts)


def decisions(g: np.random.Generator, greedy: bool) -> Iterator[tuple[int, int]]:
    """(run, admit) of the one queue."""
    while True:
        if greedy or g.random() < 0.6:
            yield 1, ADMIT_ALL
        else:
            yield int(g.random() < 0.8), int(g.integers(0, 4))


@dataclass(slots=True)
class Turns:
    """What a test with chats has met.

    Attributes:
        after: turns that came when the earlier one had ended; ``meanwhile``: before.
        answers: first admissions that found a block with tokens of the earlier turn's answer in the cache.
    """

    after: int = 0
    meanwhile: int = 0
    answers: int = 0


def lockstep(seed: int, folder: Any, overlaps: bool, by_priority: bool = False, turns: Turns | None = None) -> tuple[int, int, int]:
    """One episode on both, of chats where ``turns`` are given; returns (iterations, preemptions, cached tokens)."""
    g = np.random.default_rng(seed)
    block = int(g.choice([4, 8, 16]))
    blocks = int(g.integers(16, 90))
    longest = min(blocks * block, int(g.integers(40, 400)))
    seqs = int(g.integers(3, 40))
    chunked = bool(g.random() < 0.7)
    budget = int(g.integers(max(seqs, 8), 240))
    engine = EngineConfig.vllm(
        time_model=LinearTime(0.01, 1e-6),
        block_size=block,
        num_blocks=blocks,
        max_num_seqs=seqs,
        max_num_batched_tokens=budget if chunked else max(budget, longest),
        max_model_len=longest,
        enable_chunked_prefill=chunked,
        watermark=float(g.choice([0, 0, 0.05])),
        scheduler_reserve_full_isl=bool(g.random() < 0.5),
        async_scheduling=overlaps,
        scheduling_policy="priority" if by_priority else "fcfs",
    )
    n = int(g.integers(30, 90))
    asked = random_requests(g, n, longest) if turns is None else random_chats(g, n, longest)
    prompts, output = asked.prompts, asked.output
    priority = g.integers(-2, 3, n) if by_priority else np.zeros(n, int)
    workload = Workload.of(asked.arrival, [len(p) for p in prompts], output, priority=priority)
    backend = PrefixCachingBackend(common_heads(prompts, asked.wholes), trace=True)
    view = backend.reset(workload, QueueLayout(), engine, EpisodeLimits(drain=False))
    vllm = VllmScheduler(engine, folder)
    choose = decisions(g, greedy=seed % 3 == 0)
    submitted = iterations = preemptions = hits = 0
    entered: dict[int, int] = {}  # tokens that a request found at its first admission
    while not backend.done:
        while submitted < n and workload.arrival[submitted] <= view.clock:
            vllm.add(submitted, prompts[submitted], output[submitted], int(priority[submitted]))
            submitted += 1
        run, admit = (1, ADMIT_ALL) if submitted == n else next(choose)
        if seed % 2 and backend.record.flight_seconds > 0:  # held with a token in flight
            run = int(g.random() < 0.8)
        waiting = view.waiting_requests(0, min(admit, n)).id.tolist()
        residents = view.resident_requests().id.tolist()
        before = backend.hit_tokens
        report = backend.step(Decision.of([run], [admit]))
        tokens, preempted, cached = vllm.step(waiting, [] if run else residents)
        ids, counts = backend.scheduled() if not report.idle else (np.array([], int), np.array([], int))
        where = f"seed {seed}, step at {report.start}"
        assert tokens == dict(zip(ids.tolist(), counts.tolist(), strict=True)), where
        assert preempted == list(report.preempted), where
        assert engine.num_blocks - report.kv_used == vllm.free, where
        assert sum(cached.values()) == backend.hit_tokens - before, where
        iterations += not report.idle
        preemptions += len(preempted)
        hits += sum(cached.values())
        entered = cached | entered
    assert backend.end == "finished"
    if turns is not None:
        check_turns(asked, vllm.given)
        completed = backend.log().completed
        for i, j in enumerate(asked.parent):
            if j >= 0:
                turns.after += int(asked.arrival[i] >= completed[j])
                turns.meanwhile += int(asked.arrival[i] < completed[j])
                turns.answers += int(entered[i] > len(prompts[j]))
    return iterations, preemptions, hits


def check_turns(asked: Asked, given: dict[int, dict[int, int]]) -> None:
    """The answers that stand in later prompts are those that the faked model gave."""
    for i, (prompt, whole) in enumerate(zip(asked.prompts, asked.wholes, strict=True)):
        assert prompt + [given[i][place] for place in sorted(given[i])] == whole


@pytest.mark.parametrize("overlaps", [False, True], ids=["sync", "async"])
def test_equal_to_vllm_with_prefix_caching(tmp_path: Any, overlaps: bool) -> None:
    totals = np.zeros(3, dtype=np.int64)
    for seed in range(WORKLOADS):
        totals += lockstep(seed, tmp_path, overlaps)
    iterations, preemptions, hits = totals.tolist()
    print(f"{iterations} iterations, {preemptions} preemptions, {hits} cached tokens: no difference")
    assert preemptions > 5 * WORKLOADS and hits > 100 * WORKLOADS


@pytest.mark.parametrize("overlaps", [False, True], ids=["sync", "async"])
def test_equal_to_vllm_with_chats(tmp_path: Any, overlaps: bool) -> None:
    totals, turns = np.zeros(3, dtype=np.int64), Turns()
    for seed in range(WORKLOADS):
        totals += lockstep(seed, tmp_path, overlaps, turns=turns)
    iterations, preemptions, hits = totals.tolist()
    print(f"{iterations} iterations, {preemptions} preemptions, {hits} cached tokens, {turns}: no difference")
    assert preemptions > 5 * WORKLOADS and hits > 100 * WORKLOADS
    assert min(turns.after, turns.meanwhile, turns.answers) > 5 * WORKLOADS
