"""The real engine that a program runs on, from its command line: ``--model`` and ``--set engine.FIELD=VALUE``."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Sequence
from typing import Any

from llmsched_baselines.overrides import parse_value
from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import ConfigError, did_you_mean
from llmsched_env.perf import IterationTimeModel
from llmsched_hardware.real_engine import EngineOptions
from llmsched_hardware.shapes import SHAPES

# As small as lets a CPU fill the KV memory and preempt within a second.
TINY = {"max_model_len": 1024, "max_num_seqs": 128, "max_num_batched_tokens": 1024, "num_blocks": 512}
LONGEST = 4096
"""Longest prompt + output of other models unless set: what the scenarios are made for."""


def engine_options(model: str, pairs: Sequence[str], calibration: IterationTimeModel | None = None) -> EngineOptions:
    """The engine's settings: defaults for the model, the KV blocks a calibration states, then the words ``engine.FIELD=VALUE``.

    Raises:
        ConfigError: not such a word, an unknown field (the nearest is given), a refused value.
    """
    values: dict[str, Any] = dict(TINY)
    if model != "tiny":
        longest = min(SHAPES[model].max_model_len, LONGEST) if model in SHAPES else LONGEST
        values = {"max_model_len": longest, "max_num_seqs": 256, "max_num_batched_tokens": 2048}
    if calibration is not None:
        source = calibration.provenance
        values |= {name: n for name, n in (("num_blocks", source.num_blocks), ("block_size", source.block_size)) if n is not None}
    hints = {name: hint for name, hint in typing.get_type_hints(EngineOptions).items() if name not in ("model", "extra")}
    extra: dict[str, Any] = {}
    given: set[str] = set()
    for pair in pairs:
        key, equals, text = pair.partition("=")
        kind, _, name = key.partition(".")
        if not equals or kind != "engine":
            raise ConfigError(f"--set {pair!r}: must be engine.FIELD=VALUE, such as engine.max_num_seqs=256")
        if name in given:
            raise ConfigError(f"--set {key}: given twice")
        given.add(name)
        if name.startswith("extra."):
            extra[name.removeprefix("extra.")] = _plain(text)
        elif name in hints:
            values[name] = parse_value(key, text, hints[name])
        else:
            hint = did_you_mean(name, hints)
            raise ConfigError(f"--set {key}: unknown key{hint} (allowed: {', '.join(hints)}, extra.NAME for another of vllm.EngineArgs)")
    try:
        return EngineOptions(model=model, extra=extra, **values)
    except ConfigError as error:
        raise ConfigError(f"--set engine.{error}") from error


def _plain(text: str) -> Any:
    """A JSON value where the text is one, else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def engine_config(options: EngineOptions, model: IterationTimeModel, num_blocks: int) -> EngineConfig:
    """The simulator's engine with the real one's settings.

    Raises:
        ConfigError: settings that no vLLM engine can have.
    """
    own = {f.name for f in dataclasses.fields(EngineConfig)} - {"num_blocks"}
    shared = {f.name: getattr(options, f.name) for f in dataclasses.fields(EngineOptions) if f.name in own}
    return EngineConfig.vllm(time_model=model, num_blocks=num_blocks, **{name: v for name, v in shared.items() if v is not None})


def backend_settings(options: EngineOptions) -> dict[str, Any]:
    """What the backend ``vllm`` must be told beside the engine's configuration."""
    own = {f.name for f in dataclasses.fields(EngineConfig)}
    return {f.name: getattr(options, f.name) for f in dataclasses.fields(EngineOptions) if f.name not in own}
