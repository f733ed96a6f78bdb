"""``llmsched advise``: which flags of vLLM and which policy to run for a workload, searched on the simulator."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from llmsched_agents.lookup import NamedPolicy, named_policies
from llmsched_baselines.overrides import parse_overrides, with_calibration
from llmsched_env import __version__
from llmsched_env.bench.advice import DEFAULT, Case, Choice, Objective, Row, parse_limits, parse_objective
from llmsched_env.bench.advice_check import RUNS_FILE, Check, Seen, check_engine, check_lines, check_summary, run_check, seen
from llmsched_env.bench.advice_check import Run as EngineRun
from llmsched_env.bench.advice_result import Advice, advice_of, default_line, page, plot, short_rows, verdict_lines
from llmsched_env.bench.advice_search import LIMITS, Study, check_budget
from llmsched_env.bench.advice_serve import POLICY_FILE, Start, check_server, check_vllm, longest_stay, start_of
from llmsched_env.bench.comparison import extrapolation_reported
from llmsched_env.cli.frame import DONE, FAILED, Assignments, Command, Outcome, Resumable, Screen, check_counts, words
from llmsched_env.cli.trace_options import TraceOptions
from llmsched_env.engine_changes import engine_with
from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import ConfigError, MissingExtraError, require
from llmsched_env.files import check_folder, check_same_settings, goes_on, read_settings, write_settings
from llmsched_env.markdown import write_page
from llmsched_env.row_file import RowFile
from llmsched_env.workload import Scenario, load_scenario
from llmsched_hardware.serve_defaults import serve_limits, served
from llmsched_hardware.validation_runs import MACHINE_FILE, read_machine
from llmsched_hardware.versions import SUPPORTED_VERSIONS, installed

ROWS_FILE, SETTINGS_FILE, REPORT_FILE, FIGURE = "rows.csv", "settings.json", "report.md", "advice.png"
CHECK_SETTINGS = "engine.json"
LONGEST_LINE = 300
"""Characters of a warning on the screen."""
POLICIES = ("vllm", "prefill-threshold", "prefill-cadence", "sarathi", "nested-wait", "generalist")
BUDGET, SELECTION, EVALUATION, FINALISTS = 2_000, 4, 16, 5

WORKLOAD = tyro.conf.create_mutex_group(required=True, title="workload")


@dataclass(frozen=True, kw_only=True)
class Advise(TraceOptions, Resumable):
    """Search which flags of vLLM and which policy to run for a workload, on the simulator of one's own engine.

    The default that a gain is counted from is what `vllm serve` would run on the calibrated device. Settings are chosen on some of the
    requests and judged on others. Writes rows.csv (a row a simulation, as each finishes), report.md with a plot, and policy.json where a
    policy of this project is advised.

    Exit code: 0; 1 where no request of any setting meets the limits; 2 where it was refused.
    """

    calibration: Annotated[str, tyro.conf.arg(metavar="FILE_OR_NAME")]
    """What llmsched calibrate wrote for the engine, or a calibration that ships; NAME:clip holds tables at their edge values."""
    scenario: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(this or --trace)"), WORKLOAD] = None
    """A scenario that ships, is registered or offered by a package, or a .toml file."""
    trace: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(this or --scenario)"), WORKLOAD] = None
    """A trace instead of a scenario, cut into windows; --rate rescales its time."""
    objective: Annotated[str, tyro.conf.arg(metavar="latency|p99|ttft|tpot|slo:ttft=S,tpot=S")] = "latency"
    """What to make small: mean latency, P99 latency, mean TTFT, mean TPOT; or the share of requests within both limits, to make large."""
    at_most: Annotated[tuple[str, ...], tyro.conf.arg(metavar="METRIC=FACTOR [...]", help_behavior_hint="(default: no limit)")] = ()
    """Advise no setting under which a metric is more than so many times the default's: latency, p99, ttft, ttft-p99, tpot."""
    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
    """Where rows, report and plot go."""
    rate: Annotated[float | None, tyro.conf.arg(metavar="R", help_behavior_hint="(default: the workload's own)")] = None
    """Arrival rate, requests/s."""
    policies: Annotated[
        tuple[str, ...],
        tyro.conf.arg(metavar="POLICY [POLICY ...]", aliases=["--policy"], help_behavior_hint=f"(default: {' '.join(POLICIES)})"),
    ] = ()
    """Names of policies or shipped agents, folders of checkpoints, or module:attribute; vllm is always among them."""
    assume_max_tokens: bool = False
    """max_tokens of every request is its output length: policies that know lengths may be advised, and wait is among them."""
    budget: Annotated[int, tyro.conf.arg(metavar="N")] = BUDGET
    """Simulations in all."""
    selection: Annotated[int, tyro.conf.arg(metavar="N")] = SELECTION
    """Seeds, or windows of the trace, that settings are chosen on."""
    evaluation: Annotated[int, tyro.conf.arg(metavar="N")] = EVALUATION
    """Others that they are judged on."""
    finalists: Annotated[int, tyro.conf.arg(metavar="N")] = FINALISTS
    """Settings that are judged, beside the default."""
    num_requests: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: the scenario's; all of a trace)")] = None
    """Requests of one simulation."""
    jobs: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: all cores)")] = None
    """Threads."""
    set: Assignments = ()
    """engine.FIELD of the server as it is: max_model_len, max_num_batched_tokens, max_num_seqs and so on."""
    vllm: Annotated[str | None, tyro.conf.arg(metavar="VERSION", help_behavior_hint="(default: the one installed, else the newest)")] = None
    """The server's version: flags that it does not have are not searched."""
    validate: Annotated[str | None, tyro.conf.arg(metavar="MODEL", help_behavior_hint="(default: no)")] = None
    """Afterwards run the default and the best setting in turns on a vLLM engine here: a shape such as tiny, a Hugging Face id, a folder."""
    repeats: Annotated[int, tyro.conf.arg(metavar="N")] = 3
    """Runs of each on the engine."""
    validate_parts: Annotated[int, tyro.conf.arg(metavar="N")] = 2
    """Parts of the evaluation that the engine is given."""
    validate_requests: Annotated[int, tyro.conf.arg(metavar="N")] = 200
    """The first so many requests of each."""
    model: Annotated[str, tyro.conf.arg(metavar="MODEL")] = "MODEL"
    """The model's name on the command line."""


@dataclass(frozen=True)
class Planned:
    """A search, fully checked.

    Attributes:
        given: fields of the engine that were named.
        about: (name, text) for the report.
    """

    case: Case
    given: tuple[str, ...]
    about: list[tuple[str, str]]


@dataclass(frozen=True)
class Found:
    """What was found, for ``--json``; ``advised`` says how to start the server, ``config`` what policy.json holds, ``engine`` what was
    measured."""

    advice: Advice
    advised: Choice
    flags: tuple[str, ...]
    policy: str
    config: dict[str, Any] | None
    command: str
    engine: list[Seen]


def server_version(given: str | None) -> str:
    """The server's vLLM.

    Raises:
        ConfigError: a version that is not supported.
    """
    if given is not None:
        return check_vllm(given)
    with contextlib.suppress(MissingExtraError):
        if installed()[1] in SUPPORTED_VERSIONS:
            return installed()[1]
    return SUPPORTED_VERSIONS[-1]


def default_engine(base: EngineConfig, changes: dict[str, Any], device: str) -> EngineConfig:
    """What ``vllm serve`` would run: the calibrated engine, vLLM's limits on that device, then what was given.

    Raises:
        ConfigError: a refused value, or an engine that is not vLLM's.
    """
    engine = engine_with(base, {name: value for name, value in changes.items() if name not in LIMITS})
    if engine.preset != "vllm":
        raise ConfigError(f"engine.preset: {engine.preset!r}, must be 'vllm': settings of a vLLM server are searched")
    return engine_with(served(engine, device), {name: value for name, value in changes.items() if name in LIMITS})


def candidates(options: Advise, objective: Objective, case: Case, version: str) -> tuple[dict[str, NamedPolicy], list[str]]:
    """The policies to search, and what was left out of the default ones.

    Raises:
        ConfigError: a policy that was named and that no server could run.
    """
    own = [*POLICIES, *(["slo"] if objective.metric == "slo_goodput" else []), *(["wait"] if options.assume_max_tokens else [])]
    named = named_policies("--policies", tuple(dict.fromkeys([DEFAULT.policy, *(options.policies or own)])))
    kept: dict[str, NamedPolicy] = {}
    left_out = []
    for name, policy in named.items():
        trial = dataclasses.replace(case, policies={name: policy})
        try:
            made = trial.build(Choice(name))
            check_server(made, version)
            if made.known_lengths and not options.assume_max_tokens:
                raise ConfigError(
                    f"policy {name!r} must know output lengths, which a server does not; where max_tokens of every request is its length, "
                    "give --assume-max-tokens"
                )
        except ConfigError as error:
            if options.policies or name == DEFAULT.policy:
                raise ConfigError(f"--policies: {error}") from error
            left_out.append(str(error))
            continue
        kept[name] = policy
    return kept, left_out


def check_numbers(options: Advise) -> None:
    """Raises ConfigError, naming the option."""
    check_counts(
        budget=options.budget,
        selection=options.selection,
        finalists=options.finalists,
        num_requests=options.num_requests,
        jobs=options.jobs,
        repeats=options.repeats,
        validate_parts=options.validate_parts,
        validate_requests=options.validate_requests,
    )
    if options.evaluation < 2:
        raise ConfigError(f"--evaluation: {options.evaluation}, must be >= 2: one part gives no interval")
    if options.rate is not None and not (math.isfinite(options.rate) and options.rate > 0):
        raise ConfigError(f"--rate: {options.rate:g}, must be finite and > 0 requests/s")
    if not options.model.strip():
        raise ConfigError("--model: empty")


def read_workload(options: Advise) -> Scenario:
    """The scenario or trace."""
    return options.read(options.trace, options.rate) if options.trace is not None else load_scenario(options.scenario or "")


def requests_of(options: Advise, workload: Scenario) -> int:
    """Requests of one part: of a trace as many as all parts can have.

    Raises:
        ConfigError: more than the trace has.
    """
    if workload.rows is None:
        return options.num_requests or workload.num_requests
    parts = options.selection + options.evaluation
    most = len(workload.rows) // parts
    if (options.num_requests or 0) > most:
        raise ConfigError(f"--num-requests: {options.num_requests}, must be <= {most}: {len(workload.rows):,} requests in {parts} windows")
    return options.num_requests or most


def plan(options: Advise) -> Planned:
    """The search that the options ask for, fully checked; nothing is written.

    Raises:
        ConfigError: an option that cannot be carried out.
    """
    objective = parse_objective(options.objective)
    parse_limits(options.at_most)
    check_numbers(options)
    version = server_version(options.vllm)
    check_folder("--out", options.out)
    given = words(options.set)
    for word in given:
        if word.startswith("policy."):
            raise ConfigError(f"--set {word}: options of policies are searched; only engine.FIELD can be set")
    overrides = with_calibration(parse_overrides(given, {}, exclude_engine=("preset", "time_model", "d0", "d1")), options.calibration)
    workload = read_workload(options)
    device = engine_with(workload.engine, {"time_model": overrides.engine["time_model"]}).time_model.provenance.gpu
    engine = default_engine(workload.engine, dict(overrides.engine), device)
    named = tuple(word.partition("=")[0].removeprefix("engine.") for word in given)
    case = Case(
        scenario=dataclasses.replace(workload, engine=engine),
        policies={},
        rate=options.rate or workload.rate,
        num_requests=requests_of(options, workload),
        selection=options.selection,
        evaluation=options.evaluation,
        objective=objective,
    )
    case.check_requests()
    policies, left_out = candidates(options, objective, case, version)
    case = dataclasses.replace(case, policies=policies)
    case.check()
    limits = "as given" if set(LIMITS) <= set(named) else serve_limits(device).why
    about = [
        ("workload", f"{workload.name}, {case.rate:.4g} requests/s; {workload.description}"),
        ("engine", f"{engine.num_blocks:,} blocks of {engine.block_size} tokens, max_model_len {engine.max_model_len:,}"),
        ("calibration", f"{engine.time_model.provenance.name or options.calibration}: {device or 'device not stated'}"),
        ("default", f"max_num_batched_tokens {engine.max_num_batched_tokens:,}, max_num_seqs {engine.max_num_seqs:,} ({limits})"),
        ("server", f"vLLM {version}"),
        ("scheduling", "asynchronous" if engine.async_scheduling else "synchronous (--set engine.async_scheduling=true for the other)"),
        ("policies", ", ".join(policies)),
        *(("not searched", text) for text in left_out),
    ]
    return Planned(case, named, about)


def kept_rows(options: Advise, case: Case) -> RowFile[Row]:
    """The file of finished simulations; refuses to overwrite what was not meant to be."""
    path, settings = options.out / ROWS_FILE, options.out / SETTINGS_FILE
    resume = goes_on(options.out, path.exists(), resume=options.resume, overwrite=options.overwrite, what="a search")
    description = {"version": __version__, **case.describe()}
    if resume:
        kept = read_settings(settings).get("policies", {})
        mine = description.pop("policies")
        for name, state in mine.items():  # more may be added; one of the same name must be the same
            if kept.get(name, state) != state:
                raise ConfigError(f"--resume: policy {name!r} is {state}, but the rows in {options.out} were made with {kept[name]}")
        check_same_settings(settings, description)
        description["policies"] = kept | mine
    options.out.mkdir(parents=True, exist_ok=True)
    rows = RowFile(path, Row, resume=resume)
    for name in (REPORT_FILE, FIGURE, POLICY_FILE):
        (options.out / name).unlink(missing_ok=True)
    write_settings(settings, description)
    return rows


def searched(study: Study, jobs: int, screen: Screen) -> Advice:
    """Search, then judge the best on parts that the search has not seen; Ctrl-C leaves the finished rows."""
    with study.rows, screen.progress(study.budget) as bar, extrapolation_reported():
        study.advance = lambda text: bar.advance(description=text[:44])
        study.search(jobs)
        figures = study.evaluate([*study.chosen(), DEFAULT], jobs)
    return advice_of(study, figures)


def starting(planned: Planned, study: Study, found: Advice) -> Start:
    """How to start the server with what is advised."""
    choice = found.advised.choice
    seen = study.tried[choice].figures
    return start_of(planned.case, choice, planned.given, longest_stay(seen))


def print_found(found: Advice, study: Study, command: str, screen: Screen) -> None:
    """The advice on the screen."""
    for line in verdict_lines(found, study):
        screen.print(line)
    if not screen.quiet:
        headings, rows = short_rows(found)
        grid = require("rich.table", "cli").Table(box=require("rich.box", "cli").SIMPLE_HEAD, padding=(0, 1))
        for i, heading in enumerate(headings):
            grid.add_column(heading, justify="left" if i == 0 else "right", overflow="fold")
        for row in rows:
            grid.add_row(*map(require("rich.text", "cli").Text, row))
        screen.console().print(grid)
        for i, one in enumerate(found.entries):
            screen.print(f"{i + 1}  {one.label}")
        screen.print(default_line(found))
    for text in found.warnings:
        screen.print(text if len(text) <= LONGEST_LINE else f"{text[:LONGEST_LINE]} ... (all of it in {REPORT_FILE})")
    screen.print(f"start with: {command}")


def checked(options: Advise, study: Study, found: Advice, screen: Screen) -> tuple[list[str], list[Seen]]:
    """The default and the best setting of the search on a real engine: the report's section, and the figures."""
    first = found.entries[0].choice
    if first == DEFAULT:
        screen.note("note: --validate: there is no other setting to run on the engine")
        return [], []
    case = study.case
    count = min(options.validate_requests, case.num_requests)
    seeds = case.evaluation_seeds[: options.validate_parts]
    check = Check(case, options.validate or "", first, seeds, options.repeats, count)
    check_engine(check)
    settings = options.out / CHECK_SETTINGS
    describe = {"model": check.model, "setting": first.text, "parts": list(seeds), "num_requests": count, "case": case.describe()}
    path = options.out / RUNS_FILE
    resume = path.exists() and options.resume
    if resume:
        check_same_settings(settings, describe)
    else:
        (options.out / MACHINE_FILE).unlink(missing_ok=True)
    rows = RowFile(path, EngineRun, resume=resume)
    write_settings(settings, describe)
    with rows, screen.progress(check.total) as bar, extrapolation_reported():
        run_check(check, rows, options.out, bar)
    figures = seen(check, rows.rows)
    screen.print(check_summary(check, figures))
    return check_lines(check, figures, found, read_machine(options.out)), figures


def run(options: Advise, screen: Screen) -> Outcome:
    """Search, judge, report; then, where it is asked for, look on an engine."""
    for module in ("matplotlib", "scipy.stats", "rich.progress"):
        require(module, "cli")
    planned = plan(options)
    check_budget(planned.case, options.budget, options.finalists)
    if options.validate is not None:
        check_engine(Check(planned.case, options.validate, DEFAULT, (), options.repeats, 1))
        installed()  # or why not
    study = Study(planned.case, options.budget, options.finalists, kept_rows(options, planned.case), at_most=parse_limits(options.at_most))
    found = searched(study, options.jobs or os.cpu_count() or 1, screen)
    start = starting(planned, study, found)
    start.write(options.out / POLICY_FILE)
    command = start.command(options.model, options.out / POLICY_FILE)
    plot(found, options.out / FIGURE)
    kept = [("at most", " ".join(options.at_most) + " times the default's")] if options.at_most else []
    about = [*planned.about, *kept, ("budget", f"{options.budget} simulations, {study.settings} settings at most")]

    def report(section: list[str]) -> None:
        write_page(options.out / REPORT_FILE, page(found, study, about, command, screen.command, section))

    report([])
    print_found(found, study, command, screen)
    engine: list[Seen] = []
    if options.validate is not None:
        section, engine = checked(options, study, found, screen)
        report(section)
    screen.print(f"Report: {options.out / REPORT_FILE}")
    out = Found(found, found.advised.choice, start.flags, start.policy, start.config, command, engine)
    return Outcome(out, DONE if found.possible else FAILED)


COMMAND = Command("advise", Advise, run, "which flags of vLLM and which policy to run, searched by simulation")
main = COMMAND.main
