"""A cluster as a named record: replicas behind one door, the calls that are alive, what has finished.

``cluster.replicas.waiting[i]``, ``cluster.call.prompt``: the same names in compiled code and in Python (``llmsched_env.records``). Each
replica is an ``Engine`` of its own; a router reads what ``Replicas`` and ``Call`` show. Calls, programs and nodes
(``llmsched_env.cluster.calls``) are rows that are used again once nobody needs them: memory follows what is alive, not how much there was.
"""

from __future__ import annotations

from typing import Annotated

from llmsched_env.cluster.finished import Finished
from llmsched_env.cluster.heap import Heap
from llmsched_env.engine.state import Nodes
from llmsched_env.records import Floats, Indices, Ints, Level, Longs, Record, Rows

# --- why the compiled loop returns --------------------------------------------------------------------
DECIDE = 1  # a call is to be handed to a replica: ``cluster.call``
REFILL = 2  # the next programs are needed
FLUSH = 3  # ``finished`` is full
GROW = 4  # replica ``cluster.chosen`` has no row for one more request
ENDED = 5  # nothing is left to do
STUCK = 6  # replica ``cluster.chosen`` can schedule nothing: a defect, raised as an error
PAUSE = 7  # so many events have passed: Python looks for Ctrl-C

# --- what a replica is for ----------------------------------------------------------------------------
WHOLE = 0  # prompt and answer
PREFILLS = 1  # prompts alone: their KV goes to a replica that decodes
DECODES = 2

# --- what happens to a replica ------------------------------------------------------------------------
SLOW_DOWN = 0  # iterations take ``value`` times as long from now on
DRAIN = 1  # takes no more calls; what has not been admitted is routed again, what has goes on to its end
FAIL = 2  # takes no more calls; all it has is routed again, KV and answers so far are lost
COME_BACK = 3  # takes calls again; after FAIL with an empty cache

# --- how a replica stands -----------------------------------------------------------------------------
READY = 0  # between two steps
BEGUN = 1  # within a step, which ends at its engine's ``due``
DOWN = 2  # has failed
OVER = 3  # its engine's episode has ended: the horizon, or the limit on iterations

ITERATION_MEMORY = 1.0 / 16.0  # weight of the latest iteration in ``Replicas.iteration_seconds``
TTFT_MEMORY = 1.0 / 8.0  # weight of the latest first token in ``Replicas.ttft_seconds``


class Replicas(Rows):
    """What a router sees of each replica, one row each: what its server's metrics say while the batch runs that runs now."""

    iteration_seconds: Floats  # measured, of its latest iterations, recent ones counting most; 0 before the first
    ttft_seconds: Floats  # of its latest requests from when they were handed to it, the same
    base_seconds: Floats  # by its calibration: an iteration of decodes takes this much, (``expected_seconds``)
    running_seconds: Floats  # and this for each of them,
    kv_seconds: Floats  # and this for each token of KV;
    prefill_seconds: Floats  # and each prompt token this much
    waiting: Ints  # requests handed to it that are not admitted
    running: Ints  # residents
    waiting_tokens: Ints  # prompt tokens of those who wait, those in the cache included
    prefill_tokens: Ints  # that residents have not computed
    kv_used: Ints  # blocks
    kv_capacity: Ints  # blocks
    accepts: Ints  # 1: takes calls; 0: has failed or is being drained
    role: Ints  # WHOLE, PREFILLS or DECODES
    legal: Ints  # bit p is set: can be chosen for part p of this call (``may_take``)
    cached: Ints  # tokens of this call in its prefix cache; only for routers that ask


class Call(Record):
    """What a router sees of the call to be routed."""

    prompt: int  # tokens
    predicted: int  # output tokens as predicted, 0 where nobody predicts
    program: int  # number of its program: session, agent, or itself
    turn: int  # its depth there, 0 for the first call
    app: int  # application, whose programs begin with the same tokens
    home: int  # replica of the program's latest call, -1: none yet
    part: int  # WHOLE; in a cluster that separates the two, PREFILLS or DECODES
    routed: int  # how many times it was handed to a replica before
    age: float  # seconds since it arrived


class Calls(Rows):
    """Calls that are alive: to come, with a replica, or between two."""

    arrival: Floats  # seconds; of one to come the seconds after its parent's end
    admitted: Floats  # first admission; NaN in this and the next: not yet
    first_token: Floats
    number: Longs  # in the order in which the workload made them
    prompt: Ints
    output: Ints
    predicted: Ints
    node: Ints
    program: Ints  # row of ``Programs``
    turn: Ints
    child: Ints  # first call that its completion releases, -1
    sibling: Ints  # next call that is released with it; of a free row the next free one; -1
    part: Ints  # what is to be done next: WHOLE, PREFILLS or DECODES
    replica: Ints  # that it was handed to last
    arrived: Ints
    evictions: Ints
    cached: Ints
    routed: Ints


class Programs(Rows):
    """Programs that are alive."""

    start: Floats  # seconds
    number: Longs
    app: Ints
    left: Ints  # calls that have not ended
    child: Ints  # first call that its start releases
    home: Ints  # replica of its latest call, -1
    node: Ints  # first of its nodes, -1
    next: Ints  # of a free row the next free one


class NodeOwners(Rows):
    """Nodes of a program in a list; of free rows the next free one."""

    next: Ints


class Starts(Rows):
    """Programs to come, in order of their start."""

    program: Ints


class Machines(Rows):
    """What keeps a replica going, one row each."""

    state: Ints  # READY, BEGUN, DOWN or OVER
    free: Ints  # first row of its engine's requests that is free, -1; the others by ``hidden.next_due``
    handed: Ints  # requests that it has and that have not ended
    inbox_tokens: Ints  # prompt tokens of those that its engine has not received
    longest: Ints  # request, prompt and output, in tokens
    first_edge: Ints  # its classes by prompt length: place in ``cluster.edges``
    num_edges: Ints


class Timeline(Rows):
    """What happens to replicas, in order of time."""

    time: Floats  # seconds
    value: Floats
    kind: Ints
    replica: Ints


class Cluster(Record):
    """Replicas, and the calls on their way through them."""

    replicas: Replicas
    call: Call
    clock: float  # seconds, at which the call is to be routed
    num_replicas: int
    in_system: int  # calls that have arrived and have not ended
    block_size: int  # tokens, the same in all replicas
    # what routers do not see
    calls: Annotated[Calls, Level.HIDDEN]
    programs: Annotated[Programs, Level.HIDDEN]
    nodes: Annotated[Nodes, Level.HIDDEN]
    owners: Annotated[NodeOwners, Level.HIDDEN]
    starts: Annotated[Starts, Level.HIDDEN]
    machines: Annotated[Machines, Level.HIDDEN]
    timeline: Annotated[Timeline, Level.HIDDEN]
    finished: Annotated[Finished, Level.HIDDEN]
    dues: Annotated[Heap, Level.HIDDEN]  # replicas by the end of their step
    pending: Annotated[Heap, Level.HIDDEN]  # calls by the time at which they are to be routed
    edges: Annotated[Indices, Level.HIDDEN]  # upper bounds of classes by prompt length, tokens
    row: Annotated[int, Level.HIDDEN]  # of the call to be routed, -1: none
    chosen: Annotated[int, Level.HIDDEN]  # replica for it
    free_call: Annotated[int, Level.HIDDEN]  # first free row, -1
    free_program: Annotated[int, Level.HIDDEN]
    free_node: Annotated[int, Level.HIDDEN]
    free_calls: Annotated[int, Level.HIDDEN]  # how many
    free_programs: Annotated[int, Level.HIDDEN]
    free_nodes: Annotated[int, Level.HIDDEN]
    next_number: Annotated[int, Level.HIDDEN]  # of the next call that the workload makes
    next_program: Annotated[int, Level.HIDDEN]
    next_base: Annotated[int, Level.HIDDEN]  # contents of the first block of the next node
    next_start: Annotated[int, Level.HIDDEN]  # row of ``starts``
    num_starts: Annotated[int, Level.HIDDEN]
    stream_ended: Annotated[bool, Level.HIDDEN]  # no further programs come than those in ``starts``
    doors_closed: Annotated[bool, Level.HIDDEN]
    next_event: Annotated[int, Level.HIDDEN]  # row of ``timeline``
    num_events: Annotated[int, Level.HIDDEN]
    num_finished: Annotated[int, Level.HIDDEN]  # rows of ``finished`` in use
    finished_room: Annotated[int, Level.HIDDEN]  # beyond so many they are written out first
    legal_known: Annotated[bool, Level.HIDDEN]  # ``replicas.legal`` holds for every call that all replicas can serve
    legal_parts: Annotated[int, Level.HIDDEN]  # all bits of ``replicas.legal``
    shortest_longest: Annotated[int, Level.HIDDEN]  # tokens of the longest request of the replica that takes the shortest
    longest_longest: Annotated[int, Level.HIDDEN]  # of the one that takes the longest
    unreleased: Annotated[int, Level.HIDDEN]  # calls that the end of another will release
    pushes: Annotated[int, Level.HIDDEN]  # calls put into ``pending`` so far
    separated: Annotated[bool, Level.HIDDEN]  # prompts and answers have replicas of their own
    shows_cached: Annotated[bool, Level.HIDDEN]  # the router asks for ``replicas.cached``
    transfer_latency: Annotated[float, Level.HIDDEN]  # seconds from the end of a prompt to its arrival where it is decoded
    transfer_seconds: Annotated[float, Level.HIDDEN]  # the same for each of its tokens
    horizon: Annotated[float, Level.HIDDEN]  # seconds: no call is routed later
    ttft_limit: Annotated[float, Level.HIDDEN]  # seconds
    tpot_limit: Annotated[float, Level.HIDDEN]
    # totals
    arrived: Annotated[int, Level.HIDDEN]
    completed: Annotated[int, Level.HIDDEN]
    rejected: Annotated[int, Level.HIDDEN]
    dropped: Annotated[int, Level.HIDDEN]  # calls that never came, because one before them was rejected
    events: Annotated[int, Level.HIDDEN]  # parts of iterations and hand-overs
    met: Annotated[int, Level.HIDDEN]  # completed within both limits
    completed_tokens: Annotated[int, Level.HIDDEN]  # output tokens of completed calls
    system_seconds: Annotated[float, Level.HIDDEN]  # integral of the number in system up to ``settled``
    settled: Annotated[float, Level.HIDDEN]
    left_count: Annotated[int, Level.HIDDEN]  # calls that have ended since then
    left_seconds: Annotated[float, Level.HIDDEN]  # their ends, each from ``settled`` on, summed
    last_end: Annotated[float, Level.HIDDEN]  # latest completion, seconds
