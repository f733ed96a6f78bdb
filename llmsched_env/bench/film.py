"""A run as frames: one policy on one workload, looked at every so many seconds of the engine."""

from __future__ import annotations

from collections.abc import Iterator

from llmsched_env.backends import make_backend
from llmsched_env.bench.comparison import Comparison, Task
from llmsched_env.engine_config import EpisodeLimits
from llmsched_env.errors import policy_named
from llmsched_env.render import History, Viewer
from llmsched_env.render.film import Frame
from llmsched_env.render.names import bands, class_names
from llmsched_env.render.viewer import SIZE


def frames(comparison: Comparison, task: Task, *, every: float, until: float, size: tuple[int, int] = SIZE) -> Iterator[Frame]:
    """Run a task and draw it.

    Args:
        every: seconds of the engine from a frame to the next.
        until: seconds after which nothing more is drawn; the frame of the end comes last.
        size: (width, height) in pixels.

    Raises:
        ConfigError: a policy that cannot be built, a request that can never be served, or a size that is refused.
        MissingExtraError: pygame is not installed.
    """
    policy, backend, scenario = comparison.policy(task.policy, task.rate), make_backend("sim"), comparison.scenario
    workload = comparison.workload(task.rate, task.seed)
    title = f"{task.policy} on {scenario.name}, {task.rate:g} requests/s"
    viewer = Viewer(title, policy.layout, type_names=class_names(scenario, policy.layout), bands=bands(scenario), size=size)
    policy.reset()
    limits = EpisodeLimits()
    view = backend.reset(workload, policy.layout, policy.engine, limits, reveal_output_length=policy.known_lengths)
    history, drawn = History(backend.record), 0
    while not backend.done and view.clock < until:
        if view.clock >= drawn * every:
            yield viewer.draw(backend, history)
            drawn = int(view.clock / every) + 1
        with policy_named(f"policy {task.policy!r}"):
            decision = policy.decide(view)
            history.begin()
            backend.advance(decision)
        history.note(backend.record, decision)
    yield viewer.draw(backend, history)
    backend.close()
