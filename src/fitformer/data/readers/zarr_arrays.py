"""Zarr arrays, groups and OME-Zarr pyramids, versions 2 and 3."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fitformer._support.listed import listed
from fitformer.data.readers.axes import guessed, named
from fitformer.data.readers.errors import readable
from fitformer.data.readers.features import holds_features, open_features
from fitformer.data.readers.levels import OpenImage, OpenOptions, Tiles, weigh_tiles
from fitformer.data.readers.resolution import of_ome_zarr
from fitformer.data.readers.zarr_store import open_store
from fitformer.errors import InputError, require


def open_zarr(path: str, options: OpenOptions) -> OpenImage:
    """Open an array, the only array of a group that has rows and columns, or the pyramid of an OME-Zarr group.

    A group of `features` and `coords` is an image of patches, see `features.open_features`.

    Its axes are those that it names; without names, the shorter of the first and the last one is the channels.

    Raises:
        InputError: no Zarr folder, none of one image, or one of chunks of more than `most_bytes`.
    """
    zarr = require("zarr", extra="gigapixel")
    with readable(path):
        store = open_store(path)
        try:
            node = zarr.open(store, mode="r")
        except FileNotFoundError as error:
            raise InputError(
                f"{path} is a folder and no Zarr (it has no zarr.json, .zarray or .zgroup): give an image file, or the "
                "folder of a Zarr array or group"
            ) from error
        if not isinstance(node, zarr.Array) and holds_features(parts := dict(node.arrays())):
            for array in parts.values():
                store.bound(array)
            return open_features(path, parts, options)
        arrays, axes, microns = ([node], None, None) if isinstance(node, zarr.Array) else _arrays(node, path)
        for array in arrays:
            store.bound(array)
        levels = [_level(path, array, axes, options.most_bytes) for array in arrays]
        return OpenImage(levels, microns_per_pixel=microns)


def _arrays(group: Any, path: str) -> tuple[list[Any], list[str] | None, float | None]:
    """The levels of a group's image, the names of its axes if it has them, and microns of a pixel if it says them."""
    said = group.attrs.get("ome", group.attrs)
    if "bioformats2raw.layout" in said:
        # A collection of images, of which the first is called 0.
        return _arrays(_part(group, "0", "first image", path), path)
    if "multiscales" in said:
        image = said["multiscales"][0]
        axes = [axis["name"] if isinstance(axis, dict) else axis for axis in image.get("axes", ())]
        first, *reductions = (each["path"] for each in image["datasets"])
        levels = [
            _part(group, first, "level 0, its full size", path),
            *(group[name] for name in reductions if name in group),
        ]
        return levels, axes or None, of_ome_zarr(image, axes)
    # Arrays of one axis or none beside it say where its rows and columns lie, as xarray writes them.
    names = sorted(name for name, array in group.arrays() if array.ndim > 1) or sorted(group.array_keys())
    if len(names) != 1:
        has = listed(names) if names else "none"
        raise InputError(f"{path} is a Zarr group of {len(names)} arrays ({has}); give the path of the one to read")
    return [group[names[0]]], None, None


def _part(group: Any, name: str, what: str, path: str) -> Any:
    if name not in group:
        raise InputError(f"{path} says that {name!r} is its {what}, and there is no {name!r} in it: it is not whole")
    return group[name]


def _axes(array: Any, axes: Sequence[str] | None, path: str) -> tuple[int, int]:
    own = getattr(array.metadata, "dimension_names", None) or array.attrs.get("_ARRAY_DIMENSIONS")
    for names in (axes, own):
        if names and {"y", "x"} <= {str(name).lower() for name in names}:
            return named([str(name) for name in names], array.shape, path)
    return guessed(array.shape, path)


def _level(path: str, array: Any, axes: Sequence[str] | None, most_bytes: float) -> Tiles:
    order = _axes(array, axes, path)
    axes_first = (*order, *(axis for axis in range(array.ndim) if axis not in order))
    rows, columns = (array.shape[axis] for axis in order)
    channels = int(np.prod(array.shape, dtype=np.int64)) // max(1, rows * columns)
    height, width = (array.chunks[axis] for axis in order)

    def decode(row: int, column: int) -> np.ndarray:
        where: list[slice] = [slice(None)] * array.ndim
        where[order[0]] = slice(row * height, (row + 1) * height)
        where[order[1]] = slice(column * width, (column + 1) * width)
        with readable(f"{path}: the chunk at row {row * height:,}, column {column * width:,}"):
            part = np.asarray(array[tuple(where)]).transpose(axes_first)
        return np.ascontiguousarray(part).reshape(*part.shape[:2], channels)

    dtype = np.dtype(array.dtype)
    height, width = min(height, rows), min(width, columns)
    weigh_tiles(
        path, f"chunks of {height:,} x {width:,} pixels", height * width * channels * dtype.itemsize, most_bytes
    )
    return Tiles((rows, columns, channels), dtype, (height, width), decode)
