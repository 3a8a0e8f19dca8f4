"""What a recipe says about its data: plain frozen numbers and words, nothing imported that is slow.

Every field has a default; `fitformer.data.build` checks them together and turns them into a dataset.
A field that the chosen source does not read gives a warning when it is set (see `READ_BY`).
"""

from dataclasses import dataclass
from math import inf
from typing import Literal

from fitformer.errors import InputError

ImageSource = Literal["digits", "idx", "folder", "manifest", "huggingface", "arrays", "megapixel-mnist"]
ByteSource = Literal["python-sources", "python-docs", "files"]
Augmentation = Literal["none", "light", "crop", "crop-flip", "shift", "flip", "dihedral"]
Resize = Literal["crop", "stretch", "pad"]
# Beyond any that sound is recorded at.
MOST_SAMPLE_RATE = 1_000_000
Background = Literal["none", "white", "black", "auto"] | float | tuple[float, ...]


@dataclass(frozen=True)
class NumberColumns:
    """Columns of a table whose numbers are learned.

    Attributes:
        names: of the columns. kind: any numbers, labels (0 or 1), or `survival`: a time and an event (0 or 1).
    """

    names: tuple[str, ...]
    kind: Literal["number", "label", "survival"]


@dataclass(frozen=True)
class ImageData:
    """Images, with or without classes.

    Attributes:
        source: `digits` (scikit-learn's, embedded), `idx` (MNIST family, a folder of idx files, gzip or not), `folder`
            (a class per subfolder, or flat and without classes), `manifest` (CSV or Parquet table of paths),
            `huggingface` (a name on the Hub, or a local folder that `datasets` reads), `arrays` (one .npz file with
            `images` (k, H, W[, ch]) uint8 and, for classes, `labels` and `categories`), `megapixel-mnist` (canvases of
            `image_size` with five digits each, made of the MNIST files in a folder; `split_seed` says which canvases).
        path: folder, file or Hub name; `digits` needs none.
        subset: the configuration of a Hub dataset that has several.
        image_size: side, or (rows, columns), of the images handed out, in pixels. None (of a `folder` or `manifest`)
            is each image's own, read lazily from TIFF, OME-TIFF, Zarr, slides and so on; for a model with
            `latent_position: row_column`.
        resize: how an image of another shape gets there: `crop` (scale the shorter side, cut the centre), `stretch`,
            or `pad` (scale the longer side, the colour of its rim round it).
        channels: 1 grey, 3 colour, 4 colour and alpha; images are converted. None keeps what the files have,
            which must then be the same in all of them.
        pixel_range: the numbers in the files that are black and white, such as [0, 4095] for 12 bits stored as 16;
            what lies beyond is black or white too. None goes by the type: 0 .. 255, 0 .. 65535; floats and 32 bits,
            which have no range, are then an error, or, for images of any size, floats are read as they are.
        levels: number of pixel values; images then hold 0 .. levels-1 instead of 0 .. 255. 17 gives back the
            digits' own values exactly (at image_size 8).
        classes: names in the order of their numbers; a label outside them is an error. Empty takes what is there.
        image_column, label_column, split_column: of a manifest or Hub dataset; None finds them by name or type.
        patient: column of a manifest that names the patient of each image; all images of a patient are one example.
        train_part, val_part, test_part: the source's own parts, where it has them.
        holdout: share of the examples held out as the test part, where a source has none of its own.
        validation: share of the training part set aside for validation, where a source has no such part; at 0
            validation uses the test part. None is 0.1 for one's own data, if that gives as many images as classes, and
            0 for `digits`, `idx` and `megapixel-mnist`, whose published figures train on all of the training part.
        split_seed: which examples these are.
        sampling: of training images: `uniform`, each once an epoch, or `balanced`, each class equally often.
        augmentation: of training images only. `light`: shift, turn and scale a little (digits); `crop`: random resized
            crop; `crop-flip`: the same and a horizontal flip; `shift`: whole pixels up to a sixteenth of the sides;
            `flip`: mirrored left to right or not; `dihedral`: one of the eight flips and quarter turns. These
            two are the ones for images of any size.
        background: groups that hold nothing else are skipped, by a model with `latent_position: row_column`: `white`,
            `black`, a level or one for each channel, in the numbers of the files (0 .. 65535 with a `pixel_range`);
            `auto` for the commonest colour of each image and its noise; or `none` to skip nothing but what the files
            themselves say has no data. tolerance: how far from it a pixel may be, as a share of the range.
        background_patches: patches that hold nothing else, or where the mask is 0, are absent too: nothing is computed
            for them, and what a model finds is of the other patches.
        min_foreground: groups are skipped, too, in which no larger share of the pixels is something else.
        masks: folder of mask files, named as the images but for their endings, in the images' subfolders or in none;
            groups where the mask is 0 are skipped.
        max_unreadable: number of files that may be unreadable before it is an error; each is logged and replaced.
        num_workers: processes that read ahead.
    """

    source: ImageSource = "digits"
    path: str | None = None
    subset: str | None = None
    image_size: int | tuple[int, int] | None = 32
    resize: Resize = "crop"
    channels: int | None = None
    pixel_range: tuple[float, float] | None = None
    levels: int | None = None
    classes: tuple[str, ...] = ()
    image_column: str | None = None
    label_column: str | None = None
    split_column: str | None = None
    patient: str | None = None
    train_part: str = "train"
    val_part: str | None = None
    test_part: str | None = None
    holdout: float = 0.2
    validation: float | None = None
    split_seed: int = 0
    sampling: Literal["uniform", "balanced"] = "uniform"
    augmentation: Augmentation = "none"
    background: Background = "none"
    tolerance: float = 0.1
    background_patches: bool = False
    min_foreground: float = 0.0
    masks: str | None = None
    max_unreadable: int = 10
    num_workers: int = 0

    def __post_init__(self) -> None:
        _check_counts(max_unreadable=self.max_unreadable, split_seed=self.split_seed, num_workers=self.num_workers)
        _check_shares(validation=self.validation)
        check_pixel_range(self.pixel_range)

    @property
    def validation_share(self) -> float:
        """Of the training part, where a source has no validation part."""
        published = self.source in ("digits", "idx", "megapixel-mnist")
        return (0.0 if published else 0.1) if self.validation is None else self.validation

    @property
    def number_columns(self) -> NumberColumns | None:
        """The columns of a table to learn; None where it is a class."""
        return None


@dataclass(frozen=True)
class RegressData(ImageData):
    """Images with numbers, of a `manifest`.

    Attributes:
        targets: columns of numbers, one or several.
    """

    source: ImageSource = "manifest"
    targets: tuple[str, ...] | str = ()

    @property
    def number_columns(self) -> NumberColumns:
        """The targets."""
        return NumberColumns(_column_names(self.targets), "number")


@dataclass(frozen=True)
class MultilabelData(ImageData):
    """Images with any number of labels, of a `manifest`.

    Attributes:
        targets: columns of 0 and 1, a label each.
    """

    source: ImageSource = "manifest"
    targets: tuple[str, ...] | str = ()

    @property
    def number_columns(self) -> NumberColumns:
        """The labels."""
        return NumberColumns(_column_names(self.targets), "label")


@dataclass(frozen=True)
class SurvivalData(ImageData):
    """Images with a time and whether the event happened then, of a `manifest`.

    Attributes:
        time: column of the time to the event or to the end of the observation, in any unit.
        event: column of 1 where the event happened at that time, 0 where it had not happened yet.
    """

    source: ImageSource = "manifest"
    time: str = "time"
    event: str = "event"

    @property
    def number_columns(self) -> NumberColumns:
        """Time and event."""
        return NumberColumns((self.time, self.event), "survival")


def _column_names(targets: tuple[str, ...] | str) -> tuple[str, ...]:
    names = (targets,) if isinstance(targets, str) else targets
    if not names or not all(names):
        raise InputError("data.targets is empty; name one or several columns of the table, such as [age]")
    if len(set(names)) < len(names):
        raise InputError(f"data.targets names a column twice: {', '.join(names)}")
    return names


# Label images hold classes as bytes, of which one means that there is none.
MOST_CLASSES = 255
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class SegmentData(ImageData):
    """Images of a `folder` or a `manifest`, each with a label image of its own size that gives every pixel a class.

    Subfolders of a folder are places, not classes; parts (train, val, test) are read as ever. Augmentation moves both.

    Attributes:
        labels: folder of label images, named as the images but for their endings, in the images' subfolders or in none.
            None, of a `manifest`, takes the files that its column `label` (or `mask`) names.
        classes: names in the order of their numbers in the label images, at most 255.
        colours: the colour of each class in the label images, as [red, green, blue]. Empty: pixels are class numbers,
            grey values as they are stored or numbers in a palette.
        ignore_index: the number in the label images that means no label, such as 255; None if all have one.
        ignore_colour: the same where `colours` are given.
    """

    source: ImageSource = "folder"
    labels: str | None = None
    colours: tuple[Colour, ...] = ()
    ignore_index: int | None = None
    ignore_colour: Colour | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.classes) > MOST_CLASSES:
            raise InputError(f"classes has {len(self.classes)} names; label images have at most {MOST_CLASSES}")
        for colour in (*self.colours, *([self.ignore_colour] if self.ignore_colour else [])):
            if not all(0 <= level <= 255 for level in colour):
                raise InputError(f"the colour {list(colour)}: red, green and blue are 0 to 255")
        if len(set(self.colours)) < len(self.colours):
            raise InputError(f"colours has one colour twice: {[list(colour) for colour in self.colours]}")
        if self.colours and self.ignore_index is not None:
            raise InputError(f"ignore_index is {self.ignore_index}; with colours, give ignore_colour instead")
        if self.ignore_colour and not self.colours:
            raise InputError(f"ignore_colour is {list(self.ignore_colour)}; without colours, give ignore_index instead")
        if self.background_patches:
            raise InputError("background_patches leaves pixels without an answer; label images have all: remove it")
        if self.levels is not None or self.sampling != "uniform":
            name = "levels" if self.levels is not None else "sampling"
            raise InputError(f"{name} is {getattr(self, name)!r}; label images have no use for it: leave it out")


@dataclass(frozen=True)
class ByteData:
    """Bytes: text or anything else, 256 tokens.

    Attributes:
        source: `python-sources` (the running Python's standard library), `python-docs` (its reference, English)
            or `files`.
        path: a file, or a folder whose files matching `glob` are read in sorted order; only for `files`.
        glob: pattern below the folder, e.g. `**/*.txt`.
        length: tokens of one example; what is missing to whole groups of the model is padding, which counts nowhere.
        short_length: tokens of an example in the first `short_share` of the training, where as many as make up `length`
            take the place of each: what is near is learned first, from more places of the data, and then what is far.
        documents: each file, or each piece of Python's own, is a document of its own: examples are documents packed
            into rows, and none sees another. One that is longer than a row is cut into several.
        separator: text that ends a document, such as a newline, so that a file holds many; only with `documents`.
        holdout: share of the bytes held out: whole files where there are several, else the tail of the one file.
        validation: share of the others set aside for validation; at 0 it uses the held-out part. None is 0.1 for
            `files`, and 0 for Python's own, whose published figures train on all others.
        split_seed: which files these are.
        num_workers: processes that read ahead.
    """

    source: ByteSource = "python-sources"
    path: str | None = None
    glob: str = "**/*"
    length: int = 1024
    short_length: int | None = None
    short_share: float = 0.8
    documents: bool = False
    separator: str | None = None
    holdout: float = 0.1
    validation: float | None = None
    split_seed: int = 0
    num_workers: int = 0

    def __post_init__(self) -> None:
        _check_counts(split_seed=self.split_seed, num_workers=self.num_workers)
        if self.length < 1:
            raise InputError(f"length is {self.length}; an example has at least 1 token")
        if self.short_length is not None:
            _check_short(self.short_length, self.length, self.documents)
        if not 0 <= self.short_share <= 1:
            raise InputError(f"short_share is {self.short_share}: a share from 0 to 1 of the training's steps")
        if self.separator is not None and not (self.documents and self.separator):
            raise InputError(
                f"separator is {self.separator!r}; it is text of at least one character, beside documents: true"
            )
        _check_shares(validation=self.validation)

    @property
    def validation_share(self) -> float:
        """Of the bytes that are not held out."""
        return (0.1 if self.source == "files" else 0.0) if self.validation is None else self.validation


@dataclass(frozen=True)
class AudioData:
    """Sound: one channel of mu-law codes, 256 tokens (`fitformer.data.mu_law`).

    Attributes:
        source: `wav`, WAV files of 8 to 64 bits or floats; several channels are averaged.
        path: a file, or a folder whose WAV files are read in sorted order, with those of its subfolders.
        sample_rate: samples a second.
        resample: bring files of another rate to this one, by a polyphase filter; without it they are an error.
        length: samples of one example.
        holdout: share of the samples held out: whole files where there are several, else the end of the one file.
        validation: share of the others set aside for validation; at 0 it uses the held-out part. None is 0.1.
        split_seed: which files these are.
        num_workers: processes that read ahead.
    """

    source: Literal["wav"] = "wav"
    path: str | None = None
    sample_rate: int = 16000
    resample: bool = False
    length: int = 4096
    holdout: float = 0.1
    validation: float | None = None
    split_seed: int = 0
    num_workers: int = 0

    def __post_init__(self) -> None:
        _check_counts(split_seed=self.split_seed, num_workers=self.num_workers)
        _check_shares(validation=self.validation)
        if not 1 <= self.sample_rate <= MOST_SAMPLE_RATE:
            raise InputError(
                f"sample_rate is {self.sample_rate}; it must lie between 1 and {MOST_SAMPLE_RATE} samples a second"
            )

    @property
    def validation_share(self) -> float:
        """Of the samples that are not held out."""
        return 0.1 if self.validation is None else self.validation


def check_pixel_range(pixel_range: tuple[float, float] | None) -> None:
    """Raise InputError if there is a range, and it is not two numbers in order."""
    if pixel_range is not None and not -inf < pixel_range[0] < pixel_range[1] < inf:
        low, high = pixel_range
        raise InputError(f"pixel_range is {low}, {high}: give two numbers, black before the larger one, white")


def _check_short(short: int, length: int, documents: bool) -> None:
    """Raise InputError if no examples of `short` make up one of a length."""
    if documents:
        raise InputError("short_length draws windows of one text, and documents are packed in rows: remove one of them")
    if not 1 <= short <= length or length % short:
        raise InputError(f"short_length is {short}; it must divide length, {length}")


def _check_shares(**shares: float | None) -> None:
    for name, share in shares.items():
        if share is not None and not 0 <= share < 1:
            raise InputError(f"{name} is {share}: a share from 0 to below 1")


def _check_counts(**counts: int) -> None:
    """Refuse negative numbers, and those that no 64 bits hold."""
    for name, count in counts.items():
        if not 0 <= count < 2**63:
            raise InputError(f"{name} is {count}; it must be at least 0 and below 2**63")


READ_BY: dict[str, tuple[str, ...]] = {
    "path": ("idx", "folder", "manifest", "huggingface", "arrays", "megapixel-mnist", "files", "wav"),
    "subset": ("huggingface",),
    "glob": ("files",),
    "classes": ("idx", "folder", "manifest", "huggingface", "arrays"),
    "image_column": ("manifest", "huggingface"),
    "label_column": ("manifest", "huggingface"),
    "split_column": ("manifest",),
    "train_part": ("folder", "manifest", "huggingface"),
    "val_part": ("folder", "manifest", "huggingface"),
    "test_part": ("folder", "manifest", "huggingface"),
    "masks": ("folder", "manifest"),
    "max_unreadable": ("folder", "manifest", "huggingface"),
    "pixel_range": ("folder", "manifest", "huggingface"),
}
"""Which sources read an option that not all of them read."""
