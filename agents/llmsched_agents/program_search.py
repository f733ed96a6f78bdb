"""An evaluator for program search: a policy as Python source in, a score out.

Searches over programs (FunSearch, AlphaEvolve, OpenEvolve) propose the source of a policy and want a number for it. The source is a
module that defines ``decide``::

    from llmsched_env import Decision

    def decide(view):
        return Decision.of(run=[1], admit=[max(64 - view.num_residents, 0)])

``view`` is an ``llmsched_env.backend.View``: no output length, no future arrival. There is one queue. The score is minus the mean
latency in seconds, averaged over the seeds: higher is better.

Each program runs in a process of its own under limits of time and memory. They stop accidents: an endless loop, a list that grows
without end. They are no defence against harm, for which there are containers, and a program that digs in private attributes finds
what the view hides: read what wins. Linux only.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmsched_env import ConfigError, checks
from llmsched_env.workload import load_scenario

STARTUP_SECONDS = 600.0  # for a process to import and, where nothing has run before, to compile: not the program's time
MODULE = "program_under_test"


@dataclass(frozen=True, slots=True)
class ProgramTask:
    """What a program is tried on: an episode of ``num_requests`` at ``rate`` requests/s for every seed, the same for all programs.

    It may use ``seconds`` of wall time for all episodes together, and ``memory_mb`` MiB of address space beside the simulator's.

    Raises:
        ConfigError: a value out of range, or no such scenario.
    """

    scenario: str = "azure-conv"
    rate: float = 6.0
    num_requests: int = 200
    seeds: tuple[int, ...] = (0, 1, 2)
    seconds: float = 60.0
    memory_mb: int = 1024

    def __post_init__(self) -> None:
        load_scenario(self.scenario)
        checks.number("rate", self.rate, open_low=True)
        checks.integer("num_requests", self.num_requests, low=1)
        if not checks.integers("seeds", self.seeds):
            raise ConfigError("seeds: (), must be at least one")
        checks.number("seconds", self.seconds, open_low=True)
        checks.integer("memory_mb", self.memory_mb, low=16)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a program is worth: ``score`` in seconds, minus infinity where ``error`` says why it has none; ``latencies`` by seed."""

    score: float
    error: str = ""
    latencies: tuple[float, ...] = ()


def evaluate_program(source: str, task: ProgramTask | None = None) -> Evaluation:
    """Run a program in a process of its own. Whatever the program does, an ``Evaluation`` comes back.

    Raises:
        ConfigError: ``source`` is no text that UTF-8 can hold.
        RuntimeError: the process did not start, which is no fault of the program.
    """
    try:
        text = source.encode()
    except (AttributeError, UnicodeEncodeError) as error:
        raise ConfigError(f"source: {checks.shown(source)}, must be a text") from error
    given, pipe = task or ProgramTask(), subprocess.PIPE
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, f"{MODULE}.py").write_bytes(text)
        command = [sys.executable, "-m", "llmsched_agents.program_run", folder]
        # Unbuffered: what follows the first line is left for ``communicate``.
        process = subprocess.Popen(command, bufsize=0, start_new_session=True, stdin=pipe, stdout=pipe, stderr=pipe)
        late = threading.Timer(STARTUP_SECONDS, process.kill)
        late.start()
        try:
            if process.stdout.readline() != b"ready\n":  # type: ignore[union-attr]
                raise RuntimeError(f"the evaluator did not start: {process.communicate()[1].decode(errors='replace')[-2000:]}")
            late.cancel()
            answer, _ = process.communicate(json.dumps(asdict(given)).encode(), timeout=given.seconds)
        except subprocess.TimeoutExpired:
            return Evaluation(-math.inf, f"more than {given.seconds:g} seconds")
        finally:
            late.cancel()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with all that it started
            process.communicate()
    found: dict[str, Any] = json.loads(answer) if answer else {"error": f"the process ended with code {process.returncode}"}
    if found["error"]:
        return Evaluation(-math.inf, found["error"])
    return Evaluation(-math.fsum(found["latencies"]) / len(given.seeds), latencies=tuple(found["latencies"]))


def evaluate(program_path: str) -> dict[str, float]:
    """The score of a file on the default task, as OpenEvolve asks for it; ``valid`` is 0 where it did not run."""
    found = evaluate_program(Path(program_path).read_text(encoding="utf-8"))
    return {"combined_score": found.score, "valid": float(not found.error)}
