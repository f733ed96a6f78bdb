"""``llmsched train``: an agent with stable-baselines3 on the native vector environment."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import tyro

from llmsched_agents.checkpoint import checkpoint_folder, load_checkpoint
from llmsched_agents.domain import Domain, EnvSetting
from llmsched_agents.network import Network
from llmsched_env import __version__
from llmsched_env.cli.frame import Assignments, Command, Outcome, Resumable, Screen, check_counts, words
from llmsched_env.errors import ConfigError, require
from llmsched_env.files import check_folder, check_same_settings, goes_on, write_settings
from llmsched_env.registry import is_reference
from llmsched_env.reward import make_reward

if TYPE_CHECKING:
    from llmsched_agents.hyperparameters import Hyperparameters
    from llmsched_agents.rollout_training import RolloutTraining
    from llmsched_agents.training import Training

RUN, CLONE, AGENT = "run.json", "clone", "agent"
OF_A_RUN = (RUN, CLONE, AGENT, "state.pt", "tensorboard", "rounds")
"""What a training leaves in its folder."""


@dataclass(frozen=True, kw_only=True)
class Train(Resumable):
    """Train an agent with stable-baselines3 on the native vector environment.

    Loads are shares of the fluid stability boundary of each scenario on its engine. An episode runs in one setting of the grid that
    scenarios, loads, KV sizes, calibrations and bursts span; --random N draws N settings from their ranges instead (domain
    randomisation). A run that goes on with --resume ends as if it had not been interrupted. Curves: tensorboard --logdir OUT.
    """

    algo: Annotated[str, tyro.conf.arg(metavar="NAME")] = "ppo"
    """Algorithm: ppo, maskable-ppo, a2c, dqn or paired-rollouts."""
    entry: Annotated[str, tyro.conf.arg(metavar="NAME")] = "peak"
    """Entry of the YAML file that --hyperparams names."""
    hyperparams: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: the shipped one of --algo)")] = None
    """YAML file in rl_zoo3's form."""
    set: Assignments = ()
    """Changes of that entry, such as n_epochs=2 or recipe.hold=32; values as in YAML."""
    scenarios: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]")] = ("azure-conv",)
    """Scenarios that ship, are registered or offered by a package, or .toml files; A+B: one of them in every episode."""
    loads: Annotated[tuple[float, ...], tyro.conf.arg(metavar="X [X ...]")] = (0.7, 0.8, 0.9)
    """Shares of the stability boundary."""
    kv: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N [N ...]", help_behavior_hint="(default: each scenario's)")] = ()
    """KV blocks."""
    calibrations: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]", help_behavior_hint="(default: each scenario's)")] = ()
    """Iteration-time models."""
    bursts: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]", help_behavior_hint="(default: each scenario's)")] = ()
    """Arrivals: poisson, gamma-CV or mmpp."""
    random: Annotated[int, tyro.conf.arg(metavar="N", help_behavior_hint="(default: the whole grid)")] = 0
    """Draw N random settings from these ranges."""
    reward: Annotated[str, tyro.conf.arg(metavar="REWARD")] = "latency"
    """latency, throughput, slo_goodput[:TTFT,TPOT] in seconds; or a compiled one: a registered name, or module:attribute."""
    seed: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """Seed of everything that is drawn."""
    total_timesteps: Annotated[float | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: the entry's n_timesteps)")] = None
    """Decisions in all."""
    from_clone: Annotated[str | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="(default: none)")] = None
    """A checkpoint to start from and to be pulled towards."""
    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
    """Where the run goes: its state, curves and the agent."""
    save_every: Annotated[float, tyro.conf.arg(metavar="STEPS")] = 500_000
    """Least number of steps between two saves."""
    threads: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: all)")] = None
    """Threads of the environment and of PyTorch."""
    name: Annotated[str, tyro.conf.arg(metavar="NAME")] = "agent"
    """Name of the agent, in tables."""
    no_tensorboard: bool = False
    """Write no curves."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A training, fully checked.

    Attributes:
        reward: as ``make_reward`` takes it.
        clone: the network to start from.
        resumed: the run in ``--out`` goes on.
    """

    domain: Domain
    settings: list[EnvSetting]
    hyper: Hyperparameters
    reward: Any
    clone: Network | None
    resumed: bool
    description: Mapping[str, Any] = field(default_factory=dict)


def parse_change(pair: str) -> tuple[str, Any]:
    """``KEY=VALUE`` with the value as YAML reads it.

    Raises:
        ConfigError: not of that form.
    """
    yaml = require("yaml", "agents")
    key, equals, text = pair.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {pair!r}: must be KEY=VALUE, such as n_epochs=2")
    try:
        return key, yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {key}: {text!r} is not a YAML value ({error})") from error


def parse_reward(text: str) -> Any:
    """A name or ``module:attribute``, or a name with limits in seconds after a colon, as ``make_reward`` takes it.

    Raises:
        ConfigError: neither, or a reward that cannot be made.
    """
    name, colon, limits = text.partition(":")
    reward: Any = text
    if colon and not is_reference(text):
        try:
            ttft, tpot = (float(x) for x in limits.split(","))
        except ValueError:
            raise ConfigError(f"--reward {text!r}: must be NAME, slo_goodput:TTFT,TPOT or module:attribute") from None
        reward = {"name": name, "ttft": ttft, "tpot": tpot}
    make_reward(reward)
    return reward


def clone_of(options: Train, resumed: bool) -> Path | None:
    """The checkpoint to start from: the copy that the run keeps where it goes on.

    Raises:
        ConfigError: it lies in the folder that ``--overwrite`` clears.
    """
    if options.from_clone is None:
        return None
    folder = checkpoint_folder(options.from_clone)
    if options.overwrite and folder.resolve().is_relative_to(options.out.resolve()):
        raise ConfigError(f"--from-clone: {folder} lies in --out, which --overwrite clears; must be elsewhere")
    return options.out / CLONE if resumed else folder


def plan(options: Train) -> Plan:
    """The run that the options describe; nothing is written.

    Raises:
        ConfigError: an option refused.
    """
    from llmsched_agents.hyperparameters import read_hyperparameters  # imports torch

    check_counts(threads=options.threads)
    if options.random < 0:
        raise ConfigError(f"--random: {options.random}, must be >= 0")
    check_folder("--out", options.out)
    there = (options.out / RUN).exists()
    resumed = goes_on(options.out, there, resume=options.resume, overwrite=options.overwrite, what="a run")
    reward = parse_reward(options.reward)
    pairs = words(options.set)
    changes = dict(parse_change(pair) for pair in pairs)
    if options.total_timesteps is not None:
        changes["n_timesteps"] = options.total_timesteps
    domain = Domain(options.scenarios, options.loads, options.kv, options.calibrations, options.bursts)
    settings = domain.sample(options.random, np.random.default_rng(options.seed)) if options.random else domain.grid()
    if not settings:
        raise ConfigError("--scenarios, --loads: none given, must be at least one")
    clone, folder = None, clone_of(options, resumed)
    if folder is not None:
        agent = load_checkpoint(folder, settings[0].setting)
        clone = agent.network
        changes["recipe"] = agent.recipe.as_dict()
        changes["policy_kwargs"] = {"net_arch": [int(weight.shape[0]) for weight, _ in clone.layers]}
    hyper = read_hyperparameters(options.algo, options.entry, options.hyperparams, changes)
    description = {
        "version": __version__,
        "algo": options.algo,
        "entry": options.entry,
        "set": pairs,
        "domain": domain.describe(),
        "random": options.random,
        "reward": options.reward,
        "seed": options.seed,
        "n_timesteps": hyper.n_timesteps,
        "save_every": options.save_every,
        "from_clone": options.from_clone is not None,
    }
    if resumed:
        check_same_settings(options.out / RUN, description)
    return Plan(domain, settings, hyper, reward, clone, resumed, description)


def training_of(options: Train, plan: Plan, report: Callable[[str, int, int], None]) -> Training | RolloutTraining:
    """The training, at the last save of the run that goes on.

    Raises:
        ConfigError: hyper-parameters that are refused, or a save of another run.
    """
    from llmsched_agents.rollout_training import RolloutTraining  # import torch
    from llmsched_agents.training import STATE, Training

    common: dict[str, Any] = {
        "seed": options.seed,
        "reward": plan.reward,
        "threads": options.threads,
        "name": options.name,
        "report": report,
    }
    training: Training | RolloutTraining
    if options.algo == "paired-rollouts":
        training = RolloutTraining(plan.hyper, plan.settings, plan.domain, options.out, **common)
    else:
        common |= {"clone": plan.clone, "stage_steps": int(options.save_every), "tensorboard": not options.no_tensorboard}
        training = Training(options.algo, plan.hyper, plan.settings, plan.domain, options.out, **common)
    if plan.resumed and (options.out / STATE).exists():
        training.restore()
    return training


def prepare_folder(options: Train, plan: Plan) -> None:
    """Clear what ``--overwrite`` discards, and write down what the run is."""
    if options.overwrite:
        for path in (options.out / name for name in OF_A_RUN):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    write_settings(options.out / RUN, plan.description)
    if options.from_clone is not None:
        shutil.copytree(checkpoint_folder(options.from_clone), options.out / CLONE, dirs_exist_ok=True)


def run(options: Train, screen: Screen) -> Outcome:
    """Train until all decisions are made; saves on the way are what --resume goes on from."""
    # Before torch is imported: threads that wait for each other in a busy loop take the processor from those that compute.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    for module in ("torch", "stable_baselines3", "sb3_contrib", "safetensors", "yaml"):
        require(module, "agents")
    if not options.no_tensorboard:
        require("tensorboard", "agents")
    planned = plan(options)
    with screen.progress(1) as bar:

        def report(line: str, done: int, total: int) -> None:
            screen.say(line)
            bar.show("training", done, total)

        training = training_of(options, planned, report)
        if not planned.resumed:
            prepare_folder(options, planned)
        done = training.run()
    share = 100 * done.env_seconds / max(done.seconds, 1e-9)
    unit = "states" if options.algo == "paired-rollouts" else "steps"
    agent = options.out / AGENT
    screen.print(f"{done.steps:,} {unit} in {done.seconds:.1f} s, {share:.0f} % of them in the environments. Agent: {agent}")
    return Outcome({"agent": agent, "progress": done})


COMMAND = Command("train", Train, run, "train an agent")
main = COMMAND.main
