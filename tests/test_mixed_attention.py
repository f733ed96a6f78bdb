"""The model with one attention table for mixed batches, against its formula written out in numpy."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as hs

from llmsched_env.errors import ConfigError
from llmsched_env.perf import Batch, load_calibration, save_calibration
from llmsched_env.perf.mixed_attention import MixedAttentionTime

TOKENS = np.array([1.0, 16.0, 64.0, 512.0])
SEQUENCES = np.array([1.0, 8.0, 32.0])
CHUNK = np.array([16.0, 64.0, 256.0])
CONTEXT = np.array([0.0, 16.0, 64.0, 256.0, 1024.0])
BATCH = np.array([1.0, 4.0, 16.0, 32.0])
KV = np.array([16.0, 64.0, 256.0, 1024.0])


def cost(c: Any, x: Any, n: Any, k: Any) -> Any:
    """Curved in every coordinate, so that linear interpolation and the truth differ between the points."""
    return 1e-6 * (c * (0.5 * c + x)) + 1e-7 * n * k + 1e-6 * np.sqrt(n * k) + 1e-8 * c * n


def tables(**changes: Any) -> MixedAttentionTime:
    c, x, n, k = CHUNK[:, None, None, None], CONTEXT[:, None, None], BATCH[:3, None], KV
    values: dict[str, Any] = dict(
        tokens=TOKENS,
        linear=1e-3 + 1e-5 * TOKENS**1.1,
        sequences=SEQUENCES,
        per_sequence=1e-4 + 1e-6 * SEQUENCES**1.2,
        prefill_chunk=CHUNK,
        prefill_context=CONTEXT,
        decode_batch=BATCH,
        decode_context=KV,
        prefill=cost(CHUNK[:, None], CONTEXT, 0.0, 0.0),
        decode=cost(0.0, 0.0, BATCH[:, None], KV),
        mixed=cost(c, x, n, k),
    )
    return MixedAttentionTime(**(values | changes))


MODEL = tables()


def batch(decodes: list[int], chunks: list[tuple[int, int]]) -> Batch:
    """Decodes by context before the iteration, prefills by (chunk, context)."""
    return Batch(
        decodes=len(decodes),
        decode_kv=sum(k + 1 for k in decodes),
        prefills=len(chunks),
        prefill_tokens=sum(c for c, _ in chunks),
        prefill_work=sum(c * (c / 2 + x) for c, x in chunks),
        batch_size=len(decodes) + len(chunks),
    )


def reference(decodes: list[int], chunks: list[tuple[int, int]]) -> float:
    """The docstring's formula by plain multilinear interpolation inside the axes."""
    n, c = len(decodes), sum(c for c, _ in chunks)
    x = sum(c_i * (c_i / 2 + x_i) for c_i, x_i in chunks) / c - c / 2 if c else 0.0
    axes = [np.concatenate(([0.0], CHUNK)), CONTEXT, np.concatenate(([0.0], BATCH[:3])), KV]
    table = np.zeros([a.size for a in axes])
    table[0, :, 1:] = MODEL.decode[:3]
    table[1:, :, 0] = MODEL.prefill[:, :, None]
    table[1:, :, 1:] = MODEL.mixed
    places = []
    for axis, at in zip(axes, (c, x, n, np.mean(decodes) if n else KV[0]), strict=True):
        i = int(np.clip(np.searchsorted(axis, at, side="right") - 1, 0, axis.size - 2))
        places.append(((i, 1 - (at - axis[i]) / (axis[i + 1] - axis[i])), (i + 1, (at - axis[i]) / (axis[i + 1] - axis[i]))))
    attention = sum(table[tuple(i for i, _ in corner)] * np.prod([w for _, w in corner]) for corner in itertools.product(*places))
    return float(
        np.interp(n + c, TOKENS, MODEL.linear) + np.interp(n + len(chunks), SEQUENCES, MODEL.per_sequence) + max(float(attention), 0.0)
    )


def test_at_the_points_the_measured_times_come_back() -> None:
    for n, k in itertools.product(range(BATCH.size), range(KV.size)):
        one = batch([int(KV[k])] * int(BATCH[n]), [])
        rest = np.interp(BATCH[n], TOKENS, MODEL.linear) + np.interp(BATCH[n], SEQUENCES, MODEL.per_sequence)
        assert MODEL.seconds(one) == pytest.approx(rest + MODEL.decode[n, k])
        assert MODEL.in_range(one)
    for c, x in itertools.product(range(CHUNK.size), range(CONTEXT.size)):
        one = batch([], [(int(CHUNK[c]), int(CONTEXT[x]))])
        rest = np.interp(CHUNK[c], TOKENS, MODEL.linear) + MODEL.per_sequence[0]
        assert MODEL.seconds(one) == pytest.approx(rest + MODEL.prefill[c, x])
        for n, k in itertools.product(range(3), range(KV.size)):
            both = batch([int(KV[k])] * int(BATCH[n]), [(int(CHUNK[c]), int(CONTEXT[x]))])
            rest = np.interp(CHUNK[c] + BATCH[n], TOKENS, MODEL.linear) + np.interp(BATCH[n] + 1, SEQUENCES, MODEL.per_sequence)
            assert MODEL.seconds(both) == pytest.approx(rest + MODEL.mixed[c, x, n, k])
            assert MODEL.in_range(both)


@given(
    decodes=hs.lists(hs.integers(16, 1024), max_size=16),
    chunks=hs.lists(hs.tuples(hs.integers(1, 256), hs.integers(0, 1024)), max_size=1),
)
def test_between_the_points_it_is_linear(decodes: list[int], chunks: list[tuple[int, int]]) -> None:
    if not decodes and not chunks:
        return
    assert MODEL.seconds(batch(decodes, chunks)) == pytest.approx(reference(decodes, chunks), rel=1e-12)
    assert MODEL.in_range(batch(decodes, chunks))


def test_several_chunks_are_read_as_one_of_the_same_work() -> None:
    # 32 tokens over 100 and 96 over 300: work 32 * 116 + 96 * 348 = 37,120 = 128 * (64 + 226)
    two, one = batch([], [(32, 100), (96, 300)]), batch([], [(128, 226)])
    head = MODEL.seconds(two) - MODEL.seconds(one)
    assert head == pytest.approx(float(np.interp(2, SEQUENCES, MODEL.per_sequence)) - MODEL.per_sequence[0])


def test_short_prompts_together_lie_on_the_line_through_no_context_and_a_context_as_long_as_the_chunk() -> None:
    # Four prompts of 16 tokens: 64 tokens with the work of one chunk over 16 * 16 / 2 * 4 / 64 - 32 = -24.
    seconds = MODEL.seconds(batch([], [(16, 0)] * 4))
    rest = float(np.interp(64, TOKENS, MODEL.linear) + np.interp(4, SEQUENCES, MODEL.per_sequence))
    slope = (MODEL.prefill[1, 2] - MODEL.prefill[1, 0]) / 64
    assert seconds - rest == pytest.approx(MODEL.prefill[1, 0] - 24 * slope)
    assert MODEL.in_range(batch([], [(16, 0)] * 4))
    # With attention = work alone that is exact: four prompts one by one.
    exact = tables(prefill=1e-6 * CHUNK[:, None] * (0.5 * CHUNK[:, None] + CONTEXT))
    assert exact.seconds(batch([], [(16, 0)] * 4)) - rest == pytest.approx(4 * 1e-6 * 16 * 8)


@pytest.mark.parametrize(
    ("decodes", "chunks"),
    [
        ([2000] * 4, []),  # context
        ([8] * 4, []),
        ([100] * 40, []),  # decodes, requests
        ([], [(300, 0)]),  # chunk
        ([], [(64, 2000)]),  # context of a prefill
        ([100] * 20, [(64, 0)]),  # measured alone, not beside a prefill
    ],
)
def test_outside_it_goes_on_linearly_and_says_so(decodes: list[int], chunks: list[tuple[int, int]]) -> None:
    far = batch(decodes, chunks)
    assert not MODEL.in_range(far)
    assert np.isfinite(MODEL.seconds(far)) and MODEL.seconds(far) > 0


def test_more_decodes_than_measured_beside_a_prefill_go_on_from_the_last_two() -> None:
    chunk = [(64, 64)]
    at = [MODEL.seconds(batch([256] * n, chunk)) for n in (4, 16, 20)]
    rest = [float(np.interp(64 + n, TOKENS, MODEL.linear) + np.interp(n + 1, SEQUENCES, MODEL.per_sequence)) for n in (4, 16, 20)]
    low, high, beyond = (a - r for a, r in zip(at, rest, strict=True))
    assert beyond == pytest.approx(high + (high - low) / 12 * 4)


def test_time_of_a_decode_context_beyond_the_table_is_the_line_of_its_last_points() -> None:
    base = [MODEL.seconds(batch([k] * 4, [])) for k in (256, 1024, 1408)]
    # The line goes through the last point and the first at or above half of it.
    assert base[2] - base[1] == pytest.approx((base[1] - base[0]) / 768 * 384)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": TOKENS[::-1]}, "time_model.tokens: must be finite, >= 0 and increasing"),
        ({"linear": np.ones(2)}, r"time_model.linear: shape \(2,\), must be \(4,\)"),
        ({"linear": np.array([0.0, 1, 1, 1])}, "time_model.linear: begins with 0"),
        ({"prefill_context": CONTEXT + 1}, "time_model.prefill_context: begins with 1.0, must begin with 0"),
        ({"decode_batch": BATCH - 1}, "time_model.decode_batch: begins with 0"),
        ({"mixed": MODEL.mixed[:, :, :1]}, "time_model.mixed: shape .*, must be 4-D with 2 to 4 decode batches"),
        ({"mixed": MODEL.mixed[:, :, :, :2]}, "time_model.mixed: shape"),
        ({"decode": -MODEL.decode}, "time_model.decode: must be finite and >= 0 seconds"),
    ],
)
def test_refuses_tables_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tables(**change)


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    rounded = {name: getattr(MODEL, name).astype(np.float32) for name in ("linear", "per_sequence", "prefill", "decode", "mixed")}
    model = tables(**rounded)
    save_calibration(model, tmp_path / "m.npz")
    loaded = load_calibration(str(tmp_path / "m.npz"))
    assert loaded == model and hash(loaded) == hash(model)
    assert loaded != MODEL
    with pytest.raises(ConfigError, match=r"saved as \.npz"):
        save_calibration(model, tmp_path / "m.json")


def test_the_packed_model_is_read_only_input() -> None:
    with pytest.raises(ValueError, match="read-only"):
        MODEL.linear[0] = 1.0
    assert replace(MODEL) == MODEL
    assert "mixed-attention" in repr(MODEL)
