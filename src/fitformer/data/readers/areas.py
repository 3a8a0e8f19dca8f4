"""Averages and sums over areas, read block by block: how the parts of one cut of a length lie over those of another."""

from dataclasses import dataclass

import numpy as np

from fitformer.data.readers.levels import Pixels, blocks


@dataclass(frozen=True)
class Overlap:
    """The pieces of a length that lie in one cell and one bin each, in order: cell, bin and length of each (k,)."""

    cells: np.ndarray
    bins: np.ndarray
    lengths: np.ndarray

    def sums(self, values: np.ndarray, first: int) -> tuple[np.ndarray, int]:
        """Sums over bins of the values (cells, ...) of cells `first` onwards, weighted by length; and the first bin."""
        start, stop = np.searchsorted(self.cells, (first, first + len(values)))
        lengths = self.lengths[start:stop].reshape(-1, *[1] * (values.ndim - 1))
        weighted = values[self.cells[start:stop] - first] * lengths
        bins = self.bins[start:stop]
        begins = np.flatnonzero(np.diff(bins, prepend=bins[0] - 1))
        return np.add.reduceat(weighted, begins, axis=0), int(bins[0])


def overlap(cell_edges: np.ndarray, bin_edges: np.ndarray) -> Overlap:
    """How cells lie over bins, from their edges, whole numbers (cells + 1,) and (bins + 1,) with the same ends."""
    edges = np.union1d(cell_edges, bin_edges)
    cells = np.searchsorted(cell_edges, edges[:-1], side="right") - 1
    bins = np.searchsorted(bin_edges, edges[:-1], side="right") - 1
    return Overlap(cells, bins, np.diff(edges).astype(np.float64))


def _even(cells: int, bins: int) -> Overlap:
    """A length of cells * bins, cut evenly either way."""
    return overlap(np.arange(cells + 1, dtype=np.int64) * bins, np.arange(bins + 1, dtype=np.int64) * cells)


def average(level: Pixels, rows: int, columns: int) -> np.ndarray:
    """The level as (rows, columns, channels) averages over equal areas, in its own type; whole numbers are rounded."""
    down, across = _even(level.shape[0], rows), _even(level.shape[1], columns)
    total = np.zeros((rows, columns, level.shape[2]))
    for top, left, height, width in blocks(level):
        part, row = down.sums(level.window(top, left, height, width), top)
        part, column = across.sums(part.swapaxes(0, 1), left)
        total[row : row + part.shape[1], column : column + part.shape[0]] += part.swapaxes(0, 1)
    total /= level.shape[0] * level.shape[1]
    return (np.rint(total) if level.dtype.kind == "u" else total).astype(level.dtype)
