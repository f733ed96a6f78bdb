"""``llmsched build-statistics``: the joint quantile table of a trace, or the statistics of its sessions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from llmsched_env.cli.frame import Command, Options, Outcome, Screen, check_counts
from llmsched_env.errors import ConfigError
from llmsched_env.files import check_file, replacing
from llmsched_env.workload.build_sessions import SESSION_SOURCES, build_sessions
from llmsched_env.workload.build_statistics import MAX_TOTAL, SOURCES, Source, build, dump
from llmsched_env.workload.prefix_trace import read_prefix_trace
from llmsched_env.workload.readers import read_trace

NAMED = (*SOURCES, *SESSION_SOURCES)
KNOWN = "(default: that of the table that ships)"


@dataclass(frozen=True, kw_only=True)
class BuildStatistics(Options):
    """Build the joint quantile table of a trace, in the form of the tables that ship; the same trace gives the same bytes.

    Rows with prompt + output above --max-total tokens are left out, and the share left out is written into the file. The names of the
    tables that ship know their source; for another trace give --source and --licence.

    With --sessions the statistics are of sessions: turns, seconds between them, new tokens, answers. The trace must say what its prompts
    have in common, as Mooncake's hash_ids do.
    """

    trace: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="TRACE")]]
    """A trace file in any format that can be replayed."""
    name: Annotated[str, tyro.conf.arg(metavar="NAME", help=f"Name of the table ({', '.join(NAMED)} know their source).")]
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """JSON file to write; replaced."""
    max_total: Annotated[
        int | None,
        tyro.conf.arg(metavar="TOKENS", help_behavior_hint=f"(default: {MAX_TOTAL}; {SOURCES['mooncake'].max_total} for mooncake)"),
    ] = None
    """Leave out requests above this many tokens."""
    source: Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint=KNOWN)] = None
    """Where the trace comes from."""
    licence: Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint=KNOWN)] = None
    """Its licence."""
    sessions: bool = False
    """Statistics of sessions, in place of the quantile table."""


def source_of(options: BuildStatistics) -> Source:
    """Where the trace comes from.

    Raises:
        ConfigError: neither the name nor the options say.
    """
    if options.source and options.licence:
        return Source(options.source, options.licence)
    known = SESSION_SOURCES if options.sessions else SOURCES
    if options.name not in known:
        ours = "sessions" if options.sessions else "a table"
        raise ConfigError(f"--name {options.name!r}: not the name of {ours} of ours, give --source and --licence")
    return known[options.name]


def run(options: BuildStatistics, screen: Screen) -> Outcome:
    """Read the trace, write the table."""
    check_counts(max_total=options.max_total)
    check_file("--out", options.out)
    source = source_of(options)
    if options.sessions:
        if options.max_total is not None:
            raise ConfigError("--max-total: not with --sessions, whose turns are of any length")
        record = build_sessions(read_prefix_trace(options.trace), options.name, source)
    else:
        record = build(read_trace(options.trace), options.name, source, options.max_total or source.max_total)
    text = dump(record)
    with replacing(options.out) as file:
        file.write(text)
    screen.print(f"{options.out}: {len(text)} bytes")
    return Outcome({"out": options.out, "provenance": record["provenance"]})


COMMAND = Command("build-statistics", BuildStatistics, run, "make the quantile table of a trace")
main = COMMAND.main
