"""Share of generated samples that a classifier assigns to their class."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fitformer.errors import InputError
from fitformer.evaluation.classification import confusion
from fitformer.inference.predict import classify
from fitformer.models.image_encoder import FITImageEncoder


def sample_accuracy(
    classifier: FITImageEncoder, images: Tensor, labels: Sequence[int], classes: Sequence[str]
) -> Iterator[tuple[str, Any]]:
    """Share of samples uint8 `(b, H, W, ch)` that are classified as their `labels`, overall and by class.

    Yields:
        `samples`, their number; `recognised`, the share; `recognised_by_class`, for the classes that occur.

    Raises:
        InputError: the classifier has another number of classes.
    """
    known = classifier.num_classes
    if known != len(classes):
        raise InputError(
            f"the classifier has {known} classes and the samples have {len(classes)}; give a classifier of "
            "the same classes"
        )
    counts = confusion(torch.tensor(labels), classify(classifier, images).argmax(-1), known)
    yield "samples", len(labels)
    yield "recognised", int(counts.diagonal().sum()) / len(labels)
    rows = zip(classes, counts.diagonal().tolist(), counts.sum(dim=1).tolist(), strict=True)
    yield "recognised_by_class", {name: correct / count for name, correct, count in rows if count}
