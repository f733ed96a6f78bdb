"""The importer of LLMServingSim's profiles on small profiles: unions of grids, missing cells, corrections, several GPUs, other models."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmsched_env.errors import ConfigError
from llmsched_env.perf import MixedAttentionTime
from llmsched_hardware.calibration.batches import batch_of
from llmsched_hardware.calibration.importers.grid import fill
from llmsched_hardware.calibration.importers.llmservingsim import import_profile, leave_one_out, read_profile
from llmsched_hardware.calibration.importers.llmservingsim_profile import parse_meta

OPERATORS = ("embedding", "layernorm", "qkv_proj", "rotary_emb", "o_proj", "gate_up_proj", "act_fn", "down_proj", "final_layernorm")
GRIDS = ((16, 64, 256), (0, 16, 64, 256), (1, 2, 4), (16, 64, 256)), ((24, 96), (0, 24, 96), (1, 2, 4), (24, 96))
META = """\
vllm_version: 0.19.0
gpu: NVIDIA Test
hardware: TEST
model: maker/Tiny-1B
variant: bf16
engine_effective:
  block_size: 16
  model: /tmp/somewhere
"""
ENABLED = """\
skew_fit:
  enabled: true
  bucket_axes:
    n_bins: [0, 2, 4, 1000000]
    n_labels: [n<=2, n<=4,
      n>4]
    skew_rate_bins: [-0.01, 0.5, 1.01]
    skew_rate_labels: [sr<=50%, sr>50%]
    kv_big_bins: [0, 128, 1000000000]
    kv_big_labels: [kvB<=128, kvB>128]
    kp_bins: [-1, 0, 1000000000]
    kp_labels: ['kp=0', 'kp>0']
  per_tp:
    1:
      alpha_default: 0.25
    2:
      alpha_default: 0.125
"""
SKEW = """\
pc,n_label,skew_rate_label,kv_big_label,kp_label,alpha,n_samples
0,n<=4,sr>50%,kvB<=128,kp=0,0.5,3
16,n<=2,sr<=50%,kvB>128,kp=0,-0.1,1
"""

Cells = dict[tuple[int, int, int, int], float]


def microseconds(chunk: float, context: float, decodes: float, kv: float) -> float:
    """Linear in each coordinate, as kernels are, so that interpolation loses nothing."""
    return 5.0 + 0.25 * chunk + 0.002 * chunk * context + 0.01 * decodes * kv + 0.03 * decodes


def cells_of(grids: Iterable[tuple[tuple[int, ...], ...]] = GRIDS) -> Cells:
    found: Cells = {}
    for chunks, contexts, decodes, kvs in grids:
        found |= {(0, 0, n, k): microseconds(0, 0, n, k) for n, k in itertools.product(decodes, kvs)}
        found |= {(c, x, 0, 0): microseconds(c, x, 0, 0) for c, x in itertools.product(chunks, contexts)}
        found |= {cell: microseconds(*cell) for cell in itertools.product(chunks, contexts, decodes, kvs)}
    return found


def table(header: str, rows: Iterable[Iterable[Any]]) -> str:
    return "\n".join([header, *(",".join(map(str, row)) for row in rows), ""])


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def made(cells: Cells | None = None, meta: str = META, skew: str | None = None, folder: str = "tp1", scale: float = 1.0) -> Path:
        root = tmp_path / "bf16"
        place = root / folder
        place.mkdir(parents=True, exist_ok=True)
        (root / "meta.yaml").write_text(meta)
        names = (*OPERATORS, "qk_norm")
        dense = [(name, t, scale * (10 + t * (1 + i))) for i, name in enumerate(names) for t in (1, 16, 512)]
        (place / "dense.csv").write_text(table("layer,tokens,time_us", dense))
        heads = [(name, n, 3 + n) for name in ("lm_head", "sampler") for n in (1, 8)]
        (place / "per_sequence.csv").write_text(table("layer,sequences,time_us", heads))
        rows = [(*cell, time) for cell, time in (cells_of() if cells is None else cells).items()]
        (place / "attention.csv").write_text(table("prefill_chunk,kv_prefill,n_decode,kv_decode,time_us", rows))
        if skew is not None:
            (place / "skew_fit.csv").write_text(skew)
        return root

    return made


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Path]:
    def made(**changes: Any) -> Path:
        path = tmp_path / "config.json"
        path.write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 3, "hidden_size": 64, **changes}))
        return path

    return made


def made(source: Path, config: Path, **options: Any) -> MixedAttentionTime:
    model = import_profile(source, "Tiny-1B", "tiny", config=config, **options)
    assert isinstance(model, MixedAttentionTime)
    return model


# --- attention grid ---------------------------------------------------------------------------------------


def test_a_union_of_two_grids_is_filled_from_what_was_measured(write: Write, config: Callable[..., Path]) -> None:
    model = made(write(), config())
    assert model.prefill_chunk.tolist() == [16, 24, 64, 96, 256] and model.decode_context.tolist() == [16, 24, 64, 96, 256]
    measured = cells_of()
    for (i, c), (j, x), (k, n), (m, kv) in itertools.product(
        enumerate(model.prefill_chunk), enumerate(model.prefill_context), enumerate((1, 2, 4)), enumerate(model.decode_context)
    ):
        cell = (int(c), int(x), n, int(kv))
        assert model.mixed[i, j, k, m] == pytest.approx(3e-6 * measured.get(cell, microseconds(*cell)))
    total = 5 * 6 * (3 * 5 + 1) + 3 * 5
    known = sum(c == 0 or x in model.prefill_context for c, x, _, _ in measured)
    assert f"{known} of {total} cells of the attention grid measured, {total - known} interpolated between them" in model.provenance.notes
    assert "beyond" not in model.provenance.notes and "leave-one-out" in model.provenance.fit_error


@pytest.mark.parametrize("cell", [(0, 0, 2, 64), (64, 16, 2, 64), (64, 16, 0, 0)])
def test_a_cell_that_is_missing_is_read_off_its_neighbours(write: Write, config: Callable[..., Path], cell: tuple[int, ...]) -> None:
    cells = cells_of(GRIDS[:1])
    whole = made(write(cells), config())
    assert "cells of the attention grid" not in whole.provenance.notes
    model = made(write({at: time for at, time in cells.items() if at != cell}), config())
    for name in ("prefill", "decode", "mixed"):
        np.testing.assert_allclose(getattr(model, name), getattr(whole, name), rtol=1e-12)
    assert "1 interpolated" in model.provenance.notes


def test_a_corner_that_did_not_fit_the_memory_goes_on_from_what_did(write: Write, config: Callable[..., Path]) -> None:
    cells = cells_of(GRIDS[:1])
    model = made(write({at: time for at, time in cells.items() if at[2:] != (4, 256)}), config())
    assert model.decode[2, 2] == pytest.approx(3e-6 * microseconds(0, 0, 4, 256), rel=1e-9)
    assert "13 extrapolated beyond them" in model.provenance.notes


def test_cells_that_follow_from_nothing_are_refused(write: Write, config: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"attention\.csv: together: measured at 0 points, must be 2 or more"):
        made(write({at: time for at, time in cells_of().items() if at[0] == 0 or at[2] == 0}), config())
    with pytest.raises(ConfigError, match=r"grid: 3 of 4 cells of its grid were not measured and do not follow from others"):
        fill("grid", {(1, 1): 1.0}, ((1, 2), (1, 2)))


def test_between_measured_cells_the_narrow_neighbours_count() -> None:
    """A line with a wide gap is not used where another axis has close neighbours."""
    cells = {(x, y): float(x * x + y) for x, y in itertools.product((1, 2, 4, 8), (1, 100))} | {(1, 10): 11.0, (4, 10): 26.0}
    found = fill("grid", cells, ((1, 2, 4, 8), (1, 10, 100)))
    assert found.values[1, 1] == pytest.approx(4 + 10) and found.values[0, 1] == 11.0
    assert (found.interpolated, found.extrapolated) == (2, 0)


def test_leave_one_out_errors_of_linear_tables_are_nothing(write: Write) -> None:
    for error in leave_one_out(read_profile(write())):
        assert error.mean == pytest.approx(0.0, abs=1e-12)


# --- correction for unequal contexts ----------------------------------------------------------------------


def test_the_correction_is_applied_where_the_record_enables_it(write: Write, config: Callable[..., Path]) -> None:
    model = made(write(meta=META + ENABLED, skew=SKEW), config())
    assert model.skew is not None and model.skew.shape == (3, 3, 2, 2, 2) and model.reads_contexts
    assert model.skew_decodes.tolist() == [2, 4] and model.skew_chunk.tolist() == [0, 16] and model.skew_context.tolist() == [0]
    assert model.skew[0, 1, 1, 0, 0] == 0.5 and model.skew[1, 0, 0, 1, 0] == -0.1
    assert model.skew[0, 1, 0, 0, 0] == 0.5, "no share that small of so few decodes: the next larger one"
    assert model.skew[2, 2, 0, 0, 0] == 0.25, "not fitted: the pooled alpha"
    uneven, even = batch_of([16, 80, 80]), batch_of([64, 64, 64])
    longest = batch_of([80, 80, 80])
    plain = made(write(meta=META), config())
    assert not plain.reads_contexts and model.seconds(even) == plain.seconds(even)
    mean = plain.seconds(uneven)
    assert model.seconds(uneven) > mean
    attention = 3e-6 * (microseconds(0, 0, 3, 80) - microseconds(0, 0, 3, 176 / 3))
    assert plain.seconds(longest) - mean == pytest.approx(attention)
    assert model.seconds(uneven) - mean == pytest.approx(0.5 * attention)


@pytest.mark.parametrize("meta", [META, META + "skew_fit:\n  enabled: false\n", META + ENABLED.replace("enabled: true", "enabled: false")])
def test_it_is_not_where_the_record_disables_it(write: Write, config: Callable[..., Path], meta: str) -> None:
    assert made(write(meta=meta, skew=SKEW), config()).skew is None


@pytest.mark.parametrize(
    ("meta", "skew", "message"),
    [
        (ENABLED, None, r"no skew_fit\.csv \(nor skew_fit\.csv\.gz\)"),
        (ENABLED.replace("alpha_default: 0.25", "alpha: 1"), SKEW, r"skew_fit: 'alpha_default' is missing or no number"),
        (ENABLED.replace("    1:\n", "    4:\n"), SKEW, r"skew_fit is enabled without bucket_axes and per_tp: 1"),
        (ENABLED.replace("[0, 2, 4, 1000000]", "[0, 4, 2, 1000000]"), SKEW, r"n_bins, must increase and be one more than n_labels"),
        (ENABLED, SKEW.replace("n<=4", "n<=9"), r"skew_fit\.csv: line 2: 0, n<=9, .*must be a cell of meta\.yaml"),
        (ENABLED, SKEW.replace("0.5,3", "nan,3"), r"skew_fit\.csv: line 2: alpha nan, must be finite"),
        (ENABLED, SKEW.replace("alpha", "beta"), r"skew_fit\.csv: column 'alpha' is missing"),
    ],
)
def test_a_correction_that_is_not_whole_is_refused(
    write: Write, config: Callable[..., Path], meta: str, skew: str | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        made(write(meta=META + meta, skew=skew), config())


def test_the_record_is_read_as_it_is_nested() -> None:
    found = parse_meta(META + ENABLED + "# a remark\n\nlast: 'x'\n")
    assert found["model"] == "maker/Tiny-1B" and found["engine_effective"]["model"] == "/tmp/somewhere"
    assert found["skew_fit"]["bucket_axes"]["n_labels"] == ["n<=2", "n<=4", "n>4"]
    assert found["skew_fit"]["per_tp"]["2"] == {"alpha_default": "0.125"} and found["last"] == "x"


# --- models and GPUs --------------------------------------------------------------------------------------


def test_operators_follow_the_architecture(write: Write, config: Callable[..., Path]) -> None:
    source = write()
    llama, qwen3 = made(source, config()), made(source, config(model_type="qwen3"))
    assert llama.linear[0] == pytest.approx(1e-6 * (3 * (2 * 12 + 13 + 14 + 15 + 16 + 17 + 18) + 11 + 19))
    assert qwen3.linear[0] - llama.linear[0] == pytest.approx(3e-6 * 20)
    for same in ("mistral", "qwen2"):
        assert made(source, config(model_type=same)) == llama
    assert import_profile(source, "", "tiny", config=config()) == import_profile(source, "maker/tiny-1b", "tiny", config=config()) == llama
    assert llama.provenance.model == "maker/Tiny-1B, bf16, 1 GPU" and llama.provenance.num_blocks is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen3_moe"}, "model_type 'qwen3_moe', must be one of llama, mistral, qwen2, qwen3"),
        ({"num_hidden_layers": 0}, "num_hidden_layers 0, must be a whole number from 1"),
        ({"hidden_size": "x"}, "hidden_size 'x', must be a whole number"),
    ],
)
def test_a_config_of_something_else_is_refused(write: Write, config: Callable[..., Path], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made(write(), config(**changes))


def test_a_name_of_something_else_is_refused(write: Write, config: Callable[..., Path]) -> None:
    source = write()
    with pytest.raises(ConfigError, match="--model: 'Tiny-2B', the profile is of maker/Tiny-1B"):
        import_profile(source, "Tiny-2B", "x", config=config())
    with pytest.raises(ConfigError, match=r"--model: 'tiny', must be one of llama-3\.1-8b .*, or give --config"):
        import_profile(source, "tiny", "x")
    broken = config()
    broken.write_text("{")
    with pytest.raises(ConfigError, match=r"--config: config\.json: not a config\.json"):
        import_profile(source, "Tiny-1B", "x", config=broken)


def test_gpus_that_share_a_model_have_their_own_folder_and_an_all_reduce(write: Write, config: Callable[..., Path]) -> None:
    write(meta=META + ENABLED, skew=SKEW)
    source = write(meta=META + ENABLED, skew=SKEW, folder="tp2", scale=0.5)
    with pytest.raises(ConfigError, match=r"--tensor-parallel: 2, the profile holds no time of the all-reduce .* no bench_config\.json"):
        made(source, config(), tensor_parallel=2)
    (source / "bench_config.json").write_text(json.dumps({"link_bw": 2, "link_latency": 1000}))
    one, two = made(source, config()), made(source, config(), tensor_parallel=2)
    tokens = np.array([1.0, 16.0, 512.0])
    ring = 2 * (1e-6 + tokens * 64 * 2 / 2 / (2 * 2**30))  # two steps, each half of the bytes
    np.testing.assert_allclose(two.linear, 0.5 * one.linear + 2 * 3 * ring)
    assert two.provenance.model.endswith("2 GPUs") and two.provenance.source.endswith("/tp2") and "all-reduce" in two.provenance.notes
    assert two.skew is not None and two.skew[2, 2, 0, 0, 0] == 0.125
    with pytest.raises(ConfigError, match=r"no attention\.csv .*profiled are tp1, tp2"):
        made(source, config(), tensor_parallel=4)
    with pytest.raises(ConfigError, match="--tensor-parallel: 0, must be >= 1"):
        made(source, config(), tensor_parallel=0)
    for wrong in ("{", "{}", '{"link_bw": 0, "link_latency": 1}'):
        (source / "bench_config.json").write_text(wrong)
        with pytest.raises(ConfigError, match=r"bench_config\.json: "):
            made(source, config(), tensor_parallel=2)


def test_operators_measured_at_other_points_are_read_between_theirs(write: Write, config: Callable[..., Path]) -> None:
    source = write()
    path = source / "tp1" / "dense.csv"
    whole = made(source, config())
    path.write_text(path.read_text().replace("qkv_proj,16,58", "qkv_proj,100,310"))
    model = made(source, config())
    assert model.tokens.tolist() == [1, 16, 100, 512]
    np.testing.assert_allclose(model.linear, np.interp(model.tokens, whole.tokens, whole.linear), rtol=1e-12)
    path.write_text(path.read_text().replace("qkv_proj,512,", "qkv_proj,400,"))
    with pytest.raises(ConfigError, match=r"dense\.csv: operator 'qkv_proj' was measured from 1 to 400, others .* from 1 to 512"):
        made(source, config())
