"""How an operator says which policy a live server runs: one name and one JSON file, checked before the first request."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmsched_agents.checkpoint import checkpoint_folder, read_config, shipped_agents
from llmsched_agents.lookup import is_checkpoint, named_policy
from llmsched_baselines import Setting, policy_names
from llmsched_env import checks
from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import ConfigError, InfeasibleError, MissingExtraError, did_you_mean
from llmsched_env.fluid import stability_boundary
from llmsched_env.perf import load_calibration
from llmsched_env.runner import Policy
from llmsched_env.types import LengthStatistics
from llmsched_env.workload import load_scenario
from llmsched_env.workload.lengths import TraceLengths
from llmsched_env.workload.readers import read_trace
from llmsched_hardware.calibration.iteration_log import MAX_ROWS, check_log_path
from llmsched_hardware.options import differing

POLICY = "LLMSCHED_POLICY"
POLICY_CONFIG = "LLMSCHED_POLICY_CONFIG"
LOG_ITERATIONS = "LLMSCHED_LOG_ITERATIONS"
DEFAULT_SCENARIO = "azure-conv"
DEFAULT_LOAD = 0.8
RATE_LIMIT = 1e9
"""requests/s"""
SHORTEST_TIMEOUT = 0.001
"""seconds; Python hands its lock from one busy thread to another no sooner than after 5 ms"""


@dataclass(frozen=True)
class LiveConfig:
    """Settings of the policy on a live server.

    Attributes:
        policy: name of a policy or of a shipped agent, folder of a checkpoint, or ``module:attribute`` of
            an own policy, called with the ``Setting`` and ``options``.
        scenario, trace, lengths: where the length statistics come from, at most one of them: a built-in
            scenario, a file that ``read_trace`` reads, or ``{"prompt": [...], "output": [...], "weight": [...]}``.
            None of them: the first scenario that a learned agent was trained on, else ``azure-conv``.
        rate: requests/s to plan for; None: 0.8 of the stability boundary of this engine.
        horizon_seconds: for the overflow probability of Nested WAIT, and the period over which
            evictions are counted in observations.
        calibration: iteration-time model that thresholds are computed with, by name or file.
        options: of the policy; of a learned agent ``deterministic`` and ``seed``.
        overload: accept a rate at which conditions of the theory fail; None: only where no ``rate`` is given.
        assume_max_tokens: take ``max_tokens`` of each request for its output length and show it to the policy.
        max_wait_seconds: the guard: longest stay in one queue, or held, before a request is released.
        retry_after_iterations: iterations after which a policy that failed is tried again; None: never.
        policy_timeout_seconds: time one decision may take before vLLM's own admission takes over; None: it is waited for.
        report_path, report_interval_seconds: JSON report; None for none.
        iteration_log, iteration_log_max_rows: file of iterations (``llmsched_hardware.calibration.iteration_log``) and its longest; None
            for none.
    """

    policy: str
    scenario: str | None = None
    trace: str | None = None
    lengths: Mapping[str, Any] | None = None
    rate: float | None = None
    horizon_seconds: float = 3600.0
    calibration: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    overload: bool | None = None
    assume_max_tokens: bool = False
    max_wait_seconds: float = 10.0
    retry_after_iterations: int | None = None
    policy_timeout_seconds: float | None = None
    report_path: str | None = None
    report_interval_seconds: float = 10.0
    iteration_log: str | None = None
    iteration_log_max_rows: int = MAX_ROWS

    def __post_init__(self) -> None:
        if not isinstance(self.policy, str) or not 0 < len(self.policy.strip()) <= 4096:
            raise ConfigError(
                f"{POLICY}: {checks.shown(self.policy)}, must be the name of a policy, a checkpoint's folder or module:attribute"
            )
        sources = [name for name in ("scenario", "trace", "lengths") if getattr(self, name) is not None]
        if len(sources) > 1:
            raise ConfigError(f"{sources[0]}, {sources[1]}: both given, length statistics come from one of scenario, trace and lengths")
        for name in ("scenario", "trace", "calibration", "report_path", "iteration_log"):
            if getattr(self, name) is not None:
                checks.text(name, getattr(self, name), empty=False)
        for name in ("lengths", "options"):
            if name == "options" or self.lengths is not None:
                checks.mapping(name, getattr(self, name))
        for name in ("overload", "assume_max_tokens"):
            if name != "overload" or self.overload is not None:
                checks.flag(name, getattr(self, name))
        for name, high in (
            ("rate", RATE_LIMIT), ("horizon_seconds", checks.MOST_SECONDS), ("max_wait_seconds", 86_400.0),
            ("report_interval_seconds", checks.MOST_SECONDS),
        ):  # fmt: skip
            if name != "rate" or self.rate is not None:
                checks.number(name, getattr(self, name), high=high, open_low=True)
        if self.policy_timeout_seconds is not None:
            checks.number("policy_timeout_seconds", self.policy_timeout_seconds, low=SHORTEST_TIMEOUT, high=3600.0)
        if self.retry_after_iterations is not None:
            checks.integer("retry_after_iterations", self.retry_after_iterations, low=1, high=2**62)
        checks.integer("iteration_log_max_rows", self.iteration_log_max_rows, low=1)
        if self.iteration_log is not None:
            check_log_path("iteration_log", Path(self.iteration_log))
        if self.report_path is not None:
            if not _is_folder(Path(self.report_path).absolute().parent):
                raise ConfigError(f"report_path: {self.report_path!r}, its folder does not exist")
            if _is_folder(Path(self.report_path)):
                raise ConfigError(f"report_path: {self.report_path!r} is a folder, must be a file")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> LiveConfig:
        """Read ``LLMSCHED_POLICY`` and the file named in ``LLMSCHED_POLICY_CONFIG``; ``LLMSCHED_LOG_ITERATIONS`` wins over its field.

        Raises:
            ConfigError: no policy named, an unreadable file, an unknown field (the nearest one is given), a refused value.
        """
        policy = environment.get(POLICY, "").strip()
        if not policy:
            raise ConfigError(
                f"{POLICY} is not set: name a policy ({', '.join(policy_names())}), a shipped agent ({', '.join(shipped_agents())}), "
                "a checkpoint's folder or module:attribute"
            )
        log = environment.get(LOG_ITERATIONS, "").strip()
        if log:
            with checks.told(LOG_ITERATIONS):
                check_log_path("iteration_log", Path(log))
        path = environment.get(POLICY_CONFIG, "").strip()
        if not path:
            return cls(policy, iteration_log=log or None)
        where = f"{POLICY_CONFIG}: {path!r}"
        values = checks.json_object(where, checks.file_bytes(where, path))
        allowed = [f.name for f in dataclasses.fields(cls) if f.name != "policy"]
        for name in values:
            if name not in allowed:
                hint = did_you_mean(name, allowed)
                raise ConfigError(f"{POLICY_CONFIG}: {path!r}: {name!r} is unknown{hint} (allowed: {', '.join(allowed)})")
        try:
            return cls(policy, **(values | ({"iteration_log": log} if log else {})))
        except ConfigError as error:
            raise ConfigError(f"{POLICY_CONFIG}: {path!r}: {error}") from error

    @property
    def is_checkpoint(self) -> bool:
        """Whether the policy is a learned agent."""
        return is_checkpoint(self.policy)

    @property
    def assumed_scenario(self) -> str | None:
        """The scenario taken where the operator gives no lengths; None if they are given."""
        if self.scenario is not None or self.trace is not None or self.lengths is not None:
            return None
        if not self.is_checkpoint:
            return DEFAULT_SCENARIO
        trained_on: dict[str, Any] = read_config(checkpoint_folder(self.policy))["trained_on"]
        return str(trained_on["scenarios"][0])

    def statistics(self, max_model_len: int) -> tuple[LengthStatistics, str]:
        """Length statistics of requests this engine serves, and what was left out; types are dropped, a server knows none.

        Raises:
            ConfigError: unknown scenario, unreadable trace, refused lengths, or no request short enough.
        """
        if self.lengths is not None:
            unknown = sorted(set(self.lengths) - {"prompt", "output", "weight"})
            missing = [name for name in ("prompt", "output", "weight") if name not in self.lengths]
            if unknown or missing:
                raise ConfigError(
                    f"lengths.{(unknown or missing)[0]}: {'unknown' if unknown else 'missing'} (fields: prompt, output, weight)"
                )
            with checks.told("lengths"):
                found = LengthStatistics.of(self.lengths["prompt"], self.lengths["output"], self.lengths["weight"], source="lengths")
        elif self.trace is not None:
            trace = read_trace(self.trace)
            found = TraceLengths(trace.prompt_tokens, trace.output_tokens, trace.type_id, trace.path).statistics()
        else:
            found = load_scenario(self.scenario or self.assumed_scenario or "").statistics
        short = found.prompt + found.output <= max_model_len
        if not found.weight[short].sum() > 0:
            raise ConfigError(f"{found.source or 'lengths'}: no request fits max_model_len = {max_model_len}")
        left_out = float(found.weight[~short].sum())
        kept = LengthStatistics.of(found.prompt[short], found.output[short], found.weight[short], None, found.source)
        return kept, f"{left_out:.1%} of the lengths exceed max_model_len and are left out" if left_out > 0 else ""


@dataclass(frozen=True, slots=True)
class LivePolicy:
    """A policy ready for a server.

    Attributes:
        policy: decides.
        setting: what it was computed for.
        notes: what the operator should read at the start.
    """

    policy: Policy
    setting: Setting
    notes: tuple[str, ...]


def build_policy(config: LiveConfig, engine: EngineConfig) -> LivePolicy:
    """The policy that a configuration names, for an engine as the server runs it.

    Raises:
        ConfigError: unknown policy or option, a policy that needs output lengths, engine settings other
            than the server's, parameters that violate a condition of the theory (``InfeasibleError``).
    """
    notes: list[str] = []
    if config.calibration is not None:
        engine = engine.replace(time_model=load_calibration(config.calibration))
    statistics, left_out = config.statistics(engine.max_model_len)
    if left_out:
        notes.append(left_out)
    if config.assumed_scenario is not None:
        notes.append(f"no length statistics given: those of {config.assumed_scenario} assumed")
    rate = config.rate
    if rate is None:
        rate = DEFAULT_LOAD * stability_boundary(statistics, engine)
        notes.append(f"no rate given: {DEFAULT_LOAD:.0%} of this engine's stability boundary assumed, {rate:.4g} requests/s")
    if config.calibration is None:
        notes.append(f"no calibration given: iteration times of {engine.time_model.provenance.name or 'the default model'} assumed")
    setting = Setting(statistics, float(rate), engine, config.horizon_seconds)
    policy = _named(config, setting)
    if policy.known_lengths and not config.assume_max_tokens:
        raise ConfigError(
            f"policy {policy.name!r} must know output lengths when requests arrive, which a server does not; where max_tokens "
            f'of every request is its length, set "assume_max_tokens": true'
        )
    _check_engine(policy, engine)
    if policy.notes:
        notes.append(policy.notes)
    return LivePolicy(policy, setting, tuple(notes))


def _named(config: LiveConfig, setting: Setting) -> Policy:
    try:
        named = named_policy(config.policy)
    except ConfigError as error:
        raise ConfigError(f"{POLICY}: {error}") from error
    overload = config.rate is None if config.overload is None else config.overload
    try:
        return named.build(setting, overload=overload, **config.options)
    except InfeasibleError as error:
        if overload:
            raise
        raise InfeasibleError(f'{error}; plan for another "rate", or set "overload": true') from error


def check_possible(policy: Policy) -> None:
    """Refuse a policy that stands for an engine which no flags of ``vllm serve`` make.

    Raises:
        ConfigError: naming the policy and the setting.
    """
    wanted = policy.engine
    if wanted.preset != "vllm":
        raise ConfigError(f"policy {policy.name!r}: its engine is not vLLM's (preset {wanted.preset!r})")
    for name, value in (("padded_prefill", False), ("decode_needs_free_block", False), ("prefill_interval_release", True)):
        if getattr(wanted, name) != value:
            raise ConfigError(f"policy {policy.name!r} stands for an engine with {name} = {not value}, for which no vLLM has a setting")
    if wanted.scheduling_policy != "fcfs":
        raise ConfigError(f"policy {policy.name!r}: its engine schedules by priority, which no policy in a server does")


def _check_engine(policy: Policy, engine: EngineConfig) -> None:
    check_possible(policy)
    wanted = policy.engine
    others = list(differing(wanted, engine))
    if others:  # settings that vLLM's flags fix: a policy that stands for others cannot run on this server
        for setting, asked, _ in others:
            with contextlib.suppress(MissingExtraError):  # where a server is only planned, no vLLM says what it has
                setting.check(asked)
        values = ", ".join(f"{setting.name} = {asked} (server: {found})" for setting, asked, found in others)
        flags = " ".join(setting.flag(asked) for setting, asked, _ in others)
        raise ConfigError(f"policy {policy.name!r} stands for an engine with {values}; start vllm serve with {flags}")


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name that is too long
        return False
