"""Image files that are opened, not decoded: a source of lazily read images of any size."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fitformer.data.pixels import Unreadable, suffixes
from fitformer.data.readers import LazyImage, open_image
from fitformer.data.readers.lazy import BACKENDS
from fitformer.data.sources import Files, check_channels
from fitformer.errors import InputError, MissingExtra

ZARR = ".zarr"


def lazy_suffixes() -> frozenset[str]:
    """The file name endings, lower case, that `open_image` is asked about; folders that end in .zarr are images too."""
    return suffixes() | BACKENDS.keys() | {ZARR}


@dataclass(frozen=True, eq=False)
class LazySource:
    """Image files as `LazyImage`s, each of its own size."""

    title: str
    files: Files
    labels: np.ndarray
    classes: tuple[str, ...]
    channels: int

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = opened(str(self.files[index]))
        check_channels(image.shape[2], self.channels, image.path, self.title)
        return image, int(self.labels[index])

    def name(self, index: int) -> str:
        """The file's path."""
        return str(self.files[index])


def opened(path: str) -> LazyImage:
    """An image by its header.

    Raises:
        Unreadable: it is missing or broken.
        MissingExtra: the package that reads such files is not installed.
    """
    try:
        return open_image(path)
    except MissingExtra:
        raise
    except InputError as error:
        raise Unreadable(path, str(error)) from error


def lazy_source(
    title: str, files: Files, labels: np.ndarray, classes: tuple[str, ...], channels: int | None
) -> LazySource:
    """A `LazySource`; without `channels`, with those of the first file that can be opened.

    Raises:
        InputError: no files, or none that can be opened.
    """
    if not len(files):
        raise InputError(f"{title}: no images")
    if channels is None:
        channels = _first_channels(title, files)
    return LazySource(title, files, labels, classes, channels)


def _first_channels(title: str, files: Files) -> int:
    broken = []
    for index in range(len(files)):
        try:
            return opened(str(files[index])).shape[2]
        except Unreadable as error:
            broken.append(str(error))
    raise InputError(f"{title}: no image is readable, e.g. {broken[0]}")


def is_image_folder(folder: str | Path) -> bool:
    """Whether a folder is an image itself, not a place for some."""
    return Path(folder).suffix.lower() == ZARR
