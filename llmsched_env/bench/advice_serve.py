"""How a choice is started: the words of ``vllm serve`` and, for a policy of this project, the file that configures it."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmsched_env.bench.advice import FLAGS_ALONE, Case, Choice
from llmsched_env.bench.variants import split_options
from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import ConfigError
from llmsched_env.files import replacing
from llmsched_env.metrics import Summary
from llmsched_env.runner import Policy
from llmsched_hardware.live_config import POLICY, POLICY_CONFIG, LiveConfig, check_possible
from llmsched_hardware.live_start import start
from llmsched_hardware.options import POLICY_FLAGS, SETTINGS
from llmsched_hardware.versions import SUPPORTED_VERSIONS

ALWAYS = ("max_num_batched_tokens", "max_num_seqs", "max_model_len")
"""Settings that stand on the command line whatever their values are."""
POLICY_FILE = "policy.json"


@dataclass(frozen=True, slots=True)
class Start:
    """How to start a server.

    Attributes:
        flags: words of ``vllm serve``.
        policy: for the variable ``LLMSCHED_POLICY``; empty where flags are all.
        config: what the file of ``LLMSCHED_POLICY_CONFIG`` holds.
    """

    flags: tuple[str, ...]
    policy: str = ""
    config: dict[str, Any] | None = None

    def command(self, model: str, config_file: Path | str = POLICY_FILE) -> str:
        """The command line."""
        variables = [f"{POLICY}={shlex.quote(self.policy)}", f"{POLICY_CONFIG}={shlex.quote(str(config_file))}"] if self.policy else []
        return " ".join([*variables, "vllm serve", shlex.quote(model), *self.flags])

    def write(self, path: Path) -> None:
        """The file that configures the policy; one that is left of another search goes."""
        if self.config is None:
            path.unlink(missing_ok=True)
            return
        with replacing(path) as file:
            json.dump(self.config, file, indent=2)
            file.write("\n")


def check_server(policy: Policy, version: str) -> None:
    """Refuse a policy that a server of this version cannot run.

    Args:
        version: one of ``SUPPORTED_VERSIONS``.

    Raises:
        ConfigError: an engine that no flags make, or a setting that the version does not have.
    """
    check_possible(policy)
    have = tuple(map(int, version.split(".")[:2]))
    for setting in SETTINGS:
        value = getattr(policy.engine, setting.name)
        if value != setting.off and setting.since > have:
            need = ".".join(map(str, setting.since))
            raise ConfigError(f"policy {policy.name!r}: {setting.name} = {value} needs vLLM {need}, the server has {version}")


def check_vllm(version: str) -> str:
    """Raises ConfigError for a version that is not supported."""
    if version not in SUPPORTED_VERSIONS:
        raise ConfigError(f"--vllm: {version!r}, must be one of {', '.join(SUPPORTED_VERSIONS)}")
    return version


def start_of(case: Case, choice: Choice, given: Collection[str] = (), max_wait_seconds: float = 10.0) -> Start:
    """How to start a server with a choice.

    Args:
        given: fields of the engine that the operator named, which stand on the command line too.

    Raises:
        ConfigError: a server would refuse the policy.
    """
    policy = case.build(choice)
    flags = tuple(flags_of(policy.engine, given))
    named = case.policies[choice.policy]
    if named.text in FLAGS_ALONE:
        return Start(flags)
    own, _ = split_options(dict(choice.options))
    statistics = case.statistics
    config = {
        "lengths": {name: getattr(statistics, name).tolist() for name in ("prompt", "output", "weight")},
        "rate": case.rate,
        "horizon_seconds": case.horizon_seconds,
        "overload": True,
        "options": {name: list(value) if isinstance(value, tuple) else value for name, value in own.items()},
        "max_wait_seconds": max_wait_seconds,
    }
    if policy.known_lengths:
        config["assume_max_tokens"] = True
    start(LiveConfig(named.text, **config), policy.engine)  # type: ignore[arg-type]
    return Start((*POLICY_FLAGS, *flags), named.text, config)


def flags_of(engine: EngineConfig, given: Collection[str] = ()) -> list[str]:
    """The words of ``vllm serve`` for an engine: the limits, what differs from vLLM's own defaults, and what was given."""
    defaults = EngineConfig()
    found = []
    for setting in SETTINGS:
        value = getattr(engine, setting.name)
        own = setting.name not in ("num_blocks", "block_size") and setting.differs(value, getattr(defaults, setting.name))
        asked = setting.name in given or (setting.name == "block_size" and "num_blocks" in given)  # a number says nothing without a size
        if value is not None and (setting.name in ALWAYS or asked or own):
            found.append(setting.flag(value))
    return found


def longest_stay(figures: Sequence[Summary]) -> float:
    """Seconds of the guard that leave the policy what it did in the simulation, where there is no guard: twice the P99 of TTFT."""
    seconds = max((f.ttft_p99 for f in figures if math.isfinite(f.ttft_p99)), default=0.0)
    return float(min(max(10, math.ceil(2 * seconds)), 86_400))
