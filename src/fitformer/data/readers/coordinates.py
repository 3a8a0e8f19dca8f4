"""The grid that the patches of a slide lie on, found from the coordinates of their corners."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np

from fitformer.data.readers.levels import Placement
from fitformer.errors import InputError

MOST_CELLS = 2**26
"""Of a grid: more are coordinates that are none of one grid. A slide of 8,192 x 8,192 patches has as many."""

# Patches never overlap more than so: a smaller spacing is of patches that lie beside the grid.
_MOST_OVERLAP = 16
_SIZE, _OVERLAP = "patch_size_level0", "overlap"


@dataclass(frozen=True, eq=False)
class Cells:
    """Which cell of a grid each of N patches lies in.

    Attributes:
        shape: rows and columns of the grid.
        placement: where its cells lie in the slide.
        keys: int64 (N,), row * columns + column of the cells that hold a patch, ascending.
        patches: int64 (N,), the number of the patch in each of them.
    """

    shape: tuple[int, int]
    placement: Placement
    keys: np.ndarray
    patches: np.ndarray

    def window(self, top: int, left: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The patches of a window: the row and the column in it of each, and its number, (k,) each."""
        starts = np.arange(top, top + height, dtype=np.int64) * self.shape[1] + left
        spans = zip(*(np.searchsorted(self.keys, edge).tolist() for edge in (starts, starts + width)), strict=True)
        found = np.concatenate([np.arange(first, last) for first, last in spans])
        rows, columns = np.divmod(self.keys[found], self.shape[1])
        return rows - top, columns - left, self.patches[found]

    def at(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """The numbers of the patches in cells (k,) that hold one."""
        return self.patches[np.searchsorted(self.keys, rows * self.shape[1] + columns)]


def cells_of(coords: np.ndarray, attributes: Mapping[str, Any], path: str) -> Cells:
    """The cells of patches whose upper left corners are `coords (N, 2)`, x and y in pixels of the slide's level 0.

    The step of the grid is the attribute `patch_size_level0`, less what patches overlap; without it, the smallest
    spacing of two patches in one row or column. Patches that lie beside the grid take the nearest cell.

    Raises:
        InputError: a corner that is no number, no step, a grid of more than `MOST_CELLS`, or two patches in one cell.
    """
    if not np.isfinite(coords).all():
        raise InputError(f"{path}: patch {_first(~np.isfinite(coords))} has coordinates that are no numbers")
    size, step = _size_and_step(coords, attributes, path)
    phase = np.array([_commonest(axis % step) for axis in coords.T])
    # Upwards from a half: every patch that is half a step off is moved the same way.
    places = np.floor((coords - phase) / step + 0.5)
    first = places.min(axis=0)
    columns, rows = (places.max(axis=0) - first + 1).tolist()
    if rows * columns > MOST_CELLS:
        raise InputError(
            f"{path}: in steps of {step:g} pixels its coordinates make a grid of {rows:,.0f} x {columns:,.0f} cells "
            f"for {len(coords):,} patches, and {MOST_CELLS:,} are the most: write the step of the patches, in pixels "
            f"of level 0, as the attribute {_SIZE} of coords"
        )
    across, down = (places - first).astype(np.int64).T
    keys = down * int(columns) + across
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    if (same := np.flatnonzero(np.diff(keys) == 0)).size:
        raise InputError(_collision(coords, order[same[0]], order[same[0] + 1], step, path))
    # A cell lies about the middle of its patch, which is larger than it where patches overlap.
    left, top = (phase + first * step + (size - step) / 2).tolist()
    return Cells((int(rows), int(columns)), Placement(top, left, step), keys, order)


def _size_and_step(coords: np.ndarray, attributes: Mapping[str, Any], path: str) -> tuple[float, float]:
    """The side of a patch and the step of the grid, in pixels of level 0."""
    size, overlap = _number(attributes, _SIZE), _number(attributes, _OVERLAP)
    spacing = _spacing(coords)
    if size is None:
        if spacing is None:
            raise InputError(
                f"{path}: no two patches are in one row or column, and coords have no attribute {_SIZE} that says how "
                "far apart patches are: write it"
            )
        beside = int((~_on_grid(coords, spacing)).sum())
        if beside:
            warnings.warn(
                f"{path}: coords have no attribute {_SIZE}; the smallest spacing of two patches, {spacing:g} pixels, "
                f"is taken for their step, and {beside:,} of {len(coords):,} patches lie beside that grid: write the "
                "attribute if it is another",
                stacklevel=2,
            )
        return spacing, spacing
    if overlap is not None and (of := _number(attributes, "patch_size")) is not None and overlap < of:
        return size, size - round(overlap * size / of)
    finer = spacing is not None and size / _MOST_OVERLAP <= spacing < size and _on_grid(coords, spacing).all()
    return size, spacing if finer and spacing is not None else size


def _spacing(coords: np.ndarray) -> float | None:
    """The smallest distance of two patches in one row or column; None where no two are."""
    found = []
    for axis in (0, 1):
        along, across = coords[:, axis], coords[:, 1 - axis]
        order = np.lexsort((along, across))
        steps = np.diff(along[order])[np.diff(across[order]) == 0]
        found += [float(steps[steps > 0].min())] if (steps > 0).any() else []
    return min(found, default=None)


def _on_grid(coords: np.ndarray, step: float) -> np.ndarray:
    """Which patches lie where most do, up to whole steps, (N,)."""
    left = coords % step
    return np.asarray((left == [_commonest(axis) for axis in left.T]).all(axis=1))


def _commonest(values: np.ndarray) -> float:
    found, counts = np.unique(values, return_counts=True)
    return float(found[counts.argmax()])


def _number(attributes: Mapping[str, Any], name: str) -> float | None:
    """An attribute that is a number above 0; None where it is anything else."""
    try:
        value = float(attributes[name])
    except (KeyError, TypeError, ValueError):
        return None
    return value if isfinite(value) and value > 0 else None


def _first(faults: np.ndarray) -> int:
    return int(np.flatnonzero(faults.any(axis=1))[0])


def _collision(coords: np.ndarray, one: int, other: int, step: float, path: str) -> str:
    where = " and ".join(f"{k} (x {coords[k, 0]:g}, y {coords[k, 1]:g})" for k in sorted((one, other)))
    return (
        f"{path}: patches {where} are both in one cell of the grid, whose step is {step:g} pixels: correct the "
        f"attribute {_SIZE} of coords if patches are closer than that, or extract features of patches on one grid"
    )
