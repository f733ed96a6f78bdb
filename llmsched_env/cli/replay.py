"""Replay a trace under one policy: exactly its requests, a row for each.

    python scripts/replay.py --trace FILE --policy sarathi --out requests.csv \
        --set engine.num_blocks=2816 engine.max_num_batched_tokens=512

Policies that use rates and length statistics (thresholds, reservations) take them from the trace itself. A
``type`` column, where there is one, gives the class. Times count from the first arrival. Nothing is
written unless the replay ends. ``requests.csv`` can be replayed in turn, with the same result.

Exit status: 0; 1 where requests were left that no option excludes (the limit of ``--max-iterations``,
files written); 2 where the replay was refused.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np

from llmsched_baselines import Policy, Setting, make_policy, policy_class, policy_names
from llmsched_baselines.overrides import Overrides, parse_overrides, with_calibration
from llmsched_env.backend import View
from llmsched_env.cli.parser import Parser
from llmsched_env.errors import ConfigError
from llmsched_env.files import check_file, replacing
from llmsched_env.metrics import latency, lost, ttft
from llmsched_env.perf import calibration_names
from llmsched_env.runner import EpisodeResult, run_episode
from llmsched_env.types import EngineConfig, EpisodeLimits, IterationReport, RequestLog, Workload
from llmsched_env.workload import Scenario, Trace, TraceArrivals, scenario_from_trace
from llmsched_env.workload.readers import REORDER_SECONDS, InvalidRows, TimeUnit

REQUEST_COLUMNS = ("request_id", "arrived_at", "prompt_tokens", "output_tokens", "admitted_at", "ttft", "e2e", "evictions", "completed")
TYPE_COLUMN = "type"
"""Last column where the trace has types: without it the rows could not be replayed with the same classes."""
ITERATION_COLUMNS = ("start", "duration", "batch_size", "prefill_tokens", "total_tokens", "kv_used", "queue_length")

MOST_ITERATIONS = 2**62


def arguments() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True, metavar="FILE", help="CSV or JSON lines, may be gzipped")
    parser.add_argument("--policy", required=True, metavar="NAME", help=f"one of {', '.join(policy_names())}")
    parser.add_argument("--engine", choices=("vllm", "paper"), default="vllm", help="engine preset (default: vllm)")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="engine.FIELD (also engine.d0, engine.d1: a linear time model; engine.time_model: a calibration) or policy.OPTION",
    )
    parser.add_argument(
        "--calibration",
        metavar="FILE_OR_NAME",
        help=f"time model and, where it states it, KV capacity: a .json or .npz file, or one of {', '.join(calibration_names())}"
        " (NAME:clip holds tables at their edge values)",
    )
    parser.add_argument("--rate", type=float, metavar="R", help="rescale time to R requests/s")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="CSV, one row a request")
    parser.add_argument("--iterations", type=Path, metavar="FILE", help="CSV, one row an iteration (kv_used: tokens or blocks)")
    parser.add_argument("--no-drain", action="store_true", help="end where the policy schedules nothing after the last arrival")
    parser.add_argument("--horizon", type=float, default=math.inf, metavar="SECONDS", help="end this long after the first arrival")
    parser.add_argument(
        "--max-iterations",
        type=int,
        metavar="N",
        help="most steps before the replay is cut off (default: more than the trace's tokens need)",
    )
    parser.add_argument("--time-unit", choices=get_args(TimeUnit), help="unit of the trace's times (default: its format's)")
    parser.add_argument(
        "--invalid-rows",
        choices=get_args(InvalidRows),
        default="error",
        help="rows that cannot be right, such as 0 tokens: refuse the trace (error, the default) or leave them out and count them (drop)",
    )
    parser.add_argument(
        "--reorder-seconds",
        type=float,
        default=REORDER_SECONDS,
        metavar="SECONDS",
        help=f"put rows in order that come up to this late, inf for all; later ones are refused (default: {REORDER_SECONDS:g})",
    )
    return parser


class Prepared(NamedTuple):
    """What a replay needs, all of it checked."""

    policy: Policy
    workload: Workload
    limits: EpisodeLimits
    trace: Trace


def prepare(options: argparse.Namespace) -> Prepared:
    """Everything the replay needs, fully checked; nothing is written.

    Raises:
        ConfigError: an option that cannot be carried out, a trace that cannot be read or served.
    """
    policy_class(options.policy)
    if options.rate is not None and not (math.isfinite(options.rate) and options.rate > 0):
        raise ConfigError(f"--rate: {options.rate:g}, must be finite and > 0 requests/s")
    if options.max_iterations is not None and not 1 <= options.max_iterations <= MOST_ITERATIONS:
        raise ConfigError(f"--max-iterations: {options.max_iterations}, must be an integer from 1 to 2**62")
    overrides = with_calibration(parse_overrides(options.set, [options.policy], exclude_engine=("preset",)), options.calibration)
    limits = EpisodeLimits(drain=not options.no_drain, horizon=options.horizon)
    for option, path in (("--out", options.out), ("--iterations", options.iterations)):
        if path is None:
            continue
        check_file(option, path)
        if path.suffix == ".gz":
            raise ConfigError(f"{option}: {path} would hold plain CSV, must not be named .gz")
        if path.resolve() == options.trace.resolve():
            raise ConfigError(f"{option}: {path} is the trace itself")
    if options.iterations is not None and options.iterations.resolve() == options.out.resolve():
        raise ConfigError(f"--iterations: {options.iterations} is also --out")
    scenario = scenario_from_trace(
        options.trace,
        rate=options.rate,
        time_unit=options.time_unit,
        invalid_rows=options.invalid_rows,
        reorder_seconds=options.reorder_seconds,
    )
    workload = from_first_arrival(scenario.generate(0))
    most = options.max_iterations or enough_iterations(workload)
    limits = EpisodeLimits(drain=limits.drain, horizon=limits.horizon, max_iterations=most)
    assert scenario.trace is not None
    return Prepared(build_policy(options, scenario, workload, overrides), workload, limits, scenario.trace)


def from_first_arrival(workload: Workload) -> Workload:
    """The same requests, the first at time 0 (drawn arrivals come after a gap), as a replay of the output will have them."""
    w = workload
    return Workload(w.arrival - w.arrival[0], w.prompt_tokens, w.output_tokens, w.type_id, w.request_id)


def enough_iterations(workload: Workload) -> int:
    """A limit on steps that no replay of ``workload`` should reach: four times one step a token, and one an arrival.

    Every step computes at least one token or waits for an arrival; the factor is for what evictions compute again.
    """
    tokens = int(workload.prompt_tokens.sum(dtype=np.int64) + workload.output_tokens.sum(dtype=np.int64))
    return max(EpisodeLimits().max_iterations, 4 * (tokens + len(workload)))


def build_policy(options: argparse.Namespace, scenario: Scenario, workload: Workload, overrides: Overrides) -> Policy:
    base = EngineConfig(preset=options.engine)
    changes = dict(overrides.engine)
    lengths = workload.prompt_tokens.astype(np.int64) + workload.output_tokens
    longest = int(lengths.max())
    note = limited_by = ""
    if options.engine == "vllm" and "max_model_len" not in changes:
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
        name = "capacity_tokens" if options.engine == "paper" else "max_model_len"
        limit = changes.get(name, getattr(base, name))
        if limit >= 1:  # else the engine names the field that is out of range
            check_lengths(options.trace, workload, limit, limited_by or f"engine.{name}")
    if note:
        print(note, file=sys.stderr)
    return make_policy(options.policy, setting, overload=True, **overrides.options(options.policy))


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


def check_lengths(trace: Path, workload: Workload, limit: int, limited_by: str) -> None:
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
        f"{trace}: request {i}{name} needs {workload.prompt_tokens[i]} prompt + {workload.output_tokens[i]} output tokens, "
        f"more than the {limit} of {limited_by} ({too_long.size} such requests); raise it, "
        "or serve the others and reject these on arrival: --set engine.oversize=reject"
    )


class IterationRows:
    """Collects the rows of ``--iterations``; idle steps are no iterations."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, float, int, int, int, int, int]] = []

    def __call__(self, report: IterationReport, view: View) -> None:
        if report.idle:
            return
        r = report
        self.rows.append((r.start, r.duration, r.batch_size, r.prefill_tokens, r.total_tokens, r.kv_used, r.waiting))


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


def print_summary(policy: Policy, result: EpisodeResult, trace: Trace) -> None:
    s = result.summary
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
        ("latency", _spread(s.latency_mean, s.latency_p50, s.latency_p99)),
        ("TTFT", _spread(s.ttft_mean, s.ttft_p50, s.ttft_p99)),
        ("TPOT", _spread(s.tpot_mean, s.tpot_p50, s.tpot_p99)),
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
    for name, text in lines:
        print(f"{name:<12} {text}")


def _spread(mean: float, p50: float, p99: float) -> str:
    if math.isnan(mean):
        return "none"
    return f"mean {mean:.4g} s, P50 {p50:.4g} s, P99 {p99:.4g} s"


def unserved(options: argparse.Namespace, limits: EpisodeLimits, engine: EngineConfig, result: EpisodeResult) -> int:
    """Say on stderr what was not served and why; the exit status."""
    log, end = result.log, result.counters.end
    rejected, left = int(log.rejected.sum()), int(lost(log).sum())
    if rejected:
        print(f"note: {rejected} of {len(log)} requests were rejected, longer than {engine.longest_request} tokens", file=sys.stderr)
    if not left:
        return 0
    text = f"{left} of {len(log)} requests were never served"
    if end == "horizon" or (end == "stranded" and options.no_drain):
        print(f"note: {text} ({'--horizon' if end == 'horizon' else '--no-drain'})", file=sys.stderr)
        return 0
    if end == "max_iterations":
        text += f": the replay was cut off after {limits.max_iterations} iterations; --max-iterations raises the limit"
    else:
        text += f": the replay ended as {end}"
    print(f"error: {text}", file=sys.stderr)
    return 1


def main(words: Sequence[str] | None = None) -> int:
    options = arguments().parse_args(words)
    try:
        policy, workload, limits, trace = prepare(options)
        iterations = IterationRows() if options.iterations is not None else None
        # One request compiles the engine, so that the speed printed is the replay's.
        run_episode(policy, Workload.of([0.0], [1], [1]))
        result = run_episode(policy, workload, limits=limits, on_step=iterations)
        types = [trace.type_names[t] for t in workload.type_id.tolist()] if trace.type_names else []
        with ExitStack() as files:
            # Both files take their places only when both are written.
            requests = csv.writer(files.enter_context(replacing(options.out)))
            requests.writerow((*REQUEST_COLUMNS, TYPE_COLUMN) if types else REQUEST_COLUMNS)
            requests.writerows(request_rows(result.log, types))
            if iterations is not None:
                steps = csv.writer(files.enter_context(replacing(options.iterations)))
                steps.writerow(ITERATION_COLUMNS)
                # An iteration that the horizon cuts off is reported but does not count.
                steps.writerows(iterations.rows[: result.counters.iterations])
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print_summary(policy, result, trace)
    return unserved(options, limits, policy.engine, result)


if __name__ == "__main__":
    sys.exit(main())
