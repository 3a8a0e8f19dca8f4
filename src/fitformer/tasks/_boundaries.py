"""How well predicted boundaries of classes lie on true ones (Csurka et al. 2013), window by window."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fitformer.data.labels import UNLABELLED

Labels = Callable[[int, int, int, int], np.ndarray]
"""Classes (rows, columns) uint8 of a window: top, left, rows, columns."""

# Pixels, along rows and along columns, that a boundary may lie off.
TOLERANCE = 3
_SIDE = 1024


def boundary_counts(predicted: Labels, true: Labels, shape: tuple[int, int], classes: int) -> Tensor:
    """Pixels on the boundaries of each class, float64 `(classes, 4)`, of an image of `shape` (rows, columns).

    Predicted ones within `TOLERANCE` of a true one of the class, all predicted ones, true ones within it of a predicted
    one, and all true ones. A pixel is on a boundary if one of its four neighbours has another class; pixels without a
    label are no neighbours and on no boundary.
    """
    counts = torch.zeros(classes, 4, dtype=torch.float64)
    rows, columns = shape
    for top in range(0, rows, _SIDE):
        for left in range(0, columns, _SIDE):
            _count(counts, predicted, true, (top, left), shape)
    return counts


def _count(counts: Tensor, predicted: Labels, true: Labels, corner: tuple[int, int], shape: tuple[int, int]) -> None:
    """Add what lies in the square at a corner, seen with its surroundings."""
    margin = TOLERANCE + 1
    starts = [max(at - margin, 0) for at in corner]
    ends = [min(at + _SIDE + margin, side) for at, side in zip(corner, shape, strict=True)]
    window = (*starts, *(end - start for start, end in zip(starts, ends, strict=True)))
    labels, guess = (torch.from_numpy(np.array(each(*window))) for each in (true, predicted))
    # Where either is unknown there is nothing to compare.
    unknown = (labels == UNLABELLED) | (guess == UNLABELLED)
    own = tuple(slice(at - start, at - start + _SIDE) for at, start in zip(corner, starts, strict=True))
    known = [each.masked_fill(unknown, UNLABELLED) for each in (guess, labels)]
    edges = [(each, _edges(each)) for each in known]
    for number in np.unique([*_classes(*edges[0]), *_classes(*edges[1])]).tolist():
        drawn, wanted = (on & (each == number) for each, on in edges)
        for place, (one, other) in enumerate([(drawn, wanted), (wanted, drawn)]):
            counts[number, 2 * place] += int((one & _near(other))[own].sum())
            counts[number, 2 * place + 1] += int(one[own].sum())


def _classes(labels: Tensor, edges: Tensor) -> list[int]:
    return torch.unique(labels[edges]).tolist()


def _edges(labels: Tensor) -> Tensor:
    """Pixels (rows, columns) with a label one of whose four neighbours has another."""
    edges = torch.zeros_like(labels, dtype=torch.bool)
    # Views of the transposed, for neighbours in a row.
    for across, seen in ((edges, labels), (edges.T, labels.T)):
        differ = (seen[1:] != seen[:-1]) & (seen[1:] != UNLABELLED) & (seen[:-1] != UNLABELLED)
        across[1:] |= differ
        across[:-1] |= differ
    return edges


def _near(edges: Tensor) -> Tensor:
    """Pixels within the tolerance of one that is set."""
    side = 2 * TOLERANCE + 1
    return F.max_pool2d(edges[None, None].float(), side, stride=1, padding=TOLERANCE)[0, 0].bool()
