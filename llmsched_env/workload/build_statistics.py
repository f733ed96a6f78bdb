"""The joint quantile table of a trace: how the JSON files of ``llmsched_env/workload/statistics`` are made.

Rows with prompt + output above a number of tokens are left out; the share left out is written into the file. The same trace gives the
same bytes.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import numpy as np

from llmsched_env.errors import ConfigError
from llmsched_env.types import FloatArray, IntArray
from llmsched_env.workload.readers import Trace

PROMPT_LEVELS = np.linspace(0.0, 1.0, 101)
BINS = 20
# Dense at both ends: answers have long tails, and prompts that ask for code have very short answers.
OUTPUT_LEVELS = np.array(
    [0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.925, 0.95, 0.965, 0.98, 0.99, 0.995, 1]
)

MAX_TOTAL = 4096
"""Tokens: the context of Llama-2-7B."""


class Source(NamedTuple):
    """Where a trace comes from, on what terms, and the most tokens (prompt + output) of a request that its table keeps."""

    source: str
    licence: str
    max_total: int = MAX_TOTAL


AZURE = "github.com/Azure/AzurePublicDataset @ b469a113cedca53ddc3bdea71a143dc4b7d8700c, data/AzureLLMInferenceTrace_{}.csv"
AZURE_LICENCE = "CC-BY 4.0, Microsoft Azure; cite Patel et al., Splitwise, ISCA 2024"
SOURCES = {
    "azure-conv": Source(AZURE.format("conv"), AZURE_LICENCE),
    "azure-code": Source(AZURE.format("code"), AZURE_LICENCE),
    "sharegpt": Source(
        "ShareGPT conversations, lengths by the Llama-2 tokenizer: github.com/AKafakA/vidur_opt_scheduler "
        "@ 20bdc49d6c1d23de84c9d4e7a8626ea33fe498f4, data/trace_data/sharegpt/sharegpt_val_10k_llama2.csv",
        "MIT (repository)",
    ),
    "mooncake": Source(
        "github.com/kvcache-ai/Mooncake @ 3b5a594133958449a1feaf1c9e0fc1b553e34a28, FAST25-release/traces/conversation_trace.jsonl",
        "Apache-2.0; cite Qin et al., Mooncake, FAST 2025",
        32_768,
    ),
}


def joint_table(prompt: IntArray, output: IntArray) -> dict[str, list[Any]]:
    """Prompt quantiles, and output quantiles in bins of equal count along the prompt.

    Hazen's quantiles (level (i - 1/2) / n at the i-th smallest value) keep the mean under linear
    interpolation. Rows of equal prompt stay in file order, so that a tie across two bins splits at random.
    """
    order = np.argsort(prompt, kind="stable")
    bins = np.array_split(output[order], BINS)

    def tokens(values: FloatArray) -> list[float]:
        return [round(float(v), 2) for v in values]

    return {
        "prompt_levels": [round(float(v), 4) for v in PROMPT_LEVELS],
        "prompt_quantiles": tokens(np.quantile(prompt, PROMPT_LEVELS, method="hazen")),
        "bin_edges": [round(i / BINS, 4) for i in range(BINS + 1)],
        "output_levels": [round(float(v), 4) for v in OUTPUT_LEVELS],
        "output_quantiles": [tokens(np.quantile(b, OUTPUT_LEVELS, method="hazen")) for b in bins],
    }


def arrival_statistics(times: FloatArray) -> dict[str, float]:
    """Mean rate (requests/s) and coefficient of variation of the gaps."""
    gaps = np.diff(times)
    return {"rate": round(float(1 / gaps.mean()), 4), "gap_cv": round(float(gaps.std() / gaps.mean()), 3)}


def build(trace: Trace, name: str, source: Source, max_total: int) -> dict[str, Any]:
    """The JSON record.

    Raises:
        ConfigError: fewer than 20 rows a bin are left.
    """
    keep = trace.prompt_tokens.astype(np.int64) + trace.output_tokens <= max_total
    kept = int(keep.sum())
    if kept < 20 * BINS:
        raise ConfigError(f"{trace.path}: {kept} requests of at most {max_total} tokens, must be at least {20 * BINS}")
    prompt, output = trace.prompt_tokens[keep], trace.output_tokens[keep]
    record: dict[str, Any] = {
        "name": name,
        "form": "joint",
        "provenance": {
            "source": source.source,
            "licence": source.licence,
            "script": "scripts/build_statistics.py",
            "rule": f"prompt + output <= {max_total}",
            "rows": len(trace),
            "rows_kept": kept,
            "share_left_out": round(1 - kept / len(trace), 4),
            "rows_without_tokens": trace.dropped,
            "mean_prompt": round(float(prompt.mean()), 2),
            "mean_output": round(float(output.mean()), 2),
        },
    }
    if trace.arrival is not None:
        record["arrivals"] = {"all": arrival_statistics(trace.arrival), "kept": arrival_statistics(trace.arrival[keep])}
    record["table"] = joint_table(prompt, output) | {"max_total": max_total}
    return record


def dump(record: dict[str, Any], depth: int = 0) -> str:
    """JSON with one line an array of numbers, ending in a newline at the top."""
    pad = "  " * (depth + 1)
    parts = []
    for key, value in record.items():
        if isinstance(value, dict):
            text = dump(value, depth + 1)
        elif isinstance(value, list) and value and isinstance(value[0], list):
            inner = ",\n".join(f"{pad}  {json.dumps(row)}" for row in value)
            text = f"[\n{inner}\n{pad}]"
        else:
            text = json.dumps(value)
        parts.append(f"{pad}{json.dumps(key)}: {text}")
    body = ",\n".join(parts)
    return f"{{\n{body}\n{'  ' * depth}}}" + ("\n" if depth == 0 else "")
