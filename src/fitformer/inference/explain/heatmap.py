"""A value for each patch of an image, laid out as the patches lie."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fitformer.errors import InputError
from fitformer.patching.any_size import GroupedImage
from fitformer.patching.sizes import format_size

Pair = tuple[int, int]


@dataclass(frozen=True, eq=False)
class HeatMap:
    """A value for each patch of an image.

    Attributes:
        cells: float32 (rows of patches, columns of patches), NaN where a group was skipped.
        image_size: rows and columns of the image in pixels; the last patches may reach beyond it.
        group_size, patch_size: rows and columns in pixels.

    Raises:
        InputError: cells that are not as many as the image has patches.
    """

    cells: np.ndarray
    image_size: Pair
    group_size: Pair
    patch_size: Pair

    def __post_init__(self) -> None:
        wanted = tuple(-(-size // patch) for size, patch in zip(self.image_size, self.patch_size, strict=True))
        if self.cells.shape != wanted:
            raise InputError(
                f"a map of {format_size(self.cells.shape)} values does not lie over an image of {format_size(wanted)} "
                "patches"
            )

    @classmethod
    def of(cls, values: Tensor, image: GroupedImage) -> "HeatMap":
        """Values `(t, n)` of the patches of all groups of an image, glimpses counted (and left out of the map).

        Raises:
            InputError: several images that are one example; each has a map of its own.
        """
        if image.images > 1:
            raise InputError(
                f"a map lies over one image, and these are {image.images}: lay out each of image.split(values) over "
                "its own of image.parts"
            )
        cells = image.map(values.detach().float().cpu()[..., None], fill=float("nan"))[0]
        patch_grid = image.patch_grid
        return cls(cells.numpy(), image.source.shape[:2], patch_grid.group_size, patch_grid.patch_size)  # type: ignore[arg-type]

    def shrunk(self, rows: int, columns: int) -> np.ndarray:
        """The map averaged over the pixels `(rows, columns)` of a picture of the whole image; NaN where all is skipped.

        Each pixel takes the patches that lie under it, by their share of it: exact at any ratio of sizes.
        """
        down = _shares(self.image_size[0], self.patch_size[0], rows)
        across = _shares(self.image_size[1], self.patch_size[1], columns).T
        held = np.isfinite(self.cells)
        sums = down @ np.where(held, self.cells, 0) @ across
        areas = down @ held.astype(np.float32) @ across
        return np.where(areas > 1e-6, sums / np.maximum(areas, 1e-6), np.nan).astype(np.float32)


def _shares(length: int, patch: int, pixels: int) -> np.ndarray:
    """Share of each of `pixels` equal parts of a length that each patch covers: float32 (pixels, patches)."""
    cuts = np.arange(pixels + 1) * (length / pixels)
    edges = np.minimum(np.arange(-(-length // patch) + 1) * patch, length)
    upper, lower = np.minimum(cuts[1:, None], edges[None, 1:]), np.maximum(cuts[:-1, None], edges[None, :-1])
    return (np.maximum(upper - lower, 0) * (pixels / length)).astype(np.float32)
