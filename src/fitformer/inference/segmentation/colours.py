"""Colours of classes, and a picture of a label map over its image."""

import colorsys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from fitformer._support.atomic_files import write_atomically
from fitformer.data.labels import UNLABELLED
from fitformer.data.settings import Colour
from fitformer.inference.explain.overlay import grey

STRENGTH = 0.55
# Of a circle of hues: each further colour lies far from those before it.
_GOLDEN = 0.61803398875


def class_colours(count: int) -> tuple[Colour, ...]:
    """Colours for so many classes, the same ones each time."""
    hues = ((k * _GOLDEN) % 1 for k in range(count))
    drawn = (colorsys.hsv_to_rgb(hue, 0.75 - 0.3 * (k % 2), 0.95 - 0.3 * (k % 3 == 2)) for k, hue in enumerate(hues))
    return tuple((round(255 * red), round(255 * green), round(255 * blue)) for red, green, blue in drawn)


def write_overlay(path: Path, thumbnail: np.ndarray, labels: np.ndarray, colours: Sequence[Colour]) -> None:
    """Write a thumbnail (rows, columns, channels) in grey under the colours of a label map (H, W) as PNG.

    Each pixel takes the class of the one in its middle; unlabelled ones stay grey.
    """
    sides = zip(thumbnail.shape, labels.shape)
    small = labels[np.ix_(*(((np.arange(count) + 0.5) * side / count).astype(int) for count, side in sides))]
    under = np.repeat(grey(thumbnail)[..., None], 3, axis=-1)
    over = np.array(colours, dtype=np.float32)[np.where(small == UNLABELLED, 0, small)]
    strength = STRENGTH * (small != UNLABELLED)[..., None]
    picture = (under * (1 - strength) + over * strength).round().astype(np.uint8)
    with write_atomically(path) as scratch:
        Image.fromarray(picture).save(scratch, format="PNG", optimize=True)
