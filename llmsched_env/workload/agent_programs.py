"""Agent programs: trees of calls, in which the answer of one is the beginning of the prompts of several others."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from llmsched_env import checks
from llmsched_env.cluster.calls import CallChunk
from llmsched_env.errors import ConfigError
from llmsched_env.types import FloatArray
from llmsched_env.workload.arrivals import ArrivalProcess, Poisson
from llmsched_env.workload.lengths import LengthModel, Lognormal
from llmsched_env.workload.programs import MOST_CALLS, Apps, ProgramSource, check_room, draw_apps, fit_first


@dataclass(frozen=True, slots=True)
class Forks:
    """The shape of a tree of calls.

    Attributes:
        depth: levels below the root; 0 is a single call.
        fewest, most: children of each call above the last level, every number in between as likely.

    Raises:
        ConfigError: a value out of range, or trees of more than 65,536 calls.
    """

    depth: int = 2
    fewest: int = 2
    most: int = 3

    def __post_init__(self) -> None:
        checks.integer("forks.depth", self.depth, 0, 64)
        checks.integer("forks.most", self.most, 0, MOST_CALLS)
        checks.integer("forks.fewest", self.fewest, 0, self.most)
        if self.most_calls > MOST_CALLS:
            raise ConfigError(f"forks: depth {self.depth} with {self.most} children, a program must have at most {MOST_CALLS} calls")

    @property
    def most_calls(self) -> int:
        """Calls of the largest tree."""
        return int(sum(self.most**level for level in range(self.depth + 1)))


@dataclass(frozen=True, eq=False)
class AgentPrograms(ProgramSource):
    """Programs that plan, fork and fork again; a ``CallSource``.

    The root's prompt is the head of its application and a task; its answer is the plan. When a call completes, each of its children is
    released after the seconds that its tool takes; the child's prompt is its parent's prompt and answer, and then tokens of its own, the
    tool's result or a sub-question. Siblings share exactly the parent's prompt and answer: each call is a node, whose parent is that of
    the call before. A program ends when the last of its calls does. No call waits for several others: a tree has no joins.

    A child whose prompt and answer would exceed ``max_tokens`` is not made, and its subtree with it. A root that is too long is cut: its
    task to what the head and the plan leave, and a plan that alone exceeds that to all but one token of it.

    Attributes:
        apps: applications; None for none, and no heads.
        arrivals: program starts; ``arrivals.rate`` is programs per second.
        task: lengths of the root: the prompt is the task beyond the head, the output is the plan.
        step: lengths of the others: the prompt is what a call adds to its parent's prompt and answer.
        forks: shape of the tree.
        tool_seconds: mean seconds from a call's completion to the arrival of a child, lognormal, drawn for each child; 0 for none.
        tool_sigma: standard deviation of their natural logarithm, >= 0.
        max_tokens: most tokens of a prompt and its answer.

    Raises:
        ConfigError: a value out of range, or a limit that leaves no room beside a head.
    """

    apps: Apps | None = field(default_factory=Apps)
    arrivals: ArrivalProcess = field(default_factory=lambda: Poisson(0.5))
    task: LengthModel = field(default_factory=lambda: Lognormal(300.0, 0.6, 150.0, 0.5))
    step: LengthModel = field(default_factory=lambda: Lognormal(150.0, 0.8, 120.0, 0.6))
    forks: Forks = field(default_factory=Forks)
    tool_seconds: float = 2.0
    tool_sigma: float = 1.0
    max_tokens: int = 4_096

    def __post_init__(self) -> None:
        for name, kind in (("arrivals", ArrivalProcess), ("task", LengthModel), ("step", LengthModel), ("forks", Forks)):
            if not isinstance(getattr(self, name), kind):
                raise ConfigError(f"agents.{name}: {checks.shown(getattr(self, name))}, must be of type {kind.__name__}")
        checks.number("agents.tool_seconds", self.tool_seconds, 0.0, 1e6)
        checks.number("agents.tool_sigma", self.tool_sigma, 0.0, 10.0)
        checks.integer("agents.max_tokens", self.max_tokens, 2, 2**24)
        check_room("agents", self.apps, self.max_tokens)

    @property
    def most_calls(self) -> int:
        """Calls of the largest tree."""
        return self.forks.most_calls

    @property
    def source(self) -> str:
        """Where the numbers come from."""
        return f"agent programs: {self.task.statistics().source}, {self.step.statistics().source}"

    def draw(self, rng: np.random.Generator, start: FloatArray) -> CallChunk:
        """The programs that start at (P,) seconds, a node each call; calls stand in order of depth within their program."""
        app, head, root_parent = draw_apps(self.apps, rng, start.size)
        prompt, output = (a.astype(np.int64) for a in self.task.sample(rng, start.size)[:2])
        fit_first(prompt, output, self.max_tokens - head.astype(np.int64))
        level = _Level(np.arange(start.size), np.full(start.size, -1), head + prompt, output, np.zeros(start.size))
        levels, before = [level], 0
        for _ in range(self.forks.depth):
            if not level.program.size:
                break
            level, before = self._below(rng, level, before), before + level.program.size
            levels.append(level)
        program, parent, prompt, output, think = (
            np.concatenate([getattr(one, name) for one in levels]) for name in ("program", "parent", "prompt", "output", "think")
        )
        order = np.argsort(program, kind="stable")  # by level within a program: parents stay before their children
        place = np.empty(order.size, np.int64)
        place[order] = np.arange(order.size)
        program, parent, prompt, output, think = program[order], parent[order], prompt[order], output[order], think[order]
        forked = parent >= 0
        parent = np.where(forked, place[parent], -1)
        rows, owner = np.arange(order.size, dtype=np.int32), program.astype(np.int32)
        return CallChunk(
            start=start,
            app=app,
            program=owner,
            parent=parent.astype(np.int32),
            think=think,
            prompt_tokens=prompt.astype(np.int32),
            output_tokens=output.astype(np.int32),
            predicted_tokens=np.zeros(rows.size, np.int32),
            node=rows,
            node_program=owner,
            node_parent=np.where(forked, parent, root_parent[program]).astype(np.int32),
            node_shared=np.where(forked, prompt[parent] + output[parent], head[program]).astype(np.int32),
        )

    def _below(self, rng: np.random.Generator, above: _Level, first: int) -> _Level:
        """The children of a level whose calls are numbered from ``first`` on."""
        children = rng.integers(self.forks.fewest, self.forks.most + 1, above.program.size)
        of = np.repeat(np.arange(above.program.size), children)
        new, output = (a.astype(np.int64) for a in self.step.sample(rng, of.size)[:2])
        prompt = above.prompt[of] + above.output[of] + new
        think = np.zeros(of.size)
        if self.tool_seconds > 0:
            middle = math.log(self.tool_seconds) - self.tool_sigma**2 / 2
            think = np.exp(middle + self.tool_sigma * rng.standard_normal(of.size))
        kept = prompt + output <= self.max_tokens
        of = of[kept]
        return _Level(above.program[of], of + first, prompt[kept], output[kept], think[kept])


@dataclass(frozen=True, slots=True)
class _Level:
    """Calls of one depth: program, number of the parent, tokens and seconds, (n,) each."""

    program: npt.NDArray[np.int64]
    parent: npt.NDArray[np.int64]
    prompt: npt.NDArray[np.int64]
    output: npt.NDArray[np.int64]
    think: FloatArray
