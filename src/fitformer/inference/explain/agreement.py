"""How far a map agrees with leaving groups out, on the groups where the map is largest.

A gradient and an attention say what a decision rests on without trying it. The image without a group is the trial, so a
map of either kind is told with what the trial says of its largest groups.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fitformer.inference.explain.leave_out import AfterFirstPhase, Tell
from fitformer.patching.any_size import GroupedImage

TOP_GROUPS = 8
"""Of a map, left out one by one to measure its agreement."""


@dataclass(frozen=True, eq=False)
class Agreement:
    """A map and what leaving out adds to the log-odds, on some groups.

    Attributes:
        groups: their numbers, glimpses counted, the largest of the map first.
        claimed: `(k,)` the map's value of each.
        added: `(k,)` log-odds with the group less those without it.
        signed: whether the map's values have a sign; if not, they are compared with the size of what is added.
    """

    groups: list[int]
    claimed: Tensor
    added: Tensor
    signed: bool

    @property
    def rank_correlation(self) -> float | None:
        """Spearman's, from -1 to 1; None where all of either are equal."""
        return rank_correlation(self.claimed, self.added if self.signed else self.added.abs())

    @property
    def same_sign(self) -> float | None:
        """Share of the groups on which both have one sign; None of a map without signs."""
        if not (self.signed and self.groups):
            return None
        return float((self.claimed.sign() == self.added.sign()).float().mean())


def measure_agreement(
    later: AfterFirstPhase, logits: Tensor, claimed: Tensor, *, signed: bool, tell: Tell | None = None
) -> Agreement:
    """Leave out the `TOP_GROUPS` groups where a map is largest.

    Args:
        later: the classifier on the image.
        logits: `(classes,)` of the whole image.
        claimed: `(t,)` the map's value of each group, glimpses counted.
        signed: whether these values have a sign.
        tell: called with the share of the work that is done, from 0 to 1.
    """
    first = later.image.glimpses
    # The only group of an image cannot be left out.
    count = min(TOP_GROUPS, later.image.num_groups - first) if later.image.num_groups > 1 else 0
    groups = (claimed[first:].abs().topk(count).indices + first).tolist()
    return Agreement(groups, claimed[groups], later.added(logits, groups, tell), signed)


def group_values(values: Tensor, image: GroupedImage, *, signed: bool) -> Tensor:
    """One value for each group `(t,)` of a map `(t, n)`: the sum of a signed map, the largest of another."""
    mask = image.mask(slice(None))
    held = values if mask is None else values * mask[0]
    return held.sum(1) if signed else held.amax(1)


def rank_correlation(one: Tensor, other: Tensor) -> float | None:
    """Spearman's correlation of values `(k,)`, equal ones sharing a rank; None where all of either are equal."""
    ranks = [_ranks(values) for values in (one.double(), other.double())]
    centred = [each - each.mean() for each in ranks]
    scale = (centred[0].square().sum() * centred[1].square().sum()).sqrt() if len(one) > 1 else torch.zeros(())
    return None if scale == 0 else float((centred[0] * centred[1]).sum() / scale)


def _ranks(values: Tensor) -> Tensor:
    below = (values[:, None] > values).sum(1)
    equal = (values[:, None] == values).sum(1)
    return below + (equal - 1) / 2
