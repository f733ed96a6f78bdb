"""Empirical lengths without rows: joint quantile tables and the JSON files that hold them.

A table is a quantile function of the prompt and, for each of several bins of prompt quantile, a
quantile function of the output. The files in ``workload/statistics`` hold such tables, or a published
summary from which one is built, each with its source. No row of a trace is in them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmsched_env.compiled import compiled
from llmsched_env.errors import ConfigError
from llmsched_env.types import FloatArray, IntArray, LengthStatistics
from llmsched_env.workload.arrivals import check_count
from llmsched_env.workload.lengths import MAX_SUPPORT, LengthModel, whole_tokens


def _levels(field_name: str, values: npt.ArrayLike) -> FloatArray:
    levels = np.array(values, dtype=np.float64)
    if levels.ndim != 1 or levels.size < 2 or levels[0] != 0 or levels[-1] != 1 or not np.all(np.diff(levels) > 0):
        raise ConfigError(f"lengths.{field_name}: must increase from 0 to 1")
    return levels


def _quantiles(field_name: str, values: npt.ArrayLike, shape: tuple[int, ...]) -> FloatArray:
    quantiles = np.array(values, dtype=np.float64)
    if quantiles.shape != shape:
        raise ConfigError(f"lengths.{field_name}: shape {quantiles.shape}, must be {shape}")
    if not (np.all(np.isfinite(quantiles)) and np.all(quantiles >= 0.5) and np.all(np.diff(quantiles, axis=-1) >= 0)):
        raise ConfigError(f"lengths.{field_name}: must be finite token counts >= 0.5 that do not decrease")
    return quantiles


@compiled
def _cell(levels, u):  # type: ignore[no-untyped-def]
    """Index i with levels[i] <= u < levels[i + 1]."""
    i = np.int64(u * (levels.shape[0] - 1))  # where it is if the levels are evenly spaced, and near it as they mostly are
    while levels[i] > u:
        i -= 1
    while levels[i + 1] <= u:
        i += 1
    return i


@compiled
def _look_up(uniforms, prompt_levels, prompt_quantiles, bin_edges, output_levels, output_quantiles, prompt, output):  # type: ignore[no-untyped-def]
    """(n, 2) uniforms to tokens, in one pass: an episode's reset in a vector environment is mostly this."""
    for r in range(uniforms.shape[0]):
        u, v = uniforms[r, 0], uniforms[r, 1]
        i = _cell(prompt_levels, u)
        slope = (prompt_quantiles[i + 1] - prompt_quantiles[i]) / (prompt_levels[i + 1] - prompt_levels[i])
        prompt[r] = slope * (u - prompt_levels[i]) + prompt_quantiles[i]
        b = _cell(bin_edges, u)
        c = _cell(output_levels, v)
        share = (v - output_levels[c]) / (output_levels[c + 1] - output_levels[c])
        output[r] = output_quantiles[b, c] + share * (output_quantiles[b, c + 1] - output_quantiles[b, c])


@dataclass(frozen=True, slots=True, eq=False)
class QuantileTable(LengthModel):
    """Joint quantile table with linear interpolation between its points.

    A uniform u gives the prompt; the bin that holds u gives the quantile function of the output.
    Both are rounded to whole tokens.

    Attributes:
        prompt_levels, prompt_quantiles: (A,) levels from 0 to 1, tokens at each.
        bin_edges: (B+1,) prompt levels from 0 to 1 that bound the bins.
        output_levels, output_quantiles: (D,) levels from 0 to 1, (B, D) tokens.
        max_total: largest prompt + output, or None.
        source: where the numbers come from.
        record: the file's other fields (provenance, arrival statistics), as read.
    """

    prompt_levels: FloatArray
    prompt_quantiles: FloatArray
    bin_edges: FloatArray
    output_levels: FloatArray
    output_quantiles: FloatArray
    max_total: int | None = None
    source: str = "quantile table"
    record: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checked = {name: _levels(name, getattr(self, name)) for name in ("prompt_levels", "bin_edges", "output_levels")}
        bins, cells = checked["bin_edges"].size - 1, checked["output_levels"].size - 1
        checked["prompt_quantiles"] = _quantiles("prompt_quantiles", self.prompt_quantiles, checked["prompt_levels"].shape)
        checked["output_quantiles"] = _quantiles("output_quantiles", self.output_quantiles, (bins, cells + 1))
        if bins * cells > MAX_SUPPORT:
            raise ConfigError(f"lengths.output_quantiles: {bins} bins x {cells} cells, must be at most {MAX_SUPPORT}")
        if self.max_total is not None:
            check_count("lengths.max_total", self.max_total, low=2)
        for name, array in checked.items():
            array.flags.writeable = False
            object.__setattr__(self, name, array)

    def sample(self, rng: np.random.Generator, n: int) -> tuple[IntArray, IntArray, IntArray]:
        uniforms = rng.random((check_count("n", n), 2))  # row by row: more requests keep the first ones
        prompt, output = np.empty(n), np.empty(n)
        _look_up(
            uniforms, self.prompt_levels, self.prompt_quantiles, self.bin_edges, self.output_levels, self.output_quantiles, prompt, output
        )
        return whole_tokens(prompt, output, self.max_total)

    def statistics(self) -> LengthStatistics:
        """One point a bin and output cell: the means of prompt and output there, cut by ``max_total``."""
        # Midpoints, 100 a bin: exact where the prompt's levels fall on hundredths of a bin.
        steps, middle = (np.arange(100) + 0.5) / 100, (np.arange(10) + 0.5) / 10
        levels = self.bin_edges[:-1, None] + np.diff(self.bin_edges)[:, None] * steps
        prompt = np.maximum(np.interp(levels, self.prompt_levels, self.prompt_quantiles), 1.0)
        low, high = self.output_quantiles[:, :-1, None], self.output_quantiles[:, 1:, None]
        output = np.maximum(low + (high - low) * middle, 1.0)
        # (bins, prompt midpoints, cells, output midpoints)
        p, o = np.broadcast_arrays(prompt[:, :, None, None], output[:, None, :, :])
        if self.max_total is not None:
            p = np.minimum(p, self.max_total - 1.0)
            o = np.minimum(o, self.max_total - p)
        weight = np.diff(self.bin_edges)[:, None] * np.diff(self.output_levels)[None, :]
        return LengthStatistics.of(p.mean(axis=(1, 3)).ravel(), o.mean(axis=(1, 3)).ravel(), weight.ravel(), source=self.source)

    @classmethod
    def from_summary(
        cls,
        prompt_levels: npt.ArrayLike,
        prompt_quantiles: npt.ArrayLike,
        output_levels: npt.ArrayLike,
        output_quantiles: npt.ArrayLike,
        output_edges: npt.ArrayLike,
        output_fractions: npt.ArrayLike,
        prompt_mean_by_output: npt.ArrayLike,
        max_prompt: int,
        **options: Any,
    ) -> QuantileTable:
        """A joint table from marginal quantiles and the mean prompt in each bin of output length.

        * Prompt: between two printed quantiles a and b the quantile function is a + (b - a) t**g,
          t in [0, 1], with one g for which the mean equals that of ``prompt_mean_by_output``
          (printed quantiles of a skewed law lie far apart: with g = 1 the mean is too large).
        * Output: the cumulated bin fractions at the bin edges; inside the first bin also the printed
          quantiles. What the fractions lack to 1 is the share of outputs of 0 tokens and is removed.
        * Dependence: the probability of output bin d given prompt p is tilted linearly,
          f_d (1 + (m_d - m)(p - m) / var): both margins are kept and E[prompt | bin d] is m_d.

        Args:
            prompt_levels, prompt_quantiles: (A,) printed levels strictly inside (0, 1), multiples of 0.01; tokens.
            output_levels, output_quantiles: (C,) printed levels below the first bin's share; tokens.
            output_edges: (D,) upper (inclusive) edges of the output bins, tokens, increasing.
            output_fractions: (D,) share of all requests in each bin.
            prompt_mean_by_output: (D,) mean prompt (tokens) of the requests in each bin.
            max_prompt: largest prompt (tokens).
            options: ``max_total``, ``source``, ``record``.
        """
        f = np.asarray(output_fractions, dtype=np.float64)
        m_d = np.asarray(prompt_mean_by_output, dtype=np.float64)
        edges = np.asarray(output_edges, dtype=np.float64)
        if not f.shape == m_d.shape == edges.shape or not (np.all(f > 0) and 0 < f.sum() <= 1 + 1e-9):
            raise ConfigError("lengths: output_edges, output_fractions and prompt_mean_by_output must be as many, fractions > 0, sum <= 1")
        zero = max(0.0, 1.0 - float(f.sum()))
        f = f / f.sum()
        mean = float(f @ m_d)

        levels = np.linspace(0.0, 1.0, 101)
        bins = np.linspace(0.0, 1.0, 11)
        known = np.concatenate([[0.0], np.asarray(prompt_levels, dtype=np.float64), [1.0]])
        values = np.concatenate([[1.0], np.asarray(prompt_quantiles, dtype=np.float64), [float(max_prompt)]])
        prompt = _convex_quantiles(levels, known, values, mean)
        p_b = _bin_means(levels, prompt, bins)

        # Output: a length o is drawn where the quantile function lies in [o - 1/2, o + 1/2).
        first = (np.asarray(output_levels, dtype=np.float64) - zero) / (1.0 - zero) / f[0]
        if not np.all((first > 0) & (first < 1)):
            raise ConfigError("lengths.output_levels: must lie inside the first output bin")
        knots = [np.concatenate([[0.0], first, [1.0]])] + [np.array([0.0, 1.0])] * (f.size - 1)
        tokens = np.concatenate([[0.5], np.asarray(output_quantiles, dtype=np.float64), edges + 0.5])
        tilt = 1.0 + np.outer(p_b - mean, m_d - mean) / float(np.mean((p_b - mean) ** 2))
        if np.any(tilt <= 0):
            raise ConfigError("lengths.prompt_mean_by_output: varies too much for a linear dependence")
        out_levels = np.round(np.concatenate([np.arange(0.0, 0.9, 0.02), np.arange(0.9, 1.005, 0.01)]), 2)
        rows = []
        for weight in f * tilt:
            weight = weight / weight.sum()
            start = np.concatenate([[0.0], np.cumsum(weight)[:-1]])
            cdf = np.concatenate([[0.0]] + [s + w * k[1:] for s, w, k in zip(start, weight, knots, strict=True)])
            cdf[-1] = 1.0
            rows.append(np.interp(out_levels, cdf, tokens))
        # The highest edge itself is a length, the half token above it is not.
        outputs = np.minimum(np.stack(rows), edges[-1])
        return cls(levels, prompt, bins, out_levels, outputs, **options)


def _bin_means(levels: FloatArray, quantiles: FloatArray, edges: FloatArray) -> FloatArray:
    grid = np.union1d(levels, edges)
    values = np.interp(grid, levels, quantiles)
    integral = np.concatenate([[0.0], np.cumsum(np.diff(grid) * (values[1:] + values[:-1]) / 2)])
    means: FloatArray = np.diff(np.interp(edges, grid, integral)) / np.diff(edges)
    return means


def _convex_quantiles(levels: FloatArray, known: FloatArray, values: FloatArray, mean: float) -> FloatArray:
    """The quantile function through (known, values) with the curvature g that gives it ``mean``; see ``from_summary``."""
    segment = np.clip(np.searchsorted(known, levels + 1e-9, side="right") - 1, 0, known.size - 2)
    t = np.clip((levels - known[segment]) / (known[segment + 1] - known[segment]), 0.0, 1.0)

    def at(g: float) -> FloatArray:
        return values[segment] + (values[segment + 1] - values[segment]) * t**g

    low, high = 0.05, 20.0
    whole = np.array([0.0, 1.0])
    if not _bin_means(levels, at(high), whole)[0] <= mean <= _bin_means(levels, at(low), whole)[0]:
        raise ConfigError(f"lengths: no prompt distribution with the printed quantiles has the printed mean {mean:.1f}")
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _bin_means(levels, at(middle), whole)[0] > mean else (low, middle)
    return at((low + high) / 2)


def load_lengths(name_or_file: str) -> QuantileTable:
    """Read a table from a JSON file, or by the name of one in ``workload/statistics``.

    Two forms: ``"form": "joint"`` holds the arrays of ``QuantileTable``; ``"form": "summary"`` the
    arguments of ``QuantileTable.from_summary``.

    Raises:
        ConfigError: unreadable, not JSON, or a field missing or out of range.
    """
    try:
        if name_or_file.endswith(".json"):
            text = Path(name_or_file).read_text(encoding="utf-8")
        else:
            text = (resources.files("llmsched_env.workload") / "statistics" / f"{name_or_file}.json").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"lengths {name_or_file!r}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    try:
        record: dict[str, Any] = json.loads(text)
        forms: dict[str, Callable[..., QuantileTable]] = {"joint": QuantileTable, "summary": QuantileTable.from_summary}
        build = forms[record["form"]]
        rest = {key: value for key, value in record.items() if key != "table"}
        return build(**record["table"], source=str(record["provenance"]["source"]), record=rest)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise ConfigError(f"lengths {name_or_file!r}: {error}") from error
        raise ConfigError(f"lengths {name_or_file!r}: not a length table ({type(error).__name__}: {error})") from error
