"""What each part of an agent's recipe is worth: variants with one part changed, on development seeds.

Every variant runs in the same cells on the same requests, of seeds of the tuning stream that tuning does not use. Figures are
relative to the recipe with one constant level in place of its network.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llmsched_agents.agent import Agent
from llmsched_agents.interface import Interface
from llmsched_agents.network import Network
from llmsched_agents.recipe import Recipe
from llmsched_agents.statistics import relative_difference
from llmsched_baselines import Setting
from llmsched_env import __version__
from llmsched_env.bench.ablation_table import REFERENCE_ROW, Ablation, Figures
from llmsched_env.bench.evaluation import settings_of, sources_digest
from llmsched_env.bench.suite import Bench, Cell, run_counted
from llmsched_env.engine.simulator import SimBackend
from llmsched_env.errors import ConfigError
from llmsched_env.metrics import Summary
from llmsched_env.types import FloatArray

FIRST_SEED = 100
"""Of the tuning stream; tuning counts from 0 and stays far below."""
SEEDS = 4
LOADS = (0.9, 1.0, 1.1)
"""Of the stationary part: below them hardly anything depends on the recipe."""

REFERENCE = 0.99
LEVELS = (0.97,)
ORDERS = ("arrival", "class", "expected", "work")
CLASSES = (8, 32)
BUDGETS = (256, 1_024)
THETAS = (1.1, 1.3)
HOLDS = (1, 64)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One variant of a recipe.

    Attributes:
        name: what is changed.
        constant: one level (theta for ``reserve``) in place of the network, or None.
    """

    name: str
    recipe: Recipe
    constant: float | None = None

    @property
    def key(self) -> tuple[str, str]:
        """What tells it from the others, as text."""
        return self.name, "" if self.constant is None else f"{self.constant:g}"

    def build(self, network: Network, setting: Setting, deterministic: bool) -> Agent:
        """The agent in a setting. Raises ``ConfigError`` where the network does not fit the recipe."""
        recipe = self.recipe
        if setting.engine.preset == "paper":  # has no token budget
            recipe = replace(recipe, engine={k: v for k, v in recipe.engine.items() if k != "max_num_batched_tokens"})
        if self.constant is None:
            return Agent(network, recipe, setting, name=self.name, deterministic=deterministic)
        return constant_agent(recipe, setting, self.constant)


def constant_agent(recipe: Recipe, setting: Setting, level: float) -> Agent:
    """An agent that takes one level of ``peak``, or one theta of ``reserve``, whatever it sees."""
    if level not in recipe.choices:
        recipe = replace(recipe, levels=tuple(sorted((*recipe.choices, level))))
    interface = Interface(recipe, setting)
    width, outputs = interface.width, sum(interface.components)
    bias = np.zeros(outputs, dtype=np.float32)
    bias[recipe.choices.index(level)] = 1.0
    zeros, ones = np.zeros(width, dtype=np.float32), np.ones(width, dtype=np.float32)
    network = Network(zeros, ones, (), (np.zeros((outputs, width), dtype=np.float32), bias), interface.components)
    return Agent(network, recipe, setting, name=f"constant {level:g}", deterministic=True)


def candidates(recipe: Recipe) -> list[Candidate]:
    """The variants of a recipe, the reference second.

    Raises:
        ConfigError: its action is no level of the predicted peak.
    """
    if recipe.action_set != "peak":
        raise ConfigError(f"--agent: its action set is {recipe.action_set!r}, must be 'peak'")
    found = [Candidate(REFERENCE_ROW, recipe), Candidate(REFERENCE_ROW, recipe, REFERENCE)]
    found += [Candidate(f"constant level {level:g}", recipe, level) for level in LEVELS]
    for name, changes in part_changes(recipe).items():
        changed = replace(recipe, **changes)
        found += [Candidate(name, changed), Candidate(name, changed, REFERENCE)]
    # A constant level is the same however long it is held.
    found += [Candidate(f"hold {hold}", replace(recipe, hold=hold)) for hold in HOLDS if hold != recipe.hold]
    for theta in THETAS:
        reserve = replace(recipe, action_set="reserve", levels=(theta,))
        found.append(Candidate(f"`reserve`, theta {theta:g}, in place of the predicted peak", reserve, theta))
    return found


def part_changes(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Fields to change in a recipe, by what that is called."""
    found: dict[str, dict[str, Any]] = {f"order `{order}`": {"order": order} for order in ORDERS if order != recipe.order}
    if recipe.layout is None:
        found |= {f"{count} classes": {"num_classes": count} for count in CLASSES if count < recipe.num_classes}
    if recipe.token_budget != "engine":
        found["token budget of the engine"] = {"token_budget": "engine"}
    for budget in BUDGETS:
        fixed = {**recipe.engine, "max_num_batched_tokens": budget}
        found[f"token budget {budget:,}"] = {"token_budget": "engine", "engine": fixed}
    if recipe.spare:
        found["spare 0"] = {"spare": 0.0}
    return found


@dataclass(frozen=True, slots=True)
class Run:
    """One run: a line of the file that an ablation goes on from.

    Attributes:
        cell: ``Cell.key``.
        variant, constant: ``Candidate.key``.
        seed: of the tuning stream.
        figures: as in ``llmsched_env.bench.evaluation.Row``.
    """

    cell: str
    variant: str
    constant: str
    seed: int
    figures: Summary
    wall_seconds: float


@dataclass(frozen=True, slots=True)
class Plan:
    """An ablation to carry out.

    Attributes:
        agent, digest: name of the checkpoint, and its ``NamedPolicy.digest``.
        network, deterministic: of the agent whose recipe is changed.
        chosen: the variants that run.
        cells: in the order of the file.
        seeds: of the tuning stream.
    """

    bench: Bench
    agent: str
    digest: str
    network: Network
    deterministic: bool
    chosen: tuple[Candidate, ...]
    cells: tuple[Cell, ...]
    seeds: tuple[int, ...]

    def settings(self) -> dict[str, Any]:
        """What all runs of one file have in common, as plain values."""
        return {
            "version": __version__,
            "sources": sources_digest(),
            "agent": self.agent,
            "digest": self.digest,
            "seeds": list(self.seeds),
            "num_requests": self.bench.num_requests,
            **settings_of(self.bench),
        }

    def in_order(self) -> list[Cell]:
        """The longest first, so that none comes last alone."""
        return sorted(self.cells, key=lambda cell: (-self.bench.count(cell) * cell.load, cell.key))

    def whole(self, runs: Iterable[Run]) -> set[str]:
        """Keys of the cells of which every run is there."""
        there = {(run.cell, run.variant, run.constant, run.seed) for run in runs}
        wanted = [(*candidate.key, seed) for candidate in self.chosen for seed in self.seeds]
        return {cell for cell in {key for key, *_ in there} if all((cell, *one) in there for one in wanted)}

    def ablation(self, runs: Sequence[Run]) -> Ablation:
        """What the runs of all cells say."""
        values = np.full((len(self.chosen), len(self.cells), len(self.seeds)), math.nan)
        candidate_of = {candidate.key: i for i, candidate in enumerate(self.chosen)}
        cell_of = {cell.key: i for i, cell in enumerate(self.cells)}
        seed_of = {seed: i for i, seed in enumerate(self.seeds)}
        own = [run for run in runs if (run.variant, run.constant) in candidate_of and run.cell in cell_of and run.seed in seed_of]
        for run in own:
            if run.figures.completed == run.figures.requests:  # else requests were left over, and the variant has no figure here
                at = candidate_of[run.variant, run.constant], cell_of[run.cell], seed_of[run.seed]
                values[at] = run.figures.latency_mean
        counts = [self.bench.count(cell) for cell in self.cells]
        return Ablation(
            agent=self.agent,
            digest=self.digest,
            version=__version__,
            sources=sources_digest(),
            reference=REFERENCE,
            seeds=self.seeds,
            cells=tuple(cell.key for cell in self.cells),
            num_requests=(min(counts), max(counts)),
            wall_seconds=round(sum(run.wall_seconds for run in own), 1),
            rows=tuple(figures(self.chosen, self.cells, values)),
        )


def run_cell(plan: Plan, cell: Cell) -> list[Run]:
    """Every variant on every seed in one cell."""
    setting, limits, backend = plan.bench.setting(cell), plan.bench.limits(cell), SimBackend()
    workloads = [plan.bench.workload(cell, "tuning", seed) for seed in plan.seeds]
    found = []
    for candidate in plan.chosen:
        agent = candidate.build(plan.network, setting, plan.deterministic)
        for seed, workload in zip(plan.seeds, workloads, strict=True):
            counted, seconds = run_counted(agent, workload, backend, limits)
            found.append(Run(cell.key, *candidate.key, seed, counted, round(seconds, 6)))
    return found


def figures(chosen: Sequence[Candidate], cells: Sequence[Cell], values: FloatArray) -> list[Figures]:
    """What each candidate has against the reference.

    Args:
        values: (candidates, cells, seeds) mean latencies.
    """
    reference = next(i for i, c in enumerate(chosen) if c.name == REFERENCE_ROW and c.constant is not None)
    scale = values[reference].mean(axis=1, keepdims=True)  # so that all cells count alike
    theirs = (values[reference] / scale).sum(axis=0)
    found = []
    for candidate, own in zip(chosen, values, strict=True):
        estimate = relative_difference((own / scale).sum(axis=0), theirs)
        by_cell = (own.mean(axis=1) / scale[:, 0] - 1.0).tolist()
        found.append(Figures.of(candidate.name, candidate.constant, estimate, by_cell, cells))
    return found


def fitting(everyone: Sequence[Candidate], agent: Agent, setting: Setting) -> tuple[tuple[Candidate, ...], Mapping[str, str]]:
    """Those that run in a setting, and why others do not, by name.

    A network may read numbers that a changed recipe does not give; then only the constant level is left.

    Raises:
        ConfigError: why the recipe as it ships, or a constant level, does not run.
    """
    found, left_out = [], {}
    for candidate in everyone:
        try:
            candidate.build(agent.network, setting, agent.deterministic)
        except ConfigError as error:
            if candidate.constant is not None or candidate.name == REFERENCE_ROW:
                raise
            left_out[candidate.name] = str(error)
        else:
            found.append(candidate)
    return tuple(found), left_out
