"""Image files as pixels (H, W, ch) uint8 in memory, by the readers of `fitformer.data.readers`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from tempfile import NamedTemporaryFile

import numpy as np
from PIL import Image

from fitformer.data.pixels import convert
from fitformer.data.readers.errors import MACHINE
from fitformer.data.readers.lazy import open_levels
from fitformer.data.readers.levels import WHOLE_BYTES, Level, OpenOptions
from fitformer.data.readers.tiff import MAGIC
from fitformer.errors import InputError, MissingDependencyError

# What Pillow can name but not decode by itself, or takes for documents rather than pictures.
_NOT_PICTURES = {".h5", ".hdf", ".grib", ".bufr", ".mpg", ".mpeg", ".wmf", ".emf", ".eps", ".ps", ".pdf", ".fits"}

File = str | os.PathLike[str] | bytes | np.ndarray
"""A path, the contents of an image file, or pixels (H, W) or (H, W, ch)."""


class UnreadableImageError(Exception):
    """A file that is missing or cannot be decoded; the message names it and says why."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def suffixes() -> frozenset[str]:
    """The file name endings, lower case, that are taken for images."""
    known = Image.registered_extensions().items()
    return frozenset(suffix for suffix, kind in known if kind in Image.OPEN) - _NOT_PICTURES


def header_channels(file: File, name: str, pixel_range: tuple[float, float] | None = None) -> int:
    """Channels of an image from its header alone.

    Raises:
        UnreadableImageError: it is missing or no image.
    """
    with _opened(file, name, pixel_range) as level:
        return level.shape[2]


def decode(
    file: File, name: str, channels: int | None = None, pixel_range: tuple[float, float] | None = None
) -> np.ndarray:
    """Pixels (H, W, ch) uint8 of an image, turned upright, with `channels` or its own number of them.

    Sixteen bits are divided by 257, whatever the largest of them in this file; the numbers of a `pixel_range` become 0
    and 255.

    Raises:
        UnreadableImageError: it is missing, truncated, no image, of more than 1 GiB, of numbers without a range
            (floats, 32 bits) where none is given, or of 2 or more than 4 channels.
    """
    with _opened(file, name, pixel_range) as level:
        rows, columns, found = level.shape
        _check(level)
        pixels = level.window(0, 0, rows, columns)
    if pixels.dtype == np.uint16:
        pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return convert(pixels, channels or found)


def _check(level: Level) -> None:
    rows, columns, found = level.shape
    way = "or read images of any size, with data.image_size null"
    if level.dtype.kind == "f":
        raise InputError(
            "its pixels are floats or signed numbers, whose range the file does not tell: say which numbers are black "
            f"and white (data.pixel_range), convert it to uint8 or uint16, {way}"
        )
    if found not in (1, 3, 4):
        raise InputError(f"it has {found} channels, and images of one size have 1, 3 or 4: convert it, {way}")
    if (needed := prod(level.shape) * level.dtype.itemsize) > WHOLE_BYTES:
        raise InputError(
            f"its {rows:,} x {columns:,} pixels are {needed / 2**30:.1f} GiB, and {WHOLE_BYTES / 2**30:.1f} GiB is the "
            f"most that is read at once: make it smaller, {way}"
        )


@contextmanager
def _opened(file: File, name: str, pixel_range: tuple[float, float] | None = None) -> Iterator[Level]:
    """The full size of an image, open."""
    options = OpenOptions(pixel_range=pixel_range)
    try:
        with _as_path(file) as path:
            image = open_levels(path, options) if isinstance(path, str) else open_levels(name, options, path)
            try:
                yield image.levels[0]
            finally:
                image.close()
    except MissingDependencyError:
        raise
    except (InputError, OSError) as error:
        if isinstance(error, OSError) and error.errno in MACHINE:
            raise
        raise UnreadableImageError(name, _reason(error, file)) from error


def _reason(error: Exception, file: File) -> str:
    """What is wrong, without the name of the file before it."""
    text = " ".join(str(error).split())
    if not isinstance(file, bytes | np.ndarray):
        if not os.path.exists(file):
            return "there is no such file"
        for path in (os.path.abspath(file), os.fspath(file)):
            text = text.removeprefix(f"{path} ").removeprefix(f"{path}: ")
    return text.removeprefix("cannot be read: ")


@contextmanager
def _as_path(file: File) -> Iterator[str | bytes | np.ndarray]:
    """A path; what is in memory as it is, but the bytes of a TIFF, whose reader wants a file."""
    if isinstance(file, np.ndarray):
        yield file
    elif not isinstance(file, bytes):
        yield os.path.abspath(os.path.expanduser(os.fspath(file)))
    elif not file.startswith(MAGIC):
        yield file
    else:
        with NamedTemporaryFile(suffix=".tif") as scratch:
            scratch.write(file)
            scratch.flush()
            yield scratch.name
