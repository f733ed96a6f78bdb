"""A vLLM server's own counters before and after a benchmark, from the text of its ``/metrics``.

Names as in vLLM 0.28.0 to 0.32.0, ``v1/metrics/loggers.py``. Several engines behind one server are added up.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmsched_env import checks
from llmsched_env.errors import ConfigError
from llmsched_hardware.calibration.bench_results import BenchResult

_SAMPLE = re.compile(r"^([A-Za-z_:][A-Za-z0-9_:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+\S+)?$")
_LABEL = re.compile(r'([A-Za-z_][A-Za-z0-9_]*)="((?:[^"\\]|\\.)*)"')
ITERATIONS = "vllm:iteration_tokens_total_count"
PROMPT, OUTPUT = "vllm:prompt_tokens_total", "vllm:generation_tokens_total"
PREEMPTIONS = "vllm:num_preemptions_total"
HITS = "vllm:prefix_cache_hits_total"
CACHE = "vllm:cache_config_info"
OTHER_TOKENS = 0.02
"""Share of tokens that may be somebody else's (a benchmark's own trial request)."""


@dataclass(frozen=True, slots=True)
class ServerCounters:
    """What the server counted during the benchmark; None where it does not say.

    Attributes:
        iterations, preemptions, prompt_tokens, output_tokens: between the two texts.
        cached_tokens: prompt tokens that were found in the prefix cache.
        num_blocks: usable KV blocks: vLLM's ``num_gpu_blocks`` counts one null block more.
        block_size: tokens of a block.
    """

    iterations: int | None
    preemptions: int | None
    prompt_tokens: int | None
    output_tokens: int | None
    cached_tokens: int | None
    num_blocks: int | None
    block_size: int | None


def read_counters(before: Path, after: Path) -> ServerCounters:
    """The difference of two texts of one server.

    Raises:
        ConfigError: unreadable, not the metrics of a vLLM server, or counters that went back (the server was started again).
    """
    old, _ = _samples("--metrics-before", before)
    new, cache = _samples("--metrics-after", after)
    found: dict[str, int | None] = {}
    for name in (ITERATIONS, PREEMPTIONS, PROMPT, OUTPUT, HITS):
        if name not in new:
            found[name] = None
            continue
        difference = new[name] - old.get(name, 0.0)
        if difference < 0:
            raise ConfigError(
                f"--metrics-after: {name} is {new[name]:g} after {old[name]:g}, must not be less: another start of the server"
            )
        found[name] = round(difference)
    blocks = _count(cache, "num_gpu_blocks")
    return ServerCounters(
        found[ITERATIONS],
        found[PREEMPTIONS],
        found[PROMPT],
        found[OUTPUT],
        found[HITS],
        None if blocks is None or blocks < 2 else blocks - 1,
        _count(cache, "block_size"),
    )


def _count(cache: dict[str, str], name: str) -> int | None:
    text = cache.get(name, "")
    return int(text) if text.isdecimal() and int(text) > 0 else None


def _samples(option: str, path: Path) -> tuple[dict[str, float], dict[str, str]]:
    """Sums over engines by name, and the labels of the cache's settings."""
    data = checks.file_bytes(f"{option} {path}", path)
    found: dict[str, float] = {}
    cache: dict[str, str] = {}
    for line in data.decode("utf-8", "replace").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        sample = _SAMPLE.match(line)
        if sample is None:
            raise ConfigError(f"{option}: {path.name}: {checks.shown(line)}, must be lines of NAME{{LABELS}} VALUE, as /metrics gives them")
        name, labels, value = sample.groups()
        try:
            number = float(value)
        except ValueError as error:
            raise ConfigError(f"{option}: {path.name}: {name} is {checks.shown(value)}, must be a number") from error
        if name.startswith("vllm:"):
            if not np.isfinite(number) and name in (ITERATIONS, PREEMPTIONS, PROMPT, OUTPUT, HITS):
                raise ConfigError(f"{option}: {path.name}: {name} is {number}, must be finite")
            found[name] = found.get(name, 0.0) + number
            if name == CACHE:
                cache = dict(_LABEL.findall(labels or ""))
    if not found:
        raise ConfigError(f"{option}: {path.name} holds no metric of vLLM, must be the text of a vLLM server's /metrics")
    return found, cache


def check_counters(counters: ServerCounters, results: Sequence[BenchResult]) -> list[str]:
    """What the counters say against the files, in words.

    Raises:
        ConfigError: they count far more or fewer tokens: of another run, or of other clients as well.
    """
    notes = []
    for name, counted, ours in (
        ("prompt", counters.prompt_tokens, sum(int(r.prompt_tokens.sum()) for r in results)),
        ("output", counters.output_tokens, sum(int(r.output_tokens.sum()) for r in results)),
    ):
        if counted is not None and abs(counted - ours) > OTHER_TOKENS * ours + 1000:
            raise ConfigError(
                f"--metrics-after: the server counted {counted:,} {name} tokens more than in --metrics-before, the result files hold "
                f"{ours:,}; the two must be taken right before and after the benchmarks, with no other client"
            )
    if counters.cached_tokens:
        prompts = sum(int(r.prompt_tokens.sum()) for r in results)
        notes.append(
            f"{counters.cached_tokens:,} of {prompts:,} prompt tokens came from the prefix cache, which the replay does not know: "
            "start the server with --no-enable-prefix-caching, or use prompts that share nothing"
        )
    return notes
