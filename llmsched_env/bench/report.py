"""A comparison as a table in the terminal and as one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import dataclasses
import math
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from llmsched_env import __version__
from llmsched_env.bench.comparison import Comparison, Row
from llmsched_env.bench.plots import Figure
from llmsched_env.bench.tables import COLUMNS, REPORT_COLUMNS, Cell, footnotes, short_footnotes
from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import require
from llmsched_env.files import replacing

TEMPLATES = Path(__file__).parent
"""Folder of report.html.j2, demo.html.j2 and the parts that they share."""

DEFINITIONS = (
    ("Latency", "arrival to last token, over completed requests, in simulated seconds"),
    ("TTFT", "time to first token: arrival to the end of the iteration that yields the first output token"),
    ("TPOT", "time per output token after the first: (latency - TTFT) / (output tokens - 1); single-token outputs have none"),
    (
        "Fairness",
        "Jain's index of latency per output token over the completed requests of one run: 1 where every token was waited for equally "
        "long, 1 / n where one of n requests had all the wait",
    ),
    ("Throughput", "output tokens of completed requests per simulated second, the drain after the last arrival included"),
    ("Evictions", "residents that lost their KV, asked for by the policy or forced by a full memory, per run"),
    ("KV mean, KV max", "KV reserved as a share of the capacity: time average and peak"),
    ("P50, P95, P99", "percentiles over the requests of one run"),
    ("±", "half width of the 95 % Student t interval of the mean over seeds; the same seed gives every policy the same requests"),
    (
        "Bands of the plots",
        "the same interval for a logarithmic axis, that of the logarithm of the mean: from mean / e^(h / mean) to mean · e^(h / mean), h "
        "the half width. Narrow ones are equal to mean ± h; wide ones reach less far down, never to zero, and further up",
    ),
    (
        "Fluid stability boundary",
        "largest arrival rate at which the fluid model of these lengths on this engine has an equilibrium that fits the KV memory; "
        "it knows nothing of queueing, so latency rises before it",
    ),
)


def print_table(console: Any, table: Sequence[Cell], title: str) -> None:
    """A rich table: a row for each policy and rate."""
    box, text = require("rich.box", "cli"), require("rich.text", "cli").Text
    grid = require("rich.table", "cli").Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1))
    grid.add_column("req/s", justify="right", no_wrap=True)
    grid.add_column("policy", overflow="fold", min_width=max(len(cell.policy) for cell in table))
    for column in COLUMNS:
        grid.add_column(column.heading, justify="right", overflow="fold")
    last = math.nan
    for cell in table:
        new = cell.rate != last
        if new and not math.isnan(last):
            grid.add_section()
        name = cell.policy + (f" [{', '.join(cell.marks)}]" if cell.marks else "")
        grid.add_row(f"{cell.rate:g}" if new else "", text(name), *(column.show(cell) for column in COLUMNS))
        last = cell.rate
    console.print(grid)
    seeds = sorted({cell.seeds for cell in table})
    counted = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    lines = [f"Means over {counted} seeds ± half width of the 95 % interval (Student's t)." if seeds[-1] > 1 else "One seed, no intervals."]
    if any(cell.known_lengths for cell in table):
        lines.append("known lengths: the policy is told output lengths, which a server does not know.")
    lines += [f"{line}." for line in short_footnotes(table)]
    for line in lines:
        console.print(line, highlight=False, markup=False)


@dataclass(frozen=True, slots=True)
class EngineLine:
    """The engine one policy runs on, where it differs from the scenario's."""

    policy: str
    classes: int
    segments: int
    differences: str


def versions() -> list[tuple[str, str]]:
    packages = ("numpy", "numba", "gymnasium", "scipy", "matplotlib")
    return [
        ("llmsched-env", __version__),
        ("Python", platform.python_version()),
        *((name, metadata.version(name)) for name in packages),
    ]


def engine_lines(comparison: Comparison) -> list[EngineLine]:
    base = comparison.engine
    lines = []
    for name in comparison.policies:
        policy = comparison.policy(name, comparison.rates[0])
        changed = [
            f"{f.name} = {getattr(policy.engine, f.name)}"
            for f in dataclasses.fields(EngineConfig)
            if getattr(policy.engine, f.name) != getattr(base, f.name)
        ]
        lines.append(EngineLine(name, policy.layout.num_classes, policy.layout.num_segments, ", ".join(changed)))
    return lines


def settings_lines(comparison: Comparison, rows: Sequence[Row], command: str) -> list[tuple[str, str]]:
    engine = comparison.engine
    statistics = comparison.scenario.statistics
    model = engine.time_model.provenance
    lines = [
        ("Command", command),
        ("Workload", f"{comparison.scenario.name}: {comparison.scenario.description}"),
        ("Source", comparison.scenario.source),
        ("Lengths", f"mean {statistics.mean_prompt:.0f} prompt and {statistics.mean_output:.0f} output tokens"),
        ("Arrival rates", ", ".join(f"{r:g}" for r in comparison.rates) + " requests/s"),
        ("Requests of a run", f"{comparison.num_requests:,}"),
        ("Seeds", ", ".join(map(str, sorted({row.seed for row in rows})))),
        ("Iteration time", ". ".join(part for part in (model.name, model.source, model.valid_range, model.fit_error) if part)),
    ]
    fields = dataclasses.fields(EngineConfig)
    lines.append(("Engine", ", ".join(f"{f.name} = {getattr(engine, f.name)}" for f in fields if f.name != "time_model")))
    if comparison.overrides.items():
        lines.append(("Set by the user", ", ".join(f"{key} = {value}" for key, value in comparison.overrides.items())))
    return lines


def write_html(
    path: Path,
    comparison: Comparison,
    rows: Sequence[Row],
    table: Sequence[Cell],
    figures: Iterable[Figure],
    *,
    command: str,
    warnings: Sequence[str],
) -> None:
    """Write the report; pictures are inside it."""
    render(
        path,
        "report.html.j2",
        title=f"Scheduling policies on {comparison.scenario.name}",
        warnings=list(warnings),
        settings=settings_lines(comparison, rows, command),
        engines=engine_lines(comparison),
        table=table_lines(table),
        footnotes=footnotes(table),
        short_footnotes=short_footnotes(table),
        known=sorted({cell.policy for cell in table if cell.known_lengths}),
        overload=any(cell.overload for cell in table),
        figures=inline(figures),
    )


def table_lines(table: Sequence[Cell]) -> list[dict[str, Any]]:
    """Cells as the templates show them."""
    return [
        {"rate": f"{cell.rate:g}", "policy": cell.policy, "marks": cell.marks, "seeds": cell.seeds}
        | {"values": [column.show(cell) for column in REPORT_COLUMNS]}
        for cell in table
    ]


def inline(figures: Iterable[Figure]) -> list[dict[str, str]]:
    """Figures with the bytes of their files, so that a page needs nothing beside it."""
    return [{"title": f.title, "caption": f.caption, "data": base64.b64encode(f.path.read_bytes()).decode("ascii")} for f in figures]


def render(path: Path, template: str, **values: Any) -> None:
    """Write a page from a template of this folder; values that every page shows are added."""
    jinja2 = require("jinja2", "cli")
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined)
    html = environment.get_template(template).render(
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        versions=versions(),
        headings=[column.heading for column in REPORT_COLUMNS],
        definitions=DEFINITIONS,
        **values,
    )
    with replacing(path) as file:
        file.write(html)
