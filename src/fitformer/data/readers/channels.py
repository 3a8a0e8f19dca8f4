"""Other numbers of channels: grey, colour, and colour with alpha, of pixels of any type."""

from dataclasses import replace
from functools import partial

import numpy as np

from fitformer.data.pixels import MODES, convert
from fitformer.data.readers.levels import ConvertedLevel, OpenImage
from fitformer.errors import InputError

# Of red, green and blue in grey (ITU-R 601-2), as Pillow has them.
_LUMA = np.array([19595, 38470, 7471]) / 65536


def with_channels(image: OpenImage, channels: int, path: str) -> OpenImage:
    """The image as grey (1), colour (3), or colour and alpha (4); alpha that is dropped shows white behind it.

    Raises:
        InputError: it has 2 channels or more than 4, or these are asked for.
    """
    found = image.levels[0].shape[2]
    if found == channels:
        return image
    if not {found, channels} <= MODES.keys():
        raise InputError(
            f"{path} has {found} channels and {channels} are asked for: only 1 (grey), 3 (colour) and 4 (colour and "
            "alpha) are converted into each other"
        )
    change = partial(_converted, channels=channels)
    levels = [ConvertedLevel(level, change, level.dtype, channels) for level in image.levels]
    nodata = None if image.nodata is None else change(image.nodata[None, None])[0, 0]
    return replace(image, levels=levels, nodata=nodata)


def _converted(pixels: np.ndarray, channels: int) -> np.ndarray:
    if pixels.dtype == np.uint8:
        return convert(pixels, channels)
    whole = np.iinfo(pixels.dtype).max if pixels.dtype.kind == "u" else 1.0
    floats = pixels.astype(np.float64)
    colours, alpha = floats[..., :3], floats[..., 3:]
    if channels != 4 and alpha.size:
        colours = colours * (alpha / whole) + whole - alpha
    if channels == 1:
        colours = colours @ _LUMA[:, None]
    elif colours.shape[2] == 1:
        colours = np.repeat(colours, 3, axis=2)
    if channels == 4:
        colours = np.concatenate([colours, np.full_like(colours[..., :1], whole)], axis=2)
    return (np.rint(colours) if pixels.dtype.kind == "u" else colours).astype(pixels.dtype)
