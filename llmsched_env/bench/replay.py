"""A trace served by one policy: exactly its requests, a row for each, and what was left unserved."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llmsched_agents.lookup import NamedPolicy
from llmsched_baselines import Setting
from llmsched_baselines.overrides import Overrides
from llmsched_env.backend import View
from llmsched_env.engine_config import EngineConfig, EpisodeLimits
from llmsched_env.errors import ConfigError, policy_named
from llmsched_env.files import replacing
from llmsched_env.metrics import latency, lost, ttft
from llmsched_env.row_file import csv_writer
from llmsched_env.runner import EpisodeResult, Policy, run_episode
from llmsched_env.types import IterationReport, RequestLog, Workload
from llmsched_env.workload import Scenario, Trace, TraceArrivals

REQUEST_COLUMNS = ("request_id", "arrived_at", "prompt_tokens", "output_tokens", "admitted_at", "ttft", "e2e", "evictions", "completed")
TYPE_COLUMN = "type"
"""Last column where the trace has types: without it the rows could not be replayed with the same classes."""
ITERATION_COLUMNS = ("start", "duration", "batch_size", "prefill_tokens", "total_tokens", "kv_used", "queue_length")

Preset = Literal["vllm", "paper"]


@dataclass(frozen=True, slots=True)
class Replay:
    """What a replay needs, all of it checked.

    Attributes:
        workload: of the trace, the first arrival at 0.
        note: on a setting that the trace made necessary; empty where there is none.
    """

    policy: Policy
    workload: Workload
    limits: EpisodeLimits
    trace: Trace
    note: str = ""

    @property
    def types(self) -> list[str]:
        """The type of each request; empty where the trace has none."""
        names = self.trace.type_names
        return [names[t] for t in self.workload.type_id.tolist()] if names else []

    def run(self, on_step: IterationRows | None = None) -> EpisodeResult:
        """Serve the trace; its wall time is that of compiled code."""
        with policy_named(f"policy {self.policy.name!r}"):
            run_episode(self.policy, Workload.of([0.0], [1], [1]))  # one request compiles the engine
            return run_episode(self.policy, self.workload, limits=self.limits, on_step=on_step)


def prepared(
    scenario: Scenario,
    policy: NamedPolicy,
    *,
    preset: Preset = "vllm",
    overrides: Overrides | None = None,
    limits: EpisodeLimits | None = None,
    max_iterations: int | None = None,
) -> Replay:
    """Everything a replay of a trace's scenario (``scenario_from_trace``) needs.

    Args:
        limits: the horizon counts from the first arrival; their ``max_iterations`` is not taken.
        max_iterations: steps before the replay is cut off; None for more than the trace's tokens need.

    Raises:
        ConfigError: a policy that refuses the setting, or a request that can never be served.
    """
    if scenario.trace is None:
        raise ConfigError(f"scenario: {scenario.name!r} is not of a trace, must be one of scenario_from_trace")
    workload = from_first_arrival(scenario.generate(0))
    limits = replace(limits or EpisodeLimits(), max_iterations=max_iterations or enough_iterations(workload))
    made, note = build_policy(policy, scenario, workload, preset, overrides or Overrides())
    return Replay(made, workload, limits, scenario.trace, note)


def from_first_arrival(workload: Workload) -> Workload:
    """The same requests, the first at time 0 (drawn arrivals come after a gap), as a replay of the output will have them."""
    return replace(workload, arrival=workload.arrival - workload.arrival[0])


def enough_iterations(workload: Workload) -> int:
    """A limit on steps that no replay of ``workload`` should reach: four times one step a token, and one an arrival.

    Every step computes at least one token or waits for an arrival; the factor is for what evictions compute again.
    """
    tokens = int(workload.prompt_tokens.sum(dtype=np.int64) + workload.output_tokens.sum(dtype=np.int64))
    return max(EpisodeLimits().max_iterations, 4 * (tokens + len(workload)))


# --- the policy and the engine it runs on --------------------------------------------------------


def build_policy(policy: NamedPolicy, scenario: Scenario, workload: Workload, preset: Preset, overrides: Overrides) -> tuple[Policy, str]:
    """The policy in the setting that the trace's own requests give, and a note where they lengthen or shorten the engine's limit.

    Raises:
        ConfigError: a policy that refuses the setting, or a request that can never be served.
    """
    base = EngineConfig(preset=preset)
    changes = dict(overrides.engine)
    note = limited_by = ""
    if preset == "vllm" and "max_model_len" not in changes:
        longest = int((workload.prompt_tokens.astype(np.int64) + workload.output_tokens).max())
        limit, limited_by = serving_limit(base, changes)
        changes["max_model_len"] = min(max(base.max_model_len, longest), limit)
        if changes["max_model_len"] != base.max_model_len:
            which = "the longest request of the trace" if changes["max_model_len"] == longest else limited_by
            note = f"engine.max_model_len = {changes['max_model_len']}, {which}"
    setting = Setting(
        statistics=scenario.statistics,
        # of the arrivals as they are: what a replay of the output finds
        rate=TraceArrivals(workload.arrival).rate,
        engine=base,
        horizon_seconds=max(float(workload.arrival[-1]), 1.0),
        overrides=changes,
    )
    if changes.get("oversize", base.oversize) == "error":
        # Before the policy: its tables are as long as the longest output.
        name = "capacity_tokens" if preset == "paper" else "max_model_len"
        limit = changes.get(name, getattr(base, name))
        if limit >= 1:  # else the engine names the field that is out of range
            check_lengths(scenario.trace, workload, limit, limited_by or f"engine.{name}")
    return policy.build(setting, **overrides.options(policy.name)), note


def serving_limit(base: EngineConfig, changes: Mapping[str, Any]) -> tuple[int, str]:
    """The longest request (tokens) that the ``vllm`` preset can hold under ``changes``, and what limits it."""

    def value(name: str) -> Any:
        return changes.get(name, getattr(base, name))

    limit = (value("num_blocks") - int(value("decode_needs_free_block"))) * value("block_size")
    limited_by = "the KV capacity (engine.num_blocks x engine.block_size)"
    whole_prompts = value("padded_prefill") or not value("enable_chunked_prefill")
    if whole_prompts and value("max_num_batched_tokens") < limit:
        limit, limited_by = value("max_num_batched_tokens"), "engine.max_num_batched_tokens, as prompts are not split"
    return limit, limited_by


def check_lengths(trace: Trace | None, workload: Workload, limit: int, limited_by: str) -> None:
    """Refuse, by the engine's own rule but in the words of the command line, what could never be served.

    Raises:
        ConfigError: a request of more than ``limit`` tokens, which come from ``limited_by``.
    """
    lengths = workload.prompt_tokens.astype(np.int64) + workload.output_tokens
    too_long = np.flatnonzero(lengths > limit)
    if not too_long.size:
        return
    i = int(too_long[0])
    name = f" ({workload.request_id[i]})" if workload.request_id else ""
    raise ConfigError(
        f"{trace.path if trace else 'workload'}: request {i}{name} needs {workload.prompt_tokens[i]} prompt + "
        f"{workload.output_tokens[i]} output tokens, more than the {limit} of {limited_by} ({too_long.size} such requests); raise it, "
        "or serve the others and reject these on arrival: --set engine.oversize=reject"
    )


# --- what is written -----------------------------------------------------------------------------


class IterationRows:
    """Collects the rows of ``--iterations``; idle steps are no iterations. One scheduled ahead runs during the next step."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, float, int, int, int, int, int]] = []
        self._ahead: IterationReport | None = None

    def __call__(self, report: IterationReport, view: View) -> None:
        batch: IterationReport | None = report
        if view.engine.async_scheduling:
            batch, self._ahead = self._ahead, None if report.idle else report
        elif report.idle:
            batch = None
        if batch is not None:
            r = batch
            self.rows.append((report.start, report.duration, r.batch_size, r.prefill_tokens, r.total_tokens, r.kv_used, r.waiting))


def request_rows(log: RequestLog, types: Sequence[str] = ()) -> Iterable[tuple[object, ...]]:
    """Rows of ``--out``; a time that does not exist is an empty cell. ``types``: the type of each request, where it has one."""
    first, whole = ttft(log), latency(log)
    for i in range(len(log)):
        yield (
            log.request_id[i] if log.request_id else i,
            float(log.arrival[i]),
            int(log.prompt_tokens[i]),
            int(log.output_tokens[i]),
            _cell(log.admitted[i]),
            _cell(first[i]),
            _cell(whole[i]),
            int(log.evictions[i]),
            int(np.isfinite(log.completed[i])),
            *((types[i],) if types else ()),
        )


def _cell(value: float) -> float | str:
    return float(value) if math.isfinite(value) else ""


def write(out: Path, result: EpisodeResult, types: Sequence[str], steps: tuple[Path, IterationRows] | None = None) -> None:
    """The rows of requests and, where asked for, of iterations; both files take their places only when both are written."""
    with ExitStack() as files:
        requests = csv_writer(files.enter_context(replacing(out)))
        requests.writerow((*REQUEST_COLUMNS, TYPE_COLUMN) if types else REQUEST_COLUMNS)
        requests.writerows(request_rows(result.log, types))
        if steps is not None:
            path, collected = steps
            rows = csv_writer(files.enter_context(replacing(path)))
            rows.writerow(ITERATION_COLUMNS)
            # An iteration that the horizon cuts off is reported but does not count.
            rows.writerows(collected.rows[: result.counters.iterations])


def summary_lines(replay: Replay, result: EpisodeResult) -> list[tuple[str, str]]:
    """(name, text) of what a person wants to know of a replay."""
    s, trace, policy = result.summary, replay.trace, replay.policy
    lines: list[tuple[str, str]] = []
    if trace.origin:
        lines.append(("clock", f"0 is {trace.origin:.10g} s on the trace's clock, its first arrival"))
    if trace.reordered:
        lines.append(("reordered", f"{trace.reordered:,} rows of the trace that stood after a later one"))
    if trace.dropped:
        lines.append(("dropped", f"{trace.dropped:,} rows of the trace: {trace.dropped_reason}"))
    lines += [
        ("policy", policy.name + (" [known lengths]" if policy.known_lengths else "")),
        ("requests", f"{s.requests:,} ({s.completed:,} completed, {s.rejected:,} rejected, {int(lost(result.log).sum()):,} left)"),
        ("latency", _spread(s.latency_mean, s.latency_p50, s.latency_p99, s.latency_max)),
        ("TTFT", _spread(s.ttft_mean, s.ttft_p50, s.ttft_p99)),
        ("TPOT", _spread(s.tpot_mean, s.tpot_p50, s.tpot_p99)),
        ("fairness", f"{s.slowdown_jain:.4g}, Jain's index of latency per output token"),
        ("throughput", f"{s.throughput_tok_s:,.1f} tok/s, {s.throughput_req_s:,.3f} req/s"),
        ("evictions", f"{s.evictions:,} ({s.forced_evictions:,} forced)"),
        ("KV", f"mean {100 * s.kv_mean:.1f} %, max {100 * s.kv_max:.1f} %"),
        ("iterations", f"{s.iterations:,} ({s.drain_iterations:,} forced by the drain), {s.idle_steps:,} idle steps"),
        ("simulated", f"{s.sim_seconds:,.1f} s, ended: {s.end}"),
        ("wall time", f"{result.wall_seconds:.2f} s, {s.requests / max(result.wall_seconds, 1e-9):,.0f} requests/s"),
    ]
    if s.out_of_range:
        share = 100 * s.out_of_range / s.iterations
        lines.append(("out of range", f"{s.out_of_range:,} iterations ({share:.1f} %) beyond what the time model's data cover"))
    if policy.notes:
        lines.append(("note", policy.notes))
    return lines


def _spread(mean: float, p50: float, p99: float, longest: float | None = None) -> str:
    if math.isnan(mean):
        return "none"
    return f"mean {mean:.4g} s, P50 {p50:.4g} s, P99 {p99:.4g} s" + (f", max {longest:.4g} s" if longest is not None else "")
