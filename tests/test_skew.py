"""The correction for decodes of unequal contexts: the compiled model against the formula in plain Python, and refusals."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as hs
from test_mixed_attention import MODEL, tables

from llmsched_env.errors import ConfigError
from llmsched_env.perf import Batch, load_calibration, save_calibration
from llmsched_env.perf.mixed_attention import MixedAttentionTime
from llmsched_env.perf.skew import READINGS
from llmsched_hardware.calibration.batches import Chunk, batch_of

EDGES: dict[str, list[float]] = {
    "skew_chunk": [0, 16, 64],
    "skew_decodes": [2, 4, 16],
    "skew_rate": [0.05, 0.15, 0.4, 0.7],
    "skew_longest": [128, 512],
    "skew_context": [0, 64],
}
ALPHA = np.random.default_rng(0).uniform(-0.2, 1.5, [len(edges) + 1 for edges in EDGES.values()])


def skewed(reading: str = "range", **changes: Any) -> MixedAttentionTime:
    return tables(**{**EDGES, "skew": ALPHA, "skew_reading": reading, **changes})


def uniform(batch: Batch, longest: float) -> Batch:
    """The same batch with every decode as long as the longest."""
    return dataclasses.replace(batch, decode_kv=batch.decodes * longest)


def cell(edges: list[float], x: float) -> int:
    """Labels as ``n<=8``: the upper edge belongs to the cell."""
    return next((i for i, edge in enumerate(edges) if x <= edge), len(edges))


def formula(decodes: list[int], chunks: list[Chunk], reading: str) -> float:
    """Seconds by ``_lookup_attention_with_skew`` and ``_skew_alpha`` of LLMServingSim's ``trace_generator.py``, means not rounded."""
    batch = batch_of(decodes, chunks)
    t_mean = MODEL.seconds(batch)
    if len(decodes) <= 1 or max(decodes) == min(decodes):
        return t_mean
    mean, longest, shortest = float(np.mean(decodes)), max(decodes), min(decodes)
    chunk, context = sum(c.tokens for c in chunks), sum(c.context for c in chunks)
    if reading == "range":
        share = (mean - shortest) / (longest - shortest)
        i = EDGES["skew_chunk"].index(chunk) if chunk in EDGES["skew_chunk"] else len(EDGES["skew_chunk"])
    else:
        variance = float(np.var(decodes))
        share = variance / (variance + (longest - mean) ** 2)
        i = cell(EDGES["skew_chunk"], chunk)
    alpha = ALPHA[
        i,
        cell(EDGES["skew_decodes"], len(decodes)),
        cell(EDGES["skew_rate"], share),
        cell(EDGES["skew_longest"], longest),
        cell(EDGES["skew_context"], context),
    ]
    t_max = MODEL.seconds(uniform(batch, longest + 1.0))
    return t_mean if t_max <= t_mean else float(t_mean + alpha * (t_max - t_mean))


def away_from_edges(decodes: list[int]) -> bool:
    """Whether rounding cannot move the share of long decodes over an edge."""
    mean, longest, shortest, variance = np.mean(decodes), max(decodes), min(decodes), np.var(decodes)
    if longest == shortest:
        return True
    shares = ((mean - shortest) / (longest - shortest), variance / (variance + (longest - mean) ** 2))
    return all(abs(share - edge) > 1e-9 for share in shares for edge in EDGES["skew_rate"])


@pytest.mark.parametrize("reading", READINGS)
@given(
    decodes=hs.lists(hs.integers(16, 1024), max_size=20),
    chunks=hs.lists(hs.tuples(hs.sampled_from([16, 32, 64, 100]), hs.sampled_from([0, 16, 64, 200])), max_size=2),
)
def test_the_compiled_correction_is_the_formula(reading: str, decodes: list[int], chunks: list[tuple[int, int]]) -> None:
    if (not decodes and not chunks) or (decodes and not away_from_edges(decodes)):
        return
    parts = [Chunk(tokens, context, True) for tokens, context in chunks]
    expected = formula(decodes, parts, reading)
    assert skewed(reading).seconds(batch_of(decodes, parts)) == pytest.approx(expected, rel=1e-9)


@given(long=hs.integers(1, 15), n=hs.integers(2, 16), contexts=hs.lists(hs.integers(16, 1024), min_size=2, max_size=2, unique=True))
def test_both_readings_agree_on_batches_of_two_contexts(long: int, n: int, contexts: list[int]) -> None:
    long = min(long, n - 1)
    low, high = sorted(contexts)
    if any(abs(long / n - edge) < 1e-9 for edge in EDGES["skew_rate"]):
        return
    batch = batch_of([high] * long + [low] * (n - long))
    assert skewed("range").seconds(batch) == skewed("moments").seconds(batch)


def test_one_long_context_among_many_is_one() -> None:
    """By the range a quarter of these decodes is long, by mean and variance one in 32."""
    decodes = [16, *range(200, 230), 800]
    batch = batch_of(decodes)
    alpha = np.zeros_like(ALPHA)
    alpha[:, :, 0] = 1.0  # shares up to 5 %
    full = skewed("moments", skew=alpha).seconds(batch)
    assert full == pytest.approx(MODEL.seconds(uniform(batch, 801.0)))
    assert skewed("range", skew=alpha).seconds(batch) == MODEL.seconds(batch) < full


def test_it_is_asked_for_and_survives_a_file(tmp_path: Any) -> None:
    model = skewed("moments")
    assert model.reads_contexts and not MODEL.reads_contexts
    save_calibration(model, tmp_path / "m.npz")
    again = load_calibration(str(tmp_path / "m.npz"))
    assert isinstance(again, MixedAttentionTime) and again.skew_reading == "moments"
    batch = batch_of([100, 300, 900], [Chunk(16, 0, True)])
    assert again.seconds(batch) == pytest.approx(model.seconds(batch), rel=1e-6)
    # A batch that does not say what its contexts are is read at the mean.
    assert model.seconds(dataclasses.replace(batch, decode_longest=0.0)) == MODEL.seconds(batch)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"skew_rate": None}, r"time_model\.skew_rate: None, must be there with the other fields of the correction"),
        ({"skew_reading": "median"}, r"time_model\.skew_reading: 'median', must be one of range, moments"),
        ({"skew_longest": [512, 128]}, r"time_model\.skew_longest: must be finite, >= 0 and increasing"),
        ({"skew": ALPHA[1:]}, r"time_model\.skew: shape \(3, 4, 5, 3, 3\), must be \(4, 4, 5, 3, 3\)"),
        ({"skew": ALPHA * np.nan}, r"time_model\.skew: must be finite"),
    ],
)
def test_a_correction_in_part_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        skewed(**changes)


def test_numbers_that_compiled_code_could_not_read_are_refused() -> None:
    packed = skewed().pack()
    batch = batch_of([100, 300]).array()[np.newaxis]
    for place, value in ((17 + 10, 1e9), (17 + 1, -1.0), (17 + 1, 1e6), (packed.size - 1, np.inf)):
        wrong = packed.copy()
        wrong[place] = value
        with pytest.raises(ConfigError):
            MixedAttentionTime.evaluate(wrong, batch)
