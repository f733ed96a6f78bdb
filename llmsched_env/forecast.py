"""Output tokens to expect, from the length statistics an operator knows."""

from __future__ import annotations

import numpy as np

from llmsched_env.types import FloatArray, LengthStatistics, QueueLayout


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
    index = layout.classify(statistics.prompt, statistics.output, statistics.type_id)
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


def _tails(output: FloatArray, weight: FloatArray, longest: int) -> tuple[FloatArray, FloatArray]:
    """E[output | output > g] (0 where impossible) and P(output > g) for g = 0 .. longest."""
    order = np.argsort(output, kind="stable")
    values, mass = output[order], weight[order]
    above = np.concatenate([np.cumsum(mass[::-1])[::-1], [0.0]])
    tokens = np.concatenate([np.cumsum((mass * values)[::-1])[::-1], [0.0]])
    first = np.searchsorted(values, np.arange(longest + 1, dtype=np.float64), side="right")
    known = above[first] > 1e-12
    return np.where(known, tokens[first] / np.where(known, above[first], 1.0), 0.0), above[first]
