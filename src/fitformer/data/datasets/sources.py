"""The protocol of image sources, and the numbering of class names."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fitformer._support.listed import listed
from fitformer._support.suggest import suggest
from fitformer.data.decoding import UnreadableImageError, decode, header_channels
from fitformer.data.pixels import convert
from fitformer.errors import InputError

UNLABELLED = -1


class Source(Protocol):
    """A sequence of images with labels."""

    @property
    def title(self) -> str:
        """The name of the source, for messages."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Names in the order of their numbers; empty without classes."""
        ...

    @property
    def channels(self) -> int:
        """Of every image."""
        ...

    @property
    def labels(self) -> np.ndarray:
        """Class numbers int64 (len,), `UNLABELLED` throughout if there are no classes; or numbers float32 (len, k)."""
        ...

    def __len__(self) -> int:
        """Number of images."""
        ...

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """Pixels (H, W, ch) uint8 and its label; raises `UnreadableImageError` for a broken file."""
        ...

    def name(self, index: int) -> str:
        """The name of an image, for messages."""
        ...


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Images (k, H, W, ch) uint8 in memory, handed out with `channels`."""

    title: str
    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    channels: int

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return convert(self.images[index], self.channels), int(self.labels[index])

    def name(self, index: int) -> str:
        """`image <index> of <title>`."""
        return f"image {index} of {self.title}"


class Files(Protocol):
    """Paths, or the contents of image files."""

    def __len__(self) -> int:
        """How many."""
        ...

    def __getitem__(self, index: int) -> str | bytes:
        """One of them."""
        ...


@dataclass(frozen=True, eq=False)
class FileSource:
    """Image files, decoded when asked for: converted to `channels`, or with `convert` off an error if they differ."""

    title: str
    files: Files
    labels: np.ndarray
    classes: tuple[str, ...]
    channels: int
    convert: bool
    pixel_range: tuple[float, float] | None = None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[np.ndarray, Any]:
        file = self.files[index]
        name = _file_name(self.title, file, index)
        pixels = decode(file, name, self.channels if self.convert else None, self.pixel_range)
        check_channels(pixels.shape[2], self.channels, name, self.title)
        return pixels, self.labels[index]

    def name(self, index: int) -> str:
        """The file's path, where it has one."""
        return _file_name(self.title, self.files[index], index)


def _file_name(title: str, file: str | bytes, index: int) -> str:
    return file if isinstance(file, str) else f"image {index} of {title}"


def file_source(
    title: str,
    files: Files,
    labels: np.ndarray,
    classes: tuple[str, ...],
    channels: int | None,
    pixel_range: tuple[float, float] | None = None,
) -> FileSource:
    """A `FileSource`; without `channels`, with those that all files have.

    Raises:
        InputError: no files; or files of different channel counts, as far as the headers of a thousand of them tell
            (the others are checked when they are read).
    """
    if not len(files):
        raise InputError(f"{title}: no images")
    converts = channels is not None
    known = channels or common_channels(title, files, pixel_range)
    return FileSource(title, files, labels, classes, known, converts, pixel_range)


@dataclass(frozen=True, eq=False)
class Subset:
    """Some images of another source, int64 `indices` into it."""

    whole: Source
    indices: np.ndarray

    @property
    def title(self) -> str:
        """That of the whole."""
        return self.whole.title

    @property
    def classes(self) -> tuple[str, ...]:
        """Those of the whole, whether or not all occur here."""
        return self.whole.classes

    @property
    def channels(self) -> int:
        """That of the whole."""
        return self.whole.channels

    @property
    def labels(self) -> np.ndarray:
        """Those of the images."""
        return self.whole.labels[self.indices]

    @property
    def reference_image(self) -> Any:
        """That of the whole, where it has one."""
        return self.whole.reference_image  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.whole[int(self.indices[index])]

    def name(self, index: int) -> str:
        """As in the whole."""
        return self.whole.name(int(self.indices[index]))


def subset(source: Source, indices: np.ndarray) -> Subset:
    """The images at int64 `indices`; those of a subset count in the same whole."""
    if isinstance(source, Subset):
        return Subset(source.whole, source.indices[indices])
    return Subset(source, indices)


def unlabelled(count: int) -> np.ndarray:
    """Labels of `count` images without classes."""
    return np.full(count, UNLABELLED, dtype=np.int64)


def check_channels(found: int, expected: int, name: str, title: str) -> None:
    """Raise InputError if an image's channel count is not that of the others."""
    if found != expected:
        raise InputError(
            f"mixed channel counts: {name} has {found} and others of {title} have {expected}; "
            f"set channels (1 grey, 3 colour, 4 with alpha) to convert them all"
        )


def common_channels(title: str, files: Files, pixel_range: tuple[float, float] | None = None, most: int = 1000) -> int:
    """The channel count that up to `most` files, evenly spread, share; broken ones are passed over.

    Raises:
        InputError: they differ, or none of them is readable.
    """
    common, first_broken = 0, ""
    for index in np.unique(np.linspace(0, len(files) - 1, min(most, len(files))).astype(int)).tolist():
        file = files[index]
        name = _file_name(title, file, index)
        try:
            found = header_channels(file, name, pixel_range)
        except UnreadableImageError as broken:
            first_broken = first_broken or str(broken)
            continue
        common = common or found
        check_channels(found, common, name, title)
    if not common:
        raise InputError(f"{title}: no image is readable, e.g. {first_broken}")
    return common


def in_order(names: set[str]) -> tuple[str, ...]:
    """Class names in their natural order: as numbers if all are, else by letter."""
    try:
        return tuple(sorted(names, key=float))
    except ValueError:
        return tuple(sorted(names))


def number_labels(names: Sequence[str], classes: tuple[str, ...], where: str) -> np.ndarray:
    """Class numbers int64 of class names; a whole number that is no name counts as the class of that number.

    Raises:
        InputError: a label outside `classes`, with the nearest.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    for index, name in enumerate(names):
        if name not in numbers:
            numbers[name] = _as_number(name, classes, f"image {index} of {where}")
    return np.array([numbers[name] for name in names], dtype=np.int64)


def _as_number(name: str, classes: tuple[str, ...], where: str) -> int:
    try:
        number = int(name)
    except ValueError:
        hint = suggest(name, classes, f"; the classes are {listed(classes)}")
        raise InputError(f"{where} has the unknown label {name!r}{hint}") from None
    check_range(np.array([number]), len(classes), where)
    return number


def check_range(labels: np.ndarray, classes: int, where: str) -> None:
    """Raise InputError if a class number is outside 0 .. classes - 1."""
    outside = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(outside):
        raise InputError(
            f"class out of range: {where} has the label {labels[outside[0]]}, and there are {classes} classes, "
            f"0 .. {classes - 1}; give all of them in `classes`, in order"
        )


def existing(path: str | os.PathLike[str] | None, source: str, kind: str) -> Path:
    """The `path` setting as a path that exists.

    Raises:
        InputError: it is missing, with the nearest name beside it.
    """
    if path is None:
        raise InputError(f"data source {source!r} needs a path: set data.path to {kind}")
    found = Path(path).expanduser()
    if not found.exists():
        beside = [entry.name for entry in found.parent.iterdir()] if found.parent.is_dir() else []
        raise InputError(f"data source {source!r}: there is no {found}{suggest(found.name, beside)}")
    return found
