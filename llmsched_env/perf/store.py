"""Calibrations on disk: one JSON file each, with provenance, shipped in ``perf/calibrations``."""

from __future__ import annotations

import difflib
import json
from importlib import resources
from pathlib import Path
from typing import Any

from llmsched_env.errors import ConfigError
from llmsched_env.perf.models import FormulaTime, IterationTimeModel, LinearTime, Provenance

_FORMS: dict[str, type[LinearTime] | type[FormulaTime]] = {"linear": LinearTime, "formula": FormulaTime}


def calibration_names() -> list[str]:
    """Names of the calibrations shipped with the package."""
    folder = resources.files("llmsched_env.perf") / "calibrations"
    return sorted(f.name.removesuffix(".json") for f in folder.iterdir() if f.name.endswith(".json"))


def load_calibration(name_or_file: str) -> IterationTimeModel:
    """Load a shipped calibration by name, or a JSON file by path.

    Raises:
        ConfigError: unknown name (the nearest one is given), unreadable file, missing field.
    """
    if name_or_file.endswith(".json"):
        try:
            text = Path(name_or_file).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"calibration {name_or_file!r}: {error.strerror or error}") from error
    else:
        names = calibration_names()
        if name_or_file not in names:
            near = difflib.get_close_matches(name_or_file, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"calibration {name_or_file!r} is unknown{hint} (shipped: {', '.join(names)}; or a .json file)")
        text = (resources.files("llmsched_env.perf") / "calibrations" / f"{name_or_file}.json").read_text(encoding="utf-8")
    try:
        record: dict[str, Any] = json.loads(text)
        form = _FORMS[record["form"]]
        provenance = Provenance(**record["provenance"])
        return form(**record["coefficients"], provenance=provenance)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"calibration {name_or_file!r}: not a calibration file ({type(error).__name__}: {error})") from error
