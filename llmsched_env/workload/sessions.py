"""Sources of calls for a cluster, by name.

=============  ==================================================================================================================
name           calls
=============  ==================================================================================================================
chat           chat sessions after Mooncake's conversation trace, made short enough for a context of 4,096 tokens and a cache of some
               8 GB: first messages of a twentieth of their length, think times of a fifth. Four turns are drawn on average, geometric (the
               hour of the trace shows 1.6), of which the context leaves 2.4. 16 applications with heads of 200 to 500 tokens
chat-bursts    the same, sessions beginning by an MMPP-2: quiet spells of 30 s and bursts of 15 s, seven times as dense
agents         agent programs: a plan, two or three children, and as many of each of those; lengths and tool times are our own
SCENARIO       the requests of any scenario, each a program of its own
=============  ==================================================================================================================

Factors, turns, applications and rates of ``chat`` and ``chat-bursts`` are our own. Rates are defaults to be scaled: ``CallSource.chunks``
takes the calls per second that a cluster is meant to bear.
"""

from __future__ import annotations

from collections.abc import Callable

from llmsched_env import checks
from llmsched_env.cluster.calls import CallSource
from llmsched_env.errors import ConfigError, did_you_mean
from llmsched_env.registry import SCENARIOS, is_reference
from llmsched_env.workload.agent_programs import AgentPrograms, Forks
from llmsched_env.workload.arrivals import MMPP2, ArrivalProcess, Poisson
from llmsched_env.workload.chat_sessions import ChatSessions
from llmsched_env.workload.programs import Apps
from llmsched_env.workload.recorded_calls import RecordedCalls
from llmsched_env.workload.scenario_files import is_scenario_file
from llmsched_env.workload.scenarios import load_scenario, scenario_names
from llmsched_env.workload.single_calls import SingleCalls

__all__ = ["AgentPrograms", "Apps", "ChatSessions", "Forks", "RecordedCalls", "SingleCalls", "load_source", "source_names"]

_HEADS = tuple(200 + 20 * i for i in range(16))


def _chat(arrivals: ArrivalProcess) -> ChatSessions:
    return ChatSessions(Apps(16, _HEADS, 1.0), arrivals, first_scale=0.05, think_scale=0.2, mean_turns=4.0, max_tokens=4_096)


_BUILDERS: dict[str, Callable[[], CallSource]] = {
    "chat": lambda: _chat(Poisson(1.0)),
    "chat-bursts": lambda: _chat(MMPP2(1.0 / 3.0, 7.0 / 3.0, 30.0, 15.0)),
    "agents": lambda: AgentPrograms(),
}


def source_names() -> list[str]:
    """Names of the sources that ship, and of all scenarios."""
    return list(dict.fromkeys([*_BUILDERS, *scenario_names()]))


def load_source(name: str) -> CallSource:
    """A source by its name; a scenario's name or TOML file gives its requests, one by one.

    Raises:
        ConfigError: an unknown name (the nearest is given), or a scenario that is refused.
    """
    if isinstance(name, str) and name in _BUILDERS:
        return _BUILDERS[name]()
    if isinstance(name, str) and (name in SCENARIOS or is_scenario_file(name) or is_reference(name)):
        return SingleCalls(load_scenario(name))
    known = source_names()
    raise ConfigError(
        f"source: {checks.shown(name)} is unknown{did_you_mean(str(name), known)} "
        f"(known: {', '.join(known)}; or a scenario's .toml file, or module:attribute)"
    )
