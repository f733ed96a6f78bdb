"""Typed records shared by the engine, the environment and the policies.

Units are seconds and tokens unless a name says otherwise. Array shapes use

======  ==============================================================
symbol  meaning
======  ==============================================================
N       requests of an episode
J       classes
K       segments of decode length
Q       queues, ``Q = J * K``; queue ``q = j * K + k``. ``k = 0`` is the
        outside queue of class j (no KV), ``k >= 1`` the boundary queue
        in front of segment k (KV kept)
======  ==============================================================
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from llmsched_env import checks
from llmsched_env.errors import ConfigError
from llmsched_env.records import Ints, Rows
from llmsched_env.tenant_terms import TenantTerms, check_terms

IntArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

ADMIT_ALL = int(np.iinfo(np.int32).max)
"""Count in ``Decision.admit`` that stands for "as many as fit"."""

TILE_TOKENS = 128
"""Least token budget of an iteration: a smaller batch takes a GPU as long as a whole tile of its matrix products
(the knee of ``llmsched_env.perf.models``)."""

MOST_PRIORITY = 500
"""Largest priority of a request, and least below 0: queue keys are numbers of 32 bits."""
MOST_QUEUES = 65_536
"""Largest Q of a layout: every step looks at every queue."""

ClassBy = Literal["single", "type", "prompt", "predicted", "output", "work", "tenant"]


class Decision(Rows):
    """What a policy asks of the engine for one iteration (``docs/engine-rules.md``, rules 2 and 3).

    Attributes:
        run: (Q,) int32, 1 where the residents already in the segment advance, 0 where they are
            held with their KV kept.
        admit: (Q,) int32, how many requests, oldest first, enter the segment from its queue in
            this iteration; ``ADMIT_ALL`` for as many as fit.
        evict: (Q,) int32, boundary queues only: how many of the most recently admitted requests
            of the queue give up their KV and go back outside before anything else happens.
        token_budget: tokens that the iteration may compute, decodes included (``vllm`` preset): 0, the default, for the
            engine's ``max_num_batched_tokens``; anything else is brought into ``TILE_TOKENS`` .. ``max_num_batched_tokens``.
            It may be smaller than ``max_num_seqs``: decodes beyond it wait for the next iteration, the oldest admissions go first.
    """

    SATURATES = True

    run: Ints
    admit: Ints
    evict: Ints
    token_budget: int

    def __init__(self, num_queues: int) -> None:
        super().__init__(self.empty(checks.integer("decision.num_queues", num_queues)))

    @classmethod
    def of(cls, run: npt.ArrayLike, admit: npt.ArrayLike, evict: npt.ArrayLike = 0, token_budget: int = 0) -> Decision:
        """Build a decision from three array-likes and a number; ``run`` fixes the number of queues.

        Raises:
            ConfigError: numbers that int32 cannot hold as they are, or shapes that do not fit; a larger ``admit`` is ``ADMIT_ALL``.
        """
        rows = np.atleast_1d(checks.any_array("decision.run", run))
        decision = cls(rows.shape[0] if rows.ndim == 1 else 0)
        for name, values in (("run", rows), ("admit", admit), ("evict", evict)):
            given = checks.any_array(f"decision.{name}", values)
            if given.dtype.kind not in "biuf" or given.shape not in ((), rows.shape) or rows.ndim != 1:
                raise ConfigError(f"decision.{name}: {checks.shown(values)}, must be one integer a queue, {rows.shape}")
            given = given.astype(np.float64)  # exact as far as int32 goes; small types would overflow below
            given = np.minimum(given, ADMIT_ALL) if name == "admit" else given
            if not np.all((given >= -ADMIT_ALL) & (given <= ADMIT_ALL) & (np.floor(given) == given)):
                raise ConfigError(f"decision.{name}: {checks.shown(values)}, must be integers below 2**31")
            getattr(decision, name)[:] = given
        decision.token_budget = checks.integer("decision.token_budget", token_budget)
        return decision

    @classmethod
    def greedy(cls, num_queues: int) -> Decision:
        """run = 1 and admit = all everywhere: the work-conserving decision."""
        decision = cls(num_queues)
        decision.run[:] = 1
        decision.admit[:] = ADMIT_ALL
        return decision

    def __repr__(self) -> str:
        admit = ["all" if a == ADMIT_ALL else int(a) for a in self.admit]
        budget = f", token_budget={self.token_budget}" if self.token_budget else ""
        return f"Decision(run={self.run.tolist()}, admit={admit}, evict={self.evict.tolist()}{budget})"


@dataclass(frozen=True, slots=True)
class Workload:
    """The requests of one episode, in arrival order.

    Attributes:
        arrival: (N,) float64 seconds, non-decreasing, >= 0.
        prompt_tokens: (N,) int32, >= 1.
        output_tokens: (N,) int32, >= 1, the number of tokens the request generates.
        type_id: (N,) int32, the type a scenario or a trace's ``type`` column gives; zeros if none.
        request_id: names for the per-request log; empty means 0 .. N-1.
        priority: (N,) int32 from -``MOST_PRIORITY`` to ``MOST_PRIORITY``, lower is served first; None: 0 for all. Read by engines with
            ``scheduling_policy="priority"`` alone.
        tenant: (N,) int32 >= 0, whose request it is; None: 0 for all.
        predicted_tokens: (N,) int32, >= 1: a predictor's word on ``output_tokens``, which policies see once the request has arrived;
            None where there is no predictor.
    """

    arrival: FloatArray
    prompt_tokens: IntArray
    output_tokens: IntArray
    type_id: IntArray
    request_id: tuple[str, ...] = ()
    priority: IntArray | None = None
    tenant: IntArray | None = None
    predicted_tokens: IntArray | None = None

    @classmethod
    def of(
        cls,
        arrival: npt.ArrayLike,
        prompt_tokens: npt.ArrayLike,
        output_tokens: npt.ArrayLike,
        type_id: npt.ArrayLike | None = None,
        request_id: tuple[str, ...] = (),
        priority: npt.ArrayLike | None = None,
        tenant: npt.ArrayLike | None = None,
        predicted_tokens: npt.ArrayLike | None = None,
    ) -> Workload:
        """Check and convert; raises ``ConfigError`` naming the first offending row."""
        times = checks.numbers("workload.arrival", arrival)
        if times.ndim != 1:
            raise ConfigError(f"workload.arrival: shape {times.shape}, must be one-dimensional")
        n = times.shape[0]
        columns: dict[str, IntArray] = {}
        for name, values in (("prompt_tokens", prompt_tokens), ("output_tokens", output_tokens), ("type_id", type_id)):
            if values is None and name == "type_id":
                columns[name] = np.zeros(n, np.int32)
                continue
            columns[name] = checks.counts(f"workload.{name}", values, 0 if name == "type_id" else 1)
            if columns[name].shape != (n,):
                raise ConfigError(f"workload.{name}: shape {columns[name].shape}, must be ({n},) as arrival has")
        urgency = None if priority is None else checks.counts("workload.priority", priority, -MOST_PRIORITY, MOST_PRIORITY)
        if urgency is not None and urgency.shape != (n,):
            raise ConfigError(f"workload.priority: shape {urgency.shape}, must be ({n},) as arrival has")
        owner = None if tenant is None else checks.counts("workload.tenant", tenant, 0, MOST_QUEUES - 1)
        if owner is not None and owner.shape != (n,):
            raise ConfigError(f"workload.tenant: shape {owner.shape}, must be ({n},) as arrival has")
        predicted = None if predicted_tokens is None else checks.counts("workload.predicted_tokens", predicted_tokens, 1)
        if predicted is not None and predicted.shape != (n,):
            raise ConfigError(f"workload.predicted_tokens: shape {predicted.shape}, must be ({n},) as arrival has")
        bad = np.flatnonzero(~((times >= 0) & (times <= checks.MOST_SECONDS)))
        if bad.size:
            raise ConfigError(
                f"workload.arrival: row {bad[0]} is {times[bad[0]]}, must be finite, >= 0 and <= {checks.MOST_SECONDS:g} seconds"
            )
        bad = np.flatnonzero(np.diff(times) < 0)
        if bad.size:
            i = int(bad[0])
            raise ConfigError(f"workload.arrival: row {i + 1} is {times[i + 1]} after {times[i]}, times must not decrease")
        if not isinstance(request_id, tuple | list) or not all(isinstance(name, str) for name in request_id):
            raise ConfigError(f"workload.request_id: {checks.shown(request_id)}, must be names (texts)")
        if request_id and len(request_id) != n:
            raise ConfigError(f"workload.request_id: {len(request_id)} names for {n} requests")
        lengths = (columns["prompt_tokens"], columns["output_tokens"], columns["type_id"])
        return cls(times, *lengths, tuple(request_id), urgency, owner, predicted)

    def __len__(self) -> int:
        return int(self.arrival.shape[0])

    def with_backlog(self, count: int) -> Workload:
        """The same requests, the first ``count`` at time 0 and the others as long after it as after request ``count - 1``."""
        count = min(count, len(self))
        if count <= 0:
            return self
        arrival = np.maximum(self.arrival - self.arrival[count - 1], 0.0)
        return dataclasses.replace(self, arrival=arrival)


@dataclass(frozen=True, slots=True)
class LengthStatistics:
    """A discretised joint distribution of (prompt, output) lengths: what an operator knows.

    Policies and the fluid model read lengths from here, never from the requests of the episode.

    Attributes:
        prompt: (M,) float64 tokens.
        output: (M,) float64 tokens.
        weight: (M,) float64, sums to 1.
        type_id: (M,) int32, the type of each support point (zeros for untyped workloads).
        source: where the numbers come from.
        tenant: (M,) int32, whose requests a support point stands for; None where there are no tenants.
        tenants: their names, weights and limits; empty where there are none.
        predicted: (M,) float64 tokens, what a predictor says of each support point, as logs of predicted and actual lengths tell it
            (``llmsched_env.workload.predictions``); None where there is no predictor.
    """

    prompt: FloatArray
    output: FloatArray
    weight: FloatArray
    type_id: IntArray
    source: str = ""
    tenant: IntArray | None = None
    tenants: tuple[TenantTerms, ...] = ()
    predicted: FloatArray | None = None

    @classmethod
    def of(
        cls,
        prompt: npt.ArrayLike,
        output: npt.ArrayLike,
        weight: npt.ArrayLike,
        type_id: npt.ArrayLike | None = None,
        source: str = "",
        tenant: npt.ArrayLike | None = None,
        tenants: tuple[TenantTerms, ...] = (),
        predicted: npt.ArrayLike | None = None,
    ) -> LengthStatistics:
        """Check, convert and normalise; raises ``ConfigError`` naming the field, and the row where it can."""
        p, o, w = (
            np.atleast_1d(checks.numbers(f"statistics.{name}", values))
            for name, values in (("prompt", prompt), ("output", output), ("weight", weight))
        )
        t = (
            np.zeros(p.shape, np.int32)
            if type_id is None
            else checks.counts("statistics.type_id", type_id, 0, MOST_QUEUES - 1, single=True)
        )
        if not (p.shape == o.shape == w.shape == t.shape and p.ndim == 1 and p.size):
            raise ConfigError(f"statistics: shapes {p.shape}, {o.shape}, {w.shape}, {t.shape} must be equal and (M,)")
        f = None if predicted is None else np.atleast_1d(checks.numbers("statistics.predicted", predicted))
        if f is not None and f.shape != p.shape:
            raise ConfigError(f"statistics.predicted: shape {f.shape}, must be {p.shape} as prompt has")
        for name, lengths in (("prompt", p), ("output", o), ("predicted", np.ones(0) if f is None else f)):
            bad = np.flatnonzero(~((lengths >= 1) & (lengths <= checks.MOST_TOKENS)))
            if bad.size:
                raise ConfigError(f"statistics.{name}: row {bad[0]} is {lengths[bad[0]]}, must be >= 1 and <= 2**30 tokens")
        if not (np.all(w >= 0) and np.all(w <= 1e100) and w.sum() > 0):
            raise ConfigError("statistics.weight: must be finite, >= 0, <= 1e100 and not all zero")
        checks.text("statistics.source", source)
        terms = check_terms("statistics.tenants", tenants)
        owner = None if tenant is None else checks.counts("statistics.tenant", tenant, 0, max(len(terms), 1) - 1, single=True)
        if owner is not None and owner.shape != p.shape:
            raise ConfigError(f"statistics.tenant: shape {owner.shape}, must be {p.shape} as prompt has")
        return cls(p, o, w / w.sum(), t, source, owner, terms, f)

    @property
    def num_types(self) -> int:
        return int(self.type_id.max()) + 1

    @property
    def num_tenants(self) -> int:
        """Tenants; 1 where none are declared."""
        return max(len(self.tenants), 1)

    @property
    def mean_prompt(self) -> float:
        return float(self.prompt @ self.weight)

    @property
    def mean_output(self) -> float:
        return float(self.output @ self.weight)

    @property
    def max_output(self) -> int:
        return math.ceil(float(self.output.max()))

    def without_predictions(self) -> LengthStatistics:
        """The lengths alone, each once a type and tenant: what takes longer the more points there are need not see predictions."""
        if self.predicted is None:
            return self
        owner = np.zeros_like(self.type_id) if self.tenant is None else self.tenant
        rows, index = np.unique(np.stack([self.type_id, owner, self.prompt, self.output]), axis=1, return_inverse=True)
        weight = np.bincount(index.ravel(), self.weight).astype(np.float64)
        tenant = None if self.tenant is None else rows[1].astype(np.int32)
        return LengthStatistics(rows[2], rows[3], weight, rows[0].astype(np.int32), self.source, tenant, self.tenants)

    def survival(self, length: float) -> float:
        """P(output > length)."""
        return float(self.weight[self.output > length].sum())


@dataclass(frozen=True, slots=True)
class QueueLayout:
    """Which queues the engine keeps: J classes, each with K segments of decode length.

    Attributes:
        by: what decides a request's class: ``single`` (one class), ``type`` (the workload's
            ``type_id``), ``prompt`` (prompt length, which a server knows at arrival), ``predicted`` (the output length
            that is predicted), ``output`` (output length: known lengths only), ``work`` (machine work of prompt and output,
            ``weights``: known lengths only) or ``tenant`` (the workload's ``tenant``).
        edges: class j holds lengths (tokens; ``work``: microseconds) <= edges[j]; the last class everything above. Increasing.
        prompt_edges: of ``predicted`` classes: each bucket by prompt length has all the buckets by prediction; class
            i * (len(edges) + 1) + j is bucket i by prompt length and j by prediction.
        num_types: J for ``by="type"`` and ``by="tenant"``.
        segment_ends: (K-1,) increasing decode lengths r_1 < r_2 < ...: a request that has generated
            r_k tokens and is not complete stands in the boundary queue of segment k+1.
        weights: (c, w0, w1) for ``by="work"``, seconds as in ``llmsched_env.work``; empty otherwise.
        tenant_weights: (J,) shares of the service that tenants are entitled to, > 0, of ``by="tenant"``; empty: all alike.
    """

    by: ClassBy = "single"
    edges: tuple[int, ...] = ()
    num_types: int = 1
    segment_ends: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    tenant_weights: tuple[float, ...] = ()
    prompt_edges: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        checks.one_of("layout.by", self.by, get_args(ClassBy))
        if len(self.weights) != (3 if self.by == "work" else 0):
            raise ConfigError(f"layout.weights: {self.weights}, must be (c, w0, w1) with by='work' and empty otherwise")
        object.__setattr__(self, "weights", tuple(checks.number("layout.weights", w, unit="seconds") for w in self.weights))
        for name in ("edges", "segment_ends", "prompt_edges"):
            given = getattr(self, name)
            values = checks.integers(f"layout.{name}", given, low=1, most=MOST_QUEUES)
            if any(b <= a for a, b in itertools.pairwise(values)):
                raise ConfigError(f"layout.{name}: {checks.shown(given)}, must be increasing integers >= 1")
            object.__setattr__(self, name, values)
        if self.edges and self.by not in ("prompt", "output", "work", "predicted"):
            raise ConfigError(f"layout.edges: {self.edges} given, but only prompt, output, work and predicted classes have edges")
        if self.prompt_edges and self.by != "predicted":
            raise ConfigError(f"layout.prompt_edges: {self.prompt_edges} given, but only predicted classes have them beside their edges")
        object.__setattr__(self, "num_types", checks.integer("layout.num_types", self.num_types, low=1, high=MOST_QUEUES))
        if self.num_types > 1 and self.by not in ("type", "tenant"):
            raise ConfigError(f"layout.num_types: {self.num_types}, must be 1 unless by='type' or by='tenant'")
        self._check_tenant_weights()
        if self.num_queues > MOST_QUEUES:
            raise ConfigError(f"layout: {self.num_classes} classes of {self.num_segments} segments, must be at most {MOST_QUEUES} queues")

    def _check_tenant_weights(self) -> None:
        if not isinstance(self.tenant_weights, tuple | list):
            raise ConfigError(f"layout.tenant_weights: {checks.shown(self.tenant_weights)}, must be one number > 0 for each tenant")
        if self.tenant_weights and (self.by != "tenant" or len(self.tenant_weights) != self.num_types):
            allowed = f"{self.num_types} for {self.num_types} tenants" if self.by == "tenant" else "none unless by='tenant'"
            raise ConfigError(f"layout.tenant_weights: {checks.shown(self.tenant_weights)}, must be {allowed}")
        weights = tuple(checks.number(f"layout.tenant_weights[{j}]", w, high=1e9, open_low=True) for j, w in enumerate(self.tenant_weights))
        object.__setattr__(self, "tenant_weights", weights)

    @property
    def class_weights(self) -> tuple[float, ...]:
        """(J,) weight of each class; 1 where none are given."""
        return self.tenant_weights or (1.0,) * self.num_classes

    @property
    def num_classes(self) -> int:
        if self.by in ("type", "tenant"):
            return self.num_types
        return (len(self.edges) + 1) * (len(self.prompt_edges) + 1)

    @property
    def num_segments(self) -> int:
        return len(self.segment_ends) + 1

    @property
    def num_queues(self) -> int:
        return self.num_classes * self.num_segments

    @property
    def reveals_output_length(self) -> bool:
        return self.by in ("output", "work")

    def queue(self, j: int, k: int = 0) -> int:
        return j * self.num_segments + k

    def work(self, prompt: npt.ArrayLike, output: npt.ArrayLike) -> FloatArray:
        """(n,) microseconds of machine work with ``by="work"`` (``llmsched_env.work``)."""
        c, w0, w1 = self.weights
        prompts, outputs = np.asarray(prompt, dtype=np.float64), np.asarray(output, dtype=np.float64)
        micros: FloatArray = 1e6 * (c * prompts + outputs * (w0 + w1 * (prompts + outputs / 2)))
        return micros

    def classify(
        self,
        prompt: npt.ArrayLike,
        output: npt.ArrayLike,
        type_id: npt.ArrayLike,
        tenant: npt.ArrayLike | None = None,
        predicted: npt.ArrayLike | None = None,
    ) -> IntArray:
        """(n,) int32 class of each request; ``tenant`` None stands for zeros.

        Raises:
            ConfigError: a type or tenant that the layout does not have, or classes by prediction where nothing is predicted.
        """
        if self.by == "single" or (self.by == "tenant" and tenant is None):
            return np.zeros(np.shape(prompt), np.int32)
        if self.by == "tenant":
            owners = np.asarray(tenant, dtype=np.int32)
            if owners.size and int(owners.max()) >= self.num_types:
                raise ConfigError(f"workload.tenant: {int(owners.max())}, must be below layout.num_types = {self.num_types}")
            return owners
        if self.by == "type":
            types = np.asarray(type_id, dtype=np.int32)
            if types.size and int(types.max()) >= self.num_types:
                raise ConfigError(f"workload.type_id: {int(types.max())}, must be below layout.num_types = {self.num_types}")
            return types
        if self.by == "predicted":
            if predicted is None:
                raise ConfigError("layout.by: 'predicted', but no lengths are predicted (workload.predicted_tokens, scenario.predictions)")
            longer = np.searchsorted(np.asarray(self.prompt_edges), np.asarray(prompt), side="left")
            bucket = np.searchsorted(np.asarray(self.edges), np.asarray(predicted), side="left")
            return (longer * (len(self.edges) + 1) + bucket).astype(np.int32)
        values = self.work(prompt, output) if self.by == "work" else np.asarray(prompt if self.by == "prompt" else output)
        return np.searchsorted(np.asarray(self.edges), values, side="left").astype(np.int32)


@dataclass(frozen=True, slots=True)
class IterationReport:
    """What one step really did.

    With ``EngineConfig.async_scheduling`` the batch, KV, admissions and evictions are those of the iteration scheduled in the step;
    duration, completions and tokens those of the one that ran meanwhile, if any.

    Attributes:
        start, duration: seconds; ``duration`` of an idle step is the jump of the clock.
        idle: nothing was scheduled: not an engine iteration.
        forced_drain: the decision scheduled nothing after the last arrival and was replaced.
        batch_size, decode_requests, prefill_requests, prefill_tokens, total_tokens: the batch.
        load: sum of KV tokens of the batch after the iteration's tokens (the paper's sum of l+s).
        kv_used: KV units reserved after residents and admissions (``paper``: charges l+s of all
            residents; ``vllm``: blocks held).
        admitted, completed, arrived, rejected: requests.
        evicted: ids evicted by the decision, newest admission first.
        preempted: ids evicted by force, in order.
        finished: ids completed in this step.
        waiting: requests outside after the step.
        system_seconds: number in system integrated over the step (request-seconds).
        completed_tokens: output tokens of the requests completed in this step.
        generated_tokens: output tokens sampled in this step.
    """

    start: float
    duration: float
    idle: bool
    forced_drain: bool
    batch_size: int
    decode_requests: int
    prefill_requests: int
    prefill_tokens: int
    total_tokens: int
    load: int
    kv_used: int
    admitted: int
    completed: int
    arrived: int
    rejected: int
    evicted: tuple[int, ...]
    preempted: tuple[int, ...]
    finished: tuple[int, ...]
    waiting: int
    system_seconds: float
    completed_tokens: int
    generated_tokens: int


@dataclass(frozen=True, slots=True)
class RequestLog:
    """Per-request outcome, arrays of shape (N,); NaN where the event has not happened.

    TTFT is the end of the iteration that yields the first output token minus arrival; latency the
    end of the last iteration minus arrival; TPOT (latency - TTFT) / (output_tokens - 1).
    """

    arrival: FloatArray
    prompt_tokens: IntArray
    output_tokens: IntArray
    class_id: IntArray
    admitted: FloatArray
    first_token: FloatArray
    completed: FloatArray
    evictions: IntArray
    forced_evictions: IntArray
    rejected: BoolArray
    request_id: tuple[str, ...] = ()
    tenant: IntArray | None = None

    def __len__(self) -> int:
        return int(self.arrival.shape[0])
