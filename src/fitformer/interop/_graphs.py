"""What is exported of each role: a module, its inputs and outputs by name and shape, and lengths to trace it at."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fitformer.errors import InputError
from fitformer.interop._cut import cut
from fitformer.models.decoder import FITDecoder
from fitformer.models.denoiser import FITDenoiser
from fitformer.models.encoder import FITEncoder
from fitformer.models.image_denoiser import FITImageDenoiser
from fitformer.models.image_encoder import FITImageEncoder
from fitformer.models.image_segmenter import FITImageSegmenter
from fitformer.models.positions import GridPositions
from fitformer.models.trunk import Trunk
from fitformer.patching import PatchGrid
from fitformer.patching.sizes import to_sides


@dataclass(frozen=True)
class Axis:
    """An axis of any length from `least` to `most`, traced at `traced`."""

    name: str
    traced: int = 2
    least: int = 1
    most: int | None = None


@dataclass(frozen=True)
class Port:
    """An input or output: its axes, the type of its numbers, what they are."""

    axes: tuple[Axis | int, ...]
    dtype: torch.dtype
    what: str

    def example(self) -> Tensor:
        """Numbers to trace with, of which only the shape matters."""
        return torch.zeros([axis.traced if isinstance(axis, Axis) else axis for axis in self.axes], dtype=self.dtype)

    def free(self) -> dict[int, Axis]:
        """The axes of any length, by number."""
        return {k: axis for k, axis in enumerate(self.axes) if isinstance(axis, Axis)}

    def named(self) -> dict[int, str]:
        """Their names."""
        return {k: axis.name for k, axis in self.free().items()}

    def described(self) -> dict[str, Any]:
        """As the exported file says it."""
        shape = [axis.name if isinstance(axis, Axis) else axis for axis in self.axes]
        return {"shape": shape, "dtype": str(self.dtype).removeprefix("torch."), "what": self.what}


@dataclass(frozen=True)
class Graph:
    """What is exported: a module that takes the inputs by name and gives the outputs in their order."""

    module: nn.Module
    inputs: Mapping[str, Port]
    outputs: Mapping[str, Port]


BATCH = Axis("batch")
PIXELS = "channels last; whole-number pixels as 2 * pixels / most - 1, where most is 255 for uint8 and 65535 for uint16"


def graph_of(model: nn.Module) -> Graph:
    """What is exported of a model.

    Raises:
        InputError: a model of no known role.
    """
    if type(model) not in GRAPHS:
        known = ", ".join(role.__name__ for role in GRAPHS)
        raise InputError(f"model is of the class {type(model).__name__}; what is exported is one of {known}")
    return GRAPHS[type(model)](model)


def _images(grid: PatchGrid) -> Port:
    """Images as a model takes them that cuts them so."""
    sides: Sequence[Axis | int]
    if grid.any_size:
        # A graph is traced for one group a side or for several.
        sides = [
            Axis(name, 2 * group + 1, least=group + 1)
            for name, group in zip(("rows", "columns"), to_sides(grid.group_size, "hw"), strict=True)
        ]
    else:
        sides = grid.image_size  # type: ignore[assignment]
    return _floats((BATCH, *sides, grid.channels), PIXELS)


def _image_encoder(model: FITImageEncoder) -> Graph:
    name = model.outputs if model.num_classes else "features"
    what = {
        "logits": "logits of the classes",
        "numbers": "numbers, in the units of what was learned from",
        "hazards": "logits of the hazards of intervals of time",
        "features": "pooled features, of a model without a head",
    }[name]
    return Graph(
        _AnySize(model) if model.patch_grid.any_size else model,
        {"images": _images(model.patch_grid)},
        {name: _floats((BATCH, model.num_classes or model.num_features), what)},
    )


def _image_segmenter(model: FITImageSegmenter) -> Graph:
    images = _images(model.patch_grid)
    _, rows, columns, _ = images.axes
    return Graph(
        _PixelsOfAnySize(model) if model.patch_grid.any_size else model,
        {"images": images},
        {"logits": _floats((BATCH, model.num_classes, rows, columns), "logits of the classes of every pixel")},
    )


def _encoder(model: FITEncoder) -> Graph:
    groups, d = _groups(model.trunk), model.trunk.config.latent_dim
    n, c = model.tokens_per_group, model.trunk.config.dim
    whole: Axis | int = n
    inputs = {"x": _floats((BATCH, groups, n, model.stem.projection.in_features), "raw tokens in groups")}
    if model.stem_y is not None:
        extra = Axis("extra")
        inputs["y"] = _floats((BATCH, groups, extra, model.stem_y.projection.in_features), "extra tokens of the groups")
        whole = Axis(f"extra + {n}")
    return Graph(
        model,
        inputs | _coords(model.trunk, groups),
        {
            "tokens": _floats((BATCH, groups, whole, c), "data tokens"),
            "latents": _floats((BATCH, groups, model.trunk.latents_per_group, d), "latents"),
        },
    )


def _denoiser(model: FITDenoiser) -> Graph:
    groups = _groups(model.trunk)
    scalars = 1 + model.time.outer.in_features - model.time.outer.out_features
    x = (BATCH, groups, model.tokens_per_group, model.output.out_features)
    latents = (BATCH, groups, model.trunk.latents_per_group, model.trunk.config.latent_dim)
    inputs = {
        "x": _floats(x, "noisy tokens in groups"),
        "time": _floats((BATCH,) if scalars == 1 else (BATCH, scalars), "noise level gamma in [0, 1] (and more)"),
    }
    if model.cond_dim is not None:
        inputs["cond"] = _floats((BATCH, model.cond_dim), "condition; zeros for none")
    if model.self_conditioning is not None:
        inputs["latents_prev"] = _floats(latents, "latents of the call before; zeros at first")
    return Graph(
        model,
        inputs | _coords(model.trunk, groups),
        {"prediction": _floats(x, "what the model was trained to predict"), "latents": _floats(latents, "latents")},
    )


def _image_denoiser(model: FITImageDenoiser) -> Graph:
    graph = _denoiser(model.denoiser)
    inputs = {**graph.inputs}
    if model.num_classes:
        inputs["cond"] = Port((BATCH,), torch.int64, f"classes, 0 to {model.num_classes - 1}, -1 for none")
    return Graph(model, inputs, graph.outputs)


def _decoder(model: FITDecoder) -> Graph:
    n, groups = model.tokens_per_group, model.most_groups
    length = Axis("length", 2 * n + 1 if groups is None else min(2 * n + 1, groups * n), most=groups and groups * n)
    inputs = {"tokens": Port((BATCH, length), torch.int64, f"tokens, 0 to {model.vocab_size - 1}, not shifted")}
    if model.num_classes:
        inputs["labels"] = Port((BATCH,), torch.int64, f"classes, 0 to {model.num_classes - 1}, -1 for none")
    what = "logits of each token, given those before it"
    return Graph(_Logits(model), inputs, {"logits": _floats((BATCH, length, model.vocab_size), what)})


GRAPHS: Mapping[type[nn.Module], Any] = {
    FITImageEncoder: _image_encoder,
    FITImageSegmenter: _image_segmenter,
    FITImageDenoiser: _image_denoiser,
    FITDecoder: _decoder,
    FITEncoder: _encoder,
    FITDenoiser: _denoiser,
}


def _floats(axes: tuple[Axis | int, ...], what: str) -> Port:
    return Port(axes, torch.float32, what)


def _groups(trunk: Trunk) -> Axis | int:
    """The axis of groups: as many as there are positions for, or any number."""
    return trunk.most_groups or Axis("groups", 3)


def _coords(trunk: Trunk, groups: Axis | int) -> dict[str, Port]:
    if not isinstance(trunk.latent_position, GridPositions):
        return {}
    return {"coords": Port((groups, 2), torch.int64, "row and column of each group; a glimpse is in row -1")}


class _Logits(nn.Module):
    """A decoder's logits of sequences of any length."""

    def __init__(self, decoder: FITDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits `(b, L, vocab_size)` of tokens `(b, L)`."""
        n, length = self.decoder.tokens_per_group, tokens.shape[1]
        # What comes later changes no logits. A graph of any number of groups is traced for at least three.
        groups = self.decoder.most_groups or (length + 3 * n - 1) // n
        shifted = F.pad(tokens, (1, groups * n - length))[:, :-1].unflatten(1, (groups, n))
        logits = self.decoder(shifted, labels=labels).flatten(1, 2)
        return logits[:, torch.arange(length)]


class _AnySize(nn.Module):
    """An encoder of images of any size, which cuts them by tensor operations alone; a batch is of one size.

    As `GroupedImage` cuts them: patches at the edge are filled with the last row and column, patches beyond are masked,
    and glimpses, averages of the whole, stand in front.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Logits or features `(b, c)` of images `(b, H, W, channels)`."""
        model = self.model
        tokens, mask, coords, _ = self.grouped(images)
        x, latents = model.encoder(tokens, mask=mask, coords=coords)
        if model.ends_in_latents:
            pooled = latents.mean(dim=(1, 2))
        else:
            pooled = (x * mask[..., None]).sum(dim=(1, 2)) / mask.sum(dim=(1, 2))[:, None]
        return pooled if model.head is None else model.head(pooled)

    def grouped(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
        """Tokens, their mask, rows and columns of the groups, and how many of these there are without glimpses."""
        model = self.model
        grid, (height, width) = model.patch_grid, images.shape[1:3]
        (gh, gw), (ph, pw) = grid.group_size, grid.patch_size
        rows, columns = (height + gh - 1) // gh, (width + gw - 1) // gw
        row, column = torch.arange(rows * gh), torch.arange(columns * gw)
        filled = images[:, row.clamp(max=height - 1)][:, :, column.clamp(max=width - 1)]
        tokens = self._cut(filled, rows, columns)
        inside = (row[::ph] < height).view(rows, 1, -1, 1) & (column[::pw] < width).view(1, columns, 1, -1)
        mask = inside.flatten(2).flatten(0, 1)
        coords = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        if model.glimpses:
            small = self._cut(_averaged(images, gh, gw), 1, 1)
            tokens = torch.cat([small.expand(-1, model.glimpses, -1, -1), tokens], dim=1)
            mask = torch.cat([mask.new_ones(model.glimpses, mask.shape[1]), mask])
            number = torch.arange(model.glimpses)
            coords = torch.cat([torch.stack([torch.full_like(number, -1), number], dim=1), coords])
        return tokens, mask[None].expand(tokens.shape[0], -1, -1), coords, (rows, columns)

    def _cut(self, images: Tensor, rows: int, columns: int) -> Tensor:
        """Tokens `(b, t, n, token_dim)` of images in `rows` x `columns` whole groups."""
        grid = self.model.patch_grid
        return cut(images, (rows, columns), grid.patches, grid.patch_size)


class _PixelsOfAnySize(_AnySize):
    """A segmenter of images of any size, likewise."""

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(b, classes, H, W)` of images `(b, H, W, channels)`."""
        model, (height, width) = self.model, images.shape[1:3]
        tokens, mask, coords, groups = self.grouped(images)
        x, _ = model.encoder(tokens, mask=mask, coords=coords)
        logits = model.head(x[:, model.glimpses :], tokens[:, model.glimpses :]).unflatten(1, groups)
        whole = logits.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
        return whole[:, :, torch.arange(height)][..., torch.arange(width)]


def _averaged(images: Tensor, rows: int, columns: int) -> Tensor:
    """Images `(b, H, W, ch)` averaged down to `(b, rows, columns, ch)`, over what torch's area interpolation takes."""
    down, across = _shares(images.shape[1], rows), _shares(images.shape[2], columns)
    return torch.einsum("rh,bhwc,kw->brkc", down, images, across)


def _shares(length: int, parts: int) -> Tensor:
    """The share `(parts, length)` that each of `length` pixels has in each mean."""
    part, pixel = torch.arange(parts)[:, None], torch.arange(length)
    inside = (pixel >= part * length // parts) & (pixel < ((part + 1) * length + parts - 1) // parts)
    return inside / inside.sum(dim=1, keepdim=True)
