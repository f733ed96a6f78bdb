"""Settings of environments that decide in every iteration, for tests that check one step after the other."""

from __future__ import annotations

from typing import Any

ADMIT: dict[str, Any] = {"scenario": "azure-conv", "action_set": "admit"}
"""Four queues of one class, counts as actions; one iteration a step, as always with "admit"."""

RESERVE: dict[str, Any] = {"scenario": "azure-conv", "action_set": "reserve", "hold": 1}
"""The same with levels of expected final KV."""
