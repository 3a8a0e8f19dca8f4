"""One or more full training steps on a huge image on disk, measured: forward, backward, AdamW."""

import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

import fitformer
from fitformer._support.system_memory import available_memory, peak_bytes
from fitformer.data.readers import open_image
from fitformer.errors import InputError
from fitformer.execution import Execution, Streamed, checkpointed, plain
from fitformer.patching.any_size import PixelSource
from fitformer.patching.sizes import format_size, to_sides
from fitformer.profiling import Geometry, Plan, PlanRequest, StepConfig, choose
from fitformer.profiling.losses import loss_of
from fitformer.profiling.synthetic_image import write_image


@dataclass(frozen=True)
class Bench:
    """What to measure: a plan request, and how often.

    Attributes:
        geometry, request: as `fitformer.profiling.choose` takes them.
        steps: training steps that are timed. warmup: steps before, which are not.
        image: a file to read; None for a generated one of the geometry's size.
    """

    geometry: Geometry
    request: PlanRequest
    steps: int = 1
    warmup: int = 0
    image: str | Path | None = None


@dataclass(frozen=True)
class Measured:
    """What a training step took.

    Attributes:
        plan: how it ran, and the memory that was predicted.
        seconds: of each step, on the clock. cpu_seconds: of all threads of this process, of each step: other work on
            the machine disturbs them less.
        peak: bytes, of the whole process or of what torch allocated on a GPU.
        loss: of the last step. device: in words. threads: of torch.
    """

    plan: Plan
    seconds: list[float]
    cpu_seconds: list[float]
    peak: int
    loss: float
    device: str
    threads: int

    @property
    def second(self) -> float:
        """Of the median step."""
        return median(self.seconds)

    @property
    def rate(self) -> float:
        """Operations per second, those that are computed again not counted."""
        return self.plan.flops.total / self.second


def measure(bench: Bench) -> Measured:
    """Run training steps and measure them.

    The peak is that of the whole life of this process: call it in a process of its own.

    Raises:
        InputError: no plan fits the budget, or an image of another size.
    """
    device = torch.device(bench.request.device)
    if bench.image is not None:
        rows, columns, channels = open_image(bench.image).shape
        geometry = replace(bench.geometry, image_size=(rows, columns), channels=channels)
        return _measured(bench, _plan(bench, geometry), bench.image, device)
    # Before an image is written that nothing could hold.
    plan = _plan(bench, bench.geometry)
    with tempfile.TemporaryDirectory(prefix="fitformer-bench-") as folder:
        path = Path(folder) / "image.tif"
        rows, columns = to_sides(bench.geometry.image_size, "hw")
        write_image(path, rows, columns, bench.geometry.channels)
        return _measured(bench, plan, path, device)


def _plan(bench: Bench, geometry: Geometry) -> Plan:
    """The plan of a step.

    Raises:
        InputError: none fits the budget.
    """
    budget = bench.request.budget or available_memory(bench.request.device)
    plan = choose(geometry, replace(bench.request, budget=budget))
    if not plan.fits:
        raise InputError(plan.verdict)
    return plan


def _measured(bench: Bench, plan: Plan, path: str | Path, device: torch.device) -> Measured:
    torch.manual_seed(0)
    role, config = plan.geometry.config()
    model = getattr(fitformer, role).from_config(config).to(device)
    model.set_execution(execution_of(plan.setup))
    optimizer = _optimizer(model)
    # One open image for each example, although all are of one file: a batch reads as many.
    sources: list[PixelSource] = [open_image(path) for _ in range(plan.setup.batch)]
    loss = loss_of(model, plan.geometry, sources, device)
    mixed = torch.autocast(device.type, torch.bfloat16) if plan.setup.precision == "bf16" else nullcontext()
    seconds, cpu_seconds, value = [], [], 0.0
    for k in range(-bench.warmup, bench.steps):
        start, busy = time.perf_counter(), time.process_time()
        value = _step(loss, optimizer, mixed, device)
        if k >= 0:
            seconds.append(time.perf_counter() - start)
            cpu_seconds.append(time.process_time() - busy)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return Measured(plan, seconds, cpu_seconds, peak_bytes(device), value, name, torch.get_num_threads())


def execution_of(setup: StepConfig, folder: str | Path | None = None) -> Execution:
    """The execution of a setup; `folder` for scratch on disk."""
    if setup.execution == "plain":
        return plain
    if setup.execution == "checkpointed":
        return checkpointed
    return Streamed(setup.slice_groups, setup.keep, setup.kept_precision, folder, setup.recompute)


def _optimizer(model: nn.Module) -> torch.optim.AdamW:
    """AdamW that already has its state, as at every step but the first."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    optimizer.param_groups[0]["lr"] = 1e-4
    return optimizer


def _step(
    loss: Callable[[], Tensor],
    optimizer: torch.optim.Optimizer,
    mixed: AbstractContextManager,
    device: torch.device,
) -> float:
    """One training step; its loss."""
    with mixed:
        value = loss()
    value.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return value.item()


def as_plain(found: Measured) -> dict[str, object]:
    """What was measured as plain data."""
    plan = found.plan
    return {
        "role": plan.geometry.role,
        "layers": plan.geometry.sizes["layers"],
        "image_size": format_size(to_sides(plan.geometry.image_size, "hw")),
        "group_size": format_size(plan.geometry.patch_grid.group_size),  # type: ignore[arg-type]
        "patch_size": format_size(plan.geometry.patch_grid.patch_size),  # type: ignore[arg-type]
        "execution": plan.setup.execution,
        "keep": plan.setup.keep if plan.setup.execution == "streamed" else None,
        "slice_groups": plan.setup.slice_groups,
        "recompute": plan.setup.recompute if plan.setup.execution == "streamed" else None,
        "batch": plan.setup.batch,
        "precision": plan.setup.precision,
        "tokens": plan.geometry.length,
        "groups": plan.geometry.num_groups,
        "latents": plan.latents,
        "parameters": plan.parameters,
        "seconds": found.second,
        "all_seconds": found.seconds,
        "cpu_seconds": median(found.cpu_seconds),
        "tflop": plan.flops.total / 1e12,
        "attention_tflop": plan.flops.attention / 1e12,
        "tflops_per_second": found.rate / 1e12,
        "peak_bytes": found.peak,
        "predicted_bytes": plan.memory.total,
        "scratch_bytes": plan.memory.scratch,
        "loss": found.loss,
        "device": found.device,
        "threads": found.threads,
    }
