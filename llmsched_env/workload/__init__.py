"""Workloads: arrival processes, length models, trace readers and named scenarios."""

from llmsched_env.workload.arrivals import MMPP2, ArrivalProcess, Gamma, PiecewiseConstant, Poisson, TraceArrivals
from llmsched_env.workload.lengths import LengthModel, Lognormal, TraceLengths, Types
from llmsched_env.workload.predictions import PredictionModel
from llmsched_env.workload.readers import Trace, read_trace
from llmsched_env.workload.scenario import Scenario, scenario_from_trace
from llmsched_env.workload.scenario_files import read_scenario
from llmsched_env.workload.scenarios import load_scenario, scenario_names
from llmsched_env.workload.tables import QuantileTable, load_lengths
from llmsched_env.workload.tenants import Tenant, TenantMix

__all__ = [
    "MMPP2",
    "ArrivalProcess",
    "Gamma",
    "LengthModel",
    "Lognormal",
    "PiecewiseConstant",
    "Poisson",
    "PredictionModel",
    "QuantileTable",
    "Scenario",
    "Tenant",
    "TenantMix",
    "Trace",
    "TraceArrivals",
    "TraceLengths",
    "Types",
    "load_lengths",
    "load_scenario",
    "read_scenario",
    "read_trace",
    "scenario_from_trace",
    "scenario_names",
]
