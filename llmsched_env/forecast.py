"""What an operator knows before the first request: output tokens to expect, load and capacity."""

from __future__ import annotations

import math

import numpy as np

from llmsched_env.engine_config import EngineConfig
from llmsched_env.fluid import equilibrium_of, stability_boundary
from llmsched_env.records import Record, Vector
from llmsched_env.types import FloatArray, LengthStatistics, QueueLayout


class Forecast(Record):
    """Of one workload at one rate on one engine; the shares as ``llmsched_env.observation`` shows them, each in [0, 1]."""

    capacity_share: float  # log2(KV capacity in tokens) / 24
    rho_share: float  # rho / 2
    memory_share: float  # M* / C / 2
    load_share: float  # rate / (2 * stability boundary)
    boundary_rate: float  # stability boundary, requests/s
    capacity_tokens: float  # C
    by_class: Vector  # (J,) E[output | class]
    remaining: Vector  # (Q,) tokens that a resident of the segment still generates
    expected: Vector  # E[output | output > g] for g = 0, 1, ...


def make_forecast(statistics: LengthStatistics, rate: float, engine: EngineConfig, layout: QueueLayout) -> Forecast:
    """The forecast from length statistics, ``rate`` in requests/s and the engine."""
    forecast = Forecast(
        by_class=expected_output_by_class(statistics, layout),
        remaining=np.ascontiguousarray(expected_remaining(statistics, layout).ravel()),
        expected=expected_output(statistics),
    )
    boundary = stability_boundary(statistics, engine)
    equilibrium = equilibrium_of(statistics, rate, engine)
    shares = [
        math.log2(engine.kv_capacity_tokens) / 24.0,
        equilibrium.rho / 2.0,
        equilibrium.kv_tokens / engine.kv_capacity_tokens / 2.0,
        rate / (2.0 * boundary),
    ]
    clipped = np.clip(np.nan_to_num(shares, nan=1.0, posinf=1.0), 0.0, 1.0)
    forecast.capacity_share, forecast.rho_share, forecast.memory_share, forecast.load_share = clipped
    forecast.boundary_rate, forecast.capacity_tokens = boundary, engine.kv_capacity_tokens
    return forecast


def expected_output(statistics: LengthStatistics) -> FloatArray:
    """(max_output + 1,) E[output | output > g] for g = 0, 1, ...; g + 1 where nothing longer is known."""
    mean, above = _tails(statistics.output, statistics.weight, statistics.max_output)
    lengths = np.arange(statistics.max_output + 1, dtype=np.float64)
    return np.where(above > 1e-12, mean, lengths + 1)


def expected_output_by_class(statistics: LengthStatistics, layout: QueueLayout) -> FloatArray:
    """(J,) E[output | class]; where the statistics know no request of the class, as ``classes_of`` says."""
    return np.array([points.mean_output for points in classes_of(statistics, layout)])


def expected_remaining(statistics: LengthStatistics, layout: QueueLayout) -> FloatArray:
    """(J, K) tokens a resident of class j inside segment k still generates, on average over the segment.

    E[output - g | output > g] weighted by P(output > g), how often a resident is seen at g, over the
    lengths g of the segment; 1 where no request of the class gets there.
    """
    out = np.ones((layout.num_classes, layout.num_segments))
    bounds = [0, *layout.segment_ends, max(statistics.max_output, 1)]
    for j, points in enumerate(classes_of(statistics, layout)):
        mean, above = _tails(points.output, points.weight, statistics.max_output)
        rest = (mean - np.arange(mean.size)) * above
        for k in range(layout.num_segments):
            part = slice(bounds[k], max(bounds[k + 1], bounds[k] + 1))
            seen = above[part].sum()
            if seen > 1e-12:
                out[j, k] = rest[part].sum() / seen
    return out


def classes_of(statistics: LengthStatistics, layout: QueueLayout) -> list[LengthStatistics]:
    """The statistics of each class.

    Where none of a class is known: for a bucket by prompt length, as buckets may be finer than the
    statistics, the requests whose prompts come nearest (by ratio) to its middle; else all requests.
    """
    index = layout.classify(statistics.prompt, statistics.output, statistics.type_id, statistics.tenant, statistics.predicted)
    middle = middles(statistics, layout) if layout.by == "prompt" else None
    found = []
    for j in range(layout.num_classes):
        chosen = index == j
        if middle is not None and not statistics.weight[chosen].sum() > 0:
            distance = np.abs(np.log(statistics.prompt / middle[j]))
            chosen = (distance == distance[statistics.weight > 0].min()) & (statistics.weight > 0)
        if statistics.weight[chosen].sum() > 0:
            found.append(LengthStatistics.of(statistics.prompt[chosen], statistics.output[chosen], statistics.weight[chosen]))
        else:
            found.append(statistics)
    return found


def middles(statistics: LengthStatistics, layout: QueueLayout) -> FloatArray:
    """(J,) middle of each bucket by prompt length, tokens; the last one ends at the longest prompt known."""
    last = layout.edges[-1] if layout.edges else 0
    bounds = np.array([1.0, *layout.edges, max(float(statistics.prompt.max()), last + 1.0)])
    found: FloatArray = (bounds[:-1] + bounds[1:]) / 2
    return found


def class_work(statistics: LengthStatistics, layout: QueueLayout) -> FloatArray:
    """(J,) mean KV x iterations of a request of each class (tokens x iterations): l'(l + l'/2).

    What a request takes of the scarce good: serving the least first is shortest-job-first for memory.
    """
    work = statistics.output * (statistics.prompt + statistics.output / 2)
    weight = class_weights(statistics, layout)
    found: FloatArray = weight @ work
    return found


def class_weights(statistics: LengthStatistics, layout: QueueLayout) -> FloatArray:
    """(J, M) weight of every support point in the lengths of each class, rows sum to 1.

    Buckets by prompt may be finer than the statistics. So points count by how near their prompt is to
    the bucket's middle (Gaussian, 15 % of its length); other classes have their own points. 5 % of
    every class are all requests, as few points stand for it.
    """
    j = np.arange(layout.num_classes)[:, None]
    if layout.by == "prompt" and layout.edges:
        middle = np.log(middles(statistics, layout))[:, None]
        near = -0.5 * ((np.log(statistics.prompt)[None, :] - middle) / 0.15) ** 2
        own = statistics.weight * np.exp(near - near.max(axis=1, keepdims=True))
    else:
        index = layout.classify(statistics.prompt, statistics.output, statistics.type_id, statistics.tenant, statistics.predicted)
        own = np.where(index[None, :] == j, statistics.weight, 0.0)
    mass = own.sum(axis=1, keepdims=True)
    own = np.where(mass > 0, own / np.where(mass > 0, mass, 1.0), statistics.weight)
    weights: FloatArray = 0.95 * own + 0.05 * statistics.weight
    return weights


def _tails(output: FloatArray, weight: FloatArray, longest: int) -> tuple[FloatArray, FloatArray]:
    """E[output | output > g] (0 where impossible) and P(output > g) for g = 0 .. longest."""
    order = np.argsort(output, kind="stable")
    values, mass = output[order], weight[order]
    above = np.concatenate([np.cumsum(mass[::-1])[::-1], [0.0]])
    tokens = np.concatenate([np.cumsum((mass * values)[::-1])[::-1], [0.0]])
    first = np.searchsorted(values, np.arange(longest + 1, dtype=np.float64), side="right")
    known = above[first] > 1e-12
    return np.where(known, tokens[first] / np.where(known, above[first], 1.0), 0.0), above[first]
