"""The two limits that ``vllm serve`` chooses by the device, where its command line names none."""

from __future__ import annotations

from dataclasses import dataclass

from llmsched_env.engine_config import EngineConfig

LARGEST = ("b200", "b300", "mi300", "mi325", "mi350", "mi355")
"""Devices with 160 GB of memory or more, as their names have it."""
LARGE = ("h100", "h200", "h800", "h20", "a800-sxm4-80", "a800 80", "mi250", "rtx pro 6000")
"""Devices with 70 GiB or more that are no A100."""
PROCESSORS = ("cpu", "xeon", "epyc", "core(tm)", "ryzen", "neoverse", "graviton")


@dataclass(frozen=True, slots=True)
class ServeLimits:
    """What an API server runs with unless told otherwise.

    Attributes:
        max_num_batched_tokens: token budget of an iteration.
        max_num_seqs: most residents at once.
        why: the rule that gave them, in words.
    """

    max_num_batched_tokens: int
    max_num_seqs: int
    why: str


def serve_limits(device: str) -> ServeLimits:
    """The limits on a device of this name, one device and no data-parallel experts.

    vLLM asks the device for its memory, which a calibration does not state, so the name must do: one that is not listed here counts
    as smaller. Source: ``vllm/engine/arg_utils.py`` ``get_batch_defaults``, usage context of the API server (0.28.0 to 0.33.0).

    Args:
        device: as ``Provenance.gpu`` names it.
    """
    name = device.lower()
    if any(word in name for word in PROCESSORS):
        return ServeLimits(2_048, 128, "vLLM's for a CPU")
    if any(word in name for word in LARGEST):
        return ServeLimits(16_384, 1_024, "vLLM's for 160 GB of memory or more")
    if any(word in name for word in LARGE):
        return ServeLimits(8_192, 1_024, "vLLM's for 70 GiB of memory or more, but for an A100")
    return ServeLimits(2_048, 256, "vLLM's for an A100 and for less than 70 GiB of memory")


def served(engine: EngineConfig, device: str) -> EngineConfig:
    """The engine with those limits, as far as they make sense with its ``max_model_len``, as vLLM cuts them.

    Raises:
        ConfigError: the engine refuses them.
    """
    limits = serve_limits(device)
    tokens = min(limits.max_num_batched_tokens, limits.max_num_seqs * engine.max_model_len)
    if not engine.enable_chunked_prefill:
        tokens = max(tokens, engine.max_model_len)
    return engine.replace(max_num_batched_tokens=tokens, max_num_seqs=min(limits.max_num_seqs, tokens))
