"""Iteration times of live traffic: the model that remembers, its fit, and the calibration made of logs."""

from __future__ import annotations

import functools
import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmsched_baselines import Setting, make_policy
from llmsched_env.backends import make_backend
from llmsched_env.engine.record_backend import RecordBackend
from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import ConfigError
from llmsched_env.perf import Batch, TrafficTime, load_calibration, save_calibration
from llmsched_env.runner import run_episode
from llmsched_env.types import Workload
from llmsched_env.workload import load_scenario
from llmsched_hardware.calibration.from_log import combined, fit_log, fit_logs, iterations_of, not_covered
from llmsched_hardware.calibration.iteration_log import COLUMNS, IterationLog, IterationLogWriter, IterationRow
from llmsched_hardware.calibration.traffic_fit import (
    LEAST_ROWS,
    Iterations,
    fit_traffic,
    knots_of,
    new_shapes,
)

TRUE = TrafficTime(
    tokens=(1.0, 64.0, 512.0),
    linear=(2e-3, 3e-3, 8e-3),
    decode=2e-5,
    decode_kv=1e-7,
    prefill_work=4e-9,
    finished=4e-4,
    new_shape=1.5e-3,
    new_shape_token=3e-6,
    shapes=32,
)
ENGINE = {"device": "a CPU", "vllm": "0.32.0", "model": "tiny", "max_num_seqs": 64, "max_num_batched_tokens": 512, "steps": "whole"}


@functools.cache
def traffic(model: TrafficTime, seed: int, requests: int = 150, rate: float = 14.0) -> tuple[np.ndarray, np.ndarray]:
    """Batches and seconds of a simulated episode."""
    scenario = load_scenario("azure-conv")
    engine = EngineConfig.vllm(time_model=model, num_blocks=4096, max_num_seqs=64, max_num_batched_tokens=512)
    policy = make_policy("vllm", Setting(scenario.statistics, rate, engine))
    backend = make_backend("sim")
    assert isinstance(backend, RecordBackend)
    batches, seconds = [], []

    def on_step(report, view) -> None:  # type: ignore[no-untyped-def]
        if not report.idle:
            batches.append(backend.record.batch.array())
            seconds.append(report.duration)

    workload = scenario.generate(seed, rate=rate, num_requests=requests)
    short = Workload.of(workload.arrival, np.minimum(workload.prompt_tokens, 800), np.minimum(workload.output_tokens, 100))
    run_episode(policy, short, backend=backend, on_step=on_step)
    return np.array(batches), np.array(seconds)


def test_an_engine_tells_its_model_who_started_and_who_finished_and_starts_with_an_empty_memory() -> None:
    batches, seconds = traffic(TRUE, 0)
    started, finished = batches[:, -2 if len(batches[0]) == 13 else 11], batches[:, 12]
    assert started.sum() == 150
    assert finished.sum() == 150 - finished_at_the_end(batches)
    # The same sums in the same order, from an empty memory, give the same times to the last bit: twice, since each begins anew.
    for _ in range(2):
        assert np.array_equal(TRUE.seconds_of(batches), seconds)


def finished_at_the_end(batches: np.ndarray) -> float:
    """Requests that ended with the last batch, which no batch follows."""
    return float(batches[-1, 0] + batches[-1, 2])


@given(st.lists(st.integers(1, 12), max_size=60), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_shapes_are_remembered_as_a_least_recently_used_cache_does(tokens: list[int], shapes: int) -> None:
    kept: OrderedDict[int, None] = OrderedDict()
    expected = []
    for value in tokens:
        expected.append(value not in kept)
        kept[value] = None
        kept.move_to_end(value)
        if len(kept) > shapes:
            kept.popitem(last=False)
    found = new_shapes(np.array(tokens, dtype=float), np.zeros(len(tokens), dtype=np.int64), shapes)
    assert found.tolist() == expected
    model = TrafficTime(tokens=(1.0, 20.0), linear=(1e-3, 1e-3), new_shape=1.0, shapes=shapes)
    batches = np.array([Batch(decodes=float(t), decode_kv=float(t), batch_size=float(t)).array() for t in tokens]).reshape(
        -1, Batch().array().size
    )
    assert (model.seconds_of(batches) > 0.5).tolist() == expected


def test_a_new_engine_has_seen_nothing() -> None:
    tokens = np.array([5.0, 5.0, 5.0, 5.0])
    assert new_shapes(tokens, np.array([0, 0, 1, 1]), 8).tolist() == [True, False, True, False]
    assert not new_shapes(tokens, np.array([0, 0, 1, 1]), 0).any()


def test_a_model_survives_its_file(tmp_path: Path) -> None:
    save_calibration(TRUE, tmp_path / "traffic.json")
    assert load_calibration(tmp_path / "traffic.json") == TRUE
    assert "new_shape" in json.loads((tmp_path / "traffic.json").read_text())["coefficients"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shapes": -1}, "time_model.shapes"),
        ({"shapes": 100_000}, "time_model.shapes"),
        ({"finished": -1.0}, "time_model.finished"),
        ({"linear": (1e-3, 0.0, 1e-3)}, "time_model.linear"),
        ({"tokens": (1.0, 1.0, 2.0)}, "time_model.tokens"),
        ({"linear": (1e-3,)}, "time_model.linear"),
        ({"max_tokens": 0.0}, "time_model.max_tokens"),
    ],
)
def test_what_makes_no_sense_is_refused(change: dict[str, object], message: str) -> None:
    fields = {"tokens": TRUE.tokens, "linear": TRUE.linear, **change}
    with pytest.raises(ConfigError, match=message):
        TrafficTime(**fields)  # type: ignore[arg-type]


def noisy(seeds: range, noise: float, stalls: float = 0.0) -> Iterations:
    rng = np.random.default_rng(1)
    parts = [traffic(TRUE, seed) for seed in seeds]
    batches = np.concatenate([b for b, _ in parts])
    seconds = np.concatenate([s for _, s in parts]) * np.exp(noise * rng.standard_normal(len(batches)) - noise**2 / 2)
    seconds[rng.random(seconds.size) < stalls] *= 40.0
    run = np.concatenate([np.full(len(b), i) for i, (b, _) in enumerate(parts)])
    return Iterations(batches, seconds, run, run)


def test_the_truth_is_found_again_on_traffic_that_was_not_fitted() -> None:
    found = fit_traffic(noisy(range(4), 0.1))
    assert found.terms.shapes == 32
    assert found.model.finished == pytest.approx(TRUE.finished, rel=0.15)
    assert {("finished",), ("new_shape", "new_shape_token")} <= set(found.terms.groups)
    assert ("started",) not in found.terms.groups
    assert found.without["new_shape"] > found.without["finished"] > found.error
    batches, seconds = traffic(TRUE, 9)
    ours = found.model.seconds_of(batches)
    assert ours.sum() == pytest.approx(seconds.sum(), rel=0.01)
    assert np.abs(ours / seconds - 1).mean() < 0.03


def test_stalls_of_the_machine_are_set_aside_and_counted() -> None:
    data = noisy(range(2), 0.05, stalls=0.01)
    found = fit_traffic(data)
    assert 0 < found.stalls.sum() < 0.03 * len(data)
    batches, seconds = traffic(TRUE, 9)
    assert found.model.seconds_of(batches).sum() == pytest.approx(seconds.sum(), rel=0.02)


def test_without_a_cache_of_kernels_none_is_found() -> None:
    plain = TrafficTime(tokens=TRUE.tokens, linear=TRUE.linear, decode=2e-5)
    parts = [traffic(plain, seed) for seed in range(3)]
    rng = np.random.default_rng(0)
    run = np.concatenate([np.full(len(b), i) for i, (b, _) in enumerate(parts)])
    seconds = np.concatenate([s for _, s in parts])
    found = fit_traffic(
        Iterations(np.concatenate([b for b, _ in parts]), seconds * np.exp(0.1 * rng.standard_normal(seconds.size)), run, run)
    )
    assert found.terms.shapes == 0 and found.model.new_shape == 0.0


def test_too_few_iterations_are_refused() -> None:
    batches, seconds = traffic(TRUE, 0, requests=30)
    few = Iterations(batches[:50], seconds[:50], np.zeros(50, dtype=np.int64), np.zeros(50, dtype=np.int64))
    with pytest.raises(ConfigError, match=f"iterations: 50, a fit needs at least {LEAST_ROWS}"):
        fit_traffic(few)


def test_points_of_the_line_lie_on_what_was_seen() -> None:
    tokens = np.array([3.0] * 50 + [7.0, 9.0, 400.0])
    knots = knots_of(tokens, 4)
    assert knots[0] == 3.0 and knots[-1] == 400.0 and set(knots) <= set(tokens.tolist())
    assert knots_of(np.full(5, 8.0), 4) == (8.0, 9.0)


def log_of(path: Path, seeds: range, engine: dict[str, object]) -> Path:
    """A log of simulated episodes, as the backend writes them."""
    writer = IterationLogWriter(path, engine)
    for seed in seeds:
        writer.begin_segment(policy="vllm", rate=14.0, seed=seed, repeat=0, warm_up=False)
        batches, seconds = traffic(TRUE, seed)
        end = 0.0
        for row, lasted in zip(batches, seconds, strict=True):
            end += lasted
            writer.append(
                IterationRow(
                    Batch(*row),
                    begin=end - lasted,
                    end=end,
                    execute_seconds=-1.0,
                    blocks=0,
                    waiting=0,
                    running=1,
                    preempted=0,
                    segment=writer.segment,
                )
            )
    writer.close()
    return path


def test_a_calibration_from_a_log_says_where_it_comes_from_and_what_it_does_not_cover(tmp_path: Path) -> None:
    found = fit_logs([log_of(tmp_path / "log.csv", range(3), ENGINE)], "mine")
    source = found.model.provenance
    assert source.name == "mine" and source.gpu == "a CPU" and "vllm" in source.source
    assert abs(found.held_out.bias) < 0.02 and found.held_out.mape < 0.05
    assert [group.name for group in found.groups] == ["vllm, 14 req/s"]
    assert found.between == 0.0  # a log of whole steps
    assert any("not covered" in line for line in found.lines())
    for form in ("formula", "linear"):
        other = fit_logs([tmp_path / "log.csv"], "mine", form)  # type: ignore[arg-type]
        assert other.form == form and other.held_out.mape > found.held_out.mape
    with pytest.raises(ConfigError, match="form: 'cubic'"):
        fit_logs([tmp_path / "log.csv"], "mine", "cubic")  # type: ignore[arg-type]


def test_the_time_between_two_iterations_of_a_server_is_part_of_each() -> None:
    rows = np.zeros((200, len(COLUMNS)))
    at = {name: k for k, name in enumerate(COLUMNS)}
    rows[:, at["decodes"]] = rows[:, at["batch_size"]] = rows[:, at["sampled"]] = 1 + np.arange(200) % 7
    rows[:, at["decode_kv"]] = 100.0
    rows[:, at["running"]] = 8
    rows[:, at["begin"]] = np.arange(200) * 6e-3
    rows[:, at["end"]] = rows[:, at["begin"]] + 5e-3
    rows[100, at["begin"] : at["end"] + 1] += 0.0
    server = {**ENGINE}
    del server["steps"]
    found = fit_log(IterationLog(server, rows, {}), "server")
    assert found.between == pytest.approx(1e-3)
    assert found.model.seconds(Batch(decodes=4.0, decode_kv=100.0, batch_size=4.0)) == pytest.approx(6e-3, rel=0.01)
    assert fit_log(IterationLog({**server, "asynchronous": True}, rows, {}), "server").between == 0.0


def test_what_is_not_covered_is_said_in_words() -> None:
    batches, seconds = traffic(TRUE, 0)
    run = np.zeros(len(seconds), dtype=np.int64)
    lines = not_covered(Iterations(batches, seconds, run, run), {"max_num_seqs": 512, "max_num_batched_tokens": 512, "max_model_len": 4096})
    assert any("decodes in a batch (the engine takes 512)" in line for line in lines)
    decodes = batches[:, 2] == 0
    alone = Iterations(batches[decodes], seconds[decodes], run[decodes], run[decodes])
    assert "several prompts at once: none" in not_covered(alone, {})


def test_runs_of_the_same_batches_are_made_one() -> None:
    rows = np.zeros((30, len(COLUMNS)))
    at = {name: k for k, name in enumerate(COLUMNS)}
    rows[:, at["decodes"]] = rows[:, at["batch_size"]] = np.tile(1.0 + np.arange(10), 3)
    rows[:, at["segment"]] = np.repeat([0, 1, 2], 10)
    rows[[10, 20], at["finished"]] = 7.0  # of the run before: no batch of this one
    seconds = np.concatenate([np.full(10, 3e-3), np.full(10, 1e-3), np.full(10, 2e-3)])
    rows[:, at["end"]] = np.cumsum(seconds)
    rows[:, at["begin"]] = rows[:, at["end"]] - seconds
    about = {"policy": "vllm", "rate": 1.0, "seed": 0}
    log = IterationLog({"steps": "whole"}, rows, {k: {**about, "repeat": k} for k in range(3)})
    data, _ = iterations_of(log)
    assert len(combined(data, log, "apart")[0]) == 30
    for how, expected in (("median", 2e-3), ("fastest", 1e-3)):
        one, kept = combined(data, log, how)  # type: ignore[arg-type]
        assert len(one) == len(kept) == 10 and one.seconds == pytest.approx(np.full(10, expected))
        assert one.batches.tobytes() == data.batches[:10].tobytes()
    other = IterationLog({"steps": "whole"}, rows, {0: about, 1: about, 2: {**about, "rate": 2.0}})
    assert len(combined(data, other, "median")[0]) == 20  # another rate is another run, whatever its batches
