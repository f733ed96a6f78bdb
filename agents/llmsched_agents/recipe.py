"""How an agent sets up the engine it decides on: its queues, its engine options and its action set, from a setting."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from llmsched_baselines import Setting
from llmsched_env.action import THETAS
from llmsched_env.engine_changes import engine_with
from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import ConfigError
from llmsched_env.fluid import Fluid, equal_probability_ends
from llmsched_env.fluid.equilibrium import KV_CHARGED, CycleLoad, boundary_of
from llmsched_env.forecast import class_weights, class_work
from llmsched_env.types import FloatArray, LengthStatistics, QueueLayout
from llmsched_env.workload.scenario import interpolated_edges

ActionSet = Literal["admit", "admit-only", "reserve", "peak"]
Order = Literal["arrival", "class", "expected", "work"]
TokenBudget = Literal["engine", "fluid", "first-token"]

LEVELS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.94, 0.97, 0.985, 1.0, 1.1)
"""Shares of the KV capacity that the predicted peak may reach (``peak``)."""


@dataclass(frozen=True)
class Recipe:
    """What an agent asks of the engine; together with a ``Setting`` it fixes queues, engine and spaces.

    Attributes:
        action_set: ``admit`` and ``reserve`` are those of ``llmsched_env.action``; ``admit-only`` is
            ``AdmitOnly``; ``peak`` is in ``llmsched_env.peak``.
        num_classes: buckets of about equal probability by prompt length; 1 for a single class.
        num_segments: segments of decode length that end at quantiles of the output length.
        order: outside requests by arrival, by class (shortest prompts first), or by what the class is expected to
            cost, least first: ``expected`` tokens (``class_tokens``), or ``work``, KV x iterations (``class_work``).
        token_budget: ``engine`` keeps the engine's; ``fluid`` takes ``fluid_budget``'s, for mean latency, and
            ``first-token`` ``first_token_budget``'s, for limits on the time to the first token.
        late_last: requests past the setting's ``ttft_slo`` are admitted last (seconds), or None.
        max_admit: largest count of ``admit`` and ``admit-only``.
        spare: KV blocks (tokens in the ``paper`` preset) that ``peak`` counts for each resident beyond what it is expected
            to hold: forecasts are means, and what they miss grows with the number of residents.
        levels: thetas of ``reserve`` or levels of ``peak``; empty for their defaults.
        hold: iterations for which one action stays in force.
        features: append the features of ``llmsched_agents.peak`` to the observation.
        compact: leave out of the environment's observation what is told class by class.
        layout: queues to use as they are, in place of the three fields above (clones of an expert).
        engine: engine fields to change, as plain values.
        known_lengths: the layout reads output lengths.
    """

    action_set: ActionSet = "admit"
    num_classes: int = 1
    num_segments: int = 4
    order: Order = "arrival"
    token_budget: TokenBudget = "engine"
    late_last: float | None = None
    max_admit: int = 16
    spare: float = 0.0
    levels: tuple[float, ...] = ()
    hold: int = 1
    features: bool = False
    compact: bool = False
    layout: QueueLayout | None = None
    engine: Mapping[str, Any] = field(default_factory=dict)
    known_lengths: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (("action_set", ActionSet), ("order", Order), ("token_budget", TokenBudget)):
            if getattr(self, name) not in allowed.__args__:  # type: ignore[attr-defined]
                raise ConfigError(f"recipe.{name}: {getattr(self, name)!r}, must be one of {', '.join(allowed.__args__)}")  # type: ignore[attr-defined]
        for name in ("num_classes", "num_segments", "hold"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 4096:
                raise ConfigError(f"recipe.{name}: {value!r}, must be an integer from 1 to 4096")
        if not 0 <= self.spare <= 64:
            raise ConfigError(f"recipe.spare: {self.spare!r}, must be in [0, 64] blocks")
        if any(not level > 0 for level in self.levels) and self.action_set == "peak":
            raise ConfigError(f"recipe.levels: {self.levels}, must be > 0")

    @property
    def uses_tables(self) -> bool:
        """Whether forecasts are needed, for the action or for the observation."""
        return self.features or self.action_set == "peak"

    def layout_for(self, statistics: LengthStatistics) -> QueueLayout:
        """The queues for these lengths; always ``num_classes`` by ``num_segments`` of them, so that settings can be mixed."""
        if self.layout is not None:
            return self.layout
        ends: tuple[int, ...] = ()
        if self.num_segments > 1:
            quantiles = equal_probability_ends(statistics, self.num_segments)[:-1]
            ends = _padded(quantiles, self.num_segments - 1, statistics.max_output)
        if self.num_classes == 1:
            return QueueLayout(segment_ends=ends)
        edges = interpolated_edges(statistics, self.num_classes)
        longest = int(np.ceil(statistics.prompt.max()))
        return QueueLayout("prompt", _padded(edges, self.num_classes - 1, longest), segment_ends=ends)

    def engine_for(self, setting: Setting) -> EngineConfig:
        """The setting's engine with the recipe's order and fields."""
        changes: dict[str, Any] = dict(self.engine)
        if self.order != "arrival":
            changes["admission_order"] = "class"
        if self.order in ("expected", "work"):
            cost = (class_tokens if self.order == "expected" else class_work)(setting.statistics, self.layout_for(setting.statistics))
            changes["class_rank"] = tuple(int(r) for r in np.argsort(np.argsort(cost, kind="stable"), kind="stable"))
        if self.late_last is not None:
            changes["late_after"] = self.late_last
        engine = engine_with(setting.engine, {**changes, **setting.overrides})
        if self.token_budget != "engine" and "max_num_batched_tokens" not in setting.overrides:
            fluid = self.token_budget == "fluid"
            budget = fluid_budget(setting.statistics, engine, setting.rate) if fluid else first_token_budget(setting.statistics, engine)
            engine = engine.replace(max_num_batched_tokens=budget)
        return engine

    @property
    def choices(self) -> tuple[float, ...]:
        """Levels of the action sets that have some."""
        return self.levels or (THETAS if self.action_set == "reserve" else LEVELS)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["levels"] = list(self.levels)
        values["engine"] = {k: list(v) if isinstance(v, tuple) else v for k, v in self.engine.items()}
        if self.layout is not None:
            layout = self.layout
            values["layout"] = {
                "by": layout.by,
                "edges": list(layout.edges),
                "num_types": layout.num_types,
                "segment_ends": list(layout.segment_ends),
                **({"tenant_weights": list(layout.tenant_weights)} if layout.tenant_weights else {}),
            }
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """The inverse of ``as_dict``.

        Raises:
            ConfigError: an unknown field or a refused value.
        """
        fields = dict(values)
        unknown = sorted(set(fields) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise ConfigError(f"recipe.{unknown[0]}: unknown field (allowed: {', '.join(f.name for f in dataclasses.fields(cls))})")
        if "levels" in fields:
            fields["levels"] = tuple(float(x) for x in fields["levels"])
        if fields.get("layout") is not None and not isinstance(fields["layout"], QueueLayout):
            kept = dict(fields["layout"])
            fields["layout"] = QueueLayout(
                by=kept["by"],
                edges=tuple(kept["edges"]),
                num_types=kept["num_types"],
                segment_ends=tuple(kept["segment_ends"]),
                tenant_weights=tuple(kept.get("tenant_weights", ())),
            )
        if "engine" in fields:
            fields["engine"] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields["engine"].items()}
        return cls(**fields)


BUDGETS = (256, 384, 512, 768, 1_024, 2_048, 4_096, 8_192)
"""Token budgets that ``fluid_budget`` chooses from, and the engine's own."""


SHORT_OUTPUT = 64
"""Tokens; see ``fluid_budget``."""


def fluid_budget(statistics: LengthStatistics, engine: EngineConfig, rate: float) -> int:
    """The smallest token budget that the load leaves room for.

    Up to some hundred tokens ride along with the decodes of an iteration for almost nothing, as reading
    the weights takes the time (the point of Sarathi-Serve, arXiv 2403.02310); what goes beyond makes every
    resident wait. Too small a budget, where prompts are the main work, costs throughput. So a budget is
    enough if its stability boundary is 95.5 % of the largest, or 92 % where that is 5 % above ``rate``
    (requests/s). Where a prompt takes many iterations beside its output (more than 5 %), throughput counts
    for more: 96.5 %, or 95 % with that room, which is 30 % where outputs are short (fewer than 64 tokens on
    average), as longer iterations then cost a request little. Boundaries count the memory that prompts hold while they are
    computed (``boundary_with_prefill``). The shares are round values from a comparison of budgets on seeds
    of no evaluation.
    """
    own = engine.max_num_batched_tokens
    if not _chunked(engine):
        return own
    whole = boundary_with_prefill(statistics, engine)
    for budget in BUDGETS:
        if budget >= own:
            break
        if budget < engine.max_num_seqs:
            continue
        boundary = boundary_with_prefill(statistics, engine.replace(max_num_batched_tokens=budget))
        decoding = statistics.mean_prompt <= 0.05 * statistics.mean_output * budget
        least, most = (0.92, 0.955) if decoding else (0.95, 0.965)
        room = 1.3 if not decoding and statistics.mean_output < SHORT_OUTPUT else 1.05
        if boundary >= most * whole or boundary >= max(least * whole, room * rate):
            return budget
    return own


def boundary_with_prefill(statistics: LengthStatistics, engine: EngineConfig) -> float:
    """The fluid stability boundary (requests/s) where a prompt of l tokens also holds its memory for l / budget iterations.

    ``llmsched_env.fluid`` counts a prompt in one iteration, which is little off for prompts of some hundred
    tokens. One of 8,630 takes 34 iterations at a budget of 256, and its whole memory is set aside all along.
    """
    load = Fluid.of(statistics.prompt, statistics.output, statistics.weight, engine).load
    sums = load.sums.copy()
    sums[KV_CHARGED] += float(statistics.weight @ statistics.prompt**2) / engine.max_num_batched_tokens
    return boundary_of(CycleLoad(sums, engine), 1.0).rate


def first_token_budget(statistics: LengthStatistics, engine: EngineConfig) -> int:
    """256 tokens where they keep 99 % of the boundary, else 1,024, or 2,048 for mean prompts of more; never more than the engine's own.

    A larger budget computes waiting prompts sooner and makes every later token slower, which counts less
    under limits on both: where memory is the bottleneck there are few prompts to compute at a time and a
    small budget costs them nothing. Values as in ``fluid_budget``.
    """
    own = engine.max_num_batched_tokens
    if not _chunked(engine):
        return own
    if engine.max_num_seqs <= 256 < own:
        small = boundary_with_prefill(statistics, engine.replace(max_num_batched_tokens=256))
        if small >= 0.99 * boundary_with_prefill(statistics, engine):
            return 256
    return max(min(own, 2_048 if statistics.mean_prompt > 2_048 else 1_024), engine.max_num_seqs)


def _chunked(engine: EngineConfig) -> bool:
    """Whether prompts are computed in pieces, so that the token budget is free to choose."""
    return engine.preset != "paper" and engine.enable_chunked_prefill and not engine.padded_prefill


OUTPUT_WEIGHT = 3.0
"""A token to decode against one to prefill, in ``class_tokens``: it takes part in more iterations."""


def class_tokens(statistics: LengthStatistics, layout: QueueLayout) -> FloatArray:
    """(J,) E[prompt] + 3 E[output] of each class (tokens), the order of ``llmsched_baselines.expected_work``."""
    found: FloatArray = class_weights(statistics, layout) @ (statistics.prompt + OUTPUT_WEIGHT * statistics.output)
    return found


def _padded(edges: tuple[int, ...], count: int, last: int) -> tuple[int, ...]:
    """``count`` increasing edges: those given, then ones above every length, whose classes stay empty."""
    kept = list(edges[:count])
    while len(kept) < count:
        kept.append(max(last, kept[-1] if kept else 0) + 1)
    return tuple(kept)
