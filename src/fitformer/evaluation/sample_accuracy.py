"""Share of generated samples that a classifier assigns to their class."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fitformer.data.pixels import convert, fit
from fitformer.errors import InputError
from fitformer.evaluation.classification import confusion
from fitformer.models.image_encoder import FITImageEncoder
from fitformer.tasks.classify import logits


def match_classifier_input(images: Tensor, classifier: FITImageEncoder) -> Tensor:
    """Images uint8 `(b, H, W, ch)`, resized and converted to the size and channels of a classifier."""
    channels = classifier.tiling.channels
    rows, columns = images.shape[1:3] if classifier.groups is None else classifier.groups.image_size  # type: ignore[misc]
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
