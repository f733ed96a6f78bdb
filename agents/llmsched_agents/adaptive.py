"""The agent ``adaptive``: for unknown requests on unknown hardware."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np

from llmsched_agents.adaptive_budget import Demand, Flow
from llmsched_agents.adaptive_lengths import lengths_record
from llmsched_agents.adaptive_rule import AdaptiveRecord, adaptive_rule
from llmsched_agents.adaptive_times import times_record
from llmsched_baselines.policy import RulePolicy, Setting
from llmsched_env import checks
from llmsched_env.engine.rules import Rule
from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import ConfigError
from llmsched_env.peak import PeakRecord, forecast_steps
from llmsched_env.perf.batch import BatchSums
from llmsched_env.types import TILE_TOKENS, FloatArray, QueueLayout

CLASSES_PER_OCTAVE = 8
GROUPS_PER_OCTAVE = 2
SHORTEST = 16
"""Tokens: shorter prompts are one class."""
LONGEST = 65_536
"""Tokens: longer prompts are one class, and outputs are told apart up to here."""
MULTIPLES = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64)
"""Token budgets to choose from, in tiles."""


class Adaptive(RulePolicy):
    """Learns lengths, iteration times and rate while it runs, and sets order, memory and token budget by them.

    Of its setting it reads the engine's own options alone (KV capacity, most residents, largest token budget, longest request):
    neither the statistics of the lengths, nor the rate, nor the time model. Requests are classes by prompt length, eight to an octave.

    Args:
        tau0: seconds of ageing: requests enter by (wait + tau0) / work, the highest first; infinite: least work first.
        level: share of the KV capacity that the predicted peak may reach.
        spare: blocks (tokens in the ``paper`` preset) counted for each resident beyond its own.
        drain: seconds within which what waits is to be worked off, for the choice of the token budget.
        patience: seconds that somebody may wait before throughput counts for more: fewer residents than memory could hold serve the others
            sooner, at the cost of a queue that grows. Infinite: never.
        budget: tokens; None: chosen from what has been learned, or the engine's own where it is not free to choose (the ``paper`` preset,
            no chunked prefill).

    Raises:
        ConfigError: an argument out of range, or a budget where it is not free to choose.
    """

    name: ClassVar[str] = "adaptive"

    def __init__(
        self,
        setting: Setting,
        tau0: float = math.inf,
        level: float = 0.99,
        spare: float = 1.0,
        drain: float = 60.0,
        budget: int | None = None,
        patience: float = 240.0,
    ) -> None:
        checks.number("policy.tau0", tau0, high=math.inf, unit="seconds")
        checks.number("policy.level", level, high=2.0, open_low=True)
        checks.number("policy.spare", spare, high=64.0)
        for name, seconds in (("drain", drain), ("patience", patience)):
            checks.number(f"policy.{name}", seconds, high=math.inf, unit="seconds", open_low=True)
        self.engine = engine = setting.engine_for()
        chunked = engine.preset == "vllm" and engine.enable_chunked_prefill and not engine.padded_prefill
        if budget is not None:
            if not chunked:
                raise ConfigError(f"policy.budget: {budget}, must be None: an engine without chunked prefill keeps its own token budget")
            checks.integer("policy.budget", budget, low=TILE_TOKENS, high=engine.max_num_batched_tokens)
        edges = class_edges(engine)
        self.layout = QueueLayout("prompt", edges) if edges else QueueLayout()
        record = AdaptiveRecord(
            prompt=prompts(edges),
            budgets=np.array([budget] if budget is not None else budgets_of(engine), dtype=np.float64),
            costs=np.zeros(2 * len(MULTIPLES) + 2),
            before=BatchSums(model=np.zeros(1), memory=np.zeros(1)),
            steps=forecast_steps(min(engine.longest_request, LONGEST)),
            lengths=lengths_record(groups_of(edges), min(engine.longest_request, LONGEST)),
            times=times_record(tokens_of(engine)),
            demand=Demand(),
            flow=Flow(),
            peak=self._peak(engine, edges, spare),
            **{name: np.zeros(len(edges) + 1) for name in ("cost", "arrivals", "window")},
            tried=np.zeros(len(MULTIPLES) + 1),
        )
        record.level, record.tau0, record.drain, record.patience = level, tau0, drain, patience
        record.chunked = chunked
        record.late_times = engine.async_scheduling
        self.rule = Rule(adaptive_rule, self.layout.num_queues, record)

    def _peak(self, engine: EngineConfig, edges: tuple[int, ...], spare: float) -> PeakRecord:
        """Tables of the forecast by group and bin; the rule fills them."""
        lengths = lengths_record(groups_of(edges), min(engine.longest_request, LONGEST))
        steps = forecast_steps(min(engine.longest_request, LONGEST))
        scratch = {name: np.zeros(steps.size) for name in ("total", "own")}
        peak = PeakRecord(
            steps=steps,
            survival=np.zeros((lengths.num_groups, lengths.edges.size - 1, steps.size), dtype=np.float32),
            group=np.array(lengths.group),
            place=np.array(lengths.place),
            by_work=np.zeros(1, dtype=np.int64),
            **scratch,
        )
        peak.headroom = spare if engine.preset == "paper" else spare * engine.block_size + (engine.block_size - 1) / 2
        return peak


class AdaptiveAged(Adaptive):
    """``adaptive`` with ageing: for tails. Nobody is passed over for ever, at the price of a longer mean in overload.

    Args:
        tau0: as in ``Adaptive``, by default 30 s.
        level, spare, drain, budget: as in ``Adaptive``.
        patience: as there, by default 60 s.
    """

    name: ClassVar[str] = "adaptive-aged"

    def __init__(
        self,
        setting: Setting,
        tau0: float = 30.0,
        level: float = 0.99,
        spare: float = 1.0,
        drain: float = 60.0,
        budget: int | None = None,
        patience: float = 60.0,
    ) -> None:
        super().__init__(setting, tau0, level, spare, drain, budget, patience)


def class_edges(engine: EngineConfig) -> tuple[int, ...]:
    """Upper edges of the classes, geometric."""
    octaves = math.log2(min(engine.longest_request, LONGEST) / SHORTEST) if engine.longest_request > SHORTEST else 0.0
    found = {math.floor(SHORTEST * 2.0 ** (k / CLASSES_PER_OCTAVE)) for k in range(math.ceil(octaves * CLASSES_PER_OCTAVE))}
    return tuple(sorted(found))


def prompts(edges: tuple[int, ...]) -> FloatArray:
    """(J,) tokens of a request of each class: the geometric middle."""
    bounds = [1.0, *map(float, edges), (edges[-1] if edges else SHORTEST) * 2.0 ** (1 / CLASSES_PER_OCTAVE)]
    found: FloatArray = np.sqrt(np.array(bounds[:-1]) * np.array(bounds[1:]))
    return found


def groups_of(edges: tuple[int, ...]) -> list[int]:
    """Group of each class."""
    return [j * GROUPS_PER_OCTAVE // CLASSES_PER_OCTAVE for j in range(len(edges) + 1)]


def tokens_of(engine: EngineConfig) -> int:
    """Most tokens of an iteration."""
    return engine.max_num_batched_tokens if engine.preset == "vllm" else min(engine.capacity_tokens, LONGEST)


def budgets_of(engine: EngineConfig) -> list[int]:
    """Token budgets to choose from: multiples of the tile, and the engine's own."""
    own = tokens_of(engine)
    return [*(k * TILE_TOKENS for k in MULTIPLES if k * TILE_TOKENS < own), own]
