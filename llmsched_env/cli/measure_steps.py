"""Steps of a measurement, each a command in a process of its own and within its share of the time; what they leave, in one archive.

A step that fails, runs out of time or is broken off is recorded, and the next one begins. A process of its own gives a GPU's memory
back whatever happens to it. The archive is replaced after every step, so it is whole at any time.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llmsched_env.cli.frame import plain
from llmsched_env.errors import ConfigError, EngineError
from llmsched_env.files import write_settings
from llmsched_env.markdown import write_page

Status = Literal["done", "failed", "out of time", "interrupted", "skipped"]
GRACE_SECONDS = 20.0
"""For a command to come to its own end after its time."""
ARCHIVE_SECONDS = 4.0
"""To write the archive at the end."""
STOP_SECONDS = 8.0
"""From asking it to stop until it is killed."""
SUMMARY_FILE, REPORT_FILE, LOGS, FOUND = "summary.json", "report.md", "logs", "found"
FORMAT = 1


class SkipStep(Exception):
    """A step cannot be done here; the text says why."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step.

    Attributes:
        name: of its files, too: ``found/NAME.json`` is what its command found, ``logs/NAME.txt`` what it printed.
        weight: of its share in the time that is left, beside those of the steps to come.
        least: seconds without which it is not begun.
        command: words of the console command for so many seconds. May raise ``SkipStep``.
        needs: steps that must be done before.
    """

    name: str
    weight: float
    least: float
    command: Callable[[float], Sequence[object]]
    needs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StepRecord:
    """How a step ended.

    Attributes:
        seconds: that it took; budget: that it was given.
        code: exit code of its command; None where there was none, or it had to be killed.
        reason: why it is not done; empty where it is.
        command: as it was called.
    """

    name: str
    status: Status
    seconds: float = 0.0
    budget: float = 0.0
    code: int | None = None
    reason: str = ""
    command: str = ""


class Measurement:
    """Runs steps and keeps the archive.

    Attributes:
        folder: where the steps write.
        records: how each step ended, in order.
        about: what else the summary says, by name.

    Args:
        out: the archive, ``.tar.gz``.
        seconds: for everything.
        report: the lines of the report, from the summary.
        say: shows a line of progress.
    """

    def __init__(
        self, folder: Path, out: Path, seconds: float, report: Callable[[Mapping[str, Any]], list[str]], say: Callable[[str], None]
    ) -> None:
        self.folder, self.out = folder, out
        self.records: list[StepRecord] = []
        self.about: dict[str, Any] = {}
        self._seconds, self._report, self._say = seconds, report, say
        self._reserve = STOP_SECONDS + ARCHIVE_SECONDS
        self._begin = time.monotonic()
        for part in (LOGS, FOUND):
            (folder / part).mkdir(parents=True, exist_ok=True)

    @property
    def left(self) -> float:
        """Seconds, below 0 where the time is over."""
        return self._begin + self._seconds - time.monotonic()

    def run(self, steps: Sequence[Step]) -> None:
        """All steps in order; whatever ends this, the archive has what there is.

        Raises:
            KeyboardInterrupt: by Ctrl-C or SIGTERM.
            OSError: the archive cannot be written.
        """
        with _terminated_as_interrupted():
            for i, step in enumerate(steps):
                weights = sum(other.weight for other in steps[i:])
                left = self.left - self._reserve
                share = min(max(left * step.weight / weights, step.least), left)
                try:
                    record = self._step(step, share, left)
                except KeyboardInterrupt:
                    waiting = [StepRecord(other.name, "skipped", reason="interrupted") for other in steps[i + 1 :]]
                    self.records += [StepRecord(step.name, "interrupted", budget=share), *waiting]
                    self.archive()
                    raise
                self.records.append(record)
                self._say(f"{record.name}: {record.status}{record.reason and ', ' + record.reason}, {record.seconds:.0f} s")
                self.archive()

    def _step(self, step: Step, share: float, left: float) -> StepRecord:
        done = {record.name for record in self.records if record.status == "done"}
        missing = [name for name in step.needs if name not in done]
        if missing:
            return StepRecord(step.name, "skipped", reason=f"needs {missing[0]}")
        if left < step.least:
            return StepRecord(step.name, "skipped", reason=f"{max(left, 0.0):.0f} s left, needs {step.least:.0f}")
        begin = time.monotonic()
        try:
            words = [str(word) for word in step.command(share)]
        except SkipStep as skipped:
            return StepRecord(step.name, "skipped", reason=str(skipped))
        except (ConfigError, EngineError) as error:
            return StepRecord(step.name, "failed", time.monotonic() - begin, share, reason=str(error))
        self._say(f"{step.name}: {share:.0f} s of {left:.0f} s left")
        share, left = share - (time.monotonic() - begin), self.left - self._reserve
        words += ["--json", str(self.folder / FOUND / f"{step.name}.json"), "--quiet"]
        log = self.folder / LOGS / f"{step.name}.txt"
        code = run_command([sys.executable, "-m", "llmsched_env.cli", *words], log, min(share + GRACE_SECONDS, left))
        seconds, command = time.monotonic() - begin, " ".join(["llmsched", *words]).replace(f"{self.folder}/", "")
        if code == 0:
            return StepRecord(step.name, "done", seconds, share, code, command=command)
        if code is None:
            return StepRecord(step.name, "out of time", seconds, share, reason=f"stopped after {seconds:.0f} s", command=command)
        return StepRecord(step.name, "failed", seconds, share, code, _last_line(log), command)

    def found(self, name: str) -> Any:
        """What a step's command has found; None where it has left nothing."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            return json.loads((self.folder / FOUND / f"{name}.json").read_text(encoding="utf-8"))["found"]
        return None

    def summary(self) -> dict[str, Any]:
        """Everything in one object, as plain values."""
        return {
            "format": FORMAT,
            **plain(self.about),
            "budget_seconds": self._seconds,
            "seconds": self._seconds - self.left,
            "steps": plain(self.records),
            "found": {record.name: self.found(record.name) for record in self.records},
        }

    def archive(self) -> None:
        """Replace the archive by what there is.

        Raises:
            OSError: it cannot be written; the one before stays.
        """
        summary = self.summary()
        write_settings(self.folder / SUMMARY_FILE, summary)
        write_page(self.folder / REPORT_FILE, self._report(summary))
        part = self.out.with_name(f".{self.out.name}.part")
        name = self.out.name.removesuffix(".tar.gz")
        try:
            with tarfile.open(part, "w:gz") as archive:
                for path in sorted(self.folder.rglob("*")):
                    if path.is_file():
                        archive.add(path, f"{name}/{path.relative_to(self.folder)}", recursive=False)
            part.replace(self.out)
        finally:
            part.unlink(missing_ok=True)


def run_command(words: Sequence[str], log: Path, seconds: float) -> int | None:
    """Run a command in a session of its own; None where it was stopped for lack of time.

    It is asked to stop as Ctrl-C asks, then killed with all that it has started.

    Args:
        log: takes what it prints.

    Raises:
        KeyboardInterrupt: the command has been stopped, too.
    """
    with log.open("ab") as file:
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True)
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """A session and what is left of it."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            process.wait(STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_line(log: Path) -> str:
    """What a command said last, shortened."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it printed nothing"])[-1].removeprefix("error: ")[:300]


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM, which schedulers of machines send, is Ctrl-C meanwhile; in a thread that may not have signals nothing is changed."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before: Any = None
    with contextlib.suppress(ValueError):
        before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
