"""Recorded decisions of an expert: what it saw and did, one compressed file an episode, and a data set of them."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmsched_agents.agent import Agent
from llmsched_agents.domain import EnvSetting
from llmsched_agents.interface import Interface
from llmsched_agents.recipe import Recipe
from llmsched_env.action import ActionCodec
from llmsched_env.backends import make_backend
from llmsched_env.engine_config import EpisodeLimits
from llmsched_env.errors import ConfigError
from llmsched_env.runner import Policy
from llmsched_env.types import Decision, Workload

DESCRIPTION = "demonstrations.json"
# What policies of ``baselines`` set in their engine.
_ENGINE_OPTIONS = (
    "admission_order",
    "class_rank",
    "late_after",
    "max_num_batched_tokens",
    "max_num_seqs",
    "enable_chunked_prefill",
    "watermark",
    "max_num_active_seqs",
    "long_prefill_token_threshold",
    "prefill_schedule_interval",
    "prefill_interval_release",
)


@dataclass(frozen=True, slots=True)
class Demonstrations:
    """Decisions of one or more episodes.

    Attributes:
        observations: (n, D) float32.
        masks: (n, M) bool, components concatenated.
        actions: (n, W) int16, the expert's decision in the agent's action space.
        rewards: (n,) float32, minus the number in system integrated over the step, per request.
        seconds: (n,) float32, how far the step moved the clock.
        starts: (episodes,) int64, index of each episode's first decision.
    """

    observations: npt.NDArray[np.float32]
    masks: npt.NDArray[np.bool_]
    actions: npt.NDArray[np.int16]
    rewards: npt.NDArray[np.float32]
    seconds: npt.NDArray[np.float32]
    starts: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return int(self.observations.shape[0])

    @classmethod
    def joined(cls, parts: list[Demonstrations]) -> Demonstrations:
        offsets = np.cumsum([0, *(len(p) for p in parts[:-1])])
        return cls(
            np.concatenate([p.observations for p in parts]),
            np.concatenate([p.masks for p in parts]),
            np.concatenate([p.actions for p in parts]),
            np.concatenate([p.rewards for p in parts]),
            np.concatenate([p.seconds for p in parts]),
            np.concatenate([p.starts + o for p, o in zip(parts, offsets, strict=True)]),
        )

    def episodes(self) -> Iterator[slice]:
        """Rows of each episode."""
        ends = [*self.starts[1:].tolist(), len(self)]
        return (slice(a, b) for a, b in zip(self.starts.tolist(), ends, strict=True))


def expert_recipe(expert: Policy, max_admit: int, features: bool = False) -> Recipe:
    """The action set ``admit`` on the expert's own queues and engine."""
    changes = {name: getattr(expert.engine, name) for name in _ENGINE_OPTIONS if getattr(expert.engine, name) not in ((), None)}
    return Recipe(
        action_set="admit",
        max_admit=max_admit,
        layout=expert.layout,
        engine=changes,
        known_lengths=expert.known_lengths,
        features=features,
    )


def record_episode(
    expert: Policy,
    recipe: Recipe,
    setting: EnvSetting,
    workload: Workload,
    *,
    actor: Agent | None = None,
    share: float = 1.0,
    rng: np.random.Generator | None = None,
    max_steps: int = 1_000_000,
) -> tuple[Demonstrations, int]:
    """One episode labelled by the expert, and how many of its decisions the action space cannot express.

    What is executed is the action nearest to the expert's decision: what a perfect clone would do.

    Args:
        actor: DAgger (arXiv 1011.0686): the policy that acts in the other steps.
        share: probability that the expert's action is executed.
    """
    if recipe.action_set != "admit":
        raise ConfigError(f"recipe.action_set: {recipe.action_set!r}, must be 'admit' for demonstrations")
    seen = Interface(recipe, setting.setting)
    codec = ActionCodec(seen.layout.num_queues, recipe.max_admit)
    backend = make_backend("sim")
    expert.reset()
    limits = EpisodeLimits(max_iterations=max_steps)
    view = backend.reset(workload, seen.layout, seen.engine, limits, reveal_output_length=recipe.known_lengths)
    if actor is not None:
        actor.reset()
    rows: list[tuple[Any, ...]] = []
    inexact = 0
    decision = Decision(codec.num_queues)
    while not backend.done:
        observed, mask = seen.observe(view)
        wanted = expert.decide(view)
        action = codec.encode(wanted)
        inexact += _inexact(wanted, action, codec)
        kept = observed[0].copy(), mask[0].copy()
        acting = codec.decode(action, decision)
        if actor is not None and rng is not None and rng.random() >= share:
            acting = actor.decide(view)
        backend.advance(acting)
        report = backend.record.report
        rows.append((*kept, action, -report.system_seconds / len(workload), report.duration))
    backend.close()
    observations, masks, actions, rewards, seconds = zip(*rows, strict=True)
    return (
        Demonstrations(
            np.stack(observations),
            np.stack(masks),
            np.stack(actions).astype(np.int16),
            np.array(rewards, dtype=np.float32),
            np.array(seconds, dtype=np.float32),
            np.zeros(1, dtype=np.int64),
        ),
        inexact,
    )


def _inexact(decision: Decision, action: npt.NDArray[np.int64], codec: ActionCodec) -> bool:
    """Evictions are not in the action space, nor exact counts of ``max_admit`` and more."""
    finite = (decision.admit >= codec.max_admit) & (decision.admit < 2**30)
    return bool(decision.evict.any() or finite.any())


def write_episode(path: Path, episode: Demonstrations) -> None:
    """One compressed file, there whole or not at all."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            np.savez_compressed(
                file,
                observations=episode.observations,
                masks=np.packbits(episode.masks, axis=1),
                mask_size=episode.masks.shape[1],
                actions=episode.actions,
                rewards=episode.rewards,
                seconds=episode.seconds,
            )
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read_episode(path: Path) -> Demonstrations:
    """Raises ConfigError: a file that is not an episode."""
    try:
        with np.load(path, allow_pickle=False) as file:
            masks = np.unpackbits(file["masks"], axis=1, count=int(file["mask_size"])).astype(np.bool_)
            return Demonstrations(
                file["observations"], masks, file["actions"], file["rewards"], file["seconds"], np.zeros(1, dtype=np.int64)
            )
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise ConfigError(f"demonstrations: {path} cannot be read ({error})") from error


def read_demonstrations(folder: Path) -> tuple[Demonstrations, dict[str, Any]]:
    """All episodes of a folder and its description.

    Raises:
        ConfigError: nothing recorded there, or a corrupt file.
    """
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"demonstrations: {folder / DESCRIPTION} cannot be read ({error})") from error
    files = sorted(folder.glob("episode-*.npz"))
    if not files:
        raise ConfigError(f"demonstrations: {folder} holds no episodes")
    return Demonstrations.joined([read_episode(file) for file in files]), description
