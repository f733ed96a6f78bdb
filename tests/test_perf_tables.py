"""Table models: interpolation, extrapolation and counting, Vidur's rule, files and their refusals."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmsched_env import EngineConfig, EpisodeLimits
from llmsched_env.backend import View
from llmsched_env.engine.simulator import SimBackend
from llmsched_env.errors import ConfigError
from llmsched_env.metrics import summarize
from llmsched_env.perf import (
    Batch,
    CalibrationRangeWarning,
    FormulaTime,
    LinearTime,
    Provenance,
    TableTime,
    base,
    calibration_names,
    load_calibration,
    save_calibration,
)
from llmsched_env.perf.store import calibration_bytes, parse_calibration
from llmsched_env.types import Decision, IterationReport, QueueLayout, Workload

ROOT = Path(__file__).resolve().parents[1]


def small(**changes: Any) -> TableTime:
    """Tables on uneven axes with values that no formula gives."""
    rng = np.random.default_rng(3)
    fields: dict[str, Any] = {
        "tokens": [1, 2, 8, 64, 100, 512],
        "linear": np.sort(rng.uniform(5e-3, 3e-2, 6)),
        "decode_batch": [1, 3, 16, 20],
        "decode_kv": [0, 16, 100, 1000, 1500],
        "decode": rng.uniform(1e-4, 1e-2, (4, 5)),
        "prefill_context": [0, 64, 300],
        "prefill_chunk": [1, 10, 200, 400],
        "prefill": rng.uniform(1e-4, 1e-2, (3, 4)),
        "sequences": [1, 4, 32],
        "per_sequence": [1e-3, 1.5e-3, 4e-3],
        "constant": 2e-3,
        "per_request": 1e-5,
    }
    return TableTime(**(fields | changes))


def decodes(n: float, kv: float, **other: float) -> Batch:
    return Batch(decodes=n, decode_kv=n * kv, batch_size=n, **other)


def chunk(tokens: float, context: float = 0.0) -> Batch:
    """One chunk that samples nothing."""
    work = tokens * (tokens / 2 + context)
    rounded = math.ceil(context / 64) * 64
    return Batch(0, 0, 1, tokens, tokens**2, context, rounded, work, batch_size=1)


PROMPTS = {"prompts": [1, 2, 8], "prompt_length": [4, 100], "several_prompts": [[0, 0], [1e-3, 3e-3], [4e-3, 6e-3]]}


def prompts(*chunks: float) -> Batch:
    """Several chunks without context."""
    squares = sum(c**2 for c in chunks)
    return Batch(
        prefills=len(chunks), prefill_tokens=sum(chunks), prefill_squares=squares, prefill_work=squares / 2, batch_size=len(chunks)
    )


def test_several_prompts_take_longer_than_one_of_the_same_work() -> None:
    with_them, without = small(**PROMPTS), small()

    def extra(*chunks: float) -> float:
        return with_them.seconds(prompts(*chunks)) - without.seconds(prompts(*chunks))

    assert extra(100) == 0.0
    assert extra(100, 100) == pytest.approx(3e-3) and extra(4, 4) == pytest.approx(1e-3) and extra(52, 52) == pytest.approx(2e-3)
    assert extra(*[100] * 5) == pytest.approx(4.5e-3)
    # 30 and 10 tokens: (40^2 / 1000) = 1.6 prompts of 25 tokens.
    assert extra(30, 10) == pytest.approx(0.6 * (1e-3 + 2e-3 * 21 / 96))
    assert with_them.in_range(prompts(20, 20)) and not with_them.in_range(prompts(*[20] * 9))


def test_tables_with_several_prompts_come_back_from_their_file(tmp_path: Path) -> None:
    model = small(**PROMPTS)
    save_calibration(model, tmp_path / "m.npz")
    again = load_calibration(tmp_path / "m.npz")
    np.testing.assert_allclose(again.pack(), model.pack(), rtol=1e-6)
    seconds, valid = TableTime.evaluate(model.pack(), prompts(50, 50).array()[None])
    assert (seconds[0], valid[0]) == (model.seconds(prompts(50, 50)), 1.0)
    wrong = model.pack().copy()
    wrong[25] = wrong.size  # where several_prompts would begin
    with pytest.raises(ConfigError, match=r"numbers\[25\]"):
        TableTime.evaluate(wrong, prompts(50, 50).array()[None])


# --- inside the range: against scipy ----------------------------------------------------------------


@given(n=st.floats(1, 20), kv=st.floats(0, 1500), tokens=st.floats(1, 400), context=st.floats(0, 300), sampled=st.floats(1, 32))
def test_inside_the_axes_it_is_multilinear_interpolation(n: float, kv: float, tokens: float, context: float, sampled: float) -> None:
    interpolate = pytest.importorskip("scipy.interpolate").RegularGridInterpolator
    model = small()
    batch = dataclasses.replace(chunk(tokens, context), decodes=n, decode_kv=n * kv, batch_size=n + 1, sampled=sampled)
    expected = 2e-3 + 1e-5 * (n + 1)
    expected += np.interp(n + tokens, model.tokens, model.linear) + np.interp(sampled, model.sequences, model.per_sequence)
    expected += interpolate((model.decode_batch, model.decode_kv), model.decode)((n, kv)).item()
    expected += interpolate((model.prefill_context, model.prefill_chunk), model.prefill)((context, tokens)).item()
    assert model.seconds(batch) == pytest.approx(expected, rel=1e-9)
    assert model.in_range(batch)  # also where a coordinate is rounded up at the end of its axis


def test_grid_points_are_returned_exactly() -> None:
    model = small(constant=0.0, per_request=0.0, sequences=(), per_sequence=())
    for i, n in enumerate(model.decode_batch):
        for j, kv in enumerate(model.decode_kv):
            attention = model.seconds(decodes(n, kv)) - np.interp(n, model.tokens, model.linear)
            assert attention == pytest.approx(model.decode[i, j], abs=1e-17)
    for i, context in enumerate(model.prefill_context):
        for j, tokens in enumerate(model.prefill_chunk):
            attention = model.seconds(chunk(tokens, context)) - np.interp(tokens, model.tokens, model.linear)
            assert attention == pytest.approx(model.prefill[i, j], abs=1e-17)


def test_parts_count_only_where_the_batch_has_such_requests() -> None:
    model = small()
    linear = np.interp(8.0, model.tokens, model.linear)
    only_tokens = Batch(prefill_tokens=8)
    assert model.seconds(only_tokens) == pytest.approx(2e-3 + linear)
    without = small(sequences=(), per_sequence=())
    assert model.seconds(decodes(8, 50, sampled=4)) - without.seconds(decodes(8, 50, sampled=4)) == pytest.approx(1.5e-3)


@given(st.lists(st.tuples(st.integers(1, 90), st.integers(0, 70)), min_size=1, max_size=4))
def test_several_chunks_are_one_chunk_of_the_same_attention_work(chunks: list[tuple[int, int]]) -> None:
    model = small()
    tokens = sum(c for c, _ in chunks)
    squares = sum(c * c for c, _ in chunks)
    crossed = sum(c * x for c, x in chunks)
    batch = Batch(0, 0, len(chunks), tokens, squares, sum(x for _, x in chunks), 0, squares / 2 + crossed)
    one = math.sqrt(squares)
    equivalent = dataclasses.replace(chunk(one, crossed / one), prefill_tokens=tokens, prefills=len(chunks), batch_size=0)
    assert model.seconds(batch) == pytest.approx(model.seconds(equivalent), rel=1e-9)


# --- outside the range ------------------------------------------------------------------------------


def line(x: float, x0: float, x1: float, v0: float, v1: float) -> float:
    return v0 + (v1 - v0) * (x - x0) / (x1 - x0)


@pytest.mark.parametrize("tokens", [513, 700, 5000])
def test_beyond_the_last_point_the_line_from_half_its_coordinate_goes_on(tokens: int) -> None:
    model = small(constant=0.0, per_request=0.0)
    batch = Batch(prefill_tokens=tokens)
    # No point but the last lies at or above 512 / 2: the last interval goes on.
    assert model.seconds(batch) == pytest.approx(line(tokens, 100, 512, model.linear[4], model.linear[5]))
    assert model.clipped().seconds(batch) == model.linear[5]
    assert not model.in_range(batch) and not model.clipped().in_range(batch)


def test_a_plateau_at_the_end_of_a_fine_grid_does_not_flatten_what_follows() -> None:
    tokens = np.arange(1, 101)
    linear = 1e-3 * tokens.astype(float)
    linear[-10:] = linear[-10]  # a forest's last leaf
    model = small(tokens=tokens, linear=linear, constant=0.0, per_request=0.0)
    assert model.seconds(Batch(prefill_tokens=200)) == pytest.approx(line(200, 50, 100, linear[49], linear[-1]))


def test_above_the_last_batch_size_decode_attention_is_in_proportion_to_requests() -> None:
    model = small(constant=0.0, per_request=0.0)
    linear = [float(np.interp(n, model.tokens, model.linear)) for n in (20, 50)]
    at_edge = model.seconds(decodes(20, 100)) - linear[0]
    beyond = model.seconds(decodes(50, 100)) - linear[1]
    assert beyond == pytest.approx(2.5 * at_edge)
    assert model.clipped().seconds(decodes(50, 100)) - linear[1] == pytest.approx(at_edge)
    assert model.in_range(decodes(20, 100)) and not model.in_range(decodes(50, 100))


def test_below_the_first_point_the_first_interval_goes_on_and_nothing_becomes_negative() -> None:
    model = small(tokens=[10, 20], linear=[2e-3, 8e-3], constant=0.0, per_request=0.0)
    assert model.seconds(Batch(prefill_tokens=9)) == pytest.approx(1.4e-3)
    assert model.seconds(Batch(prefill_tokens=1)) == 0.0
    assert model.clipped().seconds(Batch(prefill_tokens=1)) == 2e-3
    assert not model.in_range(Batch(prefill_tokens=9))


@pytest.mark.parametrize(
    ("batch", "good"),
    [
        (decodes(20, 1500), True),
        (decodes(20, 1501), False),
        (decodes(21, 10), False),
        (chunk(400, 300), True),
        (chunk(400, 301), False),
        (chunk(401, 0), False),
        (dataclasses.replace(chunk(100), prefill_tokens=513), False),
        (decodes(4, 10, sampled=32), True),
        (decodes(4, 10, sampled=33), False),
        (decodes(0.5, 10), False),
    ],
)
def test_every_axis_bounds_the_range(batch: Batch, good: bool) -> None:
    assert small().in_range(batch) is good
    assert small(lookup="vidur").in_range(Batch()) is False  # no tokens: below the first point


def test_range_of_the_compact_models() -> None:
    formula = load_calibration("a100-llama2-7b-c10")
    for batch in (decodes(128, 4095), chunk(4096)):
        assert formula.in_range(batch)
    for batch in (decodes(129, 10), decodes(2, 4096), chunk(4097)):
        assert not formula.in_range(batch)
    assert LinearTime(1e-3, 1e-6).in_range(decodes(10**6, 10**6))
    with pytest.raises(ConfigError, match=r"time_model\.max_decodes"):
        FormulaTime(1, 1, 1, 1, 1, 1, 1, 1, max_decodes=0)


# --- Vidur's rule -----------------------------------------------------------------------------------


@given(
    n=st.integers(0, 128),
    mean=st.integers(1, 4096),
    extra=st.integers(0, 127),
    chunks=st.lists(st.tuples(st.integers(1, 900), st.integers(0, 800)), max_size=4),
)
def test_vidur_lookup_is_vidurs_rounding_rule(n: int, mean: int, extra: int, chunks: list[tuple[int, int]]) -> None:
    model = load_calibration("a100-llama2-7b-vidur")
    assert isinstance(model, TableTime)
    tokens = n + sum(c for c, _ in chunks)
    if tokens == 0:
        return
    kv = min(n * mean + extra, 4096 * n) if n else 0
    rounded = sum(-(-x // 64) * 64 for _, x in chunks)
    squares = sum(c * c for c, _ in chunks)
    batch = Batch(n, kv, len(chunks), tokens - n, squares, sum(x for _, x in chunks), rounded, 0, n, 0, n + len(chunks))
    expected = model.linear[-(-tokens // 8) - 1]
    if n:
        expected += model.decode[n - 1, -(-int(kv / n) // 64)]
    if chunks:
        expected += model.prefill[rounded // 64, round(math.sqrt(squares)) - 1]
    assert model.seconds(batch) == pytest.approx(expected, rel=1e-14)
    assert model.clipped().seconds(batch) == model.seconds(batch)
    assert model.in_range(batch)  # also where a coordinate is rounded up at the end of its axis


def test_above_batch_128_clip_holds_the_last_row_and_the_default_does_not() -> None:
    model = load_calibration("a100-llama2-7b-vidur")
    clipped = load_calibration("a100-llama2-7b-vidur:clip")
    assert isinstance(model, TableTime) and clipped == model.clipped() != model
    linear, attention = model.linear[256 // 8 - 1], model.decode[127, 1024 // 64]
    assert clipped.seconds(decodes(256, 1000)) == pytest.approx(linear + attention, rel=1e-14)
    assert model.seconds(decodes(256, 1000)) == pytest.approx(linear + 2 * attention, rel=1e-14)


# --- compiled and plain -----------------------------------------------------------------------------

_PROGRAM = """
import numpy as np
from llmsched_env.perf import Batch, calibration_names, load_calibration
rng = np.random.default_rng(0)
for name in calibration_names():
    for i in range(40):
        n, p = int(rng.integers(0, 200)), int(rng.integers(0, 3))
        c, x = rng.integers(1, 2000, p), rng.integers(0, 1500, p)
        batch = Batch(n, int(n * rng.integers(1, 3000)), p, int(c.sum()), int((c * c).sum()), int(x.sum()),
                      int((-(-x // 64) * 64).sum()), float((c * (c / 2 + x)).sum()), n, 0, n + p)
        model = load_calibration(name)
        print(name, repr(model.seconds(batch)), model.in_range(batch))
"""


def test_compiled_and_plain_python_agree_on_every_shipped_calibration() -> None:
    outputs = []
    for disable in ("0", "1"):
        environment = dict(os.environ, NUMBA_DISABLE_JIT=disable, PYTHONPATH=str(ROOT))
        done = subprocess.run([sys.executable, "-c", _PROGRAM], env=environment, capture_output=True, text=True, check=True)
        outputs.append([row.split() for row in done.stdout.splitlines()])
    assert len(outputs[0]) == 40 * len(calibration_names())
    assert {row[2] for row in outputs[0]} == {"True", "False"}
    for compiled, plain in zip(*outputs, strict=True):
        assert (compiled[0], compiled[2]) == (plain[0], plain[2])
        assert float(compiled[1]) == pytest.approx(float(plain[1]), rel=1e-12), compiled[0]


# --- counting in an episode -------------------------------------------------------------------------


def batch_of(backend: SimBackend) -> Batch:
    """The batch of the last iteration."""
    return Batch(**{field.name: getattr(backend.record.batch, field.name) for field in dataclasses.fields(Batch)})


def episode(model: Any, limits: EpisodeLimits | None = None) -> tuple[SimBackend, list[IterationReport], int]:
    """Thirty requests at once; the backend, its iterations, and how many were outside by ``in_range``."""
    backend = SimBackend()
    workload = Workload.of(np.linspace(0.0, 0.2, 30), [50] * 30, [40] * 30)
    engine = EngineConfig.vllm(time_model=model, max_num_batched_tokens=256)
    backend.reset(workload, QueueLayout(), engine, limits or EpisodeLimits())
    decision, reports, outside = Decision.greedy(1), [], 0
    while not backend.done:
        reports.append(backend.step(decision))
        if not reports[-1].idle:
            outside += not model.in_range(batch_of(backend))
    return backend, reports, outside


def test_iterations_out_of_range_are_counted_and_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_warned", set())
    model = small(provenance=Provenance(name="small", valid_range="20 decodes"))
    backend, reports, outside = episode(model)
    assert 0 < outside < len(reports)
    iterations = sum(not r.idle for r in reports)
    share = rf"{100 * outside / iterations:.3g} % of the iterations \({outside} of {iterations}\).*'small' \(20 decodes\)"
    with pytest.warns(CalibrationRangeWarning, match=share):
        counters = backend.counters()
    assert counters.out_of_range == outside
    assert summarize(backend.log(), backend.counters(), kv_capacity=1).out_of_range == outside  # no second warning
    wide = small(decode_batch=[1, 3, 16, 128])
    backend, _, outside = episode(wide)
    assert outside == backend.counters().out_of_range == 0


def test_an_iteration_cut_off_by_the_horizon_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_warned", {"small"})
    model = small(provenance=Provenance(name="small"), decode_batch=[1, 2, 3, 4], decode_kv=[0, 1, 2, 3, 4])
    whole, reports, outside = episode(model)
    last = reports[-1]
    cut, _, tried = episode(model, EpisodeLimits(horizon=last.start + last.duration / 2))
    assert tried == outside == whole.counters().out_of_range
    assert cut.counters().out_of_range == outside - 1


def test_the_view_of_a_running_episode_says_nothing_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_warned", set())
    backend = SimBackend()
    engine = EngineConfig.vllm(time_model=small(decode_batch=[1, 2, 3, 4], tokens=[1, 2, 3, 4, 5, 6]))
    view: View = backend.reset(Workload.of([0.0], [50], [5]), QueueLayout(), engine, EpisodeLimits())
    backend.step(Decision.greedy(1))
    assert backend.counters().out_of_range == 1  # and no warning before the share is known
    assert view.clock > 0


# --- records and files ------------------------------------------------------------------------------


def test_models_are_values() -> None:
    model = small()
    assert model == small() and hash(model) == hash(small()) and model != small(constant=0.0)
    assert pickle.loads(pickle.dumps(model)) == model
    assert "TableTime" in repr(model) and len(repr(model)) < 200
    assert EngineConfig.vllm(time_model=model) == EngineConfig.vllm(time_model=small())
    with pytest.raises(ValueError, match="read-only"):
        model.linear[0] = 0.0


@pytest.mark.parametrize("name", calibration_names())
def test_shipped_calibrations_say_where_they_come_from(name: str) -> None:
    model = load_calibration(name)
    for field in ("source", "licence", "gpu", "model", "engine", "valid_range", "fit_error"):
        assert getattr(model.provenance, field), f"{name}: provenance.{field} is empty"
    assert model.provenance.name == name
    assert (model.provenance.num_blocks is None) == (model.provenance.block_size is None)
    assert load_calibration(name) is model  # read once
    file = next((ROOT / "llmsched_env" / "perf" / "calibrations").glob(f"{name}.*"))
    assert file.stat().st_size <= 250_000  # the largest holds a union of two grids of mixed batches
    assert load_calibration(str(file)) == model


def test_the_calibration_from_vidur_states_its_kv_capacity() -> None:
    provenance = load_calibration("a100-llama2-7b-vidur").provenance
    assert (provenance.num_blocks, provenance.block_size) == (7424, 16)
    assert "2,816" in provenance.notes


@pytest.mark.parametrize("model", [small(), small(sequences=(), per_sequence=(), lookup="vidur", beyond="clip"), LinearTime(1e-3, 1e-6)])
def test_files_give_the_model_back(model: Any, tmp_path: Path) -> None:
    suffix, data = calibration_bytes(model)
    assert calibration_bytes(model) == (suffix, data)
    path = tmp_path / f"x{suffix}"
    save_calibration(model, path)
    again = load_calibration(str(path))
    assert again.pack() == pytest.approx(model.pack(), rel=1e-7)  # tables are stored in single precision
    assert calibration_bytes(again) == (suffix, data)
    with pytest.raises(ConfigError, match="is saved as"):
        save_calibration(model, tmp_path / "x.txt")


def test_a_formula_without_limits_keeps_them_absent() -> None:
    model = FormulaTime(1e-3, 0, 0, 0, 0, 0, 0, 0, max_tokens=100.0)
    text = json.loads(calibration_bytes(model)[1])
    assert "max_decodes" not in text["coefficients"] and text["coefficients"]["max_tokens"] == 100.0
    assert parse_calibration("x", json.dumps(text).encode()) == model


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": [1, 2, 2, 3, 4, 5]}, "tokens: must be finite, >= 0 and increasing"),
        ({"tokens": [[1, 2]]}, r"tokens: shape \(1, 2\)"),
        ({"decode_kv": [5]}, "decode_kv: shape"),
        ({"decode_batch": [0, 1, 2, 3]}, "decode_batch: begins with 0"),
        ({"linear": [1, 2]}, r"linear: shape \(2,\), must be \(6,\)"),
        ({"prefill": np.full((3, 4), -1.0)}, "prefill: must be finite and >= 0"),
        ({"decode": np.full((4, 5), np.nan)}, "decode: must be finite and >= 0"),
        ({"constant": -1.0}, "constant: -1.0"),
        ({"linear": np.zeros(6), "constant": 0.0}, "an iteration must take time"),
        ({"lookup": "nearest"}, "lookup: 'nearest'"),
        ({"beyond": "wrap"}, "beyond: 'wrap'"),
        ({"sequences": [1, 2]}, "per_sequence: shape"),
        ({"sequences": (), "per_sequence": [1.0]}, "per_sequence: shape"),
        ({"prompts": [1, 2], "prompt_length": [1, 9], "several_prompts": [1.0]}, r"several_prompts: shape \(1,\), must be \(2, 2\)"),
        ({"prompts": [2, 4], "prompt_length": [1, 9], "several_prompts": [[0, 0], [1, 1]]}, "prompts: begins with 2, must begin with 1"),
        ({"prompts": [1, 2], "several_prompts": [[0.0], [1.0]]}, "several_prompts: shape"),
    ],
)
def test_tables_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"time_model.{message}|{message}"):
        small(**changes)


def npz(text: str | None, **arrays: Any) -> bytes:
    out = io.BytesIO()
    if text is not None:
        arrays["calibration"] = np.array(text)
    np.savez(out, **arrays)
    return out.getvalue()


GOOD = {"form": "linear", "coefficients": {"d0": 1.0, "d1": 0.0}, "provenance": {"name": "x"}}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x00\x01", "not a calibration file"),
        (b"PK\x03\x04broken", "not a calibration file"),
        (b"[1]", "must be a JSON object"),
        (b"{", "not a calibration file"),
        (npz(None, linear=np.ones(3)), "entry 'calibration' is missing"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "form"}).encode(), "field 'form' is missing"),
        (json.dumps(GOOD | {"form": "spline"}).encode(), "form 'spline', must be one of linear, formula, tables"),
        (json.dumps(GOOD | {"coefficients": {"d0": 1.0}}).encode(), "field 'd1' is missing"),
        (json.dumps(GOOD | {"coefficients": {"d0": 1.0, "d1": 0.0, "d2": 0.0}}).encode(), "unknown field 'd2' (allowed: d0, d1,"),
        (json.dumps(GOOD | {"coefficients": {"d0": -1.0, "d1": 0.0}}).encode(), "time_model.d0: -1.0"),
        (json.dumps(GOOD | {"coefficients": {"d0": "fast", "d1": 0.0}}).encode(), "time_model.d0: 'fast', must be a number"),
        (json.dumps(GOOD | {"provenance": {"num_blocks": 0}}).encode(), "provenance.num_blocks: 0"),
        (json.dumps(GOOD | {"provenance": {"license": "MIT"}}).encode(), "unknown field 'license'; did you mean 'licence'?"),
        (npz(json.dumps(GOOD | {"form": "tables", "coefficients": {}}), tokens=[1.0, 2.0]), "field 'linear' is missing"),
    ],
)
def test_files_that_are_no_calibration_are_refused(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / ("x.npz" if data[:2] == b"PK" else "x.json")
    path.write_bytes(data)
    with pytest.raises(ConfigError) as refused:
        load_calibration(str(path))
    assert message in str(refused.value) and str(path) in str(refused.value)


def test_names_that_are_no_calibration_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'a100-llama2-7b-vidour' is unknown; did you mean 'a100-llama2-7b-vidur'\? \(known: "):
        load_calibration("a100-llama2-7b-vidour")
    with pytest.raises(ConfigError, match="No such file"):
        load_calibration(str(tmp_path / "absent.npz"))
    (tmp_path / "x.csv").write_text("a,b\n")
    with pytest.raises(ConfigError, match=r"must be \.json or \.npz"):
        load_calibration(str(tmp_path / "x.csv"))
    with pytest.raises(ConfigError, match="'clip' is an option of tables"):
        load_calibration("a100-llama2-7b-c10:clip")
