"""Trained agents as folders: ``weights.safetensors``, ``config.json`` and ``record.json``. Nothing is unpickled, torch is not needed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym

from llmsched_agents.agent import Agent
from llmsched_agents.domain import Domain
from llmsched_agents.interface import observed_fields
from llmsched_agents.kernel import FEATURES
from llmsched_agents.network import Network
from llmsched_agents.recipe import Recipe
from llmsched_baselines import Setting
from llmsched_env import __version__, checks
from llmsched_env.errors import ConfigError, did_you_mean, require
from llmsched_env.peak import GRID
from llmsched_env.types import QueueLayout

FORMAT = 1
MOST_CHOICES = 4096
"""Largest count in a configuration: of levels, of an action's choices, of settings along one axis."""
ENVIRONMENT = "LLMSched-v1"
READ = ("LLMSched-v0", ENVIRONMENT)
"""Environments whose agents run here: their spaces are the same, only iteration times differ."""
WEIGHTS, CONFIG, RECORD = "weights.safetensors", "config.json", "record.json"
SHIPPED = Path(__file__).parent / "checkpoints"
"""The agents that ship, a folder each."""


def describe_observation(recipe: Recipe, layout: QueueLayout) -> dict[str, Any]:
    """Names and widths of what the network reads, in order."""
    fields = [[name, width] for name, width in observed_fields(layout)]
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
    where = f"checkpoint: {path}"
    config = checks.json_object(where, checks.file_bytes(f"checkpoint: {folder} is not one ({CONFIG})", path))
    missing = {"format", "name", "environment", "observation", "components", "recipe", "trained_on", "deterministic"} - set(config)
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(sorted(missing))}")
    if isinstance(config["format"], bool) or config["format"] != FORMAT:
        raise ConfigError(f"{where} has format {checks.shown(config['format'])}, this version reads {FORMAT}")
    made_for = checks.mapping(f"{where}: environment", config["environment"])
    identity, package = made_for.get("id"), made_for.get("package", "")
    if identity not in READ or ENVIRONMENT not in gym.registry:
        raise ConfigError(f"checkpoint: {folder} was trained on {checks.shown(identity)}, this version has {ENVIRONMENT!r}: train it again")
    if not isinstance(package, str) or __version__.split(".")[:2] != package.split(".")[:2]:
        raise ConfigError(
            f"checkpoint: {folder} was trained on llmsched-env {checks.shown(package)}, this is {__version__}: train it again"
        )
    checks.text(f"{where}: name", config["name"], empty=False)
    checks.flag(f"{where}: deterministic", config["deterministic"])
    checks.mapping(f"{where}: observation", config["observation"])
    config["components"] = list(checks.integers(f"{where}: components", config["components"], low=1, high=MOST_CHOICES, most=MOST_CHOICES))
    _check_recipe(f"{where}: recipe", checks.mapping(f"{where}: recipe", config["recipe"]))
    _check_domain(f"{where}: trained_on", checks.mapping(f"{where}: trained_on", config["trained_on"]))
    return config


def _check_recipe(name: str, recipe: Mapping[str, Any]) -> None:
    """The types and sizes of what is there, before anything is built from it; ``Recipe`` checks the rest."""
    for field in ("known_lengths", "features", "compact"):
        if field in recipe:
            checks.flag(f"{name}.{field}", recipe[field])
    for field in ("max_admit", "num_classes", "num_segments", "hold"):
        if field in recipe:
            checks.integer(f"{name}.{field}", recipe[field], low=1, high=MOST_CHOICES)
    for field in ("action_set", "order", "token_budget"):
        if field in recipe:
            checks.text(f"{name}.{field}", recipe[field])
    if "spare" in recipe:
        checks.number(f"{name}.spare", recipe["spare"], high=64.0)
    if recipe.get("late_last") is not None:
        checks.number(f"{name}.late_last", recipe["late_last"], unit="seconds")
    if "levels" in recipe:
        _items(f"{name}.levels", recipe["levels"])
        for i, level in enumerate(recipe["levels"]):
            checks.number(f"{name}.levels[{i}]", level, high=1e6)
    if recipe.get("layout") is not None:
        layout = checks.mapping(f"{name}.layout", recipe["layout"])
        fields = {"by", "edges", "num_types", "segment_ends"}
        if set(layout) != fields:
            raise ConfigError(f"{name}.layout: fields {', '.join(layout)}, must be {', '.join(sorted(fields))}")
    if "engine" in recipe:
        checks.mapping(f"{name}.engine", recipe["engine"])


def _check_domain(name: str, domain: Mapping[str, Any]) -> None:
    """The same for the settings it was trained on; a scenario and a load there must be, as one setting is built from them."""
    for field in domain:
        _items(f"{name}.{field}", domain[field])
    for field in ("scenarios", "loads"):
        if not domain.get(field):
            raise ConfigError(f"{name}.{field}: none given, must be at least one")
    for field in ("scenarios", "calibrations", "bursts"):
        for i, value in enumerate(domain.get(field, ())):
            checks.text(f"{name}.{field}[{i}]", value, empty=False)
    for i, load in enumerate(domain["loads"]):
        checks.number(f"{name}.loads[{i}]", load, high=1e3, open_low=True)
    if "kv" in domain:
        checks.integers(f"{name}.kv", domain["kv"], low=1, most=MOST_CHOICES)


def _items(name: str, values: object) -> None:
    if not isinstance(values, list) or len(values) > MOST_CHOICES:
        raise ConfigError(f"{name}: {checks.shown(values)}, must be a list of at most {MOST_CHOICES}")


def _first(domain: Mapping[str, Any]) -> Setting:
    """The first setting of a training, without the others of its grid."""
    return Domain.from_dict({name: values[:1] for name, values in domain.items()}).grid()[0].setting


def shipped_agents() -> list[str]:
    """Names of the agents that ship, each a folder of ``llmsched_agents/checkpoints``."""
    return sorted(folder.name for folder in SHIPPED.iterdir() if (folder / CONFIG).is_file())


def checkpoint_folder(text: str | Path) -> Path:
    """The folder that a name of a shipped agent, or a path, stands for (``./generalist`` is a path)."""
    if text == "":
        raise ConfigError(f"checkpoint: '', must be a folder or one of {', '.join(shipped_agents())}")
    return SHIPPED / text if isinstance(text, str) and text in shipped_agents() else Path(text)


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
        folder: as ``save_checkpoint`` wrote it, or the name of an agent that ships (``shipped_agents``).
        setting: what it is to run on; None for the first setting of its training.
        deterministic: None for the mode that the checkpoint states.
        seed: of the draws of a stochastic agent.
        name: in tables; None for the checkpoint's own.

    Raises:
        ConfigError: no checkpoint, a corrupt one, or one whose observation, action space or version is not ours.
        MissingExtraError: safetensors is not installed.
    """
    with checks.told(f"checkpoint: {checks.shown(folder)}"):
        where = checkpoint_folder(folder)
    if isinstance(folder, str) and not where.is_dir():
        hint = did_you_mean(folder, shipped_agents())
        raise ConfigError(f"checkpoint: {checks.shown(folder)} is no folder{hint} (agents that ship: {', '.join(shipped_agents())})")
    seed = checks.integer("seed", seed, high=2**64 - 1)
    if deterministic is not None:
        deterministic = checks.flag("deterministic", deterministic)
    safetensors = require("safetensors.numpy", "checkpoints")
    config = read_config(where)
    path = where / CONFIG
    with checks.told(f"checkpoint: {path}: recipe"):
        recipe = Recipe.from_dict(config["recipe"])
    if setting is None:
        with checks.told(f"checkpoint: {path}: trained_on"):
            setting = _first(config["trained_on"])
    with checks.told(f"checkpoint: {path}: recipe"):
        expected = describe_observation(recipe, recipe.layout_for(setting.statistics))
    if config["observation"] != expected:
        raise ConfigError(
            f"checkpoint: {where} reads another observation than this version gives: {_difference(config['observation'], expected)}"
        )
    data = checks.file_bytes(f"checkpoint: {where / WEIGHTS} cannot be read", where / WEIGHTS)
    try:
        tensors = safetensors.load(data)
    except Exception as error:  # safetensors raises its own type, from Rust
        raise ConfigError(f"checkpoint: {where / WEIGHTS} cannot be read ({error})") from error
    with checks.told(f"checkpoint: {where}"):
        network = Network.from_tensors(tensors, config["components"])
        mode = bool(config["deterministic"]) if deterministic is None else deterministic
        return Agent(network, recipe, setting, name=name or str(config["name"]), deterministic=mode, seed=seed)


def read_record(folder: str | Path) -> dict[str, Any]:
    """How the agent was trained.

    Raises:
        ConfigError: there is no such file, or it holds no JSON object.
    """
    path = checkpoint_folder(folder) / RECORD
    return checks.json_object(f"checkpoint: {path}", checks.file_bytes(f"checkpoint: {path}", path))


def _difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    for name in ("features", "compact"):
        if theirs.get(name) != ours[name]:
            return f"{name} {checks.shown(theirs.get(name))}, here {ours[name]}"
    fields = theirs.get("fields")
    if not isinstance(fields, list):
        return f"fields {checks.shown(fields)}, here a list"
    for field, (other, size) in zip(fields, ours["fields"], strict=False):
        if field != [other, size]:
            described = f"{field[0]} of {field[1]}" if isinstance(field, list) and len(field) == 2 else checks.shown(field)
            return f"{described}, here {other} of {size}"
    return f"{len(fields)} fields, here {len(ours['fields'])}; {', '.join(theirs)}, here {', '.join(ours)}"
