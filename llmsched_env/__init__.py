"""llmsched_env: LLM inference scheduling as a Gymnasium environment.

``import llmsched_env`` registers

* ``LLMSched-v0``: output lengths hidden, K segments of decode length;
* ``LLMSchedKnown-v0``: classes with known output lengths;
* ``LLMSchedHardware-v0``: ``LLMSched-v0`` on a real vLLM engine (needs vLLM).

``gym.make("llmsched_env:LLMSched-v0", scenario="azure-conv", rate=6.0)`` works without the import.
"""

from __future__ import annotations

import gymnasium as gym

from llmsched_env.env import AdmitOnly, LLMSchedEnv
from llmsched_env.errors import ConfigError, InfeasibleError, MissingExtraError
from llmsched_env.registry import register_backend, register_calibration, register_policy, register_reward, register_scenario
from llmsched_env.types import (
    ADMIT_ALL,
    Decision,
    EngineConfig,
    EpisodeLimits,
    IterationReport,
    LengthStatistics,
    QueueLayout,
    RequestLog,
    Workload,
)

__version__ = "0.1.0"

__all__ = [
    "ADMIT_ALL",
    "AdmitOnly",
    "ConfigError",
    "Decision",
    "EngineConfig",
    "EpisodeLimits",
    "InfeasibleError",
    "IterationReport",
    "LLMSchedEnv",
    "LengthStatistics",
    "MissingExtraError",
    "QueueLayout",
    "RequestLog",
    "Workload",
    "__version__",
    "register_backend",
    "register_calibration",
    "register_policy",
    "register_reward",
    "register_scenario",
]


def _register() -> None:
    # Worker processes import again; registering twice would warn.
    if "LLMSched-v0" in gym.registry:
        return
    vector = "llmsched_env.vector:LLMSchedVectorEnv"
    gym.register(id="LLMSched-v0", entry_point="llmsched_env.env:LLMSchedEnv", vector_entry_point=vector)
    known = {"reveal_output_length": True}
    gym.register(id="LLMSchedKnown-v0", entry_point="llmsched_env.env:LLMSchedEnv", vector_entry_point=vector, kwargs=known)
    gym.register(id="LLMSchedHardware-v0", entry_point="llmsched_env.env:LLMSchedEnv", nondeterministic=True, kwargs={"backend": "vllm"})


_register()
