"""What is no chunk of calls is refused by field and row, before a cluster sees it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from llmsched_env.cluster.calls import CallChunk
from llmsched_env.errors import ConfigError


def chunk() -> CallChunk:
    return CallChunk.single([0.0, 1.0, 2.0], [10, 20, 30], [1, 2, 3])


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("prompt_tokens", None, r"calls\.prompt_tokens: shape \(\)"),
        ("prompt_tokens", [1, "two", 3], r"calls\.prompt_tokens: row 0 is '1', must be an integer"),
        ("prompt_tokens", [1.0, 1.5, 2.0], r"calls\.prompt_tokens: row 1 is 1\.5, must be an integer"),
        ("output_tokens", [1.0, 2.0, math.nan], r"calls\.output_tokens: row 2 is nan, must be an integer"),
        ("output_tokens", [1, 2**40, 1], r"calls\.output_tokens: row 1 is 1099511627776, must be an integer"),
        ("output_tokens", [1, 2**31, 1], r"calls\.output_tokens: row 1 is 2147483648, must be an integer"),
        ("predicted_tokens", [[0, 0, 0]], r"calls\.predicted_tokens: shape \(1, 3\), must be one-dimensional"),
        ("node", [True, True, True], r"calls\.node: row 0 is True"),
        ("program", [0, 1, {}], r"calls\.program: row 2 is \{\}"),
        ("start", None, r"calls\.start: None, must be numbers"),
        ("start", ["a", "b", "c"], r"calls\.start: .*must be numbers"),
        ("think", 0.0, r"calls\.think: shape \(\), must be one-dimensional"),
        ("lasting", 1, r"calls\.lasting: 1, must be true or false"),
    ],
)
def test_other_kinds_are_refused_when_a_chunk_is_made(field: str, value: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        dataclasses.replace(chunk(), **{field: value})


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("app", [0, -1, 0], r"calls\.app: -1 in row 1, must be >= 0"),
        ("program", [-1, 1, 2], r"calls\.program: -1 in row 0"),
        ("prompt_tokens", [1, 2**31 - 1, 1], r"calls\.prompt_tokens: 2147483647 in row 1, must be >= 1 and <= 1073741824"),
        ("output_tokens", [1, 1, 2**31 - 1], r"calls\.output_tokens: 2147483647 in row 2"),
        ("predicted_tokens", [-1, 0, 0], r"calls\.predicted_tokens: -1 in row 0"),
        ("start", [0.0, 1.0, 1e13], r"calls\.start: 10000000000000\.0 in row 2, must be finite, >= 0 and in order, at most 1e\+12 s"),
        ("start", [0.0, math.nan, 2.0], r"calls\.start: nan in row 1"),
        ("think", [0.0, math.inf, 0.0], r"calls\.think: inf in row 1"),
        ("node_shared", [0, 23, 0], r"calls\.node_shared: 23 in row 1, must be <= 22, the most of its calls"),
    ],
)
def test_values_out_of_range_are_refused_before_a_cluster_takes_them(field: str, value: Any, named: str) -> None:
    made = dataclasses.replace(chunk(), **{field: value})
    with pytest.raises(ConfigError, match=named):
        made.check()


def test_a_node_shares_what_its_calls_or_those_of_nodes_below_reach() -> None:
    """Row 1 shares 25 tokens with row 0; its own call has 22, but the node below it begins like it for 28 of them."""
    parents = {"node_parent": [-1, 0, 1], "program": [0, 0, 0], "node_program": [0, 0, 0], "start": [0.0], "app": [0]}
    below = dataclasses.replace(chunk(), node_shared=[0, 25, 28], **parents)  # type: ignore[arg-type]
    below.check()
    with pytest.raises(ConfigError, match=r"calls\.node_shared: 29 in row 1, must be <= 28"):
        dataclasses.replace(below, node_shared=[0, 29, 28]).check()  # type: ignore[arg-type]


def test_single_calls_take_lists_and_numbers_and_no_others() -> None:
    made = CallChunk.single(0.0, 5, 2)
    assert (len(made), made.prompt_tokens.tolist(), made.prompt_tokens.dtype) == (1, [5], np.int32)
    assert CallChunk.single([0, 1], np.array([3.0, 4.0]), [1, 1], [0, 9]).predicted_tokens.tolist() == [0, 9]
    for prompt, named in ((math.nan, "nan"), (2**40, "1099511627776"), (1.5, r"1\.5"), ("5", "'5'"), (None, "None")):
        with pytest.raises(ConfigError, match=rf"calls\.prompt_tokens: row 0 is {named}, must be an integer"):
            CallChunk.single([0.0], [prompt], [1])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match=r"calls\.predicted_tokens: row 0 is 0\.5"):
        CallChunk.single([0.0], [1], [1], [0.5])
