"""Scanned slides (.svs, .ndpi, .mrxs, ...) through OpenSlide."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from fitformer.data.readers.errors import readable
from fitformer.data.readers.levels import OpenImage
from fitformer.errors import require


def open_slide(path: str, most_bytes: float) -> OpenImage:
    """Open a slide with all its levels, in RGB.

    Only windows are ever held, whatever `most_bytes` is.

    Raises:
        InputError: OpenSlide does not know it, or it is broken.
    """
    openslide = require("openslide", extra="gigapixel")
    with readable(path):
        slide = openslide.OpenSlide(path)
    return OpenImage([_Region(path, slide, level) for level in range(slide.level_count)], slide.close)


@dataclass(frozen=True)
class _Region:
    """One level of a slide."""

    path: str
    slide: Any
    level: int

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint8)

    @property
    def shape(self) -> tuple[int, int, int]:
        columns, rows = self.slide.level_dimensions[self.level]
        return rows, columns, 3

    @property
    def tile(self) -> tuple[int, int]:
        known = self.slide.properties
        rows, columns = (
            int(known.get(f"openslide.level[{self.level}].tile-{side}", 256)) for side in ("height", "width")
        )
        return min(rows, self.shape[0]), min(columns, self.shape[1])

    def window(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        # OpenSlide takes the corner in pixels of the full size, whatever the level.
        scale = self.slide.level_downsamples[self.level]
        corner = round(left * scale), round(top * scale)
        with readable(f"{self.path}: the window at row {top:,}, column {left:,} of level {self.level}"):
            return _over_white(np.asarray(self.slide.read_region(corner, self.level, (width, height))))

    def forget(self) -> None:
        """OpenSlide's own cache goes with the slide."""


def _over_white(pixels: np.ndarray) -> np.ndarray:
    """RGB of RGBA in front of white, which is what surrounds tissue on a slide."""
    colours, alpha = pixels[..., :3], pixels[..., 3:]
    if alpha.min() == 255:
        return colours.copy()
    share = alpha / np.float32(255)
    return np.rint(colours * share + 255 * (1 - share)).astype(np.uint8)
