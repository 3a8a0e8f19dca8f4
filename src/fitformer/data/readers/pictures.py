"""Ordinary pictures (PNG, JPEG, ...) through Pillow, which decodes them only as a whole."""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps

from fitformer.data.pixels import MODES, natural_channels
from fitformer.data.readers.errors import readable
from fitformer.data.readers.levels import OpenImage, Tiles
from fitformer.errors import InputError

TO_TILES = (
    "convert it once to a tiled TIFF, of which only the windows asked for are decoded: "
    "fitformer.data.readers.to_tiled_tiff(FILE, 'tiled.tif'), or in less memory `vips tiffsave FILE tiled.tif --tile`"
)
_LARGE_BYTES = 2**28
_ORIENTATION = 0x0112
# Rows that go from Pillow to numpy at once.
_BAND = 256
# Of the blocks in which Pillow holds a picture. glibc gives back what is larger than 32 MiB; Pillow's usual 16 MiB stay
# with the thread that decoded them.
_BLOCK_BYTES = 2**26
_limit = threading.Lock()


@contextmanager
def _own_limit() -> Iterator[None]:
    """Without Pillow's limit on pixels, which is global to the process: here is one of bytes instead."""
    with _limit:
        before = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def open_picture(path: str, most_bytes: float) -> OpenImage:
    """Open a picture by its header; all of it is decoded at the first window, and kept while the cache holds it.

    Raises:
        InputError: no picture, or one of more than `most_bytes` decoded bytes.
    """
    with readable(path), _own_limit(), Image.open(path) as image:
        mode = _mode(image)
        dtype = np.dtype({"I;16": np.uint16, "F": np.float32}.get(mode, np.uint8))
        # The sides of a camera's picture that lies on its side change places when it is set upright.
        # (The method of the base class: that of PNG decodes the pixels on the way.)
        # A TIFF under another name is one that Pillow turns by itself.
        turn = 1 if image.format == "TIFF" else Image.Image.getexif(image).get(_ORIENTATION, 1)
        columns, rows = image.size[::-1] if turn >= 5 else image.size
        loses = dtype == np.uint8 and any(";16B" in str(part[3]) for part in image.tile)
    shape = (rows, columns, len(mode) if dtype == np.uint8 else 1)
    _weigh(path, shape, dtype, most_bytes)
    if loses:
        warnings.warn(f"{path} has 16 bits a channel, of which Pillow keeps 8: TIFF keeps them all", stacklevel=2)
    level = Tiles(shape, dtype, (rows, columns), lambda row, column: _decoded(path, mode, turn, shape, dtype))
    return OpenImage([level])


def _mode(image: Image.Image) -> str:
    """Pillow's mode for the pixels handed out: `I;16` for all greys of more than 8 bits."""
    if image.mode.startswith("I"):
        return "I;16"
    return "F" if image.mode == "F" else MODES[natural_channels(image)]


def _weigh(path: str, shape: tuple[int, int, int], dtype: np.dtype, most_bytes: float) -> None:
    rows, columns, channels = shape
    needed = rows * columns * channels * dtype.itemsize
    gib = f"{needed / 2**30:.1f} GiB"
    cost = f"{path}, {rows:,} x {columns:,} pixels, is in a format that is decoded only as a whole, {gib}"
    if needed > most_bytes:
        raise InputError(f"{cost}, and {most_bytes / 2**30:.1f} GiB is the most; {TO_TILES}")
    if needed > _LARGE_BYTES:
        warnings.warn(f"{cost} in every process that reads it; {TO_TILES}", stacklevel=2)


def _decoded(path: str, mode: str, turn: int, shape: tuple[int, int, int], dtype: np.dtype) -> np.ndarray:
    with readable(path):
        rows, columns, _ = shape
        pixels = np.empty(shape, dtype)
        with _own_limit():
            image = Image.open(path)
        with image:
            Image.core.set_block_size(_BLOCK_BYTES)
            image.load()
            if turn > 1:
                ImageOps.exif_transpose(image, in_place=True)
            # Band by band: of what numpy takes from Pillow, there are two more copies for a time.
            for top in range(0, rows, _BAND):
                bottom = min(top + _BAND, rows)
                band = image.crop((0, top, columns, bottom))
                part = np.asarray(band if dtype != np.uint8 or band.mode == mode else band.convert(mode))
                if part.dtype.kind == "i" and (part.min() < 0 or part.max() > 65535):
                    raise InputError(
                        f"{path} has pixels {part.min()} .. {part.max()}, and 0 .. 65535 is what can be read"
                    )
                pixels[top:bottom] = part.reshape(bottom - top, columns, -1)
        return pixels
