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

from fitformer.data.pixels import Unreadable, decode, fit, suffixes
from fitformer.encoder import FITImageEncoder
from fitformer.errors import InputError
from fitformer.evaluation.recognition import classify

Resize = Literal["crop", "stretch", "pad"]
FORMATS = ("csv", "json")


@dataclass(frozen=True)
class Prediction:
    """What a file was taken for: the likeliest class, its probability, and those of all classes by name."""

    file: str
    label: str
    probability: float
    probabilities: dict[str, float]


def expand(paths: Iterable[str | Path]) -> list[Path]:
    """Files as they are, and of folders all image files below them, sorted.

    Raises:
        InputError: a folder without an image file.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            found.append(path)
            continue
        below = sorted(file for file in path.rglob("*") if file.suffix.lower() in suffixes() and file.is_file())
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
    batch_size: int = 64,
    on_unreadable: Callable[[Unreadable], None] = lambda fault: None,
) -> Iterator[Prediction]:
    """Label image files, brought to the classifier's size as `resize` says (`data.settings.ImageData`).

    Files that cannot be read are left out; `on_unreadable` is told of each.

    Raises:
        InputError: none of the files can be read (names them), or `classes` are not as many as the classifier's.
    """
    known = classifier.num_classes
    if known != len(classes):
        raise InputError(f"{len(classes)} class names given to a classifier of {known} classes")
    faults: list[Unreadable] = []

    def note(fault: Unreadable) -> None:
        faults.append(fault)
        on_unreadable(fault)

    read = _readable(classifier, files, resize, note)
    while part := list(islice(read, batch_size)):
        images = torch.from_numpy(np.stack([pixels for _, pixels in part]))
        for (file, _), row in zip(part, classify(classifier, images), strict=True):
            best = int(row.argmax())
            each = dict(zip(classes, row.tolist(), strict=True))
            yield Prediction(str(file), classes[best], float(row[best]), each)
    if len(faults) == len(files):
        few = "; ".join(map(str, faults[:5])) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else "")
        raise InputError(f"none of the {len(files)} files can be read: {few}" if files else "no files to label")


def _readable(
    classifier: FITImageEncoder, files: Iterable[Path], resize: Resize, on_unreadable: Callable[[Unreadable], None]
) -> Iterator[tuple[Path, np.ndarray]]:
    rows, columns = classifier.groups.image_size  # type: ignore[misc]
    for file in files:
        try:
            pixels = decode(file, str(file), classifier.groups.channels)
        except Unreadable as fault:
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
