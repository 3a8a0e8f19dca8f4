"""The eight symmetries of a grid of pixels (the dihedral group), of arrays and of images that are read lazily."""

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from fitformer.data.readers.levels import Window
from fitformer.patching.any_size import PixelSource


@dataclass(frozen=True)
class Symmetry:
    """One of the eight: rows and columns change places or not, then either runs backwards or not.

    Attributes:
        transposed: rows become columns.
        backwards: whether rows, and whether columns, come in reverse order.
    """

    transposed: bool = False
    backwards: tuple[bool, bool] = (False, False)

    def turn(self, pixels: np.ndarray) -> np.ndarray:
        """A view of an array (rows, columns, ...), turned."""
        down, across = (-1 if each else 1 for each in self.backwards)
        return (pixels.swapaxes(0, 1) if self.transposed else pixels)[::down, ::across]

    def sides(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns once they are turned, and of what turns into so many."""
        return (columns, rows) if self.transposed else (rows, columns)

    def origin(self, window: Window, size: tuple[int, int]) -> Window:
        """The window of an image of `size` (rows, columns) that turns into this window of the turned image."""
        top, left, height, width = window
        rows, columns = self.sides(*size)
        top = rows - top - height if self.backwards[0] else top
        left = columns - left - width if self.backwards[1] else left
        return (left, top, width, height) if self.transposed else (top, left, height, width)


IDENTITY = Symmetry()
DIHEDRAL = tuple(Symmetry(transposed, (down, across)) for transposed, down, across in product((False, True), repeat=3))

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
