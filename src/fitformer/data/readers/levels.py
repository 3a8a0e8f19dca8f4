"""What a file backend yields: levels of an image, full size first, each read window by window.

A level is stored in tiles (`Tiles`), lies in the file as it is (`MemmapLevel`) or in memory (`ArrayLevel`), or is
another one with changed pixels (`ConvertedLevel`) or set upright (`TurnedLevel`).
"""

import itertools
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, prod
from typing import Protocol

import numpy as np

from fitformer.data.readers import cache
from fitformer.data.readers.errors import readable
from fitformer.data.settings import check_pixel_range
from fitformer.data.symmetry import IDENTITY, Symmetry, Window
from fitformer.errors import InputError

WHOLE_BYTES = 2**30
"""The most decoded bytes that may have to be held at once, unless the caller says otherwise: of a tile, or of a file
that decodes only as a whole."""

# By EXIF's and TIFF's tag Orientation: how the stored pixels are turned to stand upright.
_UPRIGHT = {
    2: Symmetry(backwards=(False, True)),
    3: Symmetry(backwards=(True, True)),
    4: Symmetry(backwards=(True, False)),
    5: Symmetry(transposed=True),
    6: Symmetry(transposed=True, backwards=(False, True)),
    7: Symmetry(transposed=True, backwards=(True, True)),
    8: Symmetry(transposed=True, backwards=(True, False)),
}


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
class OpenOptions:
    """How a file is read.

    Attributes:
        most_bytes: that may have to be decoded for one pixel: of a tile, or of the whole of a PNG or JPEG.
        pixel_range: the numbers that become black and white; the pixels are then uint16. None goes by their type.
        channels: 1 (grey), 3 (colour) or 4 (colour and alpha), to which the pixels are converted; None for the file's.
        palette_indices: pixels of a palette as their numbers in it, as in masks, not as its colours; and those of grey
            of less than 8 bits as the numbers that are stored, not stretched over 0 .. 255.
    """

    most_bytes: float = WHOLE_BYTES
    pixel_range: tuple[float, float] | None = None
    channels: int | None = None
    palette_indices: bool = False

    def __post_init__(self) -> None:
        check_pixel_range(self.pixel_range)


@dataclass(frozen=True)
class Placement:
    """Where an image of patches lies in its slide: pixel (row, column) is the square of `step` pixels of the slide.

    Attributes:
        top, left: upper left corner of pixel (0, 0), in pixels of the slide's level 0.
        step: the side of a pixel.
    """

    top: float
    left: float
    step: float


ITSELF = Placement(0, 0, 1)
"""Of an image that is in no other."""


@dataclass(frozen=True, eq=False)
class OpenImage:
    """An open file.

    Attributes:
        levels: full size first.
        release: closes it.
        nodata: the level (channels,) that means no data.
        presence: where the image has pixels, (rows, columns, 1) booleans; None if everywhere.
        placement: where it lies in a slide, of an image of patches.
        microns_per_pixel: the side of a pixel, if the file says it.
    """

    levels: Sequence[Level]
    release: Callable[[], None] = lambda: None
    nodata: np.ndarray | None = None
    presence: Pixels | None = None
    placement: Placement | None = None
    microns_per_pixel: float | None = None

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
        self._end = offset + prod(shape) * self.dtype.itemsize
        self.tile = (1, columns) if layout == "C" else (rows, 1)

    def window(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """Pixels (height, width, channels), copied from the file."""
        path = str(self._map["filename"])
        with readable(path):
            # A page of a map beyond the file's end would kill the process.
            if (there := os.path.getsize(path)) < self._end:
                raise InputError(f"{path} was cut off: its pixels end at byte {self._end:,} and it at byte {there:,}")
            whole = np.memmap(mode="r", **self._map).transpose(self._axes)  # type: ignore[call-overload]
        part = np.array(whole[top : top + height, left : left + width], dtype=self.dtype, order="C", subok=False)
        return part.reshape(height, width, self.shape[2])

    def forget(self) -> None:
        """Nothing is kept."""


class ArrayLevel:
    """An array (H, W) or (H, W, ch) in memory.

    Raises:
        InputError: another number of axes.
    """

    def __init__(self, pixels: np.ndarray):
        if pixels.ndim not in (2, 3):
            raise InputError(f"an image is an array (rows, columns) or (rows, columns, channels), not {pixels.shape}")
        self._pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        rows, columns, channels = self._pixels.shape
        self.shape, self.tile = (rows, columns, channels), (rows, columns)
        self.dtype = pixels.dtype.newbyteorder("=")

    def window(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """Pixels (height, width, channels), copied."""
        return np.array(self._pixels[top : top + height, left : left + width], dtype=self.dtype)

    def forget(self) -> None:
        """Nothing is kept beside the array."""


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

    def pixels_at(self, rows: np.ndarray, columns: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """As those of the level itself, if it has some in some places only."""
        for which, found in self.level.pixels_at(rows, columns):  # type: ignore[attr-defined]
            yield which, self.change(found[:, None])[:, 0]

    def forget(self) -> None:
        """Drop the decoded pixels of the level itself."""
        self.level.forget()


@dataclass(frozen=True)
class TurnedLevel:
    """A level, turned: only the windows asked for are read."""

    level: Level
    symmetry: Symmetry

    @property
    def dtype(self) -> np.dtype:
        """Of its pixels."""
        return self.level.dtype

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows, columns, channels."""
        rows, columns, channels = self.level.shape
        return (*self.symmetry.sides(rows, columns), channels)

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns that are read at once, at the least."""
        return self.symmetry.sides(*self.level.tile)

    def window(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """Pixels (height, width, channels)."""
        place = self.symmetry.origin((top, left, height, width), self.level.shape[:2])
        return np.array(self.symmetry.turn(self.level.window(*place)), order="C")

    def forget(self) -> None:
        """Drop the decoded pixels of the level itself."""
        self.level.forget()


def upright(level: Level, orientation: int) -> Level:
    """The level as its tag Orientation (of EXIF and TIFF) says that it stands; unknown values change nothing."""
    symmetry = _UPRIGHT.get(orientation, IDENTITY)
    return level if symmetry == IDENTITY else TurnedLevel(level, symmetry)


def converted(level: Level, value: float) -> np.ndarray | None:
    """What a number in the file becomes in the pixels of a level (channels,); None if its type does not hold it."""
    if isinstance(level, TurnedLevel):
        return converted(level.level, value)
    if isinstance(level, ConvertedLevel):
        before = converted(level.level, value)
        return None if before is None else level.change(before[None, None])[0, 0]
    with np.errstate(all="ignore"):
        stored = np.asarray(value).astype(level.dtype)
        same = bool(np.isnan(value)) if stored != stored else np.isclose(float(stored), value, rtol=1e-6, atol=0)
    return np.full(level.shape[2], stored) if same else None


def stretched(pixels: np.ndarray, most: int) -> np.ndarray:
    """Pixels 0 .. most over the whole range of their type."""
    whole = np.iinfo(pixels.dtype).max
    return ((pixels.astype(np.uint32) * whole + most // 2) // most).astype(pixels.dtype)


RETILE = "store it in small tiles: fitformer.data.readers.to_tiled_tiff(FILE, 'tiled.tif')"
_KEPT = ("uint8", "uint16", "float32")
# Become float32.
_EXACT = ("int8", "int16", "float16", "float64")


def as_pixels(
    image: OpenImage, path: str, pixel_range: tuple[float, float] | None = None, white: int = 255
) -> OpenImage:
    """The image as uint8, uint16 or float32; bits become 0 and `white`, small signed numbers and other floats float32.

    With a `pixel_range` all become uint16, which its ends and what lies beyond them fill. What has no data is NaN in
    floats and 0 in a `pixel_range`, where the least of the others is 1.

    Raises:
        InputError: numbers that float32 does not hold, without a `pixel_range`.
    """
    levels = [_as_pixels(level, path, pixel_range, image.nodata, white) for level in image.levels]
    nodata = image.nodata
    if nodata is not None and pixel_range is not None:
        nodata = np.zeros_like(nodata, dtype=np.uint16)
    elif nodata is not None and levels[0].dtype.kind == "f":
        nodata = np.full_like(nodata, np.nan, dtype=np.float32)
    return replace(image, levels=levels, nodata=nodata)


def _as_pixels(
    level: Level, path: str, pixel_range: tuple[float, float] | None, nodata: np.ndarray | None, white: int
) -> Level:
    kind, channels = level.dtype.name, level.shape[2]
    if pixel_range is not None and level.dtype.kind in "buif":
        low, high = pixel_range
        return ConvertedLevel(
            level, partial(_in_range, low=low, high=high, nodata=nodata), np.dtype(np.uint16), channels
        )
    if kind == "bool":
        byte = np.dtype(np.uint8)
        return ConvertedLevel(level, lambda bits: bits.astype(byte) * byte.type(white), byte, channels)
    if kind in _EXACT or (kind == "float32" and nodata is not None and not np.isnan(nodata).all()):
        return ConvertedLevel(level, partial(_as_floats, nodata=nodata), np.dtype(np.float32), channels)
    if kind in _KEPT:
        return level
    raise InputError(
        f"{path} has pixels of type {kind}, whose range the file does not tell: say which numbers are black and white "
        "(pixel_range), or convert it to uint8 or uint16, or to float32, bool, int8, int16, float16 or float64, which "
        "become float32"
    )


def _as_floats(pixels: np.ndarray, nodata: np.ndarray | None) -> np.ndarray:
    floats = pixels.astype(np.float32)
    if nodata is not None:
        floats[pixels == nodata] = np.nan
    return floats


def _in_range(pixels: np.ndarray, low: float, high: float, nodata: np.ndarray | None) -> np.ndarray:
    share = (pixels.astype(np.float64) - low) / (high - low)
    whole = np.rint(np.clip(share, 0, 1) * 65535)
    if nodata is not None:
        whole = np.where(pixels == nodata, 0, np.maximum(whole, 1))
    # What is not a number has no data either.
    return np.nan_to_num(whole).astype(np.uint16)


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
    """Windows of about so many pixels that cover an image, in whole tiles: every tile is decoded once.

    They are fewer of an image of more than four channels, as features of patches are.
    """
    rows, columns, channels = level.shape
    pixels = max(1, pixels * 4 // max(4, channels))
    height, width = level.tile
    width = min(columns, width * max(1, 1024 // width))
    height = min(rows, height * max(1, pixels // (width * height)))
    for top in range(0, rows, height):
        for left in range(0, columns, width):
            yield top, left, min(height, rows - top), min(width, columns - left)
