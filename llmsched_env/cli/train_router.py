"""``llmsched train-router``: the learned router of a cluster, by an evolution strategy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from llmsched_agents.router_agent import RouterNetwork, load_router, read_router_record
from llmsched_agents.router_episodes import RouterTraining
from llmsched_agents.router_training import OF_A_TRAINING, STATE, RouterTrainer
from llmsched_env.bench.router_tuning import tuned_options
from llmsched_env.cli.frame import Command, Outcome, Resumable, Screen
from llmsched_env.errors import ConfigError, require
from llmsched_env.files import check_folder, goes_on

DEFAULT = RouterTraining()
REFERENCE = "prefix-affinity"


@dataclass(frozen=True, kw_only=True)
class TrainRouter(Resumable):
    """Train a router for clusters by an evolution strategy on whole episodes.

    All candidates of a generation route the same calls; the objective is mean latency and SLO misses over those of prefix-affinity as it is
    tuned. The best router so far lies in --out at all times; Ctrl-C keeps it, and --resume goes on where the training was, to the same
    weights as if it had not been interrupted. One process, one core.
    """

    scenarios: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]")] = DEFAULT.scenarios
    """Scenarios of a cluster; one that is named twice counts twice."""
    seconds: Annotated[float, tyro.conf.arg(metavar="S")] = DEFAULT.seconds
    """In which sessions begin, of one episode."""
    loads: Annotated[tuple[float, float], tyro.conf.arg(metavar="LOW HIGH")] = DEFAULT.loads
    """Shares of a scenario's rate; drawn for each episode."""
    replicas: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N [N ...]")] = DEFAULT.replicas
    """Numbers of replicas to draw from."""
    first_generations: Annotated[int, tyro.conf.arg(metavar="N")] = DEFAULT.first_generations
    """By CMA-ES, with the hidden layer as drawn."""
    generations: Annotated[int, tyro.conf.arg(metavar="N")] = DEFAULT.generations
    """After them, of all weights by sep-CMA-ES."""
    population: Annotated[int, tyro.conf.arg(metavar="N")] = DEFAULT.population
    """Candidates in a generation."""
    sigma: Annotated[float, tyro.conf.arg(metavar="X")] = DEFAULT.sigma
    """Standard deviation to begin with."""
    miss_weight: Annotated[float, tyro.conf.arg(metavar="X")] = DEFAULT.miss_weight
    """Of the logarithm of SLO misses beside that of mean latency."""
    hidden: Annotated[int, tyro.conf.arg(metavar="N")] = DEFAULT.hidden
    """Hidden units of the network."""
    validation: Annotated[int, tyro.conf.arg(metavar="N")] = DEFAULT.validation
    """Episodes of each scenario on which the best router is chosen."""
    seed: Annotated[int, tyro.conf.arg(metavar="N")] = DEFAULT.seed
    """Seed of everything that is drawn."""
    start: Annotated[str | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="(default: the cost's own weights)")] = None
    """A router to start from."""
    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
    """Where the router and the state of the training go."""


def plan(options: TrainRouter) -> tuple[RouterTraining, RouterNetwork | None]:
    """The training that the options describe, and where it starts; nothing is written.

    Raises:
        ConfigError: an option refused.
    """
    check_folder("--out", options.out)
    start = None if options.start is None else load_router(options.start)
    training = RouterTraining(
        scenarios=options.scenarios,
        seconds=options.seconds,
        loads=options.loads,
        replicas=options.replicas,
        first_generations=options.first_generations,
        generations=options.generations,
        population=options.population,
        sigma=options.sigma,
        miss_weight=options.miss_weight,
        hidden=options.hidden if start is None else start.hidden_bias.size,
        validation=options.validation,
        seed=options.seed,
        reference=REFERENCE,
        reference_options={name: tuned_options(REFERENCE, name) for name in options.scenarios},
    )
    if options.overwrite and options.start is not None and Path(options.start).resolve() == options.out.resolve():
        raise ConfigError(f"--start: {options.start} is --out, which --overwrite clears; must be elsewhere")
    return training, start


def run(options: TrainRouter, screen: Screen) -> Outcome:
    """Train until all generations are done."""
    for module in ("cmaes", "safetensors"):
        require(module, "agents")
    training, start = plan(options)
    goes_on(options.out, (options.out / STATE).exists(), resume=options.resume, overwrite=options.overwrite, what="a training")
    if options.overwrite:
        for name in OF_A_TRAINING:
            (options.out / name).unlink(missing_ok=True)
    with screen.progress(1) as bar:

        def report(line: str, done: int, total: int) -> None:
            screen.say(line)
            bar.show("training", done, total)

        lineage = None if options.start is None else read_router_record(options.start)
        trainer = RouterTrainer(training, options.out, report, start, lineage)
        trainer.run()
    trials = trainer.progress.trials
    least = min(value for _, value in trials)
    screen.print(
        f"{len(trainer.progress.values)} generations in {trainer.progress.seconds:.1f} s. Objective on the validation episodes: "
        f"{trials[0][1]:+.4f} at the start, {least:+.4f} at best (0: {REFERENCE}, tuned). Router: {options.out}"
    )
    return Outcome({"router": options.out, "trials": trials, "seconds": trainer.progress.seconds})


COMMAND = Command("train-router", TrainRouter, run, "train a router for clusters")
main = COMMAND.main
