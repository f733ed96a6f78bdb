"""Many episodes under policies that decide in compiled code."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from llmsched_env.engine.simulator import SimBackend
from llmsched_env.engine_config import EpisodeLimits
from llmsched_env.runner import EpisodeResult, Policy, run_episode
from llmsched_env.types import Workload


@dataclass(frozen=True, slots=True)
class Run:
    """One episode to run."""

    policy: Policy
    workload: Workload
    limits: EpisodeLimits = field(default_factory=EpisodeLimits)


def run_batch(runs: Iterable[Run]) -> Iterator[EpisodeResult]:
    """Run episodes on the simulator, in order; each result comes as soon as its run has ended.

    The same results as ``run_episode``, on engine arrays that runs of equal size share. An episode of a
    policy with a compiled rule is one call: stepping several engines in turn would only fill the
    processor's caches. Spread lists of runs over processes for more cores (``scripts/compare.py``).

    Raises:
        ConfigError: a request that a policy's engine could never serve.
    """
    backend = SimBackend()
    for run in runs:
        yield run_episode(run.policy, run.workload, limits=run.limits, backend=backend)
