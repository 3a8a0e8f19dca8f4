"""What a configuration costs, before running it: parameters, floating-point operations, and memory at its peak."""

from fitformer.profiling.flops import (
    ROLES,
    Flops,
    GroupPlan,
    Model,
    Part,
    count_parameters,
    flops,
    group_plan,
    on_meta,
    parts,
    sum_flops,
)
from fitformer.profiling.geometry import Geometry
from fitformer.profiling.memory import Memory, StepConfig, memory
from fitformer.profiling.planner import Plan, PlanRequest, check_fits, choose, slice_for, streaming_for

__all__ = [
    "ROLES",
    "Flops",
    "Geometry",
    "GroupPlan",
    "Memory",
    "Model",
    "Part",
    "Plan",
    "PlanRequest",
    "StepConfig",
    "check_fits",
    "choose",
    "count_parameters",
    "flops",
    "group_plan",
    "memory",
    "on_meta",
    "parts",
    "slice_for",
    "streaming_for",
    "sum_flops",
]
