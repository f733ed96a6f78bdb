"""llmsched calibrate from-bench: files in, a calibration out, and what is refused before any work."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "hardware"))

from bench_files import FRONTEND, TRUTH, serve, vllm_result, write

from llmsched_env.cli import calibrate
from llmsched_env.perf import FormulaTime, load_calibration

SETTINGS = ("--set", "engine.max_num_batched_tokens=512", "engine.max_num_seqs=64", "engine.num_blocks=2048", "engine.block_size=16")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("bench")
    return write(folder / "a.json", vllm_result(serve(4.0, 200, 1))), write(folder / "b.json", vllm_result(serve(3.0, 150, 2)))


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = calibrate.main(["from-bench", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_calibration_from_a_file_predicts_another(files: tuple[Path, Path], tmp_path: Path, capsys: Any) -> None:
    out, found = tmp_path / "new" / "mine.json", tmp_path / "found.json"
    code, text, err = run(capsys, files[0], "--hold-out", files[1], *SETTINGS, "--out", out, "--json", found)
    assert (code, err) == (0, "")
    model = load_calibration(out)
    assert isinstance(model, FormulaTime) and model.provenance.name == "mine"
    assert model.a == pytest.approx(TRUTH.a, rel=0.15)
    assert (model.provenance.num_blocks, model.provenance.block_size) == (2048, 16)
    assert "held out     b.json: 150 requests" in text and "P99" in text
    assert "assumed" not in text
    record = json.loads(found.read_text())["found"]
    assert record["frontend_seconds"] == pytest.approx(FRONTEND, abs=0.006)
    assert set(record["coefficients"]) == {"a", "b", "d1", "d3", "d4", "frontend"}
    assert set(record["coefficients"]["a"]) == {"name", "value", "low", "high", "share", "determined", "partner"}
    assert abs(record["held_out"][0]["error"]["latency_mean"]) < 0.1


def test_blocks_come_from_the_servers_metrics(files: tuple[Path, Path], tmp_path: Path, capsys: Any) -> None:
    value = json.loads(files[0].read_text())
    prompt, output = (int(np.sum(value[name])) for name in ("input_lens", "output_lens"))
    info = 'vllm:cache_config_info{block_size="32",num_gpu_blocks="1025"} 1.0\n'
    before = tmp_path / "before"
    before.write_text(f"vllm:prompt_tokens_total 5.0\nvllm:generation_tokens_total 1.0\nvllm:num_preemptions_total 0.0\n{info}")
    after = tmp_path / "after"
    counted = f"vllm:prompt_tokens_total {prompt + 5}\nvllm:generation_tokens_total {output + 1}\nvllm:num_preemptions_total 0.0\n"
    after.write_text(counted + info)
    metrics = ("--metrics-before", before, "--metrics-after", after)
    out = tmp_path / "m.json"
    code, text, _ = run(capsys, files[0], *metrics, "--out", out)
    assert code == 0
    provenance = load_calibration(out).provenance
    assert (provenance.num_blocks, provenance.block_size) == (1024, 32)
    assert "engine settings not given: max_num_batched_tokens = 2048, max_num_seqs = 256 assumed" in text
    code, _, err = run(capsys, files[0], *metrics, "--set", "engine.num_blocks=9", "--out", out)
    assert code == 2 and "--set engine.num_blocks: 9, but --metrics-after says 1024" in err
    code, _, err = run(capsys, files[0], *metrics[:2], "--out", out)
    assert code == 2 and "both must be given" in err


def test_what_is_refused_before_any_work(files: tuple[Path, Path], tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "o.json"
    for words, message in (
        ((files[0], "--out", tmp_path / "o.npz"), "must end in .json"),
        ((files[0], "--out", out, "--name", " "), "--name: empty"),
        ((files[0], files[0], "--out", out), "given twice"),
        ((files[0], "--hold-out", files[0], "--out", out), "given twice"),
        ((files[0], "--out", files[0]), "is also a RESULT"),
        ((tmp_path / "none.json", "--out", out), "none.json"),
        ((files[0], "--out", out, "--set", "max_num_seqs=3"), "must be engine.FIELD=VALUE"),
        ((files[0], "--out", out, "--set", "engine.max_num_sekws=3"), "did you mean 'max_num_seqs'"),
        ((files[0], "--out", out, "--set", "engine.max_num_seqs=0"), "--set engine.max_num_seqs: 0"),
        ((files[0], "--out", out, "--set", "engine.max_model_len=100"), "set engine.max_model_len"),
    ):
        code, _, err = run(capsys, *words)
        assert code == 2 and message in err, err
        assert not out.exists()
