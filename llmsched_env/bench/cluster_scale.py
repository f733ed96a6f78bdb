"""How fast a fleet is simulated, and in how much memory: one core, each measurement in a process of its own.

The fleet is of equal A100s of 80 GB with Llama-2-7B (scenario ``azure-conv``) at a share of greedy FIFO's boundary
(``llmsched_env.bench.boundary``), its router draws two replicas and takes the less busy one (``power-of-two``). Calls are drawn in chunks
as they are needed; those that have ended are folded into quantile sketches, and written to Parquet files where a folder is given.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from llmsched_baselines.routers import Door
from llmsched_env import checks
from llmsched_env.bench.boundary import Boundaries
from llmsched_env.bench.cluster_routers import build_router, router_named
from llmsched_env.bench.seeds import seed_of
from llmsched_env.cluster.metrics import Terms
from llmsched_env.cluster.parquet import ParquetSink
from llmsched_env.cluster.routing import run_cluster
from llmsched_env.cluster.simulator import ClusterSim
from llmsched_env.cluster.sinks import Several, Sink
from llmsched_env.cluster.sketches import SketchSink
from llmsched_env.cluster.spec import ClusterSpec, ReplicaSpec
from llmsched_env.errors import ConfigError
from llmsched_env.files import replacing
from llmsched_env.workload import load_scenario
from llmsched_env.workload.single_calls import SingleCalls

SCENARIO, MEMORY = "azure-conv", "80GB"
LOAD = 0.8
ROUTER = "power-of-two"
SIZES = (1, 10, 100, 1_000)
"""Replicas."""
EVENTS = 20_000_000
"""Iterations and hand-overs of a measurement, about."""
EVENTS_PER_CALL = 8
"""At this load, about; it only decides how many calls a measurement has."""
TTFT_LIMIT, TPOT_LIMIT = 1.0, 0.1


@dataclass(frozen=True, slots=True)
class ScaleRow:
    """One measurement.

    Attributes:
        replicas, router, load: of the fleet; load is a share of the boundary.
        calls: that completed.
        simulated_seconds: to the last completion.
        wall_seconds: of the run, generation of the calls and sinks included, compilation left out.
        iterations: of all engines.
        events: iterations and hand-overs.
        peak_mb: resident memory of the process at its highest, MiB.
        parquet_mb: of the files written, MiB; 0 where none were.
        latency_mean, latency_p99, ttft_p99: seconds; the quantiles from sketches.
        slo_goodput: share of the calls within ``TTFT_LIMIT`` and ``TPOT_LIMIT``.
    """

    replicas: int
    router: str
    load: float
    calls: int
    simulated_seconds: float
    wall_seconds: float
    iterations: int
    events: int
    peak_mb: float
    parquet_mb: float
    latency_mean: float
    latency_p99: float
    ttft_p99: float
    slo_goodput: float

    @property
    def events_per_second(self) -> float:
        """Events per second of wall time."""
        return self.events / self.wall_seconds


def fleet_rate(replicas: int, load: float = LOAD, boundaries: Boundaries | None = None) -> float:
    """Calls per second of a fleet of so many replicas."""
    known = Boundaries.read() if boundaries is None else boundaries
    return load * replicas * known.rate(SCENARIO, MEMORY)


def fleet(replicas: int, load: float = LOAD) -> tuple[ClusterSpec, SingleCalls, Door]:
    """A fleet of so many replicas, its calls, and what its router knows.

    Raises:
        ConfigError: a number of replicas that no cluster has.
    """
    scenario = load_scenario(SCENARIO)
    source = SingleCalls(scenario)
    spec = ClusterSpec.equal(replicas, ReplicaSpec(scenario.engine), ttft_limit=TTFT_LIMIT, tpot_limit=TPOT_LIMIT)
    return spec, source, Door.of(spec, source, fleet_rate(replicas, load))


def measure(replicas: int, calls: int, *, load: float = LOAD, router: str = ROUTER, folder: Path | None = None) -> ScaleRow:
    """Stream so many calls through a fleet, in this process.

    Args:
        folder: for Parquet files; it must not exist.

    Raises:
        ConfigError: a number or a router that is refused, or a folder that is there.
        PolicyError: the router's rule raises, or chooses a replica that the call cannot go to.
    """
    checks.integer("replicas", replicas, low=1)
    checks.integer("calls", calls, low=1)
    spec, source, door = fleet(replicas, load)
    rate, chosen = door.rate, build_router(router, door, {})
    sim = ClusterSim(spec)
    with router_named(router):
        run_cluster(sim, chosen.rule, source.chunks(1, rate=rate, num_calls=20))  # compiles what the measurement runs
    seed = int(seed_of("evaluation", replicas).generate_state(1)[0])
    sketches = SketchSink(Terms(replicas, 0.0, TTFT_LIMIT, TPOT_LIMIT))
    files: list[Sink] = []
    if folder is not None:
        settings = {"replicas": str(replicas), "rate": f"{rate:g}", "router": router, "scenario": SCENARIO}
        files = [ParquetSink(folder, seed=seed, settings=settings)]
    start = time.perf_counter()
    with Several(sketches, *files) as sink, router_named(router):
        run_cluster(sim, chosen.rule, source.chunks(seed, rate=rate, num_calls=calls), sink=sink, seed=seed)
    wall = time.perf_counter() - start
    found = sketches.summary()
    written = 0 if folder is None else sum(file.stat().st_size for file in folder.glob("*.parquet"))
    return ScaleRow(
        replicas=replicas,
        router=router,
        load=load,
        calls=found.completed,
        simulated_seconds=float(sim.record.last_end),
        wall_seconds=wall,
        iterations=sum(int(machine.record.iterations) for machine in sim.machines),
        events=int(sim.record.events),
        peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024.0 if sys.platform != "darwin" else 1024.0**2),
        parquet_mb=written / 2**20,
        latency_mean=found.latency_mean,
        latency_p99=found.latency_p99,
        ttft_p99=found.ttft_p99,
        slo_goodput=found.slo_goodput,
    )


def measure_apart(replicas: int, calls: int, *, load: float = LOAD, router: str = ROUTER, folder: Path | None = None) -> ScaleRow:
    """``measure`` in a new process, so that its memory is nobody else's."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_measure, replicas, calls, load, router, folder).result()


def _measure(replicas: int, calls: int, load: float, router: str, folder: Path | None) -> ScaleRow:
    return measure(replicas, calls, load=load, router=router, folder=folder)


def usual_calls() -> int:
    """Calls of a measurement of about ``EVENTS`` events."""
    return EVENTS // EVENTS_PER_CALL


def write_scale(path: Path, rows: Sequence[ScaleRow]) -> None:
    """Measurements as JSON, in one step."""
    with replacing(path) as file:
        json.dump({"rows": [dataclasses.asdict(row) for row in rows]}, file, indent=1)
        file.write("\n")


def read_scale(path: Path, option: str = "scale") -> list[ScaleRow]:
    """Measurements of a file.

    Args:
        option: that names the file, for the error.

    Raises:
        ConfigError: a file that cannot be read or holds something else.
    """
    try:
        return [_checked(ScaleRow(**row)) for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{option}: {path} is no file of measurements ({type(error).__name__}: {error})") from error


def _checked(row: ScaleRow) -> ScaleRow:
    """Refuse a field that is no number where one belongs."""
    for field in dataclasses.fields(row):
        value = getattr(row, field.name)
        if field.name == "router":
            checks.text(field.name, value, empty=False)
        elif field.type == "int":
            checks.integer(field.name, value, high=2**62)
        else:
            checks.number(field.name, value)
    return row
