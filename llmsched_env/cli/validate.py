"""``llmsched validate``: the simulator against a vLLM engine on the same requests."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from llmsched_agents.lookup import named_policies, option_owners
from llmsched_baselines.overrides import parse_overrides
from llmsched_env import checks
from llmsched_env.backends import make_backend
from llmsched_env.cli.frame import DONE, FAILED, Assignments, Command, Outcome, Resumable, Screen, check_counts, words
from llmsched_env.errors import ConfigError, EngineError, require
from llmsched_env.files import check_file, check_folder, check_same_settings, goes_on, write_settings
from llmsched_env.fluid import stability_boundary
from llmsched_env.markdown import write_page
from llmsched_env.perf import CalibrationRangeWarning, load_calibration
from llmsched_env.row_file import RowFile
from llmsched_env.workload import Scenario, load_scenario
from llmsched_hardware.calibration.from_log import LogFit
from llmsched_hardware.calibration.iteration_log import read_iteration_log
from llmsched_hardware.calibration.settings import backend_settings, engine_config, engine_options
from llmsched_hardware.validation import Gap, Run, Schedules, Validation, gaps, longest_request, on_engine, rankings
from llmsched_hardware.validation_iterations import IterationGap, Share, fit_to_warm_ups, gaps_with, iteration_gaps, shares
from llmsched_hardware.validation_report import facts, iteration_parts, measured_page, summary_lines, virtual_page, write_table
from llmsched_hardware.validation_runs import (
    FILES,
    LOG_FILE,
    MACHINE_FILE,
    REPORT_FILE,
    RUNS_FILE,
    SCHEDULES_FILE,
    SETTINGS_FILE,
    TABLE_FILE,
    Clock,
    Plan,
    read_machine,
    run_measured,
    run_virtual,
)

POLICIES = ("vllm", "sarathi", "wait", "nested-wait")
LOADS, REQUESTS, REPEATS = (0.5, 0.7, 0.9), 200, 3
QUICK_LOADS, QUICK_REQUESTS, QUICK_REPEATS = (0.5, 0.9), 24, 2

RATES = tyro.conf.create_mutex_group(required=False, title="arrival rates")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Validate(Resumable):
    """Compare the simulator with a vLLM engine on the same requests, policy by policy and rate by rate.

    Under the measured clock it writes runs.csv (a row a run, as each finishes), sim_to_real.csv and report.md: errors beside the
    engine's own spread, and whether policies rank alike. Under --clock virtual the engine computes while time comes from the
    calibration: schedules must then be equal step by step on the simulator, vLLM's scheduler and the engine, and the exit code is 1
    if not.
    """

    calibration: Annotated[str, tyro.conf.arg(metavar="FILE_OR_NAME")]
    """What llmsched calibrate engine wrote for this engine."""
    model: Annotated[str, tyro.conf.arg(metavar="MODEL")]
    """tiny or the name of another shape (no download), a Hugging Face id, or a folder."""
    set: Assignments = ()
    """engine.FIELD of llmsched_hardware.real_engine.EngineOptions, or policy.NAME.OPTION."""
    scenario: Annotated[str, tyro.conf.arg(metavar="NAME")]
    """A scenario that ships, is registered or offered by a package, or a .toml file."""
    policies: Annotated[tuple[str, ...], tyro.conf.arg(metavar="POLICY [POLICY ...]", aliases=["--policy"])] = POLICIES
    """Names of policies or shipped agents, folders of checkpoints, or module:attribute."""
    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
    """Where rows, table and report go."""
    rates: Annotated[tuple[float, ...], tyro.conf.arg(metavar="R [R ...]", help_behavior_hint="(default: from --loads)"), RATES] = ()
    """Requests/s."""
    loads: Annotated[
        tuple[float, ...], tyro.conf.arg(metavar="X [X ...]", help_behavior_hint=f"(default: {' '.join(map(str, LOADS))})"), RATES
    ] = ()
    """Rates as shares of the fluid stability boundary."""
    num_requests: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint=f"(default: {REQUESTS})")] = None
    """Requests of one run."""
    seeds: Annotated[int, tyro.conf.arg(metavar="N")] = 1
    """Seeds: so many, from --first-seed."""
    first_seed: Annotated[int, tyro.conf.arg(metavar="S")] = 0
    """The first seed; others than those that a calibration was fitted to."""
    repeats: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint=f"(default: {REPEATS})")] = None
    """Runs of the same requests on the engine; under the virtual clock, where they are alike, 1 unless it is given."""
    warm_ups: Annotated[int, tyro.conf.arg(metavar="N")] = 1
    """Runs on the engine before them, not counted."""
    alternate: bool = False
    """Build the engine anew in every turn, so that policies with other engine settings meet the same drift of the machine."""
    length_scale: Annotated[float | None, tyro.conf.arg(metavar="F", help_behavior_hint="(default: 1)")] = None
    """Multiply prompt and output lengths."""
    max_total_tokens: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: as they are)")] = None
    """Cut requests (output first) to N tokens."""
    clock: Clock = "measured"
    """Where an iteration's time comes from: the engine's own steps, the calibration, or real time with real sleeping."""
    log_iterations: Annotated[Path | None, tyro.conf.arg(metavar="FILE|FOLDER", help_behavior_hint="(default: OUT/iterations.csv)")] = None
    """Where the engine's iterations of every run go, warm-ups included: a file that is gone on with, or iterations.csv in a folder."""
    budget_seconds: Annotated[float | None, tyro.conf.arg(metavar="S", help_behavior_hint="(default: none)")] = None
    """Begin no run on the engine that would end after so many seconds; the report is of those made. Not under --clock virtual."""
    quick: bool = False
    """A small form: 24 requests, 2 repeats, loads 0.5 and 0.9, lengths scaled to fit."""


def planned(options: Validate) -> Plan:
    """The validation that the options ask for, fully checked; nothing is written.

    Raises:
        ConfigError: an option that cannot be carried out.
    """
    try:
        calibration = load_calibration(options.calibration)
    except ConfigError as error:
        raise ConfigError(f"--calibration: {error}") from error
    given = words(options.set)
    of_policies = [word for word in given if word.startswith("policy.")]
    engine = engine_options(options.model, [word for word in given if word not in of_policies], calibration)
    policies = named_policies("--policies", options.policies)
    if not policies:
        raise ConfigError("--policies: none given, must be at least one")
    check_numbers(options)
    check_folder("--out", options.out)
    overrides = parse_overrides(of_policies, option_owners(policies))
    if engine.num_blocks is None:
        raise ConfigError(f"--calibration: {options.calibration} does not state the number of KV blocks; give --set engine.num_blocks=N")
    config = engine_config(engine, calibration, engine.num_blocks)
    seeds = tuple(range(options.first_seed, options.first_seed + options.seeds))
    num_requests = options.num_requests or (QUICK_REQUESTS if options.quick else REQUESTS)
    scenario = load_scenario(options.scenario)
    scale, cut = options.length_scale or 1.0, options.max_total_tokens
    if options.quick and options.length_scale is None and cut is None:
        scale, cut = min(1.0, config.max_model_len / longest_request(scenario, seeds, num_requests)), config.max_model_len
    scenario = on_engine(scenario, config, scale, cut)
    validation = Validation(
        scenario=scenario,
        policies=policies,
        rates=chosen_rates(options, scenario),
        seeds=seeds,
        num_requests=num_requests,
        repeats=options.repeats or (1 if options.clock == "virtual" else QUICK_REPEATS if options.quick else REPEATS),
        warm_ups=options.warm_ups,
        options=overrides.policy,
        alternate=options.alternate,
    )
    validation.check()
    return Plan(validation, engine, calibration, options.clock, scale, cut)


def check_numbers(options: Validate) -> None:
    """Raises ConfigError, naming the option."""
    check_counts(num_requests=options.num_requests, seeds=options.seeds, repeats=options.repeats, max_total_tokens=options.max_total_tokens)
    for name, value in (("--warm-ups", options.warm_ups), ("--first-seed", options.first_seed)):
        if value < 0:
            raise ConfigError(f"{name}: {value}, must be >= 0")
    if options.budget_seconds is not None:
        checks.number("--budget-seconds", options.budget_seconds, open_low=True, unit="seconds")
    given = [("--rates", rate) for rate in options.rates] + [("--loads", load) for load in options.loads]
    for name, number in (*given, ("--length-scale", 1.0 if options.length_scale is None else options.length_scale)):
        if not (math.isfinite(number) and number > 0):
            raise ConfigError(f"{name}: {number:g}, must be finite and > 0")


def chosen_rates(options: Validate, scenario: Scenario) -> tuple[float, ...]:
    """Requests/s, of a scenario on the calibrated engine."""
    if options.rates:
        return tuple(dict.fromkeys(options.rates))
    boundary = stability_boundary(scenario.statistics, scenario.engine)
    return tuple(float(f"{load * boundary:.4g}") for load in options.loads or (QUICK_LOADS if options.quick else LOADS))


def log_file(options: Validate) -> Path:
    """Where ``--log-iterations`` goes.

    Raises:
        ConfigError: no file can be there.
    """
    given = options.log_iterations
    if given is None:
        return options.out / LOG_FILE
    path = given / LOG_FILE if given.is_dir() else given
    check_file("--log-iterations", path)
    return path


def kept_rows(options: Validate, plan: Plan, name: str, kind: type[R]) -> RowFile[R]:
    """The file of finished rows; refuses to overwrite what was not meant to be."""
    settings = options.out / SETTINGS_FILE
    there = any((options.out / file).exists() for file in (RUNS_FILE, SCHEDULES_FILE))
    resume = goes_on(options.out, there, resume=options.resume, overwrite=options.overwrite, what="a validation")
    if resume:
        check_same_settings(settings, plan.describe())
    rows = RowFile(options.out / name, kind, resume=resume)
    if not resume:
        for file in FILES:
            (options.out / file).unlink(missing_ok=True)
    write_settings(settings, plan.describe())
    return rows


def validate_schedules(options: Validate, plan: Plan, backend: Any, screen: Screen) -> Outcome:
    """Under the virtual clock: are the schedules the same?"""
    validation = plan.validation
    episodes = len(validation.rates) * len(validation.policies) * len(validation.seeds)
    with kept_rows(options, plan, SCHEDULES_FILE, Schedules) as rows, screen.progress((1 + validation.repeats) * episodes) as bar:
        run_virtual(plan, rows, backend, options.out, bar)
    chosen = [row for row in rows.rows if row.policy in validation.policies and row.rate in validation.rates]
    same = sum(check.identical for check in chosen)
    about = facts(plan, read_machine(options.out), screen.command)
    lines = [f"{same} of {len(chosen)} schedules identical to the simulator's"]
    lines += [f"{c.backend}, {c.policy} at {c.rate:.4g} req/s, seed {c.seed}: {c.difference}" for c in chosen if not c.identical]
    present(options, screen, virtual_page(title(plan), about, chosen), lines)
    return Outcome(chosen, DONE if same == len(chosen) else FAILED)


def validate_figures(options: Validate, plan: Plan, backend: Any, screen: Screen, deadline: float) -> Outcome:
    """Under the measured or wall clock: how far are the figures apart?

    Args:
        deadline: ``time.monotonic()`` by which the last run on the engine should end.

    Raises:
        ConfigError: there was no time for one.
    """
    validation = plan.validation
    with kept_rows(options, plan, RUNS_FILE, Run) as rows, screen.progress(len(validation.tasks())) as bar:
        left_out = run_measured(plan, rows, backend, options.out, bar, deadline)
    if not (options.out / MACHINE_FILE).exists():
        raise ConfigError(f"--budget-seconds: {options.budget_seconds:g}, no run on the engine began in that time")
    found = gaps([run for run in rows.rows if run.rate in validation.rates], validation.policies)
    ranks = rankings(found)
    write_table(options.out / TABLE_FILE, found)
    about = facts(plan, read_machine(options.out), screen.command, rows.rows)
    own, where, fit, refitted = iterations_say(options, plan, rows.rows)
    lines = summary_lines(found, ranks)
    if own:
        lines.append(f"{'iterations':<12} {100 * own[-1].error:+.1f} % in total, spread {100 * own[-1].spread:.1f} % over repeats")
    if left_out:
        about.append(("Left out", text := f"{left_out} runs on the engine, for lack of time"))
        lines.append(f"left out: {text}")
    present(options, screen, measured_page(title(plan), about, found, ranks, iteration_parts(own, where, refitted, fit)), lines)
    said = {"gaps": [with_errors(gap) for gap in found], "rankings": ranks, "iterations": own, "where": where, "left_out": left_out}
    return Outcome(said)


def iterations_say(options: Validate, plan: Plan, runs: Sequence[Run]) -> tuple[list[IterationGap], list[Share], LogFit | None, list[Gap]]:
    """The calibration on the engine's own batches and where its error lies; a fit to the warm-up runs and the simulator's gaps with it."""
    path = log_file(options)
    if not path.exists():
        return [], [], None, []
    log = read_iteration_log(path)
    fit = fit_to_warm_ups(log)
    mine = [run for run in runs if run.rate in plan.validation.rates]
    model = plan.calibration
    return iteration_gaps(log, model), shares(log, model), fit, [] if fit is None else gaps_with(plan.validation, fit.model, mine)


def with_errors(gap: Gap) -> dict[str, Any]:
    return asdict(gap) | {"error": gap.error, "spread": gap.spread}


def title(plan: Plan) -> str:
    return f"Simulator against vLLM: {plan.engine.model}, {plan.validation.scenario.name}"


def present(options: Validate, screen: Screen, page: str, lines: Sequence[str]) -> None:
    """The report, and its main lines on the screen."""
    write_page(options.out / REPORT_FILE, page.split("\n"))
    for text in (*lines, f"Report: {options.out / REPORT_FILE}"):
        screen.print(text)


def run(options: Validate, screen: Screen) -> Outcome:
    """Run what is missing and report on all of it."""
    deadline = time.monotonic() + (math.inf if options.budget_seconds is None else options.budget_seconds)
    with warnings.catch_warnings(action="ignore", category=CalibrationRangeWarning):  # said in the report
        plan = planned(options)
        log = log_file(options)
        for module in ("rich.progress", "scipy.stats"):
            require(module, "cli")
        log.parent.mkdir(parents=True, exist_ok=True)
        backend = make_backend("vllm", clock=options.clock, iteration_log=log, **backend_settings(plan.engine))
        try:
            if options.clock == "virtual":
                return validate_schedules(options, plan, backend, screen)
            return validate_figures(options, plan, backend, screen, deadline)
        except EngineError as error:
            raise EngineError(f"{error}; finished runs are kept, go on with --resume") from error
        finally:
            backend.close()


COMMAND = Command("validate", Validate, run, "the simulator against a vLLM engine on the same requests")
main = COMMAND.main
