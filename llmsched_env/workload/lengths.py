"""Length models: how many tokens a request's prompt and output have.

A model samples (prompt, output, type) arrays and states its own distribution as a
``LengthStatistics``, the discretised form from which the fluid model and the policies read.
Sampled lengths are integers >= 1.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from llmsched_env.errors import ConfigError
from llmsched_env.types import FloatArray, IntArray, LengthStatistics
from llmsched_env.workload.arrivals import check_count, check_positive

MAX_SUPPORT = 600
"""Most support points of the statistics of one model."""


class LengthModel(ABC):
    """A joint distribution of prompt and output lengths."""

    @abstractmethod
    def sample(self, rng: np.random.Generator, n: int) -> tuple[IntArray, IntArray, IntArray]:
        """``n`` independent requests: (n,) int32 prompt tokens, output tokens and type ids."""

    @abstractmethod
    def statistics(self) -> LengthStatistics:
        """The distribution on at most ``MAX_SUPPORT`` points."""


def whole_tokens(
    prompt: npt.NDArray[Any], output: npt.NDArray[Any], max_total: int | None, low: int = 1
) -> tuple[IntArray, IntArray, IntArray]:
    """Round to whole tokens >= ``low``, cut the output (then the prompt) so that their sum is <= ``max_total``; type 0."""
    p = np.maximum(np.rint(prompt), low)
    o = np.maximum(np.rint(output), low)
    if max_total is not None:
        p = np.minimum(p, max_total - low)
        o = np.minimum(o, max_total - p)
    return p.astype(np.int32), o.astype(np.int32), np.zeros(p.shape, np.int32)


def grouped_statistics(prompt: npt.ArrayLike, output: npt.ArrayLike, type_id: npt.ArrayLike, source: str) -> LengthStatistics:
    """Statistics of given rows, (n,) each.

    Exact where there are at most ``MAX_SUPPORT`` distinct rows. Otherwise the rows of each type are
    sorted by prompt into equal groups, each group by output into equal cells, and a cell stands as
    its two means: overall means are kept exactly, the spread within a cell is lost.
    """
    rows = np.stack([np.asarray(type_id), np.asarray(prompt), np.asarray(output)], axis=1).astype(np.int64)
    distinct, counts = np.unique(rows, axis=0, return_counts=True)
    if distinct.shape[0] <= MAX_SUPPORT:
        return LengthStatistics.of(distinct[:, 1], distinct[:, 2], counts, distinct[:, 0], source)
    types = np.unique(rows[:, 0])
    per_type = MAX_SUPPORT // types.size
    if per_type < 1:
        raise ConfigError(f"lengths.type_id: {types.size} types, must be at most {MAX_SUPPORT}")
    num_outputs = max(1, min(30, math.isqrt(per_type)))
    num_prompts = max(1, per_type // num_outputs)
    points: list[tuple[float, float, float, int]] = []
    for t in types:
        mine = rows[rows[:, 0] == t]
        for group in np.array_split(mine[np.argsort(mine[:, 1], kind="stable")], num_prompts):
            for cell in np.array_split(group[np.argsort(group[:, 2], kind="stable")], num_outputs):
                if cell.size:
                    points.append((float(cell[:, 1].mean()), float(cell[:, 2].mean()), float(cell.shape[0]), int(t)))
    p, o, w, ids = zip(*points, strict=True)
    return LengthStatistics.of(p, o, w, ids, source)


@dataclass(frozen=True, slots=True)
class Types(LengthModel):
    """A finite list of request types with fixed lengths; type j is drawn with probability weight[j] / sum.

    Attributes:
        prompt, output: tokens of each type, integers >= 1.
        weight: relative frequency (the paper's lambda_j will do), >= 0 and not all 0.
    """

    prompt: tuple[int, ...]
    output: tuple[int, ...]
    weight: tuple[float, ...]

    def __post_init__(self) -> None:
        sizes = {len(self.prompt), len(self.output), len(self.weight)}
        if sizes != {len(self.prompt)} or not 1 <= len(self.prompt) <= MAX_SUPPORT:
            raise ConfigError(
                f"lengths: {len(self.prompt)} prompts, {len(self.output)} outputs, {len(self.weight)} weights, "
                f"must be as many, 1 to {MAX_SUPPORT}"
            )
        for name in ("prompt", "output"):
            for j, value in enumerate(getattr(self, name)):
                check_count(f"lengths.{name}[{j}]", value, low=1)
        for j, value in enumerate(self.weight):
            if value != 0:
                check_positive(f"lengths.weight[{j}]", value, "(relative frequency)")
        if not sum(self.weight) > 0:
            raise ConfigError(f"lengths.weight: {self.weight}, at least one must be > 0")

    def sample(self, rng: np.random.Generator, n: int) -> tuple[IntArray, IntArray, IntArray]:
        edges = np.cumsum(np.asarray(self.weight, dtype=np.float64))
        u = rng.random(check_count("n", n)) * edges[-1]
        # `right` skips types of weight 0; the product may round up to the last edge.
        last = int(np.flatnonzero(self.weight)[-1])
        ids = np.minimum(np.searchsorted(edges, u, side="right"), last).astype(np.int32)
        return np.asarray(self.prompt, np.int32)[ids], np.asarray(self.output, np.int32)[ids], ids

    def statistics(self) -> LengthStatistics:
        return LengthStatistics.of(self.prompt, self.output, self.weight, np.arange(len(self.prompt)), "fixed types")


@dataclass(frozen=True, slots=True)
class Lognormal(LengthModel):
    """Lognormal prompt and output with correlated logarithms; lengths above a maximum are cut to it.

    Attributes:
        prompt_mean, output_mean: mean tokens before the cut, > 0.
        prompt_sigma, output_sigma: standard deviation of the natural logarithm, >= 0.
        max_prompt, max_output: largest length (tokens).
        correlation: of the two logarithms, in [-1, 1].
        max_total: largest prompt + output, or None; the output is cut.
    """

    prompt_mean: float
    prompt_sigma: float
    output_mean: float
    output_sigma: float
    max_prompt: int = 2048
    max_output: int = 2048
    correlation: float = 0.0
    max_total: int | None = None

    def __post_init__(self) -> None:
        for name in ("prompt_mean", "output_mean"):
            check_positive(f"lengths.{name}", getattr(self, name), "tokens")
        for name in ("prompt_sigma", "output_sigma"):
            if not 0.0 <= getattr(self, name) <= 10.0:
                raise ConfigError(f"lengths.{name}: {getattr(self, name)}, must be in [0, 10]")
        for name in ("max_prompt", "max_output"):
            check_count(f"lengths.{name}", getattr(self, name), low=1)
        if not -1.0 <= self.correlation <= 1.0:
            raise ConfigError(f"lengths.correlation: {self.correlation}, must be in [-1, 1]")
        if self.max_total is not None:
            check_count("lengths.max_total", self.max_total, low=2)

    def _lengths(self, z_prompt: FloatArray, z_other: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Two independent standard normals to (cut) lengths."""
        z_output = self.correlation * z_prompt + math.sqrt(1.0 - self.correlation**2) * z_other
        prompt = np.exp(math.log(self.prompt_mean) - self.prompt_sigma**2 / 2 + self.prompt_sigma * z_prompt)
        output = np.exp(math.log(self.output_mean) - self.output_sigma**2 / 2 + self.output_sigma * z_output)
        return np.minimum(prompt, self.max_prompt), np.minimum(output, self.max_output)

    def sample(self, rng: np.random.Generator, n: int) -> tuple[IntArray, IntArray, IntArray]:
        z = rng.standard_normal((check_count("n", n), 2))  # row by row: more requests keep the first ones
        return whole_tokens(*self._lengths(z[:, 0], z[:, 1]), self.max_total)

    def statistics(self) -> LengthStatistics:
        """20 prompt by 30 output cells of equal probability, each by its mean over a finer grid of midpoints."""
        cells, fine = (20, 30), 20
        normal = NormalDist()

        def grid(n: int) -> FloatArray:
            return np.array([normal.inv_cdf((i + 0.5) / n) for i in range(n)])

        z_prompt, z_other = grid(cells[0] * fine), grid(cells[1] * fine)
        # Within a prompt cell the fine prompts and fine outputs are crossed: (400, 600) points.
        prompt, output = self._lengths(z_prompt[:, None], z_other[None, :])
        prompt, output = np.broadcast_arrays(prompt, output)
        p, o, _ = whole_tokens(prompt, output, self.max_total)
        shape = (cells[0], fine, cells[1], fine)
        means = [a.reshape(shape).mean(axis=(1, 3)).ravel() for a in (p, o)]
        return LengthStatistics.of(means[0], means[1], np.ones(means[0].size), source="lognormal lengths")


@dataclass(frozen=True, slots=True, eq=False)
class TraceLengths(LengthModel):
    """Rows of a trace, sampled with replacement.

    Attributes:
        prompt_tokens, output_tokens: (n,) integers >= 1.
        type_id: (n,) integers >= 0, or None for one type.
        source: where the rows come from.
    """

    prompt_tokens: IntArray
    output_tokens: IntArray
    type_id: IntArray | None = None
    source: str = "trace rows"

    def __post_init__(self) -> None:
        n = np.shape(self.prompt_tokens)
        if len(n) != 1 or not n[0]:
            raise ConfigError(f"lengths.prompt_tokens: shape {n}, must be one-dimensional and not empty")
        types = np.zeros(n, np.int32) if self.type_id is None else self.type_id
        for name, values, low in (
            ("prompt_tokens", self.prompt_tokens, 1),
            ("output_tokens", self.output_tokens, 1),
            ("type_id", types, 0),
        ):
            array = np.asarray(values)
            if array.shape != n:
                raise ConfigError(f"lengths.{name}: shape {array.shape}, must be {n} as prompt_tokens has")
            bad = np.flatnonzero(~((array >= low) & (array <= 2**30)))
            if bad.size:
                raise ConfigError(f"lengths.{name}: row {bad[0]} is {array[bad[0]]}, must be an integer from {low} to 2**30")
            copy = array.astype(np.int32)
            copy.flags.writeable = False
            object.__setattr__(self, name, copy)

    def sample(self, rng: np.random.Generator, n: int) -> tuple[IntArray, IntArray, IntArray]:
        rows = rng.integers(0, self.prompt_tokens.size, check_count("n", n))
        assert self.type_id is not None  # set by __post_init__
        return self.prompt_tokens[rows], self.output_tokens[rows], self.type_id[rows]

    def statistics(self) -> LengthStatistics:
        assert self.type_id is not None
        return grouped_statistics(self.prompt_tokens, self.output_tokens, self.type_id, self.source)
