"""One constant setting of the action set ``operate``: level, token budget, ageing."""

from __future__ import annotations

import math
from typing import ClassVar

from llmsched_baselines.policy import RulePolicy, Setting, prompt_classes
from llmsched_env import checks
from llmsched_env.compiled import compiled
from llmsched_env.engine.rules import Rule
from llmsched_env.engine.state import Engine
from llmsched_env.errors import ConfigError
from llmsched_env.operate import decode_operate
from llmsched_env.peak import PeakRecord, peak_tables
from llmsched_env.records import Record, Vector
from llmsched_env.types import TILE_TOKENS, Decision
from llmsched_env.work import expected_work, work_weights


class OperateRecord(Record):
    level: float
    tau0: float
    token_budget: int
    cost: Vector  # (J,) work to expect of a request of each class, seconds
    peak: PeakRecord


@compiled
def operate(engine: Engine, policy: OperateRecord, decision: Decision) -> None:
    """The same setting in every iteration."""
    decision.token_budget = policy.token_budget
    decode_operate(engine, policy.peak, policy.level, policy.cost, policy.tau0, decision)


class Operate(RulePolicy):
    """Requests enter by (wait + tau0) / expected work while the predicted KV memory stays within a level; the token budget is constant.

    What an operator can do with a day's statistics: buckets by prompt length, the work to expect of each from the statistics and the
    engine's time model (``llmsched_env.work``), and three numbers that somebody has tuned.

    Args:
        num_classes: buckets of about equal probability by prompt length.
        level: share of the KV capacity that the predicted peak may reach.
        token_budget: tokens of an iteration, and residents at most; None: the engine's own.
        tau0: seconds of ageing; infinite: least expected work first.
        spare: blocks (tokens in the ``paper`` preset) counted for each resident beyond its own.

    Raises:
        ConfigError: an argument out of range.
    """

    name: ClassVar[str] = "operate"

    def __init__(
        self,
        setting: Setting,
        num_classes: int = 64,
        level: float = 0.99,
        token_budget: int | None = None,
        tau0: float = math.inf,
        spare: float = 1.0,
    ) -> None:
        if not 1 <= num_classes <= 4_096:
            raise ConfigError(f"policy.num_classes: {num_classes}, must be from 1 to 4096")
        checks.number("policy.level", level, high=2.0, open_low=True)
        checks.number("policy.tau0", tau0, high=math.inf, unit="seconds")
        checks.number("policy.spare", spare, high=64.0, unit="blocks")
        self.engine = engine = setting.engine_for()
        if token_budget is not None and (engine.preset == "paper" or not TILE_TOKENS <= token_budget <= engine.max_num_batched_tokens):
            most = "none: the paper preset has no token budget" if engine.preset == "paper" else engine.max_num_batched_tokens
            raise ConfigError(f"policy.token_budget: {token_budget}, must be from {TILE_TOKENS} to {most}")
        self.layout = prompt_classes(setting.statistics, num_classes)
        record = OperateRecord(
            cost=expected_work(setting.statistics, self.layout, work_weights(engine, setting.statistics)),
            peak=peak_tables(setting.statistics, self.layout, engine, spare).record(),
        )
        record.level, record.tau0, record.token_budget = level, tau0, token_budget or 0
        self.rule = Rule(operate, self.layout.num_queues, record)
