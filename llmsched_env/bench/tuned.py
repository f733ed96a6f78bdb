"""Tuned parameters as a file: one entry a search, written anew after each, so that a search that was made is not made again."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmsched_env import __version__
from llmsched_env.bench.suite import SUITE, Bench, Cell
from llmsched_env.bench.tuning import TOGETHER, Tuned, grid_of, objective_of, tune, tune_together
from llmsched_env.bench.variants import runs_on
from llmsched_env.errors import ConfigError
from llmsched_env.files import replacing

SHIPPED = Path(__file__).parent / "suites" / "tuned.json"
"""The parameters behind the published page of results."""
SHIPPED_NAME = "shipped"
"""What stands for them where a file is asked for."""


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

    def holds(self, task: Search) -> bool:
        """Whether an entry comes from a search as asked for."""
        return self._entry(task) is not None and not self.differences(task)

    def differences(self, task: Search) -> dict[str, tuple[int, int]]:
        """In what the entry of the same search was made otherwise than asked for: setting -> (kept, asked); nothing without an entry.

        More trials than asked for are no difference, nor are fewer where the grid has no more points.
        """
        entry = self._entry(task)
        if entry is None:
            return {}
        first = task.cells[0]
        points = math.prod(len(values) for values in grid_of(task.policy, first).values())
        pairs = {"seeds": (entry.seeds, task.seeds), "num_requests": (entry.num_requests, task.bench.count(first))}
        found = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
        return found if entry.trials >= min(task.trials, points) else {"trials": (entry.trials, task.trials), **found}

    def check_same(self, path: Path, asked: Iterable[Search]) -> None:
        """Refuse to put an entry in place of one that was made with other settings.

        Args:
            path: of this file.

        Raises:
            ConfigError: naming the options, what they are and what they were.
        """
        for task in asked:
            found = self.differences(task)
            if found:
                now = ", ".join(f"--{name.replace('_', '-')} is {value}" for name, (_, value) in found.items())
                then = ", ".join(str(value) for value, _ in found.values())
                entry = f"{task.key} {task.policy}"
                raise ConfigError(f"--resume: {now}, but {entry} in {path} was made with {then}; use --overwrite or another --out")

    def _entry(self, task: Search) -> Tuned | None:
        """The entry of the same search: the same policy in the same cells."""
        entry = self.entries.get((task.key, task.policy))
        return entry if entry is not None and set(entry.over) == task.over else None


def _plain(entry: Tuned) -> dict[str, Any]:
    """``over`` only where it says something."""
    return {name: value for name, value in dataclasses.asdict(entry).items() if name != "over" or value}


@dataclass(frozen=True, slots=True)
class Search:
    """One search to make: a policy's parameters in one cell, or ``together`` in several."""

    bench: Bench
    cells: tuple[Cell, ...]
    policy: str
    seeds: int
    trials: int
    together: bool

    @property
    def key(self) -> str:
        """In place of a cell's in the file."""
        return TOGETHER if self.together else self.cells[0].key

    @property
    def over(self) -> set[str]:
        """Keys of the cells searched together; none where there is one cell."""
        return {cell.key for cell in self.cells} if self.together else set()

    def run(self) -> Tuned:
        """Raises ``ConfigError`` as ``tune_together``."""
        if self.together:
            return tune_together(self.bench, self.cells, self.policy, seeds=self.seeds, trials=self.trials)
        return tune(self.bench, self.cells[0], self.policy, seeds=self.seeds, trials=self.trials)


def searches(bench: Bench, chosen: Sequence[Cell], policies: Iterable[str], *, seeds: int, trials: int, together: bool) -> list[Search]:
    """One for each cell, or one for all of them ``together``, and each policy that runs there."""
    groups = [tuple(chosen)] if together else [(cell,) for cell in chosen]
    names = list(policies)
    return [Search(bench, group, name, seeds, trials, together) for group in groups for name in names if runs_on(name, group[0])]


def tuned_parameters(option: str, path: Path | None) -> Mapping[tuple[str, str], Tuned]:
    """The entries of a file that a user named, or of the one that ships (``SHIPPED_NAME``); none where no file was named.

    Raises:
        ConfigError: the file is not there or holds something else.
    """
    if path is None:
        return {}
    file = SHIPPED if str(path) == SHIPPED_NAME else path
    if not file.exists():
        raise ConfigError(f"{option}: {file} does not exist")
    return TunedFile.read(file).entries
