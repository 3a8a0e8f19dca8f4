"""The eight symmetries of a grid of pixels (the dihedral group)."""

from dataclasses import dataclass
from itertools import product

import numpy as np

Window = tuple[int, int, int, int]
"""Top, left, height, width."""


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

    def places(self, rows: np.ndarray, columns: np.ndarray, turned: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns (k,) in the image of pixels of the turned image, of the shape `turned`."""
        rows = turned[0] - 1 - rows if self.backwards[0] else rows
        columns = turned[1] - 1 - columns if self.backwards[1] else columns
        return (columns, rows) if self.transposed else (rows, columns)


IDENTITY = Symmetry()
DIHEDRAL = tuple(Symmetry(transposed, (down, across)) for transposed, down, across in product((False, True), repeat=3))
