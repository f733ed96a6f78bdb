"""WAIT-CP: chunked prefill, a cap on the requests in the engine, and WAIT's rule for when an iteration starts."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np

from llmsched_baselines.policy import RulePolicy, Setting, need_vllm
from llmsched_env.compiled import compiled
from llmsched_env.engine.rules import Rule, rotated
from llmsched_env.engine.state import Engine
from llmsched_env.errors import ConfigError, InfeasibleError
from llmsched_env.fluid import equilibrium_of, find_boundary
from llmsched_env.records import Numbers
from llmsched_env.types import Decision, QueueLayout

OVERLOAD_SHARE = 0.98
"""Outside the stability region the default cap is that of the fluid model at this share of the boundary."""


@compiled
def collect_and_chunk(engine: Engine, policy: Numbers, decision: Decision) -> None:
    """Everything runs and the cap is filled.

    ``policy.parameters``: cap, prompts per iteration, 1 to wait; ``memory``: iterations launched.
    """
    room = max(int(policy.parameters[0]) - engine.num_residents, 0)
    need = 0
    if policy.parameters[2] != 0.0:
        need = rotated(policy.parameters[1], policy.memory[0])
        if engine.num_residents == 0:
            need = max(need, 1)
        need = min(need, room)  # a cap that is used up leaves nothing to wait for
    ready = engine.num_waiting >= need
    decision.run[0] = ready
    decision.admit[0] = room if ready else 0
    decision.evict[0] = 0
    if ready:
        policy.memory[0] += 1


class WaitCp(RulePolicy):
    """The chunked-prefill form of WAIT in the authors' later experiments (arXiv 2504.11320 v4, section 6; output lengths unknown).

    At most ``cap`` requests are in the engine. Prompts are prefilled in K = ceil(l / ``chunk``) iterations, so
    in balance P = cap / (K + l') requests enter in each; the token budget is that balance's,
    cap - P K + P K chunk. With ``wait`` an iteration starts only if as many requests stand outside as the
    rotation of P asks for, or the cap is used up. Without it nothing is left but the cap: the policy then is
    ``vllm`` with ``max_num_seqs = cap`` and this token budget.

    Here the budget is one for the batch; the authors' code also limits each request to ``chunk`` tokens an iteration.

    Args:
        cap: most requests in the engine; by default ``slack`` times the fluid equilibrium's number, at most what
            KV memory and the engine's own cap hold on average.
        chunk: tokens of a prompt per iteration.
        wait: wait to accumulate, or only cap.
        slack: cycle length over the fluid equilibrium's.
        overload: accept a rate outside the stability region (the cap is then that of a rate just inside); said in ``notes``.

    Raises:
        ConfigError: the ``paper`` preset, ``cap`` or ``chunk`` below 1.
        InfeasibleError: no cap given and the rate is outside the stability region.
    """

    name: ClassVar[str] = "wait-cp"

    def __init__(
        self,
        setting: Setting,
        cap: int | None = None,
        chunk: int = 256,
        wait: bool = True,
        slack: float = 1.25,
        overload: bool = False,
    ) -> None:
        need_vllm(self.name, setting.engine)
        for option, value in (("cap", 1 if cap is None else cap), ("chunk", chunk)):
            if value < 1:
                raise ConfigError(f"policy.{option}: {value}, must be >= 1")
        if not (math.isfinite(slack) and slack >= 1):
            raise ConfigError(f"policy.slack: {slack}, must be >= 1")
        self.layout = QueueLayout()
        self.cap = self._fluid_cap(setting, slack, overload) if cap is None else cap
        statistics = setting.statistics
        chunks = float(np.ceil(statistics.prompt / chunk) @ statistics.weight)
        prompts = self.cap / (chunks + statistics.mean_output)
        budget = math.ceil(self.cap - prompts * chunks + prompts * chunks * chunk)
        self.engine = setting.engine_for(max_num_seqs=self.cap, max_num_batched_tokens=max(budget, self.cap), enable_chunked_prefill=True)
        self.rule = Rule(collect_and_chunk, 1, [self.cap, prompts, float(wait)], memory=1)

    def _fluid_cap(self, setting: Setting, slack: float, overload: bool) -> int:
        """Residents of the fluid equilibrium (``FluidEquilibrium.batch``), with slack, within the engine's limits."""
        engine = setting.engine_for()
        boundary = find_boundary(setting.statistics, engine)
        rate = setting.rate
        if rate > boundary.rate:
            problem = f"{rate:.6g} requests/s is above the stability boundary, {boundary.rate:.6g} ({boundary.binding} binds)"
            if not overload:
                raise InfeasibleError(f"wait-cp: {problem}; give a cap, or overload=True")
            rate = OVERLOAD_SHARE * boundary.rate
            self.notes = f"overload: {problem}; cap of {rate:.6g} requests/s"
        fluid = equilibrium_of(setting.statistics, rate, engine)
        residents = fluid.batch.batch_size
        room = 1 / max(fluid.kv_usage, fluid.seq_usage)
        return max(1, math.floor(residents * min(slack, room) + 1e-9)) if slack > room else max(1, math.ceil(residents * slack - 1e-9))
