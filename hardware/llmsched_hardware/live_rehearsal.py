"""A policy's first decisions, on made-up queues, before a server takes requests."""

from __future__ import annotations

from dataclasses import dataclass

from llmsched_env.errors import ConfigError
from llmsched_env.runner import Policy
from llmsched_hardware.live import LiveMirror
from llmsched_hardware.live_gate import Gatekeeper


@dataclass(slots=True)
class _MadeUp:
    """A request as a mirror reads it."""

    request_id: str
    num_prompt_tokens: int
    num_computed_tokens: int = 0
    num_output_placeholders: int = 0
    num_preemptions: int = 0
    generated: int = 0

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + self.generated


def rehearse(policy: Policy, mirror: LiveMirror) -> None:
    """Ask a policy about an empty server, waiting requests, a prefill, a boundary queue; then reset it.

    What is compiled at the first call is compiled here, and a mistake shows before the first request.

    Args:
        mirror: empty; used up.

    Raises:
        ConfigError: the policy raises, or decides what is not a decision for its queues.
    """
    gatekeeper = Gatekeeper(mirror, max_wait_seconds=1e9)
    outside: list[_MadeUp] = []
    resident: list[_MadeUp] = []

    def ask(now: float) -> None:
        mirror.refresh(now, resident, outside, kv_blocks=len(resident))
        gatekeeper.allow(policy.decide(mirror.view), now)

    try:
        ask(0.0)
        for i, prompt in enumerate((8, 20, 40)):
            request = _MadeUp(f"made-up-{i}", prompt)
            outside.append(request)
            mirror.arrive(request.request_id, request.num_prompt_tokens, 0.0, 0.0, output_tokens=16)
        ask(0.01)
        entered = outside.pop(0)
        resident.append(entered)
        mirror.note(0.01, [], [entered.request_id], [])
        entered.num_computed_tokens = 4
        ask(0.02)
        entered.generated = policy.layout.segment_ends[0] if policy.layout.segment_ends else 1
        entered.num_computed_tokens = entered.num_tokens - 1
        ask(0.03)
        policy.reset()
    except Exception as error:  # the operator's own policy: whatever it raises, the server does not start with it
        raise ConfigError(f"policy {policy.name!r} fails on an almost empty server: {type(error).__name__}: {error}") from error
