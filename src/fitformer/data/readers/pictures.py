"""Ordinary pictures (PNG, JPEG, ...) through Pillow, which decodes them only as a whole."""

import io
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image, ImageFile

from fitformer.data.pixels import MODES
from fitformer.data.readers.errors import readable
from fitformer.data.readers.levels import ConvertedLevel, Level, OpenImage, OpenOptions, Tiles, stretched, upright
from fitformer.errors import InputError, MissingDependencyError, require

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
# Icons and cursors, which Pillow decodes when it opens them, whatever the size of the picture inside.
_ICONS, _ICON_PIXELS = (b"\0\0\1\0", b"\0\0\2\0", b"icns"), 2**22
# The start of a JPEG 2000 codestream and its size segment, and where that says how many bits the first channel has.
_CODESTREAM, _BITS_AT = b"\xff\x4f\xff\x51", 42
_limit = threading.Lock()


@contextmanager
def _opened(path: str, content: bytes | None) -> Iterator[ImageFile.ImageFile]:
    """A picture, without Pillow's limit on pixels, which is global to the process: here is one of bytes instead."""
    icon = _head(path, content, 4) in _ICONS
    with _limit, warnings.catch_warnings() if icon else nullcontext():
        if icon:
            # That its directory says another size; Pillow takes that of the picture inside.
            warnings.simplefilter("ignore")
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, _ICON_PIXELS if icon else None
        try:
            image = Image.open(path if content is None else io.BytesIO(content))
        finally:
            Image.MAX_IMAGE_PIXELS = before
    with image:
        yield image


@dataclass(frozen=True)
class _Picture:
    """What the header of a picture says.

    Attributes:
        path, content: its file, or its bytes, of which the path is then only a name.
        mode: of Pillow, in which its pixels are handed out; `I;16` for all greys of more than 8 bits.
        shape, dtype: of the pixels as they are stored: rows, columns, channels.
    """

    path: str
    content: bytes | None
    mode: str
    shape: tuple[int, int, int]
    dtype: np.dtype


def open_picture(path: str, options: OpenOptions, content: bytes | None = None) -> OpenImage:
    """Open a picture by its header; all of it is decoded at the first window, and kept while the cache holds it.

    Colours of 16 bits are decoded by imagecodecs where it is installed, because Pillow keeps 8 bits of them. With
    `content`, these are the bytes of the file, and `path` is its name.

    Raises:
        InputError: no picture, or one of more than `most_bytes` of the options when decoded.
    """
    with readable(path), _opened(path, content) as image:
        mode = "P" if options.palette_indices and image.mode in ("P", "PA") else _mode(image)
        dtype = np.dtype({"I;16": np.uint16, "I": np.int32, "F": np.float32}.get(mode, np.uint8))
        # The method of the base class: that of PNG decodes the pixels on the way. A TIFF Pillow turns by itself.
        turn = 1 if image.format == "TIFF" else Image.Image.getexif(image).get(_ORIENTATION, 1)
        columns, rows = image.size
        deep = _deep_colours(image, path, content) if mode in ("RGB", "RGBA") else None
        step = _grey_step(image) if options.palette_indices and mode == "L" else 1
    shape = (rows, columns, len(mode) if mode in MODES.values() else 1)
    picture = _Picture(path, content, mode, shape, dtype)
    decode = partial(_decoded, picture)
    if deep is not None:
        codec, bits = deep
        dtype, decode = np.dtype(np.uint16), partial(_deep_decoded, picture, codec)
    _weigh(path, shape, dtype, options.most_bytes)
    level: Level = Tiles(shape, dtype, (rows, columns), lambda row, column: decode())
    if deep is not None and bits < 16:
        level = ConvertedLevel(level, partial(stretched, most=2**bits - 1), dtype, shape[2])
    if step > 1:
        level = ConvertedLevel(level, lambda pixels: pixels // np.uint8(step), dtype, shape[2])
    return OpenImage([upright(level, turn)])


def _grey_step(image: ImageFile.ImageFile) -> int:
    """By how much Pillow multiplies grey of less than 8 bits, so that it fills 0 .. 255."""
    stored = {str(part[3] if isinstance(part[3], str) else part[3][0]) for part in image.tile if part[3]}
    return 255 if image.mode == "1" else {"L;2": 85, "L;4": 17}.get(next(iter(stored), ""), 1)


def is_picture(path: str) -> bool:
    """Whether Pillow knows a file by its header."""
    try:
        with _opened(path, None):
            return True
    except Exception:
        return False


def natural_channels(image: Image.Image) -> int:
    """Channels of an opened image as its file has them: 1 grey, 3 colour, 4 colour and alpha."""
    if image.mode in ("1", "L", "F") or image.mode.startswith("I"):
        return 1
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        return 4
    return 3


def cmyk_to_rgb(pixels: np.ndarray) -> np.ndarray:
    """Pixels (height, width, 3) of inks (height, width, 4), both uint8, without a colour profile."""
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels), "CMYK").convert("RGB"))


def _mode(image: Image.Image) -> str:
    if image.mode == "I":
        # Of PNG and PPM these are greys of 16 bits; of others, numbers whose range is not known.
        return "I;16" if image.format in ("PNG", "PPM") else "I"
    if image.mode.startswith("I;"):
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


def _decoded(picture: _Picture) -> np.ndarray:
    rows, columns, _ = picture.shape
    with readable(picture.path):
        pixels = np.empty(picture.shape, picture.dtype)
        with _opened(picture.path, picture.content) as image:
            Image.core.set_block_size(_BLOCK_BYTES)
            image.load()
            if image.size != (columns, rows):
                raise ValueError(
                    f"its header says {rows} x {columns} pixels, and it holds {image.height} x {image.width}"
                )
            # Band by band: of what numpy takes from Pillow, there are two more copies for a time.
            for top in range(0, rows, _BAND):
                bottom = min(top + _BAND, rows)
                band = image.crop((0, top, columns, bottom))
                as_it_is = picture.mode not in MODES.values() or band.mode == picture.mode
                part = np.asarray(band if as_it_is else band.convert(picture.mode))
                pixels[top:bottom] = part.reshape(bottom - top, columns, -1)[..., : picture.shape[2]]
        return pixels


Codec = Callable[[bytes], np.ndarray]


def _deep_colours(image: ImageFile.ImageFile, path: str, content: bytes | None) -> tuple[Codec, int] | None:
    """What decodes a picture whose colours have more than 8 bits, and how many they have; None where Pillow does."""
    name, bits = _deep_format(image, path, content)
    if bits <= 8:
        return None
    try:
        if name and "transparency" not in image.info:
            return getattr(require("imagecodecs", extra="gigapixel"), f"{name}_decode"), bits
    except MissingDependencyError:
        pass
    warnings.warn(f"{path} has {bits} bits a channel, of which Pillow keeps 8: TIFF keeps them all", stacklevel=4)
    return None


def _deep_format(image: ImageFile.ImageFile, path: str, content: bytes | None) -> tuple[str, int]:
    """The codec of a colour picture in imagecodecs ("" for none), and the bits of its first channel."""
    if image.format == "PNG":
        return "png", 16 if any(";16B" in str(part[3]) for part in image.tile) else 8
    if image.format == "JPEG2000":
        head = _head(path, content)
        start = head.find(_CODESTREAM)
        known = 0 <= start < len(head) - _BITS_AT
        return "jpeg2k", (head[start + _BITS_AT] & 0x7F) + 1 if known else 8
    if image.format == "PPM":
        # Pillow's decoder is told the largest number.
        most = max((part[3][-1] for part in image.tile if isinstance(part[3], tuple)), default=255)
        return "", int(most).bit_length()
    return "", 8


def _head(path: str, content: bytes | None, most: int = 2**16) -> bytes:
    if content is not None:
        return content[:most]
    with open(path, "rb") as file:
        return file.read(most)


def _deep_decoded(picture: _Picture, codec: Codec) -> np.ndarray:
    with readable(picture.path):
        content = picture.content
        if content is None:
            with open(picture.path, "rb") as file:
                content = file.read()
        pixels = codec(content)
        if pixels.ndim == 3 and pixels.shape[2] == 2 and picture.shape[2] == 4:
            pixels = pixels[..., [0, 0, 0, 1]]
        if pixels.shape != picture.shape or pixels.dtype != np.uint16:
            raise ValueError(
                f"its header says {picture.shape} of uint16, and it holds {pixels.shape} of {pixels.dtype}"
            )
        return pixels
