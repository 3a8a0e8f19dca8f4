"""Features of a slide's patches as an image: a pixel is a patch, its channels are its features.

TRIDENT's HDF5 files have `features` (N, D) or (1, N, D) and `coords` (N, 2), the corners of patches (x, y) in pixels of
the slide's level 0, with attributes on `coords`; a Zarr group may have the same arrays.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from fitformer.data.readers.coordinates import MOST_CELLS, Cells, cells_of
from fitformer.data.readers.errors import readable
from fitformer.data.readers.levels import OpenImage, OpenOptions, Tiles, weigh_tiles
from fitformer.errors import EmptyImageError, InputError, require

FEATURES, COORDS = "features", "coords"
# Bytes of patches that are read at once: more would leave the cache of the processor before they are laid out.
_PIECE = 2**21
_LAYOUT = "a feature file has `features` (N, D) and `coords` (N, 2)"


def open_hdf5(path: str, options: OpenOptions) -> OpenImage:
    """Open an HDF5 file of patch features; absent patches are NaN, and have no data.

    Raises:
        InputError: it is truncated, of another layout, or its patches lie on no grid.
        EmptyImageError: it has no patches.
        MissingDependencyError: h5py is not installed.
    """
    h5py = require("h5py", extra="features")
    with ExitStack() as stack, readable(path):
        file = stack.enter_context(h5py.File(path, "r"))
        # A link that leads nowhere is no array.
        arrays = {name: array for name in file if isinstance(array := file.get(name), h5py.Dataset)}
        image = open_features(path, arrays, options, file.close)
        stack.pop_all()
    return image


def open_without_coordinates(path: str, options: OpenOptions) -> OpenImage:
    """Refuse a tensor that torch saved.

    Raises:
        InputError: always.
    """
    raise InputError(
        f"{path} is a tensor that torch saved: it has features, but not where their patches lie; give the HDF5 file "
        f"(.h5) that has them, or write one: {_LAYOUT}, x and y in pixels of the slide"
    )


def holds_features(arrays: Mapping[str, Any]) -> bool:
    """Whether these are the arrays of a feature file: `features`, with `coords` beside it or no image itself."""
    return FEATURES in arrays and (COORDS in arrays or len(arrays[FEATURES].shape) < 3)


def open_features(
    path: str, arrays: Mapping[str, Any], options: OpenOptions, release: Callable[[], None] = lambda: None
) -> OpenImage:
    """The image of the arrays `features` and `coords` of a file, which have shapes, types, chunks and attributes.

    Raises:
        InputError: another layout, or patches that lie on no grid.
        EmptyImageError: no patches.
    """
    for name in (FEATURES, COORDS):
        if name not in arrays:
            raise InputError(f"{path} has no array {name!r} (it has {', '.join(sorted(arrays)) or 'none'}): {_LAYOUT}")
    features, coords = arrays[FEATURES], arrays[COORDS]
    count, width = _checked_shape(path, features, coords)
    if np.dtype(features.dtype).kind != "f" or np.dtype(coords.dtype).kind not in "iuf":
        raise InputError(
            f"{path} has features of type {features.dtype} and coords of {coords.dtype}: {_LAYOUT}, floats"
        )
    with readable(f"{path}: coords"):
        corners = np.asarray(coords[...]).astype(np.float64)
    cells = cells_of(corners, coords.attrs, path)
    rows = _rows(path, features, count, width, options.most_bytes)
    level = PatchLevel(path, cells, rows, width, corners)
    nodata = np.full(width, np.nan, dtype=level.dtype)
    return OpenImage([level], release, nodata, Presence(cells), cells.placement)


def _checked_shape(path: str, features: Any, coords: Any) -> tuple[int, int]:
    """Patches, and features of each."""
    shape = tuple(features.shape)
    if not all(shape) or not shape:
        raise EmptyImageError(f"{path} has no patches (features of shape {shape}): leave the slide out")
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[0] != 1):
        raise InputError(f"{path} has features of shape {shape}, and (N, D) or (1, N, D) is read: {_LAYOUT}")
    count, width = shape[-2:]
    if tuple(coords.shape) != (count, 2):
        raise InputError(f"{path} has features of {count} patches and coords of shape {tuple(coords.shape)}: {_LAYOUT}")
    if count > MOST_CELLS:
        raise InputError(f"{path} says that it has {count:,} patches, and {MOST_CELLS:,} are the most")
    return count, width


def _rows(path: str, features: Any, count: int, width: int, most_bytes: float) -> "Tiles | Rows":
    """The features as an image (N, 1, D): as they lie in the file, or in its chunks, each decoded once."""
    rows = Rows(path, features, (count, 1, width))
    chunk = 1 if features.chunks is None else min(count, features.chunks[-2])
    if chunk == 1:
        return rows
    weigh_tiles(path, f"chunks of {chunk:,} patches", chunk * width * rows.dtype.itemsize, most_bytes)
    return Tiles(
        rows.shape, rows.dtype, (chunk, 1), lambda k, _: rows.window(k * chunk, 0, min(chunk, count - k * chunk), 1)
    )


@dataclass(frozen=True, eq=False)
class Rows:
    """The features of patches in the order of the file, an image (N, 1, D) whose windows are read as they are."""

    path: str
    array: Any
    shape: tuple[int, int, int]

    @property
    def dtype(self) -> np.dtype:
        """Of the features."""
        return np.dtype(self.array.dtype).newbyteorder("=")

    @property
    def tile(self) -> tuple[int, int]:
        """One patch."""
        return 1, 1

    def window(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """Features (height, 1, D) of consecutive patches."""
        which = slice(top, top + height)
        with readable(f"{self.path}: the features of patches {top:,} .. {top + height:,}"):
            part = self.array[which] if len(self.array.shape) == 2 else self.array[0, which]
            return np.asarray(part).astype(self.dtype, copy=False)[:, None]

    def forget(self) -> None:
        """Nothing is kept."""


@dataclass(frozen=True, eq=False)
class PatchLevel:
    """The grid of a slide's patches (rows, columns, D), NaN where there is none.

    Attributes:
        path: of the file, for messages.
        cells: where patches lie.
        features: of all patches, in the order of the file, as an image (N, 1, D).
        width: D. corners: (N, 2), x and y.
    """

    path: str
    cells: Cells
    features: Tiles | Rows
    width: int
    corners: np.ndarray

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows and columns of the grid, and features of a patch."""
        return (*self.cells.shape, self.width)

    @property
    def dtype(self) -> np.dtype:
        """Of the features."""
        return self.features.dtype

    @property
    def tile(self) -> tuple[int, int]:
        """One patch."""
        return 1, 1

    def window(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """Features (height, width, D) of the patches of a window; only theirs are read."""
        rows, columns, patches = self.cells.window(top, left, height, width)
        out = np.full((height, width, self.width), np.nan, self.dtype)
        for which, found in self._read(patches):
            out[rows[which], columns[which]] = found
        return out

    def pixels_at(self, rows: np.ndarray, columns: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Features of the patches in so many cells (k,), some at a time in the order of the file.

        Yields:
            which of the cells, int64 (j,), and their features (j, D).
        """
        return self._read(self.cells.at(rows, columns))

    def _read(self, patches: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Features of patches by their numbers (k,), run by run as they lie in the file: which, and theirs (j, D)."""
        order = np.argsort(patches)
        most = max(1, _PIECE // (self.width * self.dtype.itemsize))
        for run in np.split(order, np.flatnonzero(np.diff(patches[order]) != 1) + 1) if len(order) else ():
            for which in np.split(run, range(most, len(run), most)):
                found = self.features.window(int(patches[which[0]]), 0, len(which), 1)[:, 0]
                self._check(patches[which], found)
                yield which, found

    def _check(self, patches: np.ndarray, features: np.ndarray) -> None:
        with np.errstate(over="ignore", invalid="ignore"):
            # One that is no number makes the sum none, at a fraction of the time; so may large ones.
            if np.isfinite(features.sum()):
                return
        whole = np.isfinite(features).all(axis=1)
        if not whole.all():
            patch = int(patches[~whole][0])
            x, y = self.corners[patch]
            raise InputError(
                f"{self.path}: the features of patch {patch} (x {x:g}, y {y:g}) are NaN or infinite: extract them "
                "again, or leave the patch out"
            )

    def forget(self) -> None:
        """Drop decoded chunks."""
        self.features.forget()


@dataclass(frozen=True, eq=False)
class Presence:
    """Where a grid has patches, an image (rows, columns, 1) of booleans."""

    cells: Cells

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows, columns, 1."""
        return (*self.cells.shape, 1)

    @property
    def dtype(self) -> np.dtype:
        """Booleans."""
        return np.dtype(bool)

    @property
    def tile(self) -> tuple[int, int]:
        """All are in memory."""
        return self.cells.shape

    def window(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """Booleans (height, width, 1)."""
        rows, columns, _ = self.cells.window(top, left, height, width)
        out = np.zeros((height, width, 1), dtype=bool)
        out[rows, columns] = True
        return out
