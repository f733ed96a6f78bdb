"""A scenario as a TOML file: lengths, arrivals, engine and queues of one's own, without a line of Python.

.. code-block:: toml

    name = "night-chat"                  # default: the file's name
    description = "Chat at night"
    num_requests = 2000
    ttft_slo = 1.0                       # seconds
    tpot_slo = 0.1                       # seconds a token

    [lengths]                            # one of table, trace, types, lognormal
    table = "azure-conv"                 # shipped length statistics, or a file of `llmsched build-statistics`
    # trace = "requests.csv"             # lengths drawn from a trace's rows
    # types = { prompt = [512, 64], output = [20, 200], weight = [1.0, 2.0] }
    # lognormal = { prompt_mean = 900, prompt_sigma = 1.1, output_mean = 220, output_sigma = 0.8 }

    [arrivals]                           # process and its fields as in llmsched_env/workload/arrivals.py
    process = "gamma"                    # poisson, gamma, mmpp2, piecewise, trace
    rate = 5.0                           # requests/s
    cv = 3.0

    [engine]                             # fields of EngineConfig; d0 and d1 stand for a linear time model
    preset = "vllm"
    num_blocks = 2816
    time_model = "a100-llama2-7b-vllm"

    [predictions]                        # a predictor of output lengths and its error, as in llmsched_env/workload/predictions.py
    sigma = 0.6

    [layout]                             # default: hidden lengths, segments that end at the output quartiles
    by = "prompt"
    edges = [256, 1024]

Tenants (``llmsched_env.workload.tenants``) are a table each. One without ``arrivals`` takes its ``share`` of the scenario's; one without
``lengths`` has the scenario's. Queues are then a class for each tenant, unless a layout says otherwise:

.. code-block:: toml

    [[tenants]]
    name = "chat"
    weight = 2.0                         # of the service, relative to the others
    ttft_slo = 1.0                       # seconds; default: the scenario's
    tpot_slo = 0.1                       # seconds a token; default: the scenario's
    share = 3.0                          # of the scenario's arrivals, relative to the others

    [[tenants]]
    name = "batch"
    arrivals = { process = "mmpp2", rate_low = 0.0, rate_high = 4.0, mean_low_seconds = 40.0, mean_high_seconds = 10.0 }
    lengths = { lognormal = { prompt_mean = 2500, prompt_sigma = 0.3, output_mean = 400, output_sigma = 0.5 } }

Paths of files are relative to the TOML file.
"""

from __future__ import annotations

import dataclasses
import os
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llmsched_env import checks
from llmsched_env.engine_changes import engine_with
from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import ConfigError, did_you_mean
from llmsched_env.types import QueueLayout
from llmsched_env.workload.arrivals import MMPP2, ArrivalProcess, Gamma, PiecewiseConstant, Poisson, TraceArrivals
from llmsched_env.workload.lengths import LengthModel, Lognormal, TraceLengths, Types
from llmsched_env.workload.predictions import PredictionModel
from llmsched_env.workload.readers import read_trace
from llmsched_env.workload.scenario import Scenario, bucket_layout, hidden_layout
from llmsched_env.workload.tables import load_lengths
from llmsched_env.workload.tenants import Tenant, TenantMix

TOP = (
    "name", "description", "source", "num_requests", "ttft_slo", "tpot_slo", "lengths", "arrivals", "engine", "layout", "known_layout",
    "tenants",
    "predictions",
)  # fmt: skip
PROCESSES: dict[str, type[Any]] = {"poisson": Poisson, "gamma": Gamma, "mmpp2": MMPP2, "piecewise": PiecewiseConstant}
LENGTHS = ("table", "trace", "types", "lognormal")


def is_scenario_file(text: str) -> bool:
    """Whether a scenario is given as a TOML file."""
    return text.lower().endswith(".toml")


def read_scenario(path: str | os.PathLike[str]) -> Scenario:
    """The scenario in a TOML file.

    Raises:
        ConfigError: a file that cannot be read or is no TOML; a field that is missing, unknown (the nearest is given) or refused.
    """
    file = Path(path)
    data = checks.file_bytes(f"scenario: {path}", file)
    try:
        record = tomllib.loads(data.decode("utf-8"))
    except ValueError as error:
        raise ConfigError(f"scenario: {path} is not TOML ({error})") from error
    with checks.told(f"scenario {path}"):
        return _scenario(record, file)


def _scenario(record: dict[str, Any], file: Path) -> Scenario:
    _known("", record, TOP)
    tenants = _tenants(record, file.parent)
    lengths, arrivals, whence = _traffic(record, file.parent, tenants)
    statistics = lengths.statistics()
    types = statistics.num_types
    known = QueueLayout(by="type", num_types=types) if types > 1 else bucket_layout(statistics)
    name = checks.text("name", record.get("name", file.stem), empty=False)
    return Scenario(
        name=name,
        description=checks.text("description", record.get("description", f"scenario file {file.name}")),
        source=checks.text("source", record.get("source", f"{statistics.source}{whence}")),
        lengths=lengths,
        arrivals=arrivals,
        engine=_engine(checks.mapping("engine", record.get("engine", {}))),
        layout=_layout("layout", record, hidden_layout(statistics) if tenants is None else tenants.layout, types, tenants),
        known_layout=_layout("known_layout", record, known, types, tenants),
        tenants=tenants,
        predictions=PredictionModel.of(checks.mapping("predictions", record["predictions"]) if "predictions" in record else None),
        **{field: record[field] for field in ("num_requests", "ttft_slo", "tpot_slo") if field in record},
    )


def _traffic(record: Mapping[str, Any], folder: Path, tenants: TenantMix | None) -> tuple[LengthModel, ArrivalProcess, str]:
    """Lengths, arrivals, and where the times of the arrivals are from."""
    for name in ("lengths", "arrivals"):
        if name not in record and tenants is None:
            raise ConfigError(f"{name}: missing (see llmsched_env/workload/scenario_files.py for an example)")
    lengths = _lengths("lengths", record["lengths"], folder) if "lengths" in record else None
    arrivals, whence = _arrivals("arrivals", record["arrivals"], folder) if "arrivals" in record else (None, "")
    if tenants is not None:
        joined, of_tenants = tenants.scenario_parts(arrivals, lengths)
        return of_tenants, joined, whence
    assert lengths is not None and arrivals is not None
    return lengths, arrivals, whence


def _tenants(record: Mapping[str, Any], folder: Path) -> TenantMix | None:
    if "tenants" not in record:
        return None
    if not isinstance(record["tenants"], list):
        raise ConfigError(f"tenants: {checks.shown(record['tenants'])}, must be tables [[tenants]]")
    limits = {field: record[field] for field in ("ttft_slo", "tpot_slo") if field in record}
    found = []
    for i, table in enumerate(record["tenants"]):
        owner = f"tenants[{i}]"
        given = {**limits, **checks.mapping(owner, table)}
        if "arrivals" in given and "share" in given:
            raise ConfigError(f"{owner}.share: {checks.shown(given['share'])} beside arrivals of its own, must be left out")
        if "arrivals" in given:
            given["arrivals"] = _arrivals(f"{owner}.arrivals", given["arrivals"], folder)[0]
        if "lengths" in given:
            given["lengths"] = _lengths(f"{owner}.lengths", given["lengths"], folder)
        found.append(_built(owner, Tenant, given))
    return TenantMix(tuple(found))


def _known(owner: str, given: Mapping[str, Any], allowed: tuple[str, ...]) -> None:
    for name in given:
        if name not in allowed:
            raise ConfigError(f"{owner}{name}: unknown field{did_you_mean(name, allowed)} (allowed: {', '.join(allowed)})")


def _built(owner: str, kind: Callable[..., Any], given: Mapping[str, Any]) -> Any:
    """An object of a dataclass from its fields; lists become tuples."""
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    _known(f"{owner}.", given, tuple(field.name for field in fields))
    for field in fields:
        if field.name not in given and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{owner}.{field.name}: missing")
    with checks.told(owner):
        return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def _lengths(owner: str, table: Any, folder: Path) -> LengthModel:
    given = checks.mapping(owner, table)
    _known(f"{owner}.", given, LENGTHS)
    if len(given) != 1:
        raise ConfigError(f"{owner}: {', '.join(given) or 'nothing'} given, must be one of {', '.join(LENGTHS)}")
    ((kind, value),) = given.items()
    if kind == "table":
        name = checks.text(f"{owner}.table", value, empty=False)
        return load_lengths(str(folder / name) if name.endswith(".json") else name)
    if kind == "trace":
        trace = read_trace(folder / checks.text(f"{owner}.trace", value, empty=False))
        return TraceLengths(trace.prompt_tokens, trace.output_tokens, trace.type_id, trace.path)
    built: LengthModel = _built(f"{owner}.{kind}", Types if kind == "types" else Lognormal, checks.mapping(f"{owner}.{kind}", value))
    return built


def _arrivals(owner: str, table: Any, folder: Path) -> tuple[ArrivalProcess, str]:
    """The process, and where its times are from."""
    given = checks.mapping(owner, table)
    process = checks.one_of(f"{owner}.process", given.pop("process", "poisson"), (*PROCESSES, "trace"))
    if process != "trace":
        built: ArrivalProcess = _built(owner, PROCESSES[process], given)
        return built, ""
    _known(f"{owner}.", given, ("file", "rate"))
    file = folder / checks.text(f"{owner}.file", given.get("file", ""), empty=False)
    times = read_trace(file).arrival
    if times is None:
        raise ConfigError(f"{owner}.file: {file} has no arrival times")
    recorded: ArrivalProcess = TraceArrivals(times)
    return recorded if "rate" not in given else recorded.with_rate(given["rate"]), f", arrivals of {file}"


def _engine(given: dict[str, Any]) -> EngineConfig:
    preset = checks.one_of("engine.preset", given.pop("preset", "vllm"), ("vllm", "paper"))
    if preset == "vllm":
        return engine_with(EngineConfig.vllm(), given)
    for name in ("capacity_tokens", "d0", "d1"):
        if name not in given:
            raise ConfigError(f"engine.{name}: missing, the paper preset needs it")
    d0, d1 = (checks.number(f"engine.{name}", given.pop(name)) for name in ("d0", "d1"))
    return engine_with(EngineConfig.paper(given.pop("capacity_tokens"), d0, d1), given)


def _layout(name: str, record: Mapping[str, Any], default: QueueLayout, types: int, tenants: TenantMix | None) -> QueueLayout:
    if name not in record:
        return default
    given = checks.mapping(name, record[name])
    if given.get("by") == "type":
        given.setdefault("num_types", types)
    if given.get("by") == "tenant" and tenants is not None:
        given.setdefault("num_types", len(tenants.tenants))
        given.setdefault("tenant_weights", list(tenants.layout.tenant_weights))
    layout: QueueLayout = _built(name, QueueLayout, given)
    return layout
