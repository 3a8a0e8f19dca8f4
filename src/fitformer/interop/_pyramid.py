"""FIT as an encoder of images, channels first, that gives a pyramid of maps: what libraries of vision take."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fitformer._support.checks import whole
from fitformer.errors import InputError
from fitformer.execution import Inputs
from fitformer.execution.base import SomeBlocks
from fitformer.interop._cut import cut, lay_out
from fitformer.models.config import TrunkConfig
from fitformer.models.encoder import FITEncoder
from fitformer.models.positions import GridPositions
from fitformer.patching import PatchGrid
from fitformer.patching.sizes import MOST_SIDE, Size, axis_lengths, check_divisible, format_size


@dataclass(frozen=True)
class Level:
    """A map of the pyramid: pixels a cell and side, channels, the block whose data tokens it is made of, or latents."""

    reduction: int
    width: int
    block: int
    of_latents: bool = False


def reductions_of(group_size: int, patch_size: int) -> list[int]:
    """Pixels a cell and side of each level: a patch, twice as many while that divides a group, and the group.

    Raises:
        InputError: sizes that are no whole numbers, or patches that do not divide the group.
    """
    for name, size in (("group_size", group_size), ("patch_size", patch_size)):
        whole(name, size, 1, MOST_SIDE)
    check_divisible(group_size, patch_size, ("a group", "patches", "pixels"))
    found = [patch_size]
    while found[-1] * 2 < group_size and group_size % (found[-1] * 2) == 0:
        found.append(found[-1] * 2)
    return [*found, group_size] if patch_size < group_size else found


class Pyramid(nn.Module):
    """FIT encoder of images `(b, channels, H, W)` as maps `(b, width, H / r, W / r)`, a level for each reduction r.

    The last level has a cell for each group: the mean of its latents, or of its data tokens where the layer string ends
    with `)`, as `FITImageEncoder` pools them. The levels before are data tokens as blocks leave them, averaged over
    squares of patches; the coarser the level, the later the block.

    Args:
        trunk: options of the trunk.
        image_size: the one size that a table of positions is for; None for any that groups divide.
        group_size, patch_size: sides of the square groups and patches, in pixels.
        channels: of the images.

    Raises:
        InputError: sizes that do not divide, or what `FITEncoder` refuses.
    """

    def __init__(
        self, trunk: TrunkConfig, image_size: Size | None, group_size: int, patch_size: int, channels: int
    ) -> None:
        super().__init__()
        reductions = reductions_of(group_size, patch_size)
        self.grid = grid = PatchGrid(image_size, group_size, patch_size, channels)
        self.encoder = FITEncoder(trunk, grid.num_groups, grid.tokens_per_group, grid.token_dim)
        depths = self.encoder.trunk.block_depths
        last, of_latents = len(depths) - 1, depths[-1][1] > 0
        below = len(reductions) - 1
        # The k-th of so many levels is of the block that ends the k-th of as many equal parts of the trunk.
        self.levels = [
            Level(r, trunk.dim, -(-(k + 1) * len(depths) // below) - 1) for k, r in enumerate(reductions[:-1])
        ]
        self.levels.append(Level(reductions[-1], trunk.latent_dim if of_latents else trunk.dim, last, of_latents))
        # What is not answered in is not normalised: every parameter has a gradient.
        setattr(self.encoder, "norm" if of_latents else "latent_norm", nn.Identity())

    def forward(self, images: Tensor) -> Tensor:
        """The last level `(b, width, H / r, W / r)` of images `(b, channels, H, W)`, normalised.

        Raises:
            InputError: images of another number of channels, or of a size that groups do not divide.
        """
        return self.maps(images, ())[0]

    def maps(
        self, images: Tensor, levels: Sequence[int], norm: bool = False, stop: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """The last level, normalised, and some levels as blocks leave them.

        Args:
            images: `(b, channels, H, W)`. levels: numbers of the levels.
            norm: normalise the last level wherever it is given.
            stop: run no blocks beyond those of `levels`; the last of these then takes the place of the last level.

        Raises:
            InputError: as `forward`.
        """
        last = len(self.levels) - 1
        end = max(levels) if stop else last
        ran, rows_columns = self._run(images, sorted({*levels, end}))
        first = self._map(end, ran, rows_columns, norm=end == last)
        return first, [self._map(k, ran, rows_columns, norm=norm and k == last) for k in levels]

    def cut_to(self, level: int, keep_norm: bool = True) -> None:
        """Drop what a level and those before it do not need; the level is then the last one.

        Args:
            level: its number. keep_norm: keep the norm of the last level, if it is this.
        """
        last, trunk = self.levels[level], self.encoder.trunk
        if level < len(self.levels) - 1:
            self.levels, keep_norm = self.levels[: level + 1], False
            trunk.blocks = trunk.blocks[: last.block + 1]
            trunk.blocks[-1].read, trunk.blocks[-1].global_layers = None, nn.ModuleList()
            trunk.block_depths = [*trunk.block_depths[: last.block], (trunk.block_depths[last.block][0], 0)]
            if not last.block:
                # Local layers of the first block look at no latents.
                trunk.latent_position = nn.Identity()  # type: ignore[assignment]
        if not keep_norm:
            self.encoder.norm = self.encoder.latent_norm = nn.Identity()  # type: ignore[assignment]

    def _run(self, images: Tensor, levels: Sequence[int]) -> tuple[dict[int | None, Tensor], tuple[int, int]]:
        """Data tokens by their block, and latents; rows and columns of the groups."""
        self._check(images)
        grid, encoder = self.grid, self.encoder
        (gh, gw), patch = grid.group_size, grid.patch_size  # type: ignore[misc]
        groups = images.shape[2] // gh, images.shape[3] // gw
        blocks = sorted({self.levels[k].block for k in levels if not self.levels[k].of_latents})
        inputs = Inputs(
            tokens=cut(images.permute(0, 2, 3, 1), groups, grid.patches, patch),  # type: ignore[arg-type]
            latents=self._latents(images, groups),
            embed=lambda groups, tokens: encoder.embed(tokens),
            blocks=blocks,
            parameters=encoder.all_parameters(),
        )
        some = encoder.trunk.blocks[: max(self.levels[k].block for k in levels) + 1]
        outputs = encoder.execution.run(SomeBlocks(encoder.trunk, some), inputs)
        return {None: outputs.latents, **dict(zip(blocks, outputs.tokens, strict=True))}, groups

    def _latents(self, images: Tensor, groups: tuple[int, int]) -> Tensor:
        """Initial latents `(b, t, m, d)` of images of so many rows and columns of groups."""
        trunk, (rows, columns) = self.encoder.trunk, groups
        if isinstance(trunk.latent_position, nn.Identity):
            dtype = self.encoder.stem.projection.weight.dtype
            shape = images.shape[0], rows * columns, trunk.latents_per_group, trunk.config.latent_dim
            return images.new_zeros(shape, dtype=dtype)
        coords = None
        if isinstance(trunk.latent_position, GridPositions):
            coords = torch.cartesian_prod(*(torch.arange(side, device=images.device) for side in groups))
        return trunk.initial_latents(images.shape[0], rows * columns, coords)

    def _map(self, k: int, ran: dict[int | None, Tensor], groups: tuple[int, int], norm: bool) -> Tensor:
        level = self.levels[k]
        if level.of_latents:
            latents = self.encoder.latent_norm(ran[None]) if norm else ran[None]
            return latents.mean(dim=2).unflatten(1, groups).permute(0, 3, 1, 2)
        x = self.encoder.head(ran[level.block]) if norm else ran[level.block]
        maps = lay_out(x, groups, self.grid.patches)
        patches = level.reduction // self.levels[0].reduction
        return F.avg_pool2d(maps, patches) if patches > 1 else maps

    def _check(self, images: Tensor) -> None:
        if torch.jit.is_tracing() or torch.compiler.is_compiling():
            return  # Sizes are symbols.
        grid, shape = self.grid, tuple(images.shape)
        if len(shape) != 4 or shape[1] != grid.channels:
            hint = "; channels come first: images.permute(0, 3, 1, 2)" if shape[3:] == (grid.channels,) else ""
            raise InputError(f"images of shape {shape} where (b, {grid.channels}, H, W) is expected{hint}")
        if grid.image_size not in (None, shape[2:]):
            raise InputError(
                f"an image of {format_size(shape[2:])} given to a model of {format_size(grid.image_size)} pixels; "  # type: ignore[arg-type]
                "latent_position='row_column' takes any size"
            )
        axis_lengths(shape[2:], grid.group_size, grid.patch_size, "hw")

    def __prepare_scriptable__(self) -> Any:
        """What `torch.jit.script` takes in its place: a trace, which holds for any batch and every size."""
        grid, weight = self.grid, self.encoder.stem.projection.weight
        (gh, gw) = grid.group_size  # type: ignore[misc]
        rows, columns = grid.image_size or (2 * gh, 3 * gw)  # type: ignore[misc]
        images = weight.new_zeros(2, grid.channels, rows, columns)
        with warnings.catch_warnings(), torch.no_grad():
            # Checks of shapes are left out of a trace, which warns of each.
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            return torch.jit.trace(self, images, check_trace=False)
