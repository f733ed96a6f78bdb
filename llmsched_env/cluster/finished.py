"""What a cluster writes down of every call when it ends."""

from __future__ import annotations

import numpy as np

FINISHED_DTYPE = np.dtype(
    [
        ("number", "<i8"),  # of the call, in the order in which the workload made them
        ("program", "<i8"),  # number of its program
        ("arrival", "<f8"),  # seconds, as the next three
        ("admitted", "<f8"),  # first admission; NaN where rejected, as the next two
        ("first_token", "<f8"),
        ("completed", "<f8"),
        ("program_start", "<f8"),  # seconds; with ``ends_program`` the latency of the program follows
        ("prompt", "<i4"),
        ("output", "<i4"),
        ("cached", "<i4"),  # prompt tokens found in the prefix cache at the first admission
        ("turn", "<i4"),  # depth in its program, 0 for the first call
        ("app", "<i4"),
        ("replica", "<i4"),  # that completed it; -1: rejected
        ("evictions", "<i4"),
        ("routed", "<i4"),  # how many times it was handed to a replica
        ("ends_program", "<i4"),  # 1: the last call of its program
        ("rejected", "<i4"),
    ]
)
"""One row of what a cluster writes down of every call when it ends."""
