"""Small episodes with tenants, stepped one by one with what each tenant received."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llmsched_baselines import Setting, make_policy
from llmsched_env.engine.simulator import SimBackend
from llmsched_env.engine.state import INPUT_PRICE, OUTPUT_PRICE, WAITING
from llmsched_env.engine_config import EngineConfig, EpisodeLimits
from llmsched_env.runner import Policy
from llmsched_env.tenant_terms import TenantTerms
from llmsched_env.types import LengthStatistics, Workload

Floats = npt.NDArray[np.float64]


def workload(rng: np.random.Generator, count: int, tenants: int, *, longest: int = 60, seconds: float = 2.0) -> Workload:
    """``count`` requests within ``seconds``; the tenants differ in number, prompts and outputs."""
    tenant = rng.choice(tenants, size=count, p=rng.dirichlet(np.ones(tenants)))
    most = rng.integers(1, longest, (tenants, 2), endpoint=True)
    prompt = rng.integers(1, most[tenant, 0], endpoint=True)
    output = rng.integers(1, most[tenant, 1], endpoint=True)
    return Workload.of(np.sort(rng.uniform(0.0, seconds, count)), prompt, output, tenant=tenant)


def setting(requests: Workload, engine: EngineConfig, weights: tuple[float, ...]) -> Setting:
    """What an operator knows: the very lengths of the episode."""
    terms = tuple(TenantTerms(f"tenant {j}", weight) for j, weight in enumerate(weights))
    ones = np.ones(len(requests))
    columns = (requests.prompt_tokens, requests.output_tokens, ones)
    return Setting(LengthStatistics.of(*columns, tenant=requests.tenant, tenants=terms), 1.0, engine)


@dataclass(frozen=True)
class Course:
    """An episode of T steps under a policy.

    Attributes:
        service: (T + 1, J) weighted tokens received by each tenant before each step, and at the end.
        stayed: (T, J) whether a request of the tenant was outside before the step and still after its admissions.
        asked, admitted: (T, J) what the decision asked for from outside, and what the engine did.
        most_together: largest sum of the final lengths (prompt + output tokens) of the requests that were resident together.
        longest_prompt: tokens.
        evictions: of the episode.
    """

    service: Floats
    stayed: npt.NDArray[np.bool_]
    asked: npt.NDArray[np.int64]
    admitted: npt.NDArray[np.int64]
    most_together: int
    longest_prompt: int
    evictions: int
    backend: SimBackend

    @property
    def bound(self) -> float:
        """U of arXiv 2401.00588: max(w_p L_input, w_q M)."""
        return max(INPUT_PRICE * self.longest_prompt, OUTPUT_PRICE * self.most_together)

    def largest_gap(self, weights: tuple[float, ...]) -> tuple[float, float]:
        """Over all pairs of tenants and all intervals in which both are backlogged: the largest difference of service over weight,
        and the largest of the same over what the bound allows the pair, U / weight of the one + U / weight of the other."""
        gap = share = 0.0
        for f in range(len(weights)):
            for g in range(f):
                difference = self.service[:, f] / weights[f] - self.service[:, g] / weights[g]
                low = high = difference[0]
                widest = 0.0
                for t, both in enumerate(self.stayed[:, f] & self.stayed[:, g]):
                    if not both:  # an interval ends before this step
                        low = high = difference[t + 1]
                        continue
                    low, high = min(low, difference[t + 1]), max(high, difference[t + 1])
                    widest = max(widest, high - low)
                gap = max(gap, widest)
                share = max(share, widest / (self.bound / weights[f] + self.bound / weights[g]))
        return gap, share


def course(policy: Policy, requests: Workload, backend: SimBackend | None = None) -> Course:
    """Run an episode and write down what happens to each tenant."""
    engine: Any = backend or SimBackend()
    policy.reset()
    view = engine.reset(requests, policy.layout, policy.engine, EpisodeLimits(max_iterations=200_000))
    record = engine.record
    outside = slice(0, policy.layout.num_queues, policy.layout.num_segments)
    final = requests.prompt_tokens.astype(np.int64) + requests.output_tokens
    service, stayed, asked, admitted = [record.queues.rows["service"][outside].copy()], [], [], []
    most = 0
    while not engine.done:
        waiting = view.waiting[:, 0].copy()
        decision = policy.decide(view)
        asked.append(np.minimum(decision.admit[outside], waiting).astype(np.int64))
        before = record.next_sequence
        engine.advance(decision)
        rows = record.requests.rows
        new = (rows["sequence"] >= before) & (rows["status"] > WAITING) if record.next_sequence > before else np.zeros(len(rows), np.bool_)
        counts = np.bincount(rows["outside"][new] // policy.layout.num_segments, minlength=policy.layout.num_classes)
        admitted.append(counts)
        stayed.append(waiting - counts > 0)
        service.append(record.queues.rows["service"][outside].copy())
        inside = [*view.resident_requests().id.tolist(), *record.events.finished[: record.report.completed].tolist()]
        most = max(most, int(final[inside].sum()))
    return Course(
        np.array(service), np.array(stayed), np.array(asked), np.array(admitted), most, int(requests.prompt_tokens.max()),
        record.evictions, engine,
    )  # fmt: skip


def built(name: str, requests: Workload, engine: EngineConfig, weights: tuple[float, ...]) -> Policy:
    """A policy that knows the tenants."""
    return make_policy(name, setting(requests, engine, weights))
