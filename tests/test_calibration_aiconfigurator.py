"""Calibrations from aiconfigurator's A100 profile: the rules on a made-up GPU, the shipped files, the refusals, the page."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmsched_env.cli import calibrate
from llmsched_env.errors import ConfigError, MissingExtraError, install_command
from llmsched_env.pages.fidelity import a100 as fidelity_a100
from llmsched_env.pages.fidelity.evidence import Paths
from llmsched_env.perf import Batch, TableTime, load_calibration
from llmsched_env.perf.store import save_calibration
from llmsched_hardware.calibration.importers.aiconfigurator import (
    NO_OVERHEAD,
    SYNCHRONOUS_STEP,
    build,
    decode_rows,
    import_profile,
    kv_blocks,
    linear_seconds,
    sampled_seconds,
)
from llmsched_hardware.calibration.importers.aiconfigurator_profile import AllReduce, AttentionRows, Profile, System, read_profile
from llmsched_hardware.calibration.importers.aiconfigurator_rules import (
    chunk_seconds,
    continued,
    corner_errors,
    decode_errors,
    gemm_along_k,
    gemm_by_product,
    gemm_errors,
    gemm_seconds,
    heads_errors,
    heads_of,
    prompts_errors,
    rule_error,
    several_prompts,
    wide_gemms_go_along_n,
)
from llmsched_hardware.calibration.importers.dense_model import MODELS, chosen_model

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = {
    "a100-llama2-7b-vllm": "llama-2-7b",
    "a100-llama3-8b-vllm": "llama-3-8b",
    "h100-llama31-8b-vllm": "llama-3.1-8b",
    "h200-llama31-8b-vllm": "llama-3.1-8b",
}
GPUS = {"a100": "NVIDIA A100-SXM4-80GB", "h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200"}
VERSIONS = {"a100": "vLLM 0.14.0", "h100": "vLLM 0.24.0", "h200": "vLLM 0.24.0"}
ONE_CALL = ("h100-llama31-8b-vllm", "h200-llama31-8b-vllm")
"""Those with a time of their own for several prompts; published results rest on the others as they are."""


def calibration_folder() -> Path:
    """The raw profiles, or skip: they are not part of the project."""
    folder = Path(os.environ.get("LLMSCHED_CALIBRATION", "not set"))
    if not (folder / "aiconfigurator_a100_vllm").is_dir():
        pytest.skip("raw profile aiconfigurator_a100_vllm not found (set LLMSCHED_CALIBRATION to its folder)")
    pytest.importorskip("pyarrow", reason="pyarrow is not installed (extra: calibrate)")
    return folder


# ------------------------------------------------------------------------------------------------ a made-up GPU

TOKENS = np.array([1.0, 128.0, 2048.0, 8192.0])
SIDES = (1024, 2048, 4096, 6144, 8192, 12288, 16384, 65536)
SYSTEM = System(bandwidth=2e12, efficiency=0.8, launch=3e-6, memory=80 * 2.0**30, reserve=3.5 * 2.0**30)
LENGTHS = np.array([2.0, 16.0, 256.0, 1024.0, 4096.0, 16384.0])


def gemm(n: int, k: int) -> np.ndarray:
    """A GPU whose GEMMs are exactly linear in n k."""
    return 5e-6 + n * k * (2e-12 + 7e-15 * TOKENS)


def decode(blocks: float, length: np.ndarray) -> np.ndarray:
    """A GPU whose decode attention depends on blocks x length alone, beyond a fixed time."""
    return 1e-5 + 1.5e-9 * blocks * length


def prefill(heads: int, length: np.ndarray) -> np.ndarray:
    """A GPU whose prefill attention is a fixed time, the walk of one tile, and the causal area of all heads."""
    return 1e-5 + 2e-8 * length + 4e-13 * heads * length**2


def rows(batches: tuple[int, ...], seconds: np.ndarray) -> AttentionRows:
    return AttentionRows(np.array(batches, dtype=np.float64), LENGTHS, seconds)


def made_up() -> Profile:
    small, large = (1, 2, 4, 8, 16, 64, 256, 512), (4, 8, 16, 32, 64, 256, 1024, 2048)
    return Profile(
        tokens=TOKENS,
        gemm={(n, k): gemm(n, k) for n in SIDES for k in SIDES},
        decode={
            (32, 8): rows(small, np.array([decode(8 * b, LENGTHS) for b in small])),
            (8, 8): rows(large, np.array([decode(8 * b, LENGTHS) for b in large])),
            (2, 2): rows(large, np.array([decode(2 * b, LENGTHS) for b in large])),
            (8, 2): rows(small, np.array([decode(2 * b, LENGTHS) for b in small])),
        },
        prefill={pair: rows((1,), np.array([prefill(pair[0], LENGTHS)])) for pair in ((1, 1), (32, 8), (32, 32))},
        system=SYSTEM,
        engine="vLLM 0.0",
        gpu="a made-up GPU",
    )


PROFILE = made_up()
LOW = rows((1, 2, 4), np.array([decode(24 * b, LENGTHS) for b in (1, 2, 4)]))
HIGH = rows((1, 2, 4), np.array([decode(32 * b, LENGTHS) for b in (1, 2, 4)]))


@pytest.mark.parametrize(("name", "count"), [("llama-2-7b", 6_738_415_616), ("llama-3-8b", 8_030_261_248)])
def test_parameters_are_those_of_the_published_models(name: str, count: int) -> None:
    assert MODELS[name].parameters == count


def test_kv_bytes_per_token() -> None:
    assert MODELS["llama-2-7b"].kv_bytes == 2 * 32 * 32 * 128 * 2 == 524_288
    assert MODELS["llama-3-8b"].kv_bytes == 131_072


@given(st.integers(1024, 65536), st.integers(1024, 65536))
def test_a_gemm_off_the_grid_is_exact_where_time_is_linear_in_nk(n: int, k: int) -> None:
    np.testing.assert_allclose(gemm_seconds(PROFILE, n, k), gemm(n, k), rtol=1e-9)


def test_a_gemm_with_n_on_the_grid_goes_along_k() -> None:
    wrong_elsewhere = dataclasses.replace(
        PROFILE, gemm={pair: seconds * (1.0 if pair[0] == 4096 else 3.0) for pair, seconds in PROFILE.gemm.items()}
    )
    along = gemm_along_k(wrong_elsewhere, 4096, 11008)
    assert along is not None
    np.testing.assert_allclose(gemm_seconds(wrong_elsewhere, 4096, 11008), along)
    np.testing.assert_allclose(along, gemm(4096, 11008))
    assert not np.allclose(gemm_by_product(wrong_elsewhere, 4096, 11008), along)
    assert gemm_along_k(PROFILE, 22016, 4096) is None


def test_a_measured_gemm_is_taken_as_it_is() -> None:
    odd = dataclasses.replace(PROFILE, gemm={**PROFILE.gemm, (4096, 4096): np.full(4, 0.5)})
    assert np.all(gemm_seconds(odd, 4096, 4096) == 0.5)


def test_leave_one_out_sees_the_cell_that_deviates() -> None:
    assert max(e.mape for e in gemm_errors(PROFILE)) < 1e-9
    odd = dataclasses.replace(PROFILE, gemm={**PROFILE.gemm, (4096, 4096): 2 * gemm(4096, 4096)})
    assert max(e.p95 for e in gemm_errors(odd)) > 0.01


def test_decode_without_grouped_heads_has_the_blocks_of_more_requests() -> None:
    found = decode_rows(PROFILE, MODELS["llama-2-7b"])
    np.testing.assert_array_equal(found.batch, [1, 2, 4, 8, 16, 64, 256, 512])
    for b, seconds in zip(found.batch, found.seconds, strict=True):
        np.testing.assert_allclose(seconds, decode(32 * b, LENGTHS))
    grouped = decode_rows(PROFILE, MODELS["llama-3-8b"])
    np.testing.assert_allclose(grouped.seconds, PROFILE.decode[32, 8].seconds)


def test_decode_rule_errors_on_known_heads() -> None:
    same = [e for e in decode_errors(PROFILE) if e.rule.startswith("same blocks")]
    assert same and all(e.mape < 1e-12 and e.cells > 0 for e in same)
    without = {pair: seconds for pair, seconds in PROFILE.decode.items() if pair != (2, 2)}
    assert not [e for e in decode_errors(dataclasses.replace(PROFILE, decode=without)) if e.rule.startswith("same blocks")]


def test_a_row_goes_on_beyond_its_last_measurement() -> None:
    whole = PROFILE.decode[32, 8]
    cut = whole.seconds.copy()
    cut[-1, -2:] = np.nan
    np.testing.assert_allclose(continued(dataclasses.replace(whole, seconds=cut)), whole.seconds, rtol=1e-12)
    assert corner_errors(whole).mape < 1e-12


@given(st.integers(1, 8192), st.integers(0, 8192))
def test_a_chunk_is_the_added_area_and_at_least_one_walk(chunk: int, context: int) -> None:
    lengths = np.unique(np.concatenate([np.arange(1, 65), np.geomspace(64, 16384, 200).round()]))
    fine = {h: AttentionRows(np.ones(1), lengths, prefill(h, lengths)[None]) for h in (1, 32)}
    got = float(chunk_seconds(fine[32], fine[1], float(context), np.array([float(chunk)]))[0])
    end = float(context + chunk)
    one = prefill(1, np.array([1.0, 4096.0, end]))
    walk = one[2] if end <= 4096 else one[1] + (end - 4096) * (one[1] - one[0]) / 4095
    difference = 1e-5 + 2e-8 * (chunk + (context > 0)) + 4e-13 * 32 * (end**2 - context**2)
    assert got == pytest.approx(max(difference, walk), rel=0.02)


def test_small_chunks_over_a_long_context_cost_the_walk() -> None:
    full, head = PROFILE.prefill[32, 32], PROFILE.prefill[1, 1]
    small = chunk_seconds(full, head, 4080.0, np.array([16.0]))[0]
    assert small == pytest.approx(head.seconds[0][list(LENGTHS).index(4096.0)])
    naive = prefill(32, np.array([4096.0])) - prefill(32, np.array([4080.0]))
    assert small > 2 * naive[0]


def test_tables_are_the_operator_graph() -> None:
    shape = MODELS["llama-3-8b"]
    model = build(PROFILE, shape, "made-up", NO_OVERHEAD)

    def moved(size: np.ndarray) -> np.ndarray:
        return 3e-6 + size / 1.6e12

    layer = gemm(6144, 4096) + gemm(4096, 4096) + gemm(28672, 4096) + gemm(4096, 14336)
    layer = layer + 2 * moved(4 * 4096 * 2 * TOKENS) + moved(2 * 40 * 128 * 2 * TOKENS) + moved(3 * 14336 * 2 * TOKENS)
    np.testing.assert_allclose(linear_seconds(PROFILE, shape), 32 * layer + moved(16384 * TOKENS) + moved(32768 * TOKENS))
    requests, seconds = sampled_seconds(PROFILE, shape)
    s = TOKENS[:2]
    np.testing.assert_array_equal(requests, s)
    np.testing.assert_allclose(seconds, gemm(128256, 4096)[:2] + moved(128256 * 6 * s) + moved(128256 * 4 * s))
    # A batch on the grid points: 64 decodes at context 1024, with 64 tokens between two points of the linear table.
    batch = Batch(decodes=64, decode_kv=64 * 1024, sampled=64, batch_size=64)
    share = 63 / 127
    linear = linear_seconds(PROFILE, shape)
    expected = linear[0] + share * (linear[1] - linear[0]) + 32 * decode(8 * 64, np.array([1024.0]))[0]
    expected += seconds[0] + share * (seconds[1] - seconds[0])
    assert model.seconds(batch) == pytest.approx(expected, rel=1e-9)


def test_overhead_is_a_parameter() -> None:
    shape = MODELS["llama-2-7b"]
    bare, whole = build(PROFILE, shape, "a", NO_OVERHEAD), build(PROFILE, shape, "a")
    batch = Batch(decodes=32, decode_kv=32 * 500, sampled=32, batch_size=32)
    assert whole.seconds(batch) - bare.seconds(batch) == pytest.approx(SYNCHRONOUS_STEP.constant + 32 * SYNCHRONOUS_STEP.per_request)
    assert SYNCHRONOUS_STEP.constant + 32 * SYNCHRONOUS_STEP.per_request == pytest.approx(0.51e-3, rel=0.02)
    assert SYNCHRONOUS_STEP.source in whole.provenance.notes and NO_OVERHEAD.source in bare.provenance.notes


def test_kv_blocks_is_the_stated_arithmetic() -> None:
    free = 80 * 2**30 * 0.9 - 2 * 6_738_415_616 - 3.5 * 2**30
    assert kv_blocks(PROFILE, MODELS["llama-2-7b"]) == int(free // (16 * 524_288))
    assert "computed, not read from an engine" in build(PROFILE, MODELS["llama-2-7b"], "a").provenance.notes


def test_rule_error_leaves_unknown_cells_out() -> None:
    error = rule_error("rule", "where", np.array([0.1, np.nan, -0.3]))
    assert (error.cells, error.mape, error.bias) == (2, pytest.approx(0.2), pytest.approx(-0.1))
    assert rule_error("rule", "where", np.array([np.nan])).cells == 0


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("missing", [(32, 32), (1, 1)])
def test_heads_that_the_profile_lacks_are_refused(missing: tuple[int, int]) -> None:
    prefills = {pair: seconds for pair, seconds in PROFILE.prefill.items() if pair != missing}
    with pytest.raises(ConfigError, match="no prefill attention"):
        build(dataclasses.replace(PROFILE, prefill=prefills), MODELS["llama-2-7b"], "a")
    with pytest.raises(ConfigError, match="no decode attention of 32/8 heads"):
        build(dataclasses.replace(PROFILE, decode={(8, 8): PROFILE.decode[8, 8]}), MODELS["llama-3-8b"], "a")


def test_an_unknown_model_gives_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'llama-3-9b' is unknown; did you mean 'llama-3-8b'\?"):
        import_profile(tmp_path, "llama-3-9b", "a")


def write_profile(folder: Path, drop: str = "", device: str = "A100") -> None:
    """A small profile of the right format, less one column."""
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed (extra: calibrate)")
    parquet = pytest.importorskip("pyarrow.parquet")
    same = {"framework": ["VLLM"] * 2, "version": ["0.0"] * 2, "device": ["A100", device], "latency": [0.5, 1.0]}
    heads = {"num_heads": [1, 1], "num_key_value_heads": [1, 1], "head_dim": [128, 128]}
    gemms = {"m": [1, 2], "n": [64, 64], "k": [64, 64], "gemm_dtype": ["bfloat16"] * 2}
    attention = {"batch_size": [1, 1], "isl": [1, 1], "step": [1, 2], **heads}
    for name, columns in (("gemm_perf", gemms), ("generation_attention_perf", attention), ("context_attention_perf", attention)):
        kept = {key: values for key, values in {**columns, **same}.items() if key != drop}
        parquet.write_table(arrow.table(kept), folder / f"{name}.parquet")
    (folder / "a100_sxm.yaml").write_text(
        "gpu:\n  mem_bw: 2000 # B/s\n  mem_bw_empirical_scaling_factor: 0.8\n  mem_empirical_constant_latency: 3e-6\n"
        "  mem_capacity: 100\nmisc:\n  other_mem: 10\n",
        encoding="utf-8",
    )


def test_reading_turns_milliseconds_into_seconds(tmp_path: Path) -> None:
    write_profile(tmp_path)
    profile = read_profile(tmp_path)
    np.testing.assert_allclose(profile.gemm[64, 64], [0.5e-3, 1e-3])
    np.testing.assert_array_equal(profile.decode[1, 1].length, [2, 3])
    assert profile.system == System(2000, 0.8, 3e-6, 100, 10)
    assert (profile.engine, profile.gpu) == ("vLLM 0.0", "A100")


@pytest.mark.parametrize("column", ["latency", "m", "step", "version"])
def test_a_missing_column_is_named(tmp_path: Path, column: str) -> None:
    write_profile(tmp_path, drop=column)
    with pytest.raises(ConfigError, match=f"column '{column}' is missing"):
        read_profile(tmp_path)


def test_other_refusals_of_the_reader(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be a folder"):
        read_profile(tmp_path / "absent")
    write_profile(tmp_path, device="H100")
    with pytest.raises(ConfigError, match="column 'device' must hold one value"):
        read_profile(tmp_path)
    write_profile(tmp_path)
    (tmp_path / "a100_sxm.yaml").write_text("gpu:\n  mem_bw: 1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="field 'mem_bw_empirical_scaling_factor' is missing"):
        read_profile(tmp_path)
    (tmp_path / "gemm_perf.parquet").write_text("m,n,k\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="not a parquet file"):
        read_profile(tmp_path)
    (tmp_path / "gemm_perf.parquet").unlink()
    with pytest.raises(ConfigError, match=r"gemm_perf\.parquet"):
        read_profile(tmp_path)


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingExtraError, match=re.escape(install_command("calibrate"))):
        read_profile(tmp_path)


# ------------------------------------------------------------------------------------------------ what is shipped


def shipped(name: str) -> TableTime:
    model = load_calibration(name)
    assert isinstance(model, TableTime)
    return model


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_provenance(name: str) -> None:
    source = shipped(name).provenance
    assert source.name == name
    assert "ai-dynamo/aiconfigurator @ 095f58a51c4ca8e61b66ec108d86f223f8d559ce" in source.source
    gpu = name.split("-")[0]
    assert (source.licence, source.gpu) == ("Apache-2.0", GPUS[gpu])
    assert source.engine.startswith(VERSIONS[gpu]) and source.valid_range and "leave-one-out" in source.fit_error
    assert source.num_blocks is not None and source.block_size == 16
    assert "computed, not read from an engine" in source.notes
    file = ROOT / "llmsched_env" / "perf" / "calibrations" / f"{name}.npz"
    assert file.stat().st_size <= 100_000


@pytest.mark.parametrize("name", SHIPPED)
@given(n=st.integers(1, 512), k=st.integers(2, 16384), chunk=st.integers(0, 4096), context=st.integers(0, 8192))
def test_shipped_times_are_positive_and_grow_with_context(name: str, n: int, k: int, chunk: int, context: int) -> None:
    model = shipped(name)

    def seconds(kv: int, over: int) -> float:
        batch = Batch(
            decodes=n,
            decode_kv=n * kv,
            prefills=float(chunk > 0),
            prefill_tokens=chunk,
            prefill_squares=chunk**2,
            prefill_context=over,
            prefill_work=chunk * (chunk / 2 + over),
            sampled=n,
            batch_size=n + (chunk > 0),
        )
        assert model.in_range(batch)
        return model.seconds(batch)

    time = seconds(k, context)
    assert (0.008 if name.startswith("a100") else 0.004) < time < 100
    # Measured, so not monotone to the last digit.
    assert seconds(k + (16384 - k) // 2, context) > 0.97 * time
    assert seconds(k, context + (8192 - context) // 2) > 0.97 * time


@pytest.mark.parametrize("name", SHIPPED)
def test_more_than_the_tables_hold_is_out_of_range(name: str) -> None:
    model = shipped(name)
    assert not model.in_range(Batch(decodes=513, decode_kv=513 * 100, sampled=513, batch_size=513))
    most = model.prefill_chunk[-1] + 1
    assert not model.in_range(Batch(prefills=1, prefill_tokens=most, prefill_squares=most**2, prefill_work=most**2 / 2))


# ------------------------------------------------------------------------------------------------ with the raw data


@pytest.mark.parametrize("name", SHIPPED)
def test_the_import_reproduces_the_shipped_file(name: str, tmp_path: Path) -> None:
    source = calibration_folder() / f"aiconfigurator_{name.split('-')[0]}_vllm"
    out = tmp_path / f"{name}.npz"
    if name in ONE_CALL:
        words = ["import", "--format", "aiconfigurator", str(source), "--model", SHIPPED[name], "--name", name, "--out", str(out)]
        assert calibrate.main(words) == 0
    else:
        save_calibration(import_profile(source, SHIPPED[name], name, one_call=False), out)
    assert load_calibration(str(out)) == shipped(name)
    assert out.read_bytes() == (ROOT / "llmsched_env" / "perf" / "calibrations" / f"{name}.npz").read_bytes()


def test_the_page_explains_the_whole_difference() -> None:
    folder = calibration_folder()
    lines = fidelity_a100.section(Paths(calibration=folder, peers=folder, traces=folder))
    page = "\n".join(lines)
    assert "| against | figure | ours | theirs | error | bar | verdict |" in page
    assert "nan" not in page.lower()
    for title in fidelity_a100.FAMILIES:
        assert f"iteration time, {title}" in page
    grid = fidelity_a100.read_grid(folder / "vidur_a100_llama2_7b_iterations.csv")
    some = grid.batches[::50]
    parts, with_head = fidelity_a100.our_parts(shipped("a100-llama2-7b-vllm"), some)
    bare = dataclasses.replace(shipped("a100-llama2-7b-vllm"), constant=0.0, per_request=0.0)
    np.testing.assert_allclose(with_head, [bare.seconds(batch) for batch in some])
    assert np.all(parts.total < with_head)
    decodes = np.array([batch.decodes for batch in some])
    assert np.all(parts.decode[decodes == 0] == 0) and np.all(parts.decode[decodes > 0] > 0)


# ------------------------------------------------------------------------------------------------ any dense decoder


def test_heads_between_two_measured_counts_are_linear() -> None:
    between = heads_of({(24, 4): LOW, (32, 4): HIGH}, 28, 4, "decode")
    np.testing.assert_allclose(between.rows.seconds, 0.5 * (LOW.seconds + HIGH.seconds))
    assert between.rule == "24/4 to 32/4 heads, linear in the heads at the same key and value heads"
    group = heads_of({(8, 2): LOW, (16, 4): HIGH}, 12, 3, "decode")
    np.testing.assert_allclose(group.rows.seconds, 0.5 * (LOW.seconds + HIGH.seconds))
    assert group.rule.endswith("at the same group")
    assert heads_of({(28, 4): LOW}, 28, 4, "decode").rule == ""


def test_heads_outside_the_measured_counts_are_those_of_more_requests() -> None:
    found = heads_of({(8, 2): PROFILE.decode[8, 2]}, 32, 8, "decode")
    assert (list(found.rows.batch), found.rule) == ([1, 2, 4, 16, 64, 128], "8/2 heads with 4 n requests")
    np.testing.assert_array_equal(found.rows.seconds[0], PROFILE.decode[8, 2].seconds[2])
    between = heads_of({(8, 8): PROFILE.decode[8, 8]}, 40, 40, "decode")  # five times the requests, between four and eight
    np.testing.assert_allclose(between.rows.seconds[0], decode(40, LENGTHS))
    with pytest.raises(ConfigError, match=r"no decode attention of 7/7 heads, nor of counts from which it follows \(has 8/2\)"):
        heads_of({(8, 2): LOW}, 7, 7, "decode")


def test_errors_between_heads_are_those_of_leaving_one_out() -> None:
    table = {
        (8, 4): LOW,
        (16, 4): dataclasses.replace(LOW, seconds=2 * LOW.seconds),
        (24, 4): dataclasses.replace(LOW, seconds=3 * LOW.seconds),
    }
    assert max(e.mape for e in heads_errors(table, "decode") if e.cells) < 1e-12
    odd = table | {(16, 4): dataclasses.replace(LOW, seconds=4 * LOW.seconds)}
    assert max(e.mape for e in heads_errors(odd, "decode") if e.cells) == pytest.approx(0.5)


def test_wide_gemms_go_the_way_that_errs_less() -> None:
    assert not wide_gemms_go_along_n(PROFILE)  # both are exact
    by_columns = {(n, k): gemm(n, k) * (1 + (k % 3) / 2) for n, k in PROFILE.gemm}  # another factor for each k
    odd = dataclasses.replace(PROFILE, gemm=by_columns)
    assert wide_gemms_go_along_n(odd)
    np.testing.assert_allclose(gemm_seconds(odd, 14336, 4096), gemm(14336, 4096) * (1 + (4096 % 3) / 2))


def several(extra: float) -> AttentionRows:
    """Calls of 1, 2, 4 and 8 prompts that take as long as one of the same work, and ``extra`` for each beyond the first."""
    counts = np.array([1.0, 2.0, 4.0, 8.0])
    one = AttentionRows(np.ones(1), LENGTHS, (1e-5 + 4e-12 * LENGTHS**2)[None])
    seconds = np.array([np.interp(n * LENGTHS**2, LENGTHS**2, one.seconds[0]) + extra * (n - 1) for n in counts])
    seconds[2:, -1] = np.nan  # four and eight of the longest were too many
    return AttentionRows(counts, LENGTHS, seconds)


def test_several_prompts_have_the_time_that_was_measured() -> None:
    found = several_prompts(several(3e-6))
    np.testing.assert_allclose(found.seconds, 3e-6 * (found.count[:, None] - 1) * np.ones(LENGTHS.size), rtol=1e-9)
    assert several_prompts(AttentionRows(np.ones(1), LENGTHS, LENGTHS[None])).count.size == 0
    plain, measured = prompts_errors(several(3e-6), 32, TOKENS, linear_seconds(PROFILE, MODELS["llama-2-7b"]))
    assert plain.bias < -1e-4 and measured.mape < 1e-12


def test_a_batch_of_prompts_is_read_as_equal_ones() -> None:
    profile = dataclasses.replace(PROFILE, prefill={**PROFILE.prefill, (32, 32): several(3e-6)})
    shape = MODELS["llama-2-7b"]
    with_them, without = build(profile, shape, "a", NO_OVERHEAD), build(profile, shape, "a", NO_OVERHEAD, one_call=False)

    def extra(*chunks: int) -> float:
        squares = sum(c**2 for c in chunks)
        batch = Batch(
            prefills=len(chunks), prefill_tokens=sum(chunks), prefill_squares=squares, prefill_work=squares / 2, batch_size=len(chunks)
        )
        return with_them.seconds(batch) - without.seconds(batch)

    assert extra(512) == 0.0
    assert extra(256, 256) == pytest.approx(32 * 3e-6, rel=1e-6) and extra(*[64] * 8) == pytest.approx(7 * 32 * 3e-6, rel=1e-6)
    assert 0 < extra(1024, 16) < 0.1 * extra(512, 512)
    assert "measured extra time" in with_them.provenance.notes and "read as one" in without.provenance.notes


def write_model(folder: Path, **changes: object) -> Path:
    """The config.json of a small model whose GEMMs and heads ``PROFILE`` covers."""
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    path = folder / "config.json"
    path.write_text(json.dumps({"model_type": "llama", "vocab_size": 128256, **sizes, **changes}), encoding="utf-8")
    return path


def test_a_configuration_gives_the_tables_of_the_named_model(tmp_path: Path) -> None:
    named, given = build(PROFILE, MODELS["llama-3-8b"], "a"), build(PROFILE, chosen_model("", write_model(tmp_path)), "a")
    assert named == given
    normed = build(PROFILE, chosen_model("", write_model(tmp_path, model_type="qwen3")), "a")
    added = 2 * 3e-6 + 2 * 40 * 128 * 2 * TOKENS / 1.6e12
    np.testing.assert_allclose(normed.linear - named.linear, 32 * added)


def divided_profile() -> Profile:
    """``PROFILE`` with the heads of halves and an all-reduce of two GPUs."""
    elements = np.array([1.0, 2.0**40])
    reduce = AllReduce(elements, 1e-5 + 1e-12 * elements, 2e-5 + 1e-12 * elements)
    halves = {(16, 4): PROFILE.decode[8, 2]}
    prefills = {(16, 4): rows((1,), np.array([prefill(16, LENGTHS)]))}
    return dataclasses.replace(
        PROFILE, decode={**PROFILE.decode, **halves}, prefill={**PROFILE.prefill, **prefills}, all_reduce={2: reduce}, folder="here"
    )


def test_a_divided_model_has_its_share_and_two_all_reduces_a_layer() -> None:
    profile = divided_profile()
    shape = MODELS["llama-3-8b"].divided(2)
    model = build(profile, shape, "a", NO_OVERHEAD)
    alone = dataclasses.replace(shape, gpus=1)
    reduce = np.where(TOKENS <= 512, 1e-5, 2e-5) + 1e-12 * TOKENS * 4096
    np.testing.assert_allclose(model.linear, linear_seconds(profile, alone) + 65 * reduce)
    assert model.provenance.gpu == "2 x a made-up GPU" and "tensor parallel on 2 GPUs" in model.provenance.model
    free = 80 * 2**30 * 0.9 - 2 * shape.parameters - 3.5 * 2**30
    assert model.provenance.num_blocks == int(free // (16 * 65_536))


def test_without_all_reduce_times_a_divided_model_is_refused() -> None:
    shape = MODELS["llama-3-8b"].divided(2)
    with pytest.raises(ConfigError, match=r"--tensor-parallel: 2, needs .* the file custom_allreduce_perf\.parquet \(missing in here\)"):
        build(dataclasses.replace(divided_profile(), all_reduce={}), shape, "a")
    with pytest.raises(ConfigError, match=r"--tensor-parallel: 4, must be a number of GPUs that .* holds \(2\)"):
        linear_seconds(divided_profile(), MODELS["llama-3-8b"].divided(4))


def test_weights_that_leave_no_room_are_refused() -> None:
    small = dataclasses.replace(PROFILE, system=dataclasses.replace(SYSTEM, memory=16 * 2.0**30))
    with pytest.raises(ConfigError, match="leave no room for KV; divide it among more"):
        build(small, MODELS["llama-3-8b"], "a")


def test_all_reduce_times_are_read_from_their_file(tmp_path: Path) -> None:
    write_profile(tmp_path)
    assert read_profile(tmp_path).all_reduce == {}
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    kernels = ["vLLM_custom_graph", "vLLM_custom_graph", "vLLM_custom_eager", "vLLM_custom_eager"]
    columns = {"allreduce_dtype": ["bfloat16"] * 4, "num_gpus": [2] * 4, "message_size": [128, 256] * 2, "kernel_source": kernels}
    same = {"framework": ["vLLM"] * 4, "version": ["0.0"] * 4, "device": ["A100"] * 4, "latency": [0.5, 1.0, 1.5, 2.0]}
    parquet.write_table(arrow.table({**columns, **same}), tmp_path / "custom_allreduce_perf.parquet")
    found = read_profile(tmp_path).all_reduce[2]
    np.testing.assert_allclose(found.seconds(np.array([1.0, 1024.0]), 192), [0.75e-3, 2e-3])


def test_a_head_size_that_was_not_measured_is_refused(tmp_path: Path) -> None:
    write_profile(tmp_path)
    with pytest.raises(ConfigError, match=r"no attention of bfloat16 with head_dim 64 \(has head_dim 128\)"):
        read_profile(tmp_path, head_dim=64)
    (tmp_path / "h100_sxm.yaml").write_text("gpu:\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"2 system files \(a100_sxm\.yaml, h100_sxm\.yaml\), must be one"):
        read_profile(tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--model", "llama-2-7b", "--tensor-parallel", "2"),
            "needs the all-reduce times of the GPU, the file custom_allreduce_perf.parquet",
        ),
        (("--tensor-parallel", "0", "--model", "llama-2-7b"), "--tensor-parallel: 0, must be >= 1"),
        ((), "--model: missing; give a name (llama-2-7b, llama-3-8b, llama-3.1-8b) or --config"),
    ],
)
def test_the_command_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str) -> None:
    write_profile(tmp_path)
    given = ["import", "--format", "aiconfigurator", str(tmp_path), "--name", "a", "--out", str(tmp_path / "a.npz"), *words]
    assert calibrate.main(given) == 2
    assert message in capsys.readouterr().err
