"""The number of a whole decision: the token budget, in Python and in compiled code."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from llmsched_env.compiled import compiled
from llmsched_env.engine.step import decision_at
from llmsched_env.errors import ConfigError
from llmsched_env.types import Decision

COPIES = [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]


@compiled
def _double_budget(decision: Any) -> int:
    decided = decision_at(decision)
    before = decided.token_budget
    decided.token_budget = 2 * before
    decided.run[0] = 7
    return before


def test_a_table_has_numbers_of_its_own() -> None:
    decision = Decision.of([1, 0], [3, 4], [0, 1], token_budget=300)
    assert _double_budget(decision.handle) == 300
    assert decision.token_budget == 600
    assert (decision.run.tolist(), decision.admit.tolist(), decision.evict.tolist()) == ([7, 0], [3, 4], [0, 1])
    decision.token_budget = 2**40
    assert decision.token_budget == 2**31 - 1
    decision.token_budget = 2**31 - 1
    assert _double_budget(decision.handle) == 2**31 - 1 and decision.token_budget == 2**31 - 1


@pytest.mark.parametrize("copied", COPIES)
def test_copies_keep_the_numbers_of_a_table_apart(copied: Callable[[Any], Any]) -> None:
    decision = Decision.of([1], [2], token_budget=256)
    other = copied(decision)
    other.token_budget = 512
    assert (decision.token_budget, other.token_budget) == (256, 512) and other.run.tolist() == [1]


@pytest.mark.parametrize("budget", [-1, 1.5, "many", None, True])
def test_a_budget_that_is_none_is_refused_by_name(budget: Any) -> None:
    with pytest.raises(ConfigError, match=r"decision\.token_budget"):
        Decision.of([1], [1], token_budget=budget)
