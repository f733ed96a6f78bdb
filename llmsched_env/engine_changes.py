"""An engine with some of its fields changed, as people and files give them: plain values by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmsched_env import checks
from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import ConfigError, did_you_mean
from llmsched_env.perf import LinearTime, load_calibration


def engine_with(base: EngineConfig, changes: Mapping[str, Any] | EngineConfig | None) -> EngineConfig:
    """``base`` with plain-value changes; ``d0``, ``d1`` set a linear time model, ``time_model`` loads a calibration by name.

    Raises:
        ConfigError: unknown field, or a value the engine refuses.
    """
    if changes is None:
        return base
    if isinstance(changes, EngineConfig):
        return changes
    if not isinstance(changes, Mapping):
        raise ConfigError(f"engine: {checks.shown(changes)}, must be an EngineConfig or a mapping of its fields")
    fields = dict(changes)
    if isinstance(fields.get("time_model"), str):
        fields["time_model"] = load_calibration(fields["time_model"])
    if "d0" in fields or "d1" in fields:
        model = fields.get("time_model", base.time_model)
        known = {"d0": model.d0, "d1": model.d1} if isinstance(model, LinearTime) else {}
        known.update({k: checks.number(f"engine.{k}", fields.pop(k)) for k in ("d0", "d1") if k in fields})
        missing = [k for k in ("d0", "d1") if k not in known]
        if missing:
            raise ConfigError(f"engine.{missing[0]}: missing, a linear time model needs d0 and d1")
        fields["time_model"] = LinearTime(known["d0"], known["d1"])
    allowed = EngineConfig.__dataclass_fields__
    for name in fields:
        if name not in allowed:
            hint = did_you_mean(name, (*allowed, "d0", "d1"))
            raise ConfigError(f"engine.{name}: unknown field{hint} (allowed: {', '.join(allowed)}, d0, d1)")
    return base.replace(**fields)
