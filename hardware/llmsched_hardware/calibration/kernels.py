"""Measure the kernels of a dense decoder on the machine at hand, without an engine, as CSV profiles in Vidur's form.

The files are those of ``importers/vidur_profile``: attention.csv, mlp.csv, per_sequence.csv and meta.json, so that
``llmsched calibrate import --format vidur FOLDER`` makes a calibration of them. A plan goes from coarse to fine; after its first pass
the files can be imported, and each row is on disk before the next is measured. Tests run it on a CPU; it has not yet run on a GPU.
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Literal

from llmsched_env.errors import ConfigError
from llmsched_env.files import check_same_settings, replacing, write_settings
from llmsched_env.row_file import csv_writer
from llmsched_hardware.calibration.importers.dense_model import BYTES, DenseModel
from llmsched_hardware.calibration.importers.vidur_profile import PER_LAYER, PER_SEQUENCE, WRITE
from llmsched_hardware.calibration.kernel_operators import (
    BLOCK_SIZE,
    LEAST_REPEATS,
    REPEATS,
    Attention,
    Clock,
    Device,
    Layer,
    Machine,
    Times,
    columns_of,
)

Kind = Literal["tokens", "sequences", "decode", "prefill"]
FILES: Mapping[Kind, str] = {"tokens": "mlp.csv", "sequences": "per_sequence.csv", "decode": "attention.csv", "prefill": "attention.csv"}
META = "meta.json"
SHARE = 0.3  # of the GPU's memory for the keys and values of one call
HOST_BYTES = 2**31  # the same on a CPU
_STATISTICS = ("min", "max", "mean", "median", "std")
_ATTENTION = ("attn_kv_cache_save", "attn_prefill", "attn_decode")
_AXES: Mapping[str, tuple[str, ...]] = {
    "mlp.csv": ("num_tokens",),
    "per_sequence.csv": ("num_sequences",),
    "attention.csv": ("batch_size", "prefill_chunk_size", "kv_cache_size", "is_prefill"),
}


@dataclass(frozen=True, slots=True)
class Reach:
    """How far to measure: tokens of a batch and of a chunk, context, requests."""

    tokens: int = 8192
    context: int = 16384
    requests: int = 256


@dataclass(frozen=True, slots=True, order=True)
class Point:
    """One row to measure: tokens or requests; requests and context of each; or chunk and context."""

    kind: Kind
    count: int
    context: int = 0

    @property
    def cells(self) -> dict[str, Any]:
        """Its coordinates by column."""
        if self.kind in ("tokens", "sequences"):
            return {_AXES[FILES[self.kind]][0]: self.count}
        decode = self.kind == "decode"
        values = (self.count if decode else 1, 0 if decode else self.count, self.context, not decode)
        return dict(zip(_AXES["attention.csv"], values, strict=True))


@dataclass(frozen=True, slots=True)
class Measured:
    """How far it came: rows that are in the files, points that the budget left out, and those too large for the memory."""

    rows: int
    left: int
    too_large: int
    seconds: float


def _grid(least: int, most: int, factor: int) -> list[int]:
    """``least`` and its multiples by powers of ``factor``, and ``most``."""
    found = []
    value = least
    while value < most:
        found.append(value)
        value *= factor
    return [*found, most]


def plan(reach: Reach) -> list[Point]:
    """The points from coarse to fine: after the first pass every axis has its ends."""
    points: list[Point] = []
    for factor in (8, 2):
        contexts = _grid(min(16, reach.context), reach.context, factor)
        chunks = _grid(min(16, reach.tokens), reach.tokens, factor)
        points += [Point("tokens", n) for n in _grid(1, reach.tokens, 4 if factor == 8 else 2)]
        points += [Point("sequences", n) for n in _grid(1, reach.requests, factor)]
        points += [Point("decode", n, k) for n in _grid(1, reach.requests, factor) for k in contexts]
        points += [Point("prefill", c, x) for c in chunks for x in (0, *contexts) if c + x <= reach.context]
    return list(dict.fromkeys(points))


class ProfileFiles:
    """The CSV files of a folder, to which rows are appended; what an earlier run left is kept with ``resume``.

    Raises:
        ConfigError: a file with other columns.
    """

    def __init__(self, folder: Path, model: DenseModel, attention: str, *, resume: bool) -> None:
        self._folder = folder
        sizes = {"n_head": model.heads, "n_kv_head": model.kv_heads, "n_embd": model.hidden, "n_expanded_embd": model.intermediate}
        heads = {"n_embd": model.hidden, "n_q_head": model.heads, "n_kv_head": model.kv_heads, "block_size": BLOCK_SIZE}
        self._same: dict[str, dict[str, Any]] = {
            "mlp.csv": {**sizes, "vocab_size": model.vocab, "use_gated_mlp": True, "num_tensor_parallel_workers": 1},
            "per_sequence.csv": {"vocab_size": model.vocab, "n_embd": model.hidden, "num_tensor_parallel_workers": 1},
            "attention.csv": {**heads, "num_tensor_parallel_workers": 1, "attention_backend": attention},
        }
        operators = {"mlp.csv": ("emb", *PER_LAYER), "per_sequence.csv": PER_SEQUENCE, "attention.csv": _ATTENTION}
        self._columns = {
            name: [*(f"time_stats.{o}.{s}" for o in own for s in _STATISTICS), *self._same[name], *_AXES[name]]
            for name, own in operators.items()
        }
        self._rows = {name: self._kept(name) if resume else [] for name in self._columns}
        self._open: dict[str, IO[str]] = {}

    def _kept(self, name: str) -> list[list[str]]:
        """Whole lines of the file; a last one that a kill cut off is left out."""
        path = self._folder / name
        if not path.exists():
            return []
        text = path.read_text(encoding="utf-8")
        lines = list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1])))
        if lines and lines[0] != self._columns[name]:
            raise ConfigError(f"--resume: {path} has other columns than this version writes; use --overwrite or another --out")
        return [line for line in lines[1:] if len(line) == len(self._columns[name])]

    def __enter__(self) -> ProfileFiles:
        self._folder.mkdir(parents=True, exist_ok=True)
        for name, rows in self._rows.items():
            with replacing(self._folder / name) as file:
                csv_writer(file).writerows([self._columns[name], *rows])
            self._open[name] = (self._folder / name).open("a", encoding="utf-8", newline="")
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self._open.values():
            file.close()

    def holds(self, point: Point) -> bool:
        """Whether the point was measured."""
        name = FILES[point.kind]
        at = [self._columns[name].index(column) for column in point.cells]
        wanted = [str(value) for value in point.cells.values()]
        return any([row[i] for i in at] == wanted for row in self._rows[name])

    def append(self, point: Point, times: Mapping[str, Times]) -> None:
        """One row; an operator that the point does not have takes no time."""
        name = FILES[point.kind]
        cells = {**dict.fromkeys(self._columns[name], 0.0), **self._same[name], **point.cells, **columns_of(times)}
        row = [str(cells[column]) for column in self._columns[name]]
        self._rows[name].append(row)
        csv_writer(self._open[name]).writerow(row)
        self._open[name].flush()

    @property
    def count(self) -> int:
        return sum(len(rows) for rows in self._rows.values())


def _calls(layer: Layer, point: Point) -> dict[str, Callable[[], Any]]:
    """What a row holds, ready to run."""
    if point.kind == "tokens":
        return layer.of_tokens(point.count)
    if point.kind == "sequences":
        return layer.of_sequences(point.count)
    if point.kind == "decode":
        return {"attn_decode": layer.attention.decode(point.count, point.context), WRITE: layer.write(point.count)}
    return {"attn_prefill": layer.attention.prefill(point.count, point.context), WRITE: layer.write(point.count)}


def _bytes(point: Point, model: DenseModel) -> int:
    """Keys and values of an attention call; 0 for what is small."""
    requests = point.count if point.kind == "decode" else 1
    keys = point.context + (1 if point.kind == "decode" else point.count)
    return requests * keys * 2 * model.kv_heads * model.head_dim * 2 * BYTES if point.kind in ("decode", "prefill") else 0


def description(machine: Machine, model: DenseModel, attention: str) -> dict[str, Any]:
    """What must be the same for rows to stand in one file."""
    return {
        "device": machine.name,
        "memory_bytes": machine.memory,
        "torch": str(machine.torch.__version__),
        "cuda": str(machine.torch.version.cuda or "none"),
        "attention": attention,
        "dtype": str(machine.dtype).removeprefix("torch."),
        "fused": machine.fused,
        "model": model.title,
        "sizes": model.shape,
        "head_dim": model.head_dim,
    }


def measure(
    model: DenseModel,
    folder: Path,
    reach: Reach,
    *,
    deadline: float,
    device: Device = "auto",
    attention: Attention = "auto",
    repeats: int = REPEATS,
    resume: bool = False,
    begun: Callable[[int], Callable[[str], None]] = lambda total: lambda name: None,
) -> Measured:
    """Measure the points of the plan until the deadline; each row is on disk before the next.

    Args:
        folder: where the files are; with ``resume`` what they hold is kept.
        deadline: of ``time.monotonic``.
        repeats: most of each kernel.
        begun: called with the number of points to measure; what it returns is called before each with its name.

    Raises:
        ConfigError: no such device or attention; with ``resume``, files of another machine, model or version.
        MissingExtraError: PyTorch is not installed.
    """
    started = time.monotonic()
    machine = Machine.find(device)
    layer = Layer(machine, model, attention)
    what = description(machine, model, layer.attention.name)
    if resume:
        check_same_settings(folder / META, what)
    folder.mkdir(parents=True, exist_ok=True)
    if not resume:
        write_settings(folder / META, what | _told(machine, what, repeats))
    clock = Clock(machine.torch, machine.device, repeats)
    most = int(SHARE * machine.memory) if machine.memory else HOST_BYTES
    with ProfileFiles(folder, model, layer.attention.name, resume=resume) as files, machine.torch.inference_mode():
        missing = [point for point in plan(reach) if not files.holds(point)]
        fitting = [point for point in missing if _bytes(point, model) <= most]
        left = _measure(layer, clock, files, fitting, deadline, begun(len(fitting)))
        return Measured(files.count, left, len(missing) - len(fitting), time.monotonic() - started)


def _measure(layer: Layer, clock: Clock, files: ProfileFiles, points: Iterable[Point], deadline: float, show: Callable[[str], None]) -> int:
    """How many points the deadline left out."""
    left = 0
    for point in points:
        if time.monotonic() >= deadline:
            left += 1
            continue
        show(f"{point.kind} {point.count}" + (f" at {point.context}" if point.context else ""))
        files.append(point, {name: clock.times(call) for name, call in _calls(layer, point).items()})
    return left


def _told(machine: Machine, what: Mapping[str, Any], repeats: int) -> dict[str, Any]:
    """What a reader of the calibration must know, as the importer looks for it."""
    fused = "compiled by Triton" if machine.fused else "PyTorch's own, one after the other"
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {
        "date": date,
        "source": f"llmsched calibrate kernels, {date}",
        "licence": "measured here",
        "engine": f"none: kernels of PyTorch {what['torch']} (CUDA {what['cuda']}), {what['attention']} attention, {what['dtype']}",
        "notes": f"Medians of {LEAST_REPEATS} to {max(repeats, LEAST_REPEATS)} repeats, caches written over before each. "
        f"Norms, rope and activation are {fused}.",
    }
