"""Choosing how to run: the size of groups and of slices, and where to keep data tokens, for a budget of memory."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any, Literal, get_args

from fitformer._support.bytesize import format_bytes
from fitformer._support.checks import check_fields
from fitformer.errors import InputError
from fitformer.execution.selective_checkpoint import Recompute
from fitformer.execution.streamed import default_slice
from fitformer.models.config import PRESETS, preset
from fitformer.patching.sizes import format_size
from fitformer.profiling.flops import Flops, Model, count_parameters, group_plan
from fitformer.profiling.geometry import Geometry, candidate_group_sizes
from fitformer.profiling.memory import Execution, Keep, Memory, StepConfig, memory

# Group sizes whose memory is looked at, where the one of fewest operations does not fit.
TRIED = 12
# What streamed execution may compute again, the least first.
RECOMPUTES: tuple[Recompute, ...] = get_args(Recompute)[::-1]
# The share of a budget that remembered results may fill: a prediction is right to some percent only.
FILLED = 0.9
# Forward passes that the operations of a training step are counted as: a backward pass is two. What is computed again
# is not counted, as is usual, so that ways to run can be compared.
PASSES = 3


@dataclass(frozen=True)
class PlanRequest:
    """What a user fixes of a `StepConfig`; None, and execution `auto`, are chosen.

    Attributes:
        budget: bytes of memory; None for no bound.
        execution, keep, slice_groups, kept_precision, recompute, batch, precision, device: as in `StepConfig`.
    """

    budget: int | None = None
    execution: Literal["auto", "plain", "checkpointed", "streamed"] = "auto"
    keep: Keep | None = None
    slice_groups: int | None = None
    kept_precision: Literal["bf16"] | None = None
    recompute: Recompute | None = None
    batch: int = 1
    precision: Literal[32, "bf16"] = 32
    device: Literal["cpu", "cuda"] = "cpu"

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Plan:
    """A geometry with its group size, a way to run it, and what that needs.

    Attributes:
        geometry, setup: what was chosen. memory: its peak. flops: of a training step of the whole batch,
            without what is computed again.
        parameters, tokens, latents: numbers; tokens of one example, those that fill up groups at its edges counted.
        fits: whether the peak is within the budget. verdict: the same in one line, and if not, what to change.
    """

    geometry: Geometry
    setup: StepConfig
    memory: Memory
    flops: Flops
    parameters: int
    tokens: int
    latents: int
    fits: bool = True
    verdict: str = ""


def choose(geometry: Geometry, request: PlanRequest) -> Plan:
    """The cheapest plan that fits; if none does, the one of least memory, with a verdict that says what to change.

    Raises:
        InputError: sizes that do not fit together.
    """
    least: Plan | None = None
    for candidate in islice(candidate_group_sizes(geometry), TRIED):
        for plan in _plans(candidate, request):
            if _fits(plan, request):
                return replace(plan, fits=True, verdict=_verdict(plan, request))
            if least is None or plan.memory.total < least.memory.total:
                least = plan
    assert least is not None
    return replace(least, fits=False, verdict=_advice(least, geometry, request))


def _plans(geometry: Geometry, request: PlanRequest) -> Iterator[Plan]:
    """Plans of a geometry in the order in which they are wanted: the faster first."""
    model = geometry.model()
    step, numbers = geometry.flops(), group_plan(model, num_groups=geometry.num_groups)
    parameters = count_parameters(model)
    tokens, latents = (numbers.num_groups * each for each in (numbers.tokens_per_group, numbers.latents_per_group))
    for setup in _setups(model, geometry, request):
        times = PASSES * setup.batch
        flops = Flops(times * step.linear, times * step.attention)
        yield Plan(geometry, setup, memory(model, setup), flops, parameters, tokens, latents)


def _setups(model: Model, geometry: Geometry, request: PlanRequest) -> Iterator[StepConfig]:
    rest: dict[str, Any] = {"batch": request.batch, "precision": request.precision, "device": request.device}
    # Checkpointing spares less than streaming, for the same operations.
    executions: list[Execution] = ["plain", "streamed"] if request.execution == "auto" else [request.execution]
    for execution in executions:
        setup = StepConfig(num_groups=geometry.num_groups, execution=execution, **rest)
        if execution != "streamed":
            yield setup
            continue
        keeps: list[Keep] = ["memory", *(["host"] if request.device == "cuda" else []), "disk"]  # type: ignore[list-item]
        for keep in keeps if request.keep is None else [request.keep]:
            kept = replace(setup, keep=keep, kept_precision=request.kept_precision)
            yield streaming_for(model, kept, request.budget, request.recompute, request.slice_groups)


def streaming_for(
    model: Model,
    setup: StepConfig,
    budget: int | None = None,
    recompute: Recompute | None = None,
    slice_groups: int | None = None,
) -> StepConfig:
    """A streamed setup with its recomputation and slice size filled in, as given or chosen.

    The backward pass recomputes the least that fits nine tenths of the budget with default slices, and everything where
    there is no budget. If full recomputation does not fit, slices are made smaller.

    Args:
        model: on any device.
        setup: of the streamed execution.
        budget: bytes of memory; None for no bound.
        recompute, slice_groups: given ones.
    """
    if recompute is None and budget is not None:
        most = slice_groups or slice_for(model, setup)
        for choice in RECOMPUTES:
            found = replace(setup, recompute=choice, slice_groups=most)
            if memory(model, found).total <= FILLED * budget:
                return found
    found = replace(setup, recompute=recompute or "full")
    return replace(found, slice_groups=slice_groups or slice_for(model, found, budget))


def slice_for(model: Model, setup: StepConfig, budget: int | None = None) -> int:
    """Groups of a slice: the default size, or the largest below it that fits a budget; at least 1.

    Args:
        model: on any device.
        setup: of the streamed execution; its own `slice_groups` does not matter.
        budget: bytes of memory; None for no bound.
    """
    plan = group_plan(model, num_groups=setup.num_groups)
    size = min(default_slice(setup.device, plan.tokens_per_group, setup.batch), plan.num_groups)
    while budget is not None and size > 1 and memory(model, replace(setup, slice_groups=size)).total > budget:
        size = size * 3 // 4
    return size


def check_fits(model: Model, setup: StepConfig, budget: int) -> Memory:
    """The memory of a setup, if it fits a budget.

    Raises:
        InputError: it does not; names both sizes, the breakdown, and what to change.
    """
    found = memory(model, setup)
    if found.total > budget:
        raise InputError(
            f"a training step needs {format_bytes(found.total)} of memory and the budget is {format_bytes(budget)}: "
            f"{_breakdown(found)}; {_way_out(model, setup, budget)}"
        )
    return found


def _way_out(model: Model, setup: StepConfig, budget: int) -> str:
    for keep in ("memory", "disk"):
        streamed = replace(setup, execution="streamed", keep=keep, slice_groups=1, recompute="full")
        needed = memory(model, streamed).total
        if needed <= budget:
            return f"streamed execution kept {_storage_text(keep)} fits, from {format_bytes(needed)} on"
    return f"streamed execution kept on disk needs {format_bytes(needed)}: take a smaller model, or larger groups"


def _fits(plan: Plan, request: PlanRequest) -> bool:
    return request.budget is None or plan.memory.total <= request.budget


def _verdict(plan: Plan, request: PlanRequest) -> str:
    needed = f"needs {format_bytes(plan.memory.total)}" + (
        f" of {format_bytes(request.budget)}" if request.budget else ""
    )
    aside = f", and {format_bytes(plan.memory.scratch)} of scratch on disk" if plan.memory.scratch else ""
    aside += f", and {format_bytes(plan.memory.host)} on the host" if plan.memory.host else ""
    return f"{'fits: ' if request.budget else ''}{_execution_text(plan.setup)} {needed}{aside}"


def _advice(plan: Plan, geometry: Geometry, request: PlanRequest) -> str:
    """Why the best plan does not fit, and the nearest one that does."""
    assert request.budget is not None
    short = f"{_execution_text(plan.setup)} needs {format_bytes(plan.memory.total)} of {format_bytes(request.budget)}"
    for words, better, loosened in _relaxed(geometry, request):
        for candidate in islice(candidate_group_sizes(better), TRIED):
            for found in _plans(candidate, loosened):
                if _fits(found, loosened):
                    return f"does not fit: {short}; {words(found)}"
    return f"does not fit: {short}, and nothing smaller does; {_breakdown(plan.memory)}"


def _relaxed(geometry: Geometry, request: PlanRequest) -> Iterator[tuple[Any, Geometry, PlanRequest]]:
    """Requests that ask for less, each with the text that describes a plan for it."""

    def fitting(what: str) -> Any:
        return lambda plan: f"{what} {_execution_text(plan.setup)} would: {format_bytes(plan.memory.total)}"

    free = replace(request, execution="auto", keep=None, slice_groups=None, recompute=None)
    yield fitting("but"), geometry, free
    if geometry.group_size is not None:
        yield (
            lambda plan: (
                f"groups of {format_size(plan.geometry.group_size)} pixels and {_execution_text(plan.setup)} would: "
                f"{format_bytes(plan.memory.total)}"
            ),
            replace(geometry, group_size=None),
            free,
        )
    if request.batch > 1:
        yield fitting("a batch of 1 and"), geometry, replace(free, batch=1)
    names = [name for name in PRESETS if _smaller(name, geometry)]
    for name in reversed(names):
        sizes = asdict(preset(name, ends_local=geometry.role != "encoder"))
        yield fitting(f"the preset {name} and"), replace(geometry, sizes=sizes), free


def _smaller(name: str, geometry: Geometry) -> bool:
    return PRESETS[name].dim < geometry.sizes["dim"]


def _execution_text(setup: StepConfig) -> str:
    """An execution in words."""
    if setup.execution != "streamed":
        return f"{setup.execution} execution"
    plural = "s" if setup.slice_groups != 1 else ""
    return (
        f"streamed execution in slices of {setup.slice_groups} group{plural}, kept {_storage_text(setup.keep)}, "
        f"with {setup.recompute} recomputation,"
    )


def _storage_text(keep: str) -> str:
    return {"memory": "in memory", "host": "on the host", "disk": "on disk"}[keep]


def _breakdown(of: Memory) -> str:
    parts = {
        "weights and gradients": of.weights,
        "optimizer": of.optimizer,
        "kept tokens": of.kept,
        "working set": of.working,
        "process, decoded pixels and allocator": of.process + of.slack,
    }
    return ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items() if size)
