"""Calibrations on disk, with provenance: ``.json`` for coefficients, ``.npz`` for tables.

A JSON file is ``{"form": ..., "coefficients": {...}, "provenance": {...}}``. An NPZ file holds the
tables by field name in single precision (double where that would lose points) and one text entry
``calibration``: the same JSON without the tables. Shipped ones lie in ``perf/calibrations``.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import math
import os
import sys
import zipfile
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmsched_env import checks
from llmsched_env.errors import ConfigError, did_you_mean
from llmsched_env.perf.base import FloatArray, IterationTimeModel, Provenance
from llmsched_env.perf.mixed_attention import MixedAttentionTime
from llmsched_env.perf.models import FormulaTime, LinearTime
from llmsched_env.perf.tables import TableTime
from llmsched_env.perf.traffic import TrafficTime
from llmsched_env.registry import CALIBRATIONS, is_reference

_FORMS: dict[str, type[IterationTimeModel]] = {
    "linear": LinearTime,
    "formula": FormulaTime,
    "tables": TableTime,
    "mixed-attention": MixedAttentionTime,
    "traffic": TrafficTime,
}
_SUFFIXES = (".json", ".npz")
_TEXT = "calibration"


def calibration_names() -> list[str]:
    """Names of the calibrations that ship, that this program registered and that installed packages offer."""
    return [*_shipped_names(), *(name for name in CALIBRATIONS.names() if name not in _shipped_names())]


def _shipped_names() -> list[str]:
    return sorted(name.rsplit(".", 1)[0] for name in _shipped_files())


def _shipped_files() -> list[str]:
    folder = resources.files("llmsched_env.perf") / "calibrations"
    return [f.name for f in folder.iterdir() if f.name.endswith(_SUFFIXES)]


def load_calibration(name_or_file: str | os.PathLike[str]) -> IterationTimeModel:
    """Load a shipped calibration by name, or a JSON or NPZ file by path.

    ``NAME:clip`` or ``FILE:clip`` gives tables that hold their edge values outside their range.

    Raises:
        ConfigError: unknown name (the nearest one is given), unreadable file, missing or unknown field.
    """
    given = os.fspath(name_or_file) if isinstance(name_or_file, os.PathLike) else name_or_file
    name = checks.text("calibration", given, empty=False)
    if name.endswith(":clip"):
        while name.endswith(":clip"):
            name = name.removesuffix(":clip")
        model = load_calibration(name)
        if not isinstance(model, TableTime):
            raise ConfigError(f"calibration {given!r}: 'clip' is an option of tables, {name!r} has none")
        return model.clipped()
    if name in _shipped_names():
        return _shipped(name)
    if name in CALIBRATIONS or is_reference(name):
        return _offered(name, CALIBRATIONS.find(name))
    path = Path(name)
    if path.suffix not in _SUFFIXES:
        try:
            found = path.exists()
        except OSError:  # too long for a file name
            found = False
        if found:
            raise ConfigError(f"calibration {name!r}: not a calibration file (must be .json or .npz)")
        names = calibration_names()
        hint = did_you_mean(name, names)
        raise ConfigError(f"calibration {name!r} is unknown{hint} (known: {', '.join(names)}; or a .json or .npz file)")
    return parse_calibration(name, checks.file_bytes(f"calibration {name!r}", path))


@functools.cache  # models are immutable, and shipped names few
def _shipped(name: str) -> IterationTimeModel:
    file = next(f for f in _shipped_files() if f.rsplit(".", 1)[0] == name)
    return parse_calibration(name, (resources.files("llmsched_env.perf") / "calibrations" / file).read_bytes())


def _offered(name: str, thing: object) -> IterationTimeModel:
    """What a program registered or a package offers: a model, a function that gives one, or a file."""
    if callable(thing) and not isinstance(thing, IterationTimeModel):
        with checks.told(f"calibration {name!r}"):
            thing = thing()
    if isinstance(thing, str | os.PathLike):
        return parse_calibration(name, checks.file_bytes(f"calibration {name!r}", thing))
    if not isinstance(thing, IterationTimeModel):
        allowed = "must be an IterationTimeModel, a function that gives one or a file"
        raise ConfigError(f"calibration {name!r} is {checks.shown(thing)}, {allowed}")
    return thing


def parse_calibration(label: str, data: bytes) -> IterationTimeModel:
    """The model in a JSON or NPZ file's bytes; ``label`` names it in errors.

    Raises:
        ConfigError: neither format, a missing or unknown field, a refused value.
    """
    named = f"calibration {label!r}"
    arrays: dict[str, Any] = {}
    if data[:2] == b"PK":  # NPZ is a zip archive
        arrays = _arrays(named, data)
        if _TEXT not in arrays:
            raise ConfigError(f"{named}: not a calibration file (entry {_TEXT!r} is missing)")
        entry = arrays.pop(_TEXT)
        if entry.shape != () or entry.dtype.kind != "U":
            raise ConfigError(f"{named}: not a calibration file (entry {_TEXT!r} is {entry.dtype} {entry.shape}, must be one text)")
        record = checks.json_object(f"{named}: not a calibration file", str(entry))
    else:
        record = checks.json_object(f"{named}: not a calibration file", data)
    fields = ("form", "coefficients", "provenance")
    for key in fields:
        if key not in record:
            raise ConfigError(f"{named}: field {key!r} is missing")
    for key in record:
        if key not in fields:
            raise ConfigError(f"{named}: unknown field {key!r} (allowed: {', '.join(fields)})")
    if not isinstance(record["form"], str) or record["form"] not in _FORMS:
        raise ConfigError(f"{named}: form {checks.shown(record['form'])}, must be one of {', '.join(_FORMS)}")
    coefficients = checks.mapping(f"{named}: coefficients", record["coefficients"])
    provenance: Provenance = _build(label, Provenance, checks.mapping(f"{named}: provenance", record["provenance"]))
    for name in ("provenance", *coefficients):
        if name in arrays or name == "provenance" in coefficients:
            raise ConfigError(f"{named}: field {name!r} is given twice")
    model: IterationTimeModel = _build(label, _FORMS[record["form"]], {**coefficients, **arrays, "provenance": provenance})
    return model


def _arrays(named: str, data: bytes) -> dict[str, npt.NDArray[Any]]:
    """The arrays of an NPZ file. What an entry claims to hold is checked before memory is set aside for it; nothing is unpickled."""
    found: dict[str, npt.NDArray[Any]] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            if sum(entry.file_size for entry in entries) > checks.MOST_BYTES or len(entries) > 100:
                raise ValueError(f"more than 100 entries or {checks.MOST_BYTES} bytes unpacked")
            for entry in entries:
                name = entry.filename.removesuffix(".npy")
                if name in found:
                    raise ValueError(f"entry {name!r} is there twice")
                with archive.open(entry) as file:
                    found[name] = _array(file.read(entry.file_size))
    except Exception as error:  # zipfile, zlib and numpy's parser raise a dozen types on damaged bytes
        raise ConfigError(f"{named}: not a calibration file ({type(error).__name__}: {error})") from error
    return found


def _array(data: bytes) -> npt.NDArray[Any]:
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"array format {version}")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if dtype.kind not in "fiuU" or any(length < 0 for length in shape):
        raise ValueError(f"an array of {dtype}, shape {shape}, must be of numbers or text")
    if math.prod(shape) * dtype.itemsize != len(data) - file.tell():
        raise ValueError(f"{len(data) - file.tell()} bytes for {dtype}, shape {shape}")
    if dtype.kind == "U" and dtype.itemsize:  # Python raises SystemError on what is no code point
        points = np.frombuffer(data, np.dtype("u4").newbyteorder(dtype.byteorder), offset=file.tell())
        if points.size and points.max() > sys.maxunicode:
            raise ValueError("text that is not Unicode")
    return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)


def _build(label: str, form: type, values: dict[str, Any]) -> Any:
    """``form(**values)``, with every missing and unknown field named."""
    fields = {f.name: f for f in dataclasses.fields(form) if f.init}
    for name in values:
        if name not in fields:
            hint = did_you_mean(name, fields)
            raise ConfigError(f"calibration {label!r}: unknown field {name!r}{hint} (allowed: {', '.join(fields)})")
    for name, f in fields.items():
        if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"calibration {label!r}: field {name!r} is missing")
    try:
        return form(**values)
    except ConfigError as error:
        raise ConfigError(f"calibration {label!r}: {error}") from error


def calibration_bytes(model: IterationTimeModel) -> tuple[str, bytes]:
    """(suffix, contents) of the model's file; the same model gives the same bytes."""
    form = next((name for name, kind in _FORMS.items() if type(model) is kind), None)
    if form is None:
        raise ConfigError(f"time_model: {type(model).__name__} cannot be saved (only {', '.join(_FORMS)})")
    coefficients: dict[str, Any] = {}
    arrays: dict[str, Any] = {}
    for f in dataclasses.fields(model):  # type: ignore[arg-type]
        value = getattr(model, f.name)
        if f.name == "provenance" or not f.init or value is None:
            continue
        if isinstance(value, np.ndarray):
            if value.size:
                arrays[f.name] = _stored(value)
        elif not (isinstance(value, float) and np.isinf(value)):  # no limit: JSON has no infinity
            coefficients[f.name] = value.item() if isinstance(value, np.generic) else value
    provenance = {key: value for key, value in dataclasses.asdict(model.provenance).items() if value not in (None, "")}
    text = json.dumps({"form": form, "coefficients": coefficients, "provenance": provenance}, indent=2, ensure_ascii=False)
    if not arrays:
        return ".json", (text + "\n").encode("utf-8")
    out = io.BytesIO()
    arrays[_TEXT] = np.array(text)
    np.savez_compressed(out, **arrays)  # numpy writes fixed dates: reproducible
    return ".npz", out.getvalue()


def _stored(values: FloatArray) -> npt.NDArray[np.floating[Any]]:
    """In single precision, unless that makes 0 of a time or one point of two of an axis: the file could not be read again."""
    single = values.astype(np.float32)
    lost = np.any((single == 0) != (values == 0)) or (values.ndim == 1 and np.any((np.diff(single) > 0) != (np.diff(values) > 0)))
    return values if lost else single


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
