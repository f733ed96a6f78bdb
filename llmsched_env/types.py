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
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from llmsched_env import checks
from llmsched_env.errors import ConfigError
from llmsched_env.perf import IterationTimeModel, LinearTime, load_calibration
from llmsched_env.perf.base import check_model
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
MAX_BLOCK_SIZE = 65_536
"""Tokens; vLLM's own block sizes end far below."""
MOST_QUEUES = 65_536
"""Largest Q of a layout: every step looks at every queue."""

Preset = Literal["paper", "vllm"]
AdmissionOrder = Literal["arrival", "class"]
SchedulingPolicy = Literal["fcfs", "priority"]
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
class EngineConfig:
    """One engine, two presets (``EngineConfig.paper(...)`` and ``EngineConfig.vllm(...)``).

    Attributes:
        preset: ``paper`` (KV in tokens, whole prompts, eviction loses all progress) or ``vllm``
            (KV in blocks, chunked prefill, recompute preemption).
        time_model: seconds of one iteration from its batch; the default is measured on an A100 with Llama-2-7B (``llmsched_env.perf``).
        admission_order: global order of outside requests: queue key (``arrival``: arrival order,
            evicted requests first) or class first (``class``), requests of one class by queue key.
        class_rank: order of the classes under ``class``, one rank a class, smallest first; classes of
            equal rank by queue key. Empty: by index.
        late_after: seconds: a request that has waited longer for its first admission is admitted after
            all others. 0: no request is late.
        scheduling_policy: ``priority``: vLLM's ``--scheduling-policy priority`` (0.33; ``vllm`` preset). Requests enter by
            (``Workload.priority``, arrival), and where blocks lack the running one that is last in this order is preempted, whichever was
            admitted first (``docs/engine-rules.md``, rule 23).
        capacity_tokens: KV capacity C of the ``paper`` preset.
        boundary_slot: variant A of Nested WAIT: entering from a boundary queue costs one iteration
            that yields no token (``paper`` only).
        num_blocks: usable KV blocks (vLLM's ``num_gpu_blocks`` counts one null block more).
        block_size: tokens per block.
        max_num_batched_tokens: token budget of an iteration.
        max_num_seqs: most residents at once, held and boundary requests included.
        max_num_active_seqs: residents at which admission ends, at most ``max_num_seqs``; None: ``max_num_seqs`` (vLLM 0.31 on).
        long_prefill_token_threshold: most prompt tokens of one request in an iteration, while more than one request may run
            or enter; 0: no such limit (vLLM 0.31 on; 0.28 and 0.30 apply it to a request alone as well). vLLM 0.28 to 0.33 have
            no ``max_num_partial_prefills`` any more, so there is none here.
        prefill_schedule_interval: prefill waits until so many iterations have passed since the last one that carried prefill, while
            somebody decodes; an interval whose release could not drain the queue ends at once. 1: never (vLLM 0.33).
        prefill_interval_release: that early end. False: SGLang's ``--prefill-decode-interval`` N as an interval of N + 1,
            which keeps prefill back however long the queue is.
        max_model_len: longest prompt + output.
        enable_chunked_prefill: a prompt longer than the budget left is split.
        scheduler_reserve_full_isl: admit a prompt only if all its blocks are free (vLLM 0.28 default).
        watermark: fraction of blocks kept free at admissions while something runs.
        padded_prefill: Vidur's accounting of prefill batches: count x longest prompt <= budget.
        decode_needs_free_block: Vidur's accounting: every decode needs one free block.
        eviction: what a preempted request keeps in the ``vllm`` preset: its generated tokens, whose KV is
            rebuilt (``recompute``, vLLM), or nothing (``lose_progress``, as always in the ``paper`` preset).
        enable_prefix_caching: freed blocks keep their contents until they are taken again, and whoever enters takes
            over those that hold the head of its tokens (vLLM's default; off here as in the paper's model).
        async_scheduling: the next iteration is scheduled while one runs (vLLM's default on a GPU; ``vllm`` preset): it sees what the
            running one computes in number, not in value. So a request is scheduled once more after its last token, as one that ends by
            an end-of-sequence token is; one that ends by its ``max_tokens``, which vLLM knows beforehand, would be spared that token.
            See ``docs/engine-rules.md``, rule 22.
        oversize: requests above ``max_model_len`` (``paper``: above ``capacity_tokens``) are an
            ``error`` before the episode or are ``reject``-ed on arrival, as a server answers 400.
    """

    preset: Preset = "vllm"
    time_model: IterationTimeModel = field(default_factory=lambda: load_calibration("a100-llama2-7b-vllm"))
    admission_order: AdmissionOrder = "arrival"
    class_rank: tuple[int, ...] = ()
    late_after: float = 0.0
    scheduling_policy: SchedulingPolicy = "fcfs"
    capacity_tokens: int = 137_000
    boundary_slot: bool = False
    num_blocks: int = 7_424
    block_size: int = 16
    max_num_batched_tokens: int = 2_048
    max_num_seqs: int = 256
    max_num_active_seqs: int | None = None
    long_prefill_token_threshold: int = 0
    prefill_schedule_interval: int = 1
    prefill_interval_release: bool = True
    max_model_len: int = 4_096
    enable_chunked_prefill: bool = True
    scheduler_reserve_full_isl: bool = True
    watermark: float = 0.0
    padded_prefill: bool = False
    decode_needs_free_block: bool = False
    eviction: Literal["recompute", "lose_progress"] = "recompute"
    enable_prefix_caching: bool = False
    async_scheduling: bool = False
    oversize: Literal["error", "reject"] = "error"

    @classmethod
    def paper(cls, capacity_tokens: int, d0: float, d1: float, **options: Any) -> EngineConfig:
        """The model of arXiv 2504.11320: tau = d0 + d1 * KV tokens of the batch."""
        return cls(preset="paper", time_model=LinearTime(d0, d1), capacity_tokens=capacity_tokens, **options)

    @classmethod
    def vllm(cls, **options: Any) -> EngineConfig:
        """vLLM 0.28's scheduler for Llama-2-7B on one A100-80GB; defaults are vLLM's for that GPU
        (``vllm/engine/arg_utils.py`` 0.28.0: 2,048 tokens and 256 sequences for the API server)."""
        return cls(preset="vllm", **options)

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        for name, words in (
            ("preset", ("paper", "vllm")),
            ("admission_order", ("arrival", "class")),
            ("oversize", ("error", "reject")),
            ("eviction", ("recompute", "lose_progress")),
            ("scheduling_policy", ("fcfs", "priority")),
        ):
            checks.one_of(f"engine.{name}", getattr(self, name), words)
        put("class_rank", checks.integers("engine.class_rank", self.class_rank, high=2**29 - 1, most=MOST_QUEUES))
        if self.class_rank and self.admission_order != "class":
            raise ConfigError(f"engine.class_rank: {self.class_rank}, needs admission_order='class'")
        put("late_after", checks.number("engine.late_after", self.late_after, unit="seconds"))
        check_model(self.time_model)
        for name in ("capacity_tokens", "num_blocks", "block_size", "max_num_batched_tokens", "max_num_seqs", "max_model_len"):
            put(name, checks.integer(f"engine.{name}", getattr(self, name), low=1))
        self._check_prefill(put)
        for name in (
            "boundary_slot", "enable_chunked_prefill", "scheduler_reserve_full_isl", "padded_prefill", "decode_needs_free_block",
            "enable_prefix_caching", "async_scheduling",
        ):  # fmt: skip
            put(name, checks.flag(f"engine.{name}", getattr(self, name)))
        if self.scheduling_policy == "priority":
            self._check_priority()
        if self.block_size > MAX_BLOCK_SIZE:
            raise ConfigError(f"engine.block_size: {self.block_size}, must be from 1 to {MAX_BLOCK_SIZE} tokens")
        if checks.number("engine.watermark", self.watermark, high=1.0) == 1.0:
            raise ConfigError(f"engine.watermark: {self.watermark}, must be in [0, 1)")
        if self.preset == "paper":
            for name in ("padded_prefill", "decode_needs_free_block", "enable_prefix_caching", "async_scheduling"):
                if getattr(self, name):
                    raise ConfigError(f"engine.{name}: True, but it is an option of the vllm preset")
            return
        if self.enable_prefix_caching:
            for name in ("padded_prefill", "decode_needs_free_block"):
                if getattr(self, name):
                    raise ConfigError(f"engine.{name}: True, must be False with prefix caching (not a rule of vLLM)")
        if self.async_scheduling:
            for name in ("padded_prefill", "decode_needs_free_block"):
                if getattr(self, name):
                    raise ConfigError(f"engine.{name}: True, must be False with async_scheduling (not a rule of vLLM)")
        if self.boundary_slot:
            raise ConfigError("engine.boundary_slot: True, but it is an option of the paper preset")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"engine.max_num_batched_tokens: {self.max_num_batched_tokens}, must be >= max_num_seqs = {self.max_num_seqs}"
            )
        if (self.padded_prefill or not self.enable_chunked_prefill) and self.max_num_batched_tokens < self.max_model_len:
            why = "padded_prefill" if self.padded_prefill else "chunked prefill off"
            raise ConfigError(
                f"engine.max_num_batched_tokens: {self.max_num_batched_tokens} with {why}, must be >= max_model_len = {self.max_model_len}"
            )
        # A request of max_model_len tokens computes max_model_len - 1 of them, but vLLM asks for all.
        spare = int(self.decode_needs_free_block)
        if self.max_model_len > (self.num_blocks - spare) * self.block_size:
            raise ConfigError(
                f"engine.max_model_len: {self.max_model_len}, must fit the KV cache: <= "
                f"{(self.num_blocks - spare) * self.block_size} tokens ({self.num_blocks} blocks of {self.block_size})"
            )

    def _check_priority(self) -> None:
        """Options that do not combine with requests in the order of their priority."""
        if self.preset == "paper":
            raise ConfigError("engine.scheduling_policy: 'priority', but it is an option of the vllm preset")
        others = {"admission_order": "arrival", "late_after": 0.0, "padded_prefill": False, "decode_needs_free_block": False}
        for name, off in others.items():
            value = getattr(self, name)
            if value != off:
                raise ConfigError(f"engine.{name}: {value!r}, must be {off!r} with scheduling_policy='priority' (not a rule of vLLM)")

    def _check_prefill(self, put: Callable[[str, object], None]) -> None:
        """The settings that keep requests or prompt tokens back."""
        put("prefill_schedule_interval", checks.integer("engine.prefill_schedule_interval", self.prefill_schedule_interval, low=1))
        threshold = checks.integer("engine.long_prefill_token_threshold", self.long_prefill_token_threshold)
        put("long_prefill_token_threshold", threshold)
        put("prefill_interval_release", checks.flag("engine.prefill_interval_release", self.prefill_interval_release))
        if self.max_num_active_seqs is not None:
            put("max_num_active_seqs", checks.integer("engine.max_num_active_seqs", self.max_num_active_seqs, low=1))
        if not self.prefill_interval_release and self.prefill_schedule_interval == 1:
            raise ConfigError("engine.prefill_interval_release: False, needs prefill_schedule_interval above 1")
        given = {"prefill_schedule_interval": 1, "long_prefill_token_threshold": 0, "max_num_active_seqs": None}
        for name, off in given.items():
            if getattr(self, name) == off:
                continue
            if self.preset == "paper":
                raise ConfigError(f"engine.{name}: {getattr(self, name)}, but it is an option of the vllm preset")
            if self.padded_prefill or self.decode_needs_free_block:
                rule = "padded_prefill" if self.padded_prefill else "decode_needs_free_block"
                raise ConfigError(f"engine.{name}: {getattr(self, name)}, must be {off} with {rule} (not a rule of vLLM)")
        if self.preset == "paper":
            return
        if self.max_num_active_seqs is not None and self.max_num_active_seqs > self.max_num_seqs:
            raise ConfigError(f"engine.max_num_active_seqs: {self.max_num_active_seqs}, must be <= max_num_seqs = {self.max_num_seqs}")
        if threshold > self.max_model_len:
            raise ConfigError(f"engine.long_prefill_token_threshold: {threshold}, must be <= max_model_len = {self.max_model_len}")

    @property
    def most_active(self) -> int:
        """Residents at which admission ends."""
        return self.max_num_seqs if self.max_num_active_seqs is None else self.max_num_active_seqs

    @property
    def kv_capacity(self) -> int:
        """KV units: tokens (``paper``) or blocks (``vllm``)."""
        return self.capacity_tokens if self.preset == "paper" else self.num_blocks

    @property
    def kv_capacity_tokens(self) -> int:
        return self.capacity_tokens if self.preset == "paper" else self.num_blocks * self.block_size

    @property
    def watermark_blocks(self) -> int:
        """vLLM 0.28 ``kv_cache_manager.py``: int(watermark * num_blocks), the null block counted."""
        return 0 if self.preset == "paper" else int(self.watermark * (self.num_blocks + 1))

    @property
    def longest_request(self) -> int:
        """Largest prompt + output (tokens) the engine can ever serve."""
        return self.capacity_tokens if self.preset == "paper" else self.max_model_len

    def replace(self, **changes: Any) -> EngineConfig:
        """The same with other fields; raises ``ConfigError`` for an unknown one or a refused value."""
        names = [f.name for f in dataclasses.fields(self)]
        for name in changes:
            if name not in names:
                raise ConfigError(f"engine.{name}: unknown field (allowed: {', '.join(names)})")
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, slots=True)
class EpisodeLimits:
    """When an episode ends.

    Attributes:
        drain: after the last arrival, a decision that schedules nothing is replaced by one greedy
            iteration, so that every request completes (design rule 14); otherwise the episode ends
            with the requests that no decision moves left where they stand.
        horizon: seconds; an iteration that ends later does not count.
        max_iterations: safety net, idle steps counted; reaching it truncates the episode and is reported.
    """

    drain: bool = True
    horizon: float = math.inf
    max_iterations: int = 10_000_000

    def __post_init__(self) -> None:
        object.__setattr__(self, "drain", checks.flag("limits.drain", self.drain))
        checks.number("limits.horizon", self.horizon, high=math.inf, unit="seconds", open_low=True)
        object.__setattr__(self, "max_iterations", checks.integer("limits.max_iterations", self.max_iterations, low=1, high=2**62))


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
