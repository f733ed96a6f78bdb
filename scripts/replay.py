"""Replay a trace under one policy: exactly its requests, a row for each.

    python scripts/replay.py --trace FILE --policy sarathi --out requests.csv \
        --set engine.num_blocks=2816 engine.max_num_batched_tokens=512

Policies that use length statistics (thresholds, reservations) take them from the trace itself. A
``type`` column, where there is one, gives the class. Nothing is written unless the replay ends.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

if not __package__:  # run as a program: imports go from the project's root, not from scripts/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from baselines import Policy, Setting, make_policy, policy_class, policy_names
from llmsched_env.backend import View
from llmsched_env.errors import ConfigError
from llmsched_env.metrics import latency, lost, ttft
from llmsched_env.perf import calibration_names
from llmsched_env.runner import EpisodeResult, run_episode
from llmsched_env.types import EngineConfig, EpisodeLimits, IterationReport, RequestLog, Workload
from llmsched_env.workload import Scenario, scenario_from_trace
from scripts.output import check_file, replacing
from scripts.parser import Parser
from scripts.settings import Overrides, parse_overrides, with_calibration

REQUEST_COLUMNS = ("request_id", "arrived_at", "prompt_tokens", "output_tokens", "admitted_at", "ttft", "e2e", "evictions", "completed")
ITERATION_COLUMNS = ("start", "duration", "batch_size", "prefill_tokens", "total_tokens", "kv_used", "queue_length")


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
    parser.add_argument("--horizon", type=float, default=math.inf, metavar="SECONDS", help="end at this simulated time")
    return parser


def prepare(options: argparse.Namespace) -> tuple[Policy, Workload, EpisodeLimits]:
    """Everything the replay needs, fully checked; nothing is written.

    Raises:
        ConfigError: an option that cannot be carried out, a trace that cannot be read or served.
    """
    policy_class(options.policy)
    if options.rate is not None and not (math.isfinite(options.rate) and options.rate > 0):
        raise ConfigError(f"--rate: {options.rate:g}, must be finite and > 0 requests/s")
    overrides = with_calibration(parse_overrides(options.set, [options.policy], exclude_engine=("preset",)), options.calibration)
    limits = EpisodeLimits(drain=not options.no_drain, horizon=options.horizon)
    for option, path in (("--out", options.out), ("--iterations", options.iterations)):
        if path is None:
            continue
        check_file(option, path)
        if path.resolve() == options.trace.resolve():
            raise ConfigError(f"{option}: {path} is the trace itself")
    if options.iterations is not None and options.iterations.resolve() == options.out.resolve():
        raise ConfigError(f"--iterations: {options.iterations} is also --out")
    scenario = scenario_from_trace(options.trace, rate=options.rate)
    workload = scenario.generate(0)
    return build_policy(options, scenario, workload, overrides), workload, limits


def build_policy(options: argparse.Namespace, scenario: Scenario, workload: Workload, overrides: Overrides) -> Policy:
    base = EngineConfig(preset=options.engine)
    changes = dict(overrides.engine)
    longest = workload.prompt_tokens.astype(np.int64) + workload.output_tokens
    i = int(longest.argmax())
    if options.engine == "vllm" and "max_model_len" not in changes and longest[i] > base.max_model_len:
        # A replay serves every request; what can never fit the KV is refused below, by the engine's own rule.
        blocks, size = changes.get("num_blocks", base.num_blocks), changes.get("block_size", base.block_size)
        if longest[i] > blocks * size:
            raise ConfigError(
                f"{options.trace}: request {i} needs {workload.prompt_tokens[i]} prompt + {workload.output_tokens[i]} output tokens, "
                f"more than the KV capacity of {blocks * size} tokens (engine.num_blocks x engine.block_size)"
            )
        changes["max_model_len"] = int(longest[i])
        print(f"engine.max_model_len = {longest[i]}, the longest request of the trace", file=sys.stderr)
    setting = Setting(
        statistics=scenario.statistics,
        rate=scenario.rate,
        engine=base,
        horizon_seconds=max(float(workload.arrival[-1]), 1.0) if len(workload) else 1.0,
        overrides=changes,
    )
    return make_policy(options.policy, setting, overload=True, **overrides.options(options.policy))


class IterationRows:
    """Collects the rows of ``--iterations``; idle steps are no iterations."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, float, int, int, int, int, int]] = []

    def __call__(self, report: IterationReport, view: View) -> None:
        if report.idle:
            return
        r = report
        self.rows.append((r.start, r.duration, r.batch_size, r.prefill_tokens, r.total_tokens, r.kv_used, r.waiting))


def request_rows(log: RequestLog) -> Iterable[tuple[object, ...]]:
    """Rows of ``--out``; a time that does not exist is an empty cell."""
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
        )


def _cell(value: float) -> float | str:
    return float(value) if math.isfinite(value) else ""


def print_summary(policy: Policy, result: EpisodeResult) -> None:
    s = result.summary
    lines: list[tuple[str, str]] = [
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


def main(words: Sequence[str] | None = None) -> int:
    options = arguments().parse_args(words)
    try:
        policy, workload, limits = prepare(options)
        iterations = IterationRows() if options.iterations is not None else None
        # One request compiles the engine, so that the speed printed is the replay's.
        run_episode(policy, Workload.of([0.0], [1], [1]))
        result = run_episode(policy, workload, limits=limits, on_step=iterations)
        with ExitStack() as files:
            # Both files take their places only when both are written.
            requests = csv.writer(files.enter_context(replacing(options.out)))
            requests.writerow(REQUEST_COLUMNS)
            requests.writerows(request_rows(result.log))
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
    print_summary(policy, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
