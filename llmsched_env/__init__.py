"""llmsched_env: LLM inference scheduling as a Gymnasium environment.

``import llmsched_env`` registers ``LLMSched-v1`` and the other environments of ``llmsched_env.environments``.
``gym.make("llmsched_env:LLMSched-v1", scenario="azure-conv", rate=6.0)`` works without the import.
"""

from __future__ import annotations

from llmsched_env.engine_config import EngineConfig, EpisodeLimits
from llmsched_env.env import AdmitOnly, LLMSchedEnv
from llmsched_env.environments import CLUSTER_ID, ENVIRONMENTS, FORMER_ENVIRONMENTS, register_cluster
from llmsched_env.errors import ConfigError, InfeasibleError, MissingExtraError
from llmsched_env.registry import register_backend, register_calibration, register_policy, register_reward, register_scenario
from llmsched_env.types import ADMIT_ALL, Decision, IterationReport, LengthStatistics, QueueLayout, RequestLog, Workload

__version__ = "0.1.0"

__all__ = [
    "ADMIT_ALL",
    "CLUSTER_ID",
    "ENVIRONMENTS",
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


for _environment in (*ENVIRONMENTS, *FORMER_ENVIRONMENTS):
    _environment.register()
register_cluster()
