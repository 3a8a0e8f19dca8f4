"""Scanned slides (.svs, .ndpi, .mrxs, ...) through OpenSlide."""

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np

from fitformer.data.readers.errors import readable
from fitformer.data.readers.levels import OpenImage, OpenOptions
from fitformer.data.readers.resolution import of_openslide
from fitformer.data.readers.tiff import is_tiff, open_tiff, stores_rgb_bytes
from fitformer.errors import require


def open_slide(path: str, options: OpenOptions) -> OpenImage:
    """Open a slide with all its levels, in RGB.

    Only windows are ever held, whatever `most_bytes` of the options is. OpenSlide makes bytes of RGB of whatever is
    stored, so a TIFF of other pixels is read as a TIFF.

    Raises:
        InputError: OpenSlide does not know it, or it is broken.
    """
    openslide = require("openslide", extra="gigapixel")
    if is_tiff(path) and not stores_rgb_bytes(path):
        return open_tiff(path, options)
    file = _File(openslide, path)
    with readable(path):
        slide = file.slide
        levels = [
            _Region(file, number, (rows, columns, 3), _tile(slide, number), float(slide.level_downsamples[number]))
            for number, (columns, rows) in enumerate(slide.level_dimensions)
        ]
    return OpenImage(levels, file.close, microns_per_pixel=of_openslide(slide.properties))


def _tile(slide: Any, level: int) -> tuple[int, int]:
    columns, rows = slide.level_dimensions[level]
    known = slide.properties
    height, width = (int(known.get(f"openslide.level[{level}].tile-{side}", 256)) for side in ("height", "width"))
    return min(rows, height), min(columns, width)


class _File:
    """A slide that is opened anew after an error, which OpenSlide would repeat at every later call."""

    def __init__(self, openslide: Any, path: str):
        self.path, self._openslide, self._lock = path, openslide, threading.Lock()
        with readable(path):
            self.slide = openslide.OpenSlide(path)

    def read(self, corner: tuple[int, int], level: int, size: tuple[int, int]) -> np.ndarray:
        slide = self.slide
        try:
            return np.asarray(slide.read_region(corner, level, size))
        except self._openslide.OpenSlideError:
            with self._lock:
                # Other threads may be reading from the old one: it is closed when the last of them lets go.
                if self.slide is slide:
                    self.slide = self._openslide.OpenSlide(self.path)
            raise

    def close(self) -> None:
        self.slide.close()


@dataclass(frozen=True)
class _Region:
    """One level of a slide; `downsample` is its side of a pixel in pixels of the full size."""

    file: _File
    level: int
    shape: tuple[int, int, int]
    tile: tuple[int, int]
    downsample: float

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint8)

    def window(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        # OpenSlide takes the corner in pixels of the full size, whatever the level.
        corner = round(left * self.downsample), round(top * self.downsample)
        where = f"{self.file.path}: the window at row {top:,}, column {left:,} of level {self.level}"
        with readable(where):
            return _over_white(self.file.read(corner, self.level, (width, height)))

    def forget(self) -> None:
        """OpenSlide's own cache goes with the slide."""


def _over_white(pixels: np.ndarray) -> np.ndarray:
    """RGB of RGBA in front of white, which is what surrounds tissue on a slide."""
    colours, alpha = pixels[..., :3], pixels[..., 3:]
    if alpha.min() == 255:
        return colours.copy()
    share = alpha / np.float32(255)
    return np.rint(colours * share + 255 * (1 - share)).astype(np.uint8)
