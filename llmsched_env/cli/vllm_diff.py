"""``llmsched vllm-diff``: what differs between two versions of vLLM among the symbols that this project depends on."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from llmsched_env.cli.frame import Command, Options, Outcome, Screen
from llmsched_env.errors import ConfigError, did_you_mean
from llmsched_env.files import check_file
from llmsched_hardware import fingerprints
from llmsched_hardware.fingerprints import Change, Difference, Digests, differences, digests_of, recorded
from llmsched_hardware.vllm_sources import Tree, installed_folder
from llmsched_hardware.vllm_symbols import SYMBOLS, Symbol

INSTALLED = "installed"
PLACE = "a version on record, a folder that holds vllm/, a wheel, or the word installed"


@dataclass(frozen=True, kw_only=True)
class VllmDiff(Options):
    """Compare two versions of vLLM in the symbols that this project calls, overrides or mirrors.

    OLD and NEW are each a version on record, a folder that holds vllm/, a wheel (.whl), or the word installed. vLLM is read, not
    imported. Of a version on record only digests are kept: what differs is known, but not by how many lines. Comments, docstrings and
    formatting do not count as a difference, but lines of a symbol that differs are counted and shown with them.
    """

    old: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OLD")]
    """Where to compare from."""
    new: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NEW")]
    """What to compare with it."""
    show: Annotated[str | None, tyro.conf.arg(metavar="SYMBOL", help_behavior_hint="(default: none)")] = None
    """Print one symbol's unified diff: Scheduler.schedule, or FILE.py:NAME for one that is not listed."""
    record: Annotated[str | None, tyro.conf.arg(metavar="VERSION", help_behavior_hint="(default: none)")] = None
    """Add the digests of NEW to the record of a checkout, as those of this version."""


@dataclass(frozen=True)
class Side:
    """One of the two versions: how it is named, its digests, and its sources where they are at hand."""

    label: str
    digests: Digests
    tree: Tree | None


@dataclass(frozen=True)
class Row:
    """One difference, for the table and ``--json``; lines are None where a side has digests alone."""

    symbol: str
    change: Change
    added: int | None
    removed: int | None
    use: str
    why: str


@dataclass(frozen=True)
class Found:
    """What a comparison found, for ``--json``.

    Attributes:
        old, new: how the versions are named.
        same: how many symbols are the same in both, or in neither.
        differences: in the order of the list of symbols.
        diff: lines of ``--show``.
        recorded: the version that was recorded.
    """

    old: str
    new: str
    same: int
    differences: list[Row]
    diff: list[str]
    recorded: str | None


def side(option: str, word: str) -> Side:
    """One version by the word that names it.

    Raises:
        ConfigError: nothing that the word could name, or sources that cannot be read.
    """
    if word in recorded():
        return Side(f"{word} (on record)", recorded()[word], None)
    if word == INSTALLED:
        tree = Tree(installed_folder())
    elif Path(word).exists():
        tree = Tree(Path(word))
    else:
        hint = did_you_mean(word, [*recorded(), INSTALLED])
        raise ConfigError(f"{option}: {word!r}, must be {PLACE}{hint} (on record: {', '.join(recorded())})")
    return Side(f"{tree.version() or 'vLLM'} ({word})", digests_of(tree), tree)


def symbol_of(word: str) -> Symbol:
    """The symbol that ``--show`` names.

    Raises:
        ConfigError: there is none of that name, or several.
    """
    if ":" in word:
        return Symbol.of(word)
    named = [symbol for symbol in SYMBOLS if symbol.name == word]
    if len(named) != 1:
        if named:
            raise ConfigError(f"--show: {word!r} stands in several files, must be one of {', '.join(symbol.key for symbol in named)}")
        hint = did_you_mean(word, [symbol.name for symbol in SYMBOLS])
        raise ConfigError(f"--show: {word!r}, must be a listed symbol or FILE.py:NAME{hint}")
    return named[0]


def unified(symbol: Symbol, old: Side, new: Side) -> list[str]:
    """The unified diff of one symbol; without lines where they are the same.

    Raises:
        ConfigError: a side has no sources, or neither side has the symbol.
    """
    if old.tree is None or new.tree is None:
        without = old.label if old.tree is None else new.label
        raise ConfigError(f"--show: of {without} digests are kept, but no sources; name a folder, a wheel or installed instead")
    before, after = old.tree.lines(symbol), new.tree.lines(symbol)
    if not before and not after:
        raise ConfigError(f"--show: {symbol.key} is in neither {old.label} nor {new.label}")
    paths = [f"{one.label} {symbol.key}" for one in (old, new)]
    return list(difflib.unified_diff(before, after, paths[0], paths[1], lineterm=""))


def row(difference: Difference, old: Side, new: Side) -> Row:
    """A difference with its lines, where both sides have them."""
    symbol = difference.symbol
    added = removed = None
    if old.tree is not None and new.tree is not None:
        changed = unified(symbol, old, new)[2:]  # after the two lines that name the sides
        added, removed = (sum(line.startswith(sign) for line in changed) for sign in "+-")
    return Row(symbol.key, difference.change, added, removed, symbol.use, symbol.why)


def check_record(options: VllmDiff, new: Side) -> None:
    """Refuse what cannot be recorded.

    Raises:
        ConfigError: NEW has no sources or says that it is another version, this is no checkout, or its record cannot be written.
    """
    version = options.record
    if version is None:
        return
    fingerprints.check_release(version)
    if new.tree is None:
        raise ConfigError(f"--record: {new.label} has no sources to record; NEW must be a folder, a wheel or installed")
    own = new.tree.version().split("+")[0]
    if own and own != version:
        raise ConfigError(f"--record: {version}, but {new.label} says that it is {own}")
    path = fingerprints.RECORD
    if not (path.parents[2] / "pyproject.toml").is_file():
        raise ConfigError(f"--record: {path} is not in a checkout of this project; its versions ship with the package")
    check_file("--record", path)


def table(rows: Sequence[Row]) -> list[str]:
    """The differences in columns: change, lines where they are known, symbol, use and why."""
    cells = [[one.change, "" if one.added is None else f"+{one.added} -{one.removed}", one.symbol] for one in rows]
    widths = [max((len(line[i]) for line in cells), default=0) for i in range(3)]
    shown = [i for i in range(3) if widths[i]]
    aligned = ["  ".join(line[i].ljust(widths[i]) for i in shown) for line in cells]
    return [f"{line}  {one.use}: {one.why}" for line, one in zip(aligned, rows, strict=True)]


def run(options: VllmDiff, screen: Screen) -> Outcome:
    """Compare, show, record."""
    symbol = None if options.show is None else symbol_of(options.show)
    old, new = side("OLD", options.old), side("NEW", options.new)
    check_record(options, new)
    diff = [] if symbol is None else unified(symbol, old, new)
    rows = [row(one, old, new) for one in differences(old.digests, new.digests)]
    same = len(SYMBOLS) - len(rows)
    if symbol is not None:
        for line in diff or [f"{symbol.key}: the same in {old.label} and {new.label}"]:
            screen.print(line)
    else:
        if not options.quiet:
            for line in table(rows):
                screen.print(line)
        screen.print(f"{len(rows)} of {len(SYMBOLS)} symbols differ from {old.label} to {new.label}, {same} do not")
    if options.record is not None:
        replaced = options.record in recorded()
        path = fingerprints.record(options.record, new.digests)
        screen.print(f"{'Replaced' if replaced else 'Added'} {options.record} in {path}")
    return Outcome(Found(old.label, new.label, same, rows, diff, options.record))


COMMAND = Command("vllm-diff", VllmDiff, run, "what differs between two versions of vLLM, as far as this project depends on it")
main = COMMAND.main
