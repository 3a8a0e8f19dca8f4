"""Metrics of a classifier: loss, accuracy overall and by class, and confusion."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fitformer.errors import InputError


def confusion(labels: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """Confusion counts `(classes, classes)` of labels and predictions `(b,)`: rows true, columns predicted."""
    return torch.bincount(labels * classes + predicted, minlength=classes * classes).view(classes, classes)


def classification(scored: Iterable[tuple[Tensor, Tensor]], classes: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Metrics of batches of logits `(b, k)` and labels `(b,)`; they do not depend on the batch size.

    Yields:
        `examples`; `loss`, cross-entropy in nats; `accuracy`; `top5_accuracy` if there are more than five classes;
        `accuracy_by_class`, for the classes that occur; `confusion`, rows true, columns predicted.

    Raises:
        InputError: an example without a label, or no examples.
    """
    counts = torch.zeros(len(classes), len(classes), dtype=torch.long)
    loss, top5 = 0.0, 0
    for logits, labels in scored:
        if bool((labels < 0).any()):
            raise InputError(
                "some of these examples have no label, so accuracy cannot be measured; evaluate labelled data"
            )
        logits, labels = logits.float().cpu(), labels.cpu()
        counts += confusion(labels, logits.argmax(-1), len(classes))
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        top5 += int((logits.topk(min(5, len(classes))).indices == labels[:, None]).sum())
    examples = int(counts.sum())
    if not examples:
        raise InputError("there are no examples to evaluate")
    yield "examples", examples
    yield "loss", loss / examples
    yield "accuracy", int(counts.diagonal().sum()) / examples
    if len(classes) > 5:
        yield "top5_accuracy", top5 / examples
    rows = zip(classes, counts.diagonal().tolist(), counts.sum(dim=1).tolist(), strict=True)
    yield "accuracy_by_class", {name: correct / count for name, correct, count in rows if count}
    yield "confusion", counts.tolist()
