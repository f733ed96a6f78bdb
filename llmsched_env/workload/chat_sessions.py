"""Chat sessions: chains of turns, each of which sends the whole history and something new."""

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
from llmsched_env.workload.programs import MOST_CALLS, Apps, ProgramSource, check_room, draw_apps, fit_first
from llmsched_env.workload.session_statistics import SessionStatistics, load_session_statistics


@dataclass(frozen=True, eq=False)
class ChatSessions(ProgramSource):
    """Sessions of a chat service; a ``CallSource``.

    A session begins with the head of its application and a first message. A turn's prompt is all that was said before, answers included,
    and new tokens; it arrives the think time after the answer before it has come. All numbers are drawn independently of each other from
    ``model``.

    The sessions of ``model`` may be longer than an engine's context. Factors make them shorter, and a session ends with the turn after
    which the next prompt and its answer would exceed ``max_tokens``, however many turns were drawn. A first turn that is too long is cut:
    its prompt to what the head and the answer leave, and an answer that alone exceeds that to all but one token of it.

    Think times are drawn from gaps between arrivals, since the trace has no completions. The service of the turn before is in those gaps
    and is not subtracted; here it comes on top.

    Attributes:
        apps: applications; None for none, and no heads.
        arrivals: session starts; ``arrivals.rate`` is sessions per second.
        model: distributions of turns, seconds and tokens; Mooncake's conversation trace by default.
        first_scale: factor of the tokens of first messages, > 0.
        turn_scale: factor of the tokens of later messages and of all answers, > 0.
        think_scale: factor of the think times, >= 0.
        mean_turns: geometric turns of this mean, at least 1, in place of the model's; None for those.
        max_tokens: most tokens of a prompt and its answer.

    Raises:
        ConfigError: a value out of range, or a limit that leaves no room beside a head.
    """

    apps: Apps | None = field(default_factory=Apps)
    arrivals: ArrivalProcess = field(default_factory=lambda: Poisson(1.0))
    model: SessionStatistics = field(default_factory=load_session_statistics)
    first_scale: float = 1.0
    turn_scale: float = 1.0
    think_scale: float = 1.0
    mean_turns: float | None = None
    max_tokens: int = 32_768

    def __post_init__(self) -> None:
        for name, kind in (("arrivals", ArrivalProcess), ("model", SessionStatistics)):
            if not isinstance(getattr(self, name), kind):
                raise ConfigError(f"chat.{name}: {checks.shown(getattr(self, name))}, must be of type {kind.__name__}")
        for name in ("first_scale", "turn_scale"):
            checks.number(f"chat.{name}", getattr(self, name), 0.0, 1e3, open_low=True)
        checks.number("chat.think_scale", self.think_scale, 0.0, 1e6)
        if self.mean_turns is not None:
            checks.number("chat.mean_turns", self.mean_turns, 1.0, 1e3)
        checks.integer("chat.max_tokens", self.max_tokens, 2, 2**24)
        check_room("chat", self.apps, self.max_tokens)

    @property
    def most_calls(self) -> int:
        """Turns that a session may have: those of the model, or as many as a geometric number hardly ever exceeds."""
        most = self.model.turn_shares.size if self.mean_turns is None else math.ceil(30 * self.mean_turns)
        return min(most, MOST_CALLS, self.max_tokens // 2)  # a turn has two tokens at least

    @property
    def source(self) -> str:
        """Where the numbers come from."""
        return f"chat sessions after {self.model.source}"

    def draw(self, rng: np.random.Generator, start: FloatArray) -> CallChunk:
        """The sessions that start at (P,) seconds, a node each."""
        count = start.size
        app, head, node_parent = draw_apps(self.apps, rng, count)
        turns = self._turns(rng, count)
        session = np.repeat(np.arange(count), turns)
        first = np.cumsum(turns) - turns
        new, output, think = self._turn(rng, session.size, first)
        room = self.max_tokens - head.astype(np.int64)
        first_new, first_output = new[first], output[first]
        fit_first(first_new, first_output, room)
        new[first], output[first] = first_new, first_output
        said = np.cumsum(new + output)
        total = said - (said[first] - new[first] - output[first])[session] + head[session]
        kept = total <= self.max_tokens  # grows along a session, so that the beginning of it stays
        session, total, output, think = session[kept], total[kept], output[kept], think[kept]
        rows = np.arange(session.size, dtype=np.int32)
        begins = np.concatenate([[True], session[1:] != session[:-1]]) if session.size else np.zeros(0, np.bool_)
        program = session.astype(np.int32)
        return CallChunk(
            start=start,
            app=app,
            program=program,
            parent=np.where(begins, np.int32(-1), rows - np.int32(1)),
            think=think,
            prompt_tokens=(total - output).astype(np.int32),
            output_tokens=output.astype(np.int32),
            predicted_tokens=np.zeros(rows.size, np.int32),
            node=program,
            node_program=np.arange(count, dtype=np.int32),
            node_parent=node_parent,
            node_shared=head,
        )

    def _turns(self, rng: np.random.Generator, count: int) -> npt.NDArray[np.int64]:
        if self.mean_turns is None:
            return self.model.draw_turns(rng, count)
        return np.minimum(rng.geometric(1.0 / self.mean_turns, count), self.most_calls)

    def _turn(
        self, rng: np.random.Generator, calls: int, first: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], FloatArray]:
        """(calls,) new tokens, output tokens and think seconds; ``first`` are the rows of first turns."""
        new = self.model.at("new_tokens", rng.random(calls)) * self.turn_scale
        new[first] = self.model.at("first_prompt", rng.random(first.size)) * self.first_scale
        output = self.model.at("output_tokens", rng.random(calls)) * self.turn_scale
        think = self.model.at("seconds", rng.random(calls)) * self.think_scale
        think[first] = 0.0
        # Whole tokens, and none so long that a sum along a chunk could overflow.
        whole = [np.clip(np.rint(tokens), 1, 2**30).astype(np.int64) for tokens in (new, output)]
        return whole[0], whole[1], think
