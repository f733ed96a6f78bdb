"""The outcome of an ablation (``llmsched_env.bench.ablation``) as a JSON file."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmsched_agents.statistics import Estimate
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


@dataclass(frozen=True, slots=True)
class Ablation:
    """What each part of an agent's recipe is worth.

    Attributes:
        agent, digest: the checkpoint's name and its ``NamedPolicy.digest``.
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


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return round(value, 6) if math.isfinite(value) else None
