"""Fluid model of an LLM server: equilibrium, stability boundary, WAIT and Nested WAIT thresholds.

``equilibrium``  balance of one engine, limits, boundary, time-varying rates
``wait``         thresholds for known output lengths
``buffer``       memory of Nested WAIT: M^pi, theta_k, M_req
``nested``       thresholds for unknown output lengths
``minorant``     time models from below, by straight lines
``bound``        a mean latency that no policy goes below
``segments``     where to cut decode lengths, allocation of a cap

Theory: arXiv 2504.11320 v4 ("Optimizing LLM Inference: Fluid-Guided Online Scheduling with Memory Constraints").
"""

from llmsched_env.fluid.buffer import (
    SafetyBuffer,
    continuation,
    merge_segments,
    nested_load,
    nested_memory,
    required_memory,
    safety_buffer,
    theta_lower_bound,
    theta_root,
)
from llmsched_env.fluid.equilibrium import (
    Constraint,
    CycleLoad,
    Fluid,
    FluidEquilibrium,
    StabilityBoundary,
    equilibrium_of,
    find_boundary,
    fluid_equilibrium,
    stability_boundary,
    window_rates,
)
from llmsched_env.fluid.nested import NestedThresholds, check_nested, nested_thresholds
from llmsched_env.fluid.segments import (
    CapAllocation,
    SegmentDesign,
    allocate_cap,
    equal_probability_ends,
    equal_width_ends,
    segment_design,
    segment_designs,
)
from llmsched_env.fluid.wait import (
    ClassProfiles,
    Rounding,
    WaitThresholds,
    check_wait,
    class_profiles,
    rotation_quota,
    wait_thresholds,
    wait_thresholds_of,
)

__all__ = [
    "CapAllocation",
    "ClassProfiles",
    "Constraint",
    "CycleLoad",
    "Fluid",
    "FluidEquilibrium",
    "NestedThresholds",
    "Rounding",
    "SafetyBuffer",
    "SegmentDesign",
    "StabilityBoundary",
    "WaitThresholds",
    "allocate_cap",
    "check_nested",
    "check_wait",
    "class_profiles",
    "continuation",
    "equal_probability_ends",
    "equal_width_ends",
    "equilibrium_of",
    "find_boundary",
    "fluid_equilibrium",
    "merge_segments",
    "nested_load",
    "nested_memory",
    "nested_thresholds",
    "required_memory",
    "rotation_quota",
    "safety_buffer",
    "segment_design",
    "segment_designs",
    "stability_boundary",
    "theta_lower_bound",
    "theta_root",
    "wait_thresholds",
    "wait_thresholds_of",
    "window_rates",
]
