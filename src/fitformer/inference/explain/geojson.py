"""Maps as GeoJSON: rectangles in pixels of the full image, with measurements, as QuPath imports them."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fitformer._support.atomic_files import write_atomically
from fitformer.inference.explain.heatmap import HeatMap, Pair
from fitformer.inference.explain.overlay import AGAINST, FOR

# More make viewers slow; the TIFF holds all.
MOST_PATCHES = 2000

Feature = dict[str, Any]


def write_geojson(
    path: Path,
    attention: HeatMap,
    relevance: HeatMap,
    label: str,
    probabilities: Mapping[str, float],
    y: Literal["down", "up"] = "down",
) -> None:
    """Write the maps of an image as one FeatureCollection.

    It holds an annotation, the whole image with the label and all probabilities; a tile for each group that was not
    skipped; and a detection for each patch, at most the `MOST_PATCHES` that moved the decision most. Tiles and
    detections are classed as for or against the label.

    Args:
        path: of the new file.
        attention, relevance: maps of the same image.
        label: the class decided for.
        probabilities: of all classes.
        y: rows count `down` from 0, as in QuPath, or `up` from below 0: where GIS viewers show an image that has no
            coordinates of its own.
    """
    with write_atomically(path) as scratch, scratch.open("w", encoding="utf-8") as file:
        file.write('{"type": "FeatureCollection", "features": [')
        for number, feature in enumerate(_features(attention, relevance, label, probabilities, y)):
            file.write(("," if number else "") + "\n" + json.dumps(feature, ensure_ascii=False, allow_nan=False))
        file.write("\n]}\n")


def _features(
    attention: HeatMap, relevance: HeatMap, label: str, probabilities: Mapping[str, float], y: str
) -> Iterator[Feature]:
    sign, sides = 1 if y == "down" else -1, attention.image_size
    whole = {f"probability of {name}": round(share, 6) for name, share in probabilities.items()}
    about = {"name": f"{label} {probabilities[label]:.1%}", "classification": {"name": label}, "isLocked": True}
    yield _rectangle((0, 0), sides, sides, sign, "annotation", whole, about)
    for corner, measured in _groups(attention, relevance):
        yield _rectangle(
            corner, attention.group_size, sides, sign, "tile", measured, _side(measured["relevance"], label)
        )
    for corner, measured in _patches(attention, relevance):
        yield _rectangle(
            corner, attention.patch_size, sides, sign, "detection", measured, _side(measured["relevance"], label)
        )


def _side(relevance: float, label: str) -> Feature:
    word, colour = ("for", FOR) if relevance >= 0 else ("against", AGAINST)
    return {"classification": {"name": f"{word} {label}", "color": list(colour)}}


def _groups(attention: HeatMap, relevance: HeatMap) -> Iterator[tuple[Pair, dict[str, float]]]:
    """Corner and measurements of every group that was not skipped."""
    (gh, gw), (ph, pw) = attention.group_size, attention.patch_size
    high, wide = gh // ph, gw // pw
    rows, columns = attention.cells.shape
    for row in range(0, rows, high):
        for column in range(0, columns, wide):
            inside = np.s_[row : row + high, column : column + wide]
            if np.isfinite(attention.cells[inside]).any():
                measured = {
                    "attention, most in a patch": _number(np.nanmax(attention.cells[inside])),
                    "relevance": _number(np.nansum(relevance.cells[inside], dtype=np.float64)),
                }
                yield (row * ph, column * pw), measured


def _patches(attention: HeatMap, relevance: HeatMap) -> Iterator[tuple[Pair, dict[str, float]]]:
    """Corner and measurements of the patches that moved the decision most, in the order of the image."""
    ph, pw = attention.patch_size
    size = np.where(np.isfinite(relevance.cells), np.abs(relevance.cells), -1).ravel()
    most = min(MOST_PATCHES, size.size)
    chosen = np.argpartition(-size, most - 1)[:most]
    for place in np.sort(chosen[size[chosen] >= 0]):
        row, column = divmod(int(place), relevance.cells.shape[1])
        measured = {
            "attention": _number(attention.cells[row, column]),
            "relevance": _number(relevance.cells[row, column]),
        }
        yield (row * ph, column * pw), measured


def _number(value: float) -> float:
    return float(f"{float(value):.6g}")


def _rectangle(
    corner: Pair, size: Pair, within: Pair, sign: int, kind: str, measured: dict[str, float], about: Feature
) -> Feature:
    """A feature: the rectangle at `corner` (row, column), cut off at the image's edges, of QuPath's object type."""
    (top, left), bottom, right = corner, min(corner[0] + size[0], within[0]), min(corner[1] + size[1], within[1])
    ring = [[x, sign * y] for x, y in ((left, top), (right, top), (right, bottom), (left, bottom), (left, top))]
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": {"objectType": kind, **about, "measurements": measured},
    }
