"""What all commands share: how options are read, how progress and results are shown, exit codes, Ctrl-C, JSON.

Exit codes: 0 done; 1 it ran and something failed (an engine died, a disk is full, requests were not served); 2 refused before any work;
130 interrupted, with everything that was finished kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import numpy as np

from llmsched_env import __version__
from llmsched_env.errors import ConfigError, EngineError, MissingExtraError, PolicyError, install_command, require
from llmsched_env.files import check_file, replacing

try:
    import tyro
except ImportError as missing:
    raise MissingExtraError(f"tyro is not installed; run: {install_command('cli')}") from missing

DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130
T = TypeVar("T", bound="Options")

_KEPT = tyro.conf.create_mutex_group(required=False, title="what is there already")

Assignments = Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="KEY=VALUE [KEY=VALUE ...]")]
"""The words of ``--set``, which may be given more than once."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of every command."""

    quiet: bool = False
    """No progress bar and no tables."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: none)")] = None
    """Write what was found and the exit code as JSON too; - is standard output, which then holds nothing else."""


@dataclass(frozen=True, kw_only=True)
class Resumable(Options):
    """Options of every command that keeps what it finished."""

    resume: Annotated[bool, _KEPT] = False
    """Keep what is there and do what is missing."""
    overwrite: Annotated[bool, _KEPT] = False
    """Discard what is there."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        found: for ``--json``: records, mappings, sequences, numbers and texts.
        code: the exit code.
    """

    found: Any = None
    code: int = DONE


class Progress:
    """A progress bar on standard error that counts to ``total``; nothing is shown where the user wants quiet."""

    def __init__(self, bar: Any, total: int) -> None:
        self._bar = bar
        self._line = bar.add_task("", total=total)

    def advance(self, count: int = 1, description: str | None = None) -> None:
        """Count; the description stands before the bar."""
        self._bar.update(self._line, advance=count, description=description)

    def show(self, description: str, done: int | None = None, total: int | None = None) -> None:
        """What is being done now, with another count where one is given."""
        self._bar.update(self._line, description=description, completed=done, total=total)


class Screen:
    """Where a command writes: results on standard output, progress and notes on standard error.

    Attributes:
        command: as it was called, for reports.
        quiet: of ``Options``.
    """

    def __init__(self, command: str, options: Options) -> None:
        self.command = command
        self.quiet = options.quiet
        self._json_only = options.json is not None and str(options.json) == "-"

    def print(self, text: str = "") -> None:
        """A line of results."""
        if not self._json_only:
            print(text, flush=True)

    def note(self, text: str) -> None:
        """A line about the run, on standard error."""
        print(text, file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line of progress where a bar would say too little; not where the user wants quiet."""
        if not self.quiet:
            self.note(text)

    def console(self) -> Any:
        """rich's console on standard output; into a file or pipe wide enough for a table."""
        rich = require("rich.console", "cli")
        return rich.Console(width=None if sys.stdout.isatty() else 120, quiet=self._json_only)

    @contextlib.contextmanager
    def progress(self, total: int) -> Iterator[Progress]:
        rich = require("rich.progress", "cli")
        bar = rich.Progress(
            rich.TextColumn("{task.description:<44}"),
            rich.BarColumn(),
            rich.MofNCompleteColumn(),
            rich.TimeElapsedColumn(),
            rich.TimeRemainingColumn(),
            console=require("rich.console", "cli").Console(stderr=True, quiet=self.quiet),
            disable=self.quiet,  # the console is quiet, too: a disabled bar ends in an empty line before rich 14.3
        )
        with bar:
            yield Progress(bar, total)


@dataclass(frozen=True)
class Command(Generic[T]):
    """One command: its name, its options and what it does.

    Attributes:
        name: the word after ``llmsched``.
        options: a dataclass whose fields are the options and whose docstring is the help; or a union of several as subcommands.
        run: does the work; raises ``ConfigError`` before any of it for what it refuses.
    """

    name: str
    options: Any
    run: Callable[[T, Screen], Outcome]
    summary: str

    def main(self, words: Sequence[str] | None = None) -> int:
        """Read the words of a command line (default: this process's) and carry the command out; the exit code."""
        given = list(sys.argv[1:] if words is None else words)
        program = f"llmsched {self.name}"
        try:
            options = tyro.cli(self.options, prog=program, args=given, config=(tyro.conf.FlagCreatePairsOff,))
        except SystemExit as stop:  # tyro has printed help, or why it refuses
            return int(stop.code or 0)
        screen = Screen(shlex.join([*program.split(), *given]), options)
        outcome = self._carried_out(options, screen, given)
        if options.json is not None and outcome.code != REFUSED:
            try:
                write_json(options.json, screen.command, outcome)
            except OSError as error:
                screen.note(f"error: --json: {error}")
                return FAILED
        return outcome.code

    def _carried_out(self, options: T, screen: Screen, given: Sequence[str]) -> Outcome:
        """What the command found, or how it failed, said on standard error."""
        # With --json - whatever else is printed, by a policy of the user's too, must not stand before the JSON.
        output = contextlib.redirect_stdout(sys.stderr) if str(options.json) == "-" else contextlib.nullcontext()
        try:
            with output:
                check_words(options, given)
                return self.run(options, screen)
        except (ConfigError, MissingExtraError) as error:
            screen.note(f"error: {error}")
            return Outcome(code=REFUSED)
        except KeyboardInterrupt:
            kept = isinstance(options, Resumable)
            screen.note("Interrupted. What is finished is kept; go on with --resume." if kept else "Interrupted.")
            return Outcome(code=INTERRUPTED)
        except BrokenPipeError:
            raise  # the reader of a pipe has gone, as `head` does
        except PolicyError as error:
            screen.note(f"{error.details}error: {error}")
            return Outcome(code=FAILED)
        except (EngineError, OSError) as error:
            screen.note(f"error: {error}")
            return Outcome(code=FAILED)


def check_words(options: Options, given: Sequence[str]) -> None:
    """Refuse what no command can carry out: empty words, and one file for two purposes.

    Raises:
        ConfigError: naming the options.
    """
    if "" in given:
        raise ConfigError("an empty word is no value of an option")
    paths = {f"--{field.name.replace('_', '-')}": getattr(options, field.name) for field in dataclasses.fields(options)}
    taken: dict[Path, str] = {}
    for option, path in paths.items():
        if isinstance(path, Path) and str(path) != "-":
            other = taken.setdefault(path.resolve(), option)
            if other != option:
                raise ConfigError(f"{option}: {path} is also {other}, must be another file")
    if options.json is not None and str(options.json) != "-":
        check_file("--json", options.json)


def write_json(path: Path, command: str, outcome: Outcome) -> None:
    """What a command found, with how it was called and how it ended; a number that does not exist is null."""
    record = {"command": command, "version": __version__, "exit_code": outcome.code, "found": plain(outcome.found)}
    text = json.dumps(record, indent=1, allow_nan=False)
    if str(path) == "-":
        print(text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(text + "\n")


def plain(value: Any) -> Any:
    """Records, arrays and paths as what JSON knows."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def check_counts(**counts: int | None) -> None:
    """Refuse a count below 1; None stands for a default.

    Raises:
        ConfigError: naming the option.
    """
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ConfigError(f"--{name.replace('_', '-')}: {count}, must be >= 1")


def check_new_calibration(out: Path, name: str | None, beside: str = "") -> None:
    """Refuse a place or a name that a calibration cannot have.

    Args:
        out: of ``--out``; name: of ``--name``, None for the file's.
        beside: what else is written, for the message.

    Raises:
        ConfigError: naming the option.
    """
    if out.suffix != ".json":
        raise ConfigError(f"--out: {out}, must end in .json{beside}")
    check_file("--out", out)
    if name is not None and not name.strip():
        raise ConfigError("--name: empty")


def words(assignments: Sequence[Sequence[str]]) -> list[str]:
    """The words of ``--set`` in order."""
    return [word for group in assignments for word in group]
