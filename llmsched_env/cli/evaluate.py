"""Evaluate baselines and agents on the suite bench-v1 and write the page of results.

    python scripts/evaluate.py --suite bench-v1 --tuned scripts/suites/tuned.json --agents agents/checkpoints/NAME --out docs/results.md

Rows go to ``--rows`` as they finish, and those already there are not run again: stop and start it as you like. The page
and its plots are written whole from the rows. ``--quick`` does everything with few seeds and short runs.
"""

from __future__ import annotations

import argparse
import csv
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmsched_env.bench.ablation_table import SHIPPED, Ablation, digest_of
from llmsched_env.bench.evaluation import METRICS, Row, default_policies, missing_tasks, run_cell, variants_of
from llmsched_env.bench.results import Results
from llmsched_env.bench.suite import SUITE, Cell
from llmsched_env.bench.variants import GREEDY, Variant, agent_names
from llmsched_env.cli.parser import Parser
from llmsched_env.cli.tune import TunedFile, add_selection, check_counts, prepare
from llmsched_env.errors import ConfigError, MissingExtraError, require
from llmsched_env.files import check_file, replacing
from llmsched_env.parallel import unordered
from llmsched_env.row_file import RowFile
from llmsched_env.types import FloatArray

SEEDS = 20
QUICK_SEEDS, QUICK_REQUESTS = 3, 400


def arguments() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default=SUITE, help=f"only {SUITE}")
    known = default_policies()
    own = f"of {', '.join(known)} (default: all); greedy FIFO always runs beside them"
    parser.add_argument("--policies", nargs="+", default=known, metavar="NAME", help=own)
    parser.add_argument("--agents", nargs="+", type=Path, default=[], metavar="FOLDER", help="checkpoints; the first is the generalist")
    parser.add_argument("--slo-agents", nargs="+", type=Path, default=[], metavar="FOLDER", help="checkpoints for SLO goodput")
    parser.add_argument("--ablation", type=Path, metavar="FILE.json", help="what scripts/ablation.py wrote (default: the shipped one)")
    parser.add_argument("--tuned", type=Path, metavar="FILE.json", help="what scripts/tune.py wrote")
    add_selection(parser)
    parser.add_argument("--seeds", type=int, metavar="N", help=f"paired evaluation seeds in a cell (default {SEEDS})")
    parser.add_argument("--first-seed", type=int, default=0, metavar="N", help="the first of them; a new start draws other requests")
    parser.add_argument("--rows", type=Path, default=Path("results/bench-v1/rows.csv"), metavar="FILE.csv", help="finished runs, kept")
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"), metavar="FILE.md", help="the page; plots go beside it")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_SEEDS} seeds of {QUICK_REQUESTS} requests")
    parser.add_argument("--report-only", action="store_true", help="run nothing, write the page from the rows there are")
    parser.add_argument("--overwrite", action="store_true", help="discard the rows in --rows")
    return parser


def plan(options: argparse.Namespace, chosen: Sequence[Cell], bench: Any) -> dict[Cell, list[Variant]]:
    """What runs where.

    Raises:
        ConfigError: a policy the suite does not have, a folder that is no checkpoint, a file that holds no parameters.
    """
    for name in options.policies:
        if name not in default_policies():
            raise ConfigError(f"--policies: {name!r} is not in {SUITE} (known: {', '.join(default_policies())})")
    if options.tuned is not None and not options.tuned.exists():
        raise ConfigError(f"--tuned: {options.tuned} does not exist")
    tuned = TunedFile.read(options.tuned).entries if options.tuned is not None else {}
    agents = {name: str(folder) for name, folder in agent_names([*options.agents, *options.slo_agents]).items()}
    # Greedy FIFO runs in any case: scores and plots are relative to it.
    policies = list(dict.fromkeys([*options.policies, *GREEDY]))
    return {cell: variants_of(cell, policies, tuned, agents, bench) for cell in chosen}


def records_of(folders: Mapping[str, Path]) -> dict[str, Mapping[str, Any]]:
    """How each agent was trained. Raises ``ConfigError`` where a checkpoint cannot be loaded."""
    if not folders:
        return {}
    from llmsched_agents.checkpoint import load_checkpoint, read_record

    for folder in folders.values():
        load_checkpoint(folder)  # refused now rather than in the middle
    return {name: read_record(folder) for name, folder in folders.items()}


def write_table(path: Path, results: Results) -> None:
    """Every cell, variant and metric with mean and interval."""
    from llmsched_agents.statistics import mean_of

    with replacing(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["cell", "variant", "options", "seeds", *(f"{m}{end}" for m in METRICS for end in ("", "_low", "_high"))])
        for cell in results.cells:
            for variant in results.plan[cell]:
                figures: list[str] = []
                values: FloatArray
                for metric in METRICS:
                    values = results.values(cell, variant.label, metric)
                    estimate = mean_of(values) if values.size else None
                    figures += [f"{x:.6g}" for x in (estimate.value, estimate.low, estimate.high)] if estimate else [""] * 3
                writer.writerow([cell.key, variant.label, variant.options_text, len(results.seeds(cell)), *figures])


def main(words: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if words is None else words)
    options = arguments().parse_args(given)
    if options.quick:
        options.num_requests = options.num_requests or QUICK_REQUESTS
    try:
        for module in ("joblib", "matplotlib", "scipy", "rich"):
            require(module, "cli")
        from llmsched_env.pages.results.page import Page

        if options.suite != SUITE:
            raise ConfigError(f"--suite: {options.suite!r}, must be {SUITE!r}")
        seeds = options.seeds if options.seeds is not None else QUICK_SEEDS if options.quick else SEEDS
        check_counts(seeds=seeds, jobs=options.jobs)
        if options.first_seed < 0:
            raise ConfigError(f"--first-seed: {options.first_seed}, must be >= 0")
        numbers = range(options.first_seed, options.first_seed + seeds)
        for name, path in (("--out", options.out), ("--rows", options.rows)):
            check_file(name, path)
        chosen, bench = prepare(options)
        variants = plan(options, chosen, bench)
        folders = agent_names([*options.agents, *options.slo_agents])
        records = records_of(folders)
        shown = options.ablation or (SHIPPED if SHIPPED.exists() else None)
        ablation = Ablation.read(shown) if shown is not None else None
        store = RowFile(options.rows, Row, resume=not options.overwrite)
    except (ConfigError, MissingExtraError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not options.report_only:
        tasks = missing_tasks(bench, variants, numbers, store.rows)
        try:
            with store:
                _run(tasks, store, options.jobs)
        except KeyboardInterrupt:
            print("Stopped; the same command goes on from here.", file=sys.stderr)
            return 130
    results = Results(variants, (row for row in store.rows if row.seed in numbers))
    if not results.cells:
        print("error: --rows: no row of this evaluation", file=sys.stderr)
        return 2
    page = Page(
        results=results,
        bench=bench,
        tuned=TunedFile.read(options.tuned).entries if options.tuned is not None else {},
        agents=list(agent_names(options.agents)),
        slo_agents=list(agent_names(options.slo_agents)),
        records=records,
        ablation=ablation.lines(ablation.digest in map(digest_of, folders.values())) if ablation is not None else [],
        command=shlex.join(["python", "scripts/evaluate.py", *given]),
        figures=options.out.parent / options.out.stem,
    )
    lines = page.lines()
    write_table(options.out.with_suffix(".csv"), results)
    with replacing(options.out) as file:
        file.write("\n".join(lines).rstrip("\n") + "\n")
    print(f"Page: {options.out}")
    return 0


def _run(tasks: Sequence[tuple[Any, ...]], store: RowFile[Row], jobs: int) -> None:
    progress = require("rich.progress", "cli")
    console = require("rich.console", "cli").Console(stderr=True)
    results = unordered("loky", jobs, run_cell, tasks)
    try:
        with progress.Progress(console=console) as bar:
            line = bar.add_task("runs", total=sum(len(task[-1]) for task in tasks))
            for rows in results:
                for row in rows:
                    store.append(row)
                bar.update(line, advance=len(rows), description=rows[0].cell)
    finally:
        results.close()


if __name__ == "__main__":
    sys.exit(main())
