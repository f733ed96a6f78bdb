"""Engines, policies and replicas for tests of clusters."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from llmsched_agents.adaptive import Adaptive
from llmsched_baselines import make_policy
from llmsched_baselines.policy import Setting
from llmsched_env.cluster.spec import ReplicaSpec
from llmsched_env.compiled import compiled
from llmsched_env.engine.rules import Rule
from llmsched_env.engine_config import EngineConfig
from llmsched_env.perf import LinearTime
from llmsched_env.types import LengthStatistics, QueueLayout


@compiled
def in_crowds(engine, policy, decision):  # type: ignore[no-untyped-def]
    """Nobody moves until ``parameters[0]`` wait; then all do. With ``parameters[1]`` residents go on meanwhile."""
    policy.memory[0] += 1
    ready = engine.num_waiting >= policy.parameters[0] or policy.memory[0] % 7 == 0
    for q in range(engine.settings.num_queues):
        decision.run[q] = 1 if ready or policy.parameters[1] > 0 else 0
        decision.admit[q] = 1_000 if ready else 0
        decision.evict[q] = 0


class Crowds:
    """A policy that holds back, classes by prompt length."""

    name, known_lengths, notes = "crowds", False, ""

    def __init__(self, engine: EngineConfig, crowd: int, runs: int, edges: tuple[int, ...] = ()) -> None:
        self.engine = engine
        self.layout = QueueLayout(by="prompt", edges=edges) if edges else QueueLayout()
        self.rule = Rule(in_crowds, self.layout.num_queues, [crowd, runs], memory=1)

    def reset(self) -> None:
        self.rule.reset()

    def decide(self, view: Any) -> Any:
        return self.rule.decide(view)


def engine_of(g: np.random.Generator, *, caching: bool, overlaps: bool) -> EngineConfig:
    """Little KV, so that it runs out; every option that a cluster allows."""
    block = int(g.choice([4, 8, 16]))
    blocks = int(g.integers(8, 40))
    longest = min(blocks * block, int(g.integers(30, 200)))
    seqs = int(g.integers(2, 12))
    chunked = bool(g.random() < 0.7)
    budget = int(g.integers(max(seqs, 8), 160))
    return EngineConfig.vllm(
        time_model=LinearTime(0.01, 1e-6),
        block_size=block,
        num_blocks=blocks,
        max_num_seqs=seqs,
        max_num_batched_tokens=budget if chunked else max(budget, longest),
        max_model_len=longest,
        enable_chunked_prefill=chunked,
        watermark=float(g.choice([0, 0, 0.05])),
        scheduler_reserve_full_isl=bool(g.random() < 0.3),
        prefill_schedule_interval=int(g.choice([1, 1, 3])),
        long_prefill_token_threshold=int(g.choice([0, 0, 12])),
        late_after=float(g.choice([0, 0, 0.2])),
        enable_prefix_caching=caching,
        async_scheduling=overlaps,
    )


@lru_cache
def statistics() -> LengthStatistics:
    g = np.random.default_rng(0)
    return LengthStatistics.of(g.integers(1, 60, 200), g.integers(1, 40, 200), np.ones(200))


POLICIES = ("none", "none", "crowds", "crowds-by-prompt", "adaptive")


def replica_of(g: np.random.Generator, engine: EngineConfig, name: str) -> ReplicaSpec:
    if name == "none":
        return ReplicaSpec(engine)
    if name.startswith("crowds"):
        edges = (8, 20) if name.endswith("prompt") else ()
        return ReplicaSpec(engine, Crowds(engine, int(g.integers(1, 6)), int(g.integers(0, 2)), edges))
    setting = Setting(statistics(), 20.0, engine)
    if name == "adaptive":
        return ReplicaSpec(policy=Adaptive(setting))
    return ReplicaSpec(policy=make_policy(name, setting, overload=True))
