"""Iteration-time models: how long the GPU takes for one batch.

A model turns a batch, described by the sums in ``llmsched_env.perf.batch``, into seconds. Each is a
small frozen record that packs itself into one float64 array, so that the compiled engine evaluates
every model through ``iteration_time`` without calling back into Python.
"""

from llmsched_env.perf.base import CalibrationRangeWarning
from llmsched_env.perf.batch import Batch
from llmsched_env.perf.mixed_attention import MixedAttentionTime
from llmsched_env.perf.models import (
    FormulaTime,
    IterationTimeModel,
    LinearTime,
    Provenance,
    iteration_time,
    valid,
)
from llmsched_env.perf.packed import packed_of
from llmsched_env.perf.store import calibration_names, load_calibration, save_calibration
from llmsched_env.perf.tables import TableTime

__all__ = [
    "Batch",
    "CalibrationRangeWarning",
    "FormulaTime",
    "IterationTimeModel",
    "LinearTime",
    "MixedAttentionTime",
    "Provenance",
    "TableTime",
    "calibration_names",
    "iteration_time",
    "load_calibration",
    "packed_of",
    "save_calibration",
    "valid",
]
