"""The results of arXiv 2504.11320, reproduced on this project's engine: docs/reproduction.md and its plots.

    python scripts/reproduce.py            all of it, at least 10 seeds: under an hour on 2 cores
    python scripts/reproduce.py --quick    fewer seeds, rates and requests: under five minutes

Every configuration keeps its result in a file named after a hash of the configuration, so an interrupted
run goes on where it was; ``--fresh`` starts over.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from llmsched_env.errors import ConfigError, MissingExtraError, require
from llmsched_env.files import check_file, replacing
from llmsched_env.pages.reproduction import claims as reproduction_claims
from llmsched_env.pages.reproduction import memory as reproduction_memory
from llmsched_env.pages.reproduction import stability as reproduction_stability
from llmsched_env.pages.reproduction import systems as reproduction_systems
from llmsched_env.pages.reproduction import variants as reproduction_variants
from llmsched_env.pages.reproduction.lab import Claim, Lab, Section

SECTIONS: dict[str, Callable[[Lab], Section]] = {
    "stability": reproduction_stability.section,
    "memory": reproduction_memory.section,
    "variants": reproduction_variants.section,
    "systems": reproduction_systems.section,
    "claims": reproduction_claims.section,
}
INTERRUPTED = 130


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer seeds, rates and requests")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), metavar="NAME", help=f"only these parts: {', '.join(SECTIONS)}")
    parser.add_argument("--out", type=Path, default=Path("docs/reproduction.md"), help="the page; plots go to figures/ beside it")
    parser.add_argument("--results", type=Path, default=Path("results/reproduction"), help="folder of finished configurations")
    parser.add_argument("--fresh", action="store_true", help="discard finished configurations")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments().parse_args(argv)
    try:
        if options.jobs < 1:
            raise ConfigError(f"--jobs: {options.jobs}, must be >= 1")
        for module in ("joblib", "matplotlib", "rich", "scipy"):
            require(module, "cli")
        check_file("--out", options.out)
        if options.fresh and options.results.is_dir():
            for file in options.results.glob("*.json"):
                file.unlink()
        return reproduce(options)
    except (ConfigError, MissingExtraError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ninterrupted: finished configurations are kept in {options.results}; the same command goes on", file=sys.stderr)
        return INTERRUPTED


def reproduce(options: argparse.Namespace) -> int:
    """Run what is missing and write the page."""
    progress = require("rich.progress", "cli")
    columns = (
        progress.TextColumn("{task.description:<45}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
    )
    start = time.perf_counter()
    sections = []
    with progress.Progress(*columns) as bars:
        whole = bars.add_task("parts", total=len(options.only or SECTIONS))
        part = bars.add_task("", total=1)

        def report(label: str, done: int, total: int) -> None:
            bars.update(part, description=label, completed=done, total=total)

        lab = Lab(options.results, options.out.parent / "figures", quick=options.quick, jobs=options.jobs, progress=report)
        for name, section in SECTIONS.items():
            if options.only is None or name in options.only:
                sections.append(section(lab))
                bars.advance(whole)
    command = shlex.join(["python", "scripts/reproduce.py", *(["--quick"] if options.quick else []), *_only(options.only)])
    with replacing(options.out) as file:
        file.write("\n".join(page(sections, lab, command)))
    seconds = time.perf_counter() - start
    print(
        f"{lab.computed} configurations run, {len(lab.seconds) - lab.computed} read from {options.results}, {seconds:.0f} s -> "
        f"{options.out}"
    )
    return 0


def _only(parts: Sequence[str] | None) -> list[str]:
    return ["--only", *parts] if parts else []


def page(sections: Sequence[Section], lab: Lab, command: str) -> list[str]:
    claims = [claim for section in sections for claim in section.claims]
    counts = {v: sum(c.verdict == v for c in claims) for v in ("agrees", "differs", "not comparable")}
    facts: dict[str, float] = {}
    for section in sections:
        facts |= section.facts
    lines = [
        "# The paper, reproduced",
        "",
        f"Generated by `{command}`: the results of arXiv 2504.11320 (v4, with the authors' public repository where it is named) from this "
        "project's own engine and policies. Nothing is tuned to match a figure of the paper; WAIT's caps are tuned where the paper tunes "
        "them, and the baselines then with as many trials. Known lengths: WAIT and Modified WAIT are told the class of output length of "
        "each request; all other policies are not.",
        "",
        *(
            [
                "**This is the quick version**: few seeds, short runs, few rates. Intervals are wide and searches coarse; verdicts may "
                "differ from those of the full run.",
                "",
            ]
            if lab.quick
            else []
        ),
        "The paper's numbers: its text and tables where they hold them; several of its figures were drawn from runs with other settings "
        "than the text states (Llama-3-8B for Llama-2-7B, waiting switched off, completion rates drawn by hand as min(rate, capacity)), "
        "and WAIT was tuned per rate against fixed baselines. A verdict of *not comparable* says why no comparison is possible.",
        "",
        "## Summary",
        "",
        f"{counts['agrees']} claims agree, {counts['differs']} differ, {counts['not comparable']} are not comparable.",
        "",
        *summary(claims),
        *when_to_use(facts),
    ]
    for section in sections:
        lines += [f"## {section.title}", "", *section.body]
    lines += provenance()
    lines += [
        "## How this page is made",
        "",
        f"{len(lab.seconds)} configurations, {sum(lab.seconds.values()) / 60:.0f} processor minutes in all. Each is a record of workload, "
        "engine, policy and seeds; its result is kept under the hash of that record and is read again by the next run. The same seed "
        "gives all policies the same requests. Intervals are Student's t over seeds (95 %), shares have exact binomial intervals.",
        "",
    ]
    if lab.other_sources:
        lines += [
            f"{len(lab.other_sources)} of the results were made with another state of the package's sources (`--fresh` runs all again).",
            "",
        ]
    return lines


def provenance() -> list[str]:
    """Where the paper's numbers come from, and what is known against comparing them."""
    return [
        "## Where the paper's numbers come from",
        "",
        "- Theory: propositions and theorems of arXiv 2504.11320 v4. The cascade is a narrative there; the deterministic rules are ours.",
        "- Largest stable rates, p512d1000 latencies, decode-only gains and the wait-gate ablation: v4, section 6 and appendix B (one "
        "A100-80GB in Vidur, ten replications, cap and segments tuned per rate, baselines fixed).",
        "- Latency tables of p512d20, the mix and lmsys: run records in the authors' public repository, near the paper's figures but not "
        "the same.",
        "- The text names Llama-2-7B; most synthetic figures were drawn from Llama-3-8B runs with 29,952 KV blocks and the wait switched "
        "off. The KV cache here is that of Llama-2-7B (7,424 blocks) unless a workload says otherwise, so memory binds earlier.",
        "- Completion-rate figures there are min(rate, capacity) with capacities set by hand; ours are measured.",
        "- One eviction table joins latencies at one memory size with restarts at another; we compare the restarts alone.",
        "- Modified WAIT: arXiv 2608.06135, of which only the idea is reproduced (another workload, another smoothing).",
        "",
    ]


def _cell(text: str) -> str:
    return text.replace("|", "\\|") or "-"


def summary(claims: Sequence[Claim]) -> list[str]:
    lines = ["| claim | paper | ours | verdict |", "| --- | --- | --- | --- |"]
    for claim in claims:
        verdict = f"**{claim.verdict}**" + (f" ({claim.why})" if claim.why else "")
        lines.append(f"| {_cell(claim.claim)} | {_cell(claim.paper)} | {_cell(claim.ours)} | {_cell(verdict)} |")
    return [*lines, ""]


def when_to_use(facts: Mapping[str, float]) -> list[str]:
    """Five sentences from the measurements; empty where a part that they need was left out."""
    systems = {name.partition(":")[0] for name in facts if name.endswith(":tuned_tuned")}
    needed = ("slack_latency", "wait_cost", "eviction_share", "gain:tuned")
    if not systems or any(name not in facts for name in needed):
        return []

    def span(suffix: str) -> tuple[float, float]:
        values = [facts[f"{name}:{suffix}"] for name in systems]
        return min(values), max(values)

    def change(values: tuple[float, float]) -> str:
        return " to ".join(f"{100 * (v - 1):+.0f} %" for v in values)

    low, edge, tuned_fixed, tuned = span("fluid_fixed_low"), span("fluid_fixed"), span("tuned_fixed"), span("tuned_tuned")
    gate = span("wait_cap")
    share = facts["eviction_share"]
    verdict = "the wait itself never pays" if gate[0] >= 0.98 else "on some workloads the wait itself pays"
    fair = "nothing" if tuned[0] > 0.97 else f"up to {1 - tuned[0]:.0%} of mean latency"
    return [
        "## When should you use WAIT",
        "",
        "1. Use it where an eviction is expensive and memory binds: in the paper's model FCFS is stable only up to "
        f"{facts['fcfs_low']:.2f} to {facts['fcfs_high']:.2f} of the fluid boundary and WAIT at least up to {facts['wait_region']:.2f}, "
        f"without a single eviction, and near the boundary FCFS has {facts['fcfs_collapse']:.1f} times the latency of WAIT's cap.",
        f"2. Do not use it to cut latency at low load: waiting costs up to {facts['wait_cost']:.1f} times the latency of the same cap "
        f"without the wait in the paper's model, and on the calibrated engine the best WAIT with fluid settings has {change(low)} the "
        "mean latency of the best fixed baseline at the lowest rate.",
        f"3. The cap is what helps on a vLLM-like engine, and {verdict}: at the largest rate at which a tuned baseline is stable, waiting "
        f"changes the mean latency of the tuned cap by {change(gate)}, and a cap without the wait is `max_num_seqs` and the token budget.",
        "4. Compare it with baselines that were tuned alike: tuned per rate the WAIT family changes mean latency by "
        f"{change(tuned_fixed)} against the best fixed baseline there and by {change(tuned)} against the best tuned one, so it gains "
        f"{fair}; with fluid settings alone it is {change(edge)} against the best fixed baseline.",
        (
            f"5. Where preemption recomputes, as in vLLM, rather than losing all progress, {share:.0%} of WAIT's advantage over vLLM on "
            "long decodes "
            f"vanishes ({facts['eviction_lost']:.3g} s against {facts['eviction_kept']:.3g} s at {facts['eviction_rate']:g} requests/s)."
            if facts["eviction_lost"] > 0
            else f"5. On long decodes with full memory the fluid WAIT had no advantage over vLLM under either eviction model "
            f"({-facts['eviction_lost']:.3g} s slower if all progress is lost, {-facts['eviction_kept']:.3g} s slower under recompute, "
            f"at {facts['eviction_rate']:g} requests/s)."
        ),
        "",
    ]


if __name__ == "__main__":
    sys.exit(main())
