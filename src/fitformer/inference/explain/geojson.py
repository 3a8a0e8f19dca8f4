"""Maps as GeoJSON: rectangles in pixels of the full image, with measurements, as QuPath imports them."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fitformer._support.atomic_files import write_atomically
from fitformer.data.readers.levels import ITSELF, Placement
from fitformer.inference.explain.explanation import SIGNED
from fitformer.inference.explain.heatmap import HeatMap, Pair
from fitformer.inference.explain.overlay import AGAINST, FOR
from fitformer.tasks.answers import Said

# More make viewers slow; the TIFF holds all.
MOST_PATCHES = 2000

Feature = dict[str, Any]


def write_geojson(
    path: Path,
    maps: Mapping[str, HeatMap],
    said: Said,
    y: Literal["down", "up"] = "down",
    placement: Placement = ITSELF,
) -> None:
    """Write the maps of an image as one FeatureCollection.

    It holds an annotation, the whole image with the answer and all its numbers; a tile for each group that was not
    skipped; and a detection for each patch, at most the `MOST_PATCHES` that are largest in the last map. Of leaving
    out, which has one value a group, there are tiles alone. Where the last map has signs, tiles and detections are
    classed as for or against what is explained.

    Args:
        path: of the new file.
        maps: of the same image, by the names of `explanation.MAPS`.
        said: the answer, and what of it the maps explain.
        y: rows count `down` from 0, as in QuPath, or `up` from below 0: where GIS viewers show an image that has no
            coordinates of its own.
        placement: where the image lies in the slide whose coordinates are written.
    """
    write_features(path, _features(maps, said, y, placement))


def write_features(path: Path, features: Iterable[Feature]) -> None:
    """Write features as one FeatureCollection, a line each, none of them kept."""
    with write_atomically(path) as scratch, scratch.open("w", encoding="utf-8") as file:
        file.write('{"type": "FeatureCollection", "features": [')
        for number, feature in enumerate(features):
            file.write(("," if number else "") + "\n" + json.dumps(feature, ensure_ascii=False, allow_nan=False))
        file.write("\n]}\n")


def _features(maps: Mapping[str, HeatMap], said: Said, y: str, placement: Placement) -> Iterator[Feature]:
    name, like = list(maps.items())[-1]
    frame = _Frame(like.image_size, placement, 1 if y == "down" else -1)
    about = {"name": said.title, "classification": {"name": said.name}, "isLocked": True}
    yield _feature(frame.ring((0, 0), like.image_size), "annotation", said.measurements, about)
    for corner, measured in _groups(maps):
        side = _side(measured.get(name), said)
        yield _feature(frame.ring(corner, like.group_size), "tile", measured, side)
    for corner, measured in _patches(maps) if name != "leave-out" else ():
        side = _side(measured[name] if name in SIGNED else None, said)
        yield _feature(frame.ring(corner, like.patch_size), "detection", measured, side)


def _side(value: float | None, said: Said) -> Feature:
    """The class of a value above or below 0; none of a map without signs."""
    if value is None:
        return {}
    word, colour = (said.sides[0], FOR) if value >= 0 else (said.sides[1], AGAINST)
    return {"classification": {"name": word, "color": list(colour)}}


def _groups(maps: Mapping[str, HeatMap]) -> Iterator[tuple[Pair, dict[str, float]]]:
    """Corner and measurements of every group that was not skipped."""
    like = list(maps.values())[-1]
    (gh, gw), (ph, pw) = like.group_size, like.patch_size
    high, wide = gh // ph, gw // pw
    rows, columns = like.cells.shape
    for row in range(0, rows, high):
        for column in range(0, columns, wide):
            inside = np.s_[row : row + high, column : column + wide]
            if np.isfinite(like.cells[inside]).any():
                measured = dict(_of_group(name, heatmap.cells[inside]) for name, heatmap in maps.items())
                yield (row * ph, column * pw), measured


def _of_group(name: str, cells: np.ndarray) -> tuple[str, float]:
    """What is measured of a group, and its value."""
    if name == "leave-out":
        return name, _number(np.nanmax(cells))
    if name in SIGNED:
        return name, _number(np.nansum(cells, dtype=np.float64))
    return f"{name}, most in a patch", _number(np.nanmax(cells))


def _patches(maps: Mapping[str, HeatMap]) -> Iterator[tuple[Pair, dict[str, float]]]:
    """Corner and measurements of the patches that are largest in the last map, in the order of the image."""
    like = list(maps.values())[-1]
    ph, pw = like.patch_size
    size = np.where(np.isfinite(like.cells), np.abs(like.cells), -1).ravel()
    most = min(MOST_PATCHES, size.size)
    chosen = np.argpartition(-size, most - 1)[:most]
    for place in np.sort(chosen[size[chosen] >= 0]):
        row, column = divmod(int(place), like.cells.shape[1])
        measured = {name: _number(heatmap.cells[row, column]) for name, heatmap in maps.items()}
        yield (row * ph, column * pw), measured


def _number(value: float) -> float:
    return float(f"{float(value):.6g}")


@dataclass(frozen=True)
class _Frame:
    """Where an image of `sides` (rows, columns) is drawn; `sign` is -1 where rows count up."""

    sides: Pair
    placement: Placement
    sign: int

    def ring(self, corner: Pair, size: Pair) -> list[list[float]]:
        """The rectangle at `corner` (row, column) of `size`, cut off at the image's edges, as points (x, y)."""
        ends = (min(first + length, side) for first, length, side in zip(corner, size, self.sides, strict=True))
        (top, left), (bottom, right), at = corner, ends, self.placement
        points = ((left, top), (right, top), (right, bottom), (left, bottom), (left, top))
        return [[at.left + at.step * x, self.sign * (at.top + at.step * y)] for x, y in points]


def _feature(ring: list[list[float]], kind: str, measured: dict[str, float], about: Feature) -> Feature:
    """A feature of QuPath's object type."""
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": {"objectType": kind, **about, "measurements": measured},
    }
