"""Sums over pixels that add up over slices of an image, and the losses and measures that are made of them."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fitformer.data.labels import UNLABELLED

# Of the sums of a loss: cross-entropy, labelled pixels, and those that are right.
_SINGLE = 3


def _known(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Which pixels have a label, and classes that can be indexed by, 0 where there is none."""
    known = labels != UNLABELLED
    return known, torch.where(known, labels, 0).long()


def loss_sums(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """What cross-entropy and Dice loss are made of, for each example `(b, 3 + 3 * classes)`, float32.

    Cross-entropy in nats, the number of labelled pixels, and of those that are right; then for each class the
    probability on its own pixels, that on all labelled pixels, and how many are its own.

    Args:
        logits: `(b, s, classes, rows, columns)`.
        labels: `(b, s, rows, columns)`, `UNLABELLED` where there is none.
        weights: of the cross-entropy of each class's pixels `(classes,)`.
    """
    known, index = _known(labels)
    logs = logits.float().log_softmax(2)
    own = logs.gather(2, index[:, :, None])[:, :, 0]
    weight = known if weights is None else known * weights[index]
    single = [-(own * weight), known.float(), (logs.argmax(2) == index) & known]
    shares = logs.exp() * known[:, :, None]
    classes, where = torch.zeros_like(shares[:, 0, :, 0, 0]), index.flatten(1)
    return torch.cat(
        [
            torch.stack([each.flatten(1).sum(1).float() for each in single], dim=1),
            classes.scatter_add(1, where, (own.exp() * known).flatten(1)),
            shares.sum((1, 3, 4)),
            classes.scatter_add(1, where, known.flatten(1).float()),
        ],
        dim=1,
    )


def losses(sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means over examples of the cross-entropy of a pixel and of the Dice loss, and the share of pixels that are right.

    The Dice loss of an example is 1 less the mean, over the classes that occur in it, of twice the probability on a
    class's own pixels by the sum of all its probability and its pixels (arXiv 1606.04797). Examples without a labelled
    pixel count nothing.
    """
    cross, count, right = sums[:, :_SINGLE].unbind(1)
    both, given, there = sums[:, _SINGLE:].unflatten(1, (3, -1)).unbind(1)
    occurs = there > 0
    overlap = torch.where(occurs, 2 * both / (given + there).clamp(min=1e-6), 0)
    dice = 1 - overlap.sum(1) / occurs.sum(1).clamp(min=1)
    labelled = count > 0
    means = [torch.where(labelled, each, 0).sum() for each in (cross / count.clamp(min=1), dice)]
    examples = labelled.sum().clamp(min=1)
    return means[0] / examples, means[1] / examples, right.sum() / count.sum().clamp(min=1)


def confusions(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Labelled pixels of each class taken for each, for each example `(b, classes, classes)` float64, rows true."""
    known, index = _known(labels)
    found = [
        torch.bincount(one[here].long() * classes + other[here].long(), minlength=classes**2)
        for one, other, here in zip(index, predicted, known, strict=True)
    ]
    return torch.stack(found).view(-1, classes, classes).double()


def shares_of(part: Tensor, whole: Tensor, classes: Sequence[str]) -> dict[str, float]:
    """Each class's share, of those that there is something of."""
    rows = zip(classes, part.tolist(), whole.tolist(), strict=True)
    return {name: one / other for name, one, other in rows if other > 0}


def measures(confusion: Tensor, boundaries: Tensor, classes: Sequence[str]) -> Iterator[tuple[str, object]]:
    """Measures from a confusion `(classes, classes)` and `_boundaries.boundary_counts` `(classes, 4)`, of any scale.

    Yields:
        `accuracy`, of pixels; `mIoU`, `dice` and `boundary_f1`, means over the classes that occur in labels or
        predictions; then each of the three by class.
    """
    right, true, claimed = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    found, drawn, met, wanted = boundaries.unbind(1)
    # 2PR / (P + R) of the shares of boundary pixels that meet a boundary of the other side.
    precision, recall = found / drawn.clamp(min=1e-9), met / wanted.clamp(min=1e-9)
    there = (drawn + wanted > 0).double()
    by_class = {
        "IoU": shares_of(right, true + claimed - right, classes),
        "dice": shares_of(2 * right, true + claimed, classes),
        "boundary_f1": shares_of(2 * precision * recall / (precision + recall).clamp(min=1e-9), there, classes),
    }
    yield "accuracy", float(right.sum() / confusion.sum().clamp(min=1e-9))
    for name, shares in by_class.items():
        yield "mIoU" if name == "IoU" else name, sum(shares.values()) / max(len(shares), 1)
    for name, shares in by_class.items():
        yield f"{name}_by_class", shares
