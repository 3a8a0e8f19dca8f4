"""The parts of `gpu.py`: each yields rows of a table as soon as they are measured."""

import importlib.util
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from gpu_exact import bf16, equality, error
from gpu_shared import Row, Scale, guarded, mixed, seconds, stepper, synchronize
from torch import Tensor

from fitformer import FITDecoder, FITEncoder, FITImageEncoder
from fitformer.execution import Streamed
from fitformer.models.base import FITModel
from fitformer.profiling import Geometry, flops
from fitformer.profiling.geometry import candidate_group_sizes
from fitformer.profiling.memory import StepConfig, memory

ROOT = Path(__file__).resolve().parents[1]
# Dense bf16 operations per second, from NVIDIA's data sheets for the SXM modules.
PEAKS = {"H100": 989e12, "H200": 989e12}
DEVICE_LIMIT = 16 * 10**9


def large_encoder(scale: Scale, preset: str) -> tuple[FITEncoder, Callable[[], Tensor]]:
    """An encoder of a 6,400 x 6,400 image in patches of 16, and its training step on tokens on the device."""
    side, preset = (128, "tiny") if scale.tiny else (6400, preset)
    geometry = next(candidate_group_sizes(Geometry.of_preset("encoder", preset, (side, side))))
    torch.manual_seed(0)
    shape = {"num_groups": geometry.num_groups, "tokens_per_group": geometry.tokens_per_group}
    model = FITEncoder.from_preset(preset, in_channels=geometry.patch_grid.token_dim, **shape).to(scale.device)
    x = torch.randn(1, *shape.values(), geometry.patch_grid.token_dim, device=scale.device)
    # The answer of an encoder that ends in global layers is its latents: no data tokens are asked for.
    return model, stepper(model, lambda: model.latent_norm(model.execute(model.inputs(x)).latents).square().mean())


def planned(model: FITModel, **setup: Any) -> Row:
    """The memory of a step as `fitformer plan` derives it."""
    found = memory(model, StepConfig(precision="bf16", device="cuda", **setup))
    return {"planned, GB": f"{found.total / 1e9:.2f}"}


def mfu(scale: Scale) -> Iterator[Row]:
    """Seconds, operations per second, share of the peak and memory of a base step."""
    model, step = large_encoder(scale, "base")
    few = max(1, 4096 // model.tokens_per_group)
    rows: dict[str, tuple[Any, dict[str, Any]]] = {
        "plain": ("plain", {"execution": "plain"}),
        "streamed": (Streamed(), {"execution": "streamed"}),
        "streamed, slices of 4,096 tokens": (Streamed(few), {"execution": "streamed", "slice_groups": few}),
    }
    for name, (way, setup) in rows.items():
        model.set_execution(way)
        plan = planned(model, **setup)
        yield guarded(name, lambda plan=plan: {**utilization(scale, model, step), **plan})
    # Last: once a process has been profiled, its launches stay slower.
    for name, (way, _) in rows.items():
        model.set_execution(way)
        yield guarded(f"{name}, profiled", lambda: kernels(scale, step))


# Parts of the names of kernels that multiply matrices or attend, in cuBLAS, CUTLASS, cuDNN and FlashAttention.
PRODUCTS = ("nvjet", "gemm", "splitk", "cutlass", "sdpa", "flash", "attention", "compute_dot_do_o")


def kernels(scale: Scale, step: Callable[[], Tensor]) -> Row:
    """Seconds of a step's kernels, and of those among them that no fusion of pointwise functions makes faster."""
    found = [(name, end - start) for name, start, end in device_spans(scale, step) if not name.startswith("Mem")]
    products = sum(took for name, took in found if any(part in name.lower() for part in PRODUCTS))
    row = {"kernels, s": f"{sum(took for _, took in found) / 1e6:.3f}"}
    return {**row, "products and attention, s": f"{products / 1e6:.3f}"} if found else {}


def device_spans(scale: Scale, step: Callable[[], Tensor]) -> list[tuple[str, float, float]]:
    """Name, start and end in microseconds of what ran on the GPU in a step: kernels and copies."""
    if scale.device != "cuda":
        return []
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiled:
        step()
        torch.cuda.synchronize()
    events = [each for each in profiled.events() if each.device_type == torch.autograd.DeviceType.CUDA]
    return [(each.name, each.time_range.start, each.time_range.end) for each in events]


def utilization(scale: Scale, model: FITEncoder, step: Callable[[], Tensor]) -> Row:
    """A step's row; operations are three forward passes, what is computed again not counted."""
    if scale.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    took = seconds(step, scale.device, 1 if scale.tiny else 5)
    rate, card = 3 * flops(model).total / took, card_of(scale)
    peak = next((value for name, value in PEAKS.items() if name in card), None)
    return {
        "tokens": str(model.num_groups * model.tokens_per_group),
        "seconds": f"{took:.3f}",
        "TFLOP/s": f"{rate / 1e12:.1f}",
        "peak TFLOP/s": f"{peak / 1e12:.0f}" if peak else "unknown",
        "MFU (goal 50%)": f"{rate / peak:.1%}" if peak else "unknown",
        **device_memory(scale),
    }


def card_of(scale: Scale) -> str:
    return torch.cuda.get_device_name() if scale.device == "cuda" else "cpu"


def device_memory(scale: Scale) -> Row:
    found = torch.cuda.max_memory_allocated() / 1e9 if scale.device == "cuda" else None
    return {"device peak, GB": "none" if found is None else f"{found:.2f}"}


class Generated:
    """A uint8 image that is made window by window, the same each time: a slope with grain."""

    dtype = np.dtype(np.uint8)

    def __init__(self, side: int) -> None:
        self.shape = (side, side, 3)
        self.grain = np.random.default_rng(0).integers(0, 96, (2048, 2048, 3), dtype=np.uint8)

    def window(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        down, right = top * 37 % 1024, left * 53 % 1024
        level = np.uint8(80 * (top + left) / sum(self.shape[:2]))
        return self.grain[down : down + height, right : right + width] + level

    def thumbnail(self, rows: int, columns: int) -> np.ndarray:
        return self.window(0, 0, rows, columns)


def huge(scale: Scale) -> Iterator[Row]:
    """One training step on an image that no memory holds."""
    side, preset = (256, "tiny") if scale.tiny else (64000, "small")
    if scale.device == "cuda":
        torch.cuda.set_per_process_memory_fraction(DEVICE_LIMIT / torch.cuda.get_device_properties(0).total_memory)
    geometry = next(candidate_group_sizes(Geometry.of_preset("encoder", preset, (side, side))))
    torch.manual_seed(0)
    model = FITImageEncoder.from_config(geometry.config()[1]).to(scale.device)
    model.set_execution(Streamed(keep="host", precision="bf16"))
    target = torch.tensor([1], device=scale.device)
    step = stepper(model, lambda: F.cross_entropy(model([Generated(side)]), target))
    setup = {"execution": "streamed", "keep": "host", "kept_precision": "bf16"}
    plan = planned(model, num_groups=geometry.num_groups, **setup)
    yield guarded(f"{side} x {side}", lambda: {**huge_step(scale, geometry, step), **plan})


def huge_step(scale: Scale, geometry: Geometry, step: Callable[[], Tensor]) -> Row:
    start = time.perf_counter()
    loss = float(step())
    took, resident = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    row = {"tokens": str(geometry.length), "groups": str(geometry.num_groups), "seconds": f"{took:.1f}"}
    row |= {**device_memory(scale), "host peak, GB": f"{resident / 1e9:.1f}", "loss": f"{loss:.3f}"}
    if loss != loss:
        row["failed"] = "the loss is NaN"
    return row if resident < 64e9 else {**row, "failed": "more than 64 GB on the host"}


def overlap(scale: Scale) -> Iterator[Row]:
    """A step with tokens on the host against one with tokens in memory, and the copies that kernels hide."""
    model, step = large_encoder(scale, "base")
    x = torch.randn(1, model.num_groups, model.tokens_per_group, model.stem.projection.in_features, device=scale.device)
    took, gradients = {}, {}
    for keep in ("memory", "host"):
        model.set_execution(Streamed(keep=keep))
        with mixed(scale.device):
            loss = model.latent_norm(model.execute(model.inputs(x)).latents)[..., 0].mean()
        found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        gradients[keep] = [each.double() for each in found if each is not None]
    apart = error(gradients["host"], gradients["memory"])
    for keep in ("memory", "host"):
        model.set_execution(Streamed(keep=keep))
        took[keep] = seconds(step, scale.device, 1 if scale.tiny else 5)
    row = {"memory, s": f"{took['memory']:.3f}", "host, s": f"{took['host']:.3f}"}
    row |= {"ratio": f"{took['host'] / took['memory']:.2f}", **hidden_copies(scale, step), "gradients": f"{apart:.1e}"}
    yield row if apart <= 0.02 else {**row, "failed": "gradients differ by more than 2e-02"}


def hidden_copies(scale: Scale, step: Callable[[], Tensor]) -> Row:
    """Seconds of copies in a step, and the share of them during which a kernel ran."""
    spans = device_spans(scale, step)
    copies = [(start, end) for name, start, end in spans if name.startswith(("Memcpy HtoD", "Memcpy DtoH"))]
    running = [(start, end) for name, start, end in spans if not name.startswith("Mem")]
    total = sum(end - start for start, end in copies)
    if not total:
        return {}
    return {"copies, s": f"{total / 1e6:.3f}", "hidden behind kernels": f"{covered(copies, running) / total:.0%}"}


def covered(spans: Iterable[tuple[float, float]], by: Iterable[tuple[float, float]]) -> float:
    """How much of spans lies within the union of others; the spans themselves are counted one by one."""
    union: list[list[float]] = []
    for start, end in sorted(by):
        if union and start <= union[-1][1]:
            union[-1][1] = max(union[-1][1], end)
        else:
            union.append([start, end])
    return sum(max(0.0, min(end, b) - max(start, a)) for start, end in spans for a, b in union)


def compiled(scale: Scale) -> Iterator[Row]:
    """The plain step of `mfu` after its layers are compiled, as training compiles them."""
    model, step = large_encoder(scale, "base")
    x = torch.randn(1, model.num_groups, model.tokens_per_group, model.stem.projection.in_features, device=scale.device)
    start, wanted = {key: value.clone() for key, value in model.state_dict().items()}, latents_of(model, x)
    # Layers of one class share their compiled variants.
    torch._dynamo.config.recompile_limit = 64
    for layer in model.trunk.layers():
        layer.compile(backend="aot_eager" if scale.tiny else "inductor")
    begun = time.perf_counter()
    step()
    synchronize(scale.device)
    row = {"first step, s": f"{time.perf_counter() - begun:.0f}", **utilization(scale, model, step)}
    row |= kernels(scale, step)
    model.load_state_dict(start)
    row["outputs"] = f"{(apart := error([latents_of(model, x)], [wanted])):.1e}"
    yield row if apart <= 0.05 else {**row, "failed": "outputs differ by more than 5e-02"}


def latents_of(model: FITEncoder, x: Tensor) -> Tensor:
    """Latents in bf16 autocast, as float64 on the CPU."""
    with torch.no_grad(), mixed(x.device.type):
        return model(x)[1].double().cpu()


def generation(scale: Scale) -> Iterator[Row]:
    """Tokens per second at the end of a length, with a cache and without one."""
    n, groups = (8, 4) if scale.tiny else (64, 16)
    torch.manual_seed(0)
    preset = "tiny" if scale.tiny else "small"
    model = FITDecoder.from_preset(preset, num_groups=groups, tokens_per_group=n, vocab_size=256)
    model = model.to(scale.device).eval()
    for length in (n * groups // 4, n * groups):
        for batch in (1, 4 if scale.tiny else 32):
            for cache in (True, False):
                name = f"{'cached' if cache else 'uncached'}, length {length}, batch {batch}"
                yield guarded(name, lambda L=length, b=batch, c=cache: rate(scale, model, L, b, c))


def rate(scale: Scale, model: FITDecoder, length: int, batch: int, use_cache: bool) -> Row:
    options = {"num_return_sequences": batch, "do_sample": True, "use_cache": use_cache}
    count = length // 4
    prompt = torch.zeros(1, length - count, dtype=torch.long, device=scale.device)
    with mixed(scale.device):
        model.generate(prompt, max_new_tokens=3, **options)
        synchronize(scale.device)
        start = time.perf_counter()
        model.generate(prompt, max_new_tokens=count, **options)
        synchronize(scale.device)
    took = time.perf_counter() - start
    return {"tokens": str(count), "seconds": f"{took:.2f}", "tokens per second": f"{batch * count / took:.0f}"}


def tests(scale: Scale) -> Iterator[Row]:
    """The tests that need a GPU."""
    for package in ("pytest", "hypothesis"):
        if importlib.util.find_spec(package) is None:
            yield {"failed": f"package {package} is missing"}
            return
    files = (f"tests/test_{name}.py" for name in ("streamed", "any_length", "cached", "explain"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "on_a_gpu", *files]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print("\n".join(found.stdout.splitlines()[-400:]), file=sys.stderr)
    lines = [line for line in (found.stdout + found.stderr).splitlines() if line.strip()]
    row = {"tests": "on_a_gpu", "result": lines[-1].strip("= ") if lines else "no output"}
    yield row if found.returncode == 0 else {**row, "failed": f"exit status {found.returncode}"}


PARTS: dict[str, Callable[[Scale], Iterator[Row]]] = {
    "equality": equality,
    "mfu": mfu,
    "huge": huge,
    "overlap": overlap,
    "compile": compiled,
    "generation": generation,
    "bf16": bf16,
    "tests": tests,
}
