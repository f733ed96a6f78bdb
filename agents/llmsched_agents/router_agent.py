"""The learned router: ``make_router("learned-router", door)``, and the form in which it ships.

A checkpoint is a folder: ``weights.safetensors``, ``config.json`` and ``record.json``, as those of the agents that schedule. Nothing
is unpickled, torch is not needed.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from llmsched_agents.checkpoint import CONFIG, RECORD, WEIGHTS
from llmsched_agents.router_rule import COST, INPUTS, LearnedRecord, least_score
from llmsched_baselines.routers import Door, Router
from llmsched_env import __version__, checks
from llmsched_env.cluster.routing import RouterRule
from llmsched_env.errors import ConfigError, require

FORMAT = 1
ENVIRONMENT = "LLMSchedCluster-v0"
SHIPPED_ROUTER = Path(__file__).parent / "routers" / "learned-router"
MOST_HIDDEN = 4_096
LARGEST_WEIGHT = 1e3
"""Of any weight; the logarithms of the cost are held to 20, beyond which seconds and weights lose their meaning."""
LARGEST_LOG = 20.0


@dataclass(frozen=True, slots=True, eq=False)
class RouterNetwork:
    """What was learned.

    Attributes:
        cost: (len(COST),); direct_weight: (len(INPUTS),); output_weight, hidden_bias: (H,); hidden_weight: (H, len(INPUTS)); all float64.

    Raises:
        ConfigError: another shape, or a number that is not finite or too large.
    """

    cost: npt.NDArray[np.float64]
    direct_weight: npt.NDArray[np.float64]
    output_weight: npt.NDArray[np.float64]
    hidden_bias: npt.NDArray[np.float64]
    hidden_weight: npt.NDArray[np.float64]

    def __post_init__(self) -> None:
        hidden = np.asarray(self.hidden_bias).size
        if not 1 <= hidden <= MOST_HIDDEN:
            raise ConfigError(f"network.hidden_bias: {hidden} hidden units, must be 1 to {MOST_HIDDEN}")
        width = len(INPUTS)
        shapes = {
            "cost": (len(COST),),
            "direct_weight": (width,),
            "output_weight": (hidden,),
            "hidden_bias": (hidden,),
            "hidden_weight": (hidden, width),
        }
        for name, shape in shapes.items():
            values = np.asarray(getattr(self, name))
            if values.dtype != np.float64 or values.shape != shape:
                raise ConfigError(f"network.{name}: {values.dtype} of shape {values.shape}, must be float64 of shape {shape}")
            limit = LARGEST_LOG if name == "cost" else LARGEST_WEIGHT
            if not np.all(np.abs(values) <= limit):  # NaN, too
                raise ConfigError(f"network.{name}: must be finite and at most {limit:g} in size")
            object.__setattr__(self, name, np.ascontiguousarray(values))

    @classmethod
    def start(cls, hidden: int, seed: int) -> RouterNetwork:
        """The cost of ``llmsched_baselines.routers.cost`` as it is tuned where replicas drift, and a network that changes nothing yet.

        Args:
            hidden: units; their input weights are normal with variance 4 / inputs, large enough for units that are not linear.
        """
        rng = np.random.default_rng(seed)
        weights = rng.normal(0.0, 2.0, (hidden, len(INPUTS))) / np.sqrt(len(INPUTS))
        cost = np.log([2.0, 4.0, 1.0, 0.01, 2.0, 1.0, 10.0, 10.0])
        return cls(cost, np.zeros(len(INPUTS)), np.zeros(hidden), np.zeros(hidden), weights)

    @classmethod
    def from_vector(cls, vector: npt.NDArray[np.float64]) -> RouterNetwork:
        """From (P,) as ``vector`` gives it."""
        width = len(INPUTS)
        hidden = (vector.size - len(COST) - width) // (width + 2)
        cost, direct, output, bias, weight = np.split(vector, np.cumsum([len(COST), width, hidden, hidden]))
        return cls(cost, direct, output, bias, weight.reshape(hidden, width))

    def vector(self) -> npt.NDArray[np.float64]:
        """(P,) all weights, in the order above: those that act on the score without the hidden layer come first."""
        return np.concatenate([getattr(self, field.name).ravel() for field in dataclasses.fields(self)])

    def tensors(self) -> dict[str, npt.NDArray[np.float64]]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def rule(self, door: Door, *, sees_pace: bool = True) -> RouterRule:
        """The rule for a cluster."""
        count = len(door.engines)
        record = LearnedRecord(
            cost=self.cost,
            direct_weight=self.direct_weight,
            hidden_weight=self.hidden_weight.reshape(-1),
            hidden_bias=self.hidden_bias,
            output_weight=self.output_weight,
            inputs=np.zeros(len(INPUTS)),
            seconds=np.zeros(count),
            log_pace=np.zeros(count),
            pace=np.zeros(count, dtype=np.int64),
            flow=np.zeros(count, dtype=np.int64),
        )
        record.output, record.sees_pace = door.statistics.mean_output, sees_pace
        return RouterRule(least_score, record, reads_cache=True)


# --- checkpoints ---------------------------------------------------------------------------------------------
def save_router(folder: Path, network: RouterNetwork, record: Mapping[str, Any]) -> None:
    """Write a checkpoint; the folder is made, files in it are replaced one by one, the configuration last.

    Args:
        record: of the training: seeds, curve, seconds; plain values.
    """
    safetensors = require("safetensors.numpy", "agents")
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "format": FORMAT,
        "environment": {"id": ENVIRONMENT, "package": __version__},
        "cost": list(COST),
        "inputs": list(INPUTS),
        "hidden": network.hidden_bias.size,
    }
    texts = {RECORD: json.dumps(record, indent=1) + "\n", CONFIG: json.dumps(config, indent=1) + "\n"}
    _replace(folder / WEIGHTS, safetensors.save(network.tensors()))
    for name, text in texts.items():
        _replace(folder / name, text.encode())


def _replace(path: Path, data: bytes) -> None:
    """At no time is there half a file."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    os.replace(part, path)


def load_router(folder: str | Path) -> RouterNetwork:
    """What ``save_router`` wrote.

    Raises:
        ConfigError: no checkpoint, a corrupt one, or one of another environment or other inputs.
        MissingExtraError: safetensors is not installed.
    """
    folder = Path(folder)
    safetensors = require("safetensors.numpy", "checkpoints")
    path = folder / CONFIG
    where = f"checkpoint: {path}"
    config = checks.json_object(where, checks.file_bytes(f"checkpoint: {folder} is not one ({CONFIG})", path))
    missing = {"format", "environment", "cost", "inputs", "hidden"} - set(config)
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(sorted(missing))}")
    if isinstance(config["format"], bool) or config["format"] != FORMAT:
        raise ConfigError(f"{where} has format {checks.shown(config['format'])}, this version reads {FORMAT}")
    made_for = checks.mapping(f"{where}: environment", config["environment"])
    package = made_for.get("package", "")
    if made_for.get("id") != ENVIRONMENT or not isinstance(package, str) or package.split(".")[:2] != __version__.split(".")[:2]:
        raise ConfigError(f"{where}: environment {checks.shown(made_for)}, this is {ENVIRONMENT} of {__version__}: train it again")
    for name, ours in (("cost", COST), ("inputs", INPUTS)):
        if config[name] != list(ours):
            raise ConfigError(f"{where}: {name} {checks.shown(config[name])}, must be {', '.join(ours)}: train it again")
    hidden = checks.integer(f"{where}: hidden", config["hidden"], low=1, high=MOST_HIDDEN)
    data = checks.file_bytes(f"checkpoint: {folder / WEIGHTS} cannot be read", folder / WEIGHTS)
    try:
        tensors = safetensors.load(data)
    except Exception as error:  # safetensors raises its own type, from Rust
        raise ConfigError(f"checkpoint: {folder / WEIGHTS} cannot be read ({error})") from error
    names = [field.name for field in dataclasses.fields(RouterNetwork)]
    if set(tensors) != set(names):
        raise ConfigError(f"checkpoint: {folder / WEIGHTS} holds {', '.join(sorted(tensors)) or 'nothing'}, must be {', '.join(names)}")
    with checks.told(f"checkpoint: {folder / WEIGHTS}"):
        network = RouterNetwork(**tensors)
    if network.hidden_bias.size != hidden:
        raise ConfigError(f"checkpoint: {folder / WEIGHTS} has {network.hidden_bias.size} hidden units, {CONFIG} states {hidden}")
    return network


def read_router_record(folder: str | Path) -> dict[str, Any]:
    """How a router was trained.

    Raises:
        ConfigError: there is no such file, or it holds no JSON object.
    """
    path = Path(folder) / RECORD
    return checks.json_object(f"checkpoint: {path}", checks.file_bytes(f"checkpoint: {path}", path))


class LearnedRouter(Router):
    """A cost in seconds with trained weights, times a factor by a small network that sees how each replica stands to the others.

    Trained by ``llmsched train-router``; ``llmsched_agents.router_rule`` says what it computes, ``record.json`` how it was trained.

    Args:
        checkpoint: a folder that ``save_router`` wrote; empty for the one that ships.
        sees_pace: without it the rule takes every replica to be as fast as it is calibrated.

    Raises:
        ConfigError: as ``load_router``.
    """

    name: ClassVar[str] = "learned-router"

    def __init__(self, door: Door, checkpoint: str = "", sees_pace: bool = True) -> None:
        super().__init__(door)
        folder = SHIPPED_ROUTER if checks.text("router.checkpoint", checkpoint) == "" else Path(checkpoint)
        self.rule = load_router(folder).rule(door, sees_pace=checks.flag("router.sees_pace", sees_pace))
