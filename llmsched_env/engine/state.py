"""One engine as a named record, with what each field holds.

``engine.clock``, ``engine.requests.prompt[r]``, ``engine.queues.waiting[q]``: the same names in compiled code and in
Python (``llmsched_env.records``). J classes, K segments of decode length, Q = J K queues, queue q = j K + k. Requests are
numbered 0 .. N-1 in the order of arrival.

**Those who advance together.** The residents of a segment that decode are *members* of its group. In an iteration in
which the segment runs each of them gets one token, so all that changes is one counter, ``queues.steps[q]``. A member's
own numbers are kept as differences to it: ``requests.base_generated[r] + queues.steps[requests.group[r]]`` (use
``llmsched_env.engine.residents.generated`` and ``computed``). Whoever advances by itself, a prefill or a request at a
boundary, belongs to group Q, whose counter stays 0, so that the same sum is right for everybody.

**What happens next** is known without a search: ``wheel`` holds the members of group q whose next event (completion or
segment end) is due at step d in the list of place ``d mod wheel_size`` of the group, and ``phases`` counts them by the
position of their last token within a block, so that the blocks an iteration needs are one number a group.
"""

from __future__ import annotations

from typing import Annotated

from llmsched_env.perf.batch import BatchSums
from llmsched_env.records import Floats, Ints, Level, Longs, Record, Rows, Scratch

# --- status of a request ------------------------------------------------------------------------------
FUTURE = 0
WAITING = 1  # outside, no KV
PREFILL = 2  # resident, prompt (and kept tokens) not computed yet
DECODE = 3
BOUNDARY = 4  # at the end of a segment, KV kept
ENTERING = 5  # left the boundary queue of a segment that is held
PREFILLED = 6  # within an iteration: the last chunk has just been computed
FINISHED = 7
REJECTED = 8

# --- how an episode ends ------------------------------------------------------------------------------
RUNNING = 0
END_FINISHED = 1  # every request completed (or was rejected)
END_STRANDED = 2  # no arrival left, nothing scheduled, drain off
END_HORIZON = 3
END_ITERATIONS = 4  # safety net
END_STUCK = 5  # a forced drain iteration scheduled nothing: a defect, raised as an error
END_NAMES = ("running", "finished", "stranded", "horizon", "max_iterations", "stuck")

NO_END = 2**31 - 1
NO_EVENT = -1
LATE_KEY = 2**30  # added to the queue key of a late request: after every timely one
PRIORITY_STEP = 2**20  # between the queue keys of one priority and the next: more requests an episode cannot have
RATE_WINDOW_SECONDS = 30.0
INPUT_PRICE = 1.0  # of a prompt token in the service that a tenant receives (arXiv 2401.00588, w_p)
OUTPUT_PRICE = 2.0  # of an output token (w_q)
PREDICTION_MEMORY = 256  # completed requests over which predictions are judged


class Settings(Record):
    """``EngineConfig``, ``QueueLayout`` and ``EpisodeLimits`` as the kernel reads them."""

    FIXED = True

    paper: bool  # preset
    capacity: int  # KV units: tokens in the paper preset, blocks in vllm
    block_size: int
    block_shift: int  # log2(block_size) where that is whole, else -1
    max_num_batched_tokens: int
    least_token_budget: int  # of a decision
    max_num_seqs: int
    most_active: int  # residents at which admission ends
    long_prefill: int  # prompt tokens of one request in an iteration; 0: no limit
    prefill_interval: int  # iterations from one that carried prefill to the next; 1: none is held back
    interval_release: bool  # an interval ends early once prefill is bound by capacity
    longest_request: int  # tokens
    chunked_prefill: bool
    reserve_full: bool  # blocks of the whole request must be free to admit it
    watermark_blocks: int
    padded_prefill: bool  # Vidur's accounting of a prefill batch
    decode_needs_free_block: bool  # Vidur's
    by_class: bool  # admission order
    by_tenant: bool  # classes are tenants: the service that each receives is counted
    by_priority: bool  # vLLM's scheduling policy "priority"
    boundary_slot: bool  # variant A of Nested WAIT
    drain: bool
    max_iterations: int
    num_classes: int
    num_segments: int
    num_queues: int
    wheel_size: int  # a power of two
    trace: bool
    lose_progress: bool  # an evicted request starts over with nothing generated
    prefix_caching: bool
    external: bool  # another engine schedules: nobody is a member of a group
    handed_in: bool  # requests are handed in one by one (``llmsched_env.engine.parts``); ``handed`` says more of them
    reveal: bool  # policies are told output lengths
    by_prediction: bool  # classes by predicted output length
    horizon: float  # seconds
    late_after: float  # seconds after which a request never admitted is late; 0 never


class Requests(Rows):
    """What a server knows of the requests that have arrived; zeros for those to come."""

    prompt: Ints
    status: Ints
    queue: Ints  # waiting: outside queue of its class; resident: its segment
    base_generated: Ints  # tokens generated; relative to the steps of ``group``
    base_computed: Ints  # tokens whose KV is on the GPU; the same
    group: Ints
    target: Ints  # prefill target: prompt + tokens generated at admission
    tokens: Ints  # scheduled in this iteration, for those who advance by themselves
    key: Ints  # queue key: arrivals 0, 1, 2, ...; each eviction the next number below all given; by priority: see ``Order``
    next: Ints  # waiting: next of its queue; resident: next by admission; -1
    previous: Ints  # resident: previous by admission; -1
    sequence: Ints  # number of its latest admission
    next_peer: Ints  # at a boundary, or advancing by itself: next of that list by admission; -1
    previous_peer: Ints
    outside: Ints  # outside queue of its class
    output: Annotated[Ints, Level.KNOWN]  # output length, where the scenario reveals it; 0 otherwise


class Hidden(Rows):
    """What no policy may know: the requests to come, lengths, the events that follow from them, timestamps."""

    arrival: Floats  # seconds; NaN in the other three: not yet
    admitted: Floats  # first admission
    first_token: Floats
    completed: Floats
    prompt: Ints
    output: Ints
    outside: Ints  # outside queue of its class
    due: Ints  # step of its group at which something happens; NO_EVENT where it is happening
    next_due: Ints  # same place of the wheel; -1
    previous_due: Ints
    evictions: Ints
    forced: Ints  # of these, by the engine


class Arrived(Rows):
    """What came with a request, of those who have arrived: a table of its own as a row of ``Requests`` is a cache line."""

    time: Floats  # seconds; NaN for those to come
    predicted: Floats  # output length as predicted, tokens; 0 where nothing is predicted, and for those to come


class Foretold(Rows):
    """Predictions of all requests, those to come included, one row a request."""

    predicted: Ints


class Order(Rows):
    """Queue keys where requests have priorities, one row a request: PRIORITY_STEP x priority + number of the request."""

    key: Ints


class Handed(Rows):
    """What an engine of a cluster is told of a request besides (``llmsched_env.cluster``), one row a request."""

    call: Ints  # row of the cluster's calls
    carried: Ints  # tokens whose KV comes with it; 0 once it has been admitted
    cached: Ints  # tokens found in the prefix cache at its first admission; -1 before


class Queues(Rows):
    """One row a queue and segment; one more, Q, for those who advance by themselves."""

    head_arrival: Floats  # k = 0: arrival time of the head, NaN if empty
    arrivals: Floats  # k = 0: arrivals of the class, each decayed by exp(-age / RATE_WINDOW_SECONDS)
    weight: Floats  # k = 0: of the tenant
    service: Floats  # k = 0: what the tenant has received, INPUT_PRICE x prompt tokens at first admission + OUTPUT_PRICE x output tokens
    recent_service: Floats  # k = 0: the same, each part decayed by exp(-age / RATE_WINDOW_SECONDS)
    counter: Floats  # k = 0: virtual token counter: service / weight, lifted when a tenant comes back (``queues.lift_counter``)
    waiting: Ints  # requests in the queue: outside (k = 0) or at the boundary (k >= 1)
    residents: Ints  # residents inside the segment
    resident_kv: Ints  # their KV, in KV units
    boundary_kv: Ints  # KV of the boundary queue, in KV units (0 for k = 0)
    head_tokens: Ints  # k = 0: tokens to prefill of the head (prompt + kept); 0 if empty
    head_key: Ints  # k = 0: its queue key
    head: Ints  # k = 0: first request outside, -1 if empty
    tail: Ints
    timely: Ints  # k = 0: last request that is not late, -1 if none; late ones stand after it
    late: Ints  # k = 0: late requests
    left: Annotated[Ints, Scratch]  # admissions left to grant, or the next request of a walk; free between two steps
    rank: Ints  # k = 0: place of the class in the admission order by class
    segment_end: Ints  # r_k; NO_END in the last segment
    runs: Ints  # in this iteration
    steps: Ints  # tokens given to each member so far
    members: Ints
    member_kv: Ints  # tokens computed of all members
    phase: Ints  # -steps mod block_size
    first_peer: Ints  # first at the boundary by admission; in row Q first of those who advance by themselves; -1
    last_peer: Ints


class Phases(Rows):
    """Row q * block_size + p: members of group q with (computed - steps) mod block_size = p."""

    count: Ints


class Wheel(Rows):
    """Row q * wheel_size + p: first member of group q that is due at a step = p modulo wheel_size; -1."""

    first: Ints


class Events(Rows):
    """Requests by what happened to them in the last step; as many rows as there can be residents."""

    evicted: Ints  # by the decision, newest first
    preempted: Ints  # by the engine, in order
    finished: Ints
    due: Annotated[Ints, Level.HIDDEN]  # scratch
    first_tokens: Annotated[Ints, Level.HIDDEN]  # whose first output token is in the batch in flight (asynchronous scheduling)
    last_tokens: Annotated[Ints, Level.HIDDEN]  # whose last one is
    traced: Ints  # scheduled, in order of admission; with ``settings.trace``
    traced_tokens: Ints


class Report(Record):
    """What the last step did."""

    start: float  # seconds
    duration: float
    system_seconds: float  # number in system integrated over the step
    idle: int
    forced_drain: int
    admitted: int
    entered: int  # from boundary queues, in the last pass
    completed: int
    arrived: int
    rejected: int
    evicted: int
    preempted: int
    kv_reserved: int  # KV units after admissions
    completed_tokens: int
    generated_tokens: int
    first_tokens: int  # requests whose first output token came out
    ttft_seconds: float  # their times to first token, summed
    traced: int
    out_of_range: int  # 1 if the batch lies outside the range of the time model's data


class Blocks(Rows):
    """KV blocks whose contents are kept (prefix caching); the last row is the free queue's sentinel."""

    next: Ints
    previous: Ints
    users: Ints
    contents: Longs  # -1: none
    twin: Ints  # next younger block with the same contents, -1


class Nodes(Rows):
    """Sequences of tokens of which prompts and answers are the beginning; several pools may share the table.

    A row may be used again for another sequence when no request and no other node names it any more, a number of contents never.
    """

    base: Longs  # number of the contents of its first block; the others' follow, but for those of ``shared``
    parent: Ints  # node that it begins like, -1: none
    shared: Ints  # blocks at its beginning that are the parent's


class Files(Rows):
    """A request in the pool, one row a request."""

    node: Ints  # row of ``Nodes`` that its prompt and answer are the beginning of
    seat: Ints  # row of ``Seats`` while resident, -1
    in_flight: Ints  # 1 where an output token is in the batch in flight: known in number, it does not fill a block with contents yet


class Seats(Rows):
    """One row a resident: its blocks lie in ``pool.table`` from seat * blocks_per_seat on."""

    held: Ints  # blocks of the request
    cached: Ints  # of these, how many have contents
    spare: Ints  # stack of seats not in use


class Table(Rows):
    block: Ints


class Index(Rows):
    """Hash table from contents to the oldest block that has them; a power of two of rows, at least four for each block."""

    contents: Longs
    block: Ints  # -1: the row is empty


class Pool(Record):
    """Blocks with contents (``llmsched_env.engine.prefix_cache``)."""

    blocks: Blocks
    nodes: Nodes
    files: Files
    seats: Seats
    table: Table
    index: Index
    index_mask: int  # rows of ``index`` - 1
    index_shift: int  # ``prefix_cache.HASH_BITS`` - log2 of these rows
    num_blocks: int
    blocks_per_seat: int
    free: int
    spare: int
    uncached_first: bool
    asked_tokens: int  # tokens of all admissions
    hit_tokens: int  # of these, found in the cache


class Code(Record):
    """Addresses of the functions that this engine calls (``llmsched_env.pointers``): its preset's, its options', its time model's.

    ``llmsched_env.engine.link`` fills them in. What an engine does not use stays 0 and is not compiled.
    """

    FIXED = True

    step: int  # (engine, decision)
    begin: int  # (engine, decision): the first part of a step, where something happens between the two
    finish: int  # (engine): the second
    overlaps: bool  # the next iteration is scheduled while one runs
    schedule: int  # (engine)
    callback: int  # of another engine: ``llmsched_env.pointers.Callback``
    seconds: int  # (batch) -> float
    enter_boundaries: int  # (engine, decision)
    evict_boundaries: int  # (engine, decision)
    place: int  # (engine, r, tokens)
    cached_blocks: int  # (pool, r, most) -> int
    free_among: int  # (pool, r, hits) -> int
    open_seat: int  # (pool, r, hits)
    grow: int  # (pool, r, count, full)
    close_seat: int  # (pool, r)
    queue_in_order: int  # (engine, r)
    serve_by_priority: int  # (engine, deferred, most) -> int
    describe_contexts: int  # (engine)


class Cadence(Record):
    """When prefill was last computed, for ``prefill_schedule_interval``; 0 in an engine without one."""

    since_prefill: int  # iterations executed since the last one that carried prefill; at first the interval
    capacity_bound: int  # 1: at the last release somebody who might have entered was left outside


class Predictions(Record):
    """What has become of predictions so far, in logarithms of tokens: sums over completed requests, recent ones counting most."""

    arrived: int  # requests 0 .. arrived - 1 have arrived
    completed: float  # completed requests that had a prediction; each counts (1 - 1 / PREDICTION_MEMORY) ** (how many came after it)
    predicted: float  # sum of log(predicted)
    actual: float  # sum of log(output)
    predicted_squares: float
    actual_squares: float
    products: float  # sum of log(predicted) log(output)


class Engine(Record):
    """One engine and the requests of its episode."""

    code: Code
    settings: Settings
    requests: Requests
    arrived: Arrived
    queues: Queues
    events: Events
    report: Report
    batch: BatchSums
    # time, seconds
    clock: float
    last_iteration: float  # length of the latest iteration
    busy_seconds: float
    rate_seconds: float  # length of the window of ``queues.arrivals``: W (1 - exp(-clock / W)); rate = arrivals / this
    kv_seconds: float  # integral of KV reserved (KV units x seconds)
    system_seconds: float  # integral of the number in system
    # now
    num_residents: int
    num_waiting: int  # outside, all classes
    waiting_tokens: int  # that they have to prefill, those found in a cache included
    num_boundary: int
    num_prefilling: int
    kv_tokens: int  # tokens computed, all residents
    kv_blocks: int
    oldest: int  # resident admitted first, -1; the others follow by ``requests.next``
    newest: int
    next_sequence: int
    lowest_key: int
    last_left: int  # outside queue of the tenant whose last waiting request was taken in most recently; -1: none yet
    end: int
    measured_seconds: float  # of this iteration, where another engine has measured it; below 0: the time model says
    run_all: bool  # the iteration is a greedy one that replaces the decision
    token_budget: int  # tokens that the iteration may compute, as the decision has it (``vllm`` preset)
    # totals of the episode
    finished: int
    rejected: int
    iterations: int
    idle_steps: int
    drain_iterations: int
    evictions: int
    forced_evictions: int
    kv_peak: int  # highest KV reserved, KV units
    total_tokens: int  # output tokens of completed requests
    out_of_range: int
    # the batch in flight, where the next one is scheduled meanwhile (``llmsched_env.engine.async_step``)
    flight_seconds: Annotated[float, Level.HIDDEN]  # 0: there is none
    flight_tokens: Annotated[int, Level.HIDDEN]  # output tokens
    flight_out_of_range: Annotated[int, Level.HIDDEN]
    num_first_tokens: Annotated[int, Level.HIDDEN]
    num_last_tokens: Annotated[int, Level.HIDDEN]
    predictions: Predictions
    # a step that has begun, and requests that are handed in one by one (``llmsched_env.engine.parts``)
    pending_seconds: Annotated[float, Level.HIDDEN]  # of the batch that was scheduled; 0: none
    due: Annotated[float, Level.HIDDEN]  # clock at which the step ends; infinite: at the next arrival, whenever that is
    slowdown: Annotated[float, Level.HIDDEN]  # iterations take so many times what the time model says
    more: Annotated[bool, Level.HIDDEN]  # requests may still be handed in
    inbox: Annotated[int, Level.HIDDEN]  # first request handed in that has not been received; the others by ``hidden.next_due``; -1
    inbox_end: Annotated[int, Level.HIDDEN]
    received: Annotated[int, Level.HIDDEN]  # requests received from there
    # what policies do not see
    num_requests: Annotated[int, Level.HIDDEN]
    next_arrival: Annotated[int, Level.HIDDEN]
    hidden: Annotated[Hidden, Level.HIDDEN]
    foretold: Annotated[Foretold, Level.HIDDEN]
    phases: Annotated[Phases, Level.HIDDEN]
    wheel: Annotated[Wheel, Level.HIDDEN]
    pool: Annotated[Pool, Level.HIDDEN]
    cadence: Annotated[Cadence, Level.HIDDEN]  # kept by the compiled schedule alone, not where another engine schedules
    order: Annotated[Order, Level.HIDDEN]  # only where the engine schedules by priority
    handed: Annotated[Handed, Level.HIDDEN]  # only where requests are handed in one by one


def wheel_size(num_queues: int) -> int:
    """Places of a group's wheel: a lap is longer than most outputs where groups are few, and memory stays small where they are many."""
    size = 1024
    while size > 32 and size * num_queues > 4096:
        size //= 2
    return size
