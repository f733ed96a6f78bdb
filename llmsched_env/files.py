"""Where the programs write: checked before any work, replaced in one step, nothing left behind on a refusal."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from llmsched_env.errors import ConfigError


def check_folder(option: str, folder: Path) -> None:
    """Check, without making it, that ``folder`` can be made or written to.

    Raises:
        ConfigError: it, or the nearest parent that exists, is not a folder or cannot be written.
    """
    existing = folder
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise ConfigError(f"{option}: {folder} cannot be a folder, {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"{option}: {folder} cannot be written, no permission in {existing}")
    try:  # permissions do not tell of every place that cannot be written to
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise ConfigError(f"{option}: {folder} cannot be written, {error.strerror} in {existing}") from error


def check_file(option: str, path: Path) -> None:
    """Check that ``path`` can be written as a file.

    Raises:
        ConfigError: it is a folder, or its folder cannot be written.
    """
    if path.is_dir():
        raise ConfigError(f"{option}: {path} is a folder, must be a file")
    check_folder(option, path.absolute().parent)


@contextmanager
def replacing(path: Path) -> Iterator[IO[str]]:
    """A text file beside ``path`` that takes its place when the block ends, and vanishes when it raises."""
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.absolute().parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as file:
            yield file
        # mkstemp makes files that only their owner can read
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def goes_on(out: Path, there: bool, *, resume: bool, overwrite: bool, what: str = "results", option: str = "--out") -> bool:
    """Whether to go on with what an earlier run left: the one rule of all commands.

    Args:
        out: where finished work is kept.
        there: whether it holds any.
        option: that names ``out``.

    Raises:
        ConfigError: it does, and neither ``--resume`` nor ``--overwrite`` says what is to become of it.
    """
    if there and not (resume or overwrite):
        raise ConfigError(f"{option}: {out} holds {what} already; use --resume, --overwrite or another place")
    return there and resume


def read_settings(path: Path) -> dict[str, Any]:
    """What ``write_settings`` left.

    Raises:
        ConfigError: it is missing or unreadable.
    """
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--resume: {path} cannot be read ({error}), use --overwrite") from error
    if not isinstance(kept, dict):
        raise ConfigError(f"--resume: {path} holds no settings, use --overwrite")
    return kept


def check_same_settings(path: Path, description: Mapping[str, Any]) -> None:
    """Refuse to mix the results of two different settings.

    Args:
        path: JSON file that ``write_settings`` left beside the results.
        description: the settings now, as plain values.

    Raises:
        ConfigError: the settings kept are missing, unreadable or differ.
    """
    kept = read_settings(path)
    for name, value in json.loads(json.dumps(description)).items():
        if kept.get(name) != value:
            raise ConfigError(f"--resume: {name} is {value!r}, but what {path.parent} holds was made with {kept.get(name)!r}")


def write_settings(path: Path, description: Mapping[str, Any]) -> None:
    """Write down what results were made with."""
    with replacing(path) as file:
        json.dump(description, file, indent=2)
        file.write("\n")
