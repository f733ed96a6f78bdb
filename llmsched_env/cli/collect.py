"""Record an expert's decisions, and clone it.

    python scripts/collect.py --expert reserve --set policy.theta=1.1 --loads 0.8 0.9 --kv 2816 --episodes 20 --out demos/reserve
    python scripts/collect.py ... --clone runs/clone --dagger 2     # behaviour cloning, then two rounds of DAgger
    python scripts/collect.py ... --minari llmsched/reserve-v0      # a Minari data set of the same episodes

One file an episode: what is there already is kept, so the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmsched_baselines import Policy, Setting, make_policy, policy_names
from llmsched_baselines.overrides import Overrides, parse_overrides
from llmsched_env import __version__
from llmsched_env.errors import ConfigError, MissingExtraError, require
from llmsched_env.files import check_folder

INTERRUPTED = 130


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--expert", required=True, help=f"one of {', '.join(policy_names())}")
    parser.add_argument("--set", dest="pairs", nargs="+", default=[], metavar="KEY=VALUE", help="policy.OPTION and engine.FIELD")
    parser.add_argument("--scenario", default="azure-conv")
    parser.add_argument("--loads", nargs="+", type=float, default=[0.7, 0.8, 0.9], help="shares of the stability boundary, in turn")
    parser.add_argument("--kv", type=int, help="KV blocks (default: the scenario's)")
    parser.add_argument("--episodes", type=int, default=12)
    parser.add_argument("--num-requests", type=int, default=500, help="requests of an episode")
    parser.add_argument("--seed", type=int, default=100_000, help="of the first episode; the others count up")
    parser.add_argument("--max-admit", type=int, default=16, help="largest count in an action")
    parser.add_argument("--no-features", action="store_true", help="the environment's observation alone")
    parser.add_argument("--out", type=Path, required=True, help="folder of the recordings")
    parser.add_argument("--clone", type=Path, metavar="FOLDER", help="fit a policy and write it there as a checkpoint")
    parser.add_argument("--net-arch", nargs="+", type=int, default=[64, 64], help="hidden layers of the clone")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--dagger", type=int, default=0, metavar="ROUNDS", help="the clone acts, the expert labels, fit again")
    parser.add_argument("--minari", metavar="ID", help="write a Minari data set, such as llmsched/reserve-v0")
    parser.add_argument("--quiet", action="store_true")
    return parser


class Collector:
    """Episodes of one expert at some loads, and what is made of them.

    Raises:
        ConfigError: an option refused.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        from llmsched_agents.demonstrations import expert_recipe
        from llmsched_agents.domain import Domain

        self.options = options
        for name, least in (("episodes", 1), ("num_requests", 1), ("dagger", 0), ("epochs", 1)):
            if getattr(options, name) < least:
                raise ConfigError(f"--{name.replace('_', '-')}: {getattr(options, name)}, must be >= {least}")
        self.overrides: Overrides = parse_overrides(options.pairs, [options.expert])
        self.domain = Domain((options.scenario,), tuple(options.loads), (options.kv,) if options.kv else ())
        self.settings = self.domain.grid()
        self.experts = [self.expert(i) for i in range(len(self.settings))]
        first = self.experts[0]
        for expert, load in zip(self.experts, options.loads, strict=True):
            if expert.layout != first.layout:
                raise ConfigError(f"--loads: {options.expert!r} keeps other queues at {load} than at {options.loads[0]}; record one load")
        self.recipe = expert_recipe(first, options.max_admit, not options.no_features)

    def expert(self, i: int) -> Policy:
        s = self.settings[i]
        seconds = self.options.num_requests / s.rate
        setting = Setting(s.scenario.statistics, s.rate, s.engine, seconds, self.overrides.engine)
        return make_policy(self.options.expert, setting, overload=True, **self.overrides.options(self.options.expert))

    def describe(self) -> dict[str, Any]:
        o = self.options
        return {
            "version": __version__,
            "expert": o.expert,
            "set": {key: list(value) if isinstance(value, tuple) else value for key, value in self.overrides.items()},
            "domain": self.domain.describe(),
            "num_requests": o.num_requests,
            "seed": o.seed,
            "recipe": self.recipe.as_dict(),
        }

    def say(self, line: str) -> None:
        if not self.options.quiet:
            print(line, file=sys.stderr, flush=True)

    def collect(self) -> Any:
        """Record what is missing; all episodes.

        Raises:
            ConfigError: the folder holds the recordings of something else, or a corrupt file.
        """
        from llmsched_agents.demonstrations import DESCRIPTION, Demonstrations, read_episode, record_episode, write_episode

        out: Path = self.options.out
        description = json.loads(json.dumps(self.describe()))
        path = out / DESCRIPTION
        if path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            for key, value in description.items():
                if kept.get(key) != value:
                    raise ConfigError(f"--out: {out} holds recordings with {key} = {kept.get(key)!r}, not {value!r}")
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
        episodes = []
        for i in range(self.options.episodes):
            file = out / f"episode-{i:05d}.npz"
            if file.exists():
                episodes.append(read_episode(file))
                continue
            which = i % len(self.settings)
            setting = self.settings[which]
            workload = setting.scenario.generate(self.options.seed + i, rate=setting.rate, num_requests=self.options.num_requests)
            episode, inexact = record_episode(self.experts[which], self.recipe, setting, workload)
            write_episode(file, episode)
            episodes.append(episode)
            lost = f", {inexact} decisions beyond the action space" if inexact else ""
            self.say(f"episode {i + 1} of {self.options.episodes}: {len(episode):,} decisions, return {episode.rewards.sum():.3f}{lost}")
        return Demonstrations.joined(episodes)

    def clone(self, data: Any) -> None:
        """Behaviour cloning, then DAgger rounds; the checkpoint is written after each."""
        from llmsched_agents.agent import Agent
        from llmsched_agents.checkpoint import save_checkpoint
        from llmsched_agents.cloning import clone_policy, fit
        from llmsched_agents.demonstrations import Demonstrations, record_episode
        from llmsched_agents.network import network_of

        o = self.options
        policy = clone_policy(data, o.net_arch, self.recipe.layout.num_queues if self.recipe.layout else 1, o.max_admit, seed=o.seed)
        rounds: list[dict[str, float]] = []
        for k in range(o.dagger + 1):
            if k > 0:
                rng = np.random.default_rng((o.seed, k))
                more = []
                for i, setting in enumerate(self.settings):
                    seed = o.seed + 10_000 * k + i
                    workload = setting.scenario.generate(seed, rate=setting.rate, num_requests=o.num_requests)
                    actor = Agent(network_of(policy), self.recipe, setting.setting, seed=seed)
                    episode, _ = record_episode(self.experts[i], self.recipe, setting, workload, actor=actor, share=0.5**k, rng=rng)
                    more.append(episode)
                data = Demonstrations.joined([data, *more])
            report = fit(policy, data, epochs=o.epochs, seed=o.seed + k, set_scale=k == 0, progress=self.say)
            rounds.append({"decisions": len(data), "loss": report.loss, "accuracy": report.accuracy, "epochs": report.epochs})
            record = {"algorithm": "dagger" if k else "behaviour cloning", "seed": o.seed, "expert": self.describe(), "rounds": rounds}
            layout = self.recipe.layout
            assert layout is not None
            save_checkpoint(
                o.clone, network_of(policy), self.recipe, self.domain, layout, name=f"{o.expert}-clone", deterministic=True, record=record
            )
            self.say(f"clone, round {k}: {100 * report.accuracy:.2f} % of held-out decisions equal the expert's ({len(data):,} decisions)")

    def export(self, data: Any) -> None:
        """A Minari data set with the flat observation and the ``MultiDiscrete`` action."""
        import gymnasium as gym

        minari = require("minari", "minari")
        from minari.data_collector import EpisodeBuffer

        from llmsched_agents.interface import component_sizes

        layout = self.recipe.layout
        assert layout is not None
        buffers = []
        for i, rows in enumerate(data.episodes()):
            observations = data.observations[rows]
            n = observations.shape[0]
            ended = np.zeros(n, dtype=np.bool_)
            ended[-1] = True
            buffers.append(
                EpisodeBuffer(
                    id=i,
                    seed=self.options.seed + i,
                    # Minari wants the observation after the last step as well: an empty engine's was not recorded.
                    observations=np.concatenate([observations, observations[-1:]]),
                    actions=data.actions[rows].astype(np.int64),
                    rewards=data.rewards[rows].astype(np.float64).tolist(),
                    terminations=ended.tolist(),
                    truncations=np.zeros(n, dtype=np.bool_).tolist(),
                )
            )
        with warnings.catch_warnings():
            # Minari asks for links to the code and for an author, which are the user's to give.
            warnings.simplefilter("ignore", UserWarning)
            minari.create_dataset_from_buffers(
                dataset_id=self.options.minari,
                buffer=buffers,
                observation_space=gym.spaces.Box(0.0, 1.0, (data.observations.shape[1],), np.float32),
                action_space=gym.spaces.MultiDiscrete(list(component_sizes(self.recipe, layout.num_queues))),
                algorithm_name=self.options.expert,
                description=json.dumps(self.describe()),
            )


def main(words: Sequence[str] | None = None) -> int:
    options = arguments().parse_args(words)
    try:
        check_folder("--out", options.out)
        if options.clone is not None:
            check_folder("--clone", options.clone)
            for module in ("torch", "stable_baselines3", "sb3_contrib", "safetensors"):
                require(module, "agents")
        if options.minari is not None:
            require("minari", "minari")
        collector = Collector(options)
        data = collector.collect()
        if options.clone is not None:
            collector.clone(data)
        if options.minari is not None:
            collector.export(data)
    except (ConfigError, MissingExtraError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on.", file=sys.stderr)
        return INTERRUPTED
    print(f"{len(data):,} decisions of {options.expert} in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
