"""Inference without torch: a tanh MLP and masked categorical choices in numpy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llmsched_env.errors import ConfigError

Float32 = npt.NDArray[np.float32]
_LIMIT = np.float32(5.0)  # as ``llmsched_agents.policy.ScaledObservation``


@dataclass(frozen=True, slots=True)
class Network:
    """An actor: scaled observation, tanh layers, one linear head.

    Attributes:
        mean, scale: (D,) float32.
        layers: (weight (out, in), bias (out,)) of the hidden layers.
        head: the same of the last one.
        components: sizes of the action's components, in order; their sum is the head's width.
    """

    mean: Float32
    scale: Float32
    layers: tuple[tuple[Float32, Float32], ...]
    head: tuple[Float32, Float32]
    components: tuple[int, ...]

    def __post_init__(self) -> None:
        width = self.mean.shape[0]
        if self.scale.shape != (width,):
            raise ConfigError(f"network.scale: shape {self.scale.shape}, must be ({width},)")
        for i, (weight, bias) in enumerate([*self.layers, self.head]):
            if weight.ndim != 2 or weight.shape[1] != width or bias.shape != (weight.shape[0],):
                raise ConfigError(f"network layer {i}: weight {weight.shape} and bias {bias.shape} do not follow a width of {width}")
            width = weight.shape[0]
        if width != sum(self.components):
            raise ConfigError(f"network: {width} outputs, must be {sum(self.components)} for action components {self.components}")

    @property
    def width(self) -> int:
        """D, numbers of an observation."""
        return int(self.mean.shape[0])

    def logits(self, observations: Float32) -> Float32:
        """(N, sum of components) of (N, D) observations."""
        x = np.clip((observations - self.mean) * self.scale, -_LIMIT, _LIMIT)
        for weight, bias in self.layers:
            x = np.tanh(x @ weight.T + bias)
        out: Float32 = x @ self.head[0].T + self.head[1]
        return out

    def choose(
        self, observations: Float32, masks: npt.NDArray[np.bool_] | None = None, rng: np.random.Generator | None = None
    ) -> npt.NDArray[np.int64]:
        """(N, components) actions: the likeliest, or drawn with ``rng``.

        Args:
            observations: (N, D).
            masks: (N, sum of components), False where a choice is illegal; each component has a legal one.
        """
        logits = self.logits(observations).astype(np.float64)
        if masks is not None:
            logits = np.where(masks, logits, -np.inf)
        n, count = logits.shape[0], len(self.components)
        if count == 1:
            table = logits[:, None, :]
        else:
            table = np.full((n, count, max(self.components)), -np.inf)
            at = 0
            for i, size in enumerate(self.components):
                table[:, i, :size] = logits[:, at : at + size]
                at += size
        best: npt.NDArray[np.int64] = table.argmax(axis=2)
        if rng is None:
            return best
        weights = np.exp(table - np.take_along_axis(table, best[:, :, None], axis=2))
        cumulated = np.cumsum(weights, axis=2)
        drawn = rng.random((n, count, 1)) * cumulated[:, :, -1:]
        actions: npt.NDArray[np.int64] = (cumulated > drawn).argmax(axis=2)
        return actions

    def tensors(self) -> dict[str, Float32]:
        """By name, for safetensors."""
        named = {"scale.mean": self.mean, "scale.scale": self.scale, "head.weight": self.head[0], "head.bias": self.head[1]}
        for i, (weight, bias) in enumerate(self.layers):
            named[f"layers.{i}.weight"], named[f"layers.{i}.bias"] = weight, bias
        return {name: np.ascontiguousarray(value, dtype=np.float32) for name, value in named.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Float32], components: Sequence[int]) -> Network:
        """The inverse of ``tensors``.

        Raises:
            ConfigError: a tensor is missing, left over, of another type or shape.
        """
        left = dict(tensors)

        def take(name: str) -> Float32:
            if name not in left:
                raise ConfigError(f"weights: tensor {name!r} is missing")
            value = left.pop(name)
            if value.dtype != np.float32:
                raise ConfigError(f"weights: tensor {name!r} is {value.dtype}, must be float32")
            if not np.all(np.isfinite(value)):
                raise ConfigError(f"weights: tensor {name!r} has values that are not finite")
            return value

        layers: list[tuple[Float32, Float32]] = []
        while f"layers.{len(layers)}.weight" in left:
            i = len(layers)
            layers.append((take(f"layers.{i}.weight"), take(f"layers.{i}.bias")))
        head = (take("head.weight"), take("head.bias"))
        network = cls(take("scale.mean"), take("scale.scale"), tuple(layers), head, tuple(int(c) for c in components))
        if left:
            raise ConfigError(f"weights: tensors {sorted(left)} are unknown")
        return network


def network_of(policy: Any) -> Network:
    """The actor of a trained policy: ours (``llmsched_agents.policy``), or stable-baselines3's ``DQNPolicy``."""

    def arrays(module: Any) -> tuple[Float32, Float32]:
        return module.weight.detach().cpu().numpy().copy(), module.bias.detach().cpu().numpy().copy()

    if hasattr(policy, "q_net"):
        linear = [m for m in policy.q_net.q_net if hasattr(m, "weight")]
        if any(type(m).__name__ not in ("Linear", "Tanh") for m in policy.q_net.q_net):
            raise ConfigError("network: a DQN policy must use tanh (policy_kwargs activation_fn)")
        size = linear[0].weight.shape[1]
        zero, one = np.zeros(size, dtype=np.float32), np.ones(size, dtype=np.float32)
        return Network(zero, one, tuple(arrays(m) for m in linear[:-1]), arrays(linear[-1]), (int(policy.action_space.n),))
    public = policy.public or policy.features_dim
    mean = policy.features_extractor.mean.numpy()[:public].copy()
    scale = policy.features_extractor.scale.numpy()[:public].copy()
    layers = tuple(arrays(m) for m in policy.mlp_extractor.policy_net if hasattr(m, "weight"))
    return Network(mean, scale, layers, arrays(policy.action_net), tuple(policy.components))


def set_actor(policy: Any, network: Network) -> None:
    """Copy a network into the actor of a policy of ``llmsched_agents.policy``.

    Raises:
        ConfigError: other layers or widths.
    """
    import torch as th

    public = policy.public or policy.features_dim
    targets = [m for m in policy.mlp_extractor.policy_net if hasattr(m, "weight")] + [policy.action_net]
    sources = [*network.layers, network.head]
    ours = [tuple(m.weight.shape) for m in targets]
    theirs = [weight.shape for weight, _ in sources]
    if ours != theirs or network.width != public:
        raise ConfigError(f"network: layers {theirs} over {network.width} numbers, the policy has {ours} over {public}")
    with th.no_grad():
        policy.features_extractor.mean[:public] = th.as_tensor(network.mean)
        policy.features_extractor.scale[:public] = th.as_tensor(network.scale)
        for module, (weight, bias) in zip(targets, sources, strict=True):
            module.weight.copy_(th.as_tensor(weight))
            module.bias.copy_(th.as_tensor(bias))
