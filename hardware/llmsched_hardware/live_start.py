"""What a server does with a policy before it takes requests, and what can be tried without one. Needs no vLLM."""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import dataclass

import numpy as np

from llmsched_env.engine.simulator import SimBackend
from llmsched_env.engine_config import EngineConfig, EpisodeLimits
from llmsched_env.perf import CalibrationRangeWarning
from llmsched_env.types import Workload
from llmsched_env.workload import Poisson
from llmsched_env.workload.lengths import whole_tokens
from llmsched_hardware.live import LiveMirror
from llmsched_hardware.live_config import LiveConfig, LivePolicy, build_policy
from llmsched_hardware.live_gate import check_decision
from llmsched_hardware.live_rehearsal import rehearse

MOST_DECISIONS = 20_000
"""Of a trial: seconds on one core."""


def start(config: LiveConfig, engine: EngineConfig) -> tuple[LivePolicy, LiveMirror]:
    """The policy that a configuration names, rehearsed, and the empty mirror it will decide from.

    Args:
        engine: as the server runs it.

    Raises:
        ConfigError: what ``build_policy``, ``LiveMirror`` or ``rehearse`` refuses: the server does not start with it.
    """
    live = build_policy(config, engine)

    def mirror() -> LiveMirror:
        return LiveMirror(
            live.policy.layout,
            live.policy.engine,
            reveal_output_length=config.assume_max_tokens and live.policy.known_lengths,
            episode_seconds=config.horizon_seconds,
        )

    own = mirror()
    rehearse(live.policy, mirror())
    return live, own


def announcement(config: LiveConfig, live: LivePolicy) -> list[str]:
    """What an operator should read when the server starts: queues and rate, then what was assumed."""
    layout, limit = live.policy.layout, config.policy_timeout_seconds
    return [
        f"{layout.num_classes} classes by {layout.by}, segments end at {list(layout.segment_ends) or 'completion'}; "
        f"{live.setting.rate:.4g} requests/s planned for; a request waits at most {config.max_wait_seconds:g} s in one queue",
        *([] if limit is None else [f"a decision may take at most {limit:g} s"]),
        *live.notes,
    ]


@dataclass(frozen=True, slots=True)
class Trial:
    """A policy in a short simulated episode, asked before every iteration as a server asks it.

    Attributes:
        requests, completed: of the episode; it is cut off after ``MOST_DECISIONS``.
        decisions: how often the policy was asked.
        mean, p99, longest: wall-clock seconds of one decision on this machine; NaN without any.
        iteration_seconds: mean simulated seconds of an engine iteration; NaN without any.
        out_of_range: iterations outside the data behind the iteration times.
        failure: what the policy raised or decided wrongly, in words; empty where nothing went wrong.
    """

    requests: int
    completed: int
    decisions: int
    mean: float
    p99: float
    longest: float
    iteration_seconds: float
    out_of_range: int
    failure: str


def trial(live: LivePolicy, num_requests: int, seed: int = 0) -> Trial:
    """Run the policy on the simulator: requests of the lengths and the rate it was computed for, Poisson arrivals.

    Raises:
        ConfigError: requests that the policy's engine can never serve.
    """
    _episode(live, 1, seed)  # whatever the first call of anything costs is not a decision's time
    backend, seconds, failure = _episode(live, num_requests, seed)
    counters = backend.counters()
    times = np.array(seconds or [math.nan])
    return Trial(
        requests=num_requests,
        completed=counters.finished,
        decisions=len(seconds),
        mean=float(times.mean()),
        p99=float(np.percentile(times, 99)),
        longest=float(times.max()),
        iteration_seconds=counters.busy_seconds / counters.iterations if counters.iterations else math.nan,
        out_of_range=counters.out_of_range,
        failure=failure,
    )


def _episode(live: LivePolicy, num_requests: int, seed: int) -> tuple[SimBackend, list[float], str]:
    """The simulator as the episode left it, seconds of each decision, and what the policy raised."""
    policy, backend = live.policy, SimBackend()
    limits = EpisodeLimits(max_iterations=MOST_DECISIONS)
    policy.reset()
    workload = _workload(live, num_requests, seed)
    view = backend.reset(workload, policy.layout, policy.engine, limits, reveal_output_length=policy.known_lengths)
    seconds: list[float] = []
    with warnings.catch_warnings(action="ignore", category=CalibrationRangeWarning):  # ``Trial.out_of_range`` says it
        while not backend.done:
            try:
                begin = time.perf_counter()
                decision = policy.decide(view)
                seconds.append(time.perf_counter() - begin)
                check_decision(decision, policy.layout.num_queues)
                backend.advance(decision)
            except Exception as error:  # the operator's own policy may raise anything
                return backend, seconds, f"{type(error).__name__}: {error}"
    return backend, seconds, ""


def _workload(live: LivePolicy, num_requests: int, seed: int) -> Workload:
    statistics = live.setting.statistics
    times, sizes = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(2))
    rows = sizes.choice(statistics.weight.size, num_requests, p=statistics.weight)
    lengths = whole_tokens(statistics.prompt[rows], statistics.output[rows], live.policy.engine.max_model_len)
    return Workload.of(Poisson(live.setting.rate).sample(times, num_requests), *lengths)
