"""Weights of one model made to fit another: a new head, other channels, another size of images or number of groups.

What fits is left as it is; what cannot be adapted is left misshapen, for strict loading to refuse.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

Grid = tuple[int, int]


@dataclass(frozen=True)
class LoadingReport:
    """What became of saved weights on their way into a model.

    Attributes:
        resized: names of tensors that were made to fit, with their old and new shapes.
        new: names of tensors that keep the model's own initial values.
        dropped: names of saved tensors that the model has no place for.
    """

    resized: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    new: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()

    def __str__(self) -> str:
        changes = [f"resized {name} {before} -> {after}" for name, (before, after) in self.resized.items()]
        # Of a block that is new as a whole, its name alone.
        new = dict.fromkeys(re.sub(r"(\.blocks\.\d+)\..*", r"\1", name) for name in self.new)
        changes += [f"new {', '.join(new)}"] if new else []
        changes += [f"dropped {', '.join(self.dropped)}"] if self.dropped else []
        return "; ".join(changes) or "all weights as they were saved"


def adapt(model: Any, old: Any, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], LoadingReport]:
    """The state of an `old` model, made to fit a `model` of the same role.

    Args:
        model: the `FITModel` that is loaded. old: the one that was saved, on any device, `meta` will do.
        state: the old one's tensors by name.

    Returns:
        a state, and what was done to it.
    """
    own, before, found = model.state_dict(), old.state_dict(), dict(state)
    # A tensor that does not have the shape of the old model is left as it is, for strict loading to refuse.
    whole = [name for name, tensor in before.items() if name in state and state[name].shape == tensor.shape]
    candidates = {name: _adapted(name, state[name], model, old) for name in whole if name in own}
    changed = {name: tensor for name, tensor in candidates.items() if tensor is not None}
    ours = [name for name in (*own, *state) if name.startswith(model.class_weights)]
    ours = list(dict.fromkeys(ours)) if model.class_weights and _classes_differ(model, old) else []
    # Blocks that the old one has not, where it is taken as a part of another role.
    ours += [name for name in own if name not in before and name not in ours and ".blocks." in name]
    new, dropped = [name for name in ours if name in own], [name for name in ours if name not in own]
    found = {name: tensor for name, tensor in found.items() if name not in dropped}
    found |= changed | {name: own[name] for name in new}
    shapes = {name: (tuple(state[name].shape), tuple(tensor.shape)) for name, tensor in changed.items()}
    return found, LoadingReport(shapes, tuple(new), tuple(dropped))


def placed(
    model: Any, prefix: str, state: Mapping[str, Tensor], report: LoadingReport
) -> tuple[dict[str, Tensor], LoadingReport]:
    """The state of a part of a model as that of the whole, whose rest is new; and the report likewise.

    Args:
        model: the whole. prefix: of the names of the part's tensors in it. state, report: as `adapt` gave them.
    """
    own = model.state_dict()
    rest = {name: tensor for name, tensor in own.items() if not name.startswith(prefix)}
    resized = {f"{prefix}{name}": shapes for name, shapes in report.resized.items()}
    new = (*(f"{prefix}{name}" for name in report.new), *rest)
    whole = {f"{prefix}{name}": tensor for name, tensor in state.items()} | rest
    return whole, LoadingReport(resized, new, report.dropped)


def _classes_differ(model: Any, old: Any) -> bool:
    return any(getattr(model, name, None) != getattr(old, name, None) for name in ("num_classes", "outputs"))


def _adapted(name: str, tensor: Tensor, model: Any, old: Any) -> Tensor | None:
    """A tensor made to fit; None where it fits as it is, or never will."""
    before, after = old.grids(), model.grids()
    if name.endswith("trunk.position.weight") and before[0] != after[0]:
        return resize_table(tensor, before[0], after[0])
    if name.endswith("trunk.latent_position.weight") and None not in (before[1], after[1]) and before[1] != after[1]:
        return resize_table(tensor, before[1], after[1])
    if name.endswith("stem.projection.weight") and old.channels != model.channels:
        return change_channels(tensor, old.channels, model.channels)
    return None


def resize_table(table: Tensor, before: Grid, after: Grid) -> Tensor:
    """Positions `(rows * columns * m, width)` of a grid with m places a cell, interpolated to another grid.

    Bilinear over rows and columns, with the centres of cells aligned; a grid of one row is a line.
    """
    rows, columns = before
    places = len(table) // prod(before)
    cells = rearrange(table.float(), "(r c m) w -> 1 (m w) r c", r=rows, c=columns, m=places)
    resized = F.interpolate(cells, after, mode="bilinear", align_corners=False)
    return rearrange(resized, "1 (m w) r c -> (r c m) w", m=places).to(table.dtype)


def change_channels(weight: Tensor, before: int, after: int) -> Tensor:
    """The projection `(c, pixels * channels)` of raw patches for another number of channels.

    Each new channel takes the mean over the old ones, scaled so that an image whose channels are all alike is answered
    as before.
    """
    mean = rearrange(weight, "c (p ch) -> c p ch", ch=before).mean(dim=-1) * (before / after)
    return torch.as_tensor(repeat(mean, "c p -> c (p ch)", ch=after)).contiguous()
