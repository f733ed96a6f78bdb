"""Raw CSV profiles in Vidur's form: what the tables hold, what is refused, the shipped calibration."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmsched_env.cli import calibrate
from llmsched_env.errors import ConfigError
from llmsched_env.perf import Batch, TableTime, load_calibration
from llmsched_hardware.calibration.importers.dense_model import MODELS, DenseModel
from llmsched_hardware.calibration.importers.vidur import import_profile
from llmsched_hardware.calibration.importers.vidur_csv import decode_table, import_folder, prefill_table, write_seconds
from llmsched_hardware.calibration.importers.vidur_profile import PER_LAYER, read_csv_profile

ROOT = Path(__file__).resolve().parents[1]
MODEL = DenseModel(title="small", layers=3, hidden=64, intermediate=128, heads=4, kv_heads=2, vocab=100, head_dim=16)
TOKENS, REQUESTS, CONTEXTS, CHUNKS = (1, 8, 64), (1, 4), (16, 64), (16, 32, 64)


def row(**values: Any) -> dict[str, Any]:
    return {
        f"time_stats.{key}.median" if key in (*PER_LAYER, "emb") or key.startswith("attn_") else key: value for key, value in values.items()
    }


def attention_rows() -> list[dict[str, Any]]:
    same = {"n_embd": 64, "n_q_head": 4, "n_kv_head": 2, "num_tensor_parallel_workers": 1, "attention_backend": "some"}
    rows = []
    for n in REQUESTS:
        for k in CONTEXTS:
            times = {"attn_prefill": 0.0, "attn_decode": 0.01 + 1e-4 * n * k, "attn_kv_cache_save": 0.002 + 0.001 * n}
            rows.append(row(**same, **times, batch_size=n, prefill_chunk_size=0, kv_cache_size=k, is_prefill=False))
    for c in CHUNKS:
        for x in (0, 16, 32) if c < 64 else (0,):
            times = {"attn_prefill": 0.01 + 1e-5 * c * (c + 2 * x), "attn_decode": 0.0, "attn_kv_cache_save": 9.0}
            rows.append(row(**same, **times, batch_size=1, prefill_chunk_size=c, kv_cache_size=x, is_prefill=True))
    return rows


def mlp_rows() -> list[dict[str, Any]]:
    same = {"n_head": 4, "n_kv_head": 2, "n_embd": 64, "n_expanded_embd": 128, "num_tensor_parallel_workers": 1}
    return [row(**same, num_tokens=t, emb=0.5, **{name: 0.1 + 0.01 * t for name in PER_LAYER}) for t in TOKENS]


def write(path: Path, rows: list[dict[str, Any]], drop: str = "") -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [name for name in rows[0] if name != drop], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "attention.csv", attention_rows())
    write(tmp_path / "mlp.csv", mlp_rows())
    return tmp_path


def test_the_tables_are_the_operators_of_all_layers(folder: Path) -> None:
    model = import_folder(folder, MODEL, "small")
    writes = 0.002e-3 + 0.001e-3 * np.array(TOKENS)
    layer = 1e-3 * len(PER_LAYER) * (0.1 + 0.01 * np.array(TOKENS)) + writes
    np.testing.assert_allclose(model.linear, 3 * layer + 1e-3 * (0.5 + 0.1 + 0.01 * np.array(TOKENS)))
    np.testing.assert_array_equal(model.decode_kv, [1, 17, 65])
    np.testing.assert_allclose(model.decode[:, 1:], [[3e-3 * (0.01 + 1e-4 * n * k) for k in CONTEXTS] for n in REQUESTS])
    np.testing.assert_array_equal(model.decode[:, 0], model.decode[:, 1])  # a shorter context than any measured
    assert model.constant == model.per_request == 0.0 and model.sequences.size == 0
    assert "Not included: lm_head, sampler, CPU overhead" in model.provenance.notes and model.provenance.num_blocks is None


def test_prefill_goes_on_where_it_was_not_measured(folder: Path) -> None:
    contexts, chunks, table = prefill_table(read_csv_profile(folder))
    np.testing.assert_array_equal(contexts, [0, 16, 32])
    np.testing.assert_array_equal(chunks, [1, 16, 32, 64])
    expected = [[1e-3 * (0.01 + 1e-5 * c * (c + 2 * x)) for c in (16, 16, 32, 64)] for x in (0, 16, 32)]
    np.testing.assert_allclose(table, expected)  # the chunk of 64 by the work of the one of 32


def test_a_row_of_decodes_goes_on_where_it_was_not_measured(folder: Path) -> None:
    rows = [r for r in attention_rows() if not (r["batch_size"] == 4 and r["kv_cache_size"] == 128)]
    rows += [dict(r, kv_cache_size=128, **{"time_stats.attn_decode.median": 0.01 + 1e-4 * 128}) for r in rows[:1]]
    write(folder / "attention.csv", rows)
    requests, contexts, seconds = decode_table(read_csv_profile(folder))
    assert (list(requests), list(contexts)) == ([1, 4], [1, 17, 65, 129])
    assert seconds[1, 3] == pytest.approx(1e-3 * (0.01 + 1e-4 * 4 * 128))


def test_writes_are_those_of_decodes(folder: Path) -> None:
    profile = read_csv_profile(folder)
    np.testing.assert_allclose(write_seconds(profile, np.array([1.0, 4.0, 100.0])), [3e-6, 6e-6, 102e-6])
    assert profile.prefill_write == pytest.approx({16: 9e-3, 32: 9e-3, 64: 9e-3})


def test_sampled_requests_and_the_machine_come_from_the_other_files(folder: Path) -> None:
    rows = [{"num_sequences": n, "time_stats.lm_head.median": 0.1 * n, "time_stats.sampler.median": 0.2} for n in (1, 2)]
    write(folder / "per_sequence.csv", rows)
    meta = {"device": "a GPU", "memory_bytes": 80 * 2**30, "source": "me", "dtype": "bfloat16", "head_dim": 16}
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    model = import_folder(folder, MODEL, "small")
    np.testing.assert_allclose(model.per_sequence, [0.3e-3, 0.4e-3])
    assert (model.provenance.gpu, model.provenance.model) == ("a GPU", "small, bfloat16, one device")
    free = 80 * 2**30 * 0.9 - 2 * MODEL.parameters - 3.5 * 2**30
    assert model.provenance.num_blocks == int(free // (16 * MODEL.kv_bytes))
    (folder / "meta.json").write_text(json.dumps(meta | {"head_dim": 128}), encoding="utf-8")
    with pytest.raises(ConfigError, match="its head_dim is 16, the profile's 128"):
        import_folder(folder, MODEL, "small")


@pytest.mark.parametrize(
    ("file", "column"),
    [
        ("attention.csv", "kv_cache_size"),
        ("attention.csv", "time_stats.attn_decode.median"),
        ("attention.csv", "n_q_head"),
        ("mlp.csv", "num_tokens"),
        ("mlp.csv", "time_stats.mlp_act.median"),
    ],
)
def test_a_missing_column_is_named(folder: Path, file: str, column: str) -> None:
    write(folder / file, attention_rows() if file == "attention.csv" else mlp_rows(), drop=column)
    with pytest.raises(ConfigError, match=f"{file}: column '{column}' is missing"):
        read_csv_profile(folder)


def test_other_refusals(folder: Path) -> None:
    wider = DenseModel(title="wide", layers=3, hidden=64, intermediate=256, heads=4, kv_heads=2, vocab=100)
    with pytest.raises(ConfigError, match="its n_expanded_embd is 256, the profile's 128"):
        import_folder(folder, wider, "a")
    with pytest.raises(ConfigError, match="--tensor-parallel: 2, must be 1 for --format vidur"):
        import_profile(folder, "llama-2-7b", "a", tensor_parallel=2)
    rows = mlp_rows()
    rows[0]["time_stats.add.median"] = "fast"
    write(folder / "mlp.csv", rows)
    with pytest.raises(ConfigError, match=r"line 2: time_stats\.add\.median 'fast', must be milliseconds"):
        read_csv_profile(folder)
    (folder / "mlp.csv").unlink()
    with pytest.raises(ConfigError, match=r"no mlp\.csv \(nor mlp\.csv\.gz\)"):
        read_csv_profile(folder)
    with pytest.raises(ConfigError, match="--config: not for Vidur's tables"):
        import_profile(folder / "x.npz", "llama-2-7b", "a", config=folder)


def test_the_command_takes_a_configuration(folder: Path, tmp_path: Path) -> None:
    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config | {"num_key_value_heads": 2, "vocab_size": 100}), encoding="utf-8")
    out = tmp_path / "small.npz"
    words = ["import", "--format", "vidur", str(folder), "--config", str(path), "--name", "small", "--out", str(out), "--quiet"]
    assert calibrate.main(words) == 0
    model = load_calibration(str(out))
    assert isinstance(model, TableTime)
    np.testing.assert_allclose(model.pack(), import_folder(folder, MODEL, "small").pack(), rtol=1e-6)


# ------------------------------------------------------------------------------------------------ what is shipped


def test_the_shipped_calibration_grows_with_what_it_computes() -> None:
    model = load_calibration("a100-llama2-7b")
    assert isinstance(model, TableTime) and model.provenance.num_blocks == 7161
    assert "A800" in model.provenance.gpu and "silicon of an A100" in model.provenance.gpu

    def decodes(n: int, k: int) -> float:
        return model.seconds(Batch(decodes=n, decode_kv=n * k, sampled=n, batch_size=n))

    def prompt(c: int, x: int) -> float:
        batch = Batch(prefills=1, prefill_tokens=c, prefill_squares=c**2, prefill_context=x, prefill_work=c * (c / 2 + x), batch_size=1)
        return model.seconds(batch)

    assert all(
        a < b
        for n in (1, 32, 128)
        for a, b in zip([decodes(n, k) for k in (64, 512, 2048)], [decodes(n, k) for k in (512, 2048, 4033)], strict=True)
    )
    assert all(a < b for a, b in zip([prompt(c, 0) for c in (64, 256, 1024)], [prompt(c, 0) for c in (256, 1024, 4096)], strict=True))
    assert all(prompt(512, x) < prompt(512, 2 * x) for x in (256, 512, 1024))


def test_the_import_reproduces_the_shipped_file(tmp_path: Path) -> None:
    source = Path(os.environ.get("LLMSCHED_CALIBRATION", "not set")) / "frontier_a800_llama2_7b"
    if not source.is_dir():
        pytest.skip("raw profile frontier_a800_llama2_7b not found (set LLMSCHED_CALIBRATION to its folder)")
    out = tmp_path / "a100-llama2-7b.npz"
    words = ["import", "--format", "vidur", str(source), "--model", "llama-2-7b", "--name", "a100-llama2-7b", "--out", str(out)]
    assert calibrate.main(words) == 0
    assert out.read_bytes() == (ROOT / "llmsched_env" / "perf" / "calibrations" / out.name).read_bytes()
    assert MODELS["llama-2-7b"].title in load_calibration(str(out)).provenance.model
