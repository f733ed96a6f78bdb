"""Predictions of output lengths, and how they err.

A predictor tells each request's output length when the request arrives. ``PredictionModel`` is its error: on the scale of
logarithms a line through ``pivot`` with noise around it::

    log(predicted) = log(factor * pivot) + slope * log(output / pivot) + sigma * noise

``sigma`` is the noise, standard normal or, with ``tail``, of Student's t distribution. ``factor`` is a bias by type of request;
a ``slope`` below 1 is the bias of a predictor that says "as usual": short outputs come out too long, long ones too short.
Predictions are whole tokens, at least 1.

Draws have a random stream of their own, so a seed gives the same requests with predictions and without.

An operator has logs of predicted and actual lengths. ``statistics`` stands for them: it splits every support point of the
length statistics into ``NODES`` of equal probability, each with what is then predicted (``LengthStatistics.predicted``); whatever
classifies support points or averages over them then knows the joint distribution of true and predicted lengths.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from statistics import NormalDist
from typing import Any

import numpy as np

from llmsched_env import checks
from llmsched_env.errors import ConfigError, did_you_mean
from llmsched_env.types import FloatArray, IntArray, LengthStatistics, Workload

NODES = 16
"""Predictions that stand for all those of one support point."""

MOST_SIGMA = 10.0
MOST_FACTOR = 1e3


@dataclass(frozen=True, slots=True)
class PredictionModel:
    """The error of a predictor of output lengths.

    Attributes:
        sigma: scale of the noise on the logarithm, 0 to ``MOST_SIGMA``; 0 for none.
        factor: predicted over actual, by type id: one number for all types, or one for each.
        slope: of log(predicted) over log(output), 0 to 2.
        pivot: tokens at which the slope does not matter.
        tail: degrees of freedom of the noise, above 0; infinite for normal noise, the smaller the heavier its tails.

    Raises:
        ConfigError: a field out of range.
    """

    sigma: float = 0.6
    factor: tuple[float, ...] = (1.0,)
    slope: float = 1.0
    pivot: float = 200.0
    tail: float = math.inf

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "sigma", checks.number("predictions.sigma", self.sigma, high=MOST_SIGMA))
        given: Any = self.factor
        factors = tuple(given) if isinstance(given, list | tuple) else (given,)
        if not factors:
            raise ConfigError("predictions.factor: (), must be one number or one for each type")
        checked = tuple(checks.number("predictions.factor", factor, low=1 / MOST_FACTOR, high=MOST_FACTOR) for factor in factors)
        put(self, "factor", checked)
        put(self, "slope", checks.number("predictions.slope", self.slope, high=2.0))
        put(self, "pivot", checks.number("predictions.pivot", self.pivot, low=1.0, high=1e6, unit="tokens"))
        put(self, "tail", checks.number("predictions.tail", self.tail, high=math.inf, open_low=True))

    @classmethod
    def of(cls, given: Any) -> PredictionModel | None:
        """A model from what people write: a model, its fields, ``sigma`` alone, or None.

        Raises:
            ConfigError: something else, an unknown field or one out of range.
        """
        if given is None or isinstance(given, cls):
            return given
        if isinstance(given, Mapping):
            allowed = tuple(f.name for f in fields(cls))
            for name in given:
                if name not in allowed:
                    hint = did_you_mean(str(name), allowed)
                    raise ConfigError(f"predictions.{name}: unknown field{hint} (allowed: {', '.join(allowed)})")
            return cls(**given)
        return cls(checks.number("predictions", given, high=MOST_SIGMA))

    @classmethod
    def fitted(cls, output: IntArray, predicted: IntArray) -> PredictionModel:
        """The model whose line and normal noise fit recorded pairs, (n,) tokens each, by least squares."""
        x, y = np.log(np.asarray(output, dtype=np.float64)), np.log(np.asarray(predicted, dtype=np.float64))
        spread = float(np.var(x))
        slope = float(np.mean((x - x.mean()) * (y - y.mean()))) / spread if spread > 0 else 1.0
        slope = min(max(slope, 0.0), 2.0)
        pivot = math.exp(float(x.mean()))
        noise = float(np.std(y - slope * x))
        factor = math.exp(float(y.mean()) - math.log(pivot))
        return cls(min(noise, MOST_SIGMA), (min(max(factor, 1 / MOST_FACTOR), MOST_FACTOR),), slope, pivot)

    def centre(self, output: FloatArray, type_id: IntArray) -> FloatArray:
        """(n,) log of what is predicted without noise.

        Raises:
            ConfigError: a type without a factor.
        """
        last = int(type_id.max()) if type_id.size else 0
        if len(self.factor) > 1 and last >= len(self.factor):
            raise ConfigError(f"predictions.factor: {len(self.factor)} factors, must be one, or one for each of {last + 1} types")
        factors = np.log(self.factor)
        bias = factors[np.minimum(type_id, len(self.factor) - 1)] + math.log(self.pivot)
        found: FloatArray = bias + self.slope * (np.log(output) - math.log(self.pivot))
        return found

    def draw(self, rng: np.random.Generator, output: IntArray, type_id: IntArray) -> IntArray:
        """(n,) int32 predictions of (n,) output lengths."""
        noise = rng.standard_normal(output.shape) if self.tail == math.inf else rng.standard_t(self.tail, output.shape)
        return _whole(self.centre(output.astype(np.float64), type_id) + self.sigma * noise)

    def predict(self, workload: Workload, seed: np.random.SeedSequence | int) -> Workload:
        """The same requests with predictions, drawn from a stream that a workload of this seed uses for nothing else."""
        root = seed if isinstance(seed, np.random.SeedSequence) else np.random.SeedSequence(checks.integer("seed", seed))
        rng = np.random.default_rng(prediction_stream(root))
        return replace(workload, predicted_tokens=self.draw(rng, workload.output_tokens, workload.type_id))

    def statistics(self, lengths: LengthStatistics) -> LengthStatistics:
        """The joint distribution of prompt, output and predicted output, on ``NODES`` times as many points."""
        nodes = 1 if self.sigma == 0.0 else NODES
        centre = np.repeat(self.centre(lengths.output, lengths.type_id), nodes)
        noise = np.tile(noise_quantiles(self.tail, nodes), lengths.output.size)
        return LengthStatistics(
            np.repeat(lengths.prompt, nodes),
            np.repeat(lengths.output, nodes),
            np.repeat(lengths.weight / nodes, nodes),
            np.repeat(lengths.type_id, nodes),
            lengths.source,
            None if lengths.tenant is None else np.repeat(lengths.tenant, nodes),
            lengths.tenants,
            _whole(centre + self.sigma * noise).astype(np.float64),
        )


def prediction_stream(root: np.random.SeedSequence) -> np.random.SeedSequence:
    """The stream of predictions beside the streams that ``root`` spawns; ``root`` stays as it is."""
    return np.random.SeedSequence(root.entropy, spawn_key=(*root.spawn_key, 2**31), pool_size=root.pool_size)


def noise_quantiles(tail: float, count: int) -> FloatArray:
    """(count,) medians of ``count`` parts of equal probability of the noise, in increasing order."""
    shares = (np.arange(count) + 0.5) / count
    if tail == math.inf:
        return np.array([NormalDist().inv_cdf(share) for share in shares.tolist()])
    # With x = sqrt(tail) tan(u) the density of Student's t is cos(u) ** (tail - 1) on a bounded interval.
    angles = np.linspace(-math.pi / 2, math.pi / 2, 20_001)
    middles = (angles[:-1] + angles[1:]) / 2
    mass = np.concatenate([[0.0], np.cumsum(np.cos(middles) ** (tail - 1.0))])
    found: FloatArray = math.sqrt(tail) * np.tan(np.interp(shares, mass / mass[-1], angles))
    return found


def _whole(logarithm: FloatArray) -> IntArray:
    """Whole tokens, from 1 to the most that a request can have."""
    tokens = np.exp(np.minimum(logarithm, math.log(checks.MOST_TOKENS)))
    return np.clip(np.rint(tokens), 1, checks.MOST_TOKENS).astype(np.int32)
