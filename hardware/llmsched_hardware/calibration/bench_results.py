"""Result files of serving benchmarks, one record a request: when it was sent, when its tokens came, how long it was.

======================  ====================================================================  ======================
tool                    file                                                                  times of every token
======================  ====================================================================  ======================
``vllm bench serve``    ``--save-result --save-detailed`` (vLLM 0.28.0 to 0.32.0,             yes
                        ``benchmarks/serve.py`` ``benchmark``); several with
                        ``--append-result``
GuideLLM                ``benchmarks.json`` (0.7, ``benchmark/schemas/report.py``,            first and last alone
                        ``schemas/request_stats.py``); several in a sweep
AIPerf                  ``profile_export.jsonl`` (``common/models/record_models.py``          yes
                        ``MetricRecordInfo``)
======================  ====================================================================  ======================

The format is told from what the file holds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmsched_env import checks
from llmsched_env.errors import ConfigError
from llmsched_env.perf.base import FloatArray
from llmsched_env.types import BoolArray, IntArray, Workload

LEAST_REQUESTS = 10
MOST_FAILED = 0.01
"""Share of failed requests that is left out with a note; more have loaded the server with work that no file tells of."""
UNITS = {"s": 1.0, "sec": 1.0, "seconds": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
DETAILED = ("input_lens", "output_lens", "start_times", "ttfts", "itls")


@dataclass(frozen=True, slots=True)
class BenchResult:
    """One run of a benchmark; requests in the order in which they were sent.

    Attributes:
        label: the file, with a number where it holds several runs.
        tool: ``vllm``, ``guidellm`` or ``aiperf``.
        arrival: (N,) float64 seconds, sent by the client; the first at 0.
        prompt_tokens, output_tokens: (N,) int32.
        first: (N,) float64 seconds from sending to the first token.
        last: (N,) float64 seconds from sending to the last token.
        gaps: (N,) arrays of float64, the output_tokens - 1 seconds between a request's tokens; empty where they are not known.
        counted: (N,) bool: whether figures are taken of the request; others are load alone.
        notes: what was left out, in words.
    """

    label: str
    tool: str
    arrival: FloatArray
    prompt_tokens: IntArray
    output_tokens: IntArray
    first: FloatArray
    last: FloatArray
    gaps: tuple[FloatArray, ...]
    counted: BoolArray
    notes: tuple[str, ...] = field(default=())

    def __len__(self) -> int:
        return int(self.arrival.shape[0])

    @property
    def workload(self) -> Workload:
        """The same requests for the simulator."""
        return Workload.of(self.arrival, self.prompt_tokens, self.output_tokens)

    @property
    def has_gaps(self) -> BoolArray:
        """(N,) bool: whether the time of every token is known; it is where there is but one."""
        return np.array([len(gap) == n - 1 for gap, n in zip(self.gaps, self.output_tokens, strict=True)], dtype=np.bool_)

    @property
    def rate(self) -> float:
        """Requests a second over the time in which they were sent."""
        return (len(self) - 1) / float(self.arrival[-1]) if self.arrival[-1] > 0 else math.inf

    @property
    def tpot(self) -> FloatArray:
        """(N,) seconds per output token after the first; NaN for one token."""
        rest = self.output_tokens - 1.0
        seconds: FloatArray = np.divide(self.last - self.first, rest, out=np.full(len(self), np.nan), where=rest > 0)
        return seconds


@dataclass(slots=True)
class _Rows:
    """What a reader gathers of one run; ``failed`` of them have no row."""

    label: str
    tool: str
    start: list[float] = field(default_factory=list)
    prompt: list[int] = field(default_factory=list)
    output: list[int] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    last: list[float] = field(default_factory=list)
    gaps: list[FloatArray] = field(default_factory=list)
    cut: float = math.inf  # from this time on (of ``start``) requests that never ended were in the system
    failed: int = 0
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, start: object, prompt: object, output: object, first: object, rest: Sequence[object] | object) -> None:
        """One request; ``rest`` are the seconds between its tokens, or the one number of seconds from the first to the last."""
        self.start.append(checks.number(f"{name} start", start))
        self.prompt.append(checks.integer(f"{name} prompt tokens", _whole(prompt), low=1))
        self.output.append(checks.integer(f"{name} output tokens", _whole(output), low=1))
        self.first.append(checks.number(f"{name} TTFT", first, unit="seconds", open_low=True))
        if isinstance(rest, list | tuple):
            gaps = np.array([checks.number(f"{name} inter-token time {i}", value, unit="seconds") for i, value in enumerate(rest)])
            seconds = float(gaps.sum())
            gaps = _one_a_token(gaps, self.output[-1])
        else:
            gaps = np.empty(0)
            seconds = checks.number(f"{name} seconds from first to last token", rest, unit="seconds")
        self.gaps.append(gaps)
        self.last.append(self.first[-1] + seconds)

    def result(self) -> BenchResult:
        """The run, in the order of sending.

        Raises:
            ConfigError: too few requests, too many failed, times so far apart that they are of no one run.
        """
        count = len(self.start)
        if self.failed > MOST_FAILED * (count + self.failed):
            raise ConfigError(
                f"{self.label}: {self.failed} of {count + self.failed} requests failed, must be at most {100 * MOST_FAILED:g} %: "
                "what they asked of the server is not in the file; run the benchmark again"
            )
        if count < LEAST_REQUESTS:
            raise ConfigError(f"{self.label}: {count} completed requests, must be at least {LEAST_REQUESTS}")
        notes = list(self.notes)
        if self.failed:
            notes.append(f"{self.failed} failed requests left out")
        start, last = np.array(self.start), np.array(self.last)
        order = np.argsort(start, kind="stable")
        counted = (start + last <= self.cut)[order]
        if np.count_nonzero(counted) < LEAST_REQUESTS:
            raise ConfigError(f"{self.label}: only {np.count_nonzero(counted)} requests ended before some were cut off, too few")
        if not counted.all():
            notes.append(f"{np.count_nonzero(~counted)} requests beside ones that the benchmark cut off count as load alone")
        return BenchResult(
            self.label,
            self.tool,
            (start - start.min())[order],
            np.array(self.prompt, np.int32)[order],
            np.array(self.output, np.int32)[order],
            np.array(self.first)[order],
            last[order],
            tuple(self.gaps[i] for i in order),
            counted,
            tuple(notes),
        )


def read_results(path: Path) -> list[BenchResult]:
    """Every run in a result file.

    Raises:
        ConfigError: the file is missing, not of the formats above, without the times of single requests (the flag that adds them is
            named), with failed requests, lengths that disagree, or numbers that cannot be.
    """
    label = path.name
    data = checks.file_bytes(f"RESULT {path}", path)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{label}: not a text file ({error})") from error
    if not text.strip():
        raise ConfigError(f"{label}: empty, must be a benchmark's result file")
    values = _json_values(label, text)
    first = values[0]
    if "metadata" in first and "metrics" in first and "benchmarks" not in first:
        return [_aiperf(label, values)]
    found: list[_Rows] = []
    for number, value in enumerate(values, 1):
        several = label if len(values) == 1 else f"{label}#{number}"
        found += _guidellm(several, value) if "benchmarks" in value else [_vllm(several, value)]
    return [rows.result() for rows in found]


def _json_values(label: str, text: str) -> list[dict[str, Any]]:
    """The JSON objects of a file: one, or one a line, or one after another."""
    decoder = json.JSONDecoder()
    values: list[dict[str, Any]] = []
    at = 0
    try:
        while at < len(text):
            value, at = decoder.raw_decode(text, at)
            values.append(checks.mapping(f"{label}: value {len(values) + 1}", value))
            while at < len(text) and text[at].isspace():
                at += 1
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{label}: not JSON ({error})") from error
    return values


# --- vllm bench serve -------------------------------------------------------------------------------
def _vllm(label: str, value: Mapping[str, Any]) -> _Rows:
    """A result of ``vllm bench serve``."""
    missing = [name for name in DETAILED if name not in value]
    if len(missing) == len(DETAILED) and "request_throughput" not in value and "completed" not in value:
        raise ConfigError(
            f"{label}: not a benchmark's result file (must be of vllm bench serve --save-result --save-detailed, GuideLLM's "
            "benchmarks.json or AIPerf's profile_export.jsonl)"
        )
    if missing:
        raise ConfigError(f"{label}: fields {', '.join(missing)} are missing; run vllm bench serve with --save-result --save-detailed")
    columns = {name: _column(label, value, name) for name in DETAILED}
    count = len(columns["ttfts"])
    errors = _column(label, value, "errors") if "errors" in value else [""] * count
    for name, column in (*columns.items(), ("errors", errors)):
        if len(column) != count:
            raise ConfigError(f"{label}: {name} has {len(column)} entries, ttfts {count}; must be as many")
    rows = _Rows(label, "vllm")
    if value.get("max_concurrency") is not None:
        rows.notes.append("sent with --max-concurrency, when others had ended; replayed at the times at which they were sent")
    for i in range(count):
        if errors[i] or columns["output_lens"][i] == 0:
            rows.failed += 1
            continue
        name = f"{label}: request {i}:"
        gaps = columns["itls"][i]
        if not isinstance(gaps, list):
            raise ConfigError(f"{name} itls is {checks.shown(gaps)}, must be a list of seconds")
        rows.add(name, columns["start_times"][i], columns["input_lens"][i], columns["output_lens"][i], columns["ttfts"][i], gaps)
    return rows


def _column(label: str, value: Mapping[str, Any], name: str) -> list[Any]:
    column = value[name]
    if not isinstance(column, list):
        raise ConfigError(f"{label}: {name} is {checks.shown(column)}, must be a list with an entry a request")
    return column


# --- GuideLLM ---------------------------------------------------------------------------------------
def _guidellm(label: str, value: Mapping[str, Any]) -> list[_Rows]:
    """The benchmarks of a GuideLLM report; requests cut off at a benchmark's end are load that has no record of its tokens."""
    benchmarks = value["benchmarks"]
    if not isinstance(benchmarks, list) or not benchmarks:
        raise ConfigError(f"{label}: benchmarks is {checks.shown(benchmarks)}, must be a list with a benchmark")
    found = []
    for number, benchmark in enumerate(benchmarks, 1):
        rows = _Rows(label if len(benchmarks) == 1 else f"{label}#{number}", "guidellm")
        groups = checks.mapping(f"{rows.label}: requests", checks.mapping(rows.label, benchmark).get("requests"))
        rows.failed = len(_group(rows.label, groups, "errored"))
        for i, request in enumerate(_group(rows.label, groups, "successful")):
            name = f"{rows.label}: request {i}:"
            with checks.told(name):
                timings = _timings(request)
                start, first, last = (timings[k] for k in ("request_start", "first_token_iteration", "last_token_iteration"))
                if first is None or last is None:
                    raise ConfigError("times of its tokens are missing; run GuideLLM with streaming")
                start, first, last = (checks.number("a time", t) for t in (start, first, last))
            rows.add(name, start, request.get("prompt_tokens"), request.get("output_tokens"), first - start, last - first)
        for i, request in enumerate(_group(rows.label, groups, "incomplete")):
            with checks.told(f"{rows.label}: incomplete request {i}"):
                begun = _timings(request)["request_start"]
                if begun is not None:  # else it never reached the server
                    rows.cut = min(rows.cut, checks.number("request_start", begun))
        found.append(rows)
    return found


def _group(label: str, groups: Mapping[str, Any], name: str) -> list[Any]:
    group = groups.get(name) or []
    if not isinstance(group, list):
        raise ConfigError(f"{label}: requests.{name} is {checks.shown(group)}, must be a list")
    return group


def _timings(request: Any) -> dict[str, Any]:
    timings = checks.mapping("info.timings", checks.mapping("info", checks.mapping("request", request).get("info")).get("timings"))
    return {name: timings.get(name) for name in ("request_start", "first_token_iteration", "last_token_iteration")}


# --- AIPerf -----------------------------------------------------------------------------------------
def _aiperf(label: str, records: Sequence[Mapping[str, Any]]) -> BenchResult:
    """The records of AIPerf's ``profile_export.jsonl``."""
    rows = _Rows(label, "aiperf")
    warm = 0
    starts = []
    for i, record in enumerate(records):
        name = f"{label}: line {i + 1}:"
        about = checks.mapping(f"{name} metadata", record.get("metadata"))
        if about.get("benchmark_phase", "profiling") != "profiling":
            warm += 1
            continue
        if record.get("error") is not None or about.get("was_cancelled"):
            rows.failed += 1
            continue
        metrics = checks.mapping(f"{name} metrics", record.get("metrics"))
        first = _seconds(name, metrics, "time_to_first_token", "record it with --streaming")
        output = _metric(name, metrics, "output_sequence_length", "")[0]
        rest: Any
        if "inter_chunk_latency" in metrics:
            rest = _seconds(name, metrics, "inter_chunk_latency", "")
        else:
            rest = _seconds(name, metrics, "request_latency", "") - first if output != 1 else []
        begun = about.get("request_start_ns")
        starts.append(checks.integer(f"{name} request_start_ns", begun, high=2**62))
        rows.add(name, 0.0, _metric(name, metrics, "input_sequence_length", "")[0], output, first, rest)
    if starts:  # whole nanoseconds since 1970 do not fit a float64
        rows.start = [1e-9 * (begun - min(starts)) for begun in starts]
    if warm:
        rows.notes.append(f"{warm} requests of the warm-up left out")
    return rows.result()


def _metric(name: str, metrics: Mapping[str, Any], metric: str, hint: str) -> tuple[Any, str]:
    """Value and unit of a metric."""
    if metric not in metrics:
        raise ConfigError(f"{name} metric {metric} is missing{hint and '; ' + hint}")
    entry = checks.mapping(f"{name} {metric}", metrics[metric])
    return entry.get("value"), str(entry.get("unit"))


def _seconds(name: str, metrics: Mapping[str, Any], metric: str, hint: str) -> Any:
    """A metric that is a time, or times, in seconds."""
    value, unit = _metric(name, metrics, metric, hint)
    if unit not in UNITS:
        raise ConfigError(f"{name} {metric}: unit {unit!r}, must be one of {', '.join(UNITS)}")
    values = value if isinstance(value, list) else [value]
    seconds = [UNITS[unit] * checks.number(f"{name} {metric}", v) for v in values]
    return seconds if isinstance(value, list) else seconds[0]


def _one_a_token(gaps: FloatArray, output: int) -> FloatArray:
    """The gaps between ``output`` tokens. A stream may hold one chunk more, without a token (a chat's role, the end): it is joined."""
    if len(gaps) != output or output < 2:
        return gaps
    return np.concatenate([[gaps[0] + gaps[1]], gaps[2:]]) if gaps[0] <= gaps[-1] else np.concatenate([gaps[:-2], [gaps[-2] + gaps[-1]]])


def _whole(value: object) -> object:
    """A count that came as a float, as an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
