"""Fingerprints of vLLM: whether a version is one that this project was tested with, and if not, what in it is different.

vLLM declares everything under ``vllm.v1.core`` not public, the adapters use it all the same and the simulator mirrors its rules.
``fingerprints.json`` therefore holds, for every version tested, a digest of each symbol of ``vllm_symbols``. Nothing of vLLM is
imported to compare an installed version with it, and nothing is kept on disk.
"""

from __future__ import annotations

import functools
import json
import os
import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llmsched_env.errors import ConfigError
from llmsched_env.files import replacing
from llmsched_hardware.vllm_sources import Tree
from llmsched_hardware.vllm_symbols import SYMBOLS, Symbol

ALLOW_UNTESTED = "LLMSCHED_ALLOW_UNTESTED"
"""Environment variable: 1 runs with a version of vLLM that would be refused, 0 or nothing does not."""
RECORD = Path(__file__).with_name("fingerprints.json")
"""Version -> symbol -> digest, null where the version has no such symbol. Files have digests too: equal files need no parsing."""
FILES = tuple(sorted({symbol.file for symbol in SYMBOLS}))
_MOST_NAMED = 12

Digests = Mapping[str, str | None]
Change = Literal["gone", "new", "changed"]


class UntestedVersionWarning(UserWarning):
    """vLLM as it is installed is not quite one that this project was tested with."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A symbol that is not the same in two versions: gone, new or changed from the first to the second."""

    symbol: Symbol
    change: Change

    def __str__(self) -> str:
        name = f"vllm/{self.symbol.key}"
        return name if self.change == "changed" else f"{name} ({self.change})"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a version of vLLM may be used.

    Attributes:
        version: as it calls itself.
        accepted: whether it may be used.
        tested: whether it is a version on record.
        compared: the version on record that it was compared with: its own, else the one with the fewest differences.
        differences: from that version to this one, in the order of ``SYMBOLS``.
        message: why it is refused, or what its user should know; empty where there is nothing to say.
    """

    version: str
    accepted: bool
    tested: bool
    compared: str
    differences: tuple[Difference, ...]
    message: str

    def enforce(self) -> None:
        """Refuse the version, or warn of it, or do nothing.

        Raises:
            ConfigError: it is not accepted.
        """
        if not self.accepted:
            raise ConfigError(self.message)
        if self.message:
            warnings.warn(self.message, UntestedVersionWarning, stacklevel=2)


# --- the record ------------------------------------------------------------------------------------------------
@functools.cache
def recorded() -> dict[str, dict[str, str | None]]:
    """The digests of every version on record, the oldest version first."""
    found: dict[str, dict[str, str | None]] = json.loads(RECORD.read_text(encoding="utf-8"))
    return found


def recorded_versions() -> tuple[str, ...]:
    """The versions on record, oldest first."""
    return tuple(recorded())


def check_release(version: str) -> None:
    """Refuse what is no release.

    Raises:
        ConfigError: as it says.
    """
    if not re.fullmatch(r"\d+\.\d+\.\d+(\.post\d+)?", version):
        raise ConfigError(f"version {version!r}, must be the number of a release, such as 0.28.0")


def record(version: str, digests: Digests) -> Path:
    """Add a version to the record, or replace it there; the file that holds it.

    Raises:
        ConfigError: no number of a release.
        OSError: the file cannot be written.
    """
    check_release(version)
    kept = {**recorded(), version: dict(digests)}
    with replacing(RECORD) as file:
        file.write(json.dumps({name: kept[name] for name in sorted(kept, key=_order)}, indent=1) + "\n")
    recorded.cache_clear()
    return RECORD


def _order(version: str) -> tuple[int, ...]:
    """The numbers in a version, for sorting."""
    return tuple(map(int, re.findall(r"\d+", version)))


# --- comparing ---------------------------------------------------------------------------------------------------
def digests_of(tree: Tree) -> dict[str, str | None]:
    """The digest of every symbol by its key, and of every file that holds one; None where this version has none.

    Raises:
        ConfigError: a file that cannot be read.
    """
    symbols = {symbol.key: tree.digest(symbol) for symbol in sorted(SYMBOLS, key=lambda symbol: symbol.file)}
    return {symbol.key: symbols[symbol.key] for symbol in SYMBOLS} | {file: tree.file_digest(file) for file in FILES}


@functools.lru_cache(maxsize=2)
def _digests_in(folder: Path, number: str, stamp: object) -> Digests:
    """The digests of a folder. Where every file is that of the release on record, nothing need be parsed."""
    tree, own = Tree(folder), recorded().get(number)
    if own is not None and all(file in own and own[file] == tree.file_digest(file) for file in FILES):
        return own
    return digests_of(tree)


def differences(old: Digests, new: Digests) -> tuple[Difference, ...]:
    """The symbols that differ, in the order of ``SYMBOLS``."""
    found = []
    for symbol in SYMBOLS:
        before, after = old.get(symbol.key), new.get(symbol.key)
        if before != after:
            found.append(Difference(symbol, "gone" if after is None else "new" if before is None else "changed"))
    return tuple(found)


def nearest(digests: Digests) -> tuple[str, tuple[Difference, ...]]:
    """The version on record with the fewest differences, of several the newest, and the differences from it."""
    found = {version: differences(own, digests) for version, own in recorded().items()}
    version = min(reversed(found), key=lambda name: len(found[name]))
    return version, found[version]


def differing(version_or_folder: str | Path) -> tuple[Difference, ...]:
    """What differs from the nearest version on record.

    Args:
        version_or_folder: a version on record, which is compared with the others, or a folder or wheel that holds ``vllm/``.

    Raises:
        ConfigError: neither.
    """
    known = recorded()
    if str(version_or_folder) in known:
        own = known[str(version_or_folder)]
        return min((differences(other, own) for name, other in known.items() if name != str(version_or_folder)), key=len)
    return nearest(digests_of(Tree(Path(version_or_folder))))[1]


# --- the rule of acceptance ---------------------------------------------------------------------------------------
def judge(version: str, folder: Path, *, supported: Collection[str] | None = None) -> Verdict:
    """Whether a version of vLLM may be used.

    A supported version is accepted; where its sources are not those on record, as in a vendor's build, its user is told. Another
    version is refused while any symbol differs from the nearest version on record, and accepted with a warning where none does.
    ``LLMSCHED_ALLOW_UNTESTED=1`` turns a refusal into a warning.

    Args:
        version: as the package calls itself, such as ``0.28.0+cpu``; what follows a plus does not count.
        folder: holds the package ``vllm/``.
        supported: default: the versions on record.

    Raises:
        ConfigError: a value of the variable that is not allowed, or a folder without vLLM.
    """
    allowed = allows_untested(os.environ)
    number = version.split("+")[0]
    digests = _digests_in(folder, number, Tree(folder).stamp(FILES))
    tested = number in recorded() and (supported is None or number in supported)
    compared, found = (number, differences(recorded()[number], digests)) if tested else nearest(digests)
    listed = ", ".join(recorded() if supported is None else supported)
    what = f"vLLM {version} is not supported (tested: {listed})"
    if tested:
        patched = f"vLLM {version} is installed, but not as it was tested: {_named(found)} differ; decisions may not do what they did there"
        return Verdict(version, True, True, compared, found, patched if found else "")
    if not found:
        same = f"{what}, but everything of it that is used or mirrored is the same as in {compared}; it is accepted"
        return Verdict(version, True, False, compared, found, same)
    apart = f"{what}. From {compared}, the nearest of them, differ: {_named(found)}"
    if allowed:
        return Verdict(version, True, False, compared, found, f"{ALLOW_UNTESTED}=1: {apart}. Nothing that happens with it was tested.")
    remedy = (
        f"Install one of the tested versions; or read the differences (llmsched vllm-diff {compared} installed; docs/extending.md, "
        f"How to follow a new vLLM); or set {ALLOW_UNTESTED}=1 to run it untested"
    )
    return Verdict(version, False, False, compared, found, f"{apart}. {remedy}")


def allows_untested(environment: Mapping[str, str]) -> bool:
    """Whether the user has asked for a version that would be refused.

    Raises:
        ConfigError: the variable is neither 0 nor 1 nor empty.
    """
    value = environment.get(ALLOW_UNTESTED, "").strip()
    if value not in ("", "0", "1"):
        raise ConfigError(f"{ALLOW_UNTESTED}: {value!r}, must be 1 (run with an untested vLLM), 0 or empty")
    return value == "1"


def _named(found: tuple[Difference, ...]) -> str:
    """The differences in words, the first dozen of them."""
    more = len(found) - _MOST_NAMED
    return ", ".join(map(str, found[:_MOST_NAMED])) + (f" and {more} more" if more > 0 else "")
