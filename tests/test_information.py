"""The information boundary: a hidden output length changes nothing a policy can see before completion."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as hst

from llmsched_baselines import Setting, make_policy
from llmsched_env import Decision, EngineConfig, EpisodeLimits, LLMSchedEnv, Workload
from llmsched_env.backends import make_backend
from tests.engine_walk import differing, shown


def visible(env: LLMSchedEnv) -> list[bytes]:
    """Every byte of the observation, the mask and the view."""
    view = env.view()
    observation, info = env._observe()
    parts: list[Any] = [*observation.values(), info["action_mask"], info["clock"]]
    parts += [view.waiting, view.residents, view.resident_kv, view.boundary_kv, view.head_tokens, view.head_key]
    parts += [view.head_arrival, view.arrival_rate, view.num_residents, view.num_waiting, view.kv_used, view.evictions]
    residents = view.resident_requests()
    assert residents.output_tokens is None
    parts += [residents.id, residents.queue, residents.at_boundary, residents.prompt_tokens]
    parts += [residents.generated, residents.computed, residents.prefill_target]
    for j in range(view.layout.num_classes):
        waiting = view.waiting_requests(j, 1000)
        assert waiting.output_tokens is None
        parts += [waiting.id, waiting.prompt_tokens, waiting.generated, waiting.arrival, waiting.key]
    return [np.asarray(p).tobytes() for p in parts]


def generated_of(env: LLMSchedEnv, i: int) -> int:
    """Output tokens that request i has."""
    record = env.backend.record
    return int(record.requests.base_generated[i] + record.queues.steps[record.requests.group[i]])


SMALL = EngineConfig.vllm(num_blocks=40, block_size=4, max_num_batched_tokens=48, max_num_seqs=8, max_model_len=100)
ENGINES = [
    SMALL,
    SMALL.replace(enable_prefix_caching=True),
    SMALL.replace(async_scheduling=True),
    SMALL.replace(async_scheduling=True, enable_prefix_caching=True),
    SMALL.replace(scheduling_policy="priority"),
    EngineConfig.paper(160, 0.05, 1e-3),
]


@settings(max_examples=60, deadline=None)
@given(
    engine=hst.sampled_from(ENGINES),
    lengths=hst.lists(hst.tuples(hst.integers(1, 40), hst.integers(1, 50)), min_size=2, max_size=12),
    which=hst.integers(0, 11),
    other=hst.integers(1, 50),
    seed=hst.integers(0, 2**20),
)
def test_hidden_lengths_change_nothing_before_completion(
    engine: EngineConfig, lengths: list[tuple[int, int]], which: int, other: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    n = len(lengths)
    i = which % n
    arrival = np.cumsum(rng.exponential(0.2, n))
    prompts, outputs = (np.array(x) for x in zip(*lengths, strict=True))
    changed = outputs.copy()
    changed[i] = other
    shortest = min(int(outputs[i]), other)
    envs = []
    for out in (outputs, changed):
        env = LLMSchedEnv("lmsys", action_set="admit", engine=engine, segment_ends=(5, 12), class_by="prompt", class_edges=(15,))
        env.reset(seed=1, options={"workload": Workload.of(arrival, prompts, out)})
        envs.append(env)
    while not (envs[0].backend.done or envs[1].backend.done):
        assert visible(envs[0]) == visible(envs[1])
        assert not differing(*(shown(env.backend.record) for env in envs))  # what compiled rules read
        q = envs[0].layout.num_queues
        decision = Decision.of(rng.integers(0, 2, q), rng.integers(0, 3, q), rng.integers(0, 2, q) * (rng.random() < 0.1))
        for env in envs:
            env.step_decision(decision)
        # From the step that yields the last token of the shorter one on, the two may differ.
        done = [int(env.backend.log().completed[i] == env.backend.log().completed[i]) for env in envs]
        if any(done):
            generated = [generated_of(env, i) for env in envs]
            assert shortest in generated
            break


def test_policies_without_known_lengths_decide_the_same_when_lengths_change() -> None:
    rng = np.random.default_rng(0)
    n = 60
    arrival = np.cumsum(rng.exponential(0.05, n))
    prompts = rng.integers(1, 300, n)
    outputs = rng.integers(60, 120, n)
    for name in ("vllm", "vllm-v0", "sarathi", "reserve", "shortest-prompt", "nested-wait"):
        env = LLMSchedEnv("lmsys")
        setting = Setting(env.scenario.statistics, 5.0, env.engine)
        decisions: list[list[bytes]] = []
        for out in (outputs, outputs + 300):
            policy = make_policy(name, setting, overload=True)
            assert not policy.known_lengths
            backend = make_backend("sim")
            view = backend.reset(Workload.of(arrival, prompts, out), policy.layout, policy.engine, EpisodeLimits())
            taken: list[bytes] = []
            while not backend.done and not np.isfinite(backend.log().completed).any():
                decision = policy.decide(view)
                taken.append(decision.rows.tobytes())
                backend.step(decision)
            decisions.append(taken)
        shorter = len(decisions[0])
        assert shorter >= 60
        assert decisions[0] == decisions[1][:shorter], name
