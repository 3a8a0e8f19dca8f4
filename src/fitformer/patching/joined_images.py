"""Several images as one example, such as all slides of a patient."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fitformer.errors import InputError
from fitformer.patching.any_size import GroupedImage, scaled_alike, to_signal


class JoinedImages(GroupedImage):
    """Several images as one example: their groups side by side on one grid, each image beginning at a group's border.

    No group mixes images, and what lies between them is absent and costs nothing. An image's groups stand to the right
    of those of the image before. Glimpses of all images stand in front.

    Attributes:
        images: how many they are.

    Raises:
        InputError: no images, or images that are cut differently or hold whole numbers and floats.
    """

    def __init__(self, parts: Sequence[GroupedImage]) -> None:
        if not parts:
            raise InputError("no images are given to be one example")
        first = parts[0]
        for part in parts:
            if (part.patch_grid, part.glimpses) != (first.patch_grid, first.glimpses):
                raise InputError(
                    f"images of one example are cut as {first.patch_grid} with {first.glimpses} glimpses and as "
                    f"{part.patch_grid} with {part.glimpses}"
                )
            if not scaled_alike(part.dtype, first.dtype):
                raise InputError(
                    f"images of one example hold {first.dtype} and {part.dtype} pixels; floats are read as they are, "
                    "whole numbers scaled to -1 .. 1: convert the one or the other"
                )
        self._parts, self.images = tuple(parts), len(parts)
        self.patch_grid, self.glimpses = first.patch_grid, first.glimpses * len(parts)
        self.dtype = first.dtype
        # Unless all are stored alike, whole numbers become floats in -1 .. 1 when they are read.
        self._mixed = len({part.dtype for part in parts}) > 1
        self.grid = max(part.grid[0] for part in parts), sum(part.grid[1] for part in parts)
        (high, wide) = self.patch_grid.group_size  # type: ignore[misc]
        self.shape = (self.grid[0] * high, self.grid[1] * wide, self.patch_grid.channels)
        # Which part each group is of, and its number there: glimpses first.
        of_part = [
            torch.stack([torch.full((part.num_groups,), k), torch.arange(part.num_groups)], 1)
            for k, part in enumerate(parts)
        ]
        fronts, rests = zip(
            *(own.tensor_split([part.glimpses]) for own, part in zip(of_part, parts, strict=True)), strict=True
        )
        self._which = torch.cat([*fronts, *rests])
        offsets = np.cumsum([0, *(part.grid[1] for part in parts)]).tolist()
        shifted = []
        for part, offset in zip(parts, offsets, strict=False):
            coords = part.coords.clone()
            coords[part.glimpses :, 1] += offset
            shifted.append(coords)
        self.coords = torch.stack([shifted[k][own] for k, own in self._which.tolist()])

    @property
    def parts(self) -> tuple[GroupedImage, ...]:
        """The images."""
        return self._parts

    @property
    def path(self) -> str:
        """Of the images' files; AttributeError where one has none."""
        return ", ".join(str(part.path) for part in self.parts)

    @property
    def nbytes(self) -> int:
        """Bytes of the pixels of all groups that are read."""
        return sum(part.nbytes for part in self.parts)

    @property
    def groups_in_all(self) -> int:
        """Groups that the images are cut into, those that are skipped counted, glimpses not."""
        return sum(part.groups_in_all for part in self.parts)

    def read_ahead(self) -> None:
        """Read the pixels of all groups now."""
        for part in self.parts:
            part.read_ahead()

    def read(self, groups: slice) -> tuple[Tensor, Tensor | None]:
        """As of one image."""
        pieces = [self.parts[k].read(own)[0] for k, own in self._pieces(groups)]
        if self._mixed:
            pieces = [to_signal(piece) for piece in pieces]
        return torch.cat(pieces, dim=1), self.mask(groups)

    def mask(self, groups: slice) -> Tensor | None:
        """As of one image."""
        whole = torch.ones(1, 1, self.patch_grid.tokens_per_group, dtype=torch.bool)
        masks = []
        for k, own in self._pieces(groups):
            mask = self.parts[k].mask(own)
            masks.append(whole.expand(1, own.stop - own.start, -1) if mask is None else mask)
        mask = torch.cat(masks, dim=1)
        return None if bool(mask.all()) else mask

    def map(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """The maps of the images, side by side as their groups are; `fill` between them."""
        high, wide = self.patch_grid.patches
        laid = x.new_full((x.shape[-1], self.grid[0] * high, self.grid[1] * wide), fill)
        column = 0
        for part, own in zip(self.parts, self.split(x), strict=True):
            found = part.map(own, fill)
            laid[:, : found.shape[1], column : column + found.shape[2]] = found
            column += part.grid[1] * wide
        return laid

    def split(self, x: Tensor) -> list[Tensor]:
        """What belongs to each image's own groups, of values `(t, ...)` of all groups."""
        return [x[self._which[:, 0].to(x.device) == k] for k in range(self.images)]

    def origin(self, group: int) -> tuple[int, int]:
        """Which part a group is of, and its number there."""
        part, own = self._which[group].tolist()
        return part, own

    def _pieces(self, groups: slice) -> list[tuple[int, slice]]:
        """Slices of the parts' own groups that make up a slice of all."""
        pieces: list[tuple[int, slice]] = []
        for part, own in self._which[groups].tolist():
            if pieces and pieces[-1][0] == part and pieces[-1][1].stop == own:
                pieces[-1] = part, slice(pieces[-1][1].start, own + 1)
            else:
                pieces.append((part, slice(own, own + 1)))
        return pieces
