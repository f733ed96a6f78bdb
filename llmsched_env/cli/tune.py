"""Tune every baseline's parameters in every cell of the suite, on seeds that evaluation never sees.

    python scripts/tune.py --scenarios azure-conv sharegpt --loads 0.9 1.0 --kv 40GB --out tuned.json
    python scripts/tune.py --together --out tuned.json

``--together`` looks for one set of parameters for all selected cells of the non-stationary part. Each policy with parameters
gets the same number of trials. The file holds one entry a search and is written anew after each; run again with the same options,
what it holds is kept and the rest is done.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmsched_baselines import policy_class
from llmsched_env import __version__
from llmsched_env.bench.boundary import Boundaries
from llmsched_env.bench.suite import LOADS, MEMORY, MOVING, PAIRS, SCENARIOS, SUITE, Bench, Cell, cells
from llmsched_env.bench.tuning import GRIDS, TOGETHER, TRIALS, Tuned, grid_of, objective_of, tune, tune_together
from llmsched_env.bench.variants import needed_boundaries, runs_on
from llmsched_env.cli.parser import Parser
from llmsched_env.errors import ConfigError, MissingExtraError, require
from llmsched_env.files import check_file, replacing
from llmsched_env.parallel import unordered

SEEDS = 4


@dataclass(frozen=True, slots=True)
class TunedFile:
    """What a file of tuned parameters holds, by (cell key, policy).

    Parameters of the non-stationary part as a whole have the key ``TOGETHER`` in place of a cell's; files that have none are older.
    """

    entries: dict[tuple[str, str], Tuned]

    @classmethod
    def read(cls, path: Path) -> TunedFile:
        """Nothing where there is no file.

        Raises:
            ConfigError: not a file of tuned parameters, or of another suite.
        """
        if not path.exists():
            return cls({})
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            suite = record["suite"]
            entries = [Tuned(**{**entry, "over": tuple(entry.get("over", ()))}) for entry in record["entries"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}: not a file of tuned parameters ({type(error).__name__}: {error})") from error
        if suite != SUITE:
            raise ConfigError(f"{path}: of suite {suite!r}, must be {SUITE!r}")
        return cls({(entry.cell, entry.policy): entry for entry in entries})

    def write(self, path: Path) -> None:
        record = {
            "suite": SUITE,
            "version": __version__,
            "objectives": {policy: objective_of(policy) for policy in sorted({policy for _, policy in self.entries})},
            "entries": [_plain(self.entries[key]) for key in sorted(self.entries)],
        }
        with replacing(path) as file:
            json.dump(record, file, indent=1)
            file.write("\n")


def _plain(entry: Tuned) -> dict[str, Any]:
    """``over`` only where it says something."""
    return {name: value for name, value in dataclasses.asdict(entry).items() if name != "over" or value}


def arguments() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_selection(parser)
    parser.add_argument("--policies", nargs="+", default=list(GRIDS), metavar="NAME", help=f"of {', '.join(GRIDS)} (default: all)")
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="N", help=f"tuning seeds 0 .. N-1 (default {SEEDS})")
    parser.add_argument("--trials", type=int, default=TRIALS, metavar="N", help=f"for each policy and cell (default {TRIALS})")
    parser.add_argument("--together", action="store_true", help="one set of parameters for the selected cells of the non-stationary part")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    return parser


def add_selection(parser: argparse.ArgumentParser) -> None:
    """The options that choose cells and processes, the same for tuning and evaluation."""
    parser.add_argument("--scenarios", nargs="+", default=list(SCENARIOS), metavar="NAME", help=f"of {', '.join(SCENARIOS)} (default: all)")
    parser.add_argument("--loads", type=float, nargs="+", default=list(LOADS), metavar="X", help="shares of greedy FIFO's boundary")
    parser.add_argument("--kv", nargs="+", default=list(MEMORY), metavar="SIZE", help=f"of {', '.join(MEMORY)} (default: all)")
    names = ("stationary", *MOVING)
    parser.add_argument("--parts", nargs="+", default=list(names), metavar="NAME", help=f"of {', '.join(names)} (default: all)")
    parser.add_argument("--num-requests", type=int, metavar="N", help="requests of one run (default: the suite's)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: all cores)")
    parser.add_argument("--measure-boundaries", action="store_true", help="measure greedy FIFO's boundaries anew")


def check_counts(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ConfigError(f"--{name.replace('_', '-')}: {count}, must be >= 1")


def prepare(options: argparse.Namespace) -> tuple[list[Cell], Bench]:
    """The cells and the bench that the options ask for; boundaries that are missing are measured."""
    if options.num_requests is not None and options.num_requests < 20:
        raise ConfigError(f"--num-requests: {options.num_requests}, must be >= 20")
    chosen = cells(options.parts, options.scenarios, options.kv, options.loads)
    if not chosen:
        raise ConfigError("--parts, --scenarios, --kv, --loads: no cell of the suite has them all")
    boundaries = Boundaries.read().completed(needed_boundaries(chosen), again=options.measure_boundaries)
    return chosen, Bench(boundaries, options.num_requests)


def main(words: Sequence[str] | None = None) -> int:
    options = arguments().parse_args(words)
    try:
        require("joblib", "cli")
        check_counts(seeds=options.seeds, trials=options.trials, jobs=options.jobs)
        for name in options.policies:
            policy_class(name)
            if name not in GRIDS:
                raise ConfigError(f"--policies: {name!r} has nothing to tune (known: {', '.join(GRIDS)})")
        check_file("--out", options.out)
        kept = TunedFile.read(options.out)
        if options.together:
            options.parts = [part for part in options.parts if part != "stationary"]
            if not cells(options.parts, options.scenarios, options.kv, options.loads):
                kinds = f"parts {', '.join(MOVING)} of {', '.join(PAIRS)}"
                raise ConfigError(f"--together: no cell of the non-stationary part is selected ({kinds})")
        chosen, bench = prepare(options)
    except (ConfigError, MissingExtraError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    groups = [tuple(chosen)] if options.together else [(cell,) for cell in chosen]
    tasks = [
        (bench, group, policy, options.seeds, options.trials, options.together)
        for group in groups
        for policy in options.policies
        if runs_on(policy, group[0])
    ]
    tasks = [task for task in tasks if not _done(kept, *task)]
    over = f", each over {len(chosen)} cells" if options.together else ""
    print(f"{len(tasks)} searches of {options.trials} trials on {options.seeds} seeds each{over}", flush=True)
    results = unordered("loky", options.jobs, tune_task, tasks)
    try:
        for i, found in enumerate(results, start=1):
            kept.entries[found.cell, found.policy] = found
            kept.write(options.out)
            change = "" if found.default_value == found.value else f" (default {found.default_value:.4g})"
            outcome = f"{found.objective} {found.value:.4g}{change} at {found.options}"
            print(f"{i}/{len(tasks)} {found.cell} {found.policy}: {outcome}", flush=True)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        results.close()
    return 0


def tune_task(bench: Bench, group: Sequence[Cell], policy: str, seeds: int, trials: int, together: bool) -> Tuned:
    if together:
        return tune_together(bench, group, policy, seeds=seeds, trials=trials)
    return tune(bench, group[0], policy, seeds=seeds, trials=trials)


def _done(kept: TunedFile, bench: Bench, group: Sequence[Cell], policy: str, seeds: int, trials: int, together: bool) -> bool:
    """Whether the file's entry comes from a search as asked for; a small grid has fewer points than trials."""
    entry = kept.entries.get((TOGETHER if together else group[0].key, policy))
    if entry is None:
        return False
    points = math.prod(len(values) for values in grid_of(policy, group[0]).values())
    same = (seeds, bench.count(group[0]), {cell.key for cell in group} if together else set())
    return (entry.seeds, entry.num_requests, set(entry.over)) == same and entry.trials >= min(trials, points)


if __name__ == "__main__":
    sys.exit(main())
