"""Flips and quarter turns as augmentation, of images that are read lazily too."""

from typing import Any

import numpy as np

from fitformer.data.symmetry import DIHEDRAL, IDENTITY, Symmetry
from fitformer.patching.any_size import PixelsAt, PixelSource

SYMMETRIES: dict[str, tuple[Symmetry, ...]] = {
    "flip": (IDENTITY, Symmetry(backwards=(False, True))),
    "dihedral": DIHEDRAL,
}
"""The augmentations that move pixels and change none: those that images of any size can have."""


def drawn(augmentation: str, random: np.random.Generator) -> Symmetry:
    """One of an augmentation's symmetries, each as likely as the others."""
    symmetries = SYMMETRIES[augmentation]
    return symmetries[random.integers(len(symmetries))]


# Not a dataclass: in a batch, Lightning takes those apart.
class TransformedImage:
    """An image turned by a symmetry, a `PixelSource` as the image is: only the windows asked for are read."""

    def __init__(self, source: PixelSource, symmetry: Symmetry) -> None:
        self.source, self.symmetry = source, symmetry

    def __repr__(self) -> str:
        return f"Turned({self.source!r}, {self.symmetry!r})"

    @property
    def path(self) -> Any:
        """Of the image's file; AttributeError where it has none."""
        return self.source.path  # type: ignore[attr-defined]

    @property
    def nodata(self) -> np.ndarray | None:
        """Of the image, where its file names one."""
        return getattr(self.source, "nodata", None)

    @property
    def presence(self) -> "TransformedImage | None":
        """Where there are pixels, of an image that has them in some places only."""
        presence = getattr(self.source, "presence", None)
        return None if presence is None else TransformedImage(presence, self.symmetry)

    @property
    def pixels_at(self) -> PixelsAt | None:
        """Of the image, at places of the turned one."""
        read = getattr(self.source, "pixels_at", None)
        return None if read is None else lambda rows, columns: read(*self.symmetry.places(rows, columns, self.shape))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows, columns, channels."""
        rows, columns, channels = self.source.shape
        return (*self.symmetry.sides(rows, columns), channels)

    @property
    def dtype(self) -> np.dtype:
        """Of the image."""
        return self.source.dtype

    def window(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """Pixels `(height, width, channels)` of a window of the turned image, a new array."""
        place = self.symmetry.origin((top, left, height, width), self.source.shape[:2])
        return self._turned(self.source.window(*place))

    def thumbnail(self, rows: int, columns: int) -> np.ndarray:
        """The whole turned image, averaged down to `(rows, columns, channels)`."""
        return self._turned(self.source.thumbnail(*self.symmetry.sides(rows, columns)))

    def _turned(self, pixels: np.ndarray) -> np.ndarray:
        # torch takes no array that runs backwards.
        return np.array(self.symmetry.turn(pixels), order="C")
