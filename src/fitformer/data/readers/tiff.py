"""TIFF in all its kinds (tiled, striped, Big, OME, GeoTIFF, pyramids) through tifffile and imagecodecs.

Only the tiles or strips that a window touches are read and decoded; uncompressed strips are mapped, not decoded.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from math import ceil
from typing import Any

import numpy as np

from fitformer.data.readers.axes import named
from fitformer.data.readers.errors import readable
from fitformer.data.readers.levels import ConvertedLevel, Level, MemmapLevel, OpenImage, Tiles, weigh_tiles
from fitformer.errors import InputError, require

# Values of the tag Compression, and of PhotometricInterpretation.
_JPEG = {6, 7, 33007, 34892}
_GREY_FROM_WHITE, _PALETTE, _YCBCR = 0, 3, 6
_COLOURS = {5: "CMYK", 8: "CIELab", 9: "ICCLab", 10: "ITULab", 32803: "raw camera"}
_SILENT = logging.NullHandler()


def open_tiff(path: str, most_bytes: float) -> OpenImage:
    """Open the first image of a file and the reductions of it that the file holds.

    Raises:
        InputError: no TIFF, a truncated one, one compressed in a way unknown here or in tiles of more than
            `most_bytes`, or no image of rows and columns.
    """
    tifffile = require("tifffile", extra="gigapixel")
    # Faults of a file become one error; without a handler, tifffile would print its log as well.
    logging.getLogger("tifffile").addHandler(_SILENT)
    levels: list[Level] = []
    with readable(path), tifffile.TiffFile(path) as file:
        if not file.series:
            raise InputError(f"{path} holds no image")
        for series in _pyramid(file.series):
            try:
                with readable(path):
                    levels.append(_level(path, series, most_bytes))
            except InputError:
                # Reductions are a convenience: the image itself serves in place of a broken one.
                if not levels:
                    raise
    return OpenImage(levels)


def _pyramid(series: Sequence[Any]) -> Iterator[Any]:
    """The first image and its reductions: those that tifffile found, else smaller images of the same aspect."""
    first = series[0]
    if len(first.levels) > 1:
        yield from first.levels
        return
    yield first
    for other in series[1:]:
        if other.dtype == first.dtype and _reduces(_sizes(other), _sizes(first)):
            yield other


def _sizes(series: Any) -> dict[str, int]:
    return dict(zip(series.get_axes(squeeze=False), series.get_shape(squeeze=False), strict=True))


def _reduces(small: dict[str, int], large: dict[str, int]) -> bool:
    if small.keys() != large.keys() or any(small[axis] != large[axis] for axis in small if axis not in "YX"):
        return False
    factors = [large[axis] / small[axis] for axis in "YX"]
    # Sides that do not divide were rounded.
    return min(factors) > 1.5 and all(abs(large[a] / max(factors) - small[a]) < 1 for a in "YX")


def _level(path: str, series: Any, most_bytes: float) -> Level:
    shape, axes = series.get_shape(squeeze=False), series.get_axes(squeeze=False)
    order = named(axes, shape, path)
    if series.keyframe.dtype is None:
        bits, kind = series.keyframe.bitspersample, series.keyframe.sampleformat
        raise InputError(f"{path} has {bits} bits a sample of kind {kind}: uint8, uint16 and float32 can be read")
    if series.dataoffset is not None and series.keyframe.is_contiguous:
        dtype = np.dtype(series.keyframe.parent.byteorder + series.dtype.char)
        _need_bytes(path, series.dataoffset + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)
        return _in_colour(path, MemmapLevel(path, dtype, series.dataoffset, shape, order), series.keyframe)
    channels = int(np.prod(shape, dtype=np.int64)) // (shape[order[0]] * shape[order[1]])
    pages = series.pages[:]
    if any(page is None or page.parent.filehandle.name != series.parent.filehandle.name for page in pages):
        raise InputError(f"{path} is one of several files that make one image together: join them in one file")
    if len(pages) * series.keyframe.samplesperpixel != channels:
        has = len(pages) * series.keyframe.samplesperpixel
        raise InputError(f"{path} says that it has {channels} channels and holds {has}: it is not whole")
    decoder = _Decoder(path, pages, channels)
    decoder.check(most_bytes)
    return _in_colour(path, Tiles(decoder.shape, series.dtype, decoder.tile, decoder.decode), series.keyframe)


def _need_bytes(path: str, needed: int) -> None:
    there = os.path.getsize(path)
    if there < needed:
        raise InputError(f"{path} is truncated: its pixels end at byte {needed:,} and the file at byte {there:,}")


class _Decoder:
    """Decodes tiles (or strips) of the pages that together hold the channels of an image.

    It opens the file for every tile, so that thousands of images may be open, in any number of threads and processes.
    """

    def __init__(self, path: str, pages: Sequence[Any], channels: int):
        self.path, self.pages, self.key = path, pages, pages[0].keyframe
        key = self.key
        self.shape = (key.imagelength, key.imagewidth, channels)
        self.tile = (key.tilelength, key.tilewidth) if key.is_tiled else (key.rowsperstrip, key.imagewidth)
        self.tile = min(self.tile[0], self.shape[0]), self.tile[1]
        self.across = ceil(self.shape[1] / self.tile[1])
        self.planes = key.samplesperpixel if key.planarconfig == 2 else 1
        # tifffile reads these from the file when first asked, which is closed soon.
        self._decode, self._nothing = key.decode, key.nodata
        self._header = {"jpegheader": key.jpegheader} if key.compression in _JPEG else {}

    def check(self, most_bytes: float) -> None:
        """Raise InputError if its tiles cannot all be decoded, as far as can be told before."""
        _need_codec(self.path, self.key)
        if self.key.imagedepth > 1:
            raise InputError(
                f"{self.path} has {self.key.imagedepth} planes of depth: store the plane to read by itself"
            )
        count = ceil(self.shape[0] / self.tile[0]) * self.across * self.planes
        for page in self.pages:
            if min(len(page.dataoffsets), len(page.databytecounts)) < count:
                has = min(len(page.dataoffsets), len(page.databytecounts))
                raise InputError(
                    f"{self.path} lists {has} of the {count} tiles or strips of its image: it is not whole"
                )
            _need_bytes(self.path, int(np.add(page.dataoffsets, page.databytecounts).max()))
        self._weigh(most_bytes)

    def _weigh(self, most_bytes: float) -> None:
        down, across = self.tile
        kind = f"tiles of {down:,} x {across:,} pixels" if self.key.is_tiled else f"compressed strips of {down:,} rows"
        weigh_tiles(self.path, kind, down * across * self.shape[2] * self.key.dtype.itemsize, most_bytes)

    def decode(self, row: int, column: int) -> np.ndarray:
        """One tile (rows, columns, channels), edge tiles perhaps with their padding."""
        where = f"{self.path}: the tile at row {row * self.tile[0]:,}, column {column * self.tile[1]:,}"
        down = ceil(self.shape[0] / self.tile[0])
        with readable(where):
            index = row * self.across + column
            parts = [
                self._segment(page, index + plane * down * self.across)
                for page in self.pages
                for plane in range(self.planes)
            ]
            return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)

    def _segment(self, page: Any, index: int) -> np.ndarray:
        offset, count = page.dataoffsets[index], page.databytecounts[index]
        tables = self._header and {"jpegtables": page.jpegtables, **self._header}
        pixels, _, shape = self._decode(_read(self.path, offset, count) if count else None, index, **tables)
        if pixels is None:
            # Writers of sparse files leave out tiles without anything in them.
            return np.full(shape[1:], self._nothing, self.key.dtype)
        return pixels[0]


def _read(path: str, offset: int, count: int) -> bytes:
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        return file.read(count)


def _need_codec(path: str, page: Any) -> None:
    if page.compression == 1:
        return
    codecs = require("imagecodecs", extra="gigapixel")
    tiff = require("tifffile", extra="gigapixel").TIFF
    name = getattr(page.compression, "name", page.compression)
    try:
        tiff.DECOMPRESSORS[page.compression]
    except KeyError:
        raise InputError(
            f"{path} is compressed with {name}, which imagecodecs {codecs.__version__} cannot decode; store it with "
            f"deflate, zstd, LZW or JPEG"
        ) from None


def _in_colour(path: str, level: Level, page: Any) -> Level:
    """The level as grey from black or as RGB, whatever way the page stores them."""
    kind, channels = page.photometric, level.shape[2]
    if kind in _COLOURS or (kind == _YCBCR and page.compression not in _JPEG):
        name = _COLOURS.get(kind, "YCbCr")
        raise InputError(f"{path} stores its colours as {name}, and grey, RGB and JPEG can be read: convert it")
    if kind == _GREY_FROM_WHITE and level.dtype.kind in "ub":
        return ConvertedLevel(level, np.invert, level.dtype, channels)
    if kind == _PALETTE and page.colormap is not None:
        table = np.ascontiguousarray((np.asarray(page.colormap) >> 8).astype(np.uint8).T)
        return ConvertedLevel(level, lambda indices: table[indices[..., 0]], table.dtype, 3)
    return level
