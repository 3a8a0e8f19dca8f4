"""Label images: the class of every pixel of an image, read window by window."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from fitformer._support.listed import listed
from fitformer.data.datasets.lazy_source import opened
from fitformer.data.decoding import UnreadableImageError
from fitformer.data.masks import Masks
from fitformer.data.readers import LazyImage
from fitformer.data.readers.levels import OpenOptions
from fitformer.data.settings import MOST_CLASSES, SegmentData
from fitformer.errors import InputError

UNLABELLED = MOST_CLASSES
"""In place of a class: that a pixel has none, or was not seen."""
_WRONG = -1


@dataclass(frozen=True)
class Coding:
    """What the pixels of label images mean, see `SegmentData`."""

    classes: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...] = ()
    ignore_index: int | None = None
    ignore_colour: tuple[int, int, int] | None = None

    @classmethod
    def of(cls, settings: SegmentData) -> "Coding":
        """That of a recipe."""
        return cls(settings.classes, settings.colours, settings.ignore_index, settings.ignore_colour)

    def numbers(self, pixels: np.ndarray, path: str) -> np.ndarray:
        """Classes uint8 (rows, columns, 1), `UNLABELLED` where there is none, of pixels as they are in a file.

        Raises:
            InputError: a number or a colour that is no class (names the pixel), or another number of channels.
        """
        values = self._colour_codes(pixels, path) if self.colours else self._plain(pixels, path)
        known, classes = self._table()
        place = np.searchsorted(known, values).clip(max=len(known) - 1)
        found = np.where(known[place] == values, classes[place], _WRONG)
        if (found == _WRONG).any():
            raise InputError(self._unknown(pixels, found, path))
        return found.astype(np.uint8)[..., None]

    def _table(self) -> tuple[np.ndarray, np.ndarray]:
        """Values, sorted, and the class of each."""
        codes = [_code(colour) for colour in self.colours] or list(range(len(self.classes)))
        table = dict(zip(codes, range(len(codes)), strict=True))
        ignored = self.ignore_colour and _code(self.ignore_colour) if self.colours else self.ignore_index
        if ignored is not None:
            table[ignored] = UNLABELLED
        return np.array(sorted(table), dtype=np.int64), np.array([table[value] for value in sorted(table)], np.int16)

    def _plain(self, pixels: np.ndarray, path: str) -> np.ndarray:
        if pixels.shape[2] != 1:
            raise InputError(
                f"the mask {path} has {pixels.shape[2]} channels, and class numbers have 1: give the colour of each "
                "class as data.colours, or store class numbers as grey or as a palette"
            )
        values = pixels[..., 0].astype(np.int64)
        # Whole numbers with a sign are read as floats; what is no whole number is no class.
        return np.where(values == pixels[..., 0], values, _WRONG)

    def _colour_codes(self, pixels: np.ndarray, path: str) -> np.ndarray:
        if pixels.dtype != np.uint8:
            raise InputError(f"the mask {path} has {pixels.dtype} pixels, and data.colours are of 8 bits: store it so")
        wide = pixels.astype(np.int64)[..., [0, 0, 0] if pixels.shape[2] == 1 else [0, 1, 2]]
        return wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]

    def _unknown(self, pixels: np.ndarray, found: np.ndarray, path: str) -> str:
        row, column = np.argwhere(found == _WRONG)[0].tolist()
        value = pixels[row, column]
        if self.colours:
            now = "none" if self.ignore_colour is None else str(list(self.ignore_colour))
            return (
                f"the mask {path} has the colour {value[:3].tolist()}, which is none of the {len(self.colours)} "
                f"data.colours: add its class, or if it means no label, set data.ignore_colour (now {now})"
            )
        now = "null" if self.ignore_index is None else str(self.ignore_index)
        return (
            f"the mask {path} has the class {value[0]:g}, and there are {len(self.classes)} classes, 0 .. "
            f"{len(self.classes) - 1}: name it in data.classes, or if it means no label, set data.ignore_index (now "
            f"{now})"
        )


def _code(colour: tuple[int, int, int]) -> int:
    red, green, blue = colour
    return red << 16 | green << 8 | blue


# Not a dataclass: in a batch, Lightning takes those apart.
class LabelImage:
    """The classes of an image's pixels as a source of windows of one channel, uint8, `UNLABELLED` where there is none.

    Raises:
        UnreadableImageError: the file is missing or broken.
    """

    def __init__(self, path: str, coding: Coding) -> None:
        self.coding = coding
        self.image: LazyImage = opened(path, OpenOptions(palette_indices=not coding.colours))

    @property
    def path(self) -> str:
        """Of the file."""
        return self.image.path

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows, columns, 1."""
        return (*self.image.shape[:2], 1)

    @property
    def dtype(self) -> np.dtype:
        """uint8."""
        return np.dtype(np.uint8)

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns that are decoded at once."""
        return self.image.tile

    def window(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """Classes `(height, width, 1)` of a window.

        Raises:
            InputError: what `Coding.numbers` refuses, or the file is broken there.
        """
        return self.coding.numbers(self.image.window(top, left, height, width), self.path)

    def thumbnail(self, rows: int, columns: int) -> np.ndarray:
        """Classes are numbers that have no mean."""
        raise NotImplementedError


class _Files(Protocol):
    """Which label image belongs to which image."""

    def take(self, path: str) -> os.PathLike[str] | str:
        """That of an image, which no other image has; raises InputError if it has none."""


@dataclass(frozen=True)
class _Column:
    """The label images that a manifest names, by the path of the image."""

    files: Mapping[str, str]
    title: str

    def take(self, path: str) -> str:
        found = self.files.get(os.path.abspath(path), "")
        if not found:
            raise InputError(f"{path} needs a mask, and {self.title} names none: add it, or leave the image out")
        return found


class Labels:
    """The label images of a dataset's images."""

    def __init__(self, files: _Files, coding: Coding) -> None:
        self.files, self.coding = files, coding

    @classmethod
    def in_folder(cls, settings: SegmentData) -> "Labels":
        """Those of a folder, named as the images, see `Masks`."""
        assert settings.labels is not None
        return cls(Masks(settings.labels, "data.labels"), Coding.of(settings))

    @classmethod
    def in_table(cls, settings: SegmentData, files: Mapping[str, str]) -> "Labels":
        """Those that a manifest names beside the images."""
        absolute = {os.path.abspath(image): label for image, label in files.items()}
        return cls(_Column(absolute, str(settings.path)), Coding.of(settings))

    def of(self, path: str) -> LabelImage:
        """That of an image.

        Raises:
            InputError: there is none, or it cannot be read.
        """
        try:
            return LabelImage(str(self.files.take(path)), self.coding)
        except UnreadableImageError as error:
            raise InputError(f"the mask of {path} cannot be read: {error}") from error

    def check(self, source: Any) -> None:
        """Check by their headers that all images that can be opened have a label image of their own size.

        Raises:
            InputError: one has none, or one of another size.
        """
        for index in range(len(source)):
            path = source.name(index)
            try:
                image = opened(path, OpenOptions())
            except UnreadableImageError:
                continue
            check_size(self.of(path), path, image.shape[:2])

    def all_of(self, source: Any) -> Iterator[LabelImage]:
        """Those of all images of a source."""
        yield from (self.of(source.name(index)) for index in range(len(source)))


def check_size(labels: LabelImage, path: str, size: tuple[int, ...]) -> None:
    """Raise InputError if a label image has another size than its image."""
    rows, columns = labels.shape[:2]
    if (rows, columns) != tuple(size):
        raise InputError(
            f"the mask {labels.path} has {rows} x {columns} pixels and {path} {size[0]} x {size[1]}: a mask of classes "
            "has the size of its image"
        )


def check_classes(settings: SegmentData) -> None:
    """Raise InputError if the classes are not told, or colours do not go with them."""
    if not settings.classes:
        raise InputError(
            "data.classes is empty: name the classes of the masks in the order of their numbers, such as [sky, road]"
        )
    if settings.colours and len(settings.colours) != len(settings.classes):
        raise InputError(
            f"data.colours has {len(settings.colours)} colours and data.classes {len(settings.classes)} names: "
            f"give one for each of {listed(list(settings.classes), 5)}"
        )
