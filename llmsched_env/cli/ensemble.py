"""Make one agent of several that were trained alike: the mean of what their networks say.

    python scripts/ensemble.py runs/a/agent runs/b/agent --out runs/both --name generalist --bonus 0.99 -1

``--bonus LEVEL LOGITS`` adds to one level's logit; after paired roll-outs a logit is one per cent of cost, so -1 takes one
per cent of their caution back.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llmsched_agents.checkpoint import load_checkpoint, read_config, read_record, save_checkpoint
from llmsched_agents.domain import Domain
from llmsched_agents.ensemble import averaged, with_bonus
from llmsched_agents.recipe import Recipe
from llmsched_env.cli.parser import Parser
from llmsched_env.errors import ConfigError, MissingExtraError
from llmsched_env.files import check_folder

OF_A_MEMBER = ("seed", "steps", "wall_seconds", "environment_seconds", "environments", "curve")


def arguments() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("agents", nargs="+", type=Path, metavar="FOLDER", help="checkpoints of one recipe")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--name", help="of the agent (default: the first one's)")
    parser.add_argument("--bonus", nargs=2, type=float, metavar=("LEVEL", "LOGITS"), help="what one level's logit gets on top")
    return parser


def combine(folders: Sequence[Path], out: Path, name: str | None, bonus: Sequence[float] | None) -> None:
    """Write the checkpoint.

    Raises:
        ConfigError: fewer than two, other recipes, or a level that is none of theirs.
    """
    if len(folders) < 2:
        raise ConfigError(f"agents: {len(folders)} given, must be at least 2")
    configs = [read_config(folder) for folder in folders]
    for folder, config in zip(folders, configs, strict=True):
        for key in ("recipe", "components", "observation", "deterministic", "trained_on"):
            if config[key] != configs[0][key]:
                raise ConfigError(f"agents: {folder} has another {key} than {folders[0]}, must be the same")
    members = [load_checkpoint(folder) for folder in folders]
    recipe = Recipe.from_dict(configs[0]["recipe"])
    network = averaged([member.network for member in members])
    if bonus is not None:
        level, logits = bonus
        if recipe.action_set not in ("peak", "reserve") or level not in recipe.choices:
            raise ConfigError(f"--bonus: level {level:g}, must be one of {', '.join(f'{x:g}' for x in recipe.choices)}")
        network = with_bonus(network, recipe.choices.index(level), logits)
    records = [read_record(folder) for folder in folders]
    record = {
        "algorithm": f"mean of {len(folders)} by {records[0]['algorithm']}",
        "bonus": None if bonus is None else {"level": bonus[0], "logits": bonus[1]},
        "wall_seconds": round(sum(r["wall_seconds"] for r in records), 1),
        "environment_seconds": round(sum(r["environment_seconds"] for r in records), 1),
        "steps": sum(r["steps"] for r in records),
        "versions": records[0]["versions"],
        "settings": records[0]["settings"],
        "members": [{key: r[key] for key in OF_A_MEMBER if key in r} for r in records],
    }
    save_checkpoint(
        out,
        network,
        recipe,
        Domain.from_dict(configs[0]["trained_on"]),
        members[0].layout,
        name=name or str(configs[0]["name"]),
        deterministic=bool(configs[0]["deterministic"]),
        record=record,
    )


def main(words: Sequence[str] | None = None) -> int:
    options = arguments().parse_args(words)
    try:
        check_folder("--out", options.out)
        combine(options.agents, options.out, options.name, options.bonus)
    except (ConfigError, MissingExtraError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"Agent: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
