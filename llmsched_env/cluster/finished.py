"""What a cluster writes down of every call when it ends."""

from __future__ import annotations

from llmsched_env.records import Floats, Ints, Longs, Rows


class Finished(Rows):
    """One row a call, in the order in which replicas report them: not that of time, nor that of the calls."""

    number: Longs  # of the call, in the order in which the workload made them
    program: Longs  # number of its program
    arrival: Floats  # seconds, as the next four
    admitted: Floats  # first admission; NaN where rejected, as the next two
    first_token: Floats
    completed: Floats
    program_start: Floats  # with ``ends_program`` the latency of the program follows
    prompt: Ints
    output: Ints
    cached: Ints  # prompt tokens found in the prefix cache at the first admission
    turn: Ints  # depth in its program, 0 for the first call
    app: Ints
    replica: Ints  # that completed it; -1: rejected
    evictions: Ints
    routed: Ints  # how many times it was handed to a replica
    ends_program: Ints  # 1: the last call of its program
    rejected: Ints


FINISHED_DTYPE = Finished.DTYPE
