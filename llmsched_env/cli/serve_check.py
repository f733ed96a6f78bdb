"""``llmsched serve-check``: whether a policy will start in a vLLM server, without starting one."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from llmsched_baselines.overrides import engine_keys, parse_overrides
from llmsched_env.cli.frame import DONE, FAILED, Assignments, Command, Options, Outcome, Screen, check_counts, words
from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import ConfigError
from llmsched_hardware.live_config import POLICY, POLICY_CONFIG, LiveConfig
from llmsched_hardware.live_start import Trial, announcement, start, trial
from llmsched_hardware.options import POLICY_FLAGS, SETTINGS, setting_names


@dataclass(frozen=True, kw_only=True)
class ServeCheck(Options):
    """Check, without a server and without vLLM, that a policy and its settings will start in one.

    Builds the policy as llmsched_hardware.serve.PolicyScheduler does, asks it about the same made-up queues, and runs it in a short
    simulated episode to see how long a decision takes on this machine. What vLLM itself must be set to (docs/deploy.md, Limits) is
    checked by the server alone.

    Exit code: 0; 1 where the policy fails in the episode, after which a server would fall back to vLLM's own admission; 2 where the
    server would not start.
    """

    policy: Annotated[str | None, tyro.conf.arg(metavar="POLICY", help_behavior_hint=f"(default: the variable {POLICY})")] = None
    """Name of a policy or shipped agent, folder of a checkpoint, or module:attribute."""
    config: Annotated[
        Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint=f"(default: the variable {POLICY_CONFIG}, else none)")
    ] = None
    """JSON with the policy's settings."""
    set: Assignments = ()
    """engine.FIELD of the server: max_model_len, num_blocks, block_size, max_num_batched_tokens, max_num_seqs and so on."""
    requests: Annotated[int, tyro.conf.arg(metavar="N")] = 200
    """Requests of the simulated episode."""


@dataclass(frozen=True)
class Found:
    """What a check found, for ``--json``: the policy's name, what its operator should read, words of ``vllm serve``, the episode."""

    policy: str
    notes: list[str]
    flags: list[str]
    trial: Trial


def server_engine(options: ServeCheck) -> tuple[EngineConfig, list[str]]:
    """The server's engine, and which of its settings were given.

    Raises:
        ConfigError: a key that is no setting of the server (the nearest is given), or a refused value.
    """
    given = words(options.set)
    for word in given:
        if word.startswith("policy."):
            raise ConfigError(f'--set {word}: a policy\'s options stand in --config, such as {{"options": {{"theta": 0.9}}}}')
    names = setting_names()
    values = parse_overrides(given, {}, exclude_engine=set(engine_keys()) - set(names)).engine
    try:
        return EngineConfig.vllm(**values), [name for name in names if name in values]
    except ConfigError as error:
        raise ConfigError(f"--set {error}") from error


def environment(options: ServeCheck) -> Mapping[str, str]:
    """The variables that a server would read."""
    given = {POLICY: options.policy, POLICY_CONFIG: None if options.config is None else str(options.config)}
    return {**os.environ, **{name: text for name, text in given.items() if text is not None}}


def assumed(engine: EngineConfig, given: list[str]) -> str:
    """What was not said of the server's engine."""
    missing = [setting for setting in SETTINGS if setting.name not in given]
    values = ", ".join(f"{setting.name} = {getattr(engine, setting.name)}" for setting in missing)
    return f"engine settings not given: {values} assumed" if missing else ""


def trial_lines(found: Trial, rate: float) -> list[str]:
    """The episode in words."""
    microseconds = "  ".join(f"{name} {1e6 * s:.1f}" for name, s in (("mean", found.mean), ("P99", found.p99), ("longest", found.longest)))
    lines = [
        f"{'episode':<12} {found.completed} of {found.requests} requests completed in {found.decisions:,} decisions, "
        f"Poisson {rate:.4g}/s, simulated",
        f"{'decision':<12} {microseconds} us on this machine; a simulated iteration takes {1e3 * found.iteration_seconds:.3g} ms",
    ]
    if found.out_of_range:
        lines.append(f"{'extrapolated':<12} {found.out_of_range:,} iterations lie outside the calibration")
    return lines


def command_line(variables: Mapping[str, str], flags: list[str]) -> str:
    """How to start the server."""
    settings = [f"{name}={shlex.quote(variables[name])}" for name in (POLICY, POLICY_CONFIG) if variables.get(name, "").strip()]
    return " ".join([*settings, "vllm serve MODEL", *flags])


def run(options: ServeCheck, screen: Screen) -> Outcome:
    """Start the policy as a server does, then try it."""
    check_counts(requests=options.requests)
    engine, given = server_engine(options)
    variables = environment(options)
    config = LiveConfig.from_environment(variables)
    live, _ = start(config, engine)
    policy = live.policy
    notes = [*announcement(config, live), *filter(None, [assumed(engine, given)])]
    if "num_blocks" in given:  # a number of blocks says nothing without their size, and vLLM's default is not the same everywhere
        given = [*given, "block_size"]
    flags = [*POLICY_FLAGS, *(setting.flag(getattr(engine, setting.name)) for setting in SETTINGS if setting.name in given)]
    tried = trial(live, options.requests)
    for note in notes:
        screen.print(f"policy {policy.name}: {note}")
    for line in trial_lines(tried, live.setting.rate):
        screen.print(line)
    found = Found(policy.name, notes, flags, tried)
    if tried.failure:
        screen.note(
            f"error: policy {policy.name!r} starts, but fails in the episode, after {tried.decisions:,} decisions: {tried.failure}; "
            "a server would go on with vLLM's own admission"
        )
        return Outcome(found, FAILED)
    screen.print(f"{'start with':<12} {command_line(variables, flags)}")
    return Outcome(found, DONE)


COMMAND = Command("serve-check", ServeCheck, run, "whether a policy will start in a vLLM server, without one")
main = COMMAND.main
