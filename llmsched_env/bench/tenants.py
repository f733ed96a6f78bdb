"""Policies on a scenario with tenants: what each tenant gets, over seeds, and the differences to the first policy, seed by seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from llmsched_agents.lookup import NamedPolicy
from llmsched_baselines import Setting
from llmsched_baselines.overrides import Overrides
from llmsched_env.errors import ConfigError
from llmsched_env.markdown import table
from llmsched_env.metrics import Interval, mean_interval
from llmsched_env.runner import run_episode
from llmsched_env.tenant_metrics import TenantFigures, summarize_tenants
from llmsched_env.workload import Scenario


@dataclass(frozen=True, slots=True)
class TenantRow:
    """One tenant in one run: a line of ``tenants.csv``.

    Attributes:
        policy, seed: the run.
        figures: the tenant's.
        jain, contended_seconds, fair_latency, weighted_goodput: of the whole run (``TenantSummary``).
    """

    policy: str
    seed: int
    figures: TenantFigures
    jain: float
    contended_seconds: float
    fair_latency: float
    weighted_goodput: float


@dataclass(frozen=True, slots=True)
class TenantComparison:
    """What is compared; the same seed gives every policy the same requests.

    Raises:
        ConfigError: a scenario without tenants.
    """

    scenario: Scenario
    policies: Mapping[str, NamedPolicy]
    rate: float
    seeds: tuple[int, ...]
    num_requests: int
    overrides: Overrides

    def __post_init__(self) -> None:
        if self.scenario.tenants is None:
            raise ConfigError(f"scenario: {self.scenario.name!r} has no tenants (docs/tenants.md says how to declare them)")

    def rows(self) -> Iterator[list[TenantRow]]:
        """The rows of each run, policies side by side within a seed.

        Raises:
            ConfigError: a policy that refuses the setting.
        """
        scenario = self.scenario
        setting = Setting(scenario.statistics, self.rate, scenario.engine, self.num_requests / self.rate, self.overrides.engine)
        built = {name: policy.build(setting, **self.overrides.options(name)) for name, policy in self.policies.items()}
        for seed in self.seeds:
            workload = scenario.generate(seed, rate=self.rate, num_requests=self.num_requests)
            for name, policy in built.items():
                found = summarize_tenants(run_episode(policy, workload).log, scenario.statistics.tenants)
                whole = (found.jain, found.contended_seconds, found.fair_latency, found.weighted_goodput)
                yield [TenantRow(name, seed, figures, *whole) for figures in found.tenants]


Figure = Callable[[TenantRow], float]


def interval(rows: Sequence[TenantRow], policy: str, figure: Figure, than: str | None = None) -> Interval:
    """Mean of a figure of a policy over the seeds on which it is defined, or of the difference to another policy's, seed by seed."""
    own = {row.seed: figure(row) for row in rows if row.policy == policy}
    other = {row.seed: figure(row) for row in rows if row.policy == than} if than is not None else dict.fromkeys(own, 0.0)
    values = [own[seed] - other[seed] for seed in own if seed in other]
    defined = [value for value in values if math.isfinite(value)]
    return mean_interval(defined) if defined else Interval(math.nan, math.nan, math.nan, 0)


def shown(found: Interval, digits: int, *, signed: bool = False) -> str:
    """An interval in a cell."""
    if found.n == 0:
        return "-"
    mean = f"{found.mean:+.{digits}f}" if signed else f"{found.mean:.{digits}f}"
    return mean if math.isnan(found.half_width) else f"{mean} ± {found.half_width:.{digits}f}"


WHOLE: tuple[tuple[str, Figure, int], ...] = (
    ("Jain's index", lambda row: row.jain, 3),
    ("mean latency by weight (s)", lambda row: row.fair_latency, 2),
    ("goodput by weight", lambda row: row.weighted_goodput, 3),
)
"""Figures of a run."""

OWN: tuple[tuple[str, Figure, int], ...] = (
    ("mean latency (s)", lambda row: row.figures.latency_mean, 2),
    ("P99 latency (s)", lambda row: row.figures.latency_p99, 1),
    ("goodput", lambda row: row.figures.goodput, 3),
    ("contended service (1,000 tokens)", lambda row: row.figures.contended_service / 1000, 0),
)
"""Figures of a tenant."""


def tables(rows: Sequence[TenantRow], policies: Sequence[str]) -> list[str]:
    """Two tables in Markdown: the runs, and the tenants. Differences are to the first policy."""
    first = policies[0]
    one_each = [row for row in rows if row.figures.name == rows[0].figures.name]
    heads = [head for name, _, _ in WHOLE for head in (name, f"less {first}'s")]
    lines = table(["policy", *heads], [[name, *_cells(one_each, name, first, WHOLE)] for name in policies], "lr")
    body = []
    for tenant in dict.fromkeys((row.figures.name, row.figures.weight) for row in rows):
        mine = [row for row in rows if row.figures.name == tenant[0]]
        for name in policies:
            cells = _cells(mine, name, first, OWN[:1]) + [shown(interval(mine, name, figure), digits) for _, figure, digits in OWN[1:]]
            body.append([tenant[0], f"{tenant[1]:g}", name, *cells])
    heads = [OWN[0][0], f"less {first}'s", *(head for head, _, _ in OWN[1:])]
    return [*lines, "", *table(["tenant", "weight", "policy", *heads], body, "lrlr")]


def _cells(rows: Sequence[TenantRow], policy: str, first: str, figures: Sequence[tuple[str, Figure, int]]) -> list[str]:
    cells = []
    for _, figure, digits in figures:
        less = "" if policy == first else shown(interval(rows, policy, figure, first), digits, signed=True)
        cells += [shown(interval(rows, policy, figure), digits), less]
    return cells
