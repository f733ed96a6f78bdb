"""Model shapes by name: a ``config.json`` written here is all that vLLM needs to run a model with dummy weights.

Times and KV memory depend on the shape alone, not on what the weights say, so a calibration needs
neither a download nor a licence. This module imports nothing of vLLM.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmsched_env.errors import ConfigError, did_you_mean
from llmsched_env.files import replacing

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder of the Llama family.

    Attributes:
        layers, hidden, intermediate, heads, kv_heads, vocab: sizes; a head is ``hidden / heads`` wide.
        max_model_len: longest prompt + output, tokens.
        rope_theta: base of the rotary embedding.
        dtype: of weights and KV cache.
        bos, eos: token ids.
        source: where the sizes come from.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    max_model_len: int
    rope_theta: float
    dtype: str
    bos: int
    eos: int
    source: str

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def parameters(self) -> int:
        """Weights, embedding and output head counted apart."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        layer = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return self.layers * layer + 2 * self.vocab * self.hidden + self.hidden

    @property
    def weight_bytes(self) -> int:
        return self.parameters * _BYTES[self.dtype]

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * _BYTES[self.dtype]

    def config(self) -> dict[str, Any]:
        """``config.json`` as the Hugging Face hub has it."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.max_model_len,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "torch_dtype": self.dtype,
            "bos_token_id": self.bos,
            "eos_token_id": self.eos,
        }


SHAPES = {
    # vLLM's attention on a CPU accepts no head narrower than 32.
    "tiny": ModelShape(2, 64, 128, 2, 1, 1000, 2048, 1e4, "float32", 1, 2, "made up: as small as vLLM's CPU attention takes"),
    "small": ModelShape(
        12, 256, 1024, 4, 2, 4096, 2048, 1e4, "float32", 1, 2, "made up: twelve layers that a CPU computes in milliseconds"
    ),
    "llama-2-7b-shape": ModelShape(
        32, 4096, 11008, 32, 32, 32000, 4096, 1e4, "float16", 1, 2, "Llama 2 (arXiv 2307.09288), config.json of meta-llama/Llama-2-7b-hf"
    ),
    "llama-3-8b-shape": ModelShape(
        32, 4096, 14336, 32, 8, 128256, 8192, 5e5, "bfloat16", 128000, 128001,
        "Llama 3 (arXiv 2407.21783), config.json of meta-llama/Meta-Llama-3-8B",
    ),
}  # fmt: skip


def shape_names() -> list[str]:
    return list(SHAPES)


def is_shape(model: str) -> bool:
    """Whether ``model`` names a shape, not a Hugging Face id or a path."""
    return model in SHAPES


def model_shape(name: str) -> ModelShape:
    """The shape behind a name.

    Raises:
        ConfigError: unknown name (the nearest one is given).
    """
    if name not in SHAPES:
        hint = did_you_mean(name, SHAPES)
        raise ConfigError(f"model: shape {name!r} is unknown{hint} (known: {', '.join(SHAPES)})")
    return SHAPES[name]


def write_shape(name: str, folder: Path) -> Path:
    """Write ``folder/config.json`` of a shape; returns the folder, which vLLM takes as a model path.

    Raises:
        ConfigError: unknown name.
        OSError: it cannot be written.
    """
    config = model_shape(name).config()
    with replacing(folder / "config.json") as file:  # another process may read it meanwhile
        file.write(json.dumps(config, indent=2) + "\n")
    return folder
