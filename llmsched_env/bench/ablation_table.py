"""The outcome of ``llmsched_env.cli.ablation``: a JSON file, and the section of the results page that is made from it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmsched_agents.checkpoint import CONFIG, WEIGHTS
from llmsched_agents.statistics import Estimate
from llmsched_env.bench.results import interval, percent
from llmsched_env.bench.suite import SUITE, Cell
from llmsched_env.errors import ConfigError
from llmsched_env.files import replacing

SHIPPED = Path(__file__).parent / "suites" / "ablation.json"
"""Where the ablation of the shipped generalist lies, if it has been run."""

REFERENCE_ROW = "as it ships"
"""Name of the row of the unchanged recipe."""


@dataclass(frozen=True, slots=True)
class Figures:
    """One variant of the recipe against the reference.

    Attributes:
        variant: what is changed.
        constant: the constant level (``peak``) or theta (``reserve``) in place of the network, or None.
        value, low, high: mean over cells of mean latency / the reference's - 1, with its interval; None where it is not a number.
        worst, worst_cell: the largest of the cells, and its name.
    """

    variant: str
    constant: float | None
    value: float | None
    low: float | None
    high: float | None
    worst: float | None
    worst_cell: str

    @classmethod
    def of(cls, variant: str, constant: float | None, estimate: Estimate, by_cell: Sequence[float], cells: Sequence[Cell]) -> Figures:
        """Figures of one variant; ``by_cell`` are the relative differences of the cells."""
        worst = max(range(len(cells)), key=lambda i: by_cell[i] if math.isfinite(by_cell[i]) else math.inf)
        cell = cells[worst]
        where = f"{cell.title}, load {cell.load:g}"
        return cls(
            variant=variant,
            constant=constant,
            value=_finite(estimate.value),
            low=_finite(estimate.low),
            high=_finite(estimate.high),
            worst=_finite(by_cell[worst]),
            worst_cell=where if cell.part == "stationary" else f"{cell.part}: {where}",
        )

    def texts(self) -> tuple[str, str]:
        """The mean with its interval, and the worst cell."""
        value, low, high, worst = (math.nan if x is None else x for x in (self.value, self.low, self.high, self.worst))
        return interval(Estimate(value, low, high, 0)), f"{percent(worst)} ({self.worst_cell})"


@dataclass(frozen=True, slots=True)
class Ablation:
    """What each part of an agent's recipe is worth.

    Attributes:
        agent, digest: the checkpoint's name and ``digest_of`` it.
        version, sources: of the package, and the digest of the simulator's sources.
        reference: the constant level of the checkpoint's recipe that all figures are relative to.
        seeds: of the stream ``tuning``.
        cells: keys.
        num_requests: of one run, least and most.
        wall_seconds: of all runs, on one core.
        rows: in the order of the page.
    """

    agent: str
    digest: str
    version: str
    sources: str
    reference: float
    seeds: tuple[int, ...]
    cells: tuple[str, ...]
    num_requests: tuple[int, int]
    wall_seconds: float
    rows: tuple[Figures, ...]

    @classmethod
    def read(cls, path: Path) -> Ablation:
        """Raises ``ConfigError`` where a file is not one of these, or of another suite."""
        try:
            record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            suite = record.pop("suite")
            least, most = record.pop("num_requests")
            rows = tuple(Figures(**row) for row in record.pop("rows"))
            found = cls(
                **{**record, "seeds": tuple(record["seeds"]), "cells": tuple(record["cells"])}, num_requests=(least, most), rows=rows
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path}: not a file of scripts/ablation.py ({type(error).__name__}: {error})") from error
        if suite != SUITE:
            raise ConfigError(f"{path}: of suite {suite!r}, must be {SUITE!r}")
        return found

    def write(self, path: Path) -> None:
        with replacing(path) as file:
            json.dump({"suite": SUITE, **dataclasses.asdict(self)}, file, indent=1)
            file.write("\n")

    def lines(self, own: bool) -> list[str]:
        """The section of the page; ``own`` says whether the checkpoint is one of the agents that the page evaluates."""
        least, most = self.num_requests
        counts = f"{least:,}" if least == most else f"{least:,} to {most:,}"
        other = "" if own else " **No agent evaluated on this page is this checkpoint.**"
        numbers = f"{self.seeds[0]} to {self.seeds[-1]}" if len(self.seeds) > 1 else f"{self.seeds[0]}"
        by_name: dict[str, dict[bool, Figures]] = {}
        for row in self.rows:
            by_name.setdefault(row.variant, {})[row.constant is not None] = row
        lines = [
            "## What was tried",
            "",
            f"What each part of the recipe of `{self.agent}` is worth (`scripts/ablation.py`): one part changed, all else as it ships, "
            f"with its network and with the constant level {self.reference:g} in place of the network.{other}",
            "",
            f"These are **{len(self.seeds)} development seeds** ({numbers} of the tuning stream: neither those of tuning nor of "
            f"evaluation), in {len(self.cells)} cells with {counts} requests a run, {len(self.rows) * len(self.cells) * len(self.seeds):,} "
            f"runs. Mean over the cells of the mean latency, against the recipe as it ships at the constant level {self.reference:g} on "
            "the same requests, with 95 % bootstrap intervals that resample seeds; then the cell in which it is worst. "
            "A dash stands where the network does not fit the variant, or where only one of the two can differ.",
            "",
            f"| variant | with the network | worst cell | constant: {self.reference:g}, or as named | worst cell |",
            "| --- | --- | --- | --- | --- |",
        ]
        for name, found in by_name.items():
            texts = [text for constant in (False, True) for text in (found[constant].texts() if constant in found else ("-", "-"))]
            if found.get(True) and found[True].constant == self.reference and name == REFERENCE_ROW:
                texts[2:] = ["0 (the reference)", "-"]
            lines.append(f"| {name} | " + " | ".join(texts) + " |")
        return [*lines, ""]



def digest_of(folder: Path) -> str:
    """Of what a checkpoint does: its configuration and its weights."""
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in (CONFIG, WEIGHTS))).hexdigest()[:16]


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return round(value, 6) if math.isfinite(value) else None
