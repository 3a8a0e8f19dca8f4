"""What a configuration costs, before running it: parameters, floating-point operations, and memory at its peak."""

from fitformer.planning.costs import (
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
    total,
    trunk_of,
)

__all__ = [
    "ROLES",
    "Flops",
    "GroupPlan",
    "Model",
    "Part",
    "count_parameters",
    "flops",
    "group_plan",
    "on_meta",
    "parts",
    "total",
    "trunk_of",
]
