"""The page's part on kernel profiles: the steady state of a closed loop by hand, reading recorded runs, the three simplifications."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from llmsched_env.errors import ConfigError
from llmsched_env.pages.fidelity import kernels
from llmsched_env.pages.fidelity.evidence import Paths
from llmsched_env.pages.fidelity.recorded import Recorded, fits, read_recorded, time_per_output_token
from llmsched_env.perf import Batch, Provenance, TableTime
from llmsched_hardware.calibration.importers.aiconfigurator import CHECKED
from llmsched_hardware.calibration.importers.dense_model import MODELS
from llmsched_hardware.calibration.importers.vidur_profile import CsvProfile

HEAD = "backend,backend_version,model_path,system,precision,mode,tp_size,batch_size,isl,osl,silicon_tpot_ms"


def flat(**changes: object) -> TableTime:
    """One second for an iteration, a millisecond for each of its tokens, nothing for attention."""
    nothing = np.zeros((2, 2))
    fields: dict[str, object] = {
        "tokens": [0, 10_000],
        "linear": [1.0, 11.0],
        "decode_batch": [1, 2],
        "decode_kv": [1, 2],
        "decode": nothing,
        "prefill_context": [0, 1],
        "prefill_chunk": [1, 2],
        "prefill": nothing,
        "provenance": Provenance(num_blocks=100, block_size=16),
    }
    return TableTime(**(fields | changes))  # type: ignore[arg-type]


def test_a_closed_loop_reads_every_other_prompt_once() -> None:
    # Three requests: of the nine steps of one, two also read a prompt of 100 tokens beside two decodes.
    run = Recorded(gpus=1, requests=3, prompt=100, output=10, seconds=1.0)
    assert time_per_output_token(flat(), run) == pytest.approx((2 * (1 + 0.102) + 7 * (1 + 0.003)) / 9)
    alone = Recorded(gpus=1, requests=1, prompt=100, output=10, seconds=1.0)
    assert time_per_output_token(flat(), alone) == pytest.approx(1.001)


def test_a_long_prompt_takes_several_iterations() -> None:
    # Budget 8192 less one decode: chunks of 8191 and 1809 tokens.
    run = Recorded(gpus=1, requests=2, prompt=10_000, output=11, seconds=1.0)
    assert time_per_output_token(flat(), run) == pytest.approx(((1 + 8.192) + (1 + 1.81) + 8 * 1.002) / 10)


def test_runs_that_do_not_fit_the_memory_are_told_apart() -> None:
    run = Recorded(gpus=1, requests=10, prompt=100, output=60, seconds=1.0)
    assert fits(flat(), run)
    assert not fits(flat(), Recorded(gpus=1, requests=11, prompt=100, output=60, seconds=1.0))
    assert not fits(flat(provenance=Provenance()), run)


def test_recorded_runs_are_chosen_by_their_columns(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    rows = (
        "vllm,0.12,m,h100,,agg,2,8,1024,128,18.0",
        "vllm,0.12,m,h100,fp8,agg,2,8,1024,128,9.0",
        "vllm,0.12,m,h100,,disagg,2,8,1024,128,9.0",
    )
    path.write_text("\n".join([HEAD, *rows]) + "\n", encoding="utf-8")
    assert read_recorded(path, {"backend": "vllm", "precision": ""}) == [Recorded(2, 8, 1024, 128, 1e-3 * 18.0)]
    path.write_text(HEAD.replace(",osl", "") + "\n" + rows[0] + "\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="column 'osl' is missing"):
        read_recorded(path, {})
    with pytest.raises(ConfigError, match="recorded runs"):
        read_recorded(tmp_path / "absent.csv", {})


def test_padding_goes_to_the_next_graph() -> None:
    share = kernels.padding(flat(), 1)
    assert share[0] == share[7] == share[255] == 0.0 and kernels.CAPTURED[-1] == 512
    assert share[8] == pytest.approx(0.007 / 1.009) and share[256] == pytest.approx(0.015 / 1.257)


def test_unequal_contexts_are_read_at_their_mean() -> None:
    linear = flat(decode_kv=[0, 4096], decode=[[0, 4], [0, 4]])
    assert kernels.unequal(linear, 2, 512) == pytest.approx(0.0)
    bent = flat(decode_kv=[0, 512, 1024], decode=[[0, 0, 1], [0, 0, 1]])
    whole = bent.seconds(Batch(decodes=2, decode_kv=1024, sampled=2, batch_size=2))
    assert kernels.unequal(bent, 2, 512) == pytest.approx(0.25 / whole)


def test_the_rule_for_chunks_is_exact_where_attention_is_its_area() -> None:
    area = {(c, x): 1e-6 + 1e-10 * c * (c + 2 * x) for c in (64, 128, 512, 1024) for x in (0, 64, 256, 512) if c + x <= 1024}
    whole = {(c, 0): 1e-6 + 1e-10 * c * c for c in range(64, 1089, 64)}
    profile = CsvProfile(
        operators={}, prefill=whole | area, decode={}, write={}, prefill_write={}, per_sequence={}, sizes={}, attention="some", digest=""
    )
    found = kernels.chunk_rule_errors(profile, flat(), 32)
    exact = [error for error in found if error.where == "chunks of 257 to 1024"]
    assert len(exact) == 2 and all(error.mape < 0.02 and error.cells == 3 for error in exact)


def calibration_folder() -> Path:
    folder = Path(os.environ.get("LLMSCHED_CALIBRATION", "not set"))
    if not (folder / "frontier_a800_llama2_7b").is_dir():
        pytest.skip("raw profiles not found (set LLMSCHED_CALIBRATION to their folder)")
    pytest.importorskip("pyarrow", reason="pyarrow is not installed (extra: calibrate)")
    return folder


def test_what_the_provenance_says_of_recorded_runs_is_what_they_give() -> None:
    path = calibration_folder() / kernels.RECORDS
    if not path.exists():
        pytest.skip(f"{kernels.RECORDS} not found")
    without, whole = kernels._runs(kernels.tables("h100-llama31-8b-vllm"), read_recorded(path, kernels.TENSORRT))
    text = CHECKED["h100_sxm", MODELS["llama-3.1-8b"].title, 1]
    assert f"{without.size} recorded closed loops" in text
    for errors in (without, whole):
        assert f"{100 * np.abs(errors).mean():.1f} %" in text and f"{100 * errors.mean():+.1f} %" in text


@pytest.mark.slow
def test_the_section_is_whole() -> None:
    folder = calibration_folder()
    page = "\n".join(kernels.section(Paths(calibration=folder, peers=folder, traces=folder)))
    assert "nan %" not in page
    for name in (kernels.MEASURED, kernels.RECONSTRUCTED, kernels.VLLM, *(name for _, name in kernels.HOPPER.values())):
        assert f"`{name}`" in page
