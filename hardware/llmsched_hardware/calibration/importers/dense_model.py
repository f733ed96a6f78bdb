"""The sizes of a dense decoder, from its Hugging Face ``config.json`` or by name, whole or divided among GPUs.

What is covered is the Llama family as vLLM runs it (``vllm/model_executor/models/{llama,qwen2,qwen3}.py`` of vLLM 0.28.0): per
layer a norm, the fused query, key and value projection, rotary embedding, attention, the output projection, a norm,
the fused gate and up projection, SiLU, and the down projection. Qwen2 adds a bias to the first projection, Qwen3 a
norm of queries and keys. Anything that runs other kernels is refused: experts, a sliding window, quantized weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmsched_env import checks
from llmsched_env.errors import ConfigError, did_you_mean

BYTES = 2  # bfloat16 or float16
TYPES = ("llama", "mistral", "qwen2", "qwen3")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")
_HEAD_PADDING = 64  # vLLM pads the vocabulary to a multiple of this (VocabParallelEmbedding) before it divides it


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseModel:
    """Sizes of a dense decoder on one GPU; of its share of the model where it is divided among several.

    Attributes:
        title: how to call it.
        layers, hidden, intermediate, vocab: as in ``config.json``.
        heads, kv_heads, head_dim: attention heads and heads of keys and values.
        tied: embedding and lm_head are one matrix.
        qkv_bias, o_bias, mlp_bias: projections with a bias.
        qk_norm: queries and keys are normed per head.
        gpus: among how many GPUs the model is divided.
    """

    title: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    head_dim: int = 128
    tied: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    gpus: int = 1

    @property
    def qkv(self) -> int:
        """Outputs of the fused query, key and value projection."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def gemms(self) -> dict[str, tuple[int, int]]:
        """(outputs n, inputs k) of the GEMMs of one layer."""
        return {
            "qkv": (self.qkv, self.hidden),
            "o": (self.hidden, self.heads * self.head_dim),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }

    @property
    def parameters(self) -> int:
        """Weights on one GPU: layers with their norms and biases, the last norm, embedding and lm_head."""
        layer = sum(n * k for n, k in self.gemms.values()) + 2 * self.hidden
        layer += self.qkv_bias * self.qkv + self.o_bias * self.hidden + self.mlp_bias * (2 * self.intermediate + self.hidden)
        layer += self.qk_norm * 2 * self.head_dim
        return self.layers * layer + self.hidden + (1 if self.tied else 2) * self.vocab * self.hidden

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values of one token in all layers, on one GPU."""
        return self.layers * 2 * self.kv_heads * self.head_dim * BYTES

    @property
    def shape(self) -> str:
        """The sizes in words."""
        return (
            f"{self.layers} layers, hidden {self.hidden}, intermediate {self.intermediate}, {self.heads}/{self.kv_heads} heads of "
            f"{self.head_dim}, vocabulary {self.vocab}"
        )

    def divided(self, gpus: int) -> DenseModel:
        """One GPU's share under tensor parallelism, as vLLM divides it.

        Query heads, the intermediate size and the vocabulary are divided; key and value heads too, or repeated where
        there are fewer than GPUs.

        Raises:
            ConfigError: a size that the number of GPUs does not divide.
        """
        checks.integer("--tensor-parallel", gpus, low=1)
        if gpus == 1:
            return self
        for name, size in (("attention heads", self.heads), ("intermediate size", self.intermediate)):
            if size % gpus:
                raise ConfigError(f"--tensor-parallel: {gpus}, must divide the model's {size} ({name})")
        if self.kv_heads % gpus and gpus % self.kv_heads:
            raise ConfigError(f"--tensor-parallel: {gpus}, must divide the model's {self.kv_heads} key and value heads or be a multiple")
        padded = -(-self.vocab // _HEAD_PADDING) * _HEAD_PADDING
        return dataclasses.replace(
            self,
            heads=self.heads // gpus,
            kv_heads=max(self.kv_heads // gpus, 1),
            intermediate=self.intermediate // gpus,
            vocab=-(-padded // gpus),
            gpus=gpus,
        )


_LLAMA_3 = DenseModel(title="Llama-3-8B", layers=32, hidden=4096, intermediate=14336, heads=32, kv_heads=8, vocab=128256)
MODELS: Mapping[str, DenseModel] = {
    "llama-2-7b": DenseModel(title="Llama-2-7B", layers=32, hidden=4096, intermediate=11008, heads=32, kv_heads=32, vocab=32000),
    "llama-3-8b": _LLAMA_3,
    "llama-3.1-8b": dataclasses.replace(_LLAMA_3, title="Llama-3.1-8B"),
}


def chosen_model(model: str, config: Path | None) -> DenseModel:
    """The model that ``--config`` gives, called ``--model`` where that is given too; else the one of the name ``--model``.

    Raises:
        ConfigError: neither, an unknown name (the nearest is given), or a configuration that is refused.
    """
    if config is not None:
        return read_model(config, title=model)
    if not model:
        raise ConfigError(f"--model: missing; give a name ({', '.join(MODELS)}) or --config, the model's config.json")
    if model not in MODELS:
        hint = did_you_mean(model, MODELS)
        raise ConfigError(f"model {model!r} is unknown{hint} (must be one of {', '.join(MODELS)}, or give --config, its config.json)")
    return MODELS[model]


def read_model(path: Path, title: str = "") -> DenseModel:
    """The model of a ``config.json``.

    Args:
        path: the file, or the folder that holds it.
        title: how to call it; its architecture and parameters where empty.

    Raises:
        ConfigError: not such a file, a missing or refused value, or a model that runs other kernels than a dense decoder.
    """
    file = path / "config.json" if path.is_dir() else path
    record = checks.json_object(f"--config: {file.name}", checks.file_bytes("--config", file))
    return _model(record, f"--config: {file.name}", title)


def _model(record: Mapping[str, Any], owner: str, title: str) -> DenseModel:
    _refuse_other_kernels(record, owner)
    kind = record["model_type"]

    def size(name: str, default: int | None = None) -> int:
        value = record.get(name)
        if value is None and default is not None:
            return default
        if value is None:
            raise ConfigError(f"{owner}: field {name!r} is missing (needed: a whole number >= 1)")
        return checks.integer(f"{owner}: {name}", value, low=1)

    def flag(name: str, default: bool = False) -> bool:
        return checks.flag(f"{owner}: {name}", record.get(name, default))

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    if record.get("head_dim") is None and hidden % heads:
        raise ConfigError(f"{owner}: head_dim is missing, and hidden_size {hidden} is no multiple of num_attention_heads {heads}")
    kv_heads = size("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ConfigError(f"{owner}: num_attention_heads {heads}, must be a multiple of num_key_value_heads {kv_heads}")
    bias = flag("attention_bias")
    model = DenseModel(
        title=title,
        layers=size("num_hidden_layers"),
        hidden=hidden,
        intermediate=size("intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        vocab=size("vocab_size"),
        head_dim=size("head_dim", hidden // heads),
        tied=flag("tie_word_embeddings"),
        qkv_bias=kind == "qwen2" or bias,
        o_bias=bias and kind != "qwen2",
        mlp_bias=flag("mlp_bias"),
        qk_norm=kind == "qwen3",
    )
    if title:
        return model
    return dataclasses.replace(model, title=f"{kind} of {model.parameters / 1e9:.3g} billion parameters")


def _refuse_other_kernels(record: Mapping[str, Any], owner: str) -> None:
    """Refuse what is no dense decoder of the family, or runs kernels that the profiles do not hold."""
    kind = record.get("model_type")
    allowed = f"allowed: dense decoders of model_type {', '.join(TYPES)}"
    experts = [name for name in EXPERTS if record.get(name)]
    if experts or (isinstance(kind, str) and ("moe" in kind or kind == "mixtral")):
        found = f"{experts[0]} {record[experts[0]]}" if experts else f"model_type {kind!r}"
        raise ConfigError(f"{owner}: a mixture of experts ({found}); {allowed}")
    if kind is None:
        raise ConfigError(f"{owner}: field 'model_type' is missing; {allowed}")
    if kind not in TYPES:
        hint = did_you_mean(kind, TYPES) if isinstance(kind, str) else ""
        raise ConfigError(f"{owner}: model_type {kind!r}{hint}; {allowed}")
    window = record.get("sliding_window")
    if window is not None and (kind == "mistral" or record.get("use_sliding_window", False)):
        raise ConfigError(
            f"{owner}: sliding_window {window}; allowed: attention over the whole context (null), as the profiles measured it"
        )
    if record.get("quantization_config") is not None:
        raise ConfigError(f"{owner}: quantization_config is set; allowed: weights of 16 bits, as the profiles measured them")
    activation = record.get("hidden_act", "silu")
    if activation != "silu":
        raise ConfigError(f"{owner}: hidden_act {activation!r}; allowed: silu, a gated one of three projections")
