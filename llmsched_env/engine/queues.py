"""Outside queues: requests without KV (compiled).

Lists through ``requests.next``: arrivals join behind the timely requests, evicted ones at the head, so each list is sorted
by queue key (rule 7). Where late requests are served last, a list is its timely requests up to
``queues.timely``, then its late ones. Where requests have priorities both kinds are put in by their key
(``llmsched_env.engine.priority``).
"""

from __future__ import annotations

import math

from llmsched_env.compiled import compiled
from llmsched_env.engine.state import INPUT_PRICE, LATE_KEY, OUTPUT_PRICE, RATE_WINDOW_SECONDS, REJECTED, WAITING, Engine
from llmsched_env.pointers import call


@compiled
def give_service(engine: Engine, q: int, prompt: int, output: int) -> None:
    """The tenant of outside queue q receives so many prompt and output tokens (arXiv 2401.00588, Algorithm 2: its counter rises)."""
    queues = engine.queues
    service = INPUT_PRICE * prompt + OUTPUT_PRICE * output
    queues.service[q] += service
    queues.recent_service[q] += service
    queues.counter[q] += service / queues.weight[q]


@compiled
def lift_counter(engine: Engine, q: int) -> None:
    """A request joins outside queue q: a tenant of whom nobody waited has no claim on the service it did not ask for meanwhile.

    arXiv 2401.00588, Algorithm 2, monitoring stream: its counter is lifted to the least of the tenants who wait, or, where nobody
    does, to that of the tenant who was last to leave the queue. It is never lowered.
    """
    queues, settings = engine.queues, engine.settings
    if queues.waiting[q] > 0:
        return
    least = math.inf
    for other in range(0, settings.num_queues, settings.num_segments):
        if queues.waiting[other] > 0:
            least = min(least, queues.counter[other])
    if least == math.inf:
        least = queues.counter[engine.last_left] if engine.last_left >= 0 else 0.0
    queues.counter[q] = max(queues.counter[q], least)


@compiled
def count_in(engine: Engine, r: int, q: int) -> None:
    """Request r has joined outside queue q."""
    engine.queues.waiting[q] += 1
    engine.num_waiting += 1
    engine.waiting_tokens += engine.requests.prompt[r] + engine.requests.base_generated[r]


@compiled
def count_out(engine: Engine, r: int, q: int) -> None:
    """Request r has left outside queue q."""
    engine.queues.waiting[q] -= 1
    engine.num_waiting -= 1
    engine.waiting_tokens -= engine.requests.prompt[r] + engine.requests.base_generated[r]
    if engine.queues.waiting[q] == 0:
        engine.last_left = q


@compiled
def push_back(engine: Engine, r: int, q: int) -> None:
    """Request r joins outside queue q after its last timely request."""
    requests, queues = engine.requests, engine.queues
    before = queues.timely[q]
    if before < 0:
        requests.next[r] = queues.head[q]
        queues.head[q] = r
    else:
        requests.next[r] = requests.next[before]
        requests.next[before] = r
    queues.timely[q] = r
    if requests.next[r] < 0:
        queues.tail[q] = r
    count_in(engine, r, q)


@compiled
def push_front(engine: Engine, r: int) -> None:
    """An evicted request becomes the head of its outside queue."""
    requests, queues = engine.requests, engine.queues
    q = requests.queue[r]
    requests.next[r] = queues.head[q]
    queues.head[q] = r
    if queues.timely[q] < 0:
        queues.timely[q] = r
    if queues.tail[q] < 0:
        queues.tail[q] = r
    count_in(engine, r, q)


@compiled
def pop_front(engine: Engine, q: int) -> int:
    """Take the head of outside queue q."""
    queues = engine.queues
    r = queues.head[q]
    following = engine.requests.next[r]
    queues.head[q] = following
    if following < 0:
        queues.tail[q] = -1
    if queues.timely[q] == r:
        queues.timely[q] = -1
    elif queues.timely[q] < 0:
        queues.late[q] -= 1
    count_out(engine, r, q)
    return r


@compiled
def remove(engine: Engine, r: int) -> None:
    """Take request r, wherever it stands, out of its outside queue."""
    requests, queues = engine.requests, engine.queues
    q = requests.queue[r]
    previous = -1
    x = queues.head[q]
    late = queues.timely[q] < 0
    while x != r:
        late = late or x == queues.timely[q]
        previous = x
        x = requests.next[x]
    following = requests.next[r]
    if previous < 0:
        queues.head[q] = following
    else:
        requests.next[previous] = following
    if following < 0:
        queues.tail[q] = previous
    if queues.timely[q] == r:
        queues.timely[q] = previous
    elif late:
        queues.late[q] -= 1
    count_out(engine, r, q)


@compiled
def precedes(engine: Engine, q: int, r: int, best: int, other: int) -> bool:
    """Whether request r of outside queue q is admitted before request ``other`` of queue ``best`` (-1: there is none).

    Timely requests before late ones; then, in the order by class, the rank of the class; then the queue key.
    """
    if best < 0:
        return True
    queues = engine.queues
    key, other_key = engine.requests.key[r], engine.requests.key[other]
    late, other_late = key >= LATE_KEY // 2, other_key >= LATE_KEY // 2
    if late != other_late:
        return other_late
    if engine.settings.by_class != 0 and queues.rank[q] != queues.rank[best]:
        return queues.rank[q] < queues.rank[best]
    return key < other_key


@compiled
def next_outside(engine: Engine) -> int:
    """Outside queue whose head is next in the global admission order among those with ``left`` above 0; -1 if none."""
    queues, settings = engine.queues, engine.settings
    best = -1
    for q in range(0, settings.num_queues, settings.num_segments):
        if queues.head[q] >= 0 and queues.left[q] > 0 and precedes(engine, q, queues.head[q], best, queues.head[max(best, 0)]):
            best = q
    return best


@compiled
def start_of_queues(engine: Engine) -> None:
    """Begin a walk over the outside requests: ``queues.left`` holds the next one of each queue, -1 at its end."""
    queues, settings = engine.queues, engine.settings
    for q in range(0, settings.num_queues, settings.num_segments):
        queues.left[q] = queues.head[q]


@compiled
def next_in_order(engine: Engine) -> int:
    """The outside queue whose next request of the walk is admitted before all others; -1 if none is left."""
    queues, settings = engine.queues, engine.settings
    best = -1
    for q in range(0, settings.num_queues, settings.num_segments):
        if queues.left[q] >= 0 and precedes(engine, q, queues.left[q], best, queues.left[max(best, 0)]):
            best = q
    return best


@compiled
def mark_late(engine: Engine) -> None:
    """Requests that have waited too long for their first admission move behind the timely ones of their queue.

    Those evicted since (key below 0) are not late. The others stand in arrival order, so the search ends
    at the first that is in time.
    """
    requests, queues, settings = engine.requests, engine.queues, engine.settings
    for q in range(0, settings.num_queues, settings.num_segments):
        last = queues.timely[q]
        previous = -1
        r = queues.head[q] if last >= 0 else -1
        while r >= 0:
            following = requests.next[r]
            if requests.key[r] < 0:
                previous = r
            elif engine.clock - engine.hidden.arrival[r] > settings.late_after:
                requests.key[r] += LATE_KEY
                queues.late[q] += 1
                if following >= 0:
                    if previous < 0:
                        queues.head[q] = following
                    else:
                        requests.next[previous] = following
                    requests.next[queues.tail[q]] = r
                    requests.next[r] = -1
                    queues.tail[q] = r
                if r == last:
                    queues.timely[q] = previous
            else:
                break
            if r == last:
                break
            r = following


@compiled
def refresh_heads(engine: Engine) -> None:
    """What a policy sees of each outside queue's head."""
    requests, queues, settings = engine.requests, engine.queues, engine.settings
    for q in range(0, settings.num_queues, settings.num_segments):
        head = queues.head[q]
        if head < 0:
            queues.head_tokens[q] = 0
            queues.head_key[q] = 0
            queues.head_arrival[q] = math.nan
        else:
            queues.head_tokens[q] = requests.prompt[head] + requests.base_generated[head]
            queues.head_key[q] = requests.key[head]
            queues.head_arrival[q] = engine.hidden.arrival[head]


@compiled
def receive(engine: Engine, r: int, number: int, start: float) -> float:
    """Queue request r, the ``number``-th to arrive, or reject it; returns its seconds here since ``start``."""
    requests, queues, hidden, settings = engine.requests, engine.queues, engine.hidden, engine.settings
    engine.report.arrived += 1
    requests.prompt[r] = hidden.prompt[r]
    engine.arrived.time[r] = hidden.arrival[r]
    engine.arrived.predicted[r] = engine.foretold.predicted[r]
    if settings.reveal != 0:
        requests.output[r] = hidden.output[r]
    q = hidden.outside[r]
    requests.queue[r] = q
    requests.outside[r] = q
    if hidden.prompt[r] + hidden.output[r] > settings.longest_request:
        requests.status[r] = REJECTED
        engine.rejected += 1
        engine.report.rejected += 1
        return 0.0
    requests.status[r] = WAITING
    requests.group[r] = settings.num_queues
    if settings.by_tenant != 0:
        lift_counter(engine, q)
    if settings.by_priority != 0:
        call(engine.code.queue_in_order, engine, r)
    else:
        requests.key[r] = number
        push_back(engine, r, q)
    queues.arrivals[q] += math.exp((hidden.arrival[r] - engine.clock) / RATE_WINDOW_SECONDS)
    return engine.clock - max(start, hidden.arrival[r])


@compiled
def receive_arrivals(engine: Engine, start: float) -> float:
    """Queue every request with arrival <= clock, or reject it; returns their request-seconds since ``start``."""
    r = engine.next_arrival
    seconds = 0.0
    while r < engine.num_requests and engine.hidden.arrival[r] <= engine.clock:
        seconds += receive(engine, r, r, start)
        r += 1
    engine.next_arrival = r
    engine.predictions.arrived = r
    return seconds


@compiled
def receive_inbox(engine: Engine, start: float) -> float:
    """The same with requests that were handed in one by one, whose rows say nothing of their order."""
    seconds = 0.0
    r = engine.inbox
    while r >= 0 and engine.hidden.arrival[r] <= engine.clock:
        following = engine.hidden.next_due[r]
        seconds += receive(engine, r, engine.received, start)
        engine.received += 1
        r = following
    engine.inbox = r
    if r < 0:
        engine.inbox_end = -1
    return seconds
