"""Attention maps of encoders, overlays, and curves of measurements.

`fitformer.tasks.preview.grid` makes grids of samples. Pictures are uint8 `(H, W, 3)` tensors. Drawing curves needs
matplotlib; the rest needs only Pillow.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fitformer._support.atomic_files import write_atomically
from fitformer._support.checks import checked
from fitformer.errors import InputError, require
from fitformer.models.image_encoder import FITImageEncoder
from fitformer.models.layers import CrossLayer
from fitformer.patching.sizes import check_axes

# Equally spaced colours from dark to bright, of increasing brightness, so that they stay legible in grey.
HEAT = ((0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164))

Curve = tuple[Sequence[float], Sequence[float]]


@checked
@torch.no_grad()
def latent_attention(encoder: FITImageEncoder, images: Tensor) -> Tensor:
    """Attention maps `(blocks, b, H, W)` of images `(b, H, W, ch)`, one for each block that reads.

    A value is the mean weight over heads and the group's latents, relative to uniform attention. A latent reads only
    its own group's tokens (spec section 1), so the values of each group average 1.

    Raises:
        InputError: images of another size than the encoder's; an encoder for any size, or without global layers.
    """
    calls: list[tuple[Any, ...]] = []

    def record(read: nn.Module, inputs: tuple[Any, ...]) -> None:
        calls.append((read, *inputs))

    if encoder.patch_grid.any_size:
        raise InputError("this encoder takes images of any size; `fitformer predict` writes its attention maps")
    reads = [read for block in encoder.trunk.blocks if isinstance(read := block.read, CrossLayer)]
    if not reads:
        raise InputError("no block of this encoder has global layers, so its latents read nothing")
    hooks = [read.register_forward_pre_hook(record) for read in reads]
    try:
        encoder(images)
    finally:
        for hook in hooks:
            hook.remove()
    weights = [read.weights(*inputs).mean(dim=(1, 2)) for read, *inputs in calls]
    maps = [encoder.patch_grid.map(rearrange(w, "(b t) n -> b t n 1", b=len(images)) * w.shape[-1]) for w in weights]
    size = images.shape[1:3]
    return torch.stack([F.interpolate(cells, tuple(size), mode="nearest")[:, 0] for cells in maps])


@checked
def heat(values: Tensor) -> Tensor:
    """Colours uint8 `(..., 3)` of values `(...)` from 0, dark, to 1, bright; values outside are clamped."""
    table = torch.tensor(HEAT, dtype=torch.float32, device=values.device)
    position = values.float().clamp(0, 1) * (len(HEAT) - 1)
    lower = position.floor().long().clamp(max=len(HEAT) - 2)
    weight = (position - lower)[..., None]
    return (table[lower] * (1 - weight) + table[lower + 1] * weight).round().to(torch.uint8)


@checked
def overlay(images: Tensor, maps: Tensor, strength: float = 0.6) -> Tensor:
    """Images uint8 `(b, H, W, ch)` in grey under the heat of maps `(b, H, W)`: pictures uint8 `(b, H, W, 3)`.

    The largest value of a map is brightest. `strength` in [0, 1] is the weight of the heat in the blend.

    Raises:
        InputError: maps of another number or size than the images, a strength outside [0, 1].
    """
    if not 0 <= strength <= 1:
        raise InputError(f"strength is {strength}; it must lie in [0, 1]")
    if images.ndim != 4 or images.shape[:3] != maps.shape:
        raise InputError(f"maps {tuple(maps.shape)} do not match images {tuple(images.shape)}: (b, H, W) must agree")
    colour = heat(maps / maps.amax(dim=(1, 2), keepdim=True).clamp_min(1e-12))
    grey = images[..., :3].float().mean(dim=-1, keepdim=True).expand(-1, -1, -1, 3)
    return (grey * (1 - strength) + colour.float() * strength).round().to(torch.uint8)


@checked
def as_colour(images: Tensor) -> Tensor:
    """Images uint8 `(b, H, W, 1 or more)` as `(b, H, W, 3)`.

    Raises:
        InputError: not four axes.
    """
    check_axes(images, "images (b, H, W, channels)", 4)
    return images.expand(-1, -1, -1, 3) if images.shape[-1] == 1 else images[..., :3]


@checked
def write_curves(
    path: str | Path, curves: Mapping[str, Curve], *, x: str = "step", y: str = "", title: str = "", log: bool = False
) -> None:
    """Draw named curves, each a pair of x and y values, into a PNG or SVG (by the suffix of `path`).

    Raises:
        InputError: no curves, or a curve with unequal numbers of x and y values.
        MissingDependencyError: matplotlib is not installed.
    """
    if not curves:
        raise InputError("there are no curves to draw")
    for name, (xs, ys) in curves.items():
        if len(xs) != len(ys):
            raise InputError(f"curve {name!r} has {len(xs)} x values and {len(ys)} y values")
    require("matplotlib", extra="train")
    # pyplot keeps figures in global state and may need a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot(xlabel=x, ylabel=y, title=title, yscale="log" if log else "linear")
    for name, (xs, ys) in curves.items():
        axes.plot(xs, ys, label=name, marker="." if len(xs) < 30 else None)
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend()
    path = Path(path)
    with write_atomically(path) as scratch:
        figure.savefig(scratch, format=path.suffix.lstrip(".") or "png", dpi=120)


@checked
def metric_curves(lines: Sequence[Mapping[str, float]], *names: str) -> dict[str, Curve]:
    """Curves over `step` of named measurements in a run's metrics lines, without names that were never measured."""
    points = {name: [(line["step"], line[name]) for line in lines if name in line] for name in names}
    return {name: ([x for x, _ in pairs], [y for _, y in pairs]) for name, pairs in points.items() if pairs}
