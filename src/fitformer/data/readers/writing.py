"""Tiled TIFF files of any size, written tile by tile."""

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from math import ceil, inf
from typing import Any

import numpy as np

from fitformer._support.atomic_files import write_atomically
from fitformer.data.readers.lazy import LazyImage, open_image
from fitformer.data.settings import Colour
from fitformer.errors import InputError, require

Windows = Callable[[int, int, int, int], np.ndarray]
"""Pixels (height, width, channels) of the window (top, left, height, width)."""
Halved = Callable[[np.ndarray], np.ndarray]

COMPRESSIONS = {None: None, "deflate": "zlib", "zstd": "zstd", "lzw": "lzw", "jpeg": "jpeg"}
_SMALLEST = 512
# Of a classic TIFF, whose offsets have 32 bits; compression may make more of the worst pixels.
_CLASSIC_BYTES = 3 * 2**30
_BUFFER_BYTES = 2**24


def write_tiled_tiff(
    path: str | os.PathLike[str],
    shape: tuple[int, int, int],
    dtype: Any,
    source: Windows | Iterable[np.ndarray],
    *,
    tile: int = 512,
    compression: str | None = "deflate",
    pyramid: bool = False,
    palette: Sequence[Colour] = (),
    tags: Sequence[Any] = (),
) -> None:
    """Write an image (rows, columns, channels) of uint8, uint16 or float32 without ever holding more than a few tiles.

    `source` gives the pixels of windows, or is the tiles themselves, row by row, those at the edges smaller. `pyramid`
    adds reductions by 2, 4, ... as further pages until one fits in 512 x 512; meanwhile the folder holds up to a third
    of the image's bytes more. The file appears when it is whole.

    Pixels uint8 of one channel may be the numbers of a `palette` of red, green and blue, which have no average: a
    reduction takes one pixel of each four. `tags` are further ones of the first page, as tifffile takes them.

    Raises:
        InputError: a type, tile or compression that cannot be written, a palette for other pixels, or tiles of another
            shape or number.
    """
    kind = _checked(shape, dtype, tile, compression)
    if palette and (kind != np.uint8 or shape[2] != 1):
        raise InputError(f"a palette is for uint8 in 1 channel, and not {kind.name} in {shape[2]}: leave it out")
    tifffile = require("tifffile", extra="gigapixel")
    if compression is not None:
        require("imagecodecs", extra="gigapixel")
    halvings = _halvings(shape) if pyramid else 0
    big = int(np.prod(shape, dtype=np.int64)) * kind.itemsize * 4 // 3 > _CLASSIC_BYTES
    tiles = _cut(source, shape, tile) if callable(source) else _checked_tiles(source, shape, tile)
    with write_atomically(path) as scratch, ExitStack() as stack:
        writer = stack.enter_context(tifffile.TiffWriter(scratch, bigtiff=big))
        for step in range(halvings + 1):
            options = _options(shape, kind, tile, compression)
            options |= _coloured(palette) if palette else {}
            options |= {"extratags": tags} if tags and not step else {}
            # Pages marked as reductions, rather than SubIFDs, are what OpenSlide and GIS programs look for.
            options |= {"subfiletype": 1} if step else {}
            below = None
            if step < halvings:
                scratch_file = stack.enter_context(tempfile.TemporaryFile(dir=scratch.parent))
                below = _Halves(shape, kind, tile, scratch_file, _first if palette else _halved)
                tiles = below.passing(tiles)
            writer.write((_flat(each.astype(kind, copy=False)) for each in tiles), **options)
            if below is not None:
                shape, tiles = below.shape, below.tiles()


def _checked(shape: tuple[int, int, int], dtype: Any, tile: int, compression: str | None) -> np.dtype:
    kind = np.dtype(dtype)
    if kind.name not in ("uint8", "uint16", "float32"):
        raise InputError(f"pixels of type {kind.name} cannot be written: use uint8, uint16 or float32")
    if len(shape) != 3 or min(shape) < 1:
        raise InputError(f"an image has rows, columns and channels, each at least 1, and not the shape {tuple(shape)}")
    if tile < 16 or tile % 16:
        raise InputError(f"tiles of {tile} pixels: the sides of TIFF tiles are multiples of 16")
    if compression not in COMPRESSIONS:
        known = ", ".join(str(name) for name in COMPRESSIONS)
        raise InputError(f"there is no compression {compression!r} here: choose {known}")
    if compression == "jpeg" and (kind != np.uint8 or shape[2] not in (1, 3)):
        raise InputError(f"JPEG holds uint8 in 1 or 3 channels, and not {kind.name} in {shape[2]}: choose deflate")
    return kind


def _options(shape: tuple[int, int, int], kind: np.dtype, tile: int, compression: str | None) -> dict[str, Any]:
    colour = shape[2] in (3, 4) and kind.kind == "u"
    options: dict[str, Any] = {
        "shape": _flat_shape(shape),
        "dtype": kind,
        "tile": (tile, tile),
        "photometric": "rgb" if colour else "minisblack",
        "compression": COMPRESSIONS[compression],
        "buffersize": _BUFFER_BYTES,
        "metadata": None,
    }
    if shape[2] > 1:
        options["planarconfig"] = "contig"
    if colour and shape[2] == 4:
        options["extrasamples"] = ["unassalpha"]
    # Differences of neighbours compress better than pixels do; of floats that is another predictor, seldom read.
    if compression in ("deflate", "zstd", "lzw") and kind.kind == "u":
        options["predictor"] = True
    return options


def _coloured(palette: Sequence[Colour]) -> dict[str, Any]:
    """Options of pixels that are numbers of a palette."""
    table = np.zeros((3, 256), np.uint16)
    table[:, : len(palette)] = np.array(palette, np.uint16).T * 257
    # The predictor is for levels: numbers are no nearer to one another than any.
    return {"photometric": "palette", "colormap": table, "predictor": None}


def _flat_shape(shape: tuple[int, int, int]) -> tuple[int, ...]:
    return shape[:2] if shape[2] == 1 else shape


def _flat(pixels: np.ndarray) -> np.ndarray:
    return pixels[..., 0] if pixels.shape[2] == 1 else pixels


def _halvings(shape: tuple[int, int, int]) -> int:
    return max(0, ceil(np.log2(max(shape[:2]) / _SMALLEST)))


def _places(shape: tuple[int, int, int], tile: int) -> Iterator[tuple[int, int, int, int]]:
    """Windows of the tiles, row by row."""
    for top in range(0, shape[0], tile):
        for left in range(0, shape[1], tile):
            yield top, left, min(tile, shape[0] - top), min(tile, shape[1] - left)


def _cut(source: Windows, shape: tuple[int, int, int], tile: int) -> Iterator[np.ndarray]:
    return _checked_tiles((source(*place) for place in _places(shape, tile)), shape, tile)


def _checked_tiles(tiles: Iterable[np.ndarray], shape: tuple[int, int, int], tile: int) -> Iterator[np.ndarray]:
    found = iter(tiles)
    for count, (top, left, height, width) in enumerate(_places(shape, tile)):
        each = next(found, None)
        if each is None:
            needed = ceil(shape[0] / tile) * ceil(shape[1] / tile)
            raise InputError(f"{count} tiles were given for an image of {needed} tiles of {tile} pixels")
        if each.shape != (height, width, shape[2]):
            raise InputError(
                f"the tile at row {top}, column {left} has the shape {each.shape} and not {(height, width, shape[2])}"
            )
        yield each


class _Halves:
    """The tiles of an image at half its size, kept in a file while the tiles of the whole pass by."""

    def __init__(self, shape: tuple[int, int, int], kind: np.dtype, tile: int, file: Any, halved: Halved):
        self.shape = ((shape[0] + 1) // 2, (shape[1] + 1) // 2, shape[2])
        self.across = ceil(shape[1] / tile)
        self._block, self._tile, self._kind, self._file = (tile // 2, tile // 2, shape[2]), tile, kind, file
        self._halved = halved

    def passing(self, tiles: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """The tiles of the whole as they are, each halved into a block of the file on its way."""
        for each in tiles:
            block = np.zeros(self._block, self._kind)
            small = self._halved(each)
            block[: small.shape[0], : small.shape[1]] = small
            self._file.write(block.tobytes())
            yield each

    def tiles(self) -> Iterator[np.ndarray]:
        """The tiles at half the size, of up to four blocks each."""
        for top, left, height, width in _places(self.shape, self._tile):
            out = np.empty((height, width, self.shape[2]), self._kind)
            for row in range(0, height, self._block[0]):
                for column in range(0, width, self._block[1]):
                    where = out[row : row + self._block[0], column : column + self._block[1]]
                    block = self._read((top + row) // self._block[0], (left + column) // self._block[1])
                    where[:] = block[: where.shape[0], : where.shape[1]]
            yield out

    def _read(self, row: int, column: int) -> np.ndarray:
        size = int(np.prod(self._block)) * self._kind.itemsize
        self._file.seek((row * self.across + column) * size)
        return np.frombuffer(self._file.read(size), self._kind).reshape(self._block)


def _first(pixels: np.ndarray) -> np.ndarray:
    """The first of 2 x 2 pixels."""
    return pixels[::2, ::2]


def _halved(pixels: np.ndarray) -> np.ndarray:
    """Averages of 2 x 2 pixels; a last odd row or column counts twice."""
    height, width = pixels.shape[:2]
    even = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    parts = [even[row::2, column::2] for row in (0, 1) for column in (0, 1)]
    if pixels.dtype.kind == "u":
        return ((np.sum(parts, axis=0, dtype=np.uint32) + 2) // 4).astype(pixels.dtype)
    return np.asarray(parts, np.float32).mean(axis=0)


def to_tiled_tiff(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    tile: int = 512,
    compression: str | None = "deflate",
    pyramid: bool = True,
) -> None:
    """Convert an image file to a tiled TIFF, whose windows are read alone.

    A PNG or JPEG, or a TIFF in one compressed strip, is decoded as a whole for it, however large that is.

    Raises:
        InputError: the image cannot be read, or its type not be written with that compression.
    """
    with open_image(source, most_bytes=inf) as image:
        tiles = _of_bands(image, tile)
        write_tiled_tiff(path, image.shape, image.dtype, tiles, tile=tile, compression=compression, pyramid=pyramid)


def _of_bands(image: LazyImage, tile: int) -> Iterator[np.ndarray]:
    """The tiles of an image, from bands as wide as it is: tile by tile, wide strips might be decoded over and over."""
    rows, columns, _ = image.shape
    for top in range(0, rows, tile):
        band = image.window(top, 0, min(tile, rows - top), columns)
        for left in range(0, columns, tile):
            yield band[:, left : left + tile]
