"""Many episodes, or many engines at once, under policies that decide in compiled code."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from llmsched_env.engine import state as st
from llmsched_env.engine.arrays import engine_settings
from llmsched_env.engine.backend import SimBackend
from llmsched_env.engine.fleet import decide_all
from llmsched_env.errors import ConfigError
from llmsched_env.runner import EpisodeResult, Policy, rule_of, run_episode
from llmsched_env.types import EpisodeLimits, IntArray, Workload
from llmsched_env.vector import LLMSchedVectorEnv


@dataclass(frozen=True, slots=True)
class Run:
    """One episode to run."""

    policy: Policy
    workload: Workload
    limits: EpisodeLimits = field(default_factory=EpisodeLimits)


def run_batch(runs: Iterable[Run]) -> Iterator[EpisodeResult]:
    """Run episodes on the simulator, in order; each result comes as soon as its run has ended.

    The same results as ``run_episode``, on engine arrays that runs of equal size share. An episode of a
    policy with a compiled rule is one call: stepping several engines in turn would only fill the
    processor's caches. Spread lists of runs over processes for more cores (``scripts/compare.py``).

    Raises:
        ConfigError: a request that a policy's engine could never serve.
    """
    backend = SimBackend()
    for run in runs:
        yield run_episode(run.policy, run.workload, limits=run.limits, backend=backend)


class BatchPolicy:
    """A policy that decides for all engines of a vector environment in one compiled call.

    Args:
        policies: one policy, or several of the same kind, engine i taking entry i modulo their count
            (as the vector environment does with its rates). They must be made for the environments'
            queues and engine and have a compiled rule.
        envs: the environments, whose state is read at each ``decide``.

    Raises:
        ConfigError: no rule, rules of different policies, other queues, another engine, or output
            lengths that the environment hides.
    """

    def __init__(self, policies: Policy | Sequence[Policy], envs: LLMSchedVectorEnv) -> None:
        chosen = list(policies) if isinstance(policies, Sequence) else [policies]
        rules = []
        for i in range(envs.num_envs):
            policy, template = chosen[i % len(chosen)], envs.template(i)
            rule = rule_of(policy)
            if rule is None:
                raise ConfigError(f"policy {policy.name!r}: has no compiled rule, ask it engine by engine")
            if policy.layout != template.layout:
                raise ConfigError(f"policy {policy.name!r}: decides on {policy.layout}, environment {i} has {template.layout}")
            own = engine_settings(policy.engine, policy.layout, template.limits, False)
            if not np.array_equal(own, envs._settings[i]):
                raise ConfigError(f"policy {policy.name!r}: stands for {policy.engine}, environment {i} has {template.engine}")
            if policy.known_lengths and not template.reveal_output_length:
                raise ConfigError(f"policy {policy.name!r}: needs known lengths, environment {i} hides them")
            rules.append(rule)
        if len({rule.function for rule in rules}) > 1:
            raise ConfigError(f"policies: {sorted({p.name for p in chosen})}, must be of one kind")
        self._envs = envs
        self._function = rules[0].function
        width = max(rule.parameters.size for rule in rules)
        self._parameters = np.stack([np.pad(rule.parameters, (0, width - rule.parameters.size)) for rule in rules])
        self._memory = np.zeros((len(rules), rules[0].memory.size), dtype=np.int64)
        self._decisions: IntArray = np.stack([rule.decision.array for rule in rules])

    def decide(self) -> IntArray:
        """(num_envs, 3, Q) int32, rows run, admit, evict; reused by the next call.

        To be asked once before every step: what a policy remembers is forgotten where an episode begins.
        """
        e = self._envs
        self._memory[e._scalars[:, st.I_ITERATIONS] + e._scalars[:, st.I_IDLE_STEPS] == 0] = 0
        arrays = (e._settings, e._requests, e._slots, e._queues, e._queue_f, e._scalars, e._clocks)
        decide_all(self._function, self._parameters, self._memory, arrays, self._decisions)
        return self._decisions
