"""A slide as the patches of a grid: where they lie, which hold tissue, and their pixels, read on demand."""

import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from fitformer._support.checks import number, whole
from fitformer.data.background import Background
from fitformer.data.foreground import foreground_windows
from fitformer.data.readers.lazy import LazyImage
from fitformer.data.readers.levels import Pixels
from fitformer.data.readers.resolution import AT_MAGNIFICATION_1, magnification_of
from fitformer.errors import InputError

# A stored reduction serves if it is so near to the one that is asked for, or finer.
_AS_LARGE = 0.99


@dataclass(frozen=True)
class PatchCut:
    """How slides are cut into patches.

    Attributes:
        patch_size: the side of a patch in pixels, at the magnification or the microns below if one is given, else of
            the slide's level 0.
        overlap: of neighbours, in the same pixels.
        magnification: such as 20; a slide's own is what pixels of its size are called, 40 for 0.25 microns.
        microns_per_pixel: instead, the side of a pixel exactly.
        slide_microns_per_pixel: of level 0, of slides that do not say it or say it wrong.
        background, tolerance, min_foreground: which patches are left out, as in `foreground.foreground_groups`; a
            reduction that is stored in the slide is scanned in its place. None leaves out no background.

    Raises:
        InputError: a number out of range, an overlap of the whole patch, or both a magnification and microns.
    """

    patch_size: int = 256
    overlap: int = 0
    magnification: float | None = None
    microns_per_pixel: float | None = None
    slide_microns_per_pixel: float | None = None
    background: Background | None = "auto"
    tolerance: float = 0.1
    min_foreground: float = 0.0

    def __post_init__(self) -> None:
        whole("patch_size", self.patch_size, 1, 2**16)
        whole("overlap", self.overlap, 0, self.patch_size - 1)
        for name in ("magnification", "microns_per_pixel", "slide_microns_per_pixel"):
            if getattr(self, name) is not None:
                number(name, getattr(self, name), highest=1000)
        if self.magnification is not None and self.microns_per_pixel is not None:
            raise InputError(
                f"magnification is {self.magnification:g} and microns_per_pixel {self.microns_per_pixel:g}; give one"
            )


@dataclass(frozen=True)
class Scale:
    """How a patch lies over a slide.

    Attributes:
        reduction: pixels of level 0 along the side of a pixel of the patch.
        own, target: magnifications of level 0 and of the patch; None where the slide does not say its own.
    """

    reduction: float = 1.0
    own: float | None = None
    target: float | None = None


def scale_of(image: LazyImage, cut: PatchCut) -> Scale:
    """The scale of a slide's patches.

    Raises:
        InputError: a magnification or microns are asked for, and the slide does not say its own.
    """
    microns = cut.slide_microns_per_pixel or image.microns_per_pixel
    own = None if microns is None else magnification_of(microns)
    if cut.microns_per_pixel is not None and microns is not None:
        target = AT_MAGNIFICATION_1 / cut.microns_per_pixel
        return Scale(cut.microns_per_pixel / microns, AT_MAGNIFICATION_1 / microns, target)
    if cut.magnification is not None and own is not None:
        return Scale(own / cut.magnification, own, cut.magnification)
    if cut.microns_per_pixel is None and cut.magnification is None:
        return Scale(1.0, own, own)
    asked = "magnification" if cut.microns_per_pixel is None else "microns_per_pixel"
    said = "does not say how large its pixels are" if microns is None else f"has pixels of {microns:g} microns"
    raise InputError(
        f"{image.path} {said}, so patches at {asked} {getattr(cut, asked):g} cannot be cut: give the microns of its "
        "pixels (slide_microns_per_pixel), or cut it in pixels of level 0, without a target"
    )


@dataclass(frozen=True, eq=False)
class Patches:
    """The patches of a slide.

    Attributes:
        image: the slide.
        coords: int64 (N, 2), x and y of the upper left corners in pixels of level 0, row by row.
        side: of a patch, in pixels of level 0.
        scale: how patches lie over the slide.
        level: the slide, or a stored reduction of it, that their pixels are read from.
        pixels: the side of a patch in pixels of that level.
    """

    image: LazyImage
    coords: np.ndarray
    side: int
    scale: Scale
    level: Pixels
    pixels: int

    def __len__(self) -> int:
        return len(self.coords)

    def read(self, which: slice) -> np.ndarray:
        """Pixels (k, pixels, pixels, channels) of some patches; beyond the edges they are as the last row or column.

        Floats without data, if the file names such a level, are 0.

        Raises:
            InputError: the file is broken there.
        """
        found = np.stack([self._patch(*corner) for corner in self.coords[which].tolist()])
        if found.dtype.kind == "f" and self.image.nodata is not None:
            return np.nan_to_num(found, copy=False)
        return found

    def _patch(self, x: int, y: int) -> np.ndarray:
        (rows, columns), (height, width) = self.image.shape[:2], self.level.shape[:2]
        top, left = min(round(y * height / rows), height - 1), min(round(x * width / columns), width - 1)
        high, wide = min(self.pixels, height - top), min(self.pixels, width - left)
        found = self.level.window(top, left, high, wide)
        return np.pad(found, ((0, self.pixels - high), (0, self.pixels - wide), (0, 0)), mode="edge")


def patches_of(image: LazyImage, cut: PatchCut, mask: str | os.PathLike[str] | None = None) -> Patches:
    """The patches of a slide that hold tissue: what is no background and, with a mask, not zero there.

    Patches begin at the slide's upper left corner. Those at the right and lower edges may reach beyond it.

    Raises:
        InputError: as `scale_of`, or as `foreground.foreground_groups`; features in place of pixels; patches of less
            than a pixel.
    """
    if image.placement is not None:
        raise InputError(f"{image.path} holds features of patches, not the pixels of a slide: give the slide itself")
    scale = scale_of(image, cut)
    side = round(cut.patch_size * scale.reduction)
    step = side - round(cut.overlap * side / cut.patch_size)
    if min(side, step) < 1:
        raise InputError(
            f"{image.path}: patches of {cut.patch_size} pixels and an overlap of {cut.overlap} are {side} and "
            f"{side - step} pixels of its level 0: give larger patches"
        )
    # None that lies within the one before.
    tops, lefts = (np.arange(0, max(1, length - side + step), step, dtype=np.int64) for length in image.shape[:2])
    kept = foreground_windows(
        image,
        tops,
        lefts,
        side,
        background=cut.background,
        tolerance=cut.tolerance,
        mask=mask,
        min_foreground=cut.min_foreground,
        exact=False,
    )
    down, across = np.nonzero(kept)
    level = _level(image, scale.reduction)
    pixels = max(1, round(side * level.shape[0] / image.shape[0]))
    return Patches(image, np.stack([lefts[across], tops[down]], axis=1), side, scale, level, pixels)


def _level(image: LazyImage, reduction: float) -> Pixels:
    """The smallest stored reduction that has the pixels of patches at such a scale, or the image itself."""
    rows, columns = (max(1, int(_AS_LARGE * side / reduction)) for side in image.shape[:2])
    found: Any = next(iter(image.reductions(rows, columns)), image)
    return found
