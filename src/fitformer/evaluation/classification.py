"""How often a classifier is right, overall and by class, and what it takes for what."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fitformer.errors import InputError


def confusion(labels: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """Counts `(classes, classes)`: row the true class, column the predicted one, of `(b,)` labels each."""
    return torch.bincount(labels * classes + predicted, minlength=classes * classes).view(classes, classes)


def classification(scored: Iterable[tuple[Tensor, Tensor]], classes: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Metrics of logits `(b, k)` and labels `(b,)` that come in batches of any size.

    Yields:
        `examples`; `loss`, cross-entropy in nats; `accuracy`; `top5_accuracy` where there are more than five classes;
        `accuracy_by_class`, of the classes that occur; `confusion`, rows true, columns predicted.

    Raises:
        InputError: an example without a label, or no examples.
    """
    counts = torch.zeros(len(classes), len(classes), dtype=torch.long)
    loss, top5 = 0.0, 0
    for logits, labels in scored:
        if bool((labels < 0).any()):
            raise InputError("some of these examples have no label, so nothing can be said of accuracy")
        logits, labels = logits.float().cpu(), labels.cpu()
        counts += confusion(labels, logits.argmax(-1), len(classes))
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        top5 += int((logits.topk(min(5, len(classes))).indices == labels[:, None]).sum())
    examples = int(counts.sum())
    if not examples:
        raise InputError("there are no examples to measure on")
    yield "examples", examples
    yield "loss", loss / examples
    yield "accuracy", int(counts.diagonal().sum()) / examples
    if len(classes) > 5:
        yield "top5_accuracy", top5 / examples
    rows = zip(classes, counts.diagonal().tolist(), counts.sum(dim=1).tolist(), strict=True)
    yield "accuracy_by_class", {name: right / of for name, right, of in rows if of}
    yield "confusion", counts.tolist()
