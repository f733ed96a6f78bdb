"""Least expected work first; how far predicted lengths are trusted is learned from the requests that arrive and complete.

What is to be learned are three numbers of the predictor, in logarithms (``llmsched_env.shrinkage``): its offset, its scale and the
variance of its error. For a request with prediction, x is log(predicted) less what its prompt lets expect, m, and y is log(output) - m.

Arrivals tell the mean and the variance of x at once, for all requests alike. As the variance v of y is known from the lengths
of past requests, a predictor whose errors are independent of the lengths has the error variance Var(x) - v: the first guess, made
before anything has completed.

Completions tell the regression of y on x, Cov(x, y) / Var(x), and so the scale Cov(x, y) / v of a predictor that exaggerates or
evens out. They are censored: at first only short requests have completed. So the first guess counts as ``PRIOR_COMPLETIONS``
completions, and fades as more come in. Among completed requests some predictions are rarer than among all, since who is
predicted short goes first; the regression of y on x is the same among them, where variances and correlations are not.

Older requests count less (``MEMORY``), so a predictor that changes is followed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar

from llmsched_agents.recipe import fluid_budget
from llmsched_baselines import Setting
from llmsched_baselines.predicted import PredictedWork
from llmsched_env.compiled import compiled
from llmsched_env.engine.residents import generated
from llmsched_env.engine.rules import Rule
from llmsched_env.engine.state import Engine
from llmsched_env.peak import PeakRecord
from llmsched_env.records import Memory, Record
from llmsched_env.shrinkage import prompt_bucket, surprise
from llmsched_env.trust import decode_peak_by_trust
from llmsched_env.types import Decision

MEMORY = 2_000
"""Requests after which one counts 1/e."""

PRIOR_ARRIVALS = 20.0
PRIOR_ERROR = 0.36
"""Before any arrival the error variance is taken to be this, as if so many requests had shown it."""

PRIOR_COMPLETIONS = 200.0
"""Completions that the guess from arrivals counts as much as."""

REVISED_EVERY = 16
"""Arrivals after which the belief is written anew."""

LEAST_SCALE, MOST_SCALE = 0.25, 4.0


class LearningRecord(Record):
    """The policy in one setting and what it has learned in this episode."""

    level: float  # share of the memory that the predicted peak may reach
    variance: float  # of log(output) given the prompt, mean over all requests
    peak: PeakRecord
    # memory
    believed: Annotated[int, Memory]  # arrivals at which the belief is written next
    # sums over arrivals
    seen: Annotated[int, Memory]  # requests 0 .. seen - 1 count
    arrivals: Annotated[float, Memory]
    x: Annotated[float, Memory]
    x_squares: Annotated[float, Memory]
    known: Annotated[float, Memory]  # of v
    # and over completions
    completions: Annotated[float, Memory]
    done_x: Annotated[float, Memory]
    done_y: Annotated[float, Memory]
    done_squares: Annotated[float, Memory]
    done_products: Annotated[float, Memory]


@compiled
def note_arrivals(engine: Engine, policy: LearningRecord) -> None:
    """Requests that have arrived since the last decision."""
    keep = 1.0 - 1.0 / MEMORY
    prior = policy.peak.prior
    for r in range(policy.seen, engine.predictions.arrived):
        predicted = engine.arrived.predicted[r]
        if predicted > 0:
            x = surprise(prior, engine.requests.prompt[r], predicted)
            policy.arrivals = keep * policy.arrivals + 1.0
            policy.x = keep * policy.x + x
            policy.x_squares = keep * policy.x_squares + x * x
            policy.known = keep * policy.known + prior.variance[prompt_bucket(prior, engine.requests.prompt[r])]
    policy.seen = engine.predictions.arrived


@compiled
def note_completions(engine: Engine, policy: LearningRecord) -> None:
    """Requests that completed in the last iteration."""
    keep = 1.0 - 1.0 / MEMORY
    prior = policy.peak.prior
    for i in range(engine.report.completed):
        r = engine.events.finished[i]
        predicted, tokens = engine.arrived.predicted[r], generated(engine, r)
        if predicted > 0 and tokens > 0:
            x = surprise(prior, engine.requests.prompt[r], predicted)
            y = surprise(prior, engine.requests.prompt[r], tokens)
            policy.completions = keep * policy.completions + 1.0
            policy.done_x = keep * policy.done_x + x
            policy.done_y = keep * policy.done_y + y
            policy.done_squares = keep * policy.done_squares + x * x
            policy.done_products = keep * policy.done_products + x * y


@compiled
def believe(policy: LearningRecord) -> None:
    """Write what has been learned into ``peak.prior.belief``."""
    belief = policy.peak.prior.belief
    n = policy.arrivals + PRIOR_ARRIVALS
    mean = policy.x / n
    known = (policy.known + PRIOR_ARRIVALS * policy.variance) / n
    spread = (policy.x_squares + PRIOR_ARRIVALS * (policy.variance + PRIOR_ERROR)) / n - mean * mean
    spread = max(spread, 1e-9)
    slope = min(known / spread, 1.0)
    done = policy.completions
    if done >= 2.0:
        x, y = policy.done_x / done, policy.done_y / done
        squares = max(policy.done_squares / done - x * x, 1e-9)
        found = (policy.done_products / done - x * y) / squares
        slope = (PRIOR_COMPLETIONS * slope + done * found) / (PRIOR_COMPLETIONS + done)
    scale = min(max(slope * spread / max(known, 1e-9), LEAST_SCALE), MOST_SCALE)
    belief.trust = -1.0
    belief.offset = mean
    belief.scale = scale
    belief.error = max(spread / (scale * scale) - known, 0.0)


@compiled
def learn_and_decide(engine: Engine, policy: LearningRecord, decision: Decision) -> None:
    """The rule."""
    note_arrivals(engine, policy)
    note_completions(engine, policy)
    if engine.predictions.arrived >= policy.believed:
        believe(policy)
        policy.believed = engine.predictions.arrived + REVISED_EVERY
    decode_peak_by_trust(engine, policy.peak, policy.level, decision)


class LearnedShrinkage(PredictedWork):
    """``predicted-work`` whose trust in predictions is learned while it runs, from nothing but arrivals and completions.

    Args:
        level, spare, prompts, buckets: as of ``predicted-work``.

    Raises:
        ConfigError: an argument out of range.
    """

    name: ClassVar[str] = "learned-shrinkage"
    reads_arrivals: ClassVar[bool] = True  # ``note_arrivals`` walks requests 0 .. predictions.arrived - 1, in the order of their rows

    def __init__(self, setting: Setting, level: float = 0.99, spare: float = 1.0, prompts: int = 32, buckets: int = 8) -> None:
        super().__init__(with_fluid_budget(setting), 0.0, level, spare, prompts, buckets)
        first: Any = self.rule.policy
        record = LearningRecord(peak=first.peak)
        record.level = level
        record.variance = float(first.peak.prior.variance.mean())
        self.rule = Rule(learn_and_decide, self.layout.num_queues, record)


def with_fluid_budget(setting: Setting) -> Setting:
    """The setting with the token budget of ``llmsched_agents.recipe.fluid_budget``, unless the user has set one."""
    if "max_num_batched_tokens" in setting.overrides:
        return setting
    budget = fluid_budget(setting.statistics, setting.engine_for(), setting.rate)
    return replace(setting, overrides={**setting.overrides, "max_num_batched_tokens": budget})
