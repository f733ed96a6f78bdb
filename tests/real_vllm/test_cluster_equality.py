"""The replicas of a cluster against as many of vLLM's own schedulers with vLLM's own prefix caching, no difference allowed.

Run by ``make test-vllm`` in an environment with vLLM; skipped elsewhere. Sessions and trees of calls go to the replicas in turn, or each
session to its own. Each replica's policy is a rule that admits everybody and writes down what every iteration did. Then a scheduler
of vLLM's is given what the replica was handed, and in every iteration the tokens scheduled per request, the preemptions in order and
the free blocks must be equal, and the tokens that each call found in the cache when it was admitted first. So where a replica only
decodes: vLLM's scheduler is then told by a KV connector that all tokens of the prompt but the last are there.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

if importlib.util.find_spec("vllm") is None:  # importing it would read its settings before the backend has made them
    pytest.skip("vLLM is not installed here (make test-vllm)", allow_module_level=True)

from cluster_walk import Run, check_end, drive, programs
from test_prefix_caching_equality import STOP, VllmScheduler, answer_token

from llmsched_env.cluster.calls import NO_PARENT, CallChunk
from llmsched_env.cluster.simulator import ClusterSim
from llmsched_env.cluster.spec import ClusterSpec, ReplicaSpec, Transfer
from llmsched_env.compiled import compiled
from llmsched_env.engine.rules import Rule
from llmsched_env.engine_config import EngineConfig
from llmsched_env.perf import LinearTime
from llmsched_env.types import QueueLayout

CLUSTERS = int(os.environ.get("LLMSCHED_VLLM_CLUSTERS", "20"))
LOG = 400_000


@compiled
def note_and_admit(engine, policy, decision):  # type: ignore[no-untyped-def]
    """Everybody enters; the step before is written down: arrivals, KV, and who was preempted and scheduled, by number."""
    log, report = policy.memory, engine.report
    k = log[0]
    log[k + 1] = report.arrived
    log[k + 2] = report.kv_reserved
    log[k + 3] = report.preempted
    log[k + 4] = report.traced
    k += 5
    for j in range(report.preempted):
        log[k] = engine.arrived.predicted[engine.events.preempted[j]]
        k += 1
    for j in range(report.traced):
        log[k] = engine.arrived.predicted[engine.events.traced[j]]
        log[k + 1] = engine.events.traced_tokens[j]
        k += 2
    log[0] = k - 1
    for q in range(engine.settings.num_queues):
        decision.run[q], decision.admit[q], decision.evict[q] = 1, 2**30, 0


class Noting:
    """A policy of one rule; requests are told apart by what is predicted of them: their number, and one."""

    name, known_lengths, notes, layout = "noting", False, "", QueueLayout()

    def __init__(self, engine: EngineConfig) -> None:
        self.engine, self.rule = engine, Rule(note_and_admit, 1, memory=LOG)

    def reset(self) -> None:
        self.rule.reset()

    def decide(self, view: Any) -> Any:
        return self.rule.decide(view)


def steps_of(sim: ClusterSim, i: int) -> list[tuple[int, int, list[int], dict[int, int]]]:
    """Of each step of replica i: requests that had arrived, KV blocks in use, whom it preempted, and tokens by call."""
    log: Any = sim.machines[i].rule.policy.memory  # type: ignore[attr-defined]
    record = sim.machines[i].record
    end, k, arrived, found = int(log[0]), 0, 0, []
    while k < end:
        arrivals, kv, preempted, traced = (int(x) for x in log[k + 1 : k + 5])
        k += 5
        victims = [int(x) - 1 for x in log[k : k + preempted]]
        pairs = log[k + preempted : k + preempted + 2 * traced].reshape(-1, 2)
        k += preempted + 2 * traced - 1
        found.append((arrived, kv, victims, {int(r) - 1: int(tokens) for r, tokens in pairs}))
        arrived += arrivals
    report, events = record.report, record.events  # the last step has no decision after it
    if report.traced:
        known = record.arrived.predicted
        tokens = {int(known[r]) - 1: int(n) for r, n in zip(events.traced[: report.traced], events.traced_tokens, strict=False)}
        found.append((arrived, report.kv_reserved, [int(known[r]) - 1 for r in events.preempted[: report.preempted]], tokens))
    return found[1:]  # before the first decision there was no step


def numbered(chunk: CallChunk) -> CallChunk:
    """The same calls, of each of which its number is predicted."""
    fields = {name: getattr(chunk, name) for name in CallChunk.__slots__}
    return CallChunk(**fields | {"predicted_tokens": np.arange(1, len(chunk) + 1, dtype=np.int32)})


def prompts_of(chunk: CallChunk) -> tuple[list[list[int]], list[list[int]]]:
    """Tokens of each call's prompt, and of prompt and answer."""
    prompts: list[list[int]] = []
    wholes: list[list[int]] = []
    for c in range(len(chunk)):
        node, above = int(chunk.node[c]), int(chunk.parent[c])
        parent, shared = int(chunk.node_parent[node]), int(chunk.node_shared[node])
        head: list[int] = []
        if above >= 0:
            head = wholes[above] if chunk.node[above] == node else wholes[above][:shared]
            assert chunk.node[above] in (node, parent)
        elif parent != NO_PARENT:
            head = list(range(100, 100 + shared))
        size = int(chunk.prompt_tokens[c])
        prompts.append(head + [10**6 + 10**4 * c + k for k in range(size - len(head))])
        wholes.append(prompts[c] + [answer_token(c, size + k) for k in range(int(chunk.output_tokens[c]) - 1)] + [STOP])
    return prompts, wholes


def check_against_vllm(
    run: Run, i: int, engine: EngineConfig, prompts: list[list[int]], folder: Any, carried: bool = False
) -> tuple[int, int, int]:
    """Replica i against vLLM's scheduler. Returns iterations, preemptions and cached tokens.

    Args:
        carried: the KV of prompts is handed over.
    """
    vllm = VllmScheduler(engine, folder)
    if carried:
        vllm.scheduler.connector = Carried()
    routed, added, iterations, preemptions = run.routed[i], 0, 0, 0
    found: dict[int, int] = {}
    hits = 0
    for k, (arrived, kv, preempted, tokens) in enumerate(steps_of(run.sim, i)):
        for number, output in zip(routed.number[added:arrived], routed.output[added:arrived], strict=True):
            vllm.add(number, prompts[number], output)
        added = arrived
        theirs, gone, cached = vllm.step([int(r.request_id) for r in vllm.scheduler.waiting], [])
        where = f"replica {i}, step {k}"
        assert theirs == tokens, where
        assert gone == preempted, where
        assert vllm.free == engine.num_blocks - kv, where
        found = cached | found
        hits += sum(cached.values())
        iterations += bool(tokens)
        preemptions += len(gone)
    assert added == len(routed.number)
    pool = run.sim.machines[i].record.pool
    if carried:  # ``hits`` are what was there, from wherever
        assert all(tokens == len(prompts[number]) - 1 for number, tokens in found.items())
        hits = pool.hit_tokens
    else:
        assert found == {int(row["number"]): int(row["cached"]) for row in run.rows if row["replica"] == i}
        assert hits == pool.hit_tokens
    return iterations, preemptions, hits


def in_turn(sim: ClusterSim) -> int:
    return int(sim.record.arrived - 1) % len(sim.machines)


def sticky(sim: ClusterSim) -> int:
    home = int(sim.record.call.home)
    return home if home >= 0 else int(sim.record.call.program) % len(sim.machines)


def random_engine(g: np.random.Generator, overlaps: bool) -> EngineConfig:
    block = int(g.choice([4, 8, 16]))
    blocks = int(g.integers(14, 40))
    longest = min(blocks * block, int(g.integers(60, 400)))
    seqs = int(g.integers(3, 20))
    chunked = bool(g.random() < 0.7)
    budget = int(g.integers(max(seqs, 8), 240))
    return EngineConfig.vllm(
        time_model=LinearTime(0.01, 1e-6),
        block_size=block,
        num_blocks=blocks,
        max_num_seqs=seqs,
        max_num_batched_tokens=budget if chunked else max(budget, longest),
        max_model_len=longest,
        enable_chunked_prefill=chunked,
        watermark=float(g.choice([0, 0, 0.05])),
        scheduler_reserve_full_isl=bool(g.random() < 0.5),
        enable_prefix_caching=True,
        async_scheduling=overlaps,
    )


def traced(sim: ClusterSim) -> ClusterSim:
    """The same, whose engines note who is scheduled."""
    start = sim._start_machines

    def start_traced() -> None:
        start()
        for machine in sim.machines:
            machine.record.settings.trace = True

    sim._start_machines = start_traced  # type: ignore[method-assign]
    return sim


def workload_of(g: np.random.Generator, engine: EngineConfig) -> tuple[CallChunk, int, list[list[int]]]:
    """Sessions, the tokens of their common head, and those of each call's prompt."""
    app = int(g.integers(1, engine.max_model_len // 4))
    chunk = numbered(programs(g, int(g.integers(20, 60)), float(g.choice([0.002, 0.02])), engine.max_model_len, app))
    return chunk, app, prompts_of(chunk)[0]


@pytest.mark.parametrize("choose", [in_turn, sticky], ids=["round-robin", "sticky"])
@pytest.mark.parametrize("overlaps", [False, True], ids=["sync", "async"])
def test_replicas_equal_vllm_schedulers(tmp_path: Any, overlaps: bool, choose: Callable[[ClusterSim], int]) -> None:
    totals = np.zeros(3, dtype=np.int64)
    for seed in range(CLUSTERS):
        g = np.random.default_rng(seed)
        engine = random_engine(g, overlaps)
        chunk, app, prompts = workload_of(g, engine)
        sim = traced(ClusterSim(ClusterSpec.equal(int(g.integers(1, 4)), ReplicaSpec(policy=Noting(engine)))))
        run = drive(sim, [chunk], choose, [app])
        check_end(sim, run.rows, len(chunk))
        for i in range(len(sim.machines)):
            totals += check_against_vllm(run, i, engine, prompts, tmp_path)
    iterations, preemptions, hits = totals.tolist()
    print(f"{iterations} iterations, {preemptions} preemptions, {hits} cached tokens: no difference")
    assert preemptions > CLUSTERS and hits > 100 * CLUSTERS


class Carried:
    """A KV connector that has all tokens of a prompt but the last, once: what a prefill replica hands over."""

    def get_num_new_matched_tokens(self, request: Any, local: int) -> tuple[int, bool]:
        return 0 if request.num_preemptions else max(request.num_prompt_tokens - 1 - local, 0), False

    def request_finished(self, *_: Any) -> tuple[bool, None]:
        return False, None

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


def test_decode_replicas_equal_vllm_schedulers_with_external_tokens(tmp_path: Any) -> None:
    totals = np.zeros(3, dtype=np.int64)
    for seed in range(CLUSTERS):
        g = np.random.default_rng(seed)
        engine = random_engine(g, False)
        chunk, app, prompts = workload_of(g, engine)
        prefill = engine.replace(num_blocks=4 * engine.num_blocks, max_num_seqs=8)
        members = [ReplicaSpec(prefill, role="prefill")]
        members += [ReplicaSpec(policy=Noting(engine), role="decode") for _ in range(int(g.integers(1, 3)))]
        transfer = Transfer(float(g.choice([0.0, 0.01])), float(g.choice([0.0, 1e-4])))
        sim = traced(ClusterSim(ClusterSpec(tuple(members), transfer=transfer)))
        run = drive(sim, [chunk], lambda sim, g=g: int(g.choice(np.flatnonzero(sim.legal()))), [app])  # type: ignore[misc]
        check_end(sim, run.rows, len(chunk))
        for i in range(1, len(members)):
            totals += check_against_vllm(run, i, engine, prompts, tmp_path, carried=True)
    iterations, preemptions, hits = totals.tolist()
    print(f"{iterations} iterations, {preemptions} preemptions, {hits} cached tokens: no difference")
    assert preemptions > CLUSTERS and hits > 20 * CLUSTERS
