"""Calibration on an engine, the part that needs no engine: plan, points on disk, fits, command line."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from llmsched_env.cli import calibrate
from llmsched_env.errors import ConfigError
from llmsched_env.perf import Batch, FormulaTime, IterationTimeModel, LinearTime, Provenance, load_calibration, save_calibration
from llmsched_hardware.calibration.fit import batches_of, fit_error, fit_formula, fit_linear, fit_tables, modelled
from llmsched_hardware.calibration.plan import CHUNK_STEPS, EngineLimits, geometric, plan
from llmsched_hardware.calibration.points import Point, PointsFile, Probe, combined, drift, read_points, seconds_of
from llmsched_hardware.calibration.settings import LONGEST, TINY, backend_settings, engine_config, engine_options
from llmsched_hardware.shapes import SHAPES, model_shape, write_shape

LIMITS = EngineLimits(max_batch=64, max_num_seqs=64, budget=1024, max_model_len=1024, num_blocks=512, block_size=16)
# No step in the token line; KV, prefill work and decodes each cost something.
TRUE = FormulaTime(a=1.5e-3, b=1.2e-5, s=1.5e-3, c=1.2e-5, d1=2e-7, d2=3e-8, d3=5e-9, d4=2.5e-5, knee=0.0)


def batch_of(probe: Probe) -> Batch:
    n, kv, c, x = probe.decodes, probe.decodes * (probe.context + 1), probe.chunk, probe.chunk_context
    return Batch(
        decodes=n,
        decode_kv=kv,
        prefills=float(c > 0),
        prefill_tokens=c,
        prefill_squares=c**2,
        prefill_context=x,
        prefill_work=c * (c / 2 + x),
        sampled=n,
        load=kv + c + x,
        batch_size=n + (c > 0),
    )


def points_of(model: IterationTimeModel, noise: float = 0.0, limits: EngineLimits = LIMITS, wave: float = 0.0) -> list[Point]:
    """The plan's probes with the model's times; ``wave``: a relative deviation that no formula has."""
    rng = np.random.default_rng(4)
    points = []
    for probe in (p for group in plan(limits) for p in group.probes):
        batch = batch_of(probe)
        seconds = model.seconds(batch) * float(np.exp(noise * rng.standard_normal()))
        seconds *= 1.0 + wave * np.sin(2 * np.log1p(probe.decodes) + np.log1p(probe.context))
        points.append(Point(probe, batch, seconds, 0.8 * seconds, 0.01, 9))
    return points


# --- fits -----------------------------------------------------------------------------------------


def test_the_formula_is_found_again_from_its_own_times() -> None:
    points = points_of(TRUE)
    model = fit_formula(points)
    for name in ("a", "b", "d1", "d2", "d3", "d4", "knee"):
        assert getattr(model, name) == pytest.approx(getattr(TRUE, name), rel=1e-4), name
    assert (model.s, model.c) == (model.a, model.b)
    assert fit_error(model, batches_of(points), seconds_of(points)).mape < 1e-6
    assert model.max_tokens == 1024 and model.max_decodes == 64
    assert model.max_context == max(p.context + 1 for g in plan(LIMITS) for p in g.probes if p.decodes)


def test_noise_moves_the_formula_by_about_the_noise() -> None:
    points = points_of(TRUE, noise=0.03)
    error = fit_error(fit_formula(points), batches_of(points), seconds_of(points))
    assert 0.02 < error.mape < 0.03
    assert abs(error.bias) < 0.02 and error.count == len(points)


def test_a_step_in_the_token_line_is_found_and_none_is_made_up() -> None:
    stepped = dataclasses.replace(TRUE, s=4e-3, c=1e-5, knee=128.0)
    model = fit_formula(points_of(stepped))
    assert model.knee == 128.0
    assert model.s == pytest.approx(4e-3, rel=1e-3) and model.a == pytest.approx(1.5e-3, rel=1e-3)
    assert fit_formula(points_of(TRUE, noise=0.05)).knee == 0.0


def test_no_coefficient_is_negative_and_an_empty_batch_takes_time() -> None:
    # Times that fall as KV grows and vanish with the batch ask for both.
    points = [
        Point(p.probe, p.batch, 1e-5 * (p.batch.decodes + p.batch.prefill_tokens) / (1 + p.batch.decode_kv / 1e4), 1e-6, 0.0, 1)
        for p in points_of(TRUE)
    ]
    model = fit_formula(points)
    assert min(model.a, model.b, model.s, model.c, model.d1, model.d2, model.d3, model.d4) >= 0
    assert model.seconds(Batch()) > 0
    assert fit_tables(points, model).seconds(Batch()) > 0


def test_the_paper_s_two_terms_are_found_where_they_hold_and_err_where_they_do_not() -> None:
    linear = LinearTime(2e-3, 4e-7)
    found = fit_linear(points_of(linear))
    assert (found.d0, found.d1) == pytest.approx((2e-3, 4e-7), rel=1e-6)
    points = points_of(TRUE)
    batches, seconds = batches_of(points), seconds_of(points)
    assert fit_error(fit_linear(points), batches, seconds).mape > 0.2


def test_tables_follow_what_the_formula_cannot() -> None:
    points = points_of(TRUE, wave=0.2)
    formula = fit_formula(points)
    tables = fit_tables(points, formula)
    batches, seconds = batches_of(points), seconds_of(points)
    assert fit_error(formula, batches, seconds).mape > 0.05
    assert fit_error(tables, batches, seconds).mape < 0.5 * fit_error(formula, batches, seconds).mape
    assert min(tables.linear.min(), tables.decode.min(), tables.prefill.min()) >= 0
    assert all(tables.in_range(point.batch) for point in points)


def test_tables_without_a_point_keep_to_the_formula() -> None:
    kept = [p for p in points_of(TRUE) if p.probe.decodes < 32 and p.probe.context < 256]
    tables = fit_tables(kept, fit_formula(kept))
    far = batch_of(Probe("decode", 15, 200))
    assert tables.seconds(far) == pytest.approx(TRUE.seconds(far), rel=0.02)


def test_tables_and_formula_are_saved_and_loaded(tmp_path: Path) -> None:
    points = points_of(TRUE, noise=0.02)
    formula = fit_formula(points)
    tables = fit_tables(points, formula)
    batches = batches_of(points)
    for model, name in ((formula, "a.json"), (tables, "a.npz")):
        save_calibration(model, tmp_path / name)
        assert modelled(load_calibration(str(tmp_path / name)), batches) == pytest.approx(modelled(model, batches), rel=1e-5)


def test_a_fit_needs_points() -> None:
    with pytest.raises(ConfigError, match="1 measured"):
        fit_formula(points_of(TRUE)[:1])
    assert fit_formula(points_of(TRUE)[:2]).a > 0


def test_errors_are_those_of_the_definition() -> None:
    points = points_of(TRUE)[:3]
    batches = batches_of(points)
    ours = modelled(TRUE, batches)
    error = fit_error(TRUE, batches, ours / np.array([1.1, 0.8, 1.0]))
    assert error.mape == pytest.approx((0.1 + 0.2 + 0.0) / 3)
    assert error.median == pytest.approx(0.1)
    assert error.bias == pytest.approx(ours.sum() / (ours / np.array([1.1, 0.8, 1.0])).sum() - 1)


# --- the plan -------------------------------------------------------------------------------------


@given(
    batch=some.integers(1, 300),
    more=some.integers(0, 50),
    budget=some.integers(16, 4096),
    longest=some.integers(32, 8192),
    blocks=some.integers(4, 20_000),
    block=some.sampled_from([8, 16, 32]),
)
def test_no_probe_is_beyond_the_engine_or_comes_twice(batch: int, more: int, budget: int, longest: int, blocks: int, block: int) -> None:
    limits = EngineLimits(batch, batch + more, max(budget, batch + more), longest, blocks, block)
    seen: set[Probe] = set()
    for group in plan(limits):
        growth = group.growth
        sizes = [p.decodes for p in group.probes]
        assert sizes == sorted(sizes) and len({p.context for p in group.probes}) == 1
        for probe in group.probes:
            assert probe not in seen
            seen.add(probe)
            assert probe.decodes <= limits.max_batch and probe.decodes + probe.chunk <= limits.budget
            assert probe.chunk_context + probe.chunk < limits.max_model_len
            if probe.decodes:
                assert probe.context + growth < limits.max_model_len
                assert probe.decodes + (probe.chunk > 0) <= limits.max_num_seqs
                assert probe.decodes * -(-probe.context // block) + -(-probe.chunk // block) <= blocks
        if group.is_prefill:
            places = [p.chunk_context for p in group.probes]
            assert len({p.chunk for p in group.probes}) == 1
            assert all(b >= a + group.probes[0].chunk for a, b in itertools.pairwise(places))


def test_a_7b_model_s_batches_reach_256_decodes_and_a_full_memory() -> None:
    limits = EngineLimits(256, 256, 2048, 4096, 12_000, 16)
    coarse = [p for group in plan(limits) if group.level == 0 for p in group.probes]
    fullest = max(coarse, key=lambda p: p.decodes * p.context)
    assert fullest.decodes == 256 and fullest.decodes * fullest.context > 0.9 * limits.capacity
    assert len(coarse) < 60
    assert {p.kind for p in coarse} == {"decode", "prefill", "mixed"}
    assert max(p.chunk for p in coarse) == 2048


def test_levels_go_from_coarse_to_fine() -> None:
    groups = plan(LIMITS)
    levels = [group.level for group in groups]
    assert levels == sorted(levels) and set(levels) == {0, 1, 2}
    rest = groups[-1].without({groups[-1].probes[0]})
    assert rest.probes == groups[-1].probes[1:]


def test_geometric_grids_end_where_they_should() -> None:
    assert geometric(1, 64, 4) == [1, 4, 16, 64]
    assert geometric(16, 100, 2) == [16, 32, 64, 100]
    assert geometric(16, 16, 2) == [16] and geometric(16, 5, 2) == [5] and geometric(16, 0, 2) == []


# --- points on disk -------------------------------------------------------------------------------

ENGINE = {"device": "a", "vllm": "0.28.0", "extra": {}}


def some_points() -> list[Point]:
    return points_of(TRUE, noise=0.1)[:5]


def test_points_survive_a_kill_in_the_middle_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.points.jsonl"
    points = some_points()
    with PointsFile(path, ENGINE, resume=True) as file:
        for point in points[:3]:
            file.append(point)
        assert read_points(path)[0] == points[:3]  # on disk while the file is open
    before = path.read_bytes()
    path.write_bytes(before + b'{"probe": {"kind": "dec' + 5000 * b"x")  # longer than the next line
    with PointsFile(path, ENGINE, resume=True) as file:
        assert file.points == points[:3]
        file.append(points[3])
    assert path.read_bytes().startswith(before) and path.read_bytes().endswith(b"}\n")
    assert read_points(path, ENGINE)[0] == points[:4]


def test_without_resume_the_file_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.points.jsonl"
    for count in (3, 2):
        with PointsFile(path, ENGINE, resume=False) as file:
            for point in some_points()[:count]:
                file.append(point)
    assert read_points(path)[0] == some_points()[:2]


def test_points_of_another_engine_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.points.jsonl"
    with PointsFile(path, ENGINE, resume=False) as file:
        file.append(some_points()[0])
    with pytest.raises(ConfigError, match=r"device is 'b', but the points in .* were measured with 'a'"):
        PointsFile(path, {**ENGINE, "device": "b"}, resume=True)
    for damage in ("not json\n", '{"format": 1}\n', '{"probe": {}}\n', '{"format": 99, "engine": {}}\n'):
        path.write_text(damage)
        with pytest.raises(ConfigError, match="line 1: not a line of a points file"):
            PointsFile(path, ENGINE, resume=True)
    path.write_text(json.dumps({"format": 1, "engine": ENGINE}) + "\n[]\n")
    with pytest.raises(ConfigError, match="line 2"):
        PointsFile(path, ENGINE, resume=True)


def test_sweeps_are_combined_by_their_median(tmp_path: Path) -> None:
    point = some_points()[0]
    sweeps = [dataclasses.replace(point, seconds=point.seconds * factor, sweep=i) for i, factor in enumerate((1.0, 1.5, 3.0))]
    (one,) = combined(sweeps)
    assert one.seconds == pytest.approx(1.5 * point.seconds) and one.probe == point.probe and one.batch == point.batch
    assert drift(sweeps) == pytest.approx(2.0 / 1.5)
    assert np.isnan(drift([point]))


def test_a_point_is_the_median_of_its_steps() -> None:
    probe = Probe("decode", 2, 10)
    batches = [Batch(decodes=2, decode_kv=22 + 2 * i) for i in range(3)]
    point = Point.of(probe, batches, [3.0, 1.0, 2.0], [0.3, 0.1, 0.2])
    assert (point.seconds, point.execute_seconds, point.batch.decode_kv, point.steps) == (2.0, 0.2, 24.0, 3)
    assert point.spread == pytest.approx(0.5)
    assert str(probe) == "2 decodes at 10" and str(Probe("mixed", 1, 5, 64)) == "1 decode at 5 + chunk 64"


# --- settings and command line --------------------------------------------------------------------


def test_engine_settings_come_from_the_model_and_from_set() -> None:
    tiny = engine_options("tiny", ["engine.num_blocks=64", "engine.enforce_eager=true", "engine.extra.kv_cache_dtype=auto"])
    assert tiny.num_blocks == 64 and tiny.enforce_eager and tiny.extra == {"kv_cache_dtype": "auto"}
    assert tiny.max_model_len == TINY["max_model_len"]
    stated = dataclasses.replace(TRUE, provenance=Provenance(num_blocks=99, block_size=32))
    assert (engine_options("tiny", [], stated).num_blocks, engine_options("tiny", [], stated).block_size) == (99, 32)
    assert engine_options("tiny", ["engine.num_blocks=64"], stated).num_blocks == 64  # what the user sets wins
    big = engine_options("llama-3-8b-shape", [])
    assert (big.max_model_len, big.max_num_seqs, big.num_blocks) == (LONGEST, 256, None)
    config = engine_config(tiny, TRUE, 64)
    assert (config.num_blocks, config.max_model_len, config.time_model) == (64, 1024, TRUE)
    assert set(backend_settings(tiny)) == {"model", "load_format", "dtype", "gpu_memory_utilization", "enforce_eager", "seed", "extra"}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("num_blocks=3", "must be engine.FIELD=VALUE"),
        ("engine.num_block=3", "did you mean 'num_blocks'"),
        ("engine.num_blocks=x", "must be an integer"),
        ("engine.num_blocks=0", "num_blocks: 0"),
        ("engine.extra.async_scheduling=true", "cannot be given here"),
    ],
)
def test_engine_settings_refuse(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        engine_options("tiny", [word])
    with pytest.raises(ConfigError, match="given twice"):
        engine_options("tiny", ["engine.seed=1", "engine.seed=2"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "a.npz"], "must end in .json"),
        (["--budget-seconds", "0"], "--budget-seconds: 0"),
        (["--max-batch", "0"], "--max-batch: 0"),
        (["--max-batch", "500"], "the engine holds 128"),
        (["--sweeps", "0"], "--sweeps: 0"),
        (["--name", " "], "--name: empty"),
        (["--set", "engine.seeds=1"], "did you mean 'seed'"),
    ],
)
def test_calibrate_engine_refuses_before_it_builds_anything(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert calibrate.main(["engine", "--model", "tiny", "--out", "a.json", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert not list(tmp_path.iterdir())


def test_calibrate_engine_does_not_overwrite_points(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = tmp_path / "a.points.jsonl"
    points.write_text("kept\n")
    assert calibrate.main(["engine", "--model", "tiny", "--out", str(tmp_path / "a.json")]) == 2
    assert "holds points already; use --resume, --overwrite or another place" in capsys.readouterr().err
    assert points.read_text() == "kept\n"


def test_shapes_are_those_of_the_models(tmp_path: Path) -> None:
    assert model_shape("llama-2-7b-shape").parameters == 6_738_415_616
    assert model_shape("llama-3-8b-shape").parameters == 8_030_261_248
    assert model_shape("llama-2-7b-shape").kv_bytes_per_token == 2 * 32 * 32 * 128 * 2
    for name in SHAPES:
        config = json.loads((write_shape(name, tmp_path / name) / "config.json").read_text())
        assert config["num_attention_heads"] * config["head_dim"] == config["hidden_size"]
    with pytest.raises(ConfigError, match="did you mean 'llama-2-7b-shape'"):
        model_shape("llama-2-7b")
    assert CHUNK_STEPS >= 3
