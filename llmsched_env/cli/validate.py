"""Compare the simulator with a vLLM engine on the same requests, policy by policy and rate by rate.

    python scripts/validate.py --calibration my.json --model MODEL --scenario azure-conv \
        --policies vllm sarathi wait nested-wait --out results/validation

Under the measured clock (default) it writes runs.csv (a row a run, as each finishes), sim_to_real.csv
and report.md: errors beside the engine's own spread, and whether policies rank alike. Under
``--clock virtual`` the engine computes while time comes from the calibration: schedules must then be
equal step by step on the simulator, vLLM's scheduler and the engine, and the exit code is 1 if not.
``--resume`` goes on where a validation was left.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmsched_baselines import policy_names
from llmsched_baselines.overrides import parse_overrides
from llmsched_env import __version__
from llmsched_env.backend import Backend
from llmsched_env.backends import make_backend
from llmsched_env.bench.variants import named_policies
from llmsched_env.cli.parser import Parser
from llmsched_env.errors import ConfigError, EngineError, MissingExtraError, require
from llmsched_env.files import check_folder, replacing
from llmsched_env.perf import CalibrationRangeWarning, IterationTimeModel, load_calibration
from llmsched_env.row_file import RowFile
from llmsched_env.workload import load_scenario, scenario_names
from llmsched_hardware.calibration.settings import add_model_arguments, backend_settings, engine_config, engine_options
from llmsched_hardware.real_engine import EngineOptions
from llmsched_hardware.validation import (
    ENGINE,
    SCHEDULER,
    SIM,
    Run,
    Schedules,
    Validation,
    compare_schedules,
    gaps,
    longest_request,
    on_engine,
    rankings,
    run_task,
)
from llmsched_hardware.validation_report import REPORT_FILE, TABLE_FILE, measured_page, summary_lines, virtual_page, write_table

RUNS_FILE, SCHEDULES_FILE, SETTINGS_FILE, MACHINE_FILE = "runs.csv", "schedules.csv", "settings.json", "machine.json"
POLICIES = ("vllm", "sarathi", "wait", "nested-wait")
LOADS = (0.5, 0.7, 0.9)
REQUESTS, REPEATS = 200, 3
QUICK_LOADS, QUICK_REQUESTS, QUICK_REPEATS = (0.5, 0.9), 24, 2
INTERRUPTED = 130


def arguments() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", required=True, metavar="FILE_OR_NAME", help="what calibrate.py engine wrote for this engine")
    add_model_arguments(parser)
    parser.add_argument("--scenario", required=True, help=f"one of {', '.join(scenario_names())}")
    parser.add_argument(
        "--policies", nargs="+", default=list(POLICIES), metavar="NAME",
        help=f"of {', '.join(policy_names())}, or folders of checkpoints (default: {' '.join(POLICIES)})",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    rates = parser.add_mutually_exclusive_group()
    rates.add_argument("--rates", type=float, nargs="+", metavar="R", help="arrival rates, requests/s")
    rates.add_argument(
        "--loads", type=float, nargs="+", metavar="X", help=f"rates as shares of the fluid stability boundary (default {LOADS})"
    )
    parser.add_argument("--num-requests", type=int, metavar="N", help=f"requests of one run (default {REQUESTS})")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="seeds 0 .. N-1 (default 1)")
    parser.add_argument("--repeats", type=int, metavar="N", help=f"runs of the same requests on the engine (default {REPEATS})")
    parser.add_argument("--warm-ups", type=int, default=1, metavar="N", help="runs on the engine before them, not counted (default 1)")
    parser.add_argument("--length-scale", type=float, metavar="F", help="multiply prompt and output lengths")
    parser.add_argument("--max-total-tokens", type=int, metavar="N", help="cut requests (output first) to N tokens")
    parser.add_argument("--clock", choices=("measured", "virtual", "wall"), default="measured")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_REQUESTS} requests, {QUICK_REPEATS} repeats, lengths scaled to fit")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument("--resume", action="store_true", help="keep the runs in --out and do what is missing")
    kept.add_argument("--overwrite", action="store_true", help="discard the validation in --out")
    return parser


def plan(options: argparse.Namespace, engine: EngineOptions, calibration: IterationTimeModel, policy_words: Sequence[str]) -> Validation:
    """The validation that the options ask for, fully checked; nothing is written.

    Raises:
        ConfigError: an option that cannot be carried out.
    """
    policies, agents = named_policies(options.policies)
    counts = (("--num-requests", options.num_requests), ("--seeds", options.seeds), ("--repeats", options.repeats))
    for name, count in (*counts, ("--max-total-tokens", options.max_total_tokens)):
        if count is not None and count < 1:
            raise ConfigError(f"{name}: {count}, must be >= 1")
    if options.warm_ups < 0:
        raise ConfigError(f"--warm-ups: {options.warm_ups}, must be >= 0")
    given = [("--rates", r) for r in options.rates or ()] + [("--loads", x) for x in options.loads or ()]
    for name, value in (*given, ("--length-scale", 1.0 if options.length_scale is None else options.length_scale)):
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{name}: {value:g}, must be finite and > 0")
    check_folder("--out", options.out)
    overrides = parse_overrides(policy_words, [name for name in policies if name not in agents])
    if engine.num_blocks is None:
        raise ConfigError(f"--calibration: {options.calibration} does not state the number of KV blocks; give --set engine.num_blocks=N")
    config = engine_config(engine, calibration, engine.num_blocks)
    seeds = tuple(range(options.seeds))
    num_requests = options.num_requests or (QUICK_REQUESTS if options.quick else REQUESTS)
    scenario = load_scenario(options.scenario)
    if options.quick and options.length_scale is None and options.max_total_tokens is None:
        options.length_scale = min(1.0, config.max_model_len / longest_request(scenario, seeds, num_requests))
        options.max_total_tokens = config.max_model_len
    scenario = on_engine(scenario, config, options.length_scale or 1.0, options.max_total_tokens)
    validation = Validation(
        scenario=scenario,
        policies=policies,
        rates=(),
        seeds=seeds,
        num_requests=num_requests,
        repeats=options.repeats or (QUICK_REPEATS if options.quick else REPEATS),
        warm_ups=options.warm_ups,
        options=overrides.policy,
        agents=agents,
    )
    if options.rates:
        rates = tuple(dict.fromkeys(options.rates))
    else:
        boundary = validation.boundary
        rates = tuple(float(f"{x * boundary:.4g}") for x in options.loads or (QUICK_LOADS if options.quick else LOADS))
    validation = Validation(**{name: getattr(validation, name) for name in Validation.__dataclass_fields__} | {"rates": rates})
    validation.check()
    return validation


def describe(options: argparse.Namespace, engine: EngineOptions, calibration: IterationTimeModel, validation: Validation) -> dict[str, Any]:
    """What must agree between a validation and its resumption, as plain values."""
    return {
        "version": __version__,
        "calibration": calibration.provenance.name,
        "calibration_source": calibration.provenance.source,
        "engine": {name: getattr(engine, name) for name in engine.__dataclass_fields__ if name != "extra"} | {"extra": dict(engine.extra)},
        "num_blocks": validation.scenario.engine.num_blocks,
        "scenario": validation.scenario.name,
        "length_scale": options.length_scale or 1.0,
        "max_total_tokens": options.max_total_tokens,
        "num_requests": validation.num_requests,
        "clock": options.clock,
        "policy_options": {name: {k: str(v) for k, v in own.items()} for name, own in validation.options.items()},
        **({"agents": dict(validation.agents)} if validation.agents else {}),
    }


def facts(
    options: argparse.Namespace, validation: Validation, calibration: IterationTimeModel, runs: Sequence[Run] = ()
) -> list[tuple[str, str]]:
    """What a reader of the report must know."""
    simulated = [run for run in runs if run.backend == SIM]
    out_of_range, iterations = sum(run.out_of_range for run in simulated), sum(run.iterations for run in simulated)
    machine = json.loads((options.out / MACHINE_FILE).read_text(encoding="utf-8"))
    engine, statistics, source = validation.scenario.engine, validation.scenario.statistics, calibration.provenance
    scaled = f", lengths times {options.length_scale:.4g}" if options.length_scale not in (None, 1.0) else ""
    cut = f", cut to {options.max_total_tokens} tokens" if options.max_total_tokens else ""
    driver = f", driver {machine['driver']}" if machine["driver"] else ""
    lines = [
        ("Command", f"`{options.command}`"),
        ("Engine", f"{options.model} ({machine['dtype']}) on {machine['device']}{driver}, vLLM {machine['vllm']}, {machine['date']}"),
        (
            "Settings",
            f"{engine.num_blocks:,} blocks of {engine.block_size} tokens, max_num_seqs {engine.max_num_seqs}, max_num_batched_tokens "
            f"{engine.max_num_batched_tokens}, max_model_len {engine.max_model_len}; a policy may set its own token budget",
        ),
        ("Calibration", f"{source.name}: {source.gpu}; {source.source}. Fit: {source.fit_error}"),
        (
            "Workload",
            f"{validation.scenario.name}{scaled}{cut}: {validation.num_requests} requests a run, mean lengths {statistics.mean_prompt:.0f} "
            f"+ {statistics.mean_output:.0f}, {len(validation.seeds)} seed(s); fluid stability boundary {validation.boundary:.4g} "
            "requests/s",
        ),
    ]
    if out_of_range:
        share = 100 * out_of_range / iterations
        lines.append(("Extrapolated", f"{share:.2g} % of the simulator's iterations lie outside the calibration ({source.valid_range})"))
    if options.clock != "virtual":
        counted = f"{validation.warm_ups} not counted, {validation.repeats} counted for each policy and rate"
        lines.append(("Engine runs", f"{counted} ({options.clock} clock)"))
    if not source.gpu.startswith(machine["device"]):
        lines.append(("Attention", "the calibration was measured on another device than this engine runs on"))
    return lines


def open_rows(options: argparse.Namespace, name: str, kind: Any, description: dict[str, Any]) -> RowFile[Any]:
    """The file of finished rows; refuses to overwrite what was not meant to be.

    Raises:
        ConfigError: rows are there and neither --resume nor --overwrite is given, or they were made with other settings.
    """
    path, settings = options.out / name, options.out / SETTINGS_FILE
    there = [options.out / file for file in (RUNS_FILE, SCHEDULES_FILE) if (options.out / file).exists()]
    if there and not (options.resume or options.overwrite):
        raise ConfigError(f"--out: {options.out} holds a validation already; use --resume, --overwrite or another folder")
    if there and options.resume:
        try:
            kept = json.loads(settings.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"--resume: {settings} cannot be read ({error}), use --overwrite") from error
        for key, value in description.items():
            if kept.get(key) != value:
                raise ConfigError(f"--resume: {key} is {value!r}, but the rows in {options.out} were made with {kept.get(key)!r}")
    rows: RowFile[Any] = RowFile(path, kind, resume=options.resume)
    if options.overwrite:
        for file in (RUNS_FILE, SCHEDULES_FILE, MACHINE_FILE, TABLE_FILE, REPORT_FILE):
            (options.out / file).unlink(missing_ok=True)
    write_json(settings, description)
    return rows


def write_json(path: Path, record: dict[str, Any]) -> None:
    with replacing(path) as file:
        json.dump(record, file, indent=2)
        file.write("\n")


def keep_machine(folder: Path, backend: Any) -> None:
    """Write down which machine the runs in the folder are from.

    Raises:
        ConfigError: the folder's earlier runs are from another one.
    """
    path = folder / MACHINE_FILE
    machine = dataclasses.asdict(backend.machine())
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        for name in ("device", "vllm", "dtype"):
            if kept[name] != machine[name]:
                raise ConfigError(f"--resume: {name} is {machine[name]!r}, but runs in {folder} were made with {kept[name]!r}")
    write_json(path, machine)


def progress(quiet: bool, total: int) -> tuple[Any, Any]:
    """A progress bar of rich and its task."""
    rich = require("rich.progress", "cli")
    console = require("rich.console", "cli").Console(stderr=True)
    bar = rich.Progress(
        rich.TextColumn("{task.description:<44}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TimeElapsedColumn(),
        console=console,
        disable=quiet,
    )
    return bar, bar.add_task("", total=total)


def run_measured(options: argparse.Namespace, validation: Validation, rows: RowFile[Run], backend: Backend) -> None:
    """Every run that has no row yet."""
    tasks = validation.tasks()
    done = {row.task for row in rows.rows}
    warm: set[tuple[str, float, int]] = set()
    bar, line = progress(options.quiet, len(tasks))
    with rows, bar:
        for task in tasks:
            bar.update(line, description=f"{task.backend}: {task.policy} at {task.rate:.4g}" + (", warm-up" if task.warm_up else ""))
            place = (task.policy, task.rate, task.seed)
            if task not in done:
                if task.backend == ENGINE and not task.warm_up and validation.warm_ups and place not in warm:
                    run_task(validation, task, backend)  # resumed: its warm-up ran in another process
                rows.append(run_task(validation, task, backend))
                if task.backend == ENGINE:
                    if not warm:
                        keep_machine(options.out, backend)
                    warm.add(place)
            bar.update(line, advance=1)


def run_virtual(options: argparse.Namespace, validation: Validation, rows: RowFile[Schedules], backend: Backend) -> None:
    """Compare every episode that has no row yet."""
    done = {(row.policy, row.rate, row.seed, row.backend) for row in rows.rows}
    places = [(p, r, s) for r in validation.rates for p in validation.policies for s in validation.seeds]
    bar, line = progress(options.quiet, 2 * len(places))
    scheduler = make_backend(SCHEDULER)
    try:
        with rows, bar:
            for policy, rate, seed in places:
                for name, other in ((SCHEDULER, scheduler), (ENGINE, backend)):
                    bar.update(line, description=f"{name}: {policy} at {rate:.4g}")
                    if (policy, rate, seed, name) not in done:
                        rows.append(compare_schedules(validation, policy, rate, seed, name, other))
                        if name == ENGINE:
                            keep_machine(options.out, backend)
                    bar.update(line, advance=1)
    finally:
        scheduler.close()


def carry_out(options: argparse.Namespace) -> int:
    """Run what is missing and report; the exit code."""
    try:
        calibration = load_calibration(options.calibration)
    except ConfigError as error:
        raise ConfigError(f"--calibration: {error}") from error
    words = [word for word in options.set if word.startswith("policy.")]
    engine = engine_options(options.model, [word for word in options.set if word not in words], calibration)
    require("scipy.stats", "cli")
    validation = plan(options, engine, calibration, words)
    description = describe(options, engine, calibration, validation)
    backend = make_backend("vllm", clock=options.clock, **backend_settings(engine))
    title = f"Simulator against vLLM: {options.model}, {validation.scenario.name}"
    virtual = options.clock == "virtual"
    try:
        if virtual:
            checks = open_rows(options, SCHEDULES_FILE, Schedules, description)
            run_virtual(options, validation, checks, backend)
            chosen = [row for row in checks.rows if row.policy in validation.policies and row.rate in validation.rates]
            page = virtual_page(title, facts(options, validation, calibration), chosen)
            lines = [f"{sum(c.identical for c in chosen)} of {len(chosen)} schedules identical to the simulator's"]
            lines += [f"{c.backend}, {c.policy} at {c.rate:.4g} req/s, seed {c.seed}: {c.difference}" for c in chosen if not c.identical]
            code = 0 if all(c.identical for c in chosen) else 1
        else:
            runs = open_rows(options, RUNS_FILE, Run, description)
            run_measured(options, validation, runs, backend)
            found = gaps([run for run in runs.rows if run.rate in validation.rates], validation.policies)
            ranks = rankings(found)
            write_table(options.out / TABLE_FILE, found)
            page = measured_page(title, facts(options, validation, calibration, runs.rows), found, ranks)
            lines, code = summary_lines(found, ranks), 0
    finally:
        backend.close()
    with replacing(options.out / REPORT_FILE) as file:
        file.write(page)
    for text in (*lines, f"Report: {options.out / REPORT_FILE}"):
        print(text)
    return code


def main(words: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if words is None else words)
    options = arguments().parse_args(given)
    options.command = shlex.join(["python", "scripts/validate.py", *given])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CalibrationRangeWarning)  # said in the report
            return carry_out(options)
    except (ConfigError, MissingExtraError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; finished runs are kept, go on with --resume", file=sys.stderr)
        return INTERRUPTED
    except (EngineError, OSError) as error:
        print(f"error: {error}; finished runs are kept, go on with --resume", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
