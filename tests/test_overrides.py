"""``--set KEY=VALUE``: values by the type that they are for, and refusals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin

import pytest

from llmsched_baselines.overrides import parse_overrides, parse_value
from llmsched_env.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "hint", "value"),
    [
        ("3", int, 3),
        ("1.5", float, 1.5),
        ("inf", float, math.inf),
        ("true", bool, True),
        ("0", bool, False),
        ("a", Literal["a", "b"], "a"),
        ("10,5", Sequence[float] | None, (10.0, 5.0)),
        ("10, 5", Sequence[int], (10, 5)),
        ("none", float | None, None),
        ("2", int | float, 2),
        ("2.5", int | float, 2.5),
    ],
)
def test_values_are_parsed_by_type(text: str, hint: Any, value: Any) -> None:
    parsed = parse_value("key", text, hint)
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    ("text", "hint"),
    [("3.5", int), ("x", float), ("nan", float), ("yes", bool), ("c", Literal["a", "b"]), ("1,x", Sequence[int]), ("none", int)],
)
def test_values_of_the_wrong_type_are_refused(text: str, hint: Any) -> None:
    with pytest.raises(ConfigError, match="--set key"):
        parse_value("key", text, hint)


def test_every_option_of_every_policy_can_be_set() -> None:
    from llmsched_baselines import policy_names
    from llmsched_baselines.overrides import engine_keys, policy_keys

    samples = ("1", "1.5", "true", "1,2", "auto", "A")
    for name in policy_names():
        for option, hint in policy_keys(name).items():
            parsed = 0
            names = get_args(hint) if get_origin(hint) is Literal else ()
            for sample in (*samples, *names):
                try:
                    parse_value(option, sample, hint)
                    parsed += 1
                except ConfigError as error:
                    assert "cannot be set" not in str(error), f"{name}.{option}"
            assert parsed, f"{name}.{option}: {hint}"
    assert {"num_blocks", "d0", "d1", "time_model", "capacity_tokens"} <= set(engine_keys())


@pytest.mark.parametrize("pairs", [["engine.num_blocks"], ["engine.num_blocks=1", "engine.num_blocks=2"], ["motor.x=1"], ["engine.=1"]])
def test_malformed_settings_are_refused(pairs: list[str]) -> None:
    with pytest.raises(ConfigError, match="--set"):
        parse_overrides(pairs, {"vllm": "vllm"})
