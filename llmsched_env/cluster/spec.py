"""What a cluster is: replicas, what happens to them, how KV goes from one to another; checked once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np

from llmsched_env import checks
from llmsched_env.cluster import state as cs
from llmsched_env.cluster.calls import CallChunk
from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import ConfigError
from llmsched_env.runner import Policy, rule_of

T = TypeVar("T")
Role = Literal["whole", "prefill", "decode"]
EventKind = Literal["slow_down", "drain", "fail", "come_back"]

_ROLES: dict[str, int] = {"whole": cs.WHOLE, "prefill": cs.PREFILLS, "decode": cs.DECODES}
_KINDS: dict[str, int] = {"slow_down": cs.SLOW_DOWN, "drain": cs.DRAIN, "fail": cs.FAIL, "come_back": cs.COME_BACK}
MOST_REPLICAS = 65_536


@dataclass(frozen=True, slots=True, eq=False)
class ReplicaSpec:
    """One replica.

    Attributes:
        engine: its engine, ``vllm`` preset; with a policy it is the policy's own.
        policy: who decides there about admissions: one with a compiled rule and queues by prompt length at most; None: the engine
            alone, which admits whoever fits, as vLLM does. Every replica gets a copy of its own.
        role: ``whole`` for prompts and answers, ``prefill`` or ``decode`` for one of them.
        slowdown: its iterations take so many times what its time model says.
    """

    engine: EngineConfig = field(default_factory=lambda: EngineConfig.vllm(enable_prefix_caching=True))
    policy: Policy | None = None
    role: Role = "whole"
    slowdown: float = 1.0

    def __post_init__(self) -> None:
        checks.one_of("replica.role", self.role, tuple(_ROLES))
        checks.number("replica.slowdown", self.slowdown, high=1e6, open_low=True)
        if self.policy is not None:
            _check_policy(self.policy)
            object.__setattr__(self, "engine", self.policy.engine)
        engine = self.engine
        if not isinstance(engine, EngineConfig):
            raise ConfigError(f"replica.engine: {type(engine).__name__}, must be an EngineConfig")
        for name, value, allowed in (
            ("preset", engine.preset, "vllm"),
            ("scheduling_policy", engine.scheduling_policy, "fcfs"),
            ("eviction", engine.eviction, "recompute"),
        ):
            if value != allowed:
                raise ConfigError(f"replica.engine.{name}: {value!r}, must be {allowed!r} in a cluster")

    @property
    def part(self) -> int:
        """The role as compiled code has it."""
        return _ROLES[self.role]


def _check_policy(policy: Any) -> None:
    name = getattr(policy, "name", type(policy).__name__)
    if rule_of(policy) is None:
        raise ConfigError(f"replica.policy: {name!r} has no compiled rule, must have one (Policy.rule or Policy.constant) in a cluster")
    if policy.known_lengths:
        raise ConfigError(f"replica.policy: {name!r} is told output lengths, which nobody knows in a cluster")
    if policy.layout.by not in ("single", "prompt"):
        raise ConfigError(f"replica.policy: {name!r} has queues by {policy.layout.by!r}, must be 'single' or 'prompt' in a cluster")
    if getattr(policy, "reads_arrivals", False):
        raise ConfigError(f"replica.policy: {name!r} reads requests by their number, but a cluster uses their rows again")


@dataclass(frozen=True, slots=True)
class ReplicaEvent:
    """Something that happens to a replica.

    Attributes:
        time: seconds.
        replica: which.
        kind: ``slow_down``: iterations take ``value`` times as long as the replica's own from then on (1: as before); ``drain``: takes no
            more calls, those it has not admitted are routed again, the others go on to their end; ``fail``: takes no more calls, and
            all it has is routed again, without its KV and the tokens generated so far; ``come_back``: takes calls again.
    """

    time: float
    replica: int
    kind: EventKind
    value: float = 1.0

    def __post_init__(self) -> None:
        checks.number("event.time", self.time, unit="seconds")
        checks.integer("event.replica", self.replica)
        checks.one_of("event.kind", self.kind, tuple(_KINDS))
        value = checks.number("event.value", self.value, high=1e6, open_low=True)
        if self.kind != "slow_down" and value != 1.0:
            raise ConfigError(f"event.value: {value:g} of {self.kind!r}, must be left out: only 'slow_down' has one")

    @property
    def code(self) -> int:
        """The kind as compiled code has it."""
        return _KINDS[self.kind]


@dataclass(frozen=True, slots=True)
class Transfer:
    """How long the KV of a prompt takes from the replica that computed it to the one that decodes.

    Attributes:
        latency: seconds, whatever its length.
        seconds_per_token: bytes of KV of a token over the rate of the link.
    """

    latency: float = 0.0
    seconds_per_token: float = 0.0

    def __post_init__(self) -> None:
        checks.number("transfer.latency", self.latency, unit="seconds")
        checks.number("transfer.seconds_per_token", self.seconds_per_token, unit="seconds")

    @classmethod
    def of_link(cls, bytes_per_token: float, bytes_per_second: float, latency: float = 0.0) -> Transfer:
        """A link of so many bytes a second."""
        checks.number("transfer.bytes_per_token", bytes_per_token)
        checks.number("transfer.bytes_per_second", bytes_per_second, open_low=True, high=math.inf)
        return cls(latency, bytes_per_token / bytes_per_second)


def _several(name: str, given: Any, kind: type[T]) -> tuple[T, ...]:
    """A sequence of records of one kind."""
    try:
        found = tuple(given)
    except TypeError as error:
        raise ConfigError(f"{name}: {checks.shown(given)}, must be a sequence of {kind.__name__}") from error
    for i, one in enumerate(found):
        if not isinstance(one, kind):
            raise ConfigError(f"{name}: {checks.shown(one)} as number {i}, must be a {kind.__name__}")
    return found


@dataclass(frozen=True, slots=True, eq=False)
class ClusterSpec:
    """A cluster.

    Attributes:
        replicas: at least one; all of one block size. Either all are ``whole``, or some prefill and some decode.
        events: what happens to them, put in order of time.
        transfer: of KV between those that prefill and those that decode.
        ttft_limit, tpot_limit: seconds; a call that completes within both meets its objective.
        horizon: seconds; no call is routed later, and an iteration that ends later does not count.

    Raises:
        ConfigError: another kind of value, block sizes that differ, roles that do not go together, or an event of a replica there is not.
    """

    replicas: tuple[ReplicaSpec, ...]
    events: tuple[ReplicaEvent, ...] = ()
    transfer: Transfer = Transfer()
    ttft_limit: float = 1.0
    tpot_limit: float = 0.1
    horizon: float = math.inf

    def __post_init__(self) -> None:
        replicas = _several("replicas", self.replicas, ReplicaSpec)
        if not 1 <= len(replicas) <= MOST_REPLICAS:
            raise ConfigError(f"replicas: {len(replicas)}, must be from 1 to {MOST_REPLICAS}")
        object.__setattr__(self, "replicas", replicas)
        sizes = sorted({replica.engine.block_size for replica in replicas})
        if len(sizes) > 1:
            raise ConfigError(f"replicas: block sizes {sizes}, must be the same in all")
        roles = {replica.role for replica in replicas}
        if roles not in ({"whole"}, {"prefill", "decode"}):
            raise ConfigError(f"replicas: roles {sorted(roles)}, must be all 'whole', or both 'prefill' and 'decode'")
        events = _several("events", self.events, ReplicaEvent)
        for event in events:
            if event.replica >= len(replicas):
                raise ConfigError(f"event.replica: {event.replica}, must be below {len(replicas)}, the number of replicas")
        object.__setattr__(self, "events", tuple(sorted(events, key=lambda event: event.time)))
        if not isinstance(self.transfer, Transfer):
            raise ConfigError(f"transfer: {checks.shown(self.transfer)}, must be a Transfer")
        for name in ("ttft_limit", "tpot_limit", "horizon"):
            checks.number(name, getattr(self, name), high=math.inf, unit="seconds", open_low=True)

    @classmethod
    def equal(cls, count: int, replica: ReplicaSpec | None = None, **settings: Any) -> ClusterSpec:
        """So many replicas of one kind."""
        checks.integer("replicas", count, low=1, high=MOST_REPLICAS)
        return cls((replica if replica is not None else ReplicaSpec(),) * count, **settings)

    def check_served(self, chunk: CallChunk) -> None:
        """Refuse calls that none of the replicas could ever serve.

        Raises:
            ConfigError: a call too long for all, where no engine says that such calls are to be rejected.
        """
        if any(replica.engine.oversize == "reject" for replica in self.replicas):
            return
        longest = [
            max(replica.engine.longest_request for replica in self.replicas if replica.role == role)
            for role in {replica.role for replica in self.replicas}
        ]
        total = chunk.prompt_tokens.astype(np.int64) + chunk.output_tokens
        for row in np.flatnonzero(total > min(longest))[:1]:
            raise ConfigError(
                f"calls: row {row} needs {chunk.prompt_tokens[row]} prompt + {chunk.output_tokens[row]} output tokens, more than "
                f"engine.max_model_len = {min(longest)} of any replica; raise it, or set engine.oversize='reject', to have them rejected"
            )

    @property
    def block_size(self) -> int:
        """Tokens of a KV block."""
        return self.replicas[0].engine.block_size

    @property
    def separated(self) -> bool:
        """Whether prompts and answers have replicas of their own."""
        return self.replicas[0].role != "whole"
