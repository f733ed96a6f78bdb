"""``llmsched swap-backends``: one policy object, three backends: the simulator, vLLM's scheduler, a real vLLM engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from llmsched_baselines import Setting, make_policy
from llmsched_env.cli.frame import DONE, FAILED, Command, Options, Outcome, Screen, check_counts
from llmsched_env.engine_changes import engine_with
from llmsched_env.errors import ConfigError, require
from llmsched_env.workload import load_scenario
from llmsched_hardware.real_engine import least_block_size, load_vllm
from llmsched_hardware.swap import Episode, Swap, difference
from llmsched_hardware.validation import SIM
from llmsched_hardware.validation_runs import Clock
from llmsched_hardware.versions import check_version

BackendName = Literal["sim", "vllm-scheduler", "vllm"]
BACKENDS: tuple[BackendName, ...] = ("sim", "vllm-scheduler", "vllm")
COLUMNS = (
    ("completed", "completed", "d"),
    ("tokens/s", "throughput_tok_s", ".1f"),
    ("latency mean (s)", "latency_mean", ".3f"),
    ("p99", "latency_p99", ".3f"),
    ("TTFT mean (s)", "ttft_mean", ".4f"),
    ("TPOT mean (s)", "tpot_mean", ".5f"),
    ("evictions", "evictions", "d"),
    ("iterations", "iterations", "d"),
)


@dataclass(frozen=True, kw_only=True)
class SwapBackends(Options):
    """Run one policy object on the simulator, on vLLM's scheduler and on a real vLLM engine.

    Runs the same nested-wait object and the same torch network with random weights on each backend and prints one summary a backend
    for both. Under the virtual clock every iteration must be the same on all of them: which requests, how many tokens of each, when,
    and what was preempted. The program says so, or ends with exit code 1 at the first difference. Under another clock the real engine's
    own times rule and the summaries are only shown. Needs vLLM and torch, which vLLM brings.
    """

    scenario: Annotated[str, tyro.conf.arg(metavar="NAME")] = "azure-conv"
    """A scenario that ships, is registered or offered by a package, or a .toml file."""
    rate: Annotated[float, tyro.conf.arg(metavar="R")] = 6.0
    """Requests/s."""
    requests: Annotated[int, tyro.conf.arg(metavar="N")] = 30
    """Requests an episode."""
    num_blocks: Annotated[int, tyro.conf.arg(metavar="N")] = 480
    """KV blocks; few, so that memory runs out."""
    model: Annotated[str, tyro.conf.arg(metavar="MODEL")] = "tiny"
    """tiny, the name of another shape, a Hugging Face id or a folder."""
    clock: Clock = "virtual"
    """Where the real engine's times come from: its own steps, the calibration, or real time with real sleeping."""
    backends: Annotated[tuple[BackendName, ...], tyro.conf.arg(metavar="BACKEND [BACKEND ...]")] = BACKENDS
    """Where to run: sim, vllm-scheduler, vllm. The first one is what the others are compared with."""
    seed: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """Seed of workload, network and sampling."""


def print_table(policy: str, episodes: Mapping[str, Episode], screen: Screen) -> None:
    rows = [["backend", *(title for title, _, _ in COLUMNS)]]
    for name, episode in episodes.items():
        rows.append([name, *(format(getattr(episode.summary, field), form) for _, field, form in COLUMNS)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    screen.print(f"\n{policy}")
    for row in rows:
        cells = (cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        screen.print("  " + "  ".join(cells))


def run(options: SwapBackends, screen: Screen) -> Outcome:
    """Both policies on all backends; where the clock is the same on all, they must agree."""
    check_counts(requests=options.requests, num_blocks=options.num_blocks)
    if not options.backends:
        raise ConfigError("--backends: none given, must be at least one")
    backends = tuple(dict.fromkeys(options.backends))
    if any(name != SIM for name in backends):
        check_version()  # before torch is asked for, which vLLM brings
    for module in ("rich.progress", "rich.console"):
        require(module, "cli")
    scenario = load_scenario(options.scenario)
    blocks = {"num_blocks": options.num_blocks}
    if "vllm" in backends:  # attention on this machine may take larger blocks alone; all backends then have the same
        load_vllm()
        blocks["block_size"] = max(scenario.engine.block_size, least_block_size())
    engine = engine_with(scenario.engine, blocks)
    setting = Setting(scenario.statistics, options.rate, scenario.engine, overrides=blocks)
    expert = make_policy("nested-wait", setting, overload=True)
    swap = Swap(scenario, engine, options.rate, options.requests, options.model, options.clock, options.seed)
    network = swap.network()
    results: dict[str, dict[str, Episode]] = {expert.name: {}, network.name: {}}
    with screen.progress(2 * len(backends)) as bar:
        for name in backends:
            bar.show(f"{expert.name} on {name}")
            results[expert.name][name] = swap.run_expert(expert, name)
            bar.advance(description=f"{network.name} on {name}")
            results[network.name][name] = swap.run_network(network, name)
            bar.advance()
    comparable = len(backends) > 1 and (options.clock == "virtual" or "vllm" not in backends)
    code, found = DONE, []
    for policy, episodes in results.items():
        if not options.quiet:
            print_table(policy, episodes, screen)
        apart = difference(episodes) if comparable else ""
        found += [{"policy": policy, "backend": name, "steps": e.steps, "figures": e.summary} for name, e in episodes.items()]
        if apart:
            screen.note(f"error: {policy}: {apart}")
            code = FAILED
            break
        if comparable:
            steps = next(iter(episodes.values())).steps
            names = ", ".join(episodes)
            screen.print(f"  {steps} steps, identical on {names}: requests, tokens, preemptions and times of every iteration")
    return Outcome(found, code)


COMMAND = Command("swap-backends", SwapBackends, run, "one policy object on the simulator and on vLLM")
main = COMMAND.main
