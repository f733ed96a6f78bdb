"""What each part of an agent's recipe is worth: variants with one part changed, on development seeds.

    python scripts/ablation.py --agent agents/checkpoints/generalist --out scripts/suites/ablation.json

Every variant runs in the same cells on the same requests, of seeds of the tuning stream that tuning does not use. Figures are
relative to the recipe with one constant level in place of its network. ``scripts/evaluate.py`` shows them on its page.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from llmsched_agents.agent import Agent
from llmsched_agents.checkpoint import load_checkpoint
from llmsched_agents.interface import Interface
from llmsched_agents.network import Network
from llmsched_agents.recipe import Recipe
from llmsched_agents.statistics import relative_difference
from llmsched_baselines import Setting
from llmsched_env import __version__
from llmsched_env.bench.ablation_table import REFERENCE_ROW, SHIPPED, Ablation, Figures, digest_of
from llmsched_env.bench.suite import Bench, Cell, warmup_seconds
from llmsched_env.cli.parser import Parser
from llmsched_env.cli.tune import add_selection, check_counts, prepare
from llmsched_env.compiled import CACHE_FOLDER
from llmsched_env.engine.simulator import SimBackend
from llmsched_env.errors import ConfigError, MissingExtraError, require
from llmsched_env.files import check_file
from llmsched_env.metrics import summarize
from llmsched_env.parallel import unordered
from llmsched_env.perf.base import CalibrationRangeWarning
from llmsched_env.runner import run_episode
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


def run_cell(
    bench: Bench, cell: Cell, network: Network, deterministic: bool, chosen: Sequence[Candidate], seeds: Sequence[int]
) -> tuple[Cell, FloatArray, float]:
    """(candidates, seeds) mean latencies in one cell, and the seconds that took; NaN where requests were left over."""
    started = time.perf_counter()
    setting, backend = bench.setting(cell), SimBackend()
    workloads = [bench.workload(cell, "tuning", seed) for seed in seeds]
    values = np.full((len(chosen), len(seeds)), math.nan)
    for i, candidate in enumerate(chosen):
        agent = candidate.build(network, setting, deterministic)
        for j, workload in enumerate(workloads):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", CalibrationRangeWarning)  # evaluation states how often
                result = run_episode(agent, workload, backend=backend)
            warmup, capacity = warmup_seconds(workload), agent.engine.kv_capacity
            summary = summarize(result.log, result.counters, kv_capacity=capacity, warmup=warmup)
            if summary.completed == summary.requests:
                values[i, j] = summary.latency_mean
    return cell, values, time.perf_counter() - started


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


def arguments() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agent", type=Path, required=True, metavar="FOLDER", help="a checkpoint with levels of the predicted peak")
    add_selection(parser)
    parser.set_defaults(loads=list(LOADS))
    seeds = f"seeds {FIRST_SEED} .. {FIRST_SEED} + N-1 of the tuning stream (default {SEEDS})"
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="N", help=seeds)
    parser.add_argument("--out", type=Path, default=SHIPPED, metavar="FILE.json")
    return parser


def main(words: Sequence[str] | None = None) -> int:
    options = arguments().parse_args(words)
    try:
        require("joblib", "cli")
        require("scipy", "cli")
        check_counts(seeds=options.seeds, jobs=options.jobs)
        check_file("--out", options.out)
        agent = load_checkpoint(options.agent)
        everyone = candidates(agent.recipe)
        cells, bench = prepare(options)
        chosen = _fitting(everyone, agent, bench.setting(cells[0]))
    except (ConfigError, MissingExtraError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    seeds = tuple(range(FIRST_SEED, FIRST_SEED + options.seeds))
    # The longest first, so that none comes last alone.
    order = sorted(cells, key=lambda cell: (-bench.count(cell) * cell.load, cell.key))
    tasks = [(bench, cell, agent.network, agent.deterministic, chosen, seeds) for cell in order]
    print(f"{len(chosen)} variants in {len(cells)} cells on {len(seeds)} seeds", flush=True)
    values = np.full((len(chosen), len(cells), len(seeds)), math.nan)
    seconds = 0.0
    results = unordered("loky", options.jobs, run_cell, tasks)
    try:
        for i, (cell, found, spent) in enumerate(results, start=1):
            values[:, cells.index(cell)] = found
            seconds += spent
            print(f"{i}/{len(tasks)} {cell.key}: {spent:.1f} s", flush=True)
    except KeyboardInterrupt:
        return 130
    finally:
        results.close()
    counts = [bench.count(cell) for cell in cells]
    ablation = Ablation(
        agent=agent.name,
        digest=digest_of(options.agent),
        version=__version__,
        sources=CACHE_FOLDER.name.rpartition("-")[2],
        reference=REFERENCE,
        seeds=seeds,
        cells=tuple(cell.key for cell in cells),
        num_requests=(min(counts), max(counts)),
        wall_seconds=round(seconds, 1),
        rows=tuple(figures(chosen, cells, values)),
    )
    ablation.write(options.out)
    print("\n".join(ablation.lines(own=True)))
    return 0


def _fitting(everyone: Sequence[Candidate], agent: Agent, setting: Setting) -> list[Candidate]:
    """Those that run: a network may read numbers that a changed recipe does not give, then only the constant level is left."""
    found = []
    for candidate in everyone:
        try:
            candidate.build(agent.network, setting, agent.deterministic)
        except ConfigError as error:
            if candidate.constant is not None or candidate.name == REFERENCE_ROW:
                raise
            print(f"left out: {candidate.name} with the network ({error})", flush=True)
        else:
            found.append(candidate)
    return found


if __name__ == "__main__":
    sys.exit(main())
