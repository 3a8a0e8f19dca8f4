"""Label maps as GeoJSON: polygons with holes, in pixels of the full image, as QuPath and GIS programs import them."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fitformer.data.labels import UNLABELLED
from fitformer.data.readers.levels import ITSELF, Placement
from fitformer.data.settings import Colour
from fitformer.errors import require
from fitformer.inference.explain.geojson import write_features

# Along the longer side of the map that is traced: larger ones are traced by every second, third ... pixel.
MOST_SIDE = 8192


def write_polygons(
    path: Path,
    labels: np.ndarray,
    classes: Sequence[str],
    colours: Sequence[Colour],
    y: Literal["down", "up"] = "down",
    placement: Placement = ITSELF,
) -> int:
    """Write the areas of one class each that a label map has, as one FeatureCollection; returns by how many it steps.

    An area's pixels touch by their sides; its holes are rings of the polygon. Unlabelled pixels are in none.

    Args:
        path: of the new file.
        labels: uint8 (H, W). classes, colours: names and colours by number.
        y, placement: as in `explain.geojson.write_geojson`.

    Raises:
        MissingDependencyError: rasterio is not installed.
    """
    shapes = require("rasterio.features", extra="segment").shapes
    affine = require("affine", extra="segment").Affine
    step = -(-max(labels.shape) // MOST_SIDE)
    # The middle pixel of each square of them, the last one of those that the image's edge cuts off.
    middles = (np.minimum(np.arange(0, side, step) + step // 2, side - 1) for side in labels.shape)
    traced = labels[np.ix_(*middles)]
    sign, scale = (1 if y == "down" else -1), placement.step
    where = affine(step * scale, 0, placement.left, 0, sign * step * scale, sign * placement.top)
    rows, columns = labels.shape
    corner = placement.left + columns * scale, sign * (placement.top + rows * scale)

    def features() -> Iterator[dict[str, Any]]:
        for geometry, number in shapes(traced, traced != UNLABELLED, connectivity=4, transform=where):
            rings = [[_inside(point, corner, sign) for point in ring] for ring in geometry["coordinates"]]
            name, colour = classes[int(number)], list(colours[int(number)])
            yield {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": rings},
                "properties": {"objectType": "annotation", "classification": {"name": name, "color": colour}},
            }

    write_features(path, features())
    return step


def _inside(point: Sequence[float], corner: tuple[float, float], sign: int) -> list[float]:
    """A point (x, y), moved back to the image's edge if a last step reaches beyond it."""
    x, y = point
    return [min(x, corner[0]), min(y, corner[1]) if sign > 0 else max(y, corner[1])]
