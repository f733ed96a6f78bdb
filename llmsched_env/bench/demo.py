"""The two regimes that ``llmsched demo`` runs: the paper's, and a conversation service at its memory limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmsched_agents.lookup import named_policies
from llmsched_env.bench.comparison import Comparison, Row
from llmsched_env.bench.reason import Reason, reason
from llmsched_env.workload import load_scenario


@dataclass(frozen=True, slots=True)
class Regime:
    """One comparison of the demonstration.

    Attributes:
        key: name of its folder.
        title, about: what it is, for readers.
        rates: requests/s.
        greedy: the policy that the others are held against.
        loses: what an evicted request loses on this engine, as the end of "the request ...".
    """

    key: str
    title: str
    about: str
    scenario: str
    rates: tuple[float, ...]
    policies: tuple[str, ...]
    greedy: str
    loses: str
    num_requests: int


PAPER = Regime(
    key="paper",
    title="The paper's model near its stability boundary",
    about="Two types of short requests, an iteration time linear in the KV tokens, and evicted requests that lose "
    "all their progress (arXiv 2504.11320). The memory is 1.25 times what the fluid model needs at 3 requests/s.",
    scenario="two-type",
    rates=(2.8, 3.0, 3.1),
    policies=("fcfs", "wait", "nested-wait", "reserve", "generalist"),
    greedy="fcfs",
    loses="starts again from nothing",
    num_requests=60_000,
)
"""At 3.0 and 3.1 requests/s, 0.95 and 0.98 of the boundary, greedy FCFS falls into its eviction cycle within 60,000 requests."""

SERVICE = Regime(
    key="azure-conv-40gb",
    title="A conversation service at its memory limit",
    about="Llama-2-7B on one A100 with 40 GB (2,816 blocks of 16 tokens for the KV cache) under the rules of vLLM's scheduler, with "
    "request lengths of the Azure conversation trace. Output lengths are unknown until a request ends, and an evicted request has its "
    "tokens computed again.",
    scenario="azure-conv-40gb",
    rates=(5.0, 6.0, 6.5),
    policies=("vllm", "wait", "nested-wait", "reserve", "generalist", "adaptive", "sarathi", "shortest-prompt"),
    greedy="vllm",
    loses="has its tokens computed again",
    num_requests=2_000,
)

# Policies that both regimes have stand at the same places, which gives them the same colours.
REGIMES = (PAPER, SERVICE)


def comparison_of(regime: Regime, seeds: int, num_requests: int | None = None) -> Comparison:
    """The comparison of a regime, checked.

    Args:
        seeds: how many, from 0.
        num_requests: of one run; None: the regime's own.

    Raises:
        ConfigError: a policy cannot be built.
    """
    comparison = Comparison(
        scenario=load_scenario(regime.scenario),
        policies=named_policies("policies", regime.policies),
        rates=regime.rates,
        seeds=tuple(range(seeds)),
        num_requests=num_requests or regime.num_requests,
    )
    comparison.check()
    return comparison


def why(regime: Regime, rows: Sequence[Row]) -> Reason | None:
    """Who wins the regime at its highest rate and why, from its rows alone."""
    return reason(rows, regime.greedy, loses=regime.loses)
