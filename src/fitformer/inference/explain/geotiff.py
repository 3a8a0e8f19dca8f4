"""A map as a tiled TIFF of one value a patch that says where it lies over the image at full scale.

Coordinates are the image's pixels, rows counted down. A TIFF without coordinates of its own is shown by GIS viewers
with its rows at y = 0, -1, -2, ...: so is the map, with patches instead of pixels. Of a GeoTIFF the map takes over the
coordinates and the projection.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fitformer._support.atomic_files import write_atomically
from fitformer.data.readers.levels import ITSELF, Placement
from fitformer.errors import require
from fitformer.inference.explain.heatmap import HeatMap, Pair

TILE = 256
SCALE, TIEPOINT, MATRIX, NO_DATA = 33550, 33922, 34264, 42113
KEYS = (34735, 34736, 34737)
RASTER_TYPE, AREA, POINT = 1025, 1, 2
_DOUBLE, _SHORT, _ASCII = 12, 3, 2

Tag = tuple[int, int, int, Any, bool]


def write_tiff(
    path: Path, heatmap: HeatMap, title: str, image: str | Path | None = None, placement: Placement = ITSELF
) -> None:
    """Write a map as float32, a value a patch, NaN where groups were skipped.

    Args:
        path: of the new file.
        heatmap: what to write.
        title: goes into the image description.
        image: the file of the image, whose coordinates are taken over if it is a GeoTIFF.
        placement: where the image lies in the slide whose pixels are the coordinates, if it is none.

    Raises:
        MissingDependencyError: tifffile is not installed.
    """
    tifffile = require("tifffile", extra="gigapixel")
    rows, columns = heatmap.patch_size
    with write_atomically(path) as scratch:
        tifffile.imwrite(
            scratch,
            heatmap.cells.astype(np.float32),
            tile=(TILE, TILE),
            compression="adobe_deflate",
            photometric="minisblack",
            description=f"{title}; a value for each patch of {rows} x {columns} pixels",
            software="fitformer",
            # Values a pixel of the image: what remains of the resolution where there is no unit of length.
            resolution=(1 / columns, 1 / rows),
            resolutionunit="NONE",
            metadata=None,
            extratags=[*georeference(image, heatmap.patch_size, placement), no_data("nan")],
        )


def georeference(image: str | Path | None, patch: Pair, placement: Placement) -> list[Tag]:
    """Tags of a TIFF of patches (rows, columns) that place them where the image's own tags place its pixels.

    Where the image has none, they are placed at its pixels.
    """
    own = _by_areas(_geotiff_tags(image)) if image is not None else {}
    (rows, columns), keys = patch, list(_keys(own))
    if MATRIX in own:
        matrix = np.array(own[MATRIX], dtype=float).reshape(4, 4) * (columns, rows, 1, 1)
        return [(MATRIX, _DOUBLE, 16, tuple(matrix.ravel()), True), *keys]
    # A tie point is (column, row, 0, x, y, z); only the first two are in pixels.
    points = np.array(own.get(TIEPOINT, (0, 0, 0, placement.left, -placement.top, 0)), dtype=float).reshape(-1, 6)
    points /= (columns, rows, 1, 1, 1, 1)
    across, down, *rest = own.get(SCALE, (placement.step, placement.step, 0.0))
    return [
        (SCALE, _DOUBLE, 3, (across * columns, down * rows, *rest), True),
        (TIEPOINT, _DOUBLE, points.size, tuple(points.ravel()), True),
        *keys,
    ]


def no_data(value: str) -> Tag:
    """The tag that says which value means that there is none."""
    return NO_DATA, _ASCII, 0, value, True


def _by_areas(own: dict[int, Any]) -> dict[int, Any]:
    """The same coordinates, told of pixels as areas: (0, 0) is a corner, where of pixels as points it is a centre.

    A patch has its corner where its first pixel has, but its centre elsewhere.
    """
    numbers = np.array(own.get(KEYS[0], ()), dtype=int)
    directory = numbers[: len(numbers) // 4 * 4].reshape(-1, 4)
    kind = (directory[:, 0] == RASTER_TYPE) & (directory[:, 1] == 0)
    if not (directory[kind, 3] == POINT).any():
        return own
    directory[kind, 3] = AREA
    told = own | {KEYS[0]: tuple(directory.ravel().tolist())}
    if MATRIX in own:
        matrix = np.array(own[MATRIX], dtype=float).reshape(4, 4)
        matrix[:, 3] -= matrix[:, :2].sum(axis=1) / 2
        told[MATRIX] = tuple(matrix.ravel())
    if TIEPOINT in own:
        points = np.array(own[TIEPOINT], dtype=float).reshape(-1, 6)
        points[:, :2] += 0.5
        told[TIEPOINT] = tuple(points.ravel())
    return told


def _keys(own: dict[int, Any]) -> Iterator[Tag]:
    # Without keys of the image's own: version 1.1.0, one key, pixels are areas.
    found = {code: own[code] for code in KEYS if code in own} or {KEYS[0]: (1, 1, 0, 1, RASTER_TYPE, 0, 1, AREA)}
    for code, value in found.items():
        kind = {KEYS[0]: _SHORT, KEYS[1]: _DOUBLE, KEYS[2]: _ASCII}[code]
        yield code, kind, 0 if kind == _ASCII else len(value), value, True


def _geotiff_tags(image: str | Path) -> dict[int, Any]:
    """Values by code of an image's tags of coordinates; none of a file that is no TIFF or has only half of them."""
    tifffile = require("tifffile", extra="gigapixel")
    try:
        with tifffile.TiffFile(image) as file:
            tags = file.pages[0].tags
            found = {code: tags[code].value for code in (SCALE, TIEPOINT, MATRIX, *KEYS) if code in tags}
    except (tifffile.TiffFileError, OSError, ValueError, struct.error):
        return {}
    return found if MATRIX in found or {SCALE, TIEPOINT} <= found.keys() else {}
