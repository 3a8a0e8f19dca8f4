"""From the settings of a recipe to a dataset."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np

from fitformer._support.listed import listed
from fitformer._support.suggest import suggest
from fitformer.data.copies import contents
from fitformer.data.datasets.arrays import read_arrays, read_digits, read_idx
from fitformer.data.datasets.audio import AudioDataset, sound_pieces
from fitformer.data.datasets.documents import DocumentsDataset, document_ends, end_at_separator
from fitformer.data.datasets.folders import DECODED, LAZY, Columns, read_folder, read_label_files, read_manifest
from fitformer.data.datasets.hub import read_huggingface
from fitformer.data.datasets.images import ImageDataset
from fitformer.data.datasets.lazy_source import LazySource
from fitformer.data.datasets.megapixel import read_megapixel_mnist
from fitformer.data.datasets.patients import PatientSource
from fitformer.data.datasets.sources import Source, subset
from fitformer.data.datasets.targets import strata
from fitformer.data.datasets.text import (
    ByteBuffer,
    BytesDataset,
    Piece,
    file_pieces,
    python_docs,
    python_sources,
    split_pieces,
)
from fitformer.data.labels import Labels, check_classes
from fitformer.data.order import hold_out
from fitformer.data.readers.levels import OpenOptions
from fitformer.data.settings import READ_BY, AudioData, ByteData, ImageData, SegmentData
from fitformer.errors import InputError

Split = Literal["train", "val", "test"]
_VAL_PARTS = ("validation", "val", "valid", "dev")
_TEST_PARTS = ("test", "testing")


Settings = ImageData | ByteData | AudioData


def build_dataset(settings: Settings, split: Split = "train", seed: int = 0) -> ImageDataset | BytesDataset:
    """The training, validation or test part of the data that `settings` describe.

    `seed` drives augmentation and training windows; which examples are held out is `settings.split_seed`'s alone.
    All kinds of dataset have `classes`, `channels`, `describe()` and take `(epoch, index)`.

    Raises:
        InputError: settings that make no sense, or data that are missing or broken.
        MissingDependencyError: a package that this source needs is not installed.
    """
    if split not in ("train", "val", "test"):
        raise InputError(f"split is {split!r}: choose train, val or test")
    _warn_of_ignored(settings)
    if isinstance(settings, ByteData):
        return _build_bytes(settings, split, seed)
    if isinstance(settings, AudioData):
        return _build_audio(settings, split, seed)
    return _build_images(settings, split, seed)


def _warn_of_ignored(settings: Settings) -> None:
    ignored = [
        field.name
        for field in fields(settings)
        if getattr(settings, field.name) != field.default
        and settings.source not in READ_BY.get(field.name, (settings.source,))
    ]
    if ignored:
        warnings.warn(f"data source {settings.source!r} does not read {listed(ignored)}: ignored", stacklevel=3)


def open_options(settings: ImageData) -> OpenOptions:
    """How the files of the data are opened, and others for the same model."""
    return OpenOptions(pixel_range=settings.pixel_range, channels=settings.channels)


def read_parts(settings: ImageData) -> dict[str, Source]:
    """The source's own parts by name; `train` alone where it has no parts.

    Raises:
        InputError: an unknown source, or data that are missing or broken.
    """
    path, classes, channels = settings.path, settings.classes, settings.channels
    lazy = settings.image_size is None
    if lazy and settings.source not in ("folder", "manifest"):
        raise InputError(f"image_size is null, each image's own, which the source {settings.source!r} does not have")
    if channels not in (None, 1, 3, 4) and not lazy:
        raise InputError(f"channels is {channels}: images have 1 (grey), 3 (colour) or 4 (colour and alpha)")
    reading = (LAZY if lazy else DECODED).in_range(settings.pixel_range)
    _check_table(settings)
    columns, labelled = _columns(settings), not isinstance(settings, SegmentData)
    classes = classes if labelled else ()
    match settings.source:
        case "digits":
            return read_digits(channels)
        case "idx":
            return read_idx(path, classes, channels)
        case "arrays":
            return read_arrays(path, classes, channels)
        case "folder":
            asked = (settings.train_part, settings.val_part, settings.test_part)
            return read_folder(path, classes, channels, [part for part in asked if part], reading, labelled)
        case "manifest":
            most = settings.max_unreadable
            return read_manifest(path, columns, classes, channels, most, reading, labelled)
        case "huggingface":
            return read_huggingface(path, settings.subset, columns, classes, channels, settings.pixel_range)
        case "megapixel-mnist":
            assert settings.image_size is not None
            return read_megapixel_mnist(path, settings.image_size, settings.split_seed, channels)
        case other:
            known = ["digits", "idx", "folder", "manifest", "huggingface", "arrays", "megapixel-mnist"]
            raise InputError(f"there is no image source {other!r}{suggest(other, known)} ({listed(known)})")


def _named_part(parts: dict[str, Source], asked: str | None, usual: tuple[str, ...]) -> Source | None:
    if asked is not None and asked not in parts:
        raise InputError(f"there is no part {asked!r}{suggest(asked, list(parts))} (there are {listed(list(parts))})")
    name = asked or next((name for name in usual if name in parts), None)
    return None if name is None else parts[name]


@dataclass(frozen=True)
class Part:
    """Examples for `train`, `val` or `test`.

    Attributes:
        source: the examples. note: where they come from, in words.
        is_test: they are the test part, or validation uses it.
    """

    source: Source
    note: str
    is_test: bool = False


def choose_part(parts: dict[str, Source], settings: ImageData, split: Split) -> Part:
    """The part for `split`; what the source does not have is held out by seed, a share of each class.

    test: the source's test part, else its validation part, else `holdout` of the training part.
    val: the source's validation part, else `validation` of the training part, else the test part.
    train: what is left. Copies of one image (by content) are never on both sides: of what is held out, the copies in
    the training part are left out, and the note says how many.

    Raises:
        InputError: a part that is not there or of other images than those to train on, or a share that leaves a side
            empty.
    """
    train, val, test = _own_parts(parts, settings)
    whole = len(train.source)
    train = train.without(val, test)
    note = f"; {whole - len(train.source)} copies of held-out images left out" if len(train.source) < whole else ""
    if val and test:
        val = val.without(test)
    test_note = "its own test part" if test else "its own validation part"
    # Where there is one held-out part, it is the test part, too.
    test = test or val
    if test is None:
        train, test = train.split(settings.holdout, settings.split_seed)
        test_note = f"{settings.holdout:.0%} held out by seed {settings.split_seed}"
    val_note = test_note if val is None or val is test else "its own validation part"
    share = settings.validation_share
    # By default only where it can have an image of every class.
    enough = settings.validation is not None or round(share * len(train.source)) >= max(1, len(train.source.classes))
    if val is None and share > 0 and enough:
        train, val = train.split(share, settings.split_seed + 1)
        val_note = f"{share:.0%} of the training part, by seed {settings.split_seed}"
    return {
        "train": Part(train.source, f"to train on{note}"),
        "val": Part((val or test).source, val_note, val is None or val is test),
        "test": Part(test.source, test_note, True),
    }[split]


@dataclass(frozen=True, eq=False)
class _Examples:
    """A source, the number of each example's content, and what a split takes its share of each of.

    See `copies.contents` and `targets.strata`.
    """

    source: Source
    contents: np.ndarray
    strata: np.ndarray

    def without(self, *others: "_Examples | None") -> "_Examples":
        """Without the examples whose contents are others' too.

        Raises:
            InputError: none is left.
        """
        shared = np.isin(self.contents, np.concatenate([_NONE, *(other.contents for other in others if other)]))
        if shared.all():
            raise InputError(f"{self.source.title}: all of its {len(shared)} images are in the held-out part, too")
        return self._at(np.flatnonzero(~shared)) if shared.any() else self

    def split(self, share: float, seed: int) -> "tuple[_Examples, _Examples]":
        """The examples that are kept, and the share that is held out; warns of classes of which none is."""
        source, labels = self.source, self.source.labels
        kept, held = hold_out(len(source), share, seed, self.strata, self.contents)
        if source.classes and (alone := sorted(set(labels.tolist()) - set(labels[held].tolist()))):
            names = [f"{source.classes[label]} ({int((labels == label).sum())})" for label in alone]
            warnings.warn(
                f"{source.title}: holding out {share:.0%} takes none of {len(names)} rare classes, which are not "
                f"measured: {listed(names)}",
                stacklevel=2,
            )
        return self._at(kept), self._at(held)

    def _at(self, indices: np.ndarray) -> "_Examples":
        return _Examples(subset(self.source, indices), self.contents[indices], self.strata[indices])


_NONE = np.zeros(0, dtype=np.int64)


def _own_parts(parts: dict[str, Source], settings: ImageData) -> tuple[_Examples, _Examples | None, _Examples | None]:
    """The source's own parts to train on, to validate on and to test on, where it has them."""
    train = _named_part(parts, settings.train_part, ())
    assert train is not None
    val = _alike(train, _named_part(parts, settings.val_part, _VAL_PARTS))
    test = _alike(train, _named_part(parts, settings.test_part, _TEST_PARTS))
    numbers = iter(contents([part for part in (train, val, test) if part is not None]))
    first, *others = (
        None if part is None else _Examples(part, next(numbers), strata(part.labels, settings.number_columns))
        for part in (train, val, test)
    )
    assert first is not None
    return first, others[0], others[1]


def _alike(train: Source, part: Source | None) -> Source | None:
    """A part whose images must have the channels, and the kind of pixels, of those to train on."""
    if isinstance(part, LazySource) and isinstance(train, LazySource):
        return part.alike(train)
    if isinstance(part, PatientSource) and isinstance(train, PatientSource):
        return part.alike(train)
    if part is not None and part.channels != train.channels:
        raise InputError(
            f"mixed channel counts: {part.title} has {part.channels} and {train.title} has {train.channels}; "
            "set data.channels (1 grey, 3 colour, 4 with alpha) to convert them all"
        )
    return part


def _build_images(settings: ImageData, split: Split, seed: int) -> ImageDataset:
    _check_skipping(settings)
    labels = _labels_of(settings) if isinstance(settings, SegmentData) else None
    if settings.sampling == "balanced" and settings.number_columns is not None:
        raise InputError(f"data.sampling is balanced, of classes; {listed(settings.number_columns.names)} are none")
    part = choose_part(read_parts(settings), settings, split)
    source = part.source
    if labels is not None:
        labels.check(source)
    if isinstance(settings.background, tuple) and len(settings.background) not in (1, source.channels):
        raise InputError(
            f"data.background has {len(settings.background)} levels, and {source.title} has {source.channels} channels"
        )
    return ImageDataset(
        source,
        settings.image_size,
        resize=settings.resize,
        augmentation=settings.augmentation if split == "train" else "none",
        levels=settings.levels,
        seed=seed,
        max_unreadable=settings.max_unreadable,
        note=part.note,
        held_out=split != "train",
        is_test=part.is_test,
        labels=labels,
        columns=settings.number_columns,
    )


def _columns(settings: ImageData) -> Columns:
    names = (settings.image_column, settings.label_column, settings.split_column, settings.patient)
    return Columns(*names, settings.number_columns)


def _check_table(settings: ImageData) -> None:
    """Refuse columns where there is no table, and patients whose pixels have classes."""
    learned, patient = settings.number_columns, settings.patient
    if patient is not None and isinstance(settings, SegmentData):
        raise InputError(
            f"data.patient is {patient!r}; the pixels of each image have classes of their own: remove data.patient"
        )
    if settings.source != "manifest" and (learned is not None or patient is not None):
        what = f"{listed(learned.names)} are columns" if learned else f"data.patient, {patient}, is a column"
        raise InputError(f"{what} of a table: set data.source to manifest, not {settings.source}, and data.path to it")
    if learned is not None and (settings.classes or settings.label_column):
        ignored = "classes" if settings.classes else "label_column"
        warnings.warn(f"{listed(learned.names)} are learned, not classes: data.{ignored} is ignored", stacklevel=4)


def _labels_of(settings: SegmentData) -> Labels:
    """The label images of a recipe.

    Raises:
        InputError: classes, colours, or where they are, are not told.
    """
    check_classes(settings)
    if settings.source not in ("folder", "manifest"):
        raise InputError(f"data.source is {settings.source!r}; masks of classes go with a folder or a manifest")
    if settings.labels is not None:
        return Labels.in_folder(settings)
    if settings.source == "folder":
        raise InputError("data.labels is null: give the folder of masks, which are named as the images")
    return Labels.in_table(settings, read_label_files(settings.path, _columns(settings)))


def _check_skipping(settings: ImageData) -> None:
    for name in ("tolerance", "min_foreground"):
        if not 0 <= getattr(settings, name) < 1:
            raise InputError(f"data.{name} is {getattr(settings, name)}: a share from 0 to below 1")
    if settings.background_patches and settings.background == "none" and settings.masks is None:
        raise InputError("data.background_patches is of what data.background or data.masks leave out; set one of them")
    if settings.min_foreground and settings.background == "none" and settings.masks is None:
        warnings.warn(
            "data.min_foreground is of groups that data.background or data.masks leave out: ignored", stacklevel=4
        )


def _build_bytes(settings: ByteData, split: Split, seed: int) -> BytesDataset:
    match settings.source:
        case "python-sources":
            pieces = python_sources()
        case "python-docs":
            pieces = python_docs()
        case "files":
            pieces = file_pieces(settings.path, settings.glob)
        case other:
            known = ["python-sources", "python-docs", "files"]
            raise InputError(f"there is no byte source {other!r}{suggest(other, known)} ({listed(known)})")
    separator = None if settings.separator is None else settings.separator.encode()
    chosen, title, is_test = _sequence_part(pieces, settings, split, separator)
    buffer = ByteBuffer(chosen)
    if settings.documents:
        dataset: BytesDataset = DocumentsDataset(buffer, document_ends(buffer, separator), settings.length, title=title)
    else:
        dataset = BytesDataset(
            buffer,
            settings.length,
            train=split == "train",
            seed=seed,
            title=title,
            short_length=settings.short_length,
        )
    dataset.is_test = is_test
    return dataset


def _build_audio(settings: AudioData, split: Split, seed: int) -> AudioDataset:
    pieces, note = sound_pieces(settings.path, settings.sample_rate, settings.resample)
    chosen, title, is_test = _sequence_part(pieces, settings, split)
    dataset = AudioDataset(
        chosen, settings.length, settings.sample_rate, note=note, train=split == "train", seed=seed, title=title
    )
    dataset.is_test = is_test
    return dataset


def _sequence_part(
    pieces: Sequence[Piece], settings: ByteData | AudioData, split: Split, separator: bytes | None = None
) -> tuple[Sequence[Piece], str, bool]:
    """The pieces of a part, its title, and whether it is the test part."""
    parts = dict.fromkeys(("val", "test"), "held out")
    train, held = _split_bytes(pieces, settings.holdout, settings.split_seed, separator)
    chosen, is_test = {"train": train, "val": held, "test": held}, split != "train"
    if settings.validation_share > 0:
        share, seed_of_val = settings.validation_share, settings.split_seed + 1
        chosen["train"], chosen["val"] = _split_bytes(train, share, seed_of_val, separator)
        parts["val"], is_test = "held out for validation", split == "test"
    return chosen[split], f"{settings.path or settings.source} {parts.get(split, 'to train on')}", is_test


def _split_bytes(
    pieces: Sequence[Piece], share: float, seed: int, separator: bytes | None
) -> tuple[Sequence[Piece], Sequence[Piece]]:
    """Kept and held-out pieces, as `split_pieces`; a single file is cut where a document ends."""
    kept, held = split_pieces(pieces, share, seed)
    return (kept, held) if separator is None else end_at_separator(kept, held, separator)
