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
        cells, lengths = self.cells[start:stop] - first, self.lengths[start:stop]
        begins = np.flatnonzero(np.diff(self.bins[start:stop], prepend=-1))
        if len(begins) > 1 and (np.diff(cells) == 1).all() and (lengths == lengths[0]).all():
            # Whole cells alone, such as the pixels of patches: all bins in one call.
            whole = np.add.reduceat(values[cells[0] :], begins, axis=0, dtype=_sum_type(values))
            return whole * lengths[0], int(self.bins[start])
        ends = [*begins[1:], stop - start]
        parts = [_weighted(values[cells[a] : cells[b - 1] + 1], lengths[a:b]) for a, b in zip(begins, ends)]
        return np.stack(parts), int(self.bins[start])


def _sum_type(values: np.ndarray) -> type[np.generic]:
    return np.float64 if values.dtype.kind == "f" else np.uint64


def _weighted(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The sum over the first axis, weighted; most of the lengths are the same, the largest."""
    whole = lengths.max()
    total = values.sum(axis=0, dtype=_sum_type(values)) * whole
    for index in np.flatnonzero(lengths != whole):
        total -= (whole - lengths[index]) * values[index]
    return np.asarray(total)


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
    """The level as (rows, columns, channels) averages over equal areas, in its own type; whole numbers are rounded.

    NaN have no weight: an average is one of the other pixels, and NaN where there are none.
    """
    down, across = _even(level.shape[0], rows), _even(level.shape[1], columns)
    total = np.zeros((rows, columns, level.shape[2]))
    missing = np.zeros_like(total)

    def add(sums: np.ndarray, values: np.ndarray, top: int, left: int) -> None:
        part, row = down.sums(values, top)
        part, column = across.sums(part.swapaxes(0, 1), left)
        sums[row : row + part.shape[1], column : column + part.shape[0]] += part.swapaxes(0, 1)

    for top, left, height, width in blocks(level):
        pixels = level.window(top, left, height, width)
        if level.dtype.kind == "f" and (empty := np.isnan(pixels)).any():
            add(missing, empty.astype(np.uint8), top, left)
            pixels = np.where(empty, 0, pixels)
        add(total, pixels, top, left)
    weight = level.shape[0] * level.shape[1] - missing
    # Where nothing is left of an area, 0 / 0.
    with np.errstate(invalid="ignore"):
        total /= weight
    return (np.rint(total) if level.dtype.kind == "u" else total).astype(level.dtype)
