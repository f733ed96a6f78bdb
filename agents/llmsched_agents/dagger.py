"""A clone of a recorded expert: behaviour cloning, then rounds of DAgger (arXiv 1011.0686)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from llmsched_agents.cloning import clone_policy, fit
from llmsched_agents.demonstrations import Demonstrations
from llmsched_agents.network import Network, network_of
from llmsched_agents.recording import Recorder


@dataclass(frozen=True, slots=True)
class Clone:
    """What there is after a round.

    Attributes:
        network: of the clone.
        rounds: decisions learned from, loss, accuracy and epochs of every round, plain values.
    """

    network: Network
    rounds: tuple[dict[str, float], ...]

    @property
    def algorithm(self) -> str:
        return "dagger" if len(self.rounds) > 1 else "behaviour cloning"


def clones(
    recorder: Recorder, data: Demonstrations, *, net_arch: Sequence[int], epochs: int, rounds: int, progress: Callable[[str], None]
) -> Iterator[Clone]:
    """The clone of what was recorded, and the better one after each of ``rounds`` of DAgger.

    Args:
        net_arch: hidden layers.
        epochs: most passes over the data in each round.
        progress: called with a line of text after each.
    """
    policy = clone_policy(data, net_arch, recorder.layout.num_queues, recorder.recipe.max_admit, seed=recorder.seed)
    made: list[dict[str, float]] = []
    for turn in range(rounds + 1):
        if turn > 0:
            data = Demonstrations.joined([data, *recorder.corrected(network_of(policy), turn)])
        report = fit(policy, data, epochs=epochs, seed=recorder.seed + turn, set_scale=turn == 0, progress=progress)
        made.append({"decisions": len(data), "loss": report.loss, "accuracy": report.accuracy, "epochs": report.epochs})
        yield Clone(network_of(policy), tuple(made))
