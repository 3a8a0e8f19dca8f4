"""What a file backend yields: levels of an image, full size first, each read window by window.

A level is stored in tiles (`Tiles`), lies in the file as it is (`Mapped`), or is another one, changed (`Converted`).
"""

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Protocol

import numpy as np

from fitformer.data.readers import cache
from fitformer.data.readers.errors import readable
from fitformer.errors import InputError

WHOLE_BYTES = 2**30
"""The most decoded bytes that may have to be held at once, unless the caller says otherwise: of a tile, or of a file
that decodes only as a whole."""

Window = tuple[int, int, int, int]
"""Top, left, height, width."""


class Pixels(Protocol):
    """An image (rows, columns, channels) that is read window by window."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows, columns, channels."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """Of its pixels, in the byte order of this machine."""
        ...

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns that are read at once, at the least."""
        ...

    def window(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """Pixels (height, width, channels), a new array; the window lies inside."""
        ...


def tile_bytes(level: Pixels) -> int:
    """Bytes of the pixels that are decoded at once."""
    return prod(level.tile) * level.shape[2] * level.dtype.itemsize


class Level(Pixels, Protocol):
    """An image in a file, or a stored reduction of it."""

    def forget(self) -> None:
        """Drop its decoded pixels."""
        ...


@dataclass(frozen=True)
class OpenImage:
    """An open file: its levels, full size first, and how to close the file."""

    levels: Sequence[Level]
    release: Callable[[], None] = lambda: None

    def close(self) -> None:
        """Close the file and drop its decoded pixels."""
        self.release()
        for level in self.levels:
            level.forget()


_serials = itertools.count()


class Tiles:
    """A level in tiles (or strips, as wide as the image): `decode(row, column)` gives one, edge ones cut or padded.

    Decoded tiles are shared between windows through the cache of the process.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: np.dtype,
        tile: tuple[int, int],
        decode: Callable[[int, int], np.ndarray],
    ):
        self.shape, self.dtype = shape, np.dtype(dtype).newbyteorder("=")
        self.tile = min(tile[0], shape[0]), min(tile[1], shape[1])
        self._decode, self._serial = decode, next(_serials)

    def window(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """Pixels (height, width, channels), of the tiles that it touches."""
        out = np.empty((height, width, self.shape[2]), self.dtype)
        bottom, right = top + height, left + width
        for row in range(top // self.tile[0], ceil(bottom / self.tile[0])):
            for column in range(left // self.tile[1], ceil(right / self.tile[1])):
                tile = self._tile(row, column)
                at_row, at_column = row * self.tile[0], column * self.tile[1]
                upper, lower = max(top, at_row), min(bottom, at_row + self.tile[0])
                first, last = max(left, at_column), min(right, at_column + self.tile[1])
                out[upper - top : lower - top, first - left : last - left] = tile[
                    upper - at_row : lower - at_row, first - at_column : last - at_column
                ]
        return out

    def _tile(self, row: int, column: int) -> np.ndarray:
        return cache.shared().get((self._serial, row, column), lambda: self._decode(row, column), tile_bytes(self))

    def forget(self) -> None:
        """Drop its decoded tiles."""
        cache.shared().drop(lambda key: key[0] == self._serial)  # type: ignore[index]


class MemmapLevel:
    """A level whose pixels lie in a file as they are, an array of `shape` at `offset`.

    `order` are the axes of rows and columns; the others together are the channels. The file is mapped only while a
    window is copied: pages of a lasting map would count as memory of this process.
    """

    def __init__(
        self, path: str, dtype: np.dtype, offset: int, shape: Sequence[int], order: tuple[int, int], layout: str = "C"
    ):
        self._map = {"filename": path, "dtype": dtype, "offset": offset, "shape": tuple(shape), "order": layout}
        self._axes = (*order, *(axis for axis in range(len(shape)) if axis not in order))
        rows, columns, *rest = (shape[axis] for axis in self._axes)
        self.shape = (rows, columns, int(np.prod(rest, dtype=np.int64)))
        self.dtype = np.dtype(dtype).newbyteorder("=")
        self.tile = (1, columns) if layout == "C" else (rows, 1)

    def window(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """Pixels (height, width, channels), copied from the file."""
        with readable(str(self._map["filename"])):
            whole = np.memmap(mode="r", **self._map).transpose(self._axes)  # type: ignore[call-overload]
        part = np.array(whole[top : top + height, left : left + width], dtype=self.dtype, order="C", subok=False)
        return part.reshape(height, width, self.shape[2])

    def forget(self) -> None:
        """Nothing is kept."""


@dataclass(frozen=True)
class ConvertedLevel:
    """A level whose windows go through `change`, which leaves rows and columns as they are."""

    level: Level
    change: Callable[[np.ndarray], np.ndarray]
    dtype: np.dtype
    channels: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows, columns, channels."""
        return (*self.level.shape[:2], self.channels)

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns that are read at once, at the least."""
        return self.level.tile

    def window(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """Pixels (height, width, channels)."""
        return self.change(self.level.window(top, left, height, width))

    def forget(self) -> None:
        """Drop the decoded pixels of the level itself."""
        self.level.forget()


RETILE = "store it in small tiles: fitformer.data.readers.to_tiled_tiff(FILE, 'tiled.tif')"
_KEPT = ("uint8", "uint16", "float32")
_EXACT = {"int8": "float32", "int16": "float32", "float16": "float32", "float64": "float32"}


def as_pixels(level: Level, path: str) -> Level:
    """The level as uint8, uint16 or float32; bits become 0 and 255, small signed numbers and other floats float32.

    Raises:
        InputError: numbers that float32 does not hold.
    """
    kind = level.dtype.name
    if kind in _KEPT:
        return level
    if kind == "bool":
        byte = np.dtype(np.uint8)
        return ConvertedLevel(level, lambda bits: bits.astype(byte) * byte.type(255), byte, level.shape[2])
    if kind in _EXACT:
        dtype = np.dtype(_EXACT[kind])
        return ConvertedLevel(level, lambda pixels: pixels.astype(dtype), dtype, level.shape[2])
    raise InputError(
        f"{path} has pixels of type {kind}; what can be read are uint8, uint16 and float32 (and bool, int8, int16, "
        f"float16 and float64, which are converted): store it as one of these"
    )


def weigh_tiles(path: str, kind: str, needed: int, most_bytes: float) -> None:
    """Warn of tiles that fill the cache one by one.

    Raises:
        InputError: a tile has more than `most_bytes`.
    """
    cost = f"{path} is stored in {kind}, each {needed / 2**30:.1f} GiB when read, and any window needs at least one"
    if needed > most_bytes:
        raise InputError(f"{cost}; {most_bytes / 2**30:.1f} GiB is the most; {RETILE}")
    if needed > cache.MOST_BYTES:
        warnings.warn(f"{cost}; {RETILE}", stacklevel=2)


def blocks(level: Pixels, pixels: int = 2**20) -> Iterator[Window]:
    """Windows of about so many pixels that cover an image, in whole tiles: every tile is decoded once."""
    rows, columns, _ = level.shape
    height, width = level.tile
    width = min(columns, width * max(1, 1024 // width))
    height = min(rows, height * max(1, pixels // (width * height)))
    for top in range(0, rows, height):
        for left in range(0, columns, width):
            yield top, left, min(height, rows - top), min(width, columns - left)
