"""Sizes of dense decoders: from config.json, by name, divided among GPUs; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmsched_env.errors import ConfigError
from llmsched_hardware.calibration.importers.dense_model import MODELS, DenseModel, chosen_model, read_model

LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


def written(folder: Path, **changes: Any) -> Path:
    """A config.json; a change to None leaves the field out."""
    path = folder / "config.json"
    path.write_text(json.dumps({key: value for key, value in (LLAMA | changes).items() if value is not None}), encoding="utf-8")
    return path


def test_a_configuration_gives_the_named_shape(tmp_path: Path) -> None:
    assert read_model(written(tmp_path), title="Llama-3.1-8B") == MODELS["llama-3.1-8b"]
    assert read_model(tmp_path, title="Llama-3.1-8B") == MODELS["llama-3.1-8b"]
    assert read_model(tmp_path).title == "llama of 8.03 billion parameters"


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({}, 8_030_261_248),
        ({"num_key_value_heads": None, "intermediate_size": 11008, "vocab_size": 32000}, 6_738_415_616),
        # Qwen2.5-7B and Qwen3-8B, Qwen2.5-0.5B with its tied embedding, by their published numbers of parameters.
        (
            {
                "model_type": "qwen2",
                "hidden_size": 3584,
                "intermediate_size": 18944,
                "num_hidden_layers": 28,
                "num_attention_heads": 28,
                "num_key_value_heads": 4,
                "vocab_size": 152064,
                "sliding_window": 131072,
                "use_sliding_window": False,
            },
            7_615_616_512,
        ),
        (
            {
                "model_type": "qwen3",
                "intermediate_size": 12288,
                "num_hidden_layers": 36,
                "head_dim": 128,
                "vocab_size": 151936,
                "sliding_window": None,
            },
            8_190_735_360,
        ),
        (
            {
                "model_type": "qwen2",
                "hidden_size": 896,
                "intermediate_size": 4864,
                "num_hidden_layers": 24,
                "num_attention_heads": 14,
                "num_key_value_heads": 2,
                "vocab_size": 151936,
                "tie_word_embeddings": True,
            },
            494_032_768,
        ),
    ],
)
def test_parameters_are_the_published_ones(tmp_path: Path, changes: dict[str, Any], count: int) -> None:
    assert read_model(written(tmp_path, **changes)).parameters == count


def test_a_head_may_be_wider_than_hidden_over_heads(tmp_path: Path) -> None:
    model = read_model(written(tmp_path, model_type="qwen3", hidden_size=5120, num_attention_heads=64, head_dim=128))
    assert (model.head_dim, model.qk_norm, model.gemms["o"]) == (128, True, (5120, 8192))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": None}, "field 'model_type' is missing; allowed: dense decoders of model_type llama, mistral, qwen2, qwen3"),
        ({"model_type": "llma"}, "model_type 'llma'; did you mean 'llama'"),
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"model_type": "mixtral"}, "a mixture of experts"),
        ({"model_type": "qwen3_moe", "num_experts": 128}, "a mixture of experts (num_experts 128)"),
        ({"num_local_experts": 8}, "a mixture of experts (num_local_experts 8)"),
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window 4096; allowed: attention over the whole context"),
        ({"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": True}, "sliding_window 4096"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is set"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"vocab_size": None}, "field 'vocab_size' is missing (needed: a whole number >= 1)"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: 0, must be an integer from 1"),
        ({"hidden_size": "4096"}, "hidden_size: '4096', must be an integer"),
        ({"hidden_size": 4100}, "head_dim is missing, and hidden_size 4100 is no multiple of num_attention_heads 32"),
        ({"num_key_value_heads": 5}, "num_attention_heads 32, must be a multiple of num_key_value_heads 5"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: 'yes', must be true or false"),
    ],
)
def test_refusals_name_field_value_and_what_is_allowed(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_model(written(tmp_path, **changes))
    assert message in str(refused.value) and "--config: config.json" in str(refused.value)


def test_a_mistral_without_a_window_is_taken(tmp_path: Path) -> None:
    assert read_model(written(tmp_path, model_type="mistral", sliding_window=None)).heads == 32


def test_what_is_no_configuration_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for text in ("[1]", "{", "\x00"):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match="--config"):
            read_model(path)
    with pytest.raises(ConfigError, match="--config"):
        read_model(tmp_path / "absent.json")


def test_by_name_or_by_configuration(tmp_path: Path) -> None:
    assert chosen_model("llama-2-7b", None) is MODELS["llama-2-7b"]
    assert chosen_model("mine", written(tmp_path)).title == "mine"
    with pytest.raises(ConfigError, match="--model: missing"):
        chosen_model("", None)
    with pytest.raises(ConfigError, match="did you mean 'llama-2-7b'"):
        chosen_model("llama-2-7", None)


def test_a_share_has_the_sizes_of_one_gpu() -> None:
    whole = MODELS["llama-3.1-8b"]
    half = whole.divided(2)
    assert (half.heads, half.kv_heads, half.intermediate, half.vocab, half.gpus) == (16, 4, 7168, 64128, 2)
    assert half.gemms == {"qkv": (3072, 4096), "o": (4096, 2048), "gate_up": (14336, 4096), "down": (4096, 7168)}
    norms = whole.layers * 2 * whole.hidden + whole.hidden  # every GPU has all of them
    assert 2 * half.parameters - norms == whole.parameters
    assert whole.divided(1) is whole and whole.divided(16).kv_heads == 1 and half.kv_bytes * 2 == whole.kv_bytes


@pytest.mark.parametrize(
    ("model", "gpus", "message"),
    [
        (MODELS["llama-3.1-8b"], 3, "must divide the model's 32 (attention heads)"),
        (MODELS["llama-3.1-8b"], 0, "--tensor-parallel: 0, must be an integer from 1"),
        (DenseModel(title="a", layers=1, hidden=64, intermediate=100, heads=8, kv_heads=8, vocab=64), 8, "100 (intermediate size)"),
        (DenseModel(title="a", layers=1, hidden=64, intermediate=64, heads=12, kv_heads=6, vocab=64), 4, "6 key and value heads"),
    ],
)
def test_numbers_of_gpus_that_do_not_divide_are_refused(model: DenseModel, gpus: int, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        model.divided(gpus)
    assert message in str(refused.value)
