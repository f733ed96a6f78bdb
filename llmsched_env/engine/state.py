"""Arrays of one engine: what each row holds.

The kernel is plain loops over these arrays; a row index is a constant here and nowhere else. All
arrays of one engine are allocated once per workload size and reused by ``reset``.

=========  =========  ===========  =====================================================
name       dtype      shape        holds
=========  =========  ===========  =====================================================
requests   int32      (R_ROWS, N)  every request of the episode
times      float64    (T_ROWS, N)  its timestamps (seconds; NaN = not yet)
slots      int32      (S_ROWS, S)  residents, dense, in admission order
queues     int32      (Q_ROWS, Q)  one column a queue / segment
queue_f    float64    (QF_ROWS, Q) the same, float
scalars    int64      (I_ROWS,)    counters, and the report of the last step
clocks     float64    (F_ROWS,)    clock, integrals, and the report of the last step
batch      float64    (B_FIELDS,)  sums of the last batch (``llmsched_env.perf.batch``)
events     int32      (3, S)       ids: evicted by decision, preempted, finished in the step
trace      int32      (2, S)       (id, tokens) scheduled in the step
=========  =========  ===========  =====================================================
"""

from __future__ import annotations

# --- requests (int32) -------------------------------------------------------------------------
R_PROMPT = 0
R_OUTPUT = 1
R_CLASS = 2
R_STATUS = 3
R_GENERATED = 4  # tokens kept by a waiting request (recompute preemption keeps them)
R_NEXT = 5  # next request of the class queue, -1 at the tail
R_KEY = 6  # queue key: arrivals 0, 1, 2, ...; each eviction the next number below all given
R_EVICTIONS = 7
R_FORCED = 8
R_ROWS = 9

STATUS_FUTURE = 0
STATUS_WAITING = 1
STATUS_RESIDENT = 2
STATUS_FINISHED = 3
STATUS_REJECTED = 4

# --- times (float64 seconds) --------------------------------------------------------------------
T_ARRIVAL = 0
T_ADMITTED = 1  # first admission
T_FIRST_TOKEN = 2
T_COMPLETED = 3
T_ROWS = 4

# --- slots (int32) ------------------------------------------------------------------------------
S_ID = 0
S_QUEUE = 1  # queue / segment index q = j * K + k
S_STATE = 2
S_COMPUTED = 3  # tokens whose KV is on the GPU
S_GENERATED = 4
S_TARGET = 5  # prefill target: prompt + tokens generated at admission
S_OUTPUT = 6  # hidden from policies unless revealed
S_SEGMENT_END = 7  # r_k of the current segment; OUTPUT_END in the last
S_BLOCKS = 8
S_TOKENS = 9  # scheduled in this iteration
S_PROMPT = 10
S_STOP = 11  # min(output, segment end): the token count at which something happens
S_ROWS = 12

SLOT_INTERIOR = 0
SLOT_BOUNDARY = 1
SLOT_ENTERING = 2  # left the boundary queue in this iteration
SLOT_GONE = 3  # evicted or completed, compacted at the end of the step

NO_END = 2**31 - 1
LATE_KEY = 2**30  # added to the queue key of a late request: after every timely one

# --- queues (int32) -----------------------------------------------------------------------------
Q_WAITING = 0  # requests in queue q: outside (k = 0) or at the boundary (k >= 1)
Q_RESIDENTS = 1  # residents inside segment q
Q_RESIDENT_KV = 2  # their KV, in KV units (tokens or blocks)
Q_BOUNDARY_KV = 3  # KV of boundary queue q, in KV units (0 for k = 0)
Q_HEAD_TOKENS = 4  # k = 0: tokens to prefill of the head (prompt + kept); 0 if empty
Q_HEAD_KEY = 5  # k = 0: queue key of the head
Q_HEAD = 6  # k = 0: request at the head, -1 if empty
Q_TAIL = 7
Q_LEFT = 8  # scratch: admissions or evictions left to grant
Q_TIMELY = 9  # k = 0: last request that is not late, -1 if none; late ones stand after it
Q_LATE = 10  # k = 0: late requests
Q_ROWS = 11

# --- queue_f (float64) --------------------------------------------------------------------------
QF_HEAD_ARRIVAL = 0  # k = 0: arrival time of the head, NaN if empty
QF_ARRIVALS = 1  # k = 0: arrivals of the class, each decayed by exp(-age / RATE_WINDOW_SECONDS)
QF_ROWS = 2

# --- scalars (int64) ----------------------------------------------------------------------------
I_RESIDENTS = 0
I_WAITING = 1  # outside, all classes
I_BOUNDARY = 2
I_NEXT_ARRIVAL = 3
I_LOW_KEY = 4
I_KV_TOKENS = 5  # tokens computed, all residents
I_KV_BLOCKS = 6
I_FINISHED = 7
I_REJECTED = 8
I_ITERATIONS = 9
I_IDLE_STEPS = 10
I_DRAIN_ITERATIONS = 11
I_EVICTIONS = 12
I_FORCED_EVICTIONS = 13
I_DONE = 14  # END_* below
I_KV_PEAK = 15  # highest KV seen after admissions, KV units
I_TOTAL_TOKENS = 16  # output tokens of completed requests, whole episode
# report of the last step
I_IDLE = 17
I_FORCED_DRAIN = 18
I_ADMITTED = 19
I_COMPLETED = 20
I_ARRIVED = 21
I_STEP_REJECTED = 22
I_STEP_EVICTED = 23
I_STEP_PREEMPTED = 24
I_KV_RESERVED = 25
I_COMPLETED_TOKENS = 26
I_GENERATED_TOKENS = 27
I_TRACED = 28
I_UNIFORM = 29  # scratch: leading slots that all decode one token in this iteration
I_STEP_OUT_OF_RANGE = 30  # 1 if the batch lies outside the range of the time model's data
# totals again
I_OUT_OF_RANGE = 31  # iterations whose batch does
I_PREFILLING = 32  # residents whose prefill is unfinished
I_ROWS = 33

END_NOT = 0
END_FINISHED = 1  # every request completed (or was rejected)
END_STRANDED = 2  # no arrival left, nothing scheduled, drain off
END_HORIZON = 3
END_ITERATIONS = 4  # safety net
END_STUCK = 5  # a forced drain iteration scheduled nothing: a defect, raised as an error

# --- clocks (float64) ---------------------------------------------------------------------------
F_CLOCK = 0
F_KV_SECONDS = 1  # integral of KV used (KV units x seconds)
F_SYSTEM_SECONDS = 2  # integral of the number in system
F_RATE_SECONDS = 3  # length of that window so far: W (1 - exp(-clock / W)); rate = arrivals / this
# report of the last step
F_START = 4
F_DURATION = 5
F_STEP_SYSTEM_SECONDS = 6
F_LAST_ITERATION = 7  # seconds of the latest real iteration
F_BUSY_SECONDS = 8
F_HORIZON = 9  # setting, kept by reset
F_LATE_AFTER = 10  # setting, kept by reset: seconds after which a request never admitted is late; 0 never
F_ROWS = 11

RATE_WINDOW_SECONDS = 30.0

# --- engine settings (int64 / float64 vectors the kernel reads) -----------------------------------
C_PRESET = 0
C_CAPACITY = 1
C_BLOCK_SIZE = 2
C_BUDGET = 3
C_MAX_SEQS = 4
C_MAX_LEN = 5
C_CHUNKED = 6
C_RESERVE_FULL = 7
C_WATERMARK = 8
C_PADDED = 9
C_FREE_BLOCK = 10
C_BY_CLASS = 11
C_BOUNDARY_SLOT = 12
C_DRAIN = 13
C_MAX_ITERATIONS = 14
C_SEGMENTS = 15
C_TRACE = 16
C_LOSE_PROGRESS = 17  # an evicted request starts over with nothing generated
C_ROWS = 18  # then one entry a class: its rank in the admission order by class

PRESET_PAPER = 0
PRESET_VLLM = 1
