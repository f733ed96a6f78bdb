"""Train an agent with stable-baselines3 on the native vector environment.

    python scripts/train.py --algo ppo --entry peak --scenarios azure-conv --loads 0.8 0.9 1.0 --kv 2816 --seed 0 --out runs/peak-0
    python scripts/train.py ... --resume           # goes on after an interruption, as if there had been none
    python scripts/train.py --algo paired-rollouts --entry generalist --scenarios azure-conv sharegpt --random 256 --out runs/g
    python scripts/train.py --algo maskable-ppo --entry clone --from-clone runs/clone --out runs/tuned

Loads are shares of the fluid stability boundary of each scenario on its engine. ``--random N`` draws N
settings from the ranges named (domain randomisation) in place of their grid. Curves: tensorboard --logdir OUT.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Threads that wait for each other in a busy loop take the processor from those that compute.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np

from llmsched_env import __version__
from llmsched_env.errors import ConfigError, MissingExtraError, require
from llmsched_env.files import check_folder

INTERRUPTED = 130


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--algo", default="ppo", help="ppo, maskable-ppo, a2c, dqn or paired-rollouts")
    parser.add_argument("--entry", default="peak", help="entry of the YAML file")
    parser.add_argument("--hyperparams", type=Path, help="YAML file in rl_zoo3's form (default: agents/hyperparams/ALGO.yml)")
    parser.add_argument("--set", dest="changes", nargs="+", default=[], metavar="KEY=VALUE", help="such as n_epochs=2 or recipe.hold=32")
    parser.add_argument("--scenarios", nargs="+", default=["azure-conv"])
    parser.add_argument("--loads", nargs="+", type=float, default=[0.7, 0.8, 0.9], help="shares of the stability boundary")
    parser.add_argument("--kv", nargs="+", type=int, default=[], help="KV blocks (default: each scenario's)")
    parser.add_argument("--calibrations", nargs="+", default=[], help="iteration-time models (default: each scenario's)")
    parser.add_argument("--bursts", nargs="+", default=[], help="poisson, gamma-CV, mmpp (default: each scenario's)")
    parser.add_argument("--random", type=int, default=0, metavar="N", help="N random settings from these ranges")
    parser.add_argument("--reward", default="latency", help="latency, throughput, or slo_goodput[:TTFT,TPOT] in seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--total-timesteps", type=float, help="decisions in all (default: the entry's n_timesteps)")
    parser.add_argument("--from-clone", type=Path, metavar="FOLDER", help="a checkpoint to start from and to be pulled towards")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--save-every", type=float, default=500_000, metavar="STEPS", help="least number of steps between two saves")
    parser.add_argument("--threads", type=int, help="threads (default: all)")
    parser.add_argument("--name", default="agent", help="of the agent, in tables")
    parser.add_argument("--no-tensorboard", action="store_true")
    parser.add_argument("--quiet", action="store_true", help="no line for each rollout")
    return parser


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
    """A name, with limits in seconds after a colon for ``slo_goodput``."""
    name, colon, limits = text.partition(":")
    if not colon:
        return name
    try:
        ttft, tpot = (float(x) for x in limits.split(","))
    except ValueError:
        raise ConfigError(f"--reward {text!r}: must be NAME or slo_goodput:TTFT,TPOT") from None
    return {"name": name, "ttft": ttft, "tpot": tpot}


def prepare(options: argparse.Namespace) -> Any:
    """The run that the options describe.

    Raises:
        ConfigError: an option refused; nothing has been written then.
        MissingExtraError: a package of the extra ``agents`` is not installed.
    """
    for module in ("torch", "stable_baselines3", "sb3_contrib", "safetensors", "yaml"):
        require(module, "agents")
    if not options.no_tensorboard:
        require("tensorboard", "agents")
    from llmsched_agents.checkpoint import load_checkpoint
    from llmsched_agents.domain import Domain
    from llmsched_agents.hyperparameters import read_hyperparameters
    from llmsched_agents.rollout_training import RolloutTraining
    from llmsched_agents.training import Training, check_same_run, write_run

    check_folder("--out", options.out)
    changes = dict(parse_change(pair) for pair in options.changes)
    if options.total_timesteps is not None:
        changes["n_timesteps"] = options.total_timesteps
    clone = None
    domain = Domain(
        tuple(options.scenarios), tuple(options.loads), tuple(options.kv), tuple(options.calibrations), tuple(options.bursts)
    )
    settings = domain.sample(options.random, np.random.default_rng(options.seed)) if options.random else domain.grid()
    if options.from_clone is not None:
        kept = options.out / "clone" if options.resume else options.from_clone
        agent = load_checkpoint(kept, settings[0].setting)
        clone = agent.network
        changes["recipe"] = agent.recipe.as_dict()
        changes["policy_kwargs"] = {"net_arch": [int(weight.shape[0]) for weight, _ in clone.layers]}
    hyper = read_hyperparameters(options.algo, options.entry, options.hyperparams, changes)
    description = {
        "version": __version__,
        "algo": options.algo,
        "entry": options.entry,
        "set": options.changes,
        "domain": domain.describe(),
        "random": options.random,
        "reward": options.reward,
        "seed": options.seed,
        "n_timesteps": hyper.n_timesteps,
        "save_every": options.save_every,
        "from_clone": options.from_clone is not None,
    }
    if options.resume:
        check_same_run(options.out, description)
    elif (options.out / "run.json").exists():
        raise ConfigError(f"--out: {options.out} holds a run already; --resume goes on with it, or choose another folder")
    common: dict[str, Any] = {
        "seed": options.seed,
        "reward": parse_reward(options.reward),
        "threads": options.threads,
        "name": options.name,
        "report": None if options.quiet else lambda line: print(line, file=sys.stderr, flush=True),
    }
    training: Training | RolloutTraining
    if options.algo == "paired-rollouts":
        training = RolloutTraining(hyper, settings, domain, options.out, **common)
    else:
        training = Training(
            options.algo, hyper, settings, domain, options.out, clone=clone, stage_steps=int(options.save_every),
            tensorboard=not options.no_tensorboard, **common,
        )  # fmt: skip
    if options.resume:
        if (options.out / "state.pt").exists():
            training.restore()
    else:
        write_run(options.out, description)
        if options.from_clone is not None:
            import shutil

            shutil.copytree(options.from_clone, options.out / "clone", dirs_exist_ok=True)
    return training


def main(words: Sequence[str] | None = None) -> int:
    options = arguments().parse_args(words)
    try:
        training = prepare(options)
    except (ConfigError, MissingExtraError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        done = training.run()
    except KeyboardInterrupt:
        print(f"Interrupted. Go on with --resume; the last save is in {options.out}.", file=sys.stderr)
        return INTERRUPTED
    share = 100 * done.env_seconds / max(done.seconds, 1e-9)
    unit = "states" if options.algo == "paired-rollouts" else "steps"
    print(f"{done.steps:,} {unit} in {done.seconds:.1f} s, {share:.0f} % of them in the environments. Agent: {options.out / 'agent'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
