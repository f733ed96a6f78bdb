"""One policy object, three backends: the simulator, vLLM's scheduler, and a real vLLM engine.

    python scripts/swap_backends.py

Runs the same ``nested-wait`` object and the same torch network with random weights on each backend
and prints one summary a backend for both. Under the virtual clock (the default) every iteration
must be the same on all of them: which requests, how many tokens of each, when, and what was
preempted. The program says so, or fails at the first difference. With ``--clock measured`` the real engine's own
times rule and the summaries are only shown. Needs vLLM (``make setup-vllm``) and torch, which vLLM brings.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium.wrappers import FlattenObservation

from llmsched_baselines import Policy, Setting, make_policy
from llmsched_env import LLMSchedEnv
from llmsched_env.backend import Backend, View
from llmsched_env.backends import make_backend
from llmsched_env.cli.parser import Parser
from llmsched_env.engine_changes import engine_with
from llmsched_env.errors import ConfigError, MissingExtraError, require
from llmsched_env.metrics import Summary, summarize
from llmsched_env.runner import run_episode
from llmsched_env.types import EngineConfig, IterationReport, RequestLog
from llmsched_env.workload import Scenario, load_scenario, scenario_names

BACKENDS = ("sim", "vllm-scheduler", "vllm")
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


def arguments() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(scenario_names())
    parser.add_argument("--scenario", default="azure-conv", metavar="NAME", help=f"one of {names} (default: azure-conv)")
    parser.add_argument("--rate", type=float, default=6.0, metavar="R", help="requests/s (default: 6)")
    parser.add_argument("--requests", type=int, default=30, metavar="N", help="requests an episode (default: 30)")
    parser.add_argument("--num-blocks", type=int, default=480, metavar="N", help="KV blocks; few, so that memory runs out (default: 480)")
    parser.add_argument("--model", default="tiny", help="tiny, the name of a shape, a Hugging Face id or a folder (default: tiny)")
    parser.add_argument("--clock", choices=("virtual", "measured", "wall"), default="virtual", help="of the real engine (default: virtual)")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS), metavar="NAME", help=f"of {', '.join(BACKENDS)}")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of workload, network and sampling (default: 0)")
    return parser


class RandomNetwork:
    """A small network with random weights over the flattened observation; illegal actions are masked.

    Args:
        num_inputs: length of the flattened observation.
        sizes: values of each component of the ``MultiDiscrete`` action.
    """

    name = "torch (random weights)"

    def __init__(self, num_inputs: int, sizes: Sequence[int], seed: int) -> None:
        self._torch = torch = require("torch", "agents")
        torch.manual_seed(seed)
        self._sizes = [int(size) for size in sizes]
        self._layers = torch.nn.Sequential(
            torch.nn.Linear(num_inputs, 64),
            torch.nn.Tanh(),
            torch.nn.Linear(64, 64),
            torch.nn.Tanh(),
            torch.nn.Linear(64, sum(self._sizes)),
        )
        self._generator = torch.Generator()
        self._seed = seed
        self.reset()

    def reset(self) -> None:
        """The same stream of samples for every episode."""
        self._generator.manual_seed(self._seed)

    def act(self, observation: npt.NDArray[np.float32], mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        """A legal action, sampled component by component."""
        torch = self._torch
        with torch.no_grad():
            logits = self._layers(torch.from_numpy(observation)).masked_fill(~torch.from_numpy(mask), -torch.inf)
            parts = [torch.softmax(part, 0) for part in torch.split(logits, self._sizes)]
            return np.array([int(torch.multinomial(part, 1, generator=self._generator)) for part in parts], dtype=np.int64)


class Schedule:
    """A digest of every step: its report, and the tokens of each request in it."""

    def __init__(self, backend: Backend) -> None:
        self._backend: Any = backend
        self._digest = hashlib.sha256()
        self.steps = 0
        self.batches = 0

    def add(self, report: IterationReport, view: View | None = None) -> None:
        self.steps += 1
        self._digest.update(repr(report).encode())
        if not report.idle:
            self.batches += 1
            for values in self._backend.scheduled():
                self._digest.update(values.tobytes())

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Outcome:
    """One episode.

    Attributes:
        schedule: digest of all steps.
    """

    log: RequestLog
    summary: Summary
    schedule: str
    steps: int


def backend_config(name: str, options: argparse.Namespace) -> dict[str, Any]:
    real = {"model": options.model, "clock": options.clock} if name == "vllm" else {}
    return {"trace": True, **real}


def run_expert(policy: Policy, name: str, scenario: Scenario, options: argparse.Namespace) -> Outcome:
    """The expert decides from the view that every backend keeps."""
    backend = make_backend(name, **backend_config(name, options))
    schedule = Schedule(backend)
    try:
        workload = scenario.generate(options.seed, rate=options.rate, num_requests=options.requests)
        result = run_episode(policy, workload, backend=backend, on_step=schedule.add)
    finally:
        backend.close()
    return Outcome(result.log, result.summary, schedule.hexdigest(), schedule.steps)


def run_network(network: RandomNetwork, name: str, scenario: Scenario, engine: EngineConfig, options: argparse.Namespace) -> Outcome:
    """The network acts on observation and mask of the environment."""
    env = environment(name, scenario, engine, options)
    backend: Any = env.backend
    schedule = Schedule(backend)
    flat = FlattenObservation(env)
    try:
        network.reset()
        observation, info = flat.reset(seed=options.seed)
        done = False
        while not done:
            observation, _, terminated, truncated, info = flat.step(network.act(observation, info["action_mask"]))
            schedule.add(backend.report())
            done = terminated or truncated
        log = backend.log()
        summary = summarize(log, backend.counters(), kv_capacity=engine.kv_capacity)
    finally:
        env.close()
    return Outcome(log, summary, schedule.hexdigest(), schedule.steps)


def environment(name: str, scenario: Scenario, engine: EngineConfig, options: argparse.Namespace) -> LLMSchedEnv:
    return LLMSchedEnv(
        scenario,
        rate=options.rate,
        num_requests=options.requests,
        engine=engine,
        backend=name,
        backend_config=backend_config(name, options),
    )


def new_network(scenario: Scenario, engine: EngineConfig, options: argparse.Namespace) -> RandomNetwork:
    env = environment("sim", scenario, engine, options)
    sizes = env.action_space.nvec  # type: ignore[attr-defined]
    inputs = FlattenObservation(env).observation_space.shape
    env.close()
    assert inputs is not None
    return RandomNetwork(inputs[0], sizes, options.seed)


def print_table(policy: str, outcomes: dict[str, Outcome]) -> None:
    rows = [["backend", *(title for title, _, _ in COLUMNS)]]
    for name, outcome in outcomes.items():
        rows.append([name, *(format(getattr(outcome.summary, field), form) for _, field, form in COLUMNS)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    print(f"\n{policy}")
    for row in rows:
        print("  " + "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))))


class Difference(Exception):
    """Two backends did not do the same."""


def check_identical(policy: str, outcomes: dict[str, Outcome]) -> None:
    """Every step, log and summary of every backend against the first.

    Raises:
        Difference: naming the policy and the backends.
    """
    (first, reference), *others = outcomes.items()
    for name, outcome in others:
        times = ("admitted", "first_token", "completed", "evictions", "forced_evictions")
        same_log = all(np.array_equal(getattr(reference.log, t), getattr(outcome.log, t), equal_nan=True) for t in times)
        if outcome.schedule != reference.schedule or not same_log or repr(outcome.summary) != repr(reference.summary):
            steps = f"{reference.steps} and {outcome.steps} steps"
            raise Difference(f"{policy}: {first} and {name} did not schedule the same ({steps})")
    print(f"  {reference.steps} steps, identical on {', '.join(outcomes)}: requests, tokens, preemptions and times of every iteration")


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments().parse_args(argv)
    try:
        scenario = load_scenario(options.scenario)
        engine = engine_with(scenario.engine, {"num_blocks": options.num_blocks})
        setting = Setting(scenario.statistics, options.rate, scenario.engine, overrides={"num_blocks": options.num_blocks})
        expert = make_policy("nested-wait", setting, overload=True)
        network = new_network(scenario, engine, options)
        results = {
            expert.name: {name: run_expert(expert, name, scenario, options) for name in options.backends},
            network.name: {name: run_network(network, name, scenario, engine, options) for name in options.backends},
        }
    except (ConfigError, MissingExtraError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    comparable = len(options.backends) > 1 and (options.clock == "virtual" or "vllm" not in options.backends)
    try:
        for policy, outcomes in results.items():
            print_table(policy, outcomes)
            if comparable:
                check_identical(policy, outcomes)
    except Difference as difference:
        print(f"error: {difference}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
