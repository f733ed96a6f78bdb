"""The kernels of one layer of a dense decoder in PyTorch, and a clock for them: what ``llmsched calibrate kernels`` measures.

Attention is PyTorch's ``scaled_dot_product_attention``, the flash_attn package or PyTorch's flex attention. On a GPU with Triton
the operators between the GEMMs are compiled, so that each is one kernel, as in an engine; elsewhere they run as PyTorch has them.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from llmsched_env.errors import ConfigError, require
from llmsched_hardware.calibration.importers.dense_model import DenseModel

Attention = Literal["auto", "sdpa", "flash_attn", "flex"]
Device = Literal["auto", "cuda", "cpu"]
Call = Callable[[], Any]

BLOCK_SIZE = 16
EPSILON = 1e-5
ROPE_BASE = 10000.0
WARM_UP = 3
LEAST_REPEATS, REPEATS = 5, 50
LONGEST = 0.5  # seconds for the repeats of one kernel
_FLUSH = {"cuda": 256 * 2**20, "cpu": 32 * 2**20}  # bytes written between repeats: more than the last cache holds


@dataclass(frozen=True, slots=True)
class Times:
    """Repeats of one kernel, milliseconds."""

    least: float
    most: float
    mean: float
    median: float
    deviation: float
    repeats: int

    @classmethod
    def of(cls, milliseconds: list[float]) -> Times:
        values = np.array(milliseconds)
        return cls(
            least=float(values.min()),
            most=float(values.max()),
            mean=float(values.mean()),
            median=float(np.median(values)),
            deviation=float(values.std()),
            repeats=len(milliseconds),
        )


class Clock:
    """Times a call again and again, the caches written over before each: by CUDA events on a GPU, ``perf_counter`` on a CPU."""

    def __init__(self, torch: Any, device: str, repeats: int = REPEATS) -> None:
        self._torch = torch
        self._repeats = repeats
        self._cuda = device == "cuda"
        self._flush = torch.empty(_FLUSH[device], dtype=torch.int8, device=device)

    def times(self, call: Call) -> Times:
        """At least ``LEAST_REPEATS`` and at most ``repeats`` repeats, as many as ``LONGEST`` seconds hold, after ``WARM_UP``."""
        for _ in range(WARM_UP):
            call()
        self._wait()
        began = time.perf_counter()
        found: list[float] = []
        while len(found) < LEAST_REPEATS or (len(found) < self._repeats and time.perf_counter() - began < LONGEST):
            found += self._batch(call) if self._cuda else [self._one(call)]
        return Times.of(found)

    def _wait(self) -> None:
        if self._cuda:
            self._torch.cuda.synchronize()

    def _one(self, call: Call) -> float:
        self._flush.zero_()
        began = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - began)

    def _batch(self, call: Call) -> list[float]:
        """A few repeats queued at once, so that the GPU never waits for Python between the events."""
        events = [[self._torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(LEAST_REPEATS)]
        for begin, end in events:
            self._flush.zero_()
            begin.record()
            call()
            end.record()
        self._torch.cuda.synchronize()
        return [float(begin.elapsed_time(end)) for begin, end in events]


@dataclass(frozen=True, slots=True)
class Machine:
    """Where and with what is measured."""

    torch: Any
    device: str
    dtype: Any
    name: str
    memory: int
    fused: bool

    @classmethod
    def find(cls, device: Device) -> Machine:
        """The GPU if there is one, else the CPU; or the one that is asked for.

        Raises:
            ConfigError: a GPU is asked for and PyTorch finds none.
            MissingExtraError: PyTorch is not installed.
        """
        torch = require("torch", "agents")
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("--device: cuda, but PyTorch finds no GPU (auto or cpu measure on the processor)")
        if device == "cpu" or not torch.cuda.is_available():
            return cls(torch, "cpu", torch.float32, _processor(), 0, fused=False)
        properties = torch.cuda.get_device_properties(0)
        fused = importlib.util.find_spec("triton") is not None
        return cls(torch, "cuda", torch.bfloat16, properties.name, int(properties.total_memory), fused)

    def random(self, *shape: int) -> Any:
        return self.torch.randn(*shape, dtype=self.dtype, device=self.device)

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """One kernel instead of several, where that can be had."""
        return self.torch.compile(function, dynamic=True) if self.fused else function


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "CPU")
    except OSError:
        return "CPU"


class Layer:
    """One layer of the model with its weights, and what surrounds the layers."""

    def __init__(self, machine: Machine, model: DenseModel, attention: Attention) -> None:
        self.machine = machine
        self.model = model
        self.weights = {name: machine.random(n, k) for name, (n, k) in model.gemms.items()}
        self.vocabulary = machine.random(model.vocab, model.hidden)
        self.norm_weight = machine.random(model.hidden)
        self.attention = _Attention(machine, model, attention)
        functional = machine.torch.nn.functional
        self._linear = functional.linear
        self._embedding = functional.embedding
        self._norm = machine.compiled(lambda x, w: functional.rms_norm(x, (x.shape[-1],), w, EPSILON))
        self._add = machine.compiled(lambda x, y: x + y)
        self._act = machine.compiled(lambda x: functional.silu(x[:, : x.shape[1] // 2]) * x[:, x.shape[1] // 2 :])
        self._rope = machine.compiled(_rope)
        self._sample = machine.compiled(lambda x: x.float().argmax(-1))

    def of_tokens(self, tokens: int) -> dict[str, Call]:
        """The operators of mlp.csv, by its names for them."""
        machine, model, weights, linear = self.machine, self.model, self.weights, self._linear
        torch = machine.torch
        x, residual = machine.random(tokens, model.hidden), machine.random(tokens, model.hidden)
        heads, gated = machine.random(tokens, model.heads * model.head_dim), machine.random(tokens, 2 * model.intermediate)
        inner = machine.random(tokens, model.intermediate)
        rotated = machine.random(tokens, model.heads + model.kv_heads, model.head_dim)
        half = model.head_dim // 2
        angle = torch.outer(torch.arange(tokens), ROPE_BASE ** (-torch.arange(half) / half))[:, None].to(machine.device)
        cos, sin = angle.cos().to(machine.dtype), angle.sin().to(machine.dtype)
        ids = torch.randint(model.vocab, (tokens,), device=machine.device)

        def norm() -> Any:
            return self._norm(x, self.norm_weight)

        return {
            "emb": lambda: self._embedding(ids, self.vocabulary),
            "input_layernorm": norm,
            "attn_pre_proj": lambda: linear(x, weights["qkv"]),
            "attn_rope": lambda: self._rope(rotated, cos, sin),
            "attn_post_proj": lambda: linear(heads, weights["o"]),
            "post_attention_layernorm": norm,
            "mlp_up_proj": lambda: linear(x, weights["gate_up"]),
            "mlp_act": lambda: self._act(gated),
            "mlp_down_proj": lambda: linear(inner, weights["down"]),
            "add": lambda: self._add(x, residual),
        }

    def of_sequences(self, requests: int) -> dict[str, Call]:
        """The operators of per_sequence.csv: lm_head, and the choice of the likeliest token."""
        x = self.machine.random(requests, self.model.hidden)
        logits = self.machine.random(requests, self.model.vocab)
        return {"lm_head": lambda: self._linear(x, self.vocabulary), "sampler": lambda: self._sample(logits)}

    def write(self, tokens: int) -> Call:
        """The write of so many keys and values to slots that do not lie side by side."""
        machine, model, torch = self.machine, self.model, self.machine.torch
        cache = [machine.random(2 * tokens + BLOCK_SIZE, model.kv_heads, model.head_dim) for _ in range(2)]
        new = [machine.random(tokens, model.kv_heads, model.head_dim) for _ in range(2)]
        slots = 2 * torch.randperm(tokens, device=machine.device)

        def call() -> None:
            for whole, part in zip(cache, new, strict=True):
                whole.index_copy_(0, slots, part)

        return call


def _rope(x: Any, cos: Any, sin: Any) -> Any:
    """Rotary embedding of (tokens, heads, head_dim), the second half of a head against its first."""
    half = x.shape[-1] // 2
    low, high = x[..., :half], x[..., half:]
    rotated = x.clone()
    rotated[..., :half] = low * cos - high * sin
    rotated[..., half:] = high * cos + low * sin
    return rotated


class _Attention:
    """Attention calls of one layer by one of the implementations."""

    def __init__(self, machine: Machine, model: DenseModel, chosen: Attention) -> None:
        self.machine = machine
        self.model = model
        has_flash = importlib.util.find_spec("flash_attn") is not None
        if chosen == "auto":
            chosen = "flash_attn" if has_flash and machine.device == "cuda" else "sdpa"
        if chosen == "flash_attn" and not (has_flash and machine.device == "cuda"):
            raise ConfigError("--attention: flash_attn, needs a GPU and the package flash_attn; allowed here: auto, sdpa")
        if chosen == "flex" and not machine.fused:
            raise ConfigError("--attention: flex, needs a GPU and Triton, which compile it; allowed here: auto, sdpa")
        self.name = chosen
        self._grouped = model.heads != model.kv_heads
        self._functional = machine.torch.nn.functional
        self._flash = require("flash_attn", "agents") if chosen == "flash_attn" else None
        self._flex = require("torch.nn.attention.flex_attention", "agents") if chosen == "flex" else None

    def _tensors(self, requests: int, queries: int, keys: int) -> tuple[Any, Any, Any]:
        """Queries, keys and values, heads before tokens; after them for flash_attn."""
        model, random = self.model, self.machine.random
        sizes = ((model.heads, queries), (model.kv_heads, keys), (model.kv_heads, keys))
        if self._flash is not None:
            return tuple(random(requests, tokens, heads, model.head_dim) for heads, tokens in sizes)
        return tuple(random(requests, heads, tokens, model.head_dim) for heads, tokens in sizes)

    def prefill(self, chunk: int, context: int) -> Call:
        """A chunk of one prompt over tokens that are in the cache."""
        q, k, v = self._tensors(1, chunk, chunk + context)
        if self._flash is not None:
            flash = self._flash
            return lambda: flash.flash_attn_func(q, k, v, causal=True)  # causal from the lower right where the lengths differ
        if self._flex is not None:
            return self._flex_prefill(q, k, v, context)
        if context == 0:
            return lambda: self._functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self._grouped)
        if self.machine.device == "cuda":
            # The kernel with a causal lower right corner takes no groups. A prefill is bound by its arithmetic, which all heads have.
            bias = require("torch.nn.attention.bias", "agents").causal_lower_right(chunk, chunk + context)
            times = self.model.heads // self.model.kv_heads
            wide = [x.repeat_interleave(times, dim=1) for x in (k, v)]
            return lambda: self._functional.scaled_dot_product_attention(q, *wide, attn_mask=bias)
        mask = self.machine.torch.ones(chunk, chunk + context, dtype=self.machine.torch.bool).tril(context)
        return lambda: self._functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=self._grouped)

    def _flex_prefill(self, q: Any, k: Any, v: Any, context: int) -> Call:
        flex, device = self._flex, self.machine.device
        assert flex is not None
        mask = flex.create_block_mask(lambda b, h, i, j: i + context >= j, None, None, q.shape[2], k.shape[2], device=device)
        call = self.machine.compiled(flex.flex_attention)
        return lambda: call(q, k, v, block_mask=mask, enable_gqa=self._grouped)

    def decode(self, requests: int, context: int) -> Call:
        """One token of each of so many requests over ``context`` tokens in the cache and itself."""
        q, k, v = self._tensors(requests, 1, context + 1)
        if self._flash is not None:
            lengths = self.machine.torch.full((requests,), context + 1, dtype=self.machine.torch.int32, device=self.machine.device)
            flash = self._flash
            return lambda: flash.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, causal=True)
        if self._flex is not None:
            call = self.machine.compiled(self._flex.flex_attention)
            return lambda: call(q, k, v, enable_gqa=self._grouped)
        return lambda: self._functional.scaled_dot_product_attention(q, k, v, enable_gqa=self._grouped)


def columns_of(times: Mapping[str, Times]) -> dict[str, float]:
    """Columns ``time_stats.OPERATOR.STATISTIC`` of a row of measured operators."""
    return {
        f"time_stats.{name}.{statistic}": value
        for name, t in times.items()
        for statistic, value in (("min", t.least), ("max", t.most), ("mean", t.mean), ("median", t.median), ("std", t.deviation))
    }
