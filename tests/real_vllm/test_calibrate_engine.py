"""calibrate.py engine on vLLM's CPU build: sweep, fit, held-out workload, resumption after a kill, use of the result.

Times are whatever this machine gives; no test asserts one.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if importlib.util.find_spec("vllm") is None:  # importing it would read its settings before the backend has made them
    pytest.skip("vLLM is not installed here (make test-vllm)", allow_module_level=True)

import gymnasium as gym

from llmsched_baselines.overrides import Overrides, with_calibration
from llmsched_env.cli import calibrate
from llmsched_env.errors import ConfigError
from llmsched_env.perf import FormulaTime, TableTime, load_calibration
from llmsched_hardware.calibration.points import Probe, read_points
from llmsched_hardware.real_engine import EngineOptions, build_engine, engine_scheduler, free_engine, num_usable_blocks
from llmsched_hardware.shapes import model_shape, write_shape
from llmsched_hardware.versions import cpu_block_size, installed, prepare_environment

prepare_environment()

from llmsched_hardware.calibration.plan import EngineLimits, Group, plan
from llmsched_hardware.calibration.sweep import NotReachedError, Stepper, measure, warm_up
from tests.env_settings import ADMIT

ROOT = Path(__file__).resolve().parents[2]
BLOCKS, LONGEST, SEQS, BUDGET = 48, 256, 8, 64
ENGINE = [f"engine.num_blocks={BLOCKS}", f"engine.max_model_len={LONGEST}", f"engine.max_num_seqs={SEQS}"]
ENGINE += [f"engine.max_num_batched_tokens={BUDGET}"]


def words(out: Path, *more: object) -> list[str]:
    return ["engine", "--model", "tiny", "--out", str(out), "--set", *ENGINE, "--quiet", *map(str, more)]


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A calibration of a small engine and what the program printed."""
    out = tmp_path_factory.mktemp("calibration") / "small.json"
    done = subprocess.run(
        [sys.executable, "scripts/calibrate.py", *words(out, "--sweeps", 1, "--held-out", 20, "--budget-seconds", 200)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return out, done.stdout


@pytest.fixture
def engine() -> Iterator[Any]:
    options = EngineOptions(num_blocks=BLOCKS, max_model_len=LONGEST, max_num_seqs=SEQS, max_num_batched_tokens=BUDGET)
    built = build_engine(options)
    yield built
    free_engine(built)


def limits_of(engine: Any) -> EngineLimits:
    return EngineLimits(SEQS, SEQS, BUDGET, LONGEST, num_usable_blocks(engine), 16)


# --- the result -----------------------------------------------------------------------------------


def test_the_calibration_states_machine_ranges_and_errors(calibrated: tuple[Path, str]) -> None:
    out, printed = calibrated
    formula, tables = load_calibration(str(out)), load_calibration(str(out.with_suffix(".npz")))
    assert isinstance(formula, FormulaTime) and isinstance(tables, TableTime)
    for model in (formula, tables):
        source = model.provenance
        assert (source.name, source.num_blocks, source.block_size) == ("small", BLOCKS, cpu_block_size())
        assert f"vLLM {installed()[1]}" in source.engine and f"max_num_seqs {SEQS}" in source.engine
        assert source.model.startswith("tiny, float32") and source.gpu
        assert "MAPE" in source.fit_error and "Held out" in source.fit_error and "simulated mean latency" in source.fit_error
        assert "Seconds of whole engine steps" in source.notes and "The paper's two terms: d0 = " in source.notes
        assert f"{SEQS} decodes" in source.valid_range
    assert f"KV capacity  {BLOCKS} blocks" in printed and "held out" in printed and "linear " in printed
    points, _ = read_points(out.with_suffix(".points.jsonl"))
    limits = EngineLimits(SEQS, SEQS, BUDGET, LONGEST, BLOCKS, cpu_block_size())
    assert {p.probe for p in points} == {probe for group in plan(limits) for probe in group.probes}
    assert all(0 < p.execute_seconds < p.seconds for p in points)


def test_the_calibration_works_at_once_in_scripts_and_environments(calibrated: tuple[Path, str]) -> None:
    out, _ = calibrated
    for path in (out, out.with_suffix(".npz")):
        overrides = with_calibration(Overrides(), str(path))
        assert overrides.engine == {"time_model": str(path), "num_blocks": BLOCKS, "block_size": cpu_block_size()}
        settings = {**overrides.engine, "max_model_len": LONGEST, "oversize": "reject"}
        env = gym.make("llmsched_env:LLMSched-v1", **ADMIT, engine=settings, num_requests=5)
        env.reset(seed=0)
        env.step(env.action_space.sample())
        assert env.unwrapped.engine.time_model == load_calibration(str(path))  # type: ignore[attr-defined]
        env.close()


# --- killed and resumed ---------------------------------------------------------------------------


def test_a_killed_sweep_goes_on_where_it_was(tmp_path: Path) -> None:
    out = tmp_path / "killed.json"
    points_path = out.with_suffix(".points.jsonl")
    program = [sys.executable, "scripts/calibrate.py", *words(out, "--sweeps", 400, "--budget-seconds", 200)]
    with subprocess.Popen(program, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        until = time.monotonic() + 150
        while not (points_path.exists() and points_path.read_bytes().count(b"\n") > 20):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGKILL)
    kept, whole = read_points(points_path)
    before = points_path.read_bytes()[:whole]
    assert not out.exists() and len(kept) >= 20
    # Half a minute is far too little for 400 sweeps: the rest is left out, and a result is written all the same.
    assert calibrate.main(words(out, "--sweeps", 400, "--held-out", 20, "--budget-seconds", 25, "--resume")) == 0
    points, _ = read_points(points_path)
    assert points_path.read_bytes().startswith(before) and points[: len(kept)] == kept and len(points) > len(kept)
    assert len({(p.sweep, p.probe) for p in points}) == len(points)
    assert load_calibration(str(out)).provenance.num_blocks == BLOCKS


def test_points_of_another_engine_are_refused(calibrated: tuple[Path, str], capfd: pytest.CaptureFixture[str]) -> None:
    out, _ = calibrated
    given = words(out, "--resume")
    given[given.index(f"engine.max_num_batched_tokens={BUDGET}")] = "engine.max_num_batched_tokens=128"
    assert calibrate.main(given) == 2
    assert f"max_num_batched_tokens is 128, but the points in {out.with_suffix('.points.jsonl')}" in capfd.readouterr().err


def test_too_short_a_budget_keeps_the_points_and_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "short.json"
    assert calibrate.main(words(out, "--budget-seconds", 0.01)) == 2
    assert "go on with --resume" in capfd.readouterr().err
    assert out.with_suffix(".points.jsonl").exists() and not out.exists()


# --- the sweep itself -----------------------------------------------------------------------------


def test_every_probe_is_the_batch_that_was_asked_for(engine: Any) -> None:
    stepper = Stepper(engine)
    warm_up(stepper, limits_of(engine))
    groups = [
        Group(0, (Probe("decode", 1, 20), Probe("mixed", 1, 20, 16), Probe("decode", 5, 20), Probe("mixed", 5, 20, 59))),
        Group(0, tuple(Probe("prefill", chunk=24, chunk_context=context) for context in (0, 100, 200))),
    ]
    for group in groups:
        points: list[Any] = []
        assert not measure(stepper, group, LONGEST, lambda point, own=points: own.append(point) or True)
        assert tuple(p.probe for p in points) == group.probes
        for point in points:
            probe, batch = point.probe, point.batch
            assert (batch.decodes, batch.prefill_tokens, batch.prefills) == (probe.decodes, probe.chunk, float(probe.chunk > 0))
            assert batch.prefill_squares == probe.chunk**2 and batch.prefill_context == probe.chunk_context
            assert batch.prefill_work == probe.chunk * (probe.chunk / 2 + probe.chunk_context)
        if not group.is_prefill:
            # The first request gains a token a step; the other four are prefilled in two steps, in which nobody else advances.
            assert [point.batch.decode_kv for point in points] == [28, 35.5, 45 + 4 * 28, 52.5 + 4 * 35.5]
        assert not engine_scheduler(engine).requests and not engine.has_unfinished_requests()
    assert engine_scheduler(engine).max_num_scheduled_tokens == BUDGET


def test_stepping_counts_as_the_simulator_does(engine: Any) -> None:
    stepper = Stepper(engine)
    stepper.add(100, 3)
    stepper.add(30, 3)
    sums = [stepper.step().batch for _ in range(4)]
    assert [(b.decodes, b.prefills, b.prefill_tokens, b.sampled, b.load) for b in sums] == [
        (0, 1, 64, 0, 64),
        (0, 2, 64, 1, 128),  # 36 of the first, which then has its first token, and 28 of the second
        (1, 1, 2, 2, 131),
        (2, 0, 0, 2, 133),
    ]
    assert [b.decode_kv for b in sums] == [0, 0, 101, 133]
    assert sums[1].prefill_work == 36 * (18 + 64) + 28 * 14 and sums[1].prefill_context64 == 64
    stepper.clear()
    assert num_usable_blocks(engine) == engine_scheduler(engine).kv_cache_manager.block_pool.get_num_free_blocks()


def test_a_batch_that_does_not_fit_is_reported_not_made_up(engine: Any) -> None:
    stepper = Stepper(engine)
    group = Group(0, (Probe("decode", 2, 200), Probe("decode", 8, 200)))
    points: list[Any] = []
    failed = measure(stepper, group, LONGEST, lambda point: points.append(point) or True)
    assert [p.probe.decodes for p in points] == [2]
    assert list(failed) == [group.probes[1]] and "KV memory" in failed[group.probes[1]]
    assert not engine_scheduler(engine).requests
    with pytest.raises(NotReachedError):
        raise NotReachedError


def test_the_end_of_the_time_ends_a_group(engine: Any) -> None:
    points: list[Any] = []
    group = Group(0, tuple(Probe("decode", n, 20) for n in (1, 2, 3)))
    assert not measure(Stepper(engine), group, LONGEST, lambda point: points.append(point))  # None is false
    assert len(points) == 1 and not engine_scheduler(engine).requests


def test_vllm_takes_the_shapes_of_7b_models(tmp_path: Path) -> None:
    from vllm import EngineArgs

    for name in ("llama-2-7b-shape", "llama-3-8b-shape"):
        folder = write_shape(name, tmp_path / name)
        arguments = EngineArgs(model=str(folder), load_format="dummy", skip_tokenizer_init=True, max_model_len=4096, enforce_eager=True)
        config = arguments.create_engine_config().model_config
        shape = model_shape(name)
        assert config.get_hidden_size() == shape.hidden and config.get_head_size() == shape.head_dim
        assert config.get_total_num_kv_heads() == shape.kv_heads and str(config.dtype) == f"torch.{shape.dtype}"
        assert config.get_vocab_size() == shape.vocab


def test_refusals_name_what_is_wrong() -> None:
    with pytest.raises(ConfigError, match="model"):
        EngineOptions(model="")
    assert np.isfinite(model_shape("tiny").weight_bytes)
