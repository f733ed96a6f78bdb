"""WAIT: wait until a class has collected its threshold, then serve a full batch (output lengths known)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from baselines.policy import Policy, Setting, first_head_fits, output_classes
from llmsched_env.backend import View
from llmsched_env.fluid import WaitThresholds, check_wait, class_profiles, rotation_quota, wait_thresholds_of
from llmsched_env.types import Decision


class Wait(Policy):
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

    Raises:
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
    ) -> None:
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
        self._decision = Decision(self.layout.num_queues)
        self._launched = [0] * self.layout.num_classes
        self.reset()

    def reset(self) -> None:
        self._launched = [0] * self.layout.num_classes

    def decide(self, view: View) -> Decision:
        run, admit = self._decision.run, self._decision.admit
        waiting = view.waiting
        residents = view.residents
        quotas = rotation_quota(self.parameters.thresholds, self._launched)
        for j, launched in enumerate(self._launched):
            need = int(quotas[j])
            if residents[j, 0] == 0:
                # Nothing to advance: an iteration of this class is worth launching for new requests only.
                need = max(need, 1)
            ready = waiting[j, 0] >= need
            run[j] = ready
            admit[j] = need if ready else 0
            if ready:
                self._launched[j] = launched + 1
        if run.any() and not residents[run != 0].any() and not first_head_fits(view, admit):
            run[:] = 1
        return self._decision


