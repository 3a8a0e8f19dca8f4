"""Labels of image files, by a trained classifier."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fitformer.data.datasets.folders import image_files
from fitformer.data.decoding import UnreadableImageError, decode, suffixes
from fitformer.data.pixels import convert, fit
from fitformer.data.readers import LazyImage
from fitformer.data.readers.levels import OpenOptions
from fitformer.errors import InputError
from fitformer.models.image_encoder import FITImageEncoder
from fitformer.patching import PatchGrid
from fitformer.patching.any_size import GroupedImage
from fitformer.tasks.classify import logits

Resize = Literal["crop", "stretch", "pad"]
FORMATS = ("csv", "json")

Group = Callable[[LazyImage], GroupedImage]
"""Cuts an image into groups, without those that are skipped."""


@dataclass(frozen=True)
class Prediction:
    """What a file was taken for: the likeliest class, its probability, and those of all classes by name."""

    file: str
    label: str
    probability: float
    probabilities: dict[str, float]


def expand(paths: Iterable[str | Path]) -> list[Path]:
    """Files as they are, and of folders all image files below them, sorted: those that training reads.

    Raises:
        InputError: a folder without an image file.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            found.append(path)
            continue
        below = [Path(file) for file in image_files(path)]
        if not below:
            raise InputError(f"the folder {path} holds no image files ({', '.join(sorted(suffixes())[:6])}, ...)")
        found += below
    return found


def predict(
    classifier: FITImageEncoder,
    files: Sequence[Path],
    classes: Sequence[str],
    *,
    resize: Resize = "crop",
    options: OpenOptions | None = None,
    batch_size: int = 64,
    group: Group | None = None,
    on_unreadable: Callable[[UnreadableImageError], None] = lambda fault: None,
) -> Iterator[Prediction]:
    """Label image files, read with `options` and brought to the classifier's size as `resize` says.

    A classifier of any size takes each as it is, one at a time, reading it as `classifier.execution` does; `group`
    cuts it into groups, if some are to be skipped.
    Files that cannot be read are left out; `on_unreadable` is told of each.

    Raises:
        InputError: none of the files can be read (names them), or `classes` are not as many as the classifier's.
    """
    faults: list[UnreadableImageError] = []

    def note(fault: UnreadableImageError) -> None:
        faults.append(fault)
        on_unreadable(fault)

    yield from predict_readable(
        classifier,
        files,
        classes,
        resize=resize,
        options=options,
        batch_size=batch_size,
        group=group,
        on_unreadable=note,
    )
    if len(faults) == len(files):
        few = "; ".join(map(str, faults[:5])) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else "")
        raise InputError(f"none of the {len(files)} files can be read: {few}" if files else "no files to label")


def predict_readable(
    classifier: FITImageEncoder,
    files: Sequence[Path],
    classes: Sequence[str],
    *,
    resize: Resize,
    options: OpenOptions | None,
    batch_size: int,
    group: Group | None,
    on_unreadable: Callable[[UnreadableImageError], None],
) -> Iterator[Prediction]:
    """As `predict`, also where no file can be read.

    Raises:
        InputError: `classes` are not as many as the classifier's.
    """
    known = classifier.num_classes
    if known != len(classes):
        raise InputError(f"{len(classes)} class names given to a classifier of {known} classes")
    shares = (
        _of_any_size(classifier, files, options, group or classifier.grouped, on_unreadable)
        if classifier.patch_grid.any_size
        else _of_one_size(
            classifier, _readable(classifier.patch_grid, files, resize, options, on_unreadable), batch_size
        )
    )
    for file, row in shares:
        yield decided(file, row, classes)


def match_classifier_input(images: Tensor, classifier: FITImageEncoder) -> Tensor:
    """Images uint8 `(b, H, W, ch)`, resized and converted to the size and channels of a classifier."""
    channels = classifier.patch_grid.channels
    rows, columns = classifier.patch_grid.image_size or images.shape[1:3]  # type: ignore[misc]
    if tuple(images.shape[1:]) == (rows, columns, channels):
        return images
    fitted = (convert(fit(image.numpy(), (rows, columns), "stretch"), channels) for image in images.cpu())
    return torch.stack([torch.from_numpy(pixels.copy()) for pixels in fitted]).to(images.device)


@torch.inference_mode()
def classify(classifier: FITImageEncoder, images: Tensor, batch_size: int = 256) -> Tensor:
    """Probabilities `(b, classes)` of images uint8 `(b, H, W, ch)` of any size."""
    device = next(classifier.parameters()).device
    parts = match_classifier_input(images, classifier).split(batch_size)
    return torch.cat([logits(classifier, part.to(device)).float().softmax(-1).cpu() for part in parts])


def decided(file: str | Path, probabilities: Tensor, classes: Sequence[str]) -> Prediction:
    """The prediction that probabilities `(classes,)` make."""
    best, shares = int(probabilities.argmax()), probabilities.tolist()
    return Prediction(str(file), classes[best], shares[best], dict(zip(classes, shares, strict=True)))


def _of_one_size(
    classifier: FITImageEncoder, read: Iterator[tuple[Path, np.ndarray]], batch_size: int
) -> Iterator[tuple[Path, Tensor]]:
    while part := list(islice(read, batch_size)):
        images = torch.from_numpy(np.stack([pixels for _, pixels in part]))
        yield from zip((file for file, _ in part), classify(classifier, images), strict=True)


@torch.inference_mode()
def _of_any_size(
    classifier: FITImageEncoder,
    files: Iterable[Path],
    options: OpenOptions | None,
    group: Group,
    on_unreadable: Callable[[UnreadableImageError], None],
) -> Iterator[tuple[Path, Tensor]]:
    """Probabilities of images that are read as the classifier's way to run asks for their pixels."""
    for file in files:
        try:
            with LazyImage(file, options) as image:
                probabilities = classifier([group(image)])[0].float().softmax(-1).cpu()
            if not bool(probabilities.isfinite().all()):
                raise InputError("its logits are NaN or infinite: does it have NaN or infinite pixels?")
        except (InputError, PermissionError) as error:
            on_unreadable(UnreadableImageError(str(file), str(error)))
            continue
        yield file, probabilities


def _readable(
    grid: PatchGrid,
    files: Iterable[Path],
    resize: Resize,
    options: OpenOptions | None,
    on_unreadable: Callable[[UnreadableImageError], None],
) -> Iterator[tuple[Path, np.ndarray]]:
    rows, columns = grid.image_size  # type: ignore[misc]
    pixel_range = None if options is None else options.pixel_range
    for file in files:
        try:
            pixels = decode(file, str(file), grid.channels, pixel_range)
        except UnreadableImageError as fault:
            on_unreadable(fault)
            continue
        yield file, fit(pixels, (rows, columns), resize)


def as_text(predictions: Sequence[Prediction], kind: str = "csv") -> str:
    """Predictions as CSV (file, label, probability, then a column a class) or as a JSON list.

    Raises:
        InputError: another format.
    """
    if kind == "json":
        return json.dumps([asdict(prediction) for prediction in predictions], indent=2, ensure_ascii=False) + "\n"
    if kind != "csv":
        raise InputError(f"there is no format {kind!r}; write one of {', '.join(FORMATS)}")
    text = io.StringIO()
    classes = list(predictions[0].probabilities) if predictions else []
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["file", "label", "probability", *classes])
    for each in predictions:
        shares = [f"{share:.6f}" for share in (each.probability, *each.probabilities.values())]
        table.writerow([each.file, each.label, *shares])
    return text.getvalue()
