"""The trace formats: which columns a file is known by, and in which unit its clock counts."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

from llmsched_env.errors import ConfigError

TimeUnit = Literal["s", "ms", "us", "ns"]

PER_SECOND: dict[TimeUnit, int] = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}

_ABSURD = 1e11
"""A time above it is no Unix time in that unit of seconds: the year 5138."""


@dataclass(frozen=True, slots=True)
class Format:
    """One format.

    Attributes:
        name: as in the table of ``readers``.
        prompt, output, arrival: columns; ``arrival`` None for files with lengths only.
        marks: of these columns at least one must be there too; tells formats with the same columns apart.
        unit: of times that are numbers, None where they must be dates unless the user says a unit.
        drops_zero: requests of 0 tokens are failures that the format records, left out and counted.
        typed, named, predicts: columns ``type`` and ``tenant``, a column ``request_id``, ``predicted_tokens`` are read where there are any.
    """

    name: str
    prompt: str
    output: str
    arrival: str | None = None
    marks: tuple[str, ...] = ()
    unit: TimeUnit | None = "s"
    drops_zero: bool = False
    typed: bool = False
    named: bool = False
    predicts: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(c for c in (self.arrival, self.prompt, self.output) if c is not None)

    @property
    def optional(self) -> tuple[str, ...]:
        return ("type", "tenant") * self.typed + ("request_id",) * self.named + ("predicted_tokens",) * self.predicts

    def fits(self, header: list[str]) -> bool:
        return set(self.columns) <= set(header) and (not self.marks or not set(self.marks).isdisjoint(header))


FORMATS: tuple[Format, ...] = (
    Format("vidur", "num_prefill_tokens", "num_decode_tokens", "arrived_at", typed=True, named=True, predicts=True),
    Format("replay", "prompt_tokens", "output_tokens", "arrived_at", typed=True, named=True, predicts=True),
    Format("azure", "ContextTokens", "GeneratedTokens", "TIMESTAMP", unit=None),
    Format("burstgpt", "Request tokens", "Response tokens", "Timestamp", drops_zero=True),
    Format("bailian", "input_length", "output_length", "timestamp", marks=("chat_id", "parent_chat_id", "turn")),
    Format("mooncake", "input_length", "output_length", "timestamp", unit="ms"),
    Format("vllm", "input_toks", "output_toks", "queued_ts", named=True),
    Format("wait-lengths", "question_length", "answer_length", drops_zero=True),
    Format("vidur-lengths", "num_prefill_tokens", "num_decode_tokens", drops_zero=True, typed=True),
)

KNOWN_COLUMNS = frozenset(name for f in FORMATS for name in (*f.columns, *f.marks, *f.optional))


def find_format(where: str, header: list[str]) -> Format:
    """The first format whose columns the header has.

    Raises:
        ConfigError: none (the nearest is named), or a column that occurs twice.
    """
    for candidate in FORMATS:
        if candidate.fits(header):
            twice = [name for name in (*candidate.columns, *candidate.optional) if header.count(name) > 1]
            if twice:
                raise ConfigError(f"{where}:1: column {twice[0]!r} occurs {header.count(twice[0])} times, must occur once")
            return candidate
    known = "; ".join(f"{f.name} ({', '.join(f.columns)}{', and one of ' + ', '.join(f.marks) if f.marks else ''})" for f in FORMATS)
    names = ", ".join(name if len(name) <= 40 else name[:40] + "..." for name in header[:20])
    raise ConfigError(f"{where}: unknown columns: {names}.{_nearest(header)} Known formats: {known}")


def _nearest(header: list[str]) -> str:
    """What the format that shares most columns with ``header``, upper and lower case aside, lacks in it."""
    given = {name.casefold(): name for name in header}
    nearest = max(FORMATS, key=lambda f: sum((name in header) + (name.casefold() in given) for name in f.columns))
    if given.keys().isdisjoint(name.casefold() for name in nearest.columns):
        return ""
    missing = [name for name in nearest.columns if name not in header]
    others = {folded: name for folded, name in given.items() if name not in nearest.columns}
    near = difflib.get_close_matches(missing[0].casefold(), others, n=1)
    return f" For {nearest.name}, missing: {', '.join(missing)}" + (f" (is it {others[near[0]]!r}?)" if near else "") + "."


def check_time_unit(where: str, layout: Format, unit: str | None) -> None:
    """Refuse a unit given for a file without times.

    Raises:
        ConfigError: an unknown unit, or a file without times.
    """
    if unit is None:
        return
    if unit not in PER_SECOND:
        raise ConfigError(f"time_unit: {unit!r}, must be one of {', '.join(map(repr, PER_SECOND))}, or None for the format's own")
    if layout.arrival is None:
        raise ConfigError(f"time_unit: {unit!r}, but {where} has no arrival times ({layout.name} format)")


def doubtful_unit(layout: Format, first: float, mean_gap: float, fractional: bool) -> str:
    """Why times that are read in the format's own unit are more likely in another; empty if they are not.

    Seconds read as milliseconds, or the reverse, would be a workload a thousand times too dense or too thin, and look
    like a result.

    Args:
        first: earliest time, in the format's unit.
        mean_gap: between arrivals, in that unit; 0 where all arrive at once.
        fractional: some time is no whole number.
    """
    if layout.unit == "s":
        return "is no time in seconds (after the year 5138)" if first >= _ABSURD else ""
    if fractional:
        return "is not whole, as the milliseconds of this format are"
    if first >= _ABSURD * 1000:
        return "is no time in milliseconds (after the year 5138)"
    if 1e9 <= first < _ABSURD:
        return "is a date if it is in seconds, and days from the start of the trace in milliseconds"
    if 0 < mean_gap < 10:
        return f"is followed by gaps of {mean_gap:.3g} on average: over 100 requests a second if they are milliseconds"
    return ""
