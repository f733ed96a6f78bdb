"""The environments by name, each for something that it teaches; ``LLMSched-v1``, the default, is ``LLMSchedEnv`` itself.

==================  =====================================================================  ===================================
id                  regime                                                                 teaches
==================  =====================================================================  ===================================
LLMSched-v1         Azure conversations on a 40 GB GPU at 6.5 requests/s                   how many to let in, and whom first
LLMSchedEasy-v1     the paper's two types in its own model, with a queue at the start      that greedy admission collapses
LLMSchedOverload-v1 the default at 10 requests/s, twice what the memory bears              whom to serve when not all can be
LLMSchedBursty-v1   the default with bursts of 11 requests/s for 15 s                      to come out of a burst
LLMSchedKnown-v1    the default with output lengths known at arrival                       what knowing is worth
LLMSchedTenants-v1  four tenants, of whom one sends bursts of long requests                whom to serve so that nobody pays for it
LLMSchedPredicted-v1 LLMSchedBursty with predicted output lengths that err                 how far to trust predictions
LLMSchedHardware-v1 the default on a real vLLM engine (needs vLLM)                         that it holds outside
LLMSchedCluster-v0  many engines behind one door, chat sessions with common prefixes       which replica gets the call
==================  =====================================================================  ===================================

Version 0 of each is still registered (``FORMER_ENVIRONMENTS``): the same, where the engine is vLLM's with the iteration times of the
formula ``a100-llama2-7b-c10`` instead of the measured table.

``llmsched headroom`` measures what there is to learn in each: ``docs/environments.md`` has its table. A reward threshold is nine
tenths of the way from admitting everything to the best constant action, rounded; what a plain PPO reaches stands beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym

from llmsched_env.env import LLMSchedEnv

_VECTOR = "llmsched_env.vector:LLMSchedVectorEnv"


class LLMSchedEasy(LLMSchedEnv):
    """The paper's regime: greedy admission collapses, and it is easy to see why.

    ## Description
    The two types of requests of arXiv 2504.11320, (10, 10) and (10, 20) tokens at 2 and 1 a second, in its own model: KV memory
    counted in tokens (C = 3,750), an iteration of 1 s and 1 ms per token in memory, and an evicted request loses all it has
    computed. 300 requests wait at the start. Who lets in as many as fit fills the memory with requests that then grow, evict one
    another and begin again: the engine computes much and completes little. A level of predicted memory below 1, and WAIT, which
    starts requests in equal batches, evict nothing. An action is held for 12 s, three or four iterations, and an episode of 1,500
    requests has about 45 actions; ``hold=1, hold_seconds=0`` makes every iteration a step.

    ## Headroom
    Mean latency: admitting everything 160.5 s, best constant action 111.4 s (level 0.9), best policy 111.4 s (level 0.9),
    gap 31 %; reward threshold -116.

    ## Version History
    * v1: equal to v0 to the bit; the number is that of the other environments.
    * v0: the model of the paper states its own iteration times.

    All else is as in ``LLMSchedEnv``.
    """


class LLMSchedOverload(LLMSchedEnv):
    """More requests than the engine can serve: the queue grows all along, and order is everything.

    ## Description
    The default environment at 10 requests/s, about twice what its memory bears, for 1,000 requests. First come, first served makes
    everybody wait for everybody. Serving those first that need least memory for the shortest time halves the mean latency, at
    the price of a longer tail.

    ## Headroom
    Mean latency: admitting everything 52.4 s, best constant action 30.6 s (level 0.95, by work), best policy 26.8 s (generalist),
    gap 49 %; reward threshold -33.

    ## Version History
    * v1: iteration times of the measured table ``a100-llama2-7b-vllm``, as ``LLMSched-v1``.
    * v0: those of the formula ``a100-llama2-7b-c10``.

    All else is as in ``LLMSchedEnv``.
    """


class LLMSchedBursty(LLMSchedEnv):
    """Quiet spells and bursts: what is admitted in a burst decides how long its queue lasts.

    ## Description
    The default environment with arrivals of a Markov-modulated Poisson process: 2 requests/s for 30 s on average, then
    11 for 15 s (5 over all; exponential sojourns), 500 requests. A burst fills memory and queue; between bursts
    there is room for everybody, and holding back costs.

    ## Headroom
    Mean latency: admitting everything 16.2 s, best constant action 11.4 s (level 0.95, by work), best policy 10.0 s (generalist),
    gap 38 %; reward threshold -12.

    ## Version History
    * v1: iteration times of the measured table ``a100-llama2-7b-vllm``, as ``LLMSched-v1``.
    * v0: those of the formula ``a100-llama2-7b-c10``.

    All else is as in ``LLMSchedEnv``.
    """


class LLMSchedKnown(LLMSchedEnv):
    """The default environment with output lengths known at arrival.

    ## Description
    Classes are quarters of the output lengths, so predictions of memory and the order by work know much of how long a request
    will run. Policies that need lengths, such as WAIT, are told them.

    ## Version History
    * v1: iteration times of the measured table ``a100-llama2-7b-vllm``, as ``LLMSched-v1``.
    * v0: those of the formula ``a100-llama2-7b-c10``.

    All else is as in ``LLMSchedEnv``.
    """


class LLMSchedTenants(LLMSchedEnv):
    """Four tenants share one engine, and one of them is a noisy neighbour.

    ## Description
    Three tenants send conversations on a 40 GB GPU; the fourth sends bursts of long requests that fill the memory for as long as they
    are served first come, first served (scenario ``tenants``, ``docs/tenants.md``). A class is a tenant, and the observation says
    what each has received of late and how far it is ahead of the least served. The reward is ``fair_latency``: every tenant counts
    by its weight, however many requests it sends, and the return is minus the weighted mean of the tenants' mean latencies.

    ## Headroom
    Mean latency, the mean of the tenants' by weight: admitting everything 15.3 s, best constant action 10.3 s (level 0.95, by work),
    best policy 8.9 s (generalist), gap 42 %; reward threshold -11.

    ## Version History
    * v1: the first; its number is that of the other environments.

    All else is as in ``LLMSchedEnv``.
    """


class LLMSchedPredicted(LLMSchedEnv):
    """Output lengths are predicted, and the predictions err: how far to trust them is to be learned.

    ## Description
    ``LLMSchedBursty`` with a predictor, whose log-normal error has a standard deviation of 0.6: two predictions of three lie within a
    factor of 1.8 of the truth. Classes are quarters of the predicted lengths within each of the four classes by prompt length. The order
    is "arrival", or least expected work with predictions trusted to a share of 0 (prompts alone), 0.25, 0.5, 0.75 or 1 (predictions
    alone): "trust-0" to "trust-1" (``llmsched_env.shrinkage``). The observation has a field ``calibration``: how predictions of
    recently completed requests have fared. ``predictions`` gives another error (``llmsched_env.workload.PredictionModel``): the
    larger it is, the more believing costs.

    ## Headroom
    Mean latency: admitting everything 16.2 s, best constant action 11.1 s (level 0.95, by trust-0.75), best policy 9.6 s
    (learned-shrinkage), gap 41 %; reward threshold -11.5.

    All else is as in ``LLMSchedEnv``.
    """


class LLMSchedHardware(LLMSchedEnv):
    """The default environment on a real vLLM engine.

    ## Description
    Its KV memory is that of the default in blocks of 32 tokens, which attention takes on GPUs and on CPUs; whoever gives ``engine``
    on a CPU gives a ``block_size`` with it.
    ``backend_config`` says which model and which clock (``docs/hardware.md``); it needs vLLM. The clock is measured by default,
    so an episode is not the same twice.

    ## Version History
    * v1: what the observation says of load and rate follows the measured table ``a100-llama2-7b-vllm``.
    * v0: it follows the formula ``a100-llama2-7b-c10``. The engine is the same in both.

    All else is as in ``LLMSchedEnv``.
    """


BLOCKS_OF_32 = {"num_blocks": 1_408, "block_size": 32}


@dataclass(frozen=True, slots=True)
class NamedEnvironment:
    """An environment as Gymnasium's registry has it.

    Attributes:
        id: for ``gym.make``.
        kind: the class, whose docstring describes it.
        settings: arguments that differ from the defaults of ``LLMSchedEnv``.
        reward_threshold: return at which it counts as solved; None where nothing is stated.
        simulated: has a native vector environment and repeats exactly.
    """

    id: str
    kind: type[LLMSchedEnv]
    settings: Mapping[str, Any] = field(default_factory=dict)
    reward_threshold: float | None = None
    simulated: bool = True

    def register(self) -> None:
        """Enter it in Gymnasium's registry; once, as worker processes import again and registering twice would warn."""
        if self.id in gym.registry:
            return
        gym.register(
            id=self.id,
            entry_point=f"{self.kind.__module__}:{self.kind.__name__}",
            vector_entry_point=_VECTOR if self.simulated else None,
            reward_threshold=self.reward_threshold,
            nondeterministic=not self.simulated,
            kwargs=dict(self.settings),
        )


_KNOWN = {"reveal_output_length": True}
_EASY = {"scenario": "two-type", "backlog": 300, "num_requests": 1500, "hold_seconds": 12.0}
_OVERLOAD = {"rate": 10.0, "num_requests": 1000}
_BURSTY = {"scenario": "azure-conv-40gb-bursts"}
_PREDICTED = {"scenario": "azure-conv-40gb-bursts", "predictions": 0.6, "class_by": "predicted"}
_HARDWARE = {"backend": "vllm", "engine": BLOCKS_OF_32}
_FORMULA = {"calibration": "a100-llama2-7b-c10"}

ENVIRONMENTS = (
    NamedEnvironment("LLMSched-v1", LLMSchedEnv, {}, -11.5),
    NamedEnvironment("LLMSchedEasy-v1", LLMSchedEasy, _EASY, -116.0),
    NamedEnvironment("LLMSchedOverload-v1", LLMSchedOverload, _OVERLOAD, -33.0),
    NamedEnvironment("LLMSchedBursty-v1", LLMSchedBursty, _BURSTY, -12.0),
    NamedEnvironment("LLMSchedKnown-v1", LLMSchedKnown, _KNOWN),
    NamedEnvironment("LLMSchedTenants-v1", LLMSchedTenants, {"scenario": "tenants", "reward": "fair_latency"}, -11.0),
    NamedEnvironment("LLMSchedPredicted-v1", LLMSchedPredicted, _PREDICTED, -11.5),
    NamedEnvironment("LLMSchedHardware-v1", LLMSchedHardware, _HARDWARE, simulated=False),
)
"""The newest version of each."""

FORMER_ENVIRONMENTS = (
    NamedEnvironment("LLMSched-v0", LLMSchedEnv, _FORMULA, -12.5),
    NamedEnvironment("LLMSchedEasy-v0", LLMSchedEasy, _EASY, -116.0),
    NamedEnvironment("LLMSchedOverload-v0", LLMSchedOverload, {**_OVERLOAD, **_FORMULA}, -35.0),
    NamedEnvironment("LLMSchedBursty-v0", LLMSchedBursty, {**_BURSTY, **_FORMULA}, -12.5),
    NamedEnvironment("LLMSchedKnown-v0", LLMSchedKnown, {**_KNOWN, **_FORMULA}),
    NamedEnvironment("LLMSchedHardware-v0", LLMSchedHardware, {**_HARDWARE, **_FORMULA}, simulated=False),
)
"""Former versions, registered for results that name them; Gymnasium warns that they are out of date."""

CLUSTER_ID = "LLMSchedCluster-v0"
"""The routing environment, whose steps are calls and whose actions are replicas (``llmsched_env.cluster``)."""


def register_cluster() -> None:
    """Enter the routing environment in Gymnasium's registry; once. Nothing of it is imported before somebody makes one."""
    if CLUSTER_ID not in gym.registry:
        gym.register(
            id=CLUSTER_ID,
            entry_point="llmsched_env.cluster.env:LLMSchedCluster",
            vector_entry_point="llmsched_env.cluster.vector:LLMSchedClusterVectorEnv",
        )
