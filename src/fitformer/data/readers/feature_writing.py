"""Files of patch features, as TRIDENT writes them and `open_image` reads them, written batch by batch."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from fitformer._support.atomic_files import write_atomically
from fitformer.data.readers.features import COORDS, FEATURES
from fitformer.errors import require


@contextmanager
def feature_file(
    path: str | os.PathLike[str],
    coords: np.ndarray,
    width: int,
    attributes: Mapping[str, Mapping[str, Any]],
) -> Iterator[Any]:
    """An HDF5 file that appears when the block ends well; yields its `features` (N, `width`) float32, to be filled.

    Args:
        path: of the file, which ends in .h5.
        coords: whole numbers (N, 2), x and y of the upper left corners of patches in pixels of the slide's level 0.
        width: numbers of a patch.
        attributes: of the arrays `features` and `coords` by name, and of the file itself under the name `/`.

    Raises:
        MissingDependencyError: h5py is not installed.
        OSError: the file cannot be written.
    """
    h5py = require("h5py", extra="features")
    with write_atomically(path) as scratch, h5py.File(scratch, "w") as file:
        # Without chunks a window's patches are read as they lie.
        features = file.create_dataset(FEATURES, shape=(len(coords), width), dtype=np.float32)
        file.create_dataset(COORDS, data=coords.astype(np.int64))
        for name, said in attributes.items():
            file[name].attrs.update(said)
        yield features


def attributes_of(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The attributes of an HDF5 file itself; empty where there is no such file, or none that is whole."""
    h5py = require("h5py", extra="features")
    try:
        with h5py.File(path, "r") as file:
            return dict(file.attrs)
    except OSError:
        return {}
