"""Generated images for benchmarks: tiled TIFF on disk, written window by window."""

import os

import numpy as np

from fitformer.data.readers.writing import write_tiled_tiff

TILE = 512


def write_image(path: str | os.PathLike[str], rows: int, columns: int, channels: int = 3) -> None:
    """Write a generated uint8 image as a tiled TIFF, not compressed: a slope with grain on it, the same every time.

    Raises:
        MissingDependencyError: tifffile is not installed.
        OSError: it could not be written.
    """
    grain = np.random.default_rng(0).integers(0, 96, (TILE, TILE, channels), dtype=np.uint8)

    def window(top: int, left: int, height: int, width: int) -> np.ndarray:
        level = np.uint8(80 * (top / rows + left / columns))
        # Rolled by another amount in each tile, so that no two tiles are equal.
        return np.roll(grain, (top // TILE * 37, left // TILE * 53), axis=(0, 1))[:height, :width] + level

    write_tiled_tiff(path, (rows, columns, channels), np.uint8, window, tile=TILE, compression=None)
