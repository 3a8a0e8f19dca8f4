"""Image files that are opened, not decoded: a source of lazily read images of any size."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from fitformer.data.datasets.sources import Files
from fitformer.data.decoding import UnreadableImageError, suffixes
from fitformer.data.readers import LazyImage
from fitformer.data.readers.features import open_without_coordinates
from fitformer.data.readers.lazy import BACKENDS
from fitformer.data.readers.levels import OpenOptions
from fitformer.errors import InputError, MissingDependencyError
from fitformer.patching.any_size import scaled_alike

ZARR = ".zarr"


def lazy_suffixes() -> frozenset[str]:
    """The file name endings, lower case, of images in folders; folders that end in .zarr are images too.

    Tensors that torch saved often lie beside the files of patch features that they were made of, and are no images.
    """
    readable = {ending for ending, backend in BACKENDS.items() if backend is not open_without_coordinates}
    return suffixes() | readable | {ZARR}


@dataclass(frozen=True, eq=False)
class LazySource:
    """Image files as `LazyImage`s, each of its own size; their pixels are as `like`'s, one of the images."""

    title: str
    files: Files
    labels: np.ndarray
    classes: tuple[str, ...]
    reference_image: LazyImage
    options: OpenOptions

    @property
    def channels(self) -> int:
        """Of every image."""
        return self.reference_image.shape[2]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image = opened(str(self.files[index]), self.options)
        _check_alike(image, self.reference_image)
        return image, self.labels[index]

    def name(self, index: int) -> str:
        """The file's path."""
        return str(self.files[index])

    def alike(self, other: "LazySource") -> "LazySource":
        """These images, whose pixels must be as another source's.

        Raises:
            InputError: those of the first image are not.
        """
        _check_alike(self.reference_image, other.reference_image)
        return replace(self, reference_image=other.reference_image)


def _check_alike(image: LazyImage, other: LazyImage) -> None:
    """Raise InputError if two images differ in their channels, or in whether their pixels are whole numbers."""
    if image.shape[2] != other.shape[2]:
        way = "set data.channels (1 grey, 3 colour, 4 with alpha) to convert them all"
        if image.presence is not None and other.presence is not None:
            way = "extract the features of all slides with one encoder"
        raise InputError(
            f"mixed channel counts: {image.path} has {image.shape[2]} and {other.path} has {other.shape[2]}; {way}"
        )
    if not scaled_alike(image.dtype, other.dtype):
        raise InputError(
            f"mixed types of pixels: {image.path} has {image.dtype} and {other.path} has {other.dtype}; floats are "
            "read as they are, whole numbers scaled to -1 .. 1: convert the one or the other, or leave it out"
        )


def sizes_of(source: Any, check: Callable[[LazyImage], object] | None = None) -> list[tuple[int, int]]:
    """Rows and columns of all images of a source that can be opened, by their headers; `check` is told of each.

    Raises:
        InputError: their channels or types differ, or `check` raises it.
    """
    sizes = []
    for image in chain.from_iterable(opened_examples(source)):
        if check is not None:
            check(image)
        sizes.append(image.shape[:2])
    return sizes


def opened_examples(source: Any) -> Iterator[tuple[LazyImage, ...]]:
    """The image of each example of a source, or all of a patient, of those that can be opened.

    Raises:
        InputError: their channels or types differ.
    """
    for index in range(len(source)):
        try:
            image, _ = source[index]
        except UnreadableImageError:
            continue
        yield image if isinstance(image, tuple) else (image,)


def opened(path: str, options: OpenOptions) -> LazyImage:
    """An image by its header.

    Raises:
        UnreadableImageError: it is missing or broken.
        MissingDependencyError: the package that reads such files is not installed.
    """
    try:
        image = LazyImage(path, options)
        _ = image.shape
        return image
    except MissingDependencyError:
        raise
    except InputError as error:
        raise UnreadableImageError(path, str(error).removeprefix(f"{path} ").removeprefix(f"{path}: ")) from error


def lazy_source(
    title: str,
    files: Files,
    labels: np.ndarray,
    classes: tuple[str, ...],
    channels: int | None,
    pixel_range: tuple[float, float] | None = None,
) -> LazySource:
    """A `LazySource`, whose images are like the first file that can be opened.

    Raises:
        InputError: no files, or none that can be opened and has `channels` or can be converted to them.
    """
    if not len(files):
        raise InputError(f"{title}: no images")
    options = OpenOptions(pixel_range=pixel_range, channels=channels)
    return LazySource(title, files, labels, classes, _first(title, files, options), options)


def _first(title: str, files: Files, options: OpenOptions) -> LazyImage:
    broken = []
    for index in range(len(files)):
        try:
            return opened(str(files[index]), options)
        except UnreadableImageError as error:
            broken.append(str(error))
    raise InputError(f"{title}: no image is readable, e.g. {broken[0]}")


def is_image_folder(folder: str | Path) -> bool:
    """Whether a folder is an image itself, not a place for some."""
    return Path(folder).suffix.lower() == ZARR
