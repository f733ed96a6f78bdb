"""Greedy FIFO's boundary: the load that a server which admits whatever fits can carry, measured.

Rule: all requests are there from the start, greedy first-come-first-served works them off, and the boundary
is the rate of completions between the 20th and the 80th percentile of completions. This is the drift
condition of a queue: a backlog shrinks if requests arrive slower than a saturated server completes them, and
grows if they arrive faster. It includes what preemptions cost, which fluid boundaries leave out, and does not
depend on the arrival process. The mean over several seeds is kept, with its provenance, in a file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from llmsched_baselines import Setting, make_policy
from llmsched_env import __version__
from llmsched_env.bench.seeds import seed_of
from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import ConfigError
from llmsched_env.files import replacing
from llmsched_env.runner import run_episode
from llmsched_env.types import Workload
from llmsched_env.workload import Scenario

REQUESTS = 4_000
SEEDS = 4
WINDOW = (0.2, 0.8)
SHIPPED = Path(__file__).resolve().parent / "suites" / "boundaries.json"


@dataclass(frozen=True, slots=True)
class Boundary:
    """One measurement: ``rates`` in requests/s, one a seed, and their mean."""

    scenario: str
    kv: str
    kv_units: int
    calibration: str
    rate: float
    rates: tuple[float, ...]
    requests: int
    version: str


@dataclass(frozen=True, slots=True)
class Boundaries:
    """Measured boundaries by scenario and memory."""

    entries: tuple[Boundary, ...] = ()

    def rate(self, scenario: str, kv: str) -> float:
        """Requests/s. Raises ``ConfigError`` where it has not been measured."""
        for entry in self.entries:
            if (entry.scenario, entry.kv) == (scenario, kv):
                return entry.rate
        raise ConfigError(f"boundary: {scenario} with {kv} has not been measured")

    @classmethod
    def read(cls, path: Path = SHIPPED) -> Boundaries:
        """What a file holds; nothing where there is none.

        Raises:
            ConfigError: not a file of boundaries.
        """
        if not path.exists():
            return cls()
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            found = [Boundary(**{**entry, "rates": tuple(entry["rates"])}) for entry in record["boundaries"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}: not a file of boundaries ({type(error).__name__}: {error})") from error
        return cls(tuple(found))

    def completed(
        self,
        needed: Mapping[tuple[str, str], tuple[Scenario, EngineConfig]],
        path: Path = SHIPPED,
        *,
        again: bool = False,
        report: Callable[[str], None] = print,
    ) -> Boundaries:
        """With every needed one measured, on the engine it is needed for; what is new is written to ``path``.

        Args:
            needed: scenario and engine by (scenario, kv).
            again: measure those too that are known.
        """
        entries = {(entry.scenario, entry.kv): entry for entry in self.entries}
        for key, (scenario, engine) in needed.items():
            known = entries.get(key)
            if again or known is None or (known.calibration, known.kv_units) != (engine.time_model.provenance.name, engine.kv_capacity):
                entries[key] = measure(scenario, engine, key[1])
                report(f"greedy FIFO's boundary on {key[0]} with {key[1]}: {entries[key].rate:.4g} requests/s")
        ordered = tuple(entries[key] for key in sorted(entries))
        if ordered != self.entries:
            rule = "completions per second of greedy FIFO with all requests present, between the 20th and 80th percentile of completions"
            record = {"rule": rule, "script": "scripts/boundary.py", "boundaries": [asdict(entry) for entry in ordered]}
            with replacing(path) as file:
                json.dump(record, file, indent=1)
                file.write("\n")
        return Boundaries(ordered)


def measure(scenario: Scenario, engine: EngineConfig, kv: str, *, requests: int = REQUESTS, seeds: int = SEEDS) -> Boundary:
    """The boundary of a scenario's lengths on an engine."""
    policy = make_policy("fcfs", Setting(scenario.statistics, scenario.rate, engine))
    rates = []
    for seed in range(seeds):
        drawn = scenario.generate(seed_of("boundary", seed), num_requests=requests)
        present = Workload(np.zeros(requests), drawn.prompt_tokens, drawn.output_tokens, drawn.type_id)
        completed = np.sort(run_episode(policy, present).log.completed)
        first, last = (int(share * (requests - 1)) for share in WINDOW)
        rates.append(float((last - first) / (completed[last] - completed[first])))
    return Boundary(
        scenario=scenario.name,
        kv=kv,
        kv_units=engine.kv_capacity,
        calibration=engine.time_model.provenance.name,
        rate=round(float(np.mean(rates)), 6),
        rates=tuple(round(rate, 6) for rate in rates),
        requests=requests,
        version=__version__,
    )
