"""Which levels of an image's channels are background: named, given, or found in the image itself."""

import numpy as np

from fitformer.data.readers.levels import Pixels
from fitformer.errors import InputError

Background = str | float | tuple[float, ...]
"""`white`, `black`, `auto`, one level for all channels, or one for each."""

# Of `auto`: sampled windows along a side, and pixels along a window's side.
_WINDOWS, _SIDE = 16, 16
# Bins of a channel's range, in which pixels of about the same colour are counted.
_PARTS = 32
# Reach of noise around the colour: deviations, and at least this share of the range.
_DEVIATIONS, _LEAST = 6.0, 2 / 255


def band_of(image: Pixels, background: Background, tolerance: float, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and highest level (channels,) that is background, in the type of integer pixels.

    Raises:
        InputError: an unknown background, or a number of levels that is not that of the channels of `name`.
    """
    top = float(np.iinfo(image.dtype).max) if image.dtype.kind == "u" else 1.0
    if background == "auto":
        levels, reach = _found(_sample(image), tolerance, top if image.dtype.kind == "u" else None)
    else:
        levels, reach = _given(background, image.shape[2], top, name), np.full(image.shape[2], tolerance * top)
    lowest, highest = levels - reach, levels + reach
    if image.dtype.kind == "u":
        # Compared as they are, the pixels need no conversion.
        lowest, highest = (np.clip(edge, 0, top).astype(image.dtype) for edge in (np.ceil(lowest), np.floor(highest)))
    return lowest, highest


def _given(background: Background, channels: int, top: float, name: str) -> np.ndarray:
    named = {"white": top, "black": 0.0}
    if isinstance(background, str) and background not in named:
        raise InputError(
            f"background is {background!r}: choose white, black, auto, a number, or a number for each channel"
        )
    levels = np.atleast_1d(np.asarray(named[background] if isinstance(background, str) else background, dtype=float))
    if levels.shape not in ((1,), (channels,)):
        raise InputError(f"background has {levels.size} levels, and {name} has {channels} channels")
    return np.broadcast_to(levels, channels)


def has_no_data(pixels: np.ndarray, nodata: np.ndarray) -> np.ndarray:
    """Whether all channels of pixels (..., channels) are at the level that means no data; NaN equals NaN."""
    return np.asarray(((pixels == nodata) | ((pixels != pixels) & (nodata != nodata))).all(axis=-1))


def _sample(image: Pixels) -> np.ndarray:
    """Pixels (k, channels) with data, of small windows that are spread evenly over the image."""
    rows, columns, channels = image.shape
    coords = (np.unique(np.linspace(0, side - min(side, _SIDE), _WINDOWS).astype(int)) for side in (rows, columns))
    tops, lefts = (each.tolist() for each in coords)
    high, wide = min(rows, _SIDE), min(columns, _SIDE)
    windows = [image.window(top, left, high, wide).reshape(-1, channels) for top in tops for left in lefts]
    pixels = np.concatenate(windows)
    nodata = getattr(image, "nodata", None)
    return (pixels if nodata is None else pixels[~has_no_data(pixels, nodata)]).astype(np.float64)


def _found(pixels: np.ndarray, tolerance: float, top: float | None) -> tuple[np.ndarray, np.ndarray]:
    """The commonest colour of pixels (k, channels), and the reach (channels,) of noise around it.

    `tolerance` bounds the reach as a share of the range: up to `top`, or to the largest of floats.
    """
    pixels = pixels[np.isfinite(pixels).all(axis=1)]
    if not len(pixels):
        return np.zeros(pixels.shape[1]), np.zeros(pixels.shape[1])
    extent = np.abs(pixels).max(axis=0) if top is None else np.full(pixels.shape[1], top)
    part = np.where(extent > 0, extent, 1) / _PARTS
    parts, counts = np.unique((pixels // part).astype(np.int64), axis=0, return_counts=True)
    middle = (parts[counts.argmax()] + 0.5) * part
    near = pixels
    # The border of a bin may run through the colour: search again around the middle.
    for _ in range(3):
        around = (np.abs(pixels - middle) <= np.maximum(part, tolerance * extent / 2)).all(axis=1)
        if around.any():
            near = pixels[around]
        middle = np.median(near, axis=0)
    # A robust deviation. The median of integers may be half a level too low.
    deviation = 1.4826 * (np.median(np.abs(near - middle), axis=0) + (0 if top is None else 0.5))
    reach = np.maximum(_DEVIATIONS * deviation, _LEAST * extent)
    return middle, np.minimum(reach, tolerance * extent)
