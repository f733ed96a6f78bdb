"""A submission to the leaderboard: a TOML file that names a policy, its parameters and the figures its authors claim.

Tables ``claimed.quick`` and ``claimed.full`` hold the figures by level. Everything is checked before any work, and what is refused
names the field.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from llmsched_agents.lookup import NamedPolicy, named_policy
from llmsched_env import checks
from llmsched_env.bench.variants import Variant
from llmsched_env.errors import ConfigError, did_you_mean

Level = Literal["quick", "full"]
LEVELS: tuple[Level, ...] = get_args(Level)

CLAIMS = ("speedup", "p99_speedup", "worst_cell", "slo_goodput")
"""Figures that can be claimed, those of ``llmsched_env.bench.leaderboard.Score``."""
ENGINE = ("max_num_batched_tokens", "max_num_seqs")
"""Fields of the engine that are an operator's to choose; all else is the suite's."""

_REQUIRED = ("name", "authors", "policy", "known_lengths")
_OPTIONAL = ("description", "link", "options", "engine", "claimed")


@dataclass(frozen=True, slots=True)
class Submission:
    """One entry of the leaderboard.

    Attributes:
        name: in the table.
        authors: one or more.
        policy: what runs, found by the text of the file; a folder is taken from the file's own.
        known_lengths: whether the policy is told output lengths, which a server does not know.
        options, engine: of the policy's constructor, and fields of the engine.
        claimed: figures by level; levels and figures may be missing.
    """

    name: str
    authors: tuple[str, ...]
    policy: NamedPolicy
    known_lengths: bool
    options: Mapping[str, Any]
    engine: Mapping[str, int]
    claimed: Mapping[Level, Mapping[str, float]]
    description: str = ""
    link: str = ""

    @property
    def variant(self) -> Variant:
        """As the evaluation runs it."""
        options = [*self.options.items(), *((f"engine.{name}", value) for name, value in self.engine.items())]
        return Variant(self.name, "agent", tuple(options), agent=self.policy, digest=self.policy.digest())


def read_submission(path: Path) -> Submission:
    """The submission in a file.

    Raises:
        ConfigError: a file that cannot be read or is no TOML; a field that is missing, unknown or of another kind; a policy that does
            not exist.
    """
    data = checks.file_bytes(f"submission: {path}", path)
    try:
        record = tomllib.loads(data.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"submission: {path} is no TOML: {error}") from error
    with checks.told(str(path)):
        return _checked(record, path.parent)


def _checked(record: Mapping[str, Any], folder: Path) -> Submission:
    known = (*_REQUIRED, *_OPTIONAL)
    for name in record:
        if name not in known:
            raise ConfigError(f"{name}: no field of a submission{did_you_mean(name, known)} (fields: {', '.join(known)})")
    for name in _REQUIRED:
        if name not in record:
            raise ConfigError(f"{name}: is missing, every submission has {', '.join(_REQUIRED)}")
    name = checks.text("name", record["name"], empty=False)
    if any(mark in name for mark in "|\n"):
        raise ConfigError(f"name: {name!r}, must have no '|' and no line break")
    return Submission(
        name=name,
        authors=_authors(record["authors"]),
        policy=_policy(checks.text("policy", record["policy"], empty=False), folder),
        known_lengths=checks.flag("known_lengths", record["known_lengths"]),
        options=checks.mapping("options", record.get("options", {})),
        engine=_engine(checks.mapping("engine", record.get("engine", {}))),
        claimed=_claims(checks.mapping("claimed", record.get("claimed", {}))),
        description=checks.text("description", record.get("description", "")),
        link=checks.text("link", record.get("link", "")),
    )


def _authors(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(one, str) and one and "|" not in one for one in value):
        raise ConfigError(f"authors: {checks.shown(value)}, must be a list of at least one name")
    return tuple(value)


def _policy(text: str, folder: Path) -> NamedPolicy:
    """A folder beside the file before one of the same name elsewhere."""
    beside = folder / text
    return named_policy(str(beside) if ("/" in text or text.startswith(".")) and beside.is_dir() else text)


def _engine(given: Mapping[str, Any]) -> dict[str, int]:
    for name in given:
        if name not in ENGINE:
            raise ConfigError(f"engine.{name}: belongs to the suite, a submission may set {', '.join(ENGINE)}")
    return {name: checks.integer(f"engine.{name}", value, low=1) for name, value in given.items()}


def _claims(given: Mapping[str, Any]) -> dict[Level, dict[str, float]]:
    found: dict[Level, dict[str, float]] = {}
    for level, figures in given.items():
        if level not in LEVELS:
            raise ConfigError(f"claimed.{level}: no level{did_you_mean(level, LEVELS)} (levels: {', '.join(LEVELS)})")
        for figure in checks.mapping(f"claimed.{level}", figures):
            if figure not in CLAIMS:
                raise ConfigError(f"claimed.{level}.{figure}: no figure{did_you_mean(figure, CLAIMS)} (figures: {', '.join(CLAIMS)})")
        own = {figure: checks.number(f"claimed.{level}.{figure}", value) for figure, value in figures.items()}
        found[LEVELS[LEVELS.index(level)]] = own
    return found
