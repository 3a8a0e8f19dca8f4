"""Pixels (H, W, ch) uint8 in memory, brought to a size and channel count and moved about; Pillow does the work."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from fitformer.errors import InputError

MODES = {1: "L", 3: "RGB", 4: "RGBA"}


@dataclass(frozen=True)
class Sampling:
    """How new pixels come from old ones, and what stands beyond the edge: a level, or None for the rim's colour."""

    resampling: Image.Resampling
    beyond: int | None = None

    def outside(self, pixels: np.ndarray) -> tuple[int, ...]:
        """What stands beyond the edge of pixels (H, W, ch)."""
        return rim(pixels) if self.beyond is None else (self.beyond,) * pixels.shape[2]


PICTURE = Sampling(Image.Resampling.BICUBIC)


def to_image(pixels: np.ndarray) -> Image.Image:
    """A Pillow image of pixels (H, W, ch) uint8."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def to_array(image: Image.Image) -> np.ndarray:
    """Pixels (H, W, ch) uint8 of a Pillow image in one of `MODES`."""
    array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array


def convert(pixels: np.ndarray, channels: int) -> np.ndarray:
    """Pixels (H, W, ch) with another number of channels; alpha that is dropped shows white behind it."""
    if pixels.shape[2] == channels:
        return pixels
    image = to_image(pixels)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return to_array(image.convert(MODES[channels]))


def rim(pixels: np.ndarray) -> tuple[int, ...]:
    """The median colour of the outermost pixels: what may stand beyond the edge."""
    edges = (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1])
    return tuple(int(level) for level in np.median(np.concatenate(edges), axis=0))


def fit(
    pixels: np.ndarray,
    size: tuple[int, int],
    resize: Literal["crop", "stretch", "pad"] = "crop",
    sampling: Sampling = PICTURE,
) -> np.ndarray:
    """Pixels (H, W, ch) brought to `size` (rows, columns); see `settings.ImageData.resize`.

    `PICTURE` samples cubically and antialiased.

    Raises:
        InputError: an unknown `resize`.
    """
    height, width = pixels.shape[:2]
    rows, columns = size
    if (height, width) == size:
        return pixels
    if resize == "crop":
        scale = max(rows / height, columns / width)
        corner = (height - rows / scale) / 2, (width - columns / scale) / 2
        return cut(pixels, size, corner, (rows / scale, columns / scale), sampling)
    if resize == "stretch":
        return cut(pixels, size, (0, 0), (height, width), sampling)
    if resize == "pad":
        scale = min(rows / height, columns / width)
        inner = max(1, round(height * scale)), max(1, round(width * scale))
        framed = np.empty((rows, columns, pixels.shape[2]), dtype=np.uint8)
        framed[:] = sampling.outside(pixels)
        top, left = (rows - inner[0]) // 2, (columns - inner[1]) // 2
        framed[top : top + inner[0], left : left + inner[1]] = cut(pixels, inner, (0, 0), (height, width), sampling)
        return framed
    raise InputError(f"resize is {resize!r}: choose crop, stretch or pad")


def unfit(
    values: np.ndarray, size: tuple[int, int], resize: Literal["crop", "stretch", "pad"], beyond: int
) -> np.ndarray:
    """Values (H, W) of the pixels that `fit` made, where they came from: (rows, columns) of the `size` before it.

    Each pixel takes the value of the nearest; `beyond` stands where `fit` cut pixels off.
    """
    scales = [after / before for after, before in zip(values.shape, size, strict=True)]
    lengths = [float(length) for length in values.shape]
    if resize == "crop":
        lengths = [before * max(scales) for before in size]
    elif resize == "pad":
        lengths = [max(1, round(before * min(scales))) for before in size]
    found = []
    for after, before, length in zip(values.shape, size, lengths, strict=True):
        first = (after - length) // 2 if resize == "pad" else (after - length) / 2
        place = np.floor((np.arange(before) + 0.5) * (length / before) + first).astype(np.int64)
        found.append((place.clip(0, after - 1), (place >= 0) & (place < after)))
    (rows, seen_rows), (columns, seen_columns) = found
    there = seen_rows[:, None] & seen_columns
    return np.where(there, values[np.ix_(rows, columns)], beyond).astype(values.dtype)


def cut(
    pixels: np.ndarray,
    size: tuple[int, int],
    corner: tuple[float, float],
    extent: tuple[float, float],
    sampling: Sampling = PICTURE,
) -> np.ndarray:
    """The box at `corner` (row, column) of `extent` (rows, columns), in pixels and fractions, scaled to `size`."""
    top, left = max(corner[0], 0.0), max(corner[1], 0.0)
    # Rounding may carry the box a hair over the edge, which Pillow refuses.
    bottom, right = min(corner[0] + extent[0], pixels.shape[0]), min(corner[1] + extent[1], pixels.shape[1])
    image = to_image(pixels).resize(size[::-1], sampling.resampling, box=(left, top, right, bottom))
    return to_array(image)


def random_crop(
    pixels: np.ndarray,
    size: tuple[int, int],
    random: np.random.Generator,
    sampling: Sampling = PICTURE,
    smallest: float = 0.25,
) -> np.ndarray:
    """A random box of at least `smallest` of the area, near the aspect of `size` (4:3 either way), scaled to it."""
    height, width = pixels.shape[:2]
    aspect = size[1] / size[0] * float(np.exp(random.uniform(-1, 1) * np.log(4 / 3)))
    area = random.uniform(smallest, 1) * height * width
    rows, columns = min((area / aspect) ** 0.5, height), min((area * aspect) ** 0.5, width)
    corner = random.uniform(0, height - rows), random.uniform(0, width - columns)
    return cut(pixels, size, corner, (rows, columns), sampling)


def jitter(
    pixels: np.ndarray,
    random: np.random.Generator,
    sampling: Sampling = PICTURE,
    turn: float = 10,
    scale: float = 0.1,
    shift: float = 0.08,
) -> np.ndarray:
    """Turned by up to `turn` degrees, scaled and shifted by up to these shares, about the centre."""
    height, width, channels = pixels.shape
    angle = np.deg2rad(random.uniform(-turn, turn))
    zoom = float(np.exp(random.uniform(-1, 1) * np.log1p(scale)))
    down, right = random.uniform(-shift, shift, 2) * (height, width)
    # Pillow asks where each pixel comes from: the inverse of the movement, in (column, row).
    cosine, sine = np.cos(angle) / zoom, np.sin(angle) / zoom
    x, y = width / 2 + right, height / 2 + down
    matrix = (cosine, sine, width / 2 - cosine * x - sine * y, -sine, cosine, height / 2 + sine * x - cosine * y)
    fill: tuple[int, ...] = sampling.outside(pixels)
    if channels == 4:
        # Pillow moves such images with their colours multiplied by alpha, but takes the fill as it is given.
        fill = (*(round(level * fill[3] / 255) for level in fill[:3]), fill[3])
    method, colour = sampling.resampling, fill[0] if channels == 1 else fill
    moved = to_image(pixels).transform((width, height), Image.Transform.AFFINE, matrix, method, fillcolor=colour)
    return to_array(moved)


def shift(
    pixels: np.ndarray, random: np.random.Generator, sampling: Sampling = PICTURE, most: float = 1 / 16
) -> np.ndarray:
    """Moved by up to the share `most` of its sides, in whole pixels: no pixel is changed; its rim's colour comes in."""
    moved = np.empty_like(pixels)
    moved[:] = sampling.outside(pixels)
    sides = pixels.shape[:2]
    steps = [int(random.integers(-int(most * side), int(most * side), endpoint=True)) for side in sides]
    there = tuple(slice(max(step, 0), side + min(step, 0)) for step, side in zip(steps, sides, strict=True))
    here = tuple(slice(max(-step, 0), side - max(step, 0)) for step, side in zip(steps, sides, strict=True))
    moved[there] = pixels[here]
    return moved
