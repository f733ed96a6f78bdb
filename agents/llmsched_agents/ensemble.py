"""Several trained agents as one: the mean of their networks' logits, which is a network again.

Each training's costs have errors of their own; the mean of several errs less, so a choice needs less caution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from llmsched_agents.checkpoint import checkpoint_folder, load_checkpoint, read_config, read_record, save_checkpoint
from llmsched_agents.domain import Domain
from llmsched_agents.network import Float32, Network
from llmsched_agents.recipe import Recipe
from llmsched_env import checks
from llmsched_env.errors import ConfigError

OF_A_MEMBER = ("seed", "steps", "wall_seconds", "environment_seconds", "environments", "curve")
"""What the record of an ensemble keeps of each member's."""
SHARED = ("recipe", "components", "observation", "deterministic", "trained_on")
"""What all members must have in common in their configurations."""


def combine(agents: Sequence[str], out: Path, *, name: str | None = None, bonus: tuple[float, float] | None = None) -> None:
    """Write the checkpoint of one agent made of several that were trained alike.

    Args:
        agents: names of shipped agents, or folders of checkpoints.
        name: of the new one, in tables; None for the first one's.
        bonus: a level, and what its logit gets on top; after paired roll-outs a logit is one per cent of cost.

    Raises:
        ConfigError: fewer than two, other recipes, or a level that is none of theirs.
    """
    if len(agents) < 2:
        raise ConfigError(f"agents: {len(agents)} given, must be at least 2")
    configs = [read_config(checkpoint_folder(agent)) for agent in agents]
    for agent, config in zip(agents, configs, strict=True):
        for key in SHARED:
            if config[key] != configs[0][key]:
                raise ConfigError(f"agents: {agent} has another {key} than {agents[0]}, must be the same")
    members = [load_checkpoint(agent) for agent in agents]
    recipe = Recipe.from_dict(configs[0]["recipe"])
    network = averaged([member.network for member in members])
    if bonus is not None:
        level, logits = bonus
        if recipe.action_set not in ("peak", "reserve") or level not in recipe.choices:
            raise ConfigError(f"--bonus: level {level:g}, must be one of {', '.join(f'{x:g}' for x in recipe.choices)}")
        network = with_bonus(network, recipe.choices.index(level), logits)
    records = [read_record(agent) for agent in agents]
    record = {
        "algorithm": f"mean of {len(agents)} by {records[0]['algorithm']}",
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


def averaged(networks: Sequence[Network]) -> Network:
    """One network whose logits are the mean of those of ``networks``.

    Hidden layers stand side by side. Every member scales the observation in its own way; that is taken into
    its first layer. Where a scaled number would lie beyond the limits of the first member's scaling, it is
    cut off there.

    Raises:
        ConfigError: none given, or they differ in inputs, components or number of layers, or have no hidden layer.
    """
    if not all(isinstance(n, Network) for n in networks):
        raise ConfigError(f"ensemble: members {[type(n).__name__ for n in networks]}, must be networks")
    shapes = {(n.width, n.components, len(n.layers)) for n in networks}
    if len(shapes) != 1 or not networks[0].layers:
        raise ConfigError(f"ensemble: inputs, components and layers {sorted(shapes)}, must be the same for all, with a hidden layer")
    first = networks[0]
    inputs = [_rescaled(n, first.mean, first.scale) for n in networks]
    layers = [(np.concatenate([w for w, _ in inputs]), np.concatenate([b for _, b in inputs]))]
    for i in range(1, len(first.layers)):
        blocks = [n.layers[i][0] for n in networks]
        weight = np.zeros((sum(b.shape[0] for b in blocks), sum(b.shape[1] for b in blocks)), dtype=np.float32)
        row = column = 0
        for block in blocks:
            weight[row : row + block.shape[0], column : column + block.shape[1]] = block
            row, column = row + block.shape[0], column + block.shape[1]
        layers.append((weight, np.concatenate([n.layers[i][1] for n in networks])))
    share = np.float32(1.0 / len(networks))
    head = np.concatenate([n.head[0] for n in networks], axis=1) * share, np.sum([n.head[1] for n in networks], axis=0) * share
    return Network(first.mean, first.scale, tuple(layers), head, first.components)


def with_bonus(network: Network, choice: int, logits: float) -> Network:
    """The network with ``logits`` added to one choice wherever it is; below 0 they make it rarer.

    Raises:
        ConfigError: no such choice, or logits that are not from -1e6 to 1e6.
    """
    weight, bias = network.head
    choice = checks.integer("choice", choice, high=bias.size - 1)
    logits = checks.number("logits", logits, low=-1e6, high=1e6)
    bias = bias.copy()
    bias[choice] += np.float32(logits)
    return replace(network, head=(weight, bias))


def _rescaled(network: Network, mean: Float32, scale: Float32) -> tuple[Float32, Float32]:
    """The first layer for observations scaled as (x - mean) * scale in place of the network's own way."""
    if not np.all(scale > 0):
        raise ConfigError("ensemble: the first member's scale has values that are not above 0, must be > 0")
    weight, bias = network.layers[0]
    wide = weight.astype(np.float64)
    ratio = network.scale.astype(np.float64) / scale
    shift = (mean.astype(np.float64) - network.mean) * network.scale
    return (wide * ratio).astype(np.float32), (bias + wide @ shift).astype(np.float32)
