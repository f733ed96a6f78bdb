"""WAIT: wait until a class has collected its threshold, then serve a full batch (output lengths known)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, get_args

import numpy as np

from llmsched_baselines.policy import RulePolicy, Setting, output_classes
from llmsched_env.compiled import compiled
from llmsched_env.engine.rules import Rule, first_head_fits, rotated
from llmsched_env.engine.state import Engine
from llmsched_env.errors import ConfigError
from llmsched_env.fluid import WaitThresholds, check_wait, class_profiles, wait_thresholds_of
from llmsched_env.fluid.equilibrium import stage_shift
from llmsched_env.records import Counts, Record, Vector
from llmsched_env.types import Decision, FloatArray

Variant = Literal["paper", "any-trigger", "cap-releases", "implemented", "no-wait"]


class WaitRecord(Record):
    """What the rules of ``Wait`` read and remember, by class."""

    thresholds: Vector
    caps: Vector  # on residents; of the variants
    launched: Counts  # iterations so far
    any_trigger: bool
    cap_releases: bool
    no_wait: bool


@compiled
def free_a_full_memory(engine: Engine, launched: bool, advances: bool, decision: Decision) -> None:
    """Where new requests alone would run and not even the first fits, all residents advance."""
    if launched and not advances and not first_head_fits(engine, decision):
        for q in range(engine.settings.num_queues):
            decision.run[q] = 1


@compiled
def collect(engine: Engine, policy: WaitRecord, decision: Decision) -> None:
    """Every class whose queue holds its threshold."""
    queues = engine.queues
    launched = False
    advances = False
    for j in range(engine.settings.num_queues):
        need = rotated(policy.thresholds[j], policy.launched[j])
        if queues.residents[j] == 0:
            # Nothing to advance: an iteration of this class is worth launching for new requests only.
            need = max(need, 1)
        ready = queues.waiting[j] >= need
        decision.run[j] = ready
        decision.admit[j] = need if ready else 0
        decision.evict[j] = 0
        if ready:
            policy.launched[j] += 1
            launched = True
            advances = advances or queues.residents[j] > 0
    free_a_full_memory(engine, launched, advances, decision)


@compiled
def collect_variant(engine: Engine, policy: WaitRecord, decision: Decision) -> None:
    """The variants of ``Wait``."""
    queues, num_classes = engine.queues, engine.settings.num_queues
    launched = False
    advances = False
    for j in range(num_classes):
        quota = int(policy.thresholds[j])
        room = int(policy.caps[j]) - queues.residents[j]
        need = min(quota, room) if policy.cap_releases != 0 else quota
        ready = policy.no_wait != 0 or queues.waiting[j] >= need
        decision.run[j] = ready
        decision.admit[j] = max(min(quota, room), 0)
        decision.evict[j] = 0
        launched = launched or ready
    for j in range(num_classes):
        if policy.any_trigger != 0 and launched:
            decision.run[j] = 1
        if decision.run[j] == 0:
            decision.admit[j] = 0
        advances = advances or (decision.run[j] != 0 and queues.residents[j] > 0)
    free_a_full_memory(engine, launched, advances, decision)


class Wait(RulePolicy):
    """Algorithm 1 of arXiv 2504.11320 v4, per class j with threshold n_j.

    A class joins the iteration when its outside queue holds n_j requests: n_j enter and all its
    residents advance; otherwise it is frozen, KV kept. From an empty start no stage ever holds more
    than n_j, so "the oldest n_j of each stage" is all of them.

    Thresholds below one per iteration rotate: the class's i-th iteration asks for
    floor((i+1) n) - floor(i n) new requests and waits only for those (``llmsched_env.fluid``). Where
    memory is full of frozen residents and nothing could run, all classes advance; the conditions of
    the theory rule this out.

    Args:
        num_classes: buckets of equal probability by output length (types where the workload has types).
        thresholds: n_j per class; by default from the fluid model, checked after rounding.
        slack: cycle length over the fluid equilibrium's.
        rounding: ``auto``, ``integer`` or ``rotation``.
        overload: accept a rate outside the stability region (thresholds then fill memory) or given
            thresholds that break a condition; said in ``notes``.
        variant: ``paper``, or one of the rules that the authors' own experiments ran in its place (below).

    The other variants use whole thresholds max(floor(n_j), 1) and a cap on the residents of a class, n_j times
    its iterations per request, which no class may exceed:

    ================  ==============================================================================
    variant           rule
    ================  ==============================================================================
    ``any-trigger``   one class that has collected its threshold starts an iteration of all classes
    ``cap-releases``  a class whose cap is used up advances without waiting
    ``implemented``   both: the scheduler behind the curves of the paper's first version
    ``no-wait``       nobody waits: all residents advance, at most n_j enter, the cap alone remains
    ================  ==============================================================================

    Raises:
        ConfigError: an unknown variant.
        InfeasibleError: the conditions cannot be met, with the nearest feasible value.
    """

    name: ClassVar[str] = "wait"
    known_lengths: ClassVar[bool] = True

    def __init__(
        self,
        setting: Setting,
        num_classes: int = 4,
        thresholds: Sequence[float] | None = None,
        slack: float = 1.25,
        rounding: str = "auto",
        overload: bool = False,
        variant: Variant = "paper",
    ) -> None:
        if variant not in get_args(Variant):
            raise ConfigError(f"policy.variant: {variant!r}, must be one of {', '.join(get_args(Variant))}")
        self.layout = output_classes(setting.statistics, num_classes)
        self.engine = setting.engine_for()
        self.parameters: WaitThresholds
        if thresholds is None:
            self.parameters = wait_thresholds_of(
                setting.statistics,
                self.layout,
                setting.rate,
                self.engine,
                slack=slack,
                rounding=rounding,  # type: ignore[arg-type]
                overload=overload,
            )
        else:
            points = class_profiles(setting.statistics, self.layout)
            self.parameters = check_wait(
                thresholds,
                points.prompt,
                points.output,
                setting.rate * points.weight,
                self.engine,
                class_id=points.class_id,
                num_classes=points.num_classes,
                overload=overload,
            )
        self.notes = "; ".join(self.parameters.notes)
        if variant == "paper":
            quotas, caps = self.parameters.thresholds, np.empty(0)
        else:
            quotas, caps = self._quotas_and_caps(setting)
        record = WaitRecord(
            thresholds=np.array(quotas, dtype=np.float64), caps=caps, launched=np.zeros(self.layout.num_classes, dtype=np.int64)
        )
        record.any_trigger = variant in ("any-trigger", "implemented")
        record.cap_releases = variant in ("cap-releases", "implemented")
        record.no_wait = variant == "no-wait"
        self.rule = Rule(collect if variant == "paper" else collect_variant, self.layout.num_queues, record, known_lengths=True)

    def _quotas_and_caps(self, setting: Setting) -> tuple[FloatArray, FloatArray]:
        """(J,) whole thresholds, and (J,) caps on residents: threshold times the mean iterations of a request."""
        points = class_profiles(setting.statistics, self.layout)
        stages = points.output - stage_shift(self.engine) + 1
        mean = np.ones(points.num_classes)
        for j in range(points.num_classes):
            own = points.class_id == j
            if points.weight[own].sum() > 0:
                mean[j] = np.average(stages[own], weights=points.weight[own])
        n = self.parameters.thresholds
        return np.maximum(np.floor(n + 1e-9), 1.0), np.maximum(np.floor(n * mean + 1e-9), 1.0)
