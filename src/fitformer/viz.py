"""Pictures of what a model does: where its latents looked, and curves of how it learned.

Grids of samples are `fitformer.tasks.preview.grid`. Pictures are uint8 `(H, W, 3)` tensors; drawing curves needs
matplotlib, everything else only Pillow.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fitformer._support.atomic_files import write_atomically
from fitformer.errors import InputError, require
from fitformer.models.image_encoder import FITImageEncoder
from fitformer.models.layers import CrossLayer

# From dark to bright, equally spaced: the looks of a heated body, legible in grey too.
HEAT = ((0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164))

Curve = tuple[Sequence[float], Sequence[float]]


@torch.no_grad()
def latent_attention(encoder: FITImageEncoder, images: Tensor) -> Tensor:
    """Where the latents looked: maps `(blocks, b, H, W)`, one for each block that reads, over images `(b, H, W, ch)`.

    A latent reads the tokens of its own group alone (spec section 1), so the weights of each group average 1: above
    it the group's latents looked more than evenly. Averaged over heads and over the group's latents.

    Raises:
        InputError: images the encoder was not built for, or an encoder without a block that reads.
    """
    seen: list[tuple[Any, ...]] = []

    def note(read: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append((read, *inputs))

    groups = encoder.groups
    if groups is None:
        raise InputError("this encoder takes images of any size: `fitformer predict` draws where it looked")
    reads = [read for block in encoder.trunk.blocks if isinstance(read := block.read, CrossLayer)]
    if not reads:
        raise InputError("no block of this encoder has global layers, so its latents read nothing")
    hooks = [read.register_forward_pre_hook(note) for read in reads]
    try:
        encoder(images)
    finally:
        for hook in hooks:
            hook.remove()
    weights = [read.weights(*inputs).mean(dim=(1, 2)) for read, *inputs in seen]
    maps = [groups.map(rearrange(w, "(b t) n -> b t n 1", b=len(images)) * w.shape[-1]) for w in weights]
    size = images.shape[1:3]
    return torch.stack([F.interpolate(cells, tuple(size), mode="nearest")[:, 0] for cells in maps])


def heat(values: Tensor) -> Tensor:
    """Colours uint8 `(..., 3)` of values `(...)` from 0, dark, to 1, bright; values outside are cut off."""
    table = torch.tensor(HEAT, dtype=torch.float32, device=values.device)
    place = values.float().clamp(0, 1) * (len(HEAT) - 1)
    below = place.floor().long().clamp(max=len(HEAT) - 2)
    share = (place - below)[..., None]
    return (table[below] * (1 - share) + table[below + 1] * share).round().to(torch.uint8)


def overlay(images: Tensor, maps: Tensor, strength: float = 0.6) -> Tensor:
    """Images uint8 `(b, H, W, ch)` in grey under the heat of maps `(b, H, W)`: pictures uint8 `(b, H, W, 3)`.

    The largest value of a map is the brightest; `strength` in [0, 1] is the heat's share of the mixture.

    Raises:
        InputError: maps that are not of the images' number and size.
    """
    if images.shape[:3] != maps.shape:
        raise InputError(f"maps {tuple(maps.shape)} do not lie over images {tuple(images.shape)}: (b, H, W) must agree")
    colour = heat(maps / maps.amax(dim=(1, 2), keepdim=True).clamp_min(1e-12))
    grey = images[..., :3].float().mean(dim=-1, keepdim=True).expand(-1, -1, -1, 3)
    return (grey * (1 - strength) + colour.float() * strength).round().to(torch.uint8)


def as_colour(images: Tensor) -> Tensor:
    """Images uint8 `(b, H, W, 1 or more)` as `(b, H, W, 3)`."""
    return images.expand(-1, -1, -1, 3) if images.shape[-1] == 1 else images[..., :3]


def write_curves(
    path: str | Path, curves: Mapping[str, Curve], *, x: str = "step", y: str = "", title: str = "", log: bool = False
) -> None:
    """Draw named curves, each a pair of abscissas and ordinates, into a PNG or SVG (by the suffix of `path`).

    Raises:
        InputError: no curves, or one whose two sides differ in length.
        MissingDependencyError: matplotlib is not installed.
    """
    if not curves:
        raise InputError("there are no curves to draw")
    for name, (across, up) in curves.items():
        if len(across) != len(up):
            raise InputError(f"curve {name!r} has {len(across)} abscissas and {len(up)} ordinates")
    require("matplotlib", extra="train")
    # Not pyplot: it keeps figures in global state and may look for a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot(xlabel=x, ylabel=y, title=title, yscale="log" if log else "linear")
    for name, (across, up) in curves.items():
        axes.plot(across, up, label=name, marker="." if len(across) < 30 else None)
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend()
    path = Path(path)
    with write_atomically(path) as scratch:
        figure.savefig(scratch, format=path.suffix.lstrip(".") or "png", dpi=120)


def metric_curves(lines: Sequence[Mapping[str, float]], *names: str) -> dict[str, Curve]:
    """Curves over `step` of the named measurements of a run's metrics lines; none for what was never measured."""
    points = {name: [(line["step"], line[name]) for line in lines if name in line] for name in names}
    return {name: ([p[0] for p in found], [p[1] for p in found]) for name, found in points.items() if found}
