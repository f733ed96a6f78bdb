"""What runs in an evaluation: baselines as they ship, with tuned parameters or with those of a whole part; trained agents."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from llmsched_agents.lookup import NamedPolicy
from llmsched_baselines import Setting, make_policy, policy_class
from llmsched_env.bench.suite import PAIRS, Bench, Cell, engine_of
from llmsched_env.engine_config import EngineConfig
from llmsched_env.runner import Policy
from llmsched_env.workload import Scenario, load_scenario

Kind = Literal["default", "tuned", "together", "agent"]
SUFFIXES: dict[Kind, str] = {"default": " (default)", "tuned": " (tuned)", "together": " (tuned together)", "agent": ""}
"""What follows a variant's name in its label."""

POLICIES = (
    "fcfs", "vllm", "vllm-v0", "sarathi", "prefill-cadence", "prefill-decode-interval", "active-cap", "prefill-threshold", "wait",
    "nested-wait", "shortest-prompt", "reserve", "expected-work", "late-last", "mc-sf", "oracle-sjf",
    "pooled-work", "operate",
)  # fmt: skip
"""Baselines of the suite; ``fcfs`` is greedy FIFO in the ``paper`` preset, ``vllm`` in the other."""

VLLM_ONLY = ("vllm", "vllm-v0", "sarathi", "prefill-cadence", "prefill-decode-interval", "active-cap", "prefill-threshold")


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to decide in one cell.

    Attributes:
        name: of the policy or the agent.
        kind: ``tuned`` in that very cell, or ``together`` for the non-stationary part as a whole.
        options: (name, value) pairs of the constructor, engine fields with the prefix ``engine.``.
        agent: what an agent is built from; None for a baseline of the suite.
        digest: of an agent (``NamedPolicy.digest``), empty for a baseline of the suite.
    """

    name: str
    kind: Kind
    options: tuple[tuple[str, Any], ...] = ()
    agent: NamedPolicy | None = None
    digest: str = ""

    @classmethod
    def of(cls, agent: NamedPolicy) -> Variant:
        """An agent, whose rows count only as long as it is the same."""
        return cls(agent.name, "agent", agent=agent, digest=agent.digest())

    @property
    def label(self) -> str:
        return self.name + SUFFIXES[self.kind]

    @property
    def options_text(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.options)

    def build(self, bench: Bench, cell: Cell) -> Policy:
        """The policy in the setting of a cell.

        Raises:
            ConfigError: it cannot run there.
        """
        setting = bench.setting(cell)
        if self.agent is None:
            return make(self.name, setting, dict(self.options))
        own, engine = split_options(dict(self.options))
        return self.agent.build(replace(setting, overrides={**setting.overrides, **engine}), **own)


def make(policy: str, setting: Setting, options: Mapping[str, Any]) -> Policy:
    """A baseline with options of its constructor and, prefixed with ``engine.``, fields of the engine; beyond its theory if need be.

    Raises:
        ConfigError: a refused option.
    """
    own, engine = split_options(options)
    return make_policy(policy, replace(setting, overrides={**setting.overrides, **engine}), overload=True, **own)


def split_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of the policy, and fields of the engine without their prefix."""
    engine = {name.removeprefix("engine."): value for name, value in options.items() if name.startswith("engine.")}
    return {name: value for name, value in options.items() if not name.startswith("engine.")}, engine


def runs_on(policy: str, cell: Cell) -> bool:
    """Whether a baseline belongs to a cell: each preset has its own name for greedy FIFO."""
    paper = load_scenario(cell.scenario).engine.preset == "paper"
    return policy not in VLLM_ONLY if paper else policy != "fcfs"


GREEDY = ("fcfs", "vllm")
"""Greedy FIFO by preset."""


def greedy_of(cell: Cell) -> str:
    """Greedy FIFO's name in a cell."""
    return "fcfs" if load_scenario(cell.scenario).engine.preset == "paper" else "vllm"


def known_lengths(policy: str) -> bool:
    return bool(getattr(policy_class(policy), "known_lengths", False))


def needed_boundaries(chosen: Iterable[Cell]) -> dict[tuple[str, str], tuple[Scenario, EngineConfig]]:
    """Scenario and engine of every boundary that the cells' loads refer to."""
    pairs = {(cell.scenario, cell.kv) for cell in chosen}
    pairs |= {(PAIRS[cell.scenario], cell.kv) for cell in chosen if cell.part == "shift"}
    return {(name, kv): (load_scenario(name), engine_of(name, kv)) for name, kv in sorted(pairs)}
