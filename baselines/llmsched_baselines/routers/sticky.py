"""Sessions stay where they are."""

from __future__ import annotations

from typing import ClassVar

from llmsched_baselines.routers.router import Door, Router
from llmsched_baselines.routers.shortest import shortest_queue
from llmsched_env.cluster.routing import RouterRule, may_take
from llmsched_env.cluster.state import Cluster
from llmsched_env.compiled import compiled
from llmsched_env.records import Numbers


@compiled
def sticky(cluster: Cluster, own: Numbers) -> int:
    home = cluster.call.home
    if home >= 0 and may_take(cluster, home):
        return home
    return shortest_queue(cluster)


class Sticky(Router):
    """A program's calls go where its latest one went; the first call, and one whose replica refuses, to the shortest queue.

    A session that had to leave stays where it went. vLLM's production stack places sessions by a consistent hash ring of the session's
    id instead, which knows no queue (``session``: ``src/vllm_router/routers/routing_logic.py``, ``SessionRouter``, commit 008a23b).
    """

    name: ClassVar[str] = "sticky"

    def __init__(self, door: Door) -> None:
        super().__init__(door)
        self.rule = RouterRule(sticky)
