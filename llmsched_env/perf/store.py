"""Calibrations on disk, with provenance: ``.json`` for coefficients, ``.npz`` for tables.

A JSON file is ``{"form": ..., "coefficients": {...}, "provenance": {...}}``. An NPZ file holds the
tables by field name in single precision and one text entry ``calibration``: the same JSON without
the tables. Shipped ones lie in ``perf/calibrations``.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import io
import json
import zipfile
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from llmsched_env.errors import ConfigError
from llmsched_env.perf.base import IterationTimeModel, Provenance
from llmsched_env.perf.mixed_attention import MixedAttentionTime
from llmsched_env.perf.models import FormulaTime, LinearTime
from llmsched_env.perf.tables import TableTime

_FORMS: dict[str, type[IterationTimeModel]] = {
    "linear": LinearTime,
    "formula": FormulaTime,
    "tables": TableTime,
    "mixed-attention": MixedAttentionTime,
}
_SUFFIXES = (".json", ".npz")
_TEXT = "calibration"


def calibration_names() -> list[str]:
    """Names of the calibrations shipped with the package."""
    return sorted(name.rsplit(".", 1)[0] for name in _shipped_files())


def _shipped_files() -> list[str]:
    folder = resources.files("llmsched_env.perf") / "calibrations"
    return [f.name for f in folder.iterdir() if f.name.endswith(_SUFFIXES)]


def load_calibration(name_or_file: str) -> IterationTimeModel:
    """Load a shipped calibration by name, or a JSON or NPZ file by path.

    ``NAME:clip`` or ``FILE:clip`` gives tables that hold their edge values outside their range.

    Raises:
        ConfigError: unknown name (the nearest one is given), unreadable file, missing or unknown field.
    """
    name, colon, option = name_or_file.rpartition(":")
    if colon and option == "clip":
        model = load_calibration(name)
        if not isinstance(model, TableTime):
            raise ConfigError(f"calibration {name_or_file!r}: 'clip' is an option of tables, {name!r} has none")
        return model.clipped()
    if name_or_file in calibration_names():
        return _shipped(name_or_file)
    path = Path(name_or_file)
    if path.suffix not in _SUFFIXES:
        if path.exists():
            raise ConfigError(f"calibration {name_or_file!r}: not a calibration file (must be .json or .npz)")
        names = calibration_names()
        near = difflib.get_close_matches(name_or_file, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"calibration {name_or_file!r} is unknown{hint} (shipped: {', '.join(names)}; or a .json or .npz file)")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"calibration {name_or_file!r}: {error.strerror or error}") from error
    return parse_calibration(name_or_file, data)


@functools.cache  # models are immutable
def _shipped(name: str) -> IterationTimeModel:
    file = next(f for f in _shipped_files() if f.rsplit(".", 1)[0] == name)
    return parse_calibration(name, (resources.files("llmsched_env.perf") / "calibrations" / file).read_bytes())


def parse_calibration(label: str, data: bytes) -> IterationTimeModel:
    """The model in a JSON or NPZ file's bytes; ``label`` names it in errors.

    Raises:
        ConfigError: neither format, a missing or unknown field, a refused value.
    """
    try:
        arrays: dict[str, Any] = {}
        if data[:2] == b"PK":  # NPZ is a zip archive
            with np.load(io.BytesIO(data), allow_pickle=False) as file:
                arrays = {key: file[key] for key in file.files}
            if _TEXT not in arrays:
                raise ConfigError(f"calibration {label!r}: not a calibration file (entry {_TEXT!r} is missing)")
            text = str(arrays.pop(_TEXT))
        else:
            text = data.decode("utf-8")
        record = json.loads(text)
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"calibration {label!r}: not a calibration file ({type(error).__name__}: {error})") from error
    if not isinstance(record, dict):
        raise ConfigError(f"calibration {label!r}: not a calibration file (must be a JSON object)")
    for key in ("form", "coefficients", "provenance"):
        if key not in record:
            raise ConfigError(f"calibration {label!r}: field {key!r} is missing")
    if record["form"] not in _FORMS:
        raise ConfigError(f"calibration {label!r}: form {record['form']!r}, must be one of {', '.join(_FORMS)}")
    form = _FORMS[record["form"]]
    provenance: Provenance = _build(label, Provenance, record["provenance"])
    model: IterationTimeModel = _build(label, form, {**record["coefficients"], **arrays, "provenance": provenance})
    return model


def _build(label: str, form: type, values: dict[str, Any]) -> Any:
    """``form(**values)``, with every missing and unknown field named."""
    fields = {f.name: f for f in dataclasses.fields(form) if f.init}
    for name in values:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"calibration {label!r}: unknown field {name!r}{hint} (allowed: {', '.join(fields)})")
    for name, f in fields.items():
        if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"calibration {label!r}: field {name!r} is missing")
    try:
        return form(**values)
    except ConfigError as error:
        raise ConfigError(f"calibration {label!r}: {error}") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"calibration {label!r}: not a calibration file ({type(error).__name__}: {error})") from error


def calibration_bytes(model: IterationTimeModel) -> tuple[str, bytes]:
    """(suffix, contents) of the model's file; the same model gives the same bytes."""
    form = next((name for name, kind in _FORMS.items() if type(model) is kind), None)
    if form is None:
        raise ConfigError(f"time_model: {type(model).__name__} cannot be saved (only {', '.join(_FORMS)})")
    coefficients: dict[str, Any] = {}
    arrays: dict[str, Any] = {}
    for f in dataclasses.fields(model):  # type: ignore[arg-type]
        value = getattr(model, f.name)
        if f.name == "provenance" or not f.init:
            continue
        if isinstance(value, np.ndarray):
            if value.size:
                arrays[f.name] = value.astype(np.float32)
        elif not (isinstance(value, float) and np.isinf(value)):  # no limit: JSON has no infinity
            coefficients[f.name] = value
    provenance = {key: value for key, value in dataclasses.asdict(model.provenance).items() if value not in (None, "")}
    text = json.dumps({"form": form, "coefficients": coefficients, "provenance": provenance}, indent=2, ensure_ascii=False)
    if not arrays:
        return ".json", (text + "\n").encode("utf-8")
    out = io.BytesIO()
    arrays[_TEXT] = np.array(text)
    np.savez_compressed(out, **arrays)  # numpy writes fixed dates: reproducible
    return ".npz", out.getvalue()


def save_calibration(model: IterationTimeModel, path: str | Path) -> None:
    """Write ``model`` to a file that ``load_calibration`` reads.

    Raises:
        ConfigError: the file's suffix is not the one of the model's form (``.npz`` for tables, else ``.json``).
    """
    suffix, data = calibration_bytes(model)
    path = Path(path)
    if path.suffix != suffix:
        raise ConfigError(f"calibration file {str(path)!r}: a {type(model).__name__} is saved as {suffix}")
    path.write_bytes(data)
