"""What Minari's ``DataCollector`` keeps of each step: the action masks and the clock with the rest.

``env = minari.DataCollector(env, step_data_callback=MaskedStepData, record_infos=True)``. Minari stores only infos that have the same
form at every step; ``info["summary"]``, empty until the end, has not, and is left out.
"""

from __future__ import annotations

from typing import Any

from llmsched_env.errors import require

StepDataCallback: Any = require("minari", "minari").StepDataCallback

KEPT = ("action_mask", "clock", "seconds", "discount")


class MaskedStepData(StepDataCallback):  # type: ignore[misc, unused-ignore]  # without Minari the base is Any
    """``info`` of a step: ``action_mask`` (bool array), ``clock`` and ``seconds`` (s), ``discount``.

    An episode of T steps has T + 1 of each, like observations: the mask at index t is that of the action at index t.

    Raises:
        MissingExtraError: on import of this module, without Minari.
    """

    def __call__(self, env: Any, info: dict[str, Any], **step: Any) -> Any:
        return super().__call__(env=env, info={name: info[name] for name in KEPT if name in info}, **step)
