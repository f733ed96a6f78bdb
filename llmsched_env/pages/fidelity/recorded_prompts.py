"""Which prompts of the recorded workload begin alike, and so share blocks in vLLM's prefix cache.

A recorded file has lengths and times, not the prompts. ``recorded_prompts.csv`` is a table that ``write_prompts`` makes from the
runs' public workload file; both recorded runs served the same one.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llmsched_env.engine.prefix_cache import SharedPrompts
from llmsched_env.errors import ConfigError
from llmsched_env.files import replacing

PROMPTS = Path(__file__).with_name("recorded_prompts.csv")
PROMPTS_SOURCE = "workloads/sharegpt-llama-3.1-8b-300-sps10.jsonl of casys-kaist/LLMServingSim @ 5daddb2"


def common_heads(prompts: Sequence[Sequence[int]], least: int) -> list[tuple[int, int, int]]:
    """(request, earlier request, tokens): the first with the longest common head, where it has ``least`` tokens or more."""
    found = []
    for i, prompt in enumerate(prompts):
        donor, longest = -1, least - 1
        for j in range(i):
            other = prompts[j]
            if prompt[:least] != other[:least]:
                continue
            n = next((k for k, (a, b) in enumerate(zip(prompt, other, strict=False)) if a != b), min(len(prompt), len(other)))
            if n > longest:
                donor, longest = j, n
        if donor >= 0:
            found.append((i, donor, longest))
    return found


def prompts_table(workload: Path, sha256: str, block_size: int) -> str:
    """The text of ``recorded_prompts.csv``.

    Raises:
        ConfigError: not the workload file of the recorded run.
    """
    data = workload.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != sha256:
        raise ConfigError(f"{workload.name}: sha256 {digest}, the recorded run's workload has {sha256}")
    prompts = [json.loads(line)["input_tok_ids"] for line in data.decode("utf-8").splitlines()]
    rows = [f"{i},{donor},{tokens}" for i, donor, tokens in common_heads(prompts, block_size)]
    return "\n".join(["request,shares_with,tokens", *rows, ""])


def write_prompts(workload: Path, sha256: str, block_size: int) -> Path:
    """Make ``recorded_prompts.csv`` again; where it stands.

    Raises:
        ConfigError: not the recorded run's workload file.
    """
    text = prompts_table(workload, sha256, block_size)
    with replacing(PROMPTS) as file:
        file.write(text)
    return PROMPTS


def read_prompts(n: int) -> SharedPrompts:
    """The shipped table for a workload of n requests."""
    donor, tokens = np.full(n, -1), np.zeros(n, dtype=np.int64)
    with PROMPTS.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            donor[int(row["request"])] = int(row["shares_with"])
            tokens[int(row["request"])] = int(row["tokens"])
    return SharedPrompts.of(donor, tokens)
