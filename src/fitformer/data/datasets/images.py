"""A dataset of images: size, channels, pixel values and augmentation on top of a source."""

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, default_collate

from fitformer._support.listed import listed
from fitformer.data.datasets.patients import members
from fitformer.data.datasets.sources import Source
from fitformer.data.decoding import UnreadableImageError
from fitformer.data.dihedral import SYMMETRIES, TransformedImage, drawn
from fitformer.data.grouping import Grouping
from fitformer.data.labels import UNLABELLED, LabelImage, Labels, check_size
from fitformer.data.order import example_generator
from fitformer.data.pixels import PICTURE, Sampling, fit, jitter, random_crop, shift
from fitformer.data.readers import LazyImage
from fitformer.data.settings import Augmentation, ImageData, NumberColumns, Resize
from fitformer.data.symmetry import IDENTITY, Symmetry
from fitformer.errors import InputError
from fitformer.patching import PatchGrid
from fitformer.patching.any_size import PixelArray

_log = logging.getLogger("fitformer.data")

Augment = Callable[[np.ndarray, tuple[int, int], Resize, np.random.Generator, Sampling], np.ndarray]
CLASSES = Sampling(Image.Resampling.NEAREST, UNLABELLED)
"""How label images are moved: a class has no mean with another."""


def _light(
    pixels: np.ndarray, size: tuple[int, int], resize: Resize, random: np.random.Generator, sampling: Sampling
) -> np.ndarray:
    return jitter(fit(pixels, size, resize, sampling), random, sampling)


def _shift(
    pixels: np.ndarray, size: tuple[int, int], resize: Resize, random: np.random.Generator, sampling: Sampling
) -> np.ndarray:
    return shift(fit(pixels, size, resize, sampling), random, sampling)


def _crop(
    pixels: np.ndarray, size: tuple[int, int], resize: Resize, random: np.random.Generator, sampling: Sampling
) -> np.ndarray:
    return random_crop(pixels, size, random, sampling)


def _crop_flip(
    pixels: np.ndarray, size: tuple[int, int], resize: Resize, random: np.random.Generator, sampling: Sampling
) -> np.ndarray:
    cropped = random_crop(pixels, size, random, sampling)
    return cropped[:, ::-1] if random.random() < 0.5 else cropped


def _turn(
    name: str,
    pixels: np.ndarray,
    size: tuple[int, int],
    resize: Resize,
    random: np.random.Generator,
    sampling: Sampling,
) -> np.ndarray:
    return fit(drawn(name, random).turn(pixels), size, resize, sampling)


AUGMENTATIONS: dict[str, Augment] = {
    "light": _light,
    "crop": _crop,
    "crop-flip": _crop_flip,
    "shift": _shift,
    **{name: partial(_turn, name) for name in SYMMETRIES},
}


def quantize(pixels: np.ndarray, levels: int) -> np.ndarray:
    """Pixels 0 .. 255 to the nearest of `levels` evenly spread values, as their numbers 0 .. levels - 1 (uint8)."""
    return np.rint(pixels * ((levels - 1) / 255)).astype(np.uint8)


def dequantize(values: np.ndarray, levels: int) -> np.ndarray:
    """The pixels 0 .. 255 that the numbers 0 .. levels - 1 stand for (uint8)."""
    return np.rint(values * (255 / (levels - 1))).astype(np.uint8)


def collate_any_size(items: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch whose images, and label images, are lists."""
    rest = default_collate([{name: item[name] for name in ("label", "index")} for item in items])
    lists = [name for name in ("image", "labels") if name in items[0]]
    return {**{name: [item[name] for item in items] for name in lists}, **rest}


def collate_readable(collate: Callable[[list[Any]], dict[str, Any]], items: list[Any]) -> dict[str, Any]:
    """A batch of the items that are there; an empty one if none is."""
    there = [item for item in items if item is not None]
    return collate(there) if there else {}


class ImageDataset(Dataset[dict[str, Any] | None]):
    """Images of one size; `dataset[(epoch, index)]`, or `dataset[index]` for epoch 0.

    An item is `image` uint8 (H, W, ch), with values below `levels` if that is set, `label` int64 () (-1 without
    classes) or, of a source of numbers (`columns`), float32 (k,), and `index`, that of the image handed out. Without an
    `image_size`, `image` is what the source has: an image that is read lazily, or such an image `Turned` (`collate`
    puts them in a list, not in a tensor); of a patient a tuple of them. The
    randomness of augmentation is a function of (seed, epoch, index).

    A file that cannot be read is logged once by name. In training the next readable image stands in for it; of
    `held_out` images the item is None, and `collate` leaves it out, so that a measure counts what is there and nothing
    else. The count is shared by the worker processes of a loader. `is_test` says that these are images of the test
    part, by which nothing may be chosen.

    Raises:
        InputError: bad settings; when read, more than `max_unreadable` unreadable files, or mixed channel counts.
    """

    def __init__(
        self,
        source: Source,
        image_size: int | tuple[int, int] | None,
        *,
        resize: Resize = "crop",
        augmentation: Augmentation = "none",
        levels: int | None = None,
        seed: int = 0,
        max_unreadable: int = 10,
        note: str = "",
        held_out: bool = False,
        is_test: bool = False,
        labels: Labels | None = None,
        columns: NumberColumns | None = None,
    ):
        if augmentation != "none" and augmentation not in AUGMENTATIONS:
            raise InputError(f"augmentation is {augmentation!r}: choose {listed(['none', *AUGMENTATIONS])}")
        if levels is not None and not 2 <= levels <= 256:
            raise InputError(f"levels is {levels}: pixels have 2 to 256 levels")
        self.source, self.seed, self.note = source, seed, note
        self.held_out, self.is_test, self.labels, self.columns = held_out, is_test, labels, columns
        sides = (image_size, image_size) if isinstance(image_size, int) else image_size
        if sides is not None and min(sides) < 1:
            raise InputError(f"image_size is {image_size}: its sides must be at least 1")
        if sides is None and levels is not None:
            raise InputError("images of any size are read as they are: remove data.levels")
        if sides is None and augmentation not in ("none", *SYMMETRIES):
            raise InputError(
                f"data.augmentation {augmentation!r} needs the whole image at once, and images of any size are read "
                f"piece by piece: choose {listed(['none', *SYMMETRIES])}"
            )
        self.image_size = sides
        self.resize, self.levels, self.max_unreadable = resize, levels, max_unreadable
        self.augmentation = augmentation
        self._grouping: Grouping | None = None
        # One shared byte per image, so that all workers of a loader see and count what any of them found.
        self._broken = torch.zeros(len(source), dtype=torch.uint8).share_memory_()

    def group_for(self, patch_grid: PatchGrid, glimpses: int, settings: ImageData) -> None:
        """Hand images out as the groups of a model of any size, without those that `settings` call empty.

        Then `image` is a `GroupedImage`. It is made where the data are read, so in the workers of a loader, which also
        read its pixels ahead where these are not too many.
        """
        self._grouping = Grouping(patch_grid, glimpses, settings, self.symmetries)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of their numbers, of images or of their pixels; empty without classes."""
        return self.source.classes if self.labels is None else self.labels.coding.classes

    @property
    def channels(self) -> int:
        """Channels of every image."""
        return self.source.channels

    @property
    def reference_image(self) -> LazyImage | None:
        """Of images of any size, one whose channels and kind of pixels all have; None of images of one size."""
        return None if self.image_size is not None else self.source.reference_image  # type: ignore[attr-defined]

    @property
    def pixels(self) -> str:
        """The type of the pixels, as numpy calls it; images of any size may have others that are scaled alike."""
        return "uint8" if self.reference_image is None else str(self.reference_image.dtype)

    @property
    def symmetries(self) -> tuple[Symmetry, ...]:
        """By which an image of any size may be turned."""
        return SYMMETRIES.get(self.augmentation, (IDENTITY,))

    @property
    def unreadable(self) -> list[str]:
        """Names of the files found unreadable so far."""
        return [self.source.name(index) for index in torch.nonzero(self._broken).flatten().tolist()]

    def describe(self) -> str:
        """One line: what, how many, how large."""
        size = "any size" if self.image_size is None else " x ".join(map(str, self.image_size))
        of = "" if self.labels is None else " of pixels"
        kinds = f"{len(self.classes)} classes{of}" if self.classes else "no classes"
        if self.columns is not None:
            kinds = listed(self.columns.names)
        values = f", {self.levels} levels" if self.levels else ""
        note = f" ({self.note})" if self.note else ""
        patients = members(self.source)
        count = f"{len(self):,} images" if patients is None else f"{len(self):,} patients, {sum(patients):,} images"
        return f"{self.source.title}: {count}, {size} x {self.channels}{values}, {kinds}{note}"

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, where: int | tuple[int, int]) -> dict[str, Any] | None:
        epoch, index = where if isinstance(where, tuple) else (0, where)
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        read = self._read(index)
        if read is None:
            return None
        pixels, label, found = read

        # Drawn anew for an image and for its label image: the same numbers.
        def random() -> np.random.Generator:
            return example_generator(self.seed, epoch, index)

        rest = {"label": torch.tensor(label), "index": found}
        if self.image_size is None:
            images = [pixels, *([] if self.labels is None else [self._labels_of(found, pixels)])]
            if self.augmentation != "none":
                images = [self._turned(each, random()) for each in images]
            labels = {} if self.labels is None else {"labels": images[1]}
            return {"image": self._grouped(images[0]), **labels, **rest}
        image = self._fitted(pixels, random(), PICTURE)
        if self.levels is not None:
            image = quantize(image, self.levels)
        if self.labels is not None:
            whole = self._labels_of(found, pixels).window(0, 0, *pixels.shape[:2])
            classes = self._fitted(whole, random(), CLASSES).copy()
            rest["labels"] = torch.tensor(classes[..., 0]) if self._grouping is None else PixelArray(classes)
        # A copy: arrays in memory and Pillow's are read-only, and a flipped one runs backwards.
        return {"image": self._grouped(torch.tensor(image.copy())), **rest}

    def _fitted(self, pixels: np.ndarray, random: np.random.Generator, sampling: Sampling) -> np.ndarray:
        """Pixels (H, W, ch) at the one size, moved about as the augmentation says."""
        assert self.image_size is not None
        augment = AUGMENTATIONS.get(self.augmentation)
        if augment is None:
            return fit(pixels, self.image_size, self.resize, sampling)
        return augment(pixels, self.image_size, self.resize, random, sampling)

    def _labels_of(self, index: int, image: Any) -> LabelImage:
        """The label image of an image that was read."""
        assert self.labels is not None
        path = self.source.name(index)
        found = self.labels.of(path)
        check_size(found, path, image.shape[:2])
        return found

    def label_images(self) -> Iterator[LabelImage]:
        """Those of all images, as they are in their files."""
        assert self.labels is not None
        yield from self.labels.all_of(self.source)

    def _turned(self, image: Any, random: np.random.Generator) -> Any:
        """An image of any size, or each of a patient's, turned at random."""
        if isinstance(image, tuple):
            return tuple(self._turned(each, random) for each in image)
        return TransformedImage(image, drawn(self.augmentation, random))

    def _grouped(self, image: Any) -> Any:
        return image if self._grouping is None else self._grouping(image)

    @property
    def collate(self) -> Callable[[list[dict[str, Any]]], dict[str, Any]] | None:
        """How items become a batch; None for the usual way."""
        lists = self.image_size is None or self._grouping is not None
        inner = collate_any_size if lists else None
        return partial(collate_readable, inner or default_collate) if self.held_out else inner

    def _read(self, index: int) -> tuple[Any, int, int] | None:
        """The image at `index`, or the next one after it that can be read; held out, None in place of the next."""
        for step in range(1 if self.held_out else len(self)):
            place = (index + step) % len(self)
            if not self._broken[place]:
                try:
                    return *self.source[place], place
                except UnreadableImageError as broken:
                    self._note(place, broken)
        if self.held_out and not self._broken.all():
            return None
        raise InputError(f"no image of {self.source.title} is readable")

    def _note(self, place: int, broken: UnreadableImageError) -> None:
        self._broken[place] = 1
        count = int(self._broken.sum(dtype=torch.int64))
        if count > self.max_unreadable:
            raise InputError(
                f"{count} images of {self.source.title} are unreadable, more than max_unreadable, "
                f"{self.max_unreadable}: {listed(self.unreadable)}"
            )
        instead = "it is left out" if self.held_out else "the next one stands in"
        _log.warning("unreadable image %s; %s (%d so far)", broken, instead, count)
