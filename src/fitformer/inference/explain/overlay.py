"""A small picture: the image in grey, under the heat of a map."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from fitformer._support.atomic_files import write_atomically
from fitformer.data.readers.area_resize import average
from fitformer.inference.explain.heatmap import HeatMap
from fitformer.viz import heat

LONGEST = 1024
STRENGTH = 0.6
FOR, AGAINST = (214, 47, 39), (49, 88, 186)

Colours = Literal["heat", "signed"]


def thumbnail_size(rows: int, columns: int, longest: int = LONGEST) -> tuple[int, int]:
    """Rows and columns of the picture of an image: its own, or shrunk until no side is longer than `longest`."""
    scale = min(1.0, longest / max(rows, columns))
    return max(1, round(rows * scale)), max(1, round(columns * scale))


def thumbnail_of(image: Any) -> np.ndarray:
    """An image shrunk to the size of its picture; of features of patches, where there are some."""
    size = thumbnail_size(*image.shape[:2])
    presence = getattr(image, "presence", None)
    return image.thumbnail(*size) if presence is None else average(presence, *size)


def grey(thumbnail: np.ndarray) -> np.ndarray:
    """Brightness (rows, columns) from 0 to 255 of pixels (rows, columns, channels) of any type.

    Bytes are taken as they are, others stretched from their darkest to their brightest pixel; what
    is no number is dark.
    """
    mean = thumbnail[..., :3].astype(np.float32).mean(axis=-1)
    if thumbnail.dtype == np.uint8:
        return mean
    known = np.isfinite(mean)
    low, high = float(mean.min(where=known, initial=np.inf)), float(mean.max(where=known, initial=-np.inf))
    return np.where(known, mean - low, 0) * (255 / max(high - low, 1e-12))


def blend(thumbnail: np.ndarray, values: np.ndarray, colours: Colours = "heat") -> np.ndarray:
    """A picture uint8 (rows, columns, 3): a thumbnail in grey under values (rows, columns) of the same size.

    `heat` runs from dark, 0, to bright, the largest value; `signed` shows what is above 0 red and what is below blue,
    as strongly as it is large, the largest in either direction most. Where values are NaN the image is left grey.
    """
    under = np.repeat(grey(thumbnail)[..., None], 3, axis=-1)
    known = np.isfinite(values)
    level = np.where(known, values, 0) / max(float(np.abs(values[known]).max(initial=0)), 1e-12)
    if colours == "heat":
        over, strength = heat(torch.from_numpy(level)).numpy(), STRENGTH * known
    else:
        over, strength = np.where(level[..., None] > 0, FOR, AGAINST), np.abs(level) ** 0.5
    mixed = under * (1 - strength[..., None]) + over * strength[..., None]
    return mixed.round().astype(np.uint8)


def write_overlay(path: Path, thumbnail: np.ndarray, heatmap: HeatMap, colours: Colours = "heat") -> None:
    """Write the picture of a map over a thumbnail (rows, columns, channels) of its image as PNG; see `blend`."""
    picture = blend(thumbnail, heatmap.shrunk(*thumbnail.shape[:2]), colours)
    with write_atomically(path) as scratch:
        Image.fromarray(picture).save(scratch, format="PNG", optimize=True)
