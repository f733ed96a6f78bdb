"""Streaming clients that write down everything a server answers, how often and in what order."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

MOST_SECONDS = 150.0
"""A client that waits longer is an error: some request was lost."""


@dataclass
class Reply:
    """One client's.

    Attributes:
        status: of HTTP; 200 for a stream.
        tokens: by choice, in order; reasons: why each choice ended, once each time the server said so.
        done: how often the stream was declared over.
        errors: in the stream or in place of it.
    """

    status: int = 0
    tokens: dict[int, list[int]] = field(default_factory=dict)
    reasons: dict[int, list[str]] = field(default_factory=dict)
    done: int = 0
    errors: list[str] = field(default_factory=list)

    def take(self, event: Mapping[str, Any]) -> None:
        """One event of the stream."""
        if "error" in event:
            self.errors.append(str(event["error"]))
            return
        for choice in event["choices"]:
            index = choice["index"]
            self.tokens.setdefault(index, []).extend(choice.get("token_ids") or [])
            if choice["finish_reason"] is not None:
                self.reasons.setdefault(index, []).append(choice["finish_reason"])


def stream(port: int, requests: Sequence[Mapping[str, Any]], after: Callable[[int], None] | None = None) -> list[Reply]:
    """Ask for all of them at once; ``hang_up`` in a request is the number of tokens after which its client disconnects.

    Args:
        after: is told after every event how many there were from all clients.
    """
    events = 0

    async def one(session: aiohttp.ClientSession, request: dict[str, Any]) -> Reply:
        nonlocal events
        hang_up, reply = request.pop("hang_up", None), Reply()
        body = {"model": "tiny", "temperature": 0, "stream": True, "return_token_ids": True, **request}
        async with session.post(f"http://127.0.0.1:{port}/v1/completions", json=body) as response:
            reply.status = response.status
            if response.status != 200:
                reply.errors.append(json.loads(await response.text())["error"]["message"])
                return reply
            async for line in response.content:
                if line.strip() == b"data: [DONE]":
                    reply.done += 1
                elif line.startswith(b"data: "):
                    reply.take(json.loads(line[6:]))
                    events += 1
                    if after is not None:
                        after(events)
                    if hang_up is not None and sum(map(len, reply.tokens.values())) >= hang_up:
                        break
        return reply

    async def all_of_them() -> list[Reply]:
        timeout = aiohttp.ClientTimeout(total=MOST_SECONDS)
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(connector=connector, trust_env=False, timeout=timeout) as session:
            return list(await asyncio.gather(*(one(session, dict(request)) for request in requests)))

    return asyncio.run(all_of_them())
