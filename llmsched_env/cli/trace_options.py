"""How a trace is read: the options of every command that takes one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from llmsched_env.workload import Scenario, scenario_from_trace
from llmsched_env.workload.readers import REORDER_SECONDS, InvalidRows, TimeUnit


@dataclass(frozen=True, kw_only=True)
class TraceOptions:
    """Options of ``read_trace``."""

    time_unit: Annotated[TimeUnit | None, tyro.conf.arg(metavar="{s,ms,us,ns}", help_behavior_hint="(default: its format's)")] = None
    """Unit of the trace's times."""
    invalid_rows: InvalidRows = "error"
    """Rows that cannot be right, such as 0 tokens: refuse the trace (error) or leave them out and count them (drop)."""
    reorder_seconds: Annotated[float, tyro.conf.arg(metavar="SECONDS")] = REORDER_SECONDS
    """Put rows in order that come up to this late, inf for all; later ones are refused."""

    def read(self, trace: Path, rate: float | None) -> Scenario:
        """The trace as a scenario. Raises as ``scenario_from_trace``."""
        return scenario_from_trace(
            trace, rate=rate, time_unit=self.time_unit, invalid_rows=self.invalid_rows, reorder_seconds=self.reorder_seconds
        )
