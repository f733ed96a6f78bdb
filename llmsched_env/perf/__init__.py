"""Iteration-time models: how long the GPU takes for one batch.

A model turns a batch, described by the sums in ``llmsched_env.perf.batch``, into seconds. Each is a
small frozen record that packs itself into one float64 array, so that the compiled engine evaluates
every model through ``iteration_time`` without calling back into Python.
"""

from llmsched_env.perf.batch import Batch
from llmsched_env.perf.models import (
    FormulaTime,
    IterationTimeModel,
    LinearTime,
    Provenance,
    iteration_time,
)
from llmsched_env.perf.store import calibration_names, load_calibration

__all__ = [
    "Batch",
    "FormulaTime",
    "IterationTimeModel",
    "LinearTime",
    "Provenance",
    "calibration_names",
    "iteration_time",
    "load_calibration",
]
