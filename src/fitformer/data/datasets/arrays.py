"""Images that come as arrays: scikit-learn's digits, idx files of the MNIST family, .npz files."""

import gzip
import io
import re
import zipfile
import zlib
from pathlib import Path

import numpy as np

from fitformer._support.listed import listed
from fitformer.data.datasets.sources import ArraySource, Source, check_range, existing, number_labels, unlabelled
from fitformer.errors import InputError, require

_UINT8 = 8
# Beyond the number of images, which would be a mistake.
_MOST_CLASSES = 10_000


def array_source(
    title: str, images: np.ndarray, labels: np.ndarray | None, classes: tuple[str, ...], channels: int | None
) -> ArraySource:
    """Images (k, H, W) or (k, H, W, ch) uint8 and labels (k,), checked against each other.

    Raises:
        InputError: no images, wrong shapes or types, not as many labels as images, a label outside `classes`.
    """
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[3] not in (1, 3, 4) or not images.size:
        raise InputError(
            f"{title} has images of shape {images.shape} and type {images.dtype}: "
            "they must be (k, H, W) or (k, H, W, 1, 3 or 4) of uint8"
        )
    if labels is None:
        labels, classes = unlabelled(len(images)), ()
    elif labels.shape != (len(images),):
        raise InputError(f"{title} has {len(images)} images and labels of shape {labels.shape}: each needs one label")
    else:
        labels = _whole_numbers(labels, classes, title)
        classes = classes or tuple(str(number) for number in range(_count(labels, title)))
        check_range(labels, len(classes), title)
    return ArraySource(title, images, labels, classes, channels or images.shape[3])


def _whole_numbers(labels: np.ndarray, classes: tuple[str, ...], title: str) -> np.ndarray:
    """Labels as class numbers int64.

    Raises:
        InputError: they are no whole numbers.
    """
    if labels.dtype.kind in "US":
        names = [str(label) for label in labels.astype(str).tolist()]
        if not classes:
            raise InputError(
                f"{title} has labels of text, such as {names[0]!r}: name them in data.classes or in the array "
                "'categories', or store their numbers"
            )
        return number_labels(names, classes, title)
    if labels.dtype.kind not in "buif":
        raise InputError(f"{title} has labels of type {labels.dtype}: give the whole numbers of classes, from 0")
    if len(wrong := labels[~(np.isfinite(labels) & (labels == np.floor(labels)))]):
        raise InputError(f"{title} has the label {wrong[0]}: labels are the whole numbers of classes, from 0")
    return labels.astype(np.int64)


def _count(labels: np.ndarray, title: str) -> int:
    """How many classes there are, by the largest number.

    Raises:
        InputError: far more than there are images.
    """
    most = int(labels.max()) + 1
    if most > max(_MOST_CLASSES, len(labels)):
        raise InputError(
            f"{title} has the label {most - 1:,} and {len(labels):,} images: number the classes from 0 on, without gaps"
        )
    return most


def read_digits(channels: int | None = None) -> dict[str, Source]:
    """The 1,797 images of 8 x 8 in scikit-learn; their 17 grey levels spread over 0 .. 255.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """
    digits = require("sklearn.datasets", extra="train").load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return {"train": array_source("digits", images, digits.target, (), channels)}


def read_arrays(path: str | None, classes: tuple[str, ...], channels: int | None) -> dict[str, Source]:
    """One .npz file: `images` (k, H, W[, ch]) uint8 and, for classes, `labels` (k,) and names, `categories`.

    Raises:
        InputError: a missing or broken file, or arrays that do not fit together.
    """
    file = existing(path, "arrays", "a .npz file")
    try:
        # Opened here, because numpy leaves a broken file open.
        with open(file, "rb") as stream, np.load(stream, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in ("images", "labels", "categories") if name in stored}
            names = list(stored)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, AttributeError, TypeError) as error:
        raise InputError(f"{file} is not a whole .npz file: {' '.join(str(error).split())}") from error
    if "images" not in arrays:
        raise InputError(f"{file} has no array 'images'; it has {listed(names)}")
    classes = classes or tuple(str(name) for name in arrays.get("categories", ()))
    return {"train": array_source(file.name, arrays["images"], arrays.get("labels"), classes, channels)}


def read_idx(path: str | None, classes: tuple[str, ...], channels: int | None) -> dict[str, Source]:
    """A folder with MNIST's four files (`train-images-idx3-ubyte` and so on), gzip or not; the test files may lack.

    Raises:
        InputError: files are missing, ambiguous, truncated or disagree.
    """
    folder = existing(path, "idx", "the folder with the idx files")
    parts = {"train": "train", "test": "(t10k|test)"}
    files = {
        part: (_find(folder, pattern, "images"), _find(folder, pattern, "labels")) for part, pattern in parts.items()
    }
    if None in files["train"] or (files["test"][0] is None) != (files["test"][1] is None):
        raise InputError(
            f"{folder} lacks idx files: expected train-images-idx3-ubyte, train-labels-idx1-ubyte, "
            f"t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte (.gz or not); it has "
            f"{listed(sorted(entry.name for entry in folder.iterdir())) or 'nothing'}"
        )
    labels = {part: read_idx_file(pair[1]) for part, pair in files.items() if pair[1] is not None}
    count = max(int(numbers.max(initial=0)) for numbers in labels.values()) + 1
    classes = classes or tuple(str(number) for number in range(count))
    return {
        part: array_source(f"{folder.name} {part}", read_idx_file(pair[0]), labels[part], classes, channels)
        for part, pair in files.items()
        if pair[0] is not None
    }


def _find(folder: Path, part: str, kind: str) -> Path | None:
    """The one idx file of that part and kind; of a file and its gzip, the file."""
    if not folder.is_dir():
        raise InputError(f"data source 'idx' needs a folder with idx files: {folder} is a file")
    pattern = re.compile(rf"(.*[-_.])?{part}-{kind}[-.]idx\d-ubyte(\.gz)?")
    found = sorted(entry for entry in folder.iterdir() if pattern.fullmatch(entry.name))
    stems = {entry.name.removesuffix(".gz") for entry in found}
    if len(stems) > 1:
        raise InputError(f"{folder} has several files that may be the {kind}: {listed(sorted(stems))}; keep one set")
    return found[0] if found else None


def read_idx_file(file: Path) -> np.ndarray:
    """The array of an idx file of unsigned bytes, gzip or not.

    Raises:
        InputError: it is no such file, or truncated (both byte counts), or has bytes left over.
    """
    with open(file, "rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
    with gzip.open(file) if zipped else open(file, "rb") as stream:
        head = _read(stream, 4)
        if len(head) < 4 or head[:2] != b"\0\0" or head[2] != _UINT8 or not 1 <= head[3] <= 4:
            raise InputError(
                f"{file} is not an idx file of unsigned bytes: it starts with {head.hex(' ') or 'nothing'}"
            )
        sizes = _read(stream, 4 * head[3])
        shape = tuple(int(size) for size in np.frombuffer(sizes[: len(sizes) // 4 * 4], ">u4"))
        expected = 4 + 4 * head[3] + int(np.prod(shape, dtype=np.int64) if len(shape) == head[3] else 0)
        body = _read(stream, expected - 4 - 4 * head[3] + 1)
    found = 4 + len(sizes) + len(body)
    if found != expected:
        what = "is truncated: it has" if found < expected else "has bytes left over: more than"
        raise InputError(
            f"{file} {what} {min(found, expected)} bytes and its header {shape} tells of {expected}; fetch it again"
        )
    return np.frombuffer(body, np.uint8).reshape(shape)


def _read(stream: io.BufferedIOBase, count: int) -> bytes:
    """Up to `count` bytes: what is there, where a gzip file breaks off."""
    pieces: list[bytes] = []
    try:
        # Not `read`: where a gzip file breaks off, that loses what it had.
        while count > 0 and (piece := stream.read1(min(count, 1 << 20))):
            pieces.append(piece)
            count -= len(piece)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        pass
    return b"".join(pieces)
