"""TIFF in all its kinds (tiled, striped, Big, OME, GeoTIFF, pyramids) through tifffile and imagecodecs.

Only the tiles or strips that a window touches are read and decoded; uncompressed strips are mapped, not decoded.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from functools import partial
from math import ceil
from typing import Any

import numpy as np

from fitformer.data.readers.axes import named
from fitformer.data.readers.errors import readable
from fitformer.data.readers.levels import (
    ConvertedLevel,
    Level,
    MemmapLevel,
    OpenImage,
    OpenOptions,
    Tiles,
    converted,
    stretched,
    upright,
    weigh_tiles,
)
from fitformer.data.readers.pictures import cmyk_to_rgb, open_picture
from fitformer.data.readers.resolution import of_tiff
from fitformer.errors import InputError, require

# Values of the tags Compression, PhotometricInterpretation, and ExtraSamples.
_OLD_JPEG, _JPEG = 6, {6, 7, 33007, 34892}
_GREY_FROM_WHITE, _RGB, _PALETTE, _YCBCR = 0, 2, 3, 6
_CMYK, _COLOURS = 5, {8: "CIELab", 9: "ICCLab", 10: "ITULab", 32803: "raw camera"}
_PREMULTIPLIED, _ALPHA = 1, (1, 2)
_ORIENTATION, _GDAL_NODATA = 274, 42113
MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""How a TIFF begins: little or big end first, classic or BigTIFF."""

_SILENT = logging.NullHandler()


def is_tiff(path: str) -> bool:
    """Whether a file begins as a TIFF does."""
    try:
        with open(path, "rb") as file:
            return file.read(4) in MAGIC
    except OSError:
        return False


def stores_rgb_bytes(path: str) -> bool:
    """Whether the first page of a TIFF is colour of 8 bits, as slides are; also if it cannot be told."""
    tifffile = require("tifffile", extra="gigapixel")
    try:
        with tifffile.TiffFile(path) as file:
            page = file.pages[0]
            return page.dtype == np.uint8 and page.photometric in (_RGB, _YCBCR)
    except Exception:
        # What is wrong with it, its reader says better.
        return True


def open_tiff(path: str, options: OpenOptions) -> OpenImage:
    """Open the first image of a file and the reductions of it that the file holds.

    Raises:
        InputError: no TIFF, a truncated one, one compressed in a way unknown here or in tiles of more than
            `most_bytes` of the options, or no image of rows and columns.
    """
    tifffile = require("tifffile", extra="gigapixel")
    # Faults of a file become one error; without a handler, tifffile would print its log as well.
    logging.getLogger("tifffile").addHandler(_SILENT)
    levels: list[Level] = []
    with readable(path), tifffile.TiffFile(path) as file:
        if not file.series:
            raise InputError(f"{path} holds no image")
        first = file.series[0].keyframe
        if first.compression == _OLD_JPEG:
            return _open_old_jpeg(path, options)
        for series in _pyramid(file.series):
            try:
                with readable(path):
                    level = _level(path, series, options)
            except InputError:
                # Reductions are a convenience: the image itself serves in place of a broken one.
                if not levels:
                    raise
                continue
            levels.append(upright(level, int(first.tags.valueof(_ORIENTATION, 1))))
        return OpenImage(levels, nodata=_nodata(first, levels[0]), microns_per_pixel=of_tiff(file, first))


def _open_old_jpeg(path: str, options: OpenOptions) -> OpenImage:
    """A TIFF of JPEG as TIFF 6.0 had it, as a whole: there, tiles are not always JPEG files by themselves.

    It is decoded at once, because many such files have faults that their header does not show.
    """
    image = open_picture(path, options)
    rows, columns, _ = image.levels[0].shape
    image.levels[0].window(0, 0, min(rows, 1), min(columns, 1))
    return image


def _nodata(page: Any, level: Level) -> np.ndarray | None:
    """The level (channels,) that GDAL's tag says has no data, as it is in the pixels of a level."""
    said = page.tags.valueof(_GDAL_NODATA)
    try:
        return None if said is None else converted(level, float(str(said).strip("\0 ").replace(",", ".")))
    except ValueError:
        return None


def _pyramid(series: Sequence[Any]) -> Iterator[Any]:
    """The first image and its reductions: those that are marked as such, or lie where a scanner puts them.

    A smaller page of the same aspect alone is no reduction: it may show something else.
    """
    first = series[0]
    yield first
    known = list(first.levels[1:]) if first.kind not in ("generic", "shaped", "uniform") else []
    yield from known
    for other in [*first.levels[1:], *series[1:]]:
        marked = (other.keyframe.is_reduced or other.keyframe.is_subifd) and not other.keyframe.is_mask
        if not known and marked and other.dtype == first.dtype and _reduces(_sizes(other), _sizes(first)):
            yield other


def _sizes(series: Any) -> dict[str, int]:
    return dict(zip(series.get_axes(squeeze=False), series.get_shape(squeeze=False), strict=True))


def _reduces(small: dict[str, int], large: dict[str, int]) -> bool:
    if small.keys() != large.keys() or any(small[axis] != large[axis] for axis in small if axis not in "YX"):
        return False
    factors = [large[axis] / small[axis] for axis in "YX"]
    # Sides that do not divide were rounded.
    return min(factors) > 1.5 and all(abs(large[a] / max(factors) - small[a]) < 1 for a in "YX")


def _level(path: str, series: Any, options: OpenOptions) -> Level:
    shape, axes = series.get_shape(squeeze=False), series.get_axes(squeeze=False)
    order = named(axes, shape, path)
    if series.keyframe.dtype is None:
        bits, kind = series.keyframe.bitspersample, series.keyframe.sampleformat
        raise InputError(f"{path} has {bits} bits a sample of kind {kind}: uint8, uint16 and float32 can be read")
    if series.dataoffset is not None and series.keyframe.is_contiguous:
        dtype = np.dtype(series.keyframe.parent.byteorder + series.dtype.char)
        _need_bytes(path, series.dataoffset + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)
        return _as_seen(path, MemmapLevel(path, dtype, series.dataoffset, shape, order), series.keyframe, options)
    channels = int(np.prod(shape, dtype=np.int64)) // (shape[order[0]] * shape[order[1]])
    pages = series.pages[:]
    if any(page is None or page.parent.filehandle.name != series.parent.filehandle.name for page in pages):
        raise InputError(f"{path} is one of several files that make one image together: join them in one file")
    if len(pages) * series.keyframe.samplesperpixel != channels:
        has = len(pages) * series.keyframe.samplesperpixel
        raise InputError(f"{path} says that it has {channels} channels and holds {has}: it is not whole")
    decoder = _Decoder(path, pages, channels)
    decoder.check(options.most_bytes)
    tiles = Tiles(decoder.shape, series.dtype, decoder.tile, decoder.decode)
    return _as_seen(path, tiles, series.keyframe, options)


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
            offsets, sizes = (np.asarray(each[:count]) for each in (page.dataoffsets, page.databytecounts))
            if self.key.compression == 1:
                # Some writers count the rows that the last strip would have if the image went on.
                sizes = np.minimum(sizes, self._stored_bytes(count))
            _need_bytes(self.path, int((offsets + sizes).max()))
        self._weigh(most_bytes)

    def _stored_bytes(self, count: int) -> np.ndarray:
        """The bytes (count,) that uncompressed tiles or strips need."""
        samples = 1 if self.key.planarconfig == 2 else self.key.samplesperpixel
        bits = np.max(self.key.bitspersample)
        rows = np.full(count, self.key.tilelength if self.key.is_tiled else self.tile[0])
        if not self.key.is_tiled:
            strips = count // self.planes
            rows[strips - 1 :: strips] = self.shape[0] - (strips - 1) * self.tile[0]
        return np.asarray(rows * ceil(self.tile[1] * samples * bits / 8))

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


def _as_seen(path: str, level: Level, page: Any, options: OpenOptions) -> Level:
    """The level as grey from black or as RGB, over the whole range of its type, whatever way the page stores it.

    Grey of 2 bits has the levels 0, 85, 170, 255, and grey of 12 bits fills 16, as in other files. Alpha makes four
    channels of grey too, and its colours are not multiplied by it.
    """
    kind, channels = page.photometric, level.shape[2]
    if kind in _COLOURS or (kind == _YCBCR and page.compression not in _JPEG):
        name = _COLOURS.get(kind, "YCbCr")
        raise InputError(f"{path} stores its colours as {name}, and grey, RGB and JPEG can be read: convert it")
    if kind == _CMYK:
        if level.dtype != np.uint8 or channels != 4:
            raise InputError(f"{path} is CMYK of {channels} channels of {level.dtype}, and 4 of uint8 can be read")
        return ConvertedLevel(level, cmyk_to_rgb, level.dtype, 3)
    alpha = _has_alpha(page) and channels == page.samplesperpixel
    if kind == _PALETTE and page.colormap is not None:
        return _of_palette(path, level, page, alpha, options)
    if level.dtype.kind in "ub" and isinstance(page.bitspersample, int):
        most = 2**page.bitspersample - 1
        if kind == _GREY_FROM_WHITE:
            own = 1 if alpha else channels
            level = ConvertedLevel(level, partial(_inverted, most=most, channels=own), level.dtype, channels)
        stretches = level.dtype.kind == "u" and most < np.iinfo(level.dtype).max and level.dtype.itemsize <= 2
        if stretches and not options.palette_indices:
            level = ConvertedLevel(level, partial(stretched, most=most), level.dtype, channels)
        if alpha and level.dtype.itemsize <= 2:
            multiplied = page.extrasamples[-1] == _PREMULTIPLIED
            if level.dtype.kind == "u" and multiplied:
                level = ConvertedLevel(level, _unmultiplied, level.dtype, channels)
            if channels == 2:
                level = ConvertedLevel(level, lambda pixels: pixels[..., [0, 0, 0, 1]], level.dtype, 4)
    return level


def _has_alpha(page: Any) -> bool:
    """Whether the last of one or three colours and one more sample is alpha."""
    colours = 3 if page.photometric in (_RGB, _YCBCR) else 1
    extra = page.extrasamples
    return len(extra) == 1 and extra[0] in _ALPHA and page.samplesperpixel == colours + 1


def _inverted(pixels: np.ndarray, most: int, channels: int) -> np.ndarray:
    """Pixels whose first channels count from white, counted from black."""
    if pixels.dtype.kind == "b":
        return np.concatenate([~pixels[..., :channels], pixels[..., channels:]], axis=-1)
    grey = pixels.dtype.type(most) - pixels[..., :channels]
    return np.concatenate([grey, pixels[..., channels:]], axis=-1)


def _unmultiplied(pixels: np.ndarray) -> np.ndarray:
    """Pixels whose last channel is alpha and the others multiplied by it, undone; black where alpha is 0."""
    whole, alpha = np.iinfo(pixels.dtype).max, pixels[..., -1:].astype(np.uint64)
    colours = np.minimum(pixels[..., :-1].astype(np.uint64) * whole // np.maximum(alpha, 1), whole)
    return np.concatenate([colours.astype(pixels.dtype), pixels[..., -1:]], axis=-1)


def _of_palette(path: str, level: Level, page: Any, alpha: bool, options: OpenOptions) -> Level:
    """The colours of a palette, or the numbers in it if the options ask for these."""
    if options.palette_indices:
        dtype = np.dtype(np.uint8) if level.dtype == bool else level.dtype
        return ConvertedLevel(level, lambda pixels: pixels[..., :1].astype(dtype), dtype, 1)
    most = 2**page.bitspersample - 1
    table = np.ascontiguousarray(_eight_bits(np.asarray(page.colormap)).T)
    multiplied = alpha and page.extrasamples[-1] == _PREMULTIPLIED

    def looked_up(pixels: np.ndarray) -> np.ndarray:
        numbers = pixels[..., 0].astype(np.intp)
        if numbers.size and numbers.max() >= len(table):
            raise InputError(f"{path} has the colour {numbers.max()}, and its palette has {len(table)}: it is damaged")
        colours = table[numbers]
        if alpha:
            colours = np.concatenate(
                [colours, (pixels[..., 1:].astype(np.uint32) * 255 // most).astype(np.uint8)], axis=-1
            )
        return _unmultiplied(colours) if multiplied else colours

    return ConvertedLevel(level, looked_up, table.dtype, 4 if alpha else 3)


def _eight_bits(colours: np.ndarray) -> np.ndarray:
    """Colours of 16 bits as 8; some writers put 8 bits there to begin with, which libtiff takes as they are."""
    return (colours >> 8 if colours.max(initial=0) > 255 else colours).astype(np.uint8)
