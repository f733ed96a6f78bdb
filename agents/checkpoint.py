"""Trained agents as folders: ``weights.safetensors``, ``config.json`` and ``record.json``. Nothing is unpickled, torch is not needed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym

from agents.agent import Agent
from agents.domain import Domain
from agents.kernel import FEATURES, GRID
from agents.network import Network
from agents.recipe import Recipe
from baselines import Setting
from llmsched_env import __version__
from llmsched_env.errors import ConfigError, require
from llmsched_env.observation import ObservationLayout
from llmsched_env.types import QueueLayout

FORMAT = 1
ENVIRONMENT = "LLMSched-v0"
WEIGHTS, CONFIG, RECORD = "weights.safetensors", "config.json", "record.json"


def describe_observation(recipe: Recipe, layout: QueueLayout) -> dict[str, Any]:
    """Names and widths of what the network reads, in order."""
    fields = [[name, width] for name, width in ObservationLayout.of(layout).fields]
    features = {"count": FEATURES, "grid": list(GRID)} if recipe.features else None
    return {"fields": fields, "compact": recipe.compact, "features": features}


def save_checkpoint(
    folder: Path,
    network: Network,
    recipe: Recipe,
    domain: Domain,
    layout: QueueLayout,
    *,
    name: str,
    deterministic: bool,
    record: Mapping[str, Any],
) -> None:
    """Write a checkpoint; the folder is made, files in it are replaced one by one, the configuration last.

    Args:
        domain: the settings it was trained on.
        layout: queues in one of them (their number is part of the observation).
        deterministic: the mode it should run in unless asked otherwise.
        record: of the training: seeds, steps, seconds, curve; plain values.
    """
    safetensors = require("safetensors.numpy", "agents")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS).write_bytes(safetensors.save(network.tensors()))
    config = {
        "format": FORMAT,
        "name": name,
        "environment": {"id": ENVIRONMENT, "package": __version__},
        "observation": describe_observation(recipe, layout),
        "components": list(network.components),
        "recipe": recipe.as_dict(),
        "trained_on": domain.describe(),
        "deterministic": deterministic,
    }
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a checkpoint, checked against this version of the environment.

    Raises:
        ConfigError: no checkpoint, a corrupt file, or one for another environment or observation.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"checkpoint: {folder} is not one ({error})") from error
    except ValueError as error:
        raise ConfigError(f"checkpoint: {path} is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise ConfigError(f"checkpoint: {path} must hold an object")
    missing = {"format", "name", "environment", "observation", "components", "recipe", "trained_on", "deterministic"} - set(config)
    if missing:
        raise ConfigError(f"checkpoint: {path} lacks {', '.join(sorted(missing))}")
    if config["format"] != FORMAT:
        raise ConfigError(f"checkpoint: {path} has format {config['format']!r}, this version reads {FORMAT}")
    made_for = config["environment"]
    if made_for.get("id") != ENVIRONMENT or ENVIRONMENT not in gym.registry:
        raise ConfigError(f"checkpoint: {folder} was trained on {made_for.get('id')!r}, this version has {ENVIRONMENT!r}: train it again")
    ours, theirs = __version__.split("."), str(made_for.get("package", "")).split(".")
    if ours[:2] != theirs[:2]:
        trained = made_for.get("package")
        raise ConfigError(f"checkpoint: {folder} was trained on llmsched-env {trained!r}, this is {__version__}: train it again")
    return config


def load_checkpoint(
    folder: str | Path,
    setting: Setting | None = None,
    *,
    deterministic: bool | None = None,
    seed: int = 0,
    name: str | None = None,
) -> Agent:
    """The agent of a checkpoint.

    Args:
        folder: as ``save_checkpoint`` wrote it.
        setting: what it is to run on; None for the first setting of its training.
        deterministic: None for the mode that the checkpoint states.
        seed: of the draws of a stochastic agent.
        name: in tables; None for the checkpoint's own.

    Raises:
        ConfigError: no checkpoint, a corrupt one, or one whose observation, action space or version is not ours.
        MissingExtraError: safetensors is not installed.
    """
    where = Path(folder)
    safetensors = require("safetensors.numpy", "checkpoints")
    config = read_config(where)
    recipe = Recipe.from_dict(config["recipe"])
    if setting is None:
        setting = Domain.from_dict(config["trained_on"]).grid()[0].setting
    expected = describe_observation(recipe, recipe.layout_for(setting.statistics))
    if config["observation"] != expected:
        raise ConfigError(
            f"checkpoint: {where} reads another observation than this version gives: {_difference(config['observation'], expected)}"
        )
    try:
        tensors = safetensors.load_file(where / WEIGHTS)
    except Exception as error:  # safetensors raises its own type, from Rust
        raise ConfigError(f"checkpoint: {where / WEIGHTS} cannot be read ({error})") from error
    network = Network.from_tensors(tensors, config["components"])
    mode = bool(config["deterministic"]) if deterministic is None else deterministic
    return Agent(network, recipe, setting, name=name or str(config["name"]), deterministic=mode, seed=seed)


def read_record(folder: str | Path) -> dict[str, Any]:
    """How the agent was trained."""
    record: dict[str, Any] = json.loads((Path(folder) / RECORD).read_text(encoding="utf-8"))
    return record


def _difference(theirs: Any, ours: Any) -> str:
    if not isinstance(theirs, dict) or theirs.get("features") != ours["features"]:
        return f"features {theirs.get('features') if isinstance(theirs, dict) else theirs!r}, here {ours['features']}"
    for (name, width), (other, size) in zip(theirs["fields"], ours["fields"], strict=False):
        if (name, width) != (other, size):
            return f"{name} of {width}, here {other} of {size}"
    return f"{len(theirs['fields'])} fields, here {len(ours['fields'])}"
