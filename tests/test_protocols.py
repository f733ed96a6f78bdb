"""Values and objects that users give: taken as they are meant, or refused with ``ConfigError`` where they are given."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numba
import numpy as np
import pytest

from llmsched_env import LLMSchedEnv, checks, fluid
from llmsched_env.backends import make_backend
from llmsched_env.compiled import compiled
from llmsched_env.engine_config import EngineConfig, EpisodeLimits
from llmsched_env.errors import ConfigError
from llmsched_env.metrics import mean_interval
from llmsched_env.perf import (
    Batch,
    FormulaTime,
    IterationTimeModel,
    LinearTime,
    MixedAttentionTime,
    Provenance,
    TableTime,
    load_calibration,
)
from llmsched_env.perf import base as perf_base
from llmsched_env.perf.base import CalibrationRangeWarning, check_packed
from llmsched_env.perf.batch import BATCH_FIELDS, LOAD, BatchSums
from llmsched_env.perf.mixed_attention import mixed_attention_seconds
from llmsched_env.perf.models import formula_seconds, linear_seconds
from llmsched_env.perf.tables import table_seconds
from llmsched_env.reward import SloGoodputReward, make_reward
from llmsched_env.types import MOST_QUEUES, Decision, LengthStatistics, QueueLayout, Workload
from tests.env_settings import ADMIT
from tests.env_walk import together, walked, walked_together

ENGINE = EngineConfig.vllm()
STATISTICS = LengthStatistics.of([100, 200], [10, 50], [1, 3])
TABLES: dict[str, Any] = {
    "tokens": [1, 8], "linear": [1e-3, 2e-3], "decode_batch": [1, 4], "decode_kv": [0, 64], "decode": np.full((2, 2), 1e-4),
    "prefill_context": [0, 64], "prefill_chunk": [1, 16], "prefill": np.full((2, 2), 1e-4), "sequences": [1, 8],
    "per_sequence": [1e-5, 2e-5], "constant": 1e-4, "per_request": 0.0, "lookup": "linear", "beyond": "clip", "provenance": Provenance(),
}  # fmt: skip
MIXED: dict[str, Any] = {
    "tokens": [1, 8], "linear": [1e-3, 2e-3], "sequences": [1, 4], "per_sequence": [1e-5, 2e-5], "prefill_chunk": [8, 16],
    "prefill_context": [0, 32], "decode_batch": [1, 2], "decode_context": [16, 64], "prefill": np.full((2, 2), 1e-4),
    "decode": np.full((2, 2), 1e-4), "mixed": np.full((2, 2, 2, 2), 2e-4),
}  # fmt: skip

# What is in no field's range, or of another type than it looks.
NASTY: list[Any] = [
    None, True, np.bool_(True), 0, -1, 1.5, -0.0, 5e-324, 1e-320, 1e300, 2**31, 2**53 + 1, 2**63, 2**64, 10**400, math.nan, math.inf,
    -math.inf, np.int32(-1), np.uint64(2**63), np.float32("nan"), np.float64(1e308), 1j, "", "x", "1", b"1", Decimal("NaN"), Fraction(1, 3),
    [], (), [1], [None], ["1"], [True, True], [1, 2.5], [math.nan, 1], [1, math.inf], [2**31, 2**32], [10**30, 10**31], [[1], [1, 2]],
    [-1, 2], [1e-320, 2e-320], [1e308, 1e308], {}, {"a": 1}, {1}, object(), print, int, np.zeros(0), np.zeros((2, 2)), np.array(3),
    np.array([1, 2], "M8[s]"), np.array([1, 2], object), np.array([1, 2], np.uint8), np.array([5e-324, 1.0]),
    np.array([1, 2 + 0j]), np.array(["1", "2"]),
    np.array([2**31, 2**40]), np.array([1e18, 2e18]), np.ma.masked_array([1, 2], [True, False]), range(3), 1e9, 2**30,
]  # fmt: skip

CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "LinearTime": (LinearTime, {"d0": 1e-3, "d1": 1e-6, "provenance": Provenance()}),
    "FormulaTime": (
        FormulaTime,
        {
            **dict.fromkeys(("a", "b", "s", "c", "d1", "d2", "d3", "d4"), 1e-3),
            **dict.fromkeys(("knee", "max_tokens", "max_decodes", "max_context"), 128.0),
        },
    ),
    "TableTime": (TableTime, TABLES),
    "MixedAttentionTime": (MixedAttentionTime, MIXED),
    "Provenance": (Provenance, {"name": "x", "num_blocks": 3, "block_size": 4, "notes": ""}),
    "load_calibration": (load_calibration, {"name_or_file": "a100-llama2-7b-c10"}),
    "QueueLayout": (QueueLayout, {"by": "prompt", "edges": (1, 5), "num_types": 1, "segment_ends": (3, 9)}),
    "QueueLayout types": (QueueLayout, {"by": "type", "num_types": 3}),
    "EngineConfig": (EngineConfig, {f.name: getattr(ENGINE, f.name) for f in dataclasses.fields(ENGINE)}),
    "EngineConfig.class": (EngineConfig, {"admission_order": "class", "class_rank": (1, 0)}),
    "EngineConfig.paper": (EngineConfig.paper, {"capacity_tokens": 100, "d0": 1.0, "d1": 0.1, "boundary_slot": True}),
    "EngineConfig.replace": (ENGINE.replace, {"num_blocks": 300}),
    "EpisodeLimits": (EpisodeLimits, {"drain": True, "horizon": 3.0, "max_iterations": 4}),
    "Workload": (
        Workload.of,
        {"arrival": [0, 1.5], "prompt_tokens": [1, 2], "output_tokens": [3, 4], "type_id": [0, 1], "request_id": ("a", "b")},
    ),
    "LengthStatistics": (LengthStatistics.of, {"prompt": [1, 2], "output": [3, 4], "weight": [1, 1], "type_id": [0, 1], "source": "x"}),
    "Decision": (Decision.of, {"run": [1, 0], "admit": [1, 2], "evict": [0, 0]}),
    "make_reward": (make_reward, {"spec": "latency"}),
    "make_reward.name": (lambda name: make_reward({"name": name}), {"name": "latency"}),
    "make_reward.ttft": (lambda ttft, tpot: make_reward({"name": "slo_goodput", "ttft": ttft, "tpot": tpot}), {"ttft": 1.0, "tpot": 1.0}),
    "SloGoodputReward": (SloGoodputReward, {"ttft": 1.0, "tpot": 1.0}),
    "mean_interval": (mean_interval, {"values": [1.0], "confidence": 0.9}),
    "fluid_equilibrium": (fluid.fluid_equilibrium, {"prompt": [100, 200], "output": [10, 20], "rate": [0.1, 0.2], "engine": ENGINE}),
    "equilibrium_of": (fluid.equilibrium_of, {"statistics": STATISTICS, "rate": 1.0, "engine": ENGINE}),
    "window_rates": (
        functools.partial(fluid.window_rates),
        {"durations": [1.0, 2.0], "rates": [3.0, 1.0], "window_seconds": 0.5, "periodic": True},
    ),
    "wait_thresholds": (
        fluid.wait_thresholds,
        {
            "prompt": [100, 200], "output": [10, 20], "rate": [0.1, 0.2], "engine": ENGINE, "class_id": [0, 1], "num_classes": 2,
            "slack": 1.25, "rounding": "auto", "overload": True,
        },
    ),
    "check_wait": (
        fluid.check_wait,
        {"thresholds": [1, 2], "prompt": [100, 200], "output": [10, 20], "rate": [0.1, 0.2], "engine": ENGINE, "overload": True},
    ),
    "wait_thresholds_of": (
        fluid.wait_thresholds_of, {"statistics": STATISTICS, "layout": QueueLayout(), "rate": 1.0, "engine": ENGINE, "slack": 1.1},
    ),
    "nested_thresholds": (
        fluid.nested_thresholds,
        {
            "statistics": STATISTICS, "rate": 1.0, "engine": ENGINE, "segment_ends": (20, 50), "horizon_seconds": 60.0, "slack": 1.2,
            "eta": 0.1, "delta": 0.1, "rounding": "auto", "num_types": 2, "overload": True,
        },
    ),
    "check_nested": (
        fluid.check_nested,
        {
            "thresholds": [2.0, 1.6], "statistics": STATISTICS, "rate": 1.0, "engine": ENGINE, "segment_ends": (20, 50),
            "horizon_seconds": 60.0, "overload": True,
        },
    ),
    "safety_buffer": (
        fluid.safety_buffer,
        {
            "thresholds": [2.0, 1.0], "segment_ends": (20, 50), "continuation": [0.3], "prompt": 100, "engine": ENGINE,
            "horizon_seconds": 60.0, "delta": 0.1, "num_types": 2,
        },
    ),
    "theta_root": (fluid.theta_root, {"n_prev": 4.0, "n_k": 2.0, "p": 0.3}),
    "continuation": (fluid.continuation, {"statistics": STATISTICS, "segment_ends": (20, 50)}),
    "merge_segments": (fluid.merge_segments, {"statistics": STATISTICS, "segment_ends": (20, 50)}),
    "equal_width_ends": (fluid.equal_width_ends, {"statistics": STATISTICS, "num_segments": 3}),
    "equal_probability_ends": (fluid.equal_probability_ends, {"statistics": STATISTICS, "num_segments": 3}),
    "segment_design": (
        fluid.segment_design,
        {
            "statistics": STATISTICS, "rate": 1.0, "engine": ENGINE, "horizon_seconds": 60.0, "num_segments": 2, "slack": 1.2,
            "eta": 0.1, "delta": 0.1, "num_types": 2,
        },
    ),
    "segment_designs": (
        fluid.segment_designs, {"statistics": STATISTICS, "rate": 1.0, "engine": ENGINE, "horizon_seconds": 60.0, "candidates": (1, 2)},
    ),
    "allocate_cap": (fluid.allocate_cap, {"total_limit": 10.0, "continuation": [0.5], "widths": [3, 4], "eta": 0.1}),
}  # fmt: skip
NOT_VALUES = {"statistics", "engine", "layout"}  # objects that mypy checks and that have no text form


@pytest.mark.parametrize("name", CALLS)
def test_a_value_is_taken_or_refused_with_its_name(name: str) -> None:
    call, good = CALLS[name]
    call(**good)
    for field in good.keys() - NOT_VALUES:
        for value in NASTY:
            try:
                call(**{**good, field: value})
            except ConfigError as error:
                assert len(str(error)) < 3000, field
            except Exception as error:
                raise AssertionError(f"{name}.{field} = {value!r}: {type(error).__name__}: {error}") from error


# --- numbers ----------------------------------------------------------------------------------------
INTEGERS = ("capacity_tokens", "num_blocks", "block_size", "max_num_batched_tokens", "max_num_seqs", "max_model_len")
FLAGS = ("boundary_slot", "enable_chunked_prefill", "scheduler_reserve_full_isl", "padded_prefill", "decode_needs_free_block")


@pytest.mark.parametrize("field", INTEGERS)
@pytest.mark.parametrize("value", [True, 1.0, "64", None, math.nan, math.inf, 0, -1, 2**30 + 1, 2**31, 2**63, 10**400, [64]])
def test_engine_integers(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"engine\.{field}: .*, must be an integer from 1 to 2\*\*30"):
        EngineConfig.vllm(**{field: value})


def test_numpy_numbers_are_numbers() -> None:
    engine = EngineConfig.vllm(
        num_blocks=np.int32(2**28), block_size=np.int16(16), watermark=np.float32(0.25), late_after=np.int64(3), class_rank=np.arange(2),
        admission_order="class", enable_chunked_prefill=np.bool_(True),
    )  # fmt: skip
    assert engine.kv_capacity_tokens == 2**32  # in int32 it would be 0
    assert engine.class_rank == (0, 1) and type(engine.class_rank[0]) is int and type(engine.num_blocks) is int
    assert engine == EngineConfig.vllm(
        num_blocks=2**28, block_size=16, watermark=0.25, late_after=3.0, class_rank=(0, 1), admission_order="class"
    )
    layout = QueueLayout("prompt", edges=np.array([3, 7]), segment_ends=[np.int8(5)])  # type: ignore[arg-type]
    assert layout == QueueLayout("prompt", (3, 7), segment_ends=(5,)) and hash(layout) == hash(QueueLayout("prompt", (3, 7), 1, (5,)))


@pytest.mark.parametrize("field", FLAGS)
@pytest.mark.parametrize("value", [1, 0, "yes", None, 1.0])
def test_engine_flags(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"engine\.{field}: .*, must be true or false"):
        EngineConfig.vllm(**{field: value})


@pytest.mark.parametrize("field", ["edges", "segment_ends"])
@pytest.mark.parametrize("value", [[2**31], [True], [1.0], ["1"], [0], [3, 3], [math.nan], 5, "12", None, [2**31 - 1], [[1]], {1}])
def test_layout_numbers(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"layout\.{field}(\[0\])?: "):
        QueueLayout("prompt", **{field: value})


def test_layouts_are_bounded() -> None:
    with pytest.raises(ConfigError, match="at most 65536 queues"):
        QueueLayout("prompt", tuple(range(1, 1000)), segment_ends=tuple(range(1, 1000)))
    with pytest.raises(ConfigError, match=r"layout\.num_types: 1099511627776"):
        QueueLayout("type", num_types=2**40)
    assert QueueLayout("type", num_types=MOST_QUEUES).num_queues == MOST_QUEUES


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_tokens": [1, 1.5]}, r"prompt_tokens: row 1 is 1\.5"),
        ({"prompt_tokens": [1, 2**31]}, r"prompt_tokens: row 1 is 2147483648, must be an integer from 1 to 2\*\*30"),
        ({"prompt_tokens": [1, 10**30]}, "prompt_tokens: row 1 is 10{30}, must be"),
        ({"prompt_tokens": [True, True]}, "prompt_tokens: row 0 is True"),
        ({"prompt_tokens": ["1", "2"]}, "prompt_tokens: row 0 is '1'"),
        ({"output_tokens": [1, math.nan]}, "output_tokens: row 1 is nan"),
        ({"output_tokens": [0, 1]}, "output_tokens: row 0 is 0"),
        ({"output_tokens": [1]}, r"output_tokens: shape \(1,\), must be \(2,\)"),
        ({"arrival": ["0", "1"]}, "arrival: .*, must be numbers"),
        ({"arrival": [0, 1e300]}, r"arrival: row 1 is 1e\+300"),
        ({"arrival": [math.nan, 0]}, "arrival: row 0 is nan"),
        ({"arrival": 3.0}, r"arrival: shape \(\)"),
        ({"type_id": [0, -1]}, "type_id: row 1 is -1"),
        ({"request_id": "ab"}, "request_id: 'ab', must be names"),
        ({"request_id": (1, 2)}, r"request_id: \(1, 2\), must be names"),
    ],
)
def test_workloads_name_the_row(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"arrival": [0, 1], "prompt_tokens": [1, 2], "output_tokens": [1, 2]}
    with pytest.raises(ConfigError, match=rf"workload\.{message}"):
        Workload.of(**{**good, **change})


def test_workloads_take_whole_floats_and_lists_of_names() -> None:
    workload = Workload.of([0, 1], np.array([1.0, 2.0]), [3, 4], request_id=["a", "b"])  # type: ignore[arg-type]
    assert workload.prompt_tokens.tolist() == [1, 2] and workload.prompt_tokens.dtype == np.int32 and workload.request_id == ("a", "b")
    assert len(Workload.of([], [], [])) == 0


def test_decisions_do_not_wrap_around() -> None:
    for evict in (2**32, np.array([2**32]), [0.5], [math.nan], "1", [1, 2]):
        with pytest.raises(ConfigError, match=r"decision\.evict"):
            Decision.of([1], [1], evict)
    decision = Decision.of([True, False], [2**40, 1], np.int8(1))
    assert [column.tolist() for column in (decision.run, decision.admit, decision.evict)] == [[1, 0], [2**31 - 1, 1], [1, 1]]


def test_messages_are_short_and_there() -> None:
    class Silent:
        def __repr__(self) -> str:
            raise RuntimeError

    assert checks.shown(Silent()) == "a Silent" and checks.shown(10**5000) == "a int" and len(checks.shown("x" * 10**6)) < 150


# --- time models ------------------------------------------------------------------------------------
class Own(IterationTimeModel):
    """A user's own model: whatever ``pack`` is told to give."""

    compiled_seconds = formula_seconds

    def __init__(self, packed: Any, provenance: Any = Provenance("own")) -> None:  # noqa: B008
        self.packed = packed
        self.provenance = provenance

    def pack(self) -> Any:
        if isinstance(self.packed, Exception):
            raise self.packed
        return self.packed


def read_by(reader: Any) -> type[Own]:
    """``Own`` with another compiled function; None: without one."""
    return type("Own", (Own,), {"compiled_seconds": reader})


L, F, T, M = linear_seconds, formula_seconds, table_seconds, mixed_attention_seconds
LINEAR, FORMULA = LinearTime(1.0, 0.0).pack(), FormulaTime(*[1e-3] * 8).pack()
TABLE, MIX = TableTime(**TABLES).pack(), MixedAttentionTime(**MIXED).pack()


def changed(packed: np.ndarray, place: int, value: float) -> np.ndarray:
    copy = packed.copy()
    copy[place] = value
    return copy


@pytest.mark.parametrize(("reader", "packed"), [(L, LINEAR), (F, FORMULA), (T, TABLE), (M, MIX), (T, np.append(TABLE, 5.0))])
def test_own_models_of_the_four_kinds_are_taken(reader: Any, packed: np.ndarray) -> None:
    engine = EngineConfig.vllm(time_model=read_by(reader)(packed))
    assert engine.time_model.seconds(Batch(1, 10, sampled=1, load=10, batch_size=1)) > 0
    assert check_packed("x", packed, reader) is packed


@pytest.mark.parametrize(
    ("reader", "packed", "message"),
    [
        (L, None, "gives a NoneType, must be a float64 array"),
        (L, [0.0, 1.0, 1.0], "gives a list"),
        (L, np.array([1, 1]), "gives int64"),
        (L, np.array([1, 1], np.float32), "gives float32"),
        (L, np.array([1, 1], ">f8"), "gives >f8"),
        (L, np.zeros((3, 1)), r"float64 of shape \(3, 1\)"),
        (L, np.array(1.0), r"float64 of shape \(\)"),
        (L, np.zeros(0), r"shape \(0,\)"),
        (L, np.zeros(6)[::2], "must be one contiguous row"),
        (L, np.array([1.0]), "gives 1 numbers, must be at least 2"),
        (L, np.array([math.nan, 1]), r"\[0\]: .*nan"),
        (L, np.array([0.0, 0.0]), "an iteration must take time"),
        (L, np.array([-1.0, 2.0]), r"\[0\]: .*-1\.0"),
        (F, np.array([1.0, 1.0]), "gives 2 numbers, must be at least 12"),
        (F, changed(FORMULA, 1, 0.0), "an iteration must take time"),
        (F, changed(FORMULA, 3, math.inf), r"\[3\]: .*inf"),
        (F, changed(FORMULA, 10, math.nan), r"\[10\]: .*nan"),
        (T, np.array([0.0, 0.0]), "gives 2 numbers, must be at least 26"),
        (T, changed(TABLE, 5, 1e6), r"\[5\]: 1000000\.0, must be where 2 of its \d+ numbers start"),
        (T, changed(TABLE, 5, -3), r"\[5\]: -3\.0"),
        (T, changed(TABLE, 5, 21.5), r"\[5\]: 21\.5"),
        (T, changed(TABLE, 5, math.nan), r"\[5\]: nan"),
        (T, changed(TABLE, 6, 1e9), r"\[6\]: 1000000000\.0, must be the length of an axis"),
        (T, changed(TABLE, 12, 48), "must be where 4 of its"),
        (T, changed(TABLE, 26, 9.0), "increasing"),
        (T, changed(TABLE, -1, math.nan), "its table, must be finite"),
        (M, np.array([0.0, 0.0]), "gives 2 numbers, must be at least 29"),
        (M, changed(MIX, 15, 1e9), r"\[15\]"),
        (M, changed(MIX, -1, math.inf), "its table, must be finite"),
        (F, RuntimeError("no"), None),
        (F, ValueError("cannot"), "ValueError: cannot"),
    ],
)
def test_own_models_that_compiled_code_cannot_read_are_refused(reader: Any, packed: Any, message: str | None) -> None:
    model = read_by(reader)(packed)
    if message is None:  # not the model's form: its own error
        with pytest.raises(RuntimeError, match="no"):
            EngineConfig.vllm(time_model=model)
        return
    for ask in (lambda: EngineConfig.vllm(time_model=model), lambda: model.seconds(Batch()), lambda: model.in_range(Batch())):
        with pytest.raises(ConfigError, match=rf"engine\.time_model: Own\.pack\(\).*{message}"):
            ask()


@compiled
def reads_too_much(batch: BatchSums) -> float:
    return batch.model[0] + batch.no_such_field


@compiled
def of_two(batch: BatchSums, other: float) -> float:
    return batch.model[0] + other


@compiled
def gives_text(batch: BatchSums) -> str:
    return "seconds"


def uncompiled(batch: BatchSums) -> float:
    return batch.model[0]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (None, "missing, must be a compiled function of the batch"),
        (uncompiled, "uncompiled.*must be a function decorated with llmsched_env.compiled.compiled"),
        (numba.njit(uncompiled), "must be a function decorated with llmsched_env.compiled.compiled"),
        (3, "3: must be a function decorated"),
        (reads_too_much, "no_such_field"),
        (of_two, "argument"),
        (gives_text, "No conversion from .*str.* to float64"),
    ],
    ids=["missing", "Python", "njit", "a number", "unknown field", "two arguments", "text"],
)
def test_own_models_without_a_compiled_function_of_the_batch_are_refused(function: Any, message: str) -> None:
    if numba.config.DISABLE_JIT and function is not None:
        pytest.skip("nothing is compiled")
    model = read_by(function)(np.ones(12))
    for ask in (lambda: EngineConfig.vllm(time_model=model), lambda: model.seconds(Batch()), lambda: model.in_range(Batch())):
        with pytest.raises(ConfigError, match=rf"(?s)engine\.time_model: Own\.compiled_seconds: .*{message}"):
            ask()


def test_what_is_no_time_model_is_refused() -> None:
    for model in (None, 3, "a100-llama2-7b-c10", LinearTime, np.array([0.0, 1, 1])):
        with pytest.raises(ConfigError, match=r"engine\.time_model: .*, must be an IterationTimeModel"):
            EngineConfig.vllm(time_model=model)
    with pytest.raises(ConfigError, match=r"time_model\.provenance: 'x', must be a Provenance"):
        EngineConfig.vllm(time_model=Own(FORMULA, "x"))

    class Unfinished(IterationTimeModel):
        compiled_seconds = linear_seconds

    with pytest.raises(TypeError, match="abstract"):
        Unfinished()  # type: ignore[abstract]

    class Plain(IterationTimeModel):
        compiled_seconds = linear_seconds

        def pack(self) -> Any:
            return LinearTime(1.0, 0.0).pack()

    assert EngineConfig.vllm(time_model=Plain()).time_model.provenance == Provenance()

    class WithoutAFunction(IterationTimeModel):
        def pack(self) -> Any:
            return np.ones(1)

    with pytest.raises(ConfigError, match=r"engine\.time_model: WithoutAFunction\.compiled_seconds: missing"):
        EngineConfig.vllm(time_model=WithoutAFunction())


@compiled
def by_load(batch):  # type: ignore[no-untyped-def]
    return batch.model[0] + batch.model[1] * batch.load


class ByLoad(IterationTimeModel):
    compiled_seconds = by_load

    def pack(self) -> Any:
        return np.array([0.01, 2e-6])


@pytest.mark.parametrize("batches", [np.zeros((3, 2)), np.zeros(BATCH_FIELDS), np.zeros((2, BATCH_FIELDS + 1)), np.zeros((0, 3))])
def test_batches_of_another_width_are_refused(batches: np.ndarray) -> None:
    for model in (LinearTime(1.0, 1.0), TableTime(**TABLES), ByLoad()):
        for ask in (model.seconds_of, functools.partial(type(model).evaluate, model.pack())):
            with pytest.raises(ConfigError, match=r"batches: shape .*, must be \(n, 16\)"):
                ask(batches)
    assert LinearTime(1.0, 1.0).seconds_of(np.zeros((0, BATCH_FIELDS))).shape == (0,)


@pytest.mark.parametrize(
    ("model", "numbers"), [(LinearTime, np.ones(1)), (FormulaTime, np.ones(11)), (TableTime, TABLE[:-1]), (ByLoad, [1])]
)
def test_numbers_that_are_too_few_are_refused(model: type[IterationTimeModel], numbers: Any) -> None:
    with pytest.raises(ConfigError, match="numbers"):
        model.evaluate(numbers, np.zeros((1, BATCH_FIELDS)))


def test_a_model_of_ones_own_is_as_good_as_a_built_in_one() -> None:
    """Six lines, and every number of an episode is that of ``LinearTime``, in one environment and in many."""
    own, linear = ByLoad(), LinearTime(0.01, 2e-6)
    batches = np.random.default_rng(0).uniform(0, 1e5, (50, BATCH_FIELDS))
    np.testing.assert_array_equal(own.seconds_of(batches), linear.seconds_of(batches))
    np.testing.assert_array_equal(own.seconds_of(batches), 0.01 + 2e-6 * batches[:, LOAD])
    np.testing.assert_array_equal(ByLoad.evaluate(np.array([1.0, 0.0]), batches), np.ones((2, 50)))

    short: dict[str, Any] = {**ADMIT, "rate": 20.0, "num_requests": 30, "max_iterations": 150}
    settings: list[dict[str, Any]] = [{"num_blocks": 400, "max_num_seqs": 8, "time_model": model} for model in (own, linear)]
    ours, theirs = (walked(LLMSchedEnv(**short, engine=engine)) for engine in settings)
    assert len(ours) > 300 and ours == theirs
    ours, theirs = (walked_together(together(3, **short, engine=engine)) for engine in settings)
    assert len(ours) > 300 and ours == theirs


@compiled
def up_to_a_load(batch: BatchSums) -> float:
    if batch.load > batch.model[1]:
        batch.out_of_range = 1
    return batch.model[0]


class UpToALoad(IterationTimeModel):
    compiled_seconds = up_to_a_load
    provenance = Provenance("up to a load", valid_range="load <= 500")

    def pack(self) -> Any:
        return np.array([0.01, 500.0])


def test_a_model_of_ones_own_says_where_its_data_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perf_base, "_warned", set())
    model = UpToALoad()
    assert model.in_range(Batch(load=500.0)) and not model.in_range(Batch(load=501.0)) and model.in_range(Batch(load=1.0))
    batches = np.array([Batch(load=load).array() for load in (1.0, 501.0, 2.0)])
    np.testing.assert_array_equal(UpToALoad.evaluate(model.pack(), batches), [[0.01] * 3, [1.0, 0.0, 1.0]])
    backend = make_backend("sim")
    workload = Workload.of(np.zeros(4), np.full(4, 110), np.full(4, 40))
    backend.reset(workload, QueueLayout(), EngineConfig.vllm(time_model=model), EpisodeLimits())
    loads = []
    while not backend.done:
        loads.append(backend.step(Decision.greedy(1)).load)
    with pytest.warns(CalibrationRangeWarning, match=r"'up to a load' \(load <= 500\)"):
        counters = backend.counters()
    assert 0 < counters.out_of_range == sum(load > 500 for load in loads) < counters.iterations


def test_tables_are_the_models_own() -> None:
    tokens = np.array([1.0, 8.0])
    model = TableTime(**{**TABLES, "tokens": tokens})
    tokens[0] = 5.0  # neither read-only now nor the model's
    assert model.tokens.tolist() == [1.0, 8.0]


def test_warnings_once_a_name_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perf_base, "_warned", set())
    monkeypatch.setattr(perf_base, "_MOST_WARNED", 10)
    for i in range(35):
        with pytest.warns(perf_base.CalibrationRangeWarning):
            perf_base.warn_out_of_range(Own(FORMULA, Provenance(f"c{i}")), 1, 2)
        assert len(perf_base._warned) <= 10
