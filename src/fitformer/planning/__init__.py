"""What a configuration costs, before running it: parameters, floating-point operations, and memory at its peak."""

from fitformer.planning.choice import Plan, Wish, choose, need_room, slice_for, streaming_for
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
from fitformer.planning.geometry import Geometry
from fitformer.planning.memory import Memory, Setup, memory

__all__ = [
    "ROLES",
    "Flops",
    "Geometry",
    "GroupPlan",
    "Memory",
    "Model",
    "Part",
    "Plan",
    "Setup",
    "Wish",
    "choose",
    "count_parameters",
    "flops",
    "group_plan",
    "memory",
    "need_room",
    "on_meta",
    "parts",
    "slice_for",
    "streaming_for",
    "total",
    "trunk_of",
]
