"""Iteration-time models: how long the GPU takes for one batch.

A model turns a batch, described by the sums in ``llmsched_env.perf.batch``, into seconds. Each is a
small frozen record with a compiled function and the float64 array that it reads; the engine calls the
function by its address (``llmsched_env.pointers``), one's own models too.
"""

from llmsched_env.perf import packed as _packed  # noqa: F401 - tells base what the numbers of the built-in models must be
from llmsched_env.perf.base import CalibrationRangeWarning, IterationTimeModel, Provenance, packed_of
from llmsched_env.perf.batch import Batch
from llmsched_env.perf.mixed_attention import MixedAttentionTime
from llmsched_env.perf.models import FormulaTime, LinearTime
from llmsched_env.perf.store import calibration_names, load_calibration, save_calibration
from llmsched_env.perf.tables import TableTime
from llmsched_env.perf.traffic import TrafficTime

__all__ = [
    "Batch",
    "CalibrationRangeWarning",
    "FormulaTime",
    "IterationTimeModel",
    "LinearTime",
    "MixedAttentionTime",
    "Provenance",
    "TableTime",
    "TrafficTime",
    "calibration_names",
    "load_calibration",
    "packed_of",
    "save_calibration",
]
