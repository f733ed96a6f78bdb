"""Which settings and which policy to run: what is asked for, what is compared, and one simulation of it.

A setting of the server is a ``Choice``: a policy, its options, and flags of vLLM as engine fields. A ``Case`` is the operator's workload
on the calibrated engine, cut into requests that the search sees and requests that it does not, so that a gain reported on the latter is
not one that the search has picked by luck.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmsched_agents.lookup import NamedPolicy
from llmsched_baselines import Setting
from llmsched_env.bench.comparison import shortest_request
from llmsched_env.bench.variants import split_options
from llmsched_env.engine_changes import engine_with
from llmsched_env.errors import ConfigError, did_you_mean, policy_named
from llmsched_env.metrics import Summary, summarize
from llmsched_env.runner import Policy, run_episode
from llmsched_env.types import LengthStatistics, Workload
from llmsched_env.workload import Scenario
from llmsched_env.workload.lengths import TraceLengths

LEAST_WINDOW = 20
"""Requests of one window of a trace: fewer say nothing of a queue."""

PRICED = {"latency": "latency_mean", "p99": "latency_p99", "ttft": "ttft_mean", "ttft-p99": "ttft_p99", "tpot": "tpot_mean"}
"""Metrics that ``--at-most`` can hold, by their word."""
MEANS = {"latency": "latency_mean", "p99": "latency_p99", "ttft": "ttft_mean", "tpot": "tpot_mean"}
NAMES = {
    "latency_mean": "mean latency (s)",
    "latency_p99": "P99 latency (s)",
    "ttft_mean": "mean TTFT (s)",
    "ttft_p99": "P99 TTFT (s)",
    "tpot_mean": "mean TPOT (s)",
    "throughput_tok_s": "output tokens/s",
    "slo_goodput": "share within the limits",
}
"""What is reported of every setting, by field of ``Summary``."""
HIGHER = ("throughput_tok_s", "slo_goodput")
"""Metrics of which more is better."""
_SLO = "slo:ttft=SECONDS,tpot=SECONDS (either may be left out)"


@dataclass(frozen=True, slots=True)
class Objective:
    """What the search looks for.

    Attributes:
        text: as given.
        metric: field of ``Summary``.
        ttft_limit, tpot_limit: seconds, of ``slo_goodput``; infinite where there is no limit.
    """

    text: str
    metric: str
    ttft_limit: float = math.inf
    tpot_limit: float = math.inf

    @property
    def higher_is_better(self) -> bool:
        return self.metric in HIGHER

    @property
    def name(self) -> str:
        """For people, with the limits."""
        if self.metric != "slo_goodput":
            return NAMES[self.metric]
        limits = [(word, value) for word, value in (("TTFT", self.ttft_limit), ("TPOT", self.tpot_limit)) if math.isfinite(value)]
        return "share of requests with " + " and ".join(f"{word} <= {value:g} s" for word, value in limits)

    @property
    def metrics(self) -> tuple[str, ...]:
        """What is reported beside it, itself included."""
        return tuple(name for name in NAMES if name != "slo_goodput" or self.metric == name)

    def cost(self, figures: Summary) -> float:
        """Lower is better; infinite where requests were left unserved."""
        value = float(getattr(figures, self.metric))
        if figures.completed + figures.rejected < figures.requests or math.isnan(value):
            return math.inf
        return -value if self.higher_is_better else value


def parse_objective(text: str) -> Objective:
    """``latency``, ``p99``, ``ttft``, ``tpot`` or ``slo:ttft=1.0,tpot=0.05``.

    Raises:
        ConfigError: another word (the nearest is given), a limit that is unknown, twice there or no number of seconds > 0.
    """
    allowed = f"must be one of {', '.join(MEANS)}, {_SLO}"
    word, colon, rest = text.strip().partition(":")
    if not colon and word in MEANS:
        return Objective(word, MEANS[word])
    if word != "slo":
        raise ConfigError(f"--objective: {text!r}, {allowed}{did_you_mean(word, (*MEANS, 'slo'))}")
    limits: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in rest.split(","))):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if name not in ("ttft", "tpot") or not equals:
            raise ConfigError(f"--objective: {part!r} in {text!r}, must be {_SLO}{did_you_mean(name, ('ttft', 'tpot'))}")
        if name in limits:
            raise ConfigError(f"--objective: {name} is there twice in {text!r}")
        try:
            limits[name] = float(value)
        except ValueError:
            limits[name] = math.nan
        if not (math.isfinite(limits[name]) and limits[name] > 0):
            raise ConfigError(f"--objective: {name}={value!r}, must be a number of seconds > 0")
    if not limits:
        raise ConfigError(f"--objective: {text!r} names no limit, must be {_SLO}")
    return Objective(text.strip(), "slo_goodput", limits.get("ttft", math.inf), limits.get("tpot", math.inf))


def parse_limits(words: Sequence[str]) -> dict[str, float]:
    """``latency=1.2 ttft-p99=2``: field of ``Summary`` to the most it may be, as a multiple of the default's.

    Raises:
        ConfigError: another word (the nearest is given), twice there, or no factor > 0.
    """
    found: dict[str, float] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if name not in PRICED or not equals:
            raise ConfigError(f"--at-most: {word!r}, must be METRIC=FACTOR with one of {', '.join(PRICED)}{did_you_mean(name, PRICED)}")
        if PRICED[name] in found:
            raise ConfigError(f"--at-most: {name} is there twice")
        try:
            factor = float(text)
        except ValueError:
            factor = math.nan
        if not (math.isfinite(factor) and factor > 0):
            raise ConfigError(f"--at-most: {name}={text!r}, must be a factor > 0, such as {name}=1.2")
        found[PRICED[name]] = factor
    return found


@dataclass(frozen=True, slots=True)
class Choice:
    """A policy with the options that are not its own defaults on this engine.

    Attributes:
        policy: by its name in tables.
        options: (name, value) pairs, engine fields with the prefix ``engine.``.
    """

    policy: str
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def options_text(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.options)

    @property
    def text(self) -> str:
        """In one line of a table."""
        return f"{self.policy}: {self.options_text.replace('engine.', '')}" if self.options else f"{self.policy}: as it ships"


DEFAULT = Choice("vllm")
"""What ``vllm serve`` runs."""
FLAGS_ALONE = ("vllm", "sarathi", "prefill-cadence", "prefill-threshold", "active-cap")
"""Policies that are nothing but flags of vLLM: a server needs nothing of this project for them."""


@dataclass(frozen=True, slots=True)
class Row:
    """One simulation: a line of ``rows.csv``; the columns are these fields, the figures' own in their place.

    Attributes:
        policy, options: of ``Choice``, as text.
        seed: of the requests, or the number of the trace's window.
        figures: absent where the policy refuses these options (``Summary.absent``); then ``notes`` says why.
    """

    policy: str
    options: str
    seed: int
    figures: Summary
    wall_seconds: float
    notes: str

    @property
    def key(self) -> tuple[str, str, int]:
        return self.policy, self.options, self.seed


@dataclass(frozen=True)
class Case:
    """The workload on the engine, in parts: every part is an episode of its own that begins with an empty engine.

    A scenario's parts are seeds. A trace's are windows of equal numbers of requests in a row, those of the selection spread evenly among
    those of the evaluation.

    Attributes:
        scenario: on the engine that ``vllm serve`` would have here.
        policies: that may be chosen, by name in tables.
        rate: requests/s that policies plan for, and at which requests come.
        num_requests: of one part.
        selection, evaluation: how many parts the search sees, and how many it does not.
        objective: decides the limits of ``slo_goodput``.
    """

    scenario: Scenario
    policies: Mapping[str, NamedPolicy]
    rate: float
    num_requests: int
    selection: int
    evaluation: int
    objective: Objective
    _workloads: dict[int, Workload] = field(default_factory=dict, compare=False, repr=False)

    @property
    def windows(self) -> bool:
        """Whether the parts are windows of a trace."""
        return self.scenario.rows is not None

    @property
    def selection_seeds(self) -> tuple[int, ...]:
        """Numbers of the parts that the search sees."""
        if not self.windows:
            return tuple(range(self.selection))
        total = self.selection + self.evaluation
        return tuple(int((i + 0.5) * total / self.selection) for i in range(self.selection))

    @property
    def evaluation_seeds(self) -> tuple[int, ...]:
        """Numbers of the others."""
        seen = set(self.selection_seeds)
        return tuple(i for i in range(self.selection + self.evaluation) if i not in seen)

    def workload(self, seed: int) -> Workload:
        """The requests of one part, times from its first request on."""
        if seed not in self._workloads:
            self._workloads[seed] = self._window(seed) if self.windows else self._drawn(seed)
        return self._workloads[seed]

    def _drawn(self, seed: int) -> Workload:
        return self.scenario.generate(seed, rate=self.rate, num_requests=self.num_requests)

    def _window(self, number: int) -> Workload:
        whole = self._workloads.get(-1)
        if whole is None:
            whole = self._workloads[-1] = self.scenario.generate(0, rate=self.rate)
        part = slice(number * self.num_requests, (number + 1) * self.num_requests)
        times = whole.arrival[part]
        return Workload.of(times - times[0], whole.prompt_tokens[part], whole.output_tokens[part], whole.type_id[part])

    @functools.cached_property
    def statistics(self) -> LengthStatistics:
        """Lengths that policies are told: the scenario's, or those of the windows that the search sees."""
        if not self.windows:
            return self.scenario.statistics
        parts = [self.workload(seed) for seed in self.selection_seeds]
        names = ("prompt_tokens", "output_tokens", "type_id")
        prompt, output, types = (np.concatenate([getattr(part, name) for part in parts]) for name in names)
        return TraceLengths(prompt, output, types, self.scenario.source).statistics()

    @property
    def horizon_seconds(self) -> float:
        """How long a part lasts: for the overflow probability of Nested WAIT."""
        return self.num_requests / self.rate

    def build(self, choice: Choice) -> Policy:
        """The policy of a choice, in a server with its flags; what the policy fixes of an engine itself, such as an agent's token budget,
        wins, as a server must then be started with that.

        Raises:
            ConfigError: options that it, the engine or its theory refuses.
        """
        own, flags = split_options(dict(choice.options))
        setting = Setting(self.statistics, self.rate, engine_with(self.scenario.engine, flags), self.horizon_seconds)
        return self.policies[choice.policy].build(setting, **own)

    def run(self, choice: Choice, policy: Policy, seed: int) -> Row:
        """One simulation.

        Raises:
            PolicyError: the policy fails while it decides.
        """
        with policy_named(f"policy {choice.policy!r} with {choice.options_text or 'its defaults'}, part {seed}"):
            result = run_episode(policy, self.workload(seed))
        figures = summarize(
            result.log,
            result.counters,
            kv_capacity=policy.engine.kv_capacity,
            ttft_limit=self.objective.ttft_limit,
            tpot_limit=self.objective.tpot_limit,
        )
        return Row(choice.policy, choice.options_text, seed, figures, result.wall_seconds, policy.notes)

    def check_requests(self) -> None:
        """Refuse requests that cannot be served or judged.

        Raises:
            ConfigError: windows too short, or requests longer than the engine takes.
        """
        if self.windows and self.num_requests < LEAST_WINDOW:
            count = 0 if self.scenario.rows is None else len(self.scenario.rows)
            raise ConfigError(
                f"--trace: {count:,} requests in {self.selection + self.evaluation} windows are {self.num_requests} each, must be at least "
                f"{LEAST_WINDOW}; give a longer trace, or fewer --selection and --evaluation"
            )
        longest = max(int((part.prompt_tokens + part.output_tokens).max()) for part in map(self.workload, self.all_seeds))
        limit = self.scenario.engine.max_model_len
        if longest > limit and self.scenario.engine.oversize == "error":
            raise ConfigError(
                f"--set engine.max_model_len: {limit:,}, but requests have up to {longest:,} tokens; raise it, or give "
                "--set engine.oversize=reject to answer those as a server does"
            )

    def check(self) -> None:
        """Build every policy as it ships and run one request, which compiles what the search needs.

        Raises:
            ConfigError: a policy that cannot be built.
            PolicyError: one that fails.
        """
        for name in self.policies:
            policy = self.build(Choice(name))
            with policy_named(f"policy {name!r}"):
                run_episode(policy, shortest_request(self.workload(self.all_seeds[0])))

    @property
    def all_seeds(self) -> tuple[int, ...]:
        return (*self.selection_seeds, *self.evaluation_seeds)

    def describe(self) -> dict[str, Any]:
        """What must agree between a search and its resumption, as plain values."""
        engine = self.scenario.engine
        fields = {f.name: getattr(engine, f.name) for f in dataclasses.fields(engine) if f.name != "time_model"}
        model = engine.time_model
        return {
            "scenario": self.scenario.name,
            "engine": {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()},
            "calibration": [model.provenance.name, model.provenance.source, _digest(model.pack().tobytes())],
            "requests": _digest(b"".join(self._bytes(seed) for seed in self.all_seeds)),
            "rate": self.rate,
            "num_requests": self.num_requests,
            "selection": self.selection,
            "evaluation": self.evaluation,
            "objective": self.objective.text,
            "policies": {name: [policy.text, policy.digest()] for name, policy in self.policies.items()},
        }

    def _bytes(self, seed: int) -> bytes:
        part = self.workload(seed)
        return b"".join(np.ascontiguousarray(c).tobytes() for c in (part.arrival, part.prompt_tokens, part.output_tokens, part.type_id))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def refused(choice: Choice, seed: int, why: str) -> Row:
    """The row of options that a policy refuses."""
    return Row(choice.policy, choice.options_text, seed, Summary.absent(), 0.0, why)
