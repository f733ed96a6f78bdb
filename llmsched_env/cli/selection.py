"""What the commands of the suite share: which of its cells, with how many requests, in how many processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from llmsched_env.bench.boundary import SHIPPED, Boundaries
from llmsched_env.bench.suite import LOADS, MEMORY, MOVING, SCENARIOS, Bench, Cell, cells
from llmsched_env.bench.variants import needed_boundaries
from llmsched_env.cli.frame import Resumable, Screen
from llmsched_env.errors import ConfigError
from llmsched_env.files import check_file

PARTS = ("stationary", *MOVING)
FEWEST_REQUESTS = 20
"""Of one run: the warm-up takes a fifth of them."""
NAMES = tyro.conf.arg(metavar="NAME [NAME ...]", help_behavior_hint="(default: all)")


@dataclass(frozen=True, kw_only=True)
class Selection(Resumable):
    """Options that choose cells and processes."""

    scenarios: Annotated[tuple[str, ...], NAMES] = SCENARIOS
    """Scenarios of the suite: two-type, lmsys, azure-conv, azure-code, sharegpt, mooncake."""
    loads: Annotated[tuple[float, ...], tyro.conf.arg(metavar="X [X ...]")] = LOADS
    """Loads of the stationary part: shares of greedy FIFO's boundary."""
    kv: Annotated[tuple[str, ...], tyro.conf.arg(metavar="SIZE [SIZE ...]", help_behavior_hint="(default: 80GB 40GB)")] = MEMORY
    """Engines: 80GB and 40GB (Llama-2-7B on an A100), llama3-80GB, llama3-40GB, rtx4090."""
    parts: Annotated[tuple[str, ...], NAMES] = PARTS
    """Parts of the suite: stationary, bursts, daily, shift."""
    num_requests: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: the suite's)")] = None
    """Requests of one run."""
    jobs: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: all cores)")] = None
    """Processes."""
    measure_boundaries: bool = False
    """Measure greedy FIFO's boundaries anew, and keep them beside the suite."""

    def cells(self) -> list[Cell]:
        """Raises ``ConfigError`` for names that the suite does not have, and where no cell has them all."""
        chosen = cells(self.parts, self.scenarios, self.kv, self.loads)
        if not chosen:
            raise ConfigError("--parts, --scenarios, --kv, --loads: no cell of the suite has them all")
        return chosen

    def bench(self, chosen: list[Cell], screen: Screen, num_requests: int | None = None) -> Bench:
        """Where cells run; boundaries that are missing are measured, so everything else must have been checked.

        Args:
            num_requests: of one run where the option is not given; None for the suite's.

        Raises:
            ConfigError: too few requests, or boundaries that cannot be written.
        """
        if self.num_requests is not None and self.num_requests < FEWEST_REQUESTS:
            raise ConfigError(f"--num-requests: {self.num_requests}, must be >= {FEWEST_REQUESTS}")
        if self.measure_boundaries:
            check_file("--measure-boundaries", SHIPPED)
        needed = needed_boundaries(chosen)
        boundaries = Boundaries.read().completed(needed, again=self.measure_boundaries, report=screen.say)
        return Bench(boundaries, self.num_requests or num_requests)
