"""The parts of `gpu.py`: each measures on a device, or at tiny sizes, and returns rows of a table."""

import copy
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import fitformer
from fitformer.execution import Execution, Streamed, checkpointed, plain
from fitformer.generation import generate
from fitformer.models.base import FITModel
from fitformer.patching.any_size import GroupedImage
from fitformer.profiling import Geometry, PlanRequest, choose

Row = dict[str, Any]

# Dense bf16 operations a second of an H100 or H200 (SXM), as their maker states them.
PEAK = 989e12
RECOMPUTES = ("full", "local", "selective", "light")


class Generated:
    """An image that is made window by window, the same every time: no file holds it."""

    dtype = np.dtype(np.uint8)

    def __init__(self, side: int) -> None:
        self.shape = (side, side, 3)
        self.grain = np.random.default_rng(0).integers(0, 255, (2048, 2048, 3), dtype=np.uint8)

    def window(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """Pixels of a window, from a grain that repeats."""
        rows, columns = (np.arange(first, first + count) % 2048 for first, count in ((top, height), (left, width)))
        return self.grain[rows[:, None], columns]

    def thumbnail(self, rows: int, columns: int) -> np.ndarray:
        """A grey picture: the mean of the grain."""
        return np.full((rows, columns, 3), 127, dtype=np.uint8)


def ways(device: str) -> dict[str, Execution]:
    """Every way to run, by what to call it."""
    keeps = ("memory", "host", "disk")
    return {
        "plain": plain,
        "checkpointed": checkpointed,
        **{f"streamed, {keep}": Streamed(2, keep) for keep in keeps},
        **{f"streamed, recompute {level}": Streamed(2, recompute=level) for level in RECOMPUTES[1:]},
    }


def roles(**options: Any) -> dict[str, tuple[FITModel, Callable[[FITModel, Tensor], tuple[Tensor, ...]]]]:
    """The three roles, small, and a call of each on tokens `(2, 8, 64, 32)`."""
    torch.manual_seed(0)
    numbers: dict[str, Any] = {"num_groups": 8, "tokens_per_group": 64, **options}
    time_of = torch.tensor([0.2, 0.9])
    return {
        "encoder": (fitformer.FITEncoder.from_preset("tiny", in_channels=32, **numbers), lambda model, x: model(x)),
        "denoiser": (
            fitformer.FITDenoiser.from_preset("tiny", out_dim=32, self_cond="latent", **numbers),
            lambda model, x: model(x, time_of.to(x)),
        ),
        "decoder": (
            fitformer.FITDecoder.from_preset("tiny", vocab_size=97, **numbers),
            lambda model, x: (model((x[..., 0].detach().abs() * 40).long() % 97),),
        ),
    }


def outcome(model: FITModel, call: Any, way: Execution, x: Tensor) -> list[Tensor]:
    """Outputs and gradients, in float64 on the CPU, of one pass under a fixed random state."""
    model.set_execution(way)
    model.zero_grad()
    torch.manual_seed(3)
    outputs = call(model, x)
    loss = sum(
        (out * torch.linspace(-1, 1, out.numel(), device=x.device).to(out).view(out.shape)).sum() for out in outputs
    )
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [each.detach().double().cpu() for each in (*outputs, *gradients)]


def error(ours: list[Tensor], wanted: list[Tensor]) -> str:
    """The largest difference over the largest number, of all outputs and gradients."""
    difference = max(float((a - b).abs().max()) for a, b in zip(ours, wanted, strict=True))
    return f"{difference / max(float(b.abs().max()) for b in wanted):.1e}"


def equality(device: str, tiny: bool) -> list[Row]:
    """Outputs and gradients of every role, in every way, against float64; with dropout, against plain."""
    torch.backends.cuda.matmul.allow_tf32 = False
    x, rows = torch.randn(2, 8, 64, 32, generator=torch.Generator().manual_seed(1)), []
    for drops in ({}, {"drop_path": 0.1, "drop_units": 0.1, "drop_att": 0.1}):
        found: dict[str, Row] = {name: {"way": name, "dropout": bool(drops)} for name in ways(device)}
        for role, (model, call) in roles(**drops).items():
            exact = outcome(copy.deepcopy(model).double(), call, plain, x.double()) if not drops else None
            model, given = model.to(device), x.to(device)
            wanted = exact or outcome(model, call, plain, given)
            for name, way in ways(device).items():
                found[name][role] = error(outcome(model, call, way, given), wanted)
        rows += found.values()
    return rows


def bf16(device: str, tiny: bool) -> list[Row]:
    """Mixed precision beside float32, and twenty steps of training in it."""
    x, rows = torch.randn(2, 8, 64, 32, generator=torch.Generator().manual_seed(1)).to(device), []
    for role, (model, call) in roles().items():
        model = model.to(device)
        wanted = outcome(model, call, plain, x)
        for name, way in {"plain": plain, "streamed, host": Streamed(2, "host")}.items():
            with torch.autocast(device, torch.bfloat16):
                rows.append({"role": role, "way": name, "error": error(outcome(model, call, way, x), wanted)})
        optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
        for _ in range(20):
            with torch.autocast(device, torch.bfloat16):
                loss = (call(model, x)[0].float() - 0.5).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
        rows[-1] |= {"loss, first": f"{losses[0]:.3f}", "loss, twentieth": f"{losses[-1]:.3f}"}
    return rows


def classifier(preset: str, side: int, device: str, execution: str = "streamed", **asked: Any) -> tuple[FITModel, Any]:
    """An encoder of images of this size with a group size of the fewest operations, and its plan."""
    geometry = Geometry.of_preset(
        "encoder", preset, side, **{name: asked.pop(name) for name in ("patch_size", "layers") if name in asked}
    )
    plan = choose(geometry, PlanRequest(execution=execution, device=device, precision="bf16", **asked))
    _, config = plan.geometry.config()
    torch.manual_seed(0)
    return fitformer.FITImageEncoder.from_config(config).to(device), plan


def train_step(model: Any, images: list[GroupedImage], optimizer: torch.optim.Optimizer, device: str) -> float:
    """Seconds of one step: forward, backward, AdamW."""
    start = time.perf_counter()
    mixed: AbstractContextManager = torch.autocast(device, torch.bfloat16)
    with mixed:
        loss = F.cross_entropy(model(images).float(), torch.zeros(len(images), dtype=torch.long, device=device))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak_gb(device: str) -> float:
    """Most memory so far: torch's on a GPU, else of the process."""
    most = (
        torch.cuda.max_memory_allocated()
        if device == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return round(most / 1e9, 2)


def timed(model: Any, side: int, device: str, way: Execution, steps: int) -> float:
    """Seconds of the median step on an image of this side, after one that warms up."""
    image = [GroupedImage(Generated(side), model.tiling)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device == "cuda")
    model.set_execution(way)
    train_step(model, image, optimizer, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return sorted(train_step(model, image, optimizer, device) for _ in range(steps))[steps // 2]


def step(device: str, tiny: bool) -> list[Row]:
    """A base step at 6400 x 6400: time, operations, share of the peak, memory."""
    preset, side, rows = ("tiny", 256, []) if tiny else ("base", 6400, [])
    model, plan = classifier(preset, side, device)
    for name, way in {
        "streamed, memory": Streamed(recompute="light"),
        "streamed, full": Streamed(),
        "plain": plain,
    }.items():
        seconds = timed(model, side, device, way, 1 if tiny else 5)
        rate = plan.flops.total / seconds
        row = {"way": name, "group": str(plan.geometry.group_size), "s a step": round(seconds, 3)}
        rows.append(
            row | {"TFLOP/s": round(rate / 1e12, 1), "share of peak": f"{rate / PEAK:.1%}", "peak, GB": peak_gb(device)}
        )
    return rows


def huge(device: str, tiny: bool) -> list[Row]:
    """One step on an image of 4.1 gigapixels in 16 GB of device memory."""
    side, limit = (512, 16e9) if tiny else (64_000, 16e9)
    if device == "cuda":
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / torch.cuda.mem_get_info()[1]))
    model, plan = classifier(
        "tiny" if tiny else "small", side, device, keep="host" if device == "cuda" else None, budget=int(limit)
    )
    setup = plan.setup
    model.set_execution(Streamed(setup.slice_groups, "host", setup.kept_precision, None, setup.recompute))
    image = [GroupedImage(Generated(side), model.tiling)]
    seconds = train_step(model, image, torch.optim.AdamW(model.parameters(), lr=1e-4), device)
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    about = {"pixels": f"{side} x {side}", "groups": image[0].num_groups, "slice": setup.slice_groups}
    return [
        about | {"s a step": round(seconds, 1), "device peak, GB": peak_gb(device), "host peak, GB": round(host, 1)}
    ]


def overlap(device: str, tiny: bool) -> list[Row]:
    """Streaming with data tokens on the host, beside streaming in device memory."""
    side = 256 if tiny else 6400
    model, _ = classifier("tiny" if tiny else "small", side, device)
    kept = {keep: timed(model, side, device, Streamed(keep=keep), 1 if tiny else 3) for keep in ("memory", "host")}
    rows = [{"keep": keep, "s a step": round(seconds, 3)} for keep, seconds in kept.items()]
    return [*rows, {"keep": "host over memory", "s a step": f"{kept['host'] / kept['memory']:.2f} times"}]


def compiled(device: str, tiny: bool) -> list[Row]:
    """A step of the encoder with its layers compiled one by one, as training does it, and without."""
    torch.manual_seed(0)
    preset, groups, n, width = ("tiny", 4, 16, 32) if tiny else ("small", 64, 256, 768)
    model = fitformer.FITEncoder.from_preset(preset, num_groups=groups, tokens_per_group=n, in_channels=width).to(
        device
    )
    x, rows, kept = torch.randn(1, groups, n, width, device=device), [], None
    for name in ("as it is", "compiled"):
        if name == "compiled":
            for layer in model.trunk.layers():
                layer.compile()
        for k in range(2 if tiny else 6):
            start = time.perf_counter()
            with torch.autocast(device, torch.bfloat16) if device == "cuda" else nullcontext():
                loss = model(x)[1].float().square().mean()
            loss.backward()
            synchronize(device)
            if k == 0:
                first = time.perf_counter() - start
        seconds, kept = time.perf_counter() - start, loss.item() if kept is None else kept
        row = {"layers": name, "s, first": round(first, 2), "s, later": round(seconds, 4)}
        rows.append(row | {"loss over that as it is": f"{loss.item() / kept:.5f}"})
    return rows


def generation(device: str, tiny: bool) -> list[Row]:
    """Tokens a second of `generate`, which runs the decoder on all groups begun so far."""
    torch.manual_seed(0)
    preset, groups, n, length = ("tiny", 4, 8, 20) if tiny else ("small", 64, 64, 256)
    decoder = fitformer.FITDecoder.from_preset(preset, num_groups=groups, tokens_per_group=n, vocab_size=256)
    decoder, rows = decoder.to(device).eval(), []
    for batch in (1, 32):
        generate(decoder, None, 2, count=batch)
        synchronize(device)
        start = time.perf_counter()
        generate(decoder, None, length, count=batch)
        synchronize(device)
        seconds = time.perf_counter() - start
        rows.append({"batch": batch, "tokens of each": length, "tokens/s": round(batch * length / seconds, 1)})
    return rows


def tests(device: str, tiny: bool) -> list[Row]:
    """The tests that are skipped without CUDA, where pytest is installed."""
    folder = Path(__file__).resolve().parent.parent
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/test_streamed.py",
        "-k",
        "gpu or cuda",
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    said = done.stdout.strip().splitlines() or done.stderr.strip().splitlines()[-1:]
    return [{"tests/test_streamed.py -k 'gpu or cuda'": said[-1] if said else "no word"}]


PARTS: dict[str, Callable[[str, bool], list[Row]]] = {
    "equality": equality,
    "bf16": bf16,
    "compile": compiled,
    "step": step,
    "huge": huge,
    "overlap": overlap,
    "generation": generation,
    "tests": tests,
}
