"""Tenants: whose requests a scenario's are, with the traffic, the weight and the latency limits of each.

A tenant either takes a *share* of the scenario's common arrivals, each of which is somebody's at random, or has arrivals *of its
own*. Its lengths are the scenario's unless it has a model of its own. ``TenantMix.scenario_parts`` joins them to the one
arrival process and the one length model of a ``Scenario``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmsched_env import checks
from llmsched_env.errors import ConfigError
from llmsched_env.tenant_terms import MOST_WEIGHT, TenantTerms, check_terms
from llmsched_env.types import FloatArray, IntArray, LengthStatistics, QueueLayout, Workload
from llmsched_env.workload.arrivals import ArrivalProcess, check_count, check_positive
from llmsched_env.workload.lengths import LengthModel, TraceLengths


@dataclass(frozen=True, slots=True, eq=False)
class Tenant:
    """One tenant.

    Attributes:
        name: for people.
        weight: share of the service that it is entitled to, relative to the others', > 0.
        ttft_slo, tpot_slo: its latency limits, seconds.
        share: part of the common arrivals that is its own, relative to the shares of the others, > 0.
        arrivals: arrivals of its own instead of a share.
        lengths: its length model; None for the scenario's.

    Raises:
        ConfigError: a value out of range.
    """

    name: str
    weight: float = 1.0
    ttft_slo: float = 1.0
    tpot_slo: float = 0.1
    share: float = 1.0
    arrivals: ArrivalProcess | None = None
    lengths: LengthModel | None = None

    def __post_init__(self) -> None:
        _ = self.terms
        checks.number("tenant.share", self.share, high=MOST_WEIGHT, open_low=True)
        if self.arrivals is not None and not isinstance(self.arrivals, ArrivalProcess):
            raise ConfigError(f"tenant.arrivals: {checks.shown(self.arrivals)}, must be an ArrivalProcess")
        if self.lengths is not None and not isinstance(self.lengths, LengthModel):
            raise ConfigError(f"tenant.lengths: {checks.shown(self.lengths)}, must be a LengthModel")

    @property
    def terms(self) -> TenantTerms:
        """What it has been promised."""
        return TenantTerms(self.name, self.weight, self.ttft_slo, self.tpot_slo)


@dataclass(frozen=True, slots=True, eq=False)
class JoinedArrivals(ArrivalProcess):
    """Several processes at once.

    Attributes:
        processes: at least one; each has a random stream of its own.
    """

    processes: tuple[ArrivalProcess, ...]

    @property
    def rate(self) -> float:
        return float(sum(process.rate for process in self.processes))

    def with_rate(self, rate: float) -> JoinedArrivals:
        """All processes faster or slower by one factor."""
        factor = check_positive("arrivals.rate", rate, "requests/s") / self.rate
        return JoinedArrivals(tuple(process.with_rate(process.rate * factor) for process in self.processes))

    def sample(self, rng: np.random.Generator, num_requests: int) -> FloatArray:
        return self.sample_from(rng, num_requests, None)[0]

    def sample_until(self, rng: np.random.Generator, horizon: float) -> FloatArray:
        return self.sample_from(rng, None, horizon)[0]

    def sample_from(self, rng: np.random.Generator, num_requests: int | None, horizon: float | None) -> tuple[FloatArray, IntArray]:
        """(n,) seconds, non-decreasing, and (n,) number of the process each is from; those of one time in the order of the processes.

        The first ``num_requests``, all until ``horizon`` seconds, or as many of these.
        """
        drawn: list[FloatArray] = []
        for process, own in zip(self.processes, rng.spawn(len(self.processes)), strict=True):
            # Whoever is among the first n of all is among the first n of its process.
            count = 0 if horizon is not None else check_count("num_requests", num_requests)
            drawn.append(process.sample(own, count) if horizon is None else process.sample_until(own, horizon))
        times = np.concatenate(drawn)
        whence = np.repeat(np.arange(len(drawn), dtype=np.int32), [part.size for part in drawn])
        order = np.argsort(times, kind="stable")[:num_requests]
        return times[order], whence[order]


@dataclass(frozen=True, slots=True, eq=False)
class JoinedLengths(LengthModel):
    """The lengths of several tenants, whose requests come in given proportions.

    Attributes:
        parts: the length model of each tenant.
        proportions: (T,) share of all requests that is each tenant's.
        terms: of each tenant.
    """

    parts: tuple[LengthModel, ...]
    proportions: tuple[float, ...]
    terms: tuple[TenantTerms, ...]

    def sample(self, rng: np.random.Generator, n: int) -> tuple[IntArray, IntArray, IntArray]:
        """Requests of anybody, in these proportions."""
        owner = rng.choice(len(self.parts), size=check_count("n", n), p=np.asarray(self.proportions) / sum(self.proportions))
        return self.sample_of(rng, owner.astype(np.int32))

    def sample_of(self, rng: np.random.Generator, owner: IntArray) -> tuple[IntArray, IntArray, IntArray]:
        """Requests of the tenants in (n,) ``owner``; each tenant has a random stream of its own, in which its requests stand in order."""
        columns = tuple(np.zeros(owner.size, dtype=np.int32) for _ in range(3))
        for i, (part, own) in enumerate(zip(self.parts, rng.spawn(len(self.parts)), strict=True)):
            mine = np.flatnonzero(owner == i)
            for column, values in zip(columns, part.sample(own, mine.size), strict=True):
                column[mine] = values
        return columns[0], columns[1], columns[2]

    def statistics(self) -> LengthStatistics:
        """The points of all tenants, each tenant's weighing as much as its requests are of all."""
        known = [part.statistics() for part in self.parts]
        share = np.asarray(self.proportions) / sum(self.proportions)
        sources = dict.fromkeys(one.source for one in known)
        return LengthStatistics.of(
            np.concatenate([one.prompt for one in known]),
            np.concatenate([one.output for one in known]),
            np.concatenate([one.weight * part for one, part in zip(known, share, strict=True)]),
            np.concatenate([one.type_id for one in known]),
            "; ".join(sources),
            np.repeat(np.arange(len(known)), [one.prompt.size for one in known]),
            self.terms,
        )


@dataclass(frozen=True, slots=True, eq=False)
class TenantMix:
    """The tenants of a scenario.

    Attributes:
        tenants: in the order of ``Workload.tenant``.

    Raises:
        ConfigError: none, or two of one name.
    """

    tenants: tuple[Tenant, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "tenants", tuple(self.tenants))
        if not self.tenants or not all(isinstance(tenant, Tenant) for tenant in self.tenants):
            raise ConfigError(f"tenants: {checks.shown(self.tenants)}, must be at least one Tenant")
        _ = check_terms("tenants", self.terms)

    @property
    def terms(self) -> tuple[TenantTerms, ...]:
        return tuple(tenant.terms for tenant in self.tenants)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(tenant.name for tenant in self.tenants)

    @property
    def layout(self) -> QueueLayout:
        """A class for each tenant, with its weight."""
        return QueueLayout(by="tenant", num_types=len(self.tenants), tenant_weights=tuple(tenant.weight for tenant in self.tenants))

    @property
    def sharing(self) -> tuple[int, ...]:
        """Tenants that take a share of the common arrivals."""
        return tuple(i for i, tenant in enumerate(self.tenants) if tenant.arrivals is None)

    def scenario_parts(self, arrivals: ArrivalProcess | None, lengths: LengthModel | None) -> tuple[JoinedArrivals, JoinedLengths]:
        """The arrivals and lengths of a scenario with these tenants.

        Args:
            arrivals: the common process; None where every tenant has its own.
            lengths: of the tenants without a model of their own; None where there are none.

        Raises:
            ConfigError: a common part that is missing, or arrivals that would be nobody's.
        """
        if self.sharing and arrivals is None:
            raise ConfigError(f"arrivals: missing, tenant {self.tenants[self.sharing[0]].name!r} has none of its own")
        if not self.sharing and arrivals is not None:
            raise ConfigError("arrivals: given, but every tenant has arrivals of its own")
        lacking = [tenant.name for tenant in self.tenants if tenant.lengths is None]
        if lacking and lengths is None:
            raise ConfigError(f"lengths: missing, tenant {lacking[0]!r} has none of its own")
        common = () if arrivals is None else (arrivals,)
        joined = JoinedArrivals((*common, *(tenant.arrivals for tenant in self.tenants if tenant.arrivals is not None)))
        shares = sum(self.tenants[i].share for i in self.sharing)
        common_rate = 0.0 if arrivals is None else arrivals.rate
        rates = [t.arrivals.rate if t.arrivals is not None else common_rate * t.share / shares for t in self.tenants]
        parts = tuple(tenant.lengths if tenant.lengths is not None else lengths for tenant in self.tenants)
        return joined, JoinedLengths(parts, tuple(rate / joined.rate for rate in rates), self.terms)  # type: ignore[arg-type]  # none is None

    def check_parts(self, arrivals: ArrivalProcess, lengths: LengthModel) -> None:
        """Refuse a scenario whose parts were not made by ``scenario_parts``.

        Raises:
            ConfigError: others.
        """
        for name, part, kind in (("arrivals", arrivals, JoinedArrivals), ("lengths", lengths, JoinedLengths)):
            if not isinstance(part, kind):
                raise ConfigError(f"scenario.{name}: {type(part).__name__}, must be what TenantMix.scenario_parts gives")

    def recorded_lengths(self, prompt: IntArray, output: IntArray, type_id: IntArray, tenant: IntArray, source: str) -> JoinedLengths:
        """The lengths of (n,) recorded requests of these tenants."""
        rows = [np.flatnonzero(tenant == i) for i in range(len(self.tenants))]
        parts = tuple(TraceLengths(prompt[r], output[r], type_id[r], source) for r in rows)
        return JoinedLengths(parts, tuple(r.size / tenant.size for r in rows), self.terms)

    def draw(
        self,
        scenario_parts: tuple[ArrivalProcess, LengthModel],
        for_times: np.random.Generator,
        for_lengths: np.random.Generator,
        num_requests: int | None,
        horizon: float | None,
    ) -> Workload:
        """The requests of an episode: the first ``num_requests``, all until ``horizon`` seconds, or as many of these.

        Args:
            scenario_parts: arrivals, maybe at another rate, and lengths of ``scenario_parts``.
            for_times, for_lengths: random streams. The same streams give each tenant the same requests in the same order at any rate.
        """
        arrivals, lengths = scenario_parts
        assert isinstance(arrivals, JoinedArrivals) and isinstance(lengths, JoinedLengths)
        times, whence = arrivals.sample_from(for_times, num_requests, horizon)
        own = np.array([i for i, tenant in enumerate(self.tenants) if tenant.arrivals is not None], dtype=np.int32)
        if self.sharing:
            edges = np.cumsum([self.tenants[i].share for i in self.sharing])
            drawn = np.searchsorted(edges, for_times.random(times.size) * edges[-1], side="right")
            shared = np.array(self.sharing, dtype=np.int32)[np.minimum(drawn, len(self.sharing) - 1)]
            tenant = np.where(whence == 0, shared, np.concatenate([[-1], own]).astype(np.int32)[whence]).astype(np.int32)
        else:
            tenant = own[whence]
        # Valid by construction, as in ``Scenario.generate``.
        return Workload(times, *lengths.sample_of(for_lengths, tenant), tenant=tenant)
