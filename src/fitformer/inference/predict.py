"""Answers on image files, by a trained model: labels, or numbers."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fitformer.data.datasets.folders import image_files
from fitformer.data.decoding import UnreadableImageError, decode, suffixes
from fitformer.data.pixels import convert, fit
from fitformer.data.readers import LazyImage
from fitformer.data.readers.area_resize import average
from fitformer.data.readers.lazy import open_levels
from fitformer.data.readers.levels import OpenOptions
from fitformer.errors import InputError
from fitformer.models.image_encoder import FITImageEncoder
from fitformer.patching import PatchGrid
from fitformer.patching.any_size import GroupedImage, PixelArray
from fitformer.tasks.answers import Answer, Answers
from fitformer.tasks.image_outputs import outputs_of

Resize = Literal["crop", "stretch", "pad"]
FORMATS = ("csv", "json")

Example = Path | np.ndarray | tuple[Path | np.ndarray, ...]
"""An image, by its file or as pixels (H, W) or (H, W, ch); or all images of a patient."""

Group = Callable[[Any], GroupedImage]
"""Cuts an image, or a tuple of those of a patient, into groups, without those that are skipped."""


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
    answers: Answers,
    *,
    resize: Resize = "crop",
    options: OpenOptions | None = None,
    batch_size: int = 64,
    group: Group | None = None,
    on_unreadable: Callable[[UnreadableImageError], None] = lambda fault: None,
) -> Iterator[Answer]:
    """Answer on image files, read with `options` and brought to the classifier's size as `resize` says.

    A classifier of any size takes each as it is, one at a time, reading it as `classifier.execution` does; `group`
    cuts it into groups, if some are to be skipped. `answers` say what its outputs mean.
    Files that cannot be read are left out; `on_unreadable` is told of each.

    Raises:
        InputError: none of the files can be read (names them), or `answers` are of another number of outputs.
    """
    faults: list[UnreadableImageError] = []

    def note(fault: UnreadableImageError) -> None:
        faults.append(fault)
        on_unreadable(fault)

    yield from predict_readable(
        classifier,
        files,
        answers,
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
    answers: Answers,
    *,
    on_unreadable: Callable[[UnreadableImageError], None],
    **reading: Any,
) -> Iterator[Answer]:
    """As `predict`, also where no file can be read.

    Raises:
        InputError: `answers` are of another number of outputs than the classifier's.
    """
    answers.check_outputs(classifier.num_classes)
    for file, found in zip(files, outputs_of_each(classifier, files, **reading), strict=True):
        if isinstance(found, UnreadableImageError):
            on_unreadable(found)
        else:
            yield answers.answer(str(file), found)


def outputs_of_each(
    classifier: FITImageEncoder,
    examples: Iterable[Example],
    *,
    resize: Resize,
    options: OpenOptions | None,
    batch_size: int,
    group: Group | None,
) -> Iterator[Tensor | UnreadableImageError]:
    """Outputs `(k,)` for each example, or why it cannot be read; arguments as in `predict`.

    Several images that are one example are for a classifier of any size.
    """
    if classifier.patch_grid.any_size:
        return _of_any_size(classifier, examples, options, group or classifier.grouped)
    return _of_one_size(classifier, examples, resize, options, batch_size)


@contextmanager
def opened(example: Example, options: OpenOptions | None) -> Iterator[Any]:
    """An image as a source of pixels, several as a tuple of them; what is wrong with a file shows when it is read.

    Raises:
        InputError: an array that is no image.
    """
    if isinstance(example, tuple):
        with ExitStack() as stack:
            yield tuple(stack.enter_context(opened(each, options)) for each in example)
    elif isinstance(example, Path):
        with LazyImage(example, options) as image:
            yield image
    else:
        level = open_levels(name_of(example), options or OpenOptions(), example).levels[0]
        yield _InMemory(level.window(0, 0, *level.shape[:2]))


class _InMemory(PixelArray):
    """An array as a file of it is read: glimpses are the same averages."""

    def thumbnail(self, rows: int, columns: int) -> np.ndarray:
        return average(self, rows, columns)


def paths_of(example: Example) -> list[Path]:
    """The files of an example."""
    return [each for each in (example if isinstance(example, tuple) else (example,)) if isinstance(each, Path)]


def name_of(example: Example) -> str:
    """An example in an error's words: its path or paths; an array has no name."""
    if isinstance(example, tuple):
        return ", ".join(map(name_of, example))
    return str(example) if isinstance(example, Path) else "an array"


def match_classifier_input(images: Tensor, classifier: FITImageEncoder) -> Tensor:
    """Images uint8 `(b, H, W, ch)`, resized and converted to the size and channels of a classifier."""
    channels = classifier.patch_grid.channels
    rows, columns = classifier.patch_grid.image_size or images.shape[1:3]  # type: ignore[misc]
    if tuple(images.shape[1:]) == (rows, columns, channels):
        return images
    fitted = (convert(fit(image.numpy(), (rows, columns), "stretch"), channels) for image in images.cpu())
    return torch.stack([torch.from_numpy(pixels.copy()) for pixels in fitted]).to(images.device)


@torch.inference_mode()
def outputs_for(classifier: FITImageEncoder, images: Tensor, batch_size: int = 256) -> Tensor:
    """Outputs `(b, k)` for images uint8 `(b, H, W, ch)` of any size."""
    device = next(classifier.parameters()).device
    parts = match_classifier_input(images, classifier).split(batch_size)
    return torch.cat([outputs_of(classifier, part.to(device)).float().cpu() for part in parts])


def classify(classifier: FITImageEncoder, images: Tensor, batch_size: int = 256) -> Tensor:
    """Probabilities `(b, classes)` of images uint8 `(b, H, W, ch)` of any size."""
    return outputs_for(classifier, images, batch_size).softmax(-1)


def _of_one_size(
    classifier: FITImageEncoder,
    examples: Iterable[Example],
    resize: Resize,
    options: OpenOptions | None,
    batch_size: int,
) -> Iterator[Tensor | UnreadableImageError]:
    read = _fitted(classifier.patch_grid, examples, resize, options)
    while part := list(islice(read, batch_size)):
        images = [each for each in part if not isinstance(each, UnreadableImageError)]
        found = iter(outputs_for(classifier, torch.from_numpy(np.stack(images))) if images else ())
        for each in part:
            yield each if isinstance(each, UnreadableImageError) else next(found)


@torch.inference_mode()
def _of_any_size(
    classifier: FITImageEncoder, examples: Iterable[Example], options: OpenOptions | None, group: Group
) -> Iterator[Tensor | UnreadableImageError]:
    """Outputs for images that are read as the classifier's way to run asks for their pixels."""
    for example in examples:
        found: Tensor | UnreadableImageError
        try:
            with opened(example, options) as image:
                found = finite(classifier, group(image))
        except (InputError, PermissionError) as error:
            found = UnreadableImageError(name_of(example), str(error))
        yield found


@torch.inference_mode()
def finite(classifier: FITImageEncoder, image: GroupedImage) -> Tensor:
    """Outputs `(k,)` for an image.

    Raises:
        InputError: they are NaN or infinite.
    """
    found = classifier([image])[0].float().cpu()
    if not bool(found.isfinite().all()):
        raise InputError(f"its {classifier.outputs} are NaN or infinite: does it have NaN or infinite pixels?")
    return found


def _fitted(
    grid: PatchGrid, examples: Iterable[Example], resize: Resize, options: OpenOptions | None
) -> Iterator[np.ndarray | UnreadableImageError]:
    """Pixels of each image, brought to the size of the grid."""
    pixel_range = None if options is None else options.pixel_range
    for example in examples:
        assert not isinstance(example, tuple)
        try:
            yield fit(decode(example, name_of(example), grid.channels, pixel_range), grid.image_size, resize)  # type: ignore[arg-type]
        except UnreadableImageError as fault:
            yield fault


def as_text(found: Sequence[Answer], columns: Sequence[str], kind: str = "csv") -> str:
    """Answers as CSV (file, then `columns`, which are those of `Answers`) or as a JSON list.

    Raises:
        InputError: another format.
    """
    if kind == "json":
        return json.dumps([asdict(answer) for answer in found], indent=2, ensure_ascii=False) + "\n"
    if kind != "csv":
        raise InputError(f"there is no format {kind!r}; write one of {', '.join(FORMATS)}")
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["file", *columns])
    table.writerows([answer.file, *answer.cells] for answer in found)
    return text.getvalue()
