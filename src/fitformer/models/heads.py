"""Heads of an encoder: linear maps of its pooled features, and what their outputs mean."""

from typing import Literal

import torch
from torch import Tensor, nn

from fitformer.models.layers import linear

Meaning = Literal["logits", "numbers", "hazards"]
"""Of the outputs of a head: logits, numbers in units of their own, or logits of the hazards of intervals of time."""


class NumbersHead(nn.Module):
    """Numbers `(b, k)` in units of their own: a linear map, times `scale` plus `mean`.

    The two are buffers `(k,)`, so that they are saved with the weights: those of what was learned from.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, features: int, numbers: int) -> None:
        super().__init__()
        self.weight, self.bias = linear(features, numbers).parameters()
        self.register_buffer("mean", torch.zeros(numbers))
        self.register_buffer("scale", torch.ones(numbers))

    def forward(self, features: Tensor) -> Tensor:
        """Numbers of features `(b, features)`."""
        return nn.functional.linear(features, self.weight, self.bias) * self.scale + self.mean


class HazardsHead(nn.Module):
    """Logits `(b, k)` of hazards: of the event within an interval of time, given that it did not happen before.

    The k intervals end at the times `cuts (k - 1,)`, a buffer, and the last one never: times up to the first cut are in
    the first interval.
    """

    cuts: Tensor

    def __init__(self, features: int, intervals: int) -> None:
        super().__init__()
        self.weight, self.bias = linear(features, intervals).parameters()
        self.register_buffer("cuts", torch.arange(1.0, intervals))

    def forward(self, features: Tensor) -> Tensor:
        """Logits of features `(b, features)`."""
        return nn.functional.linear(features, self.weight, self.bias)


def make_head(meaning: Meaning, features: int, outputs: int) -> nn.Module:
    """A head with `outputs` outputs."""
    kind = {"logits": linear, "numbers": NumbersHead, "hazards": HazardsHead}[meaning]
    return kind(features, outputs)


def survival(hazards: Tensor) -> Tensor:
    """Probability `(..., k - 1)` that the event comes after each cut, of logits `(..., k)` of hazards."""
    return nn.functional.logsigmoid(-hazards[..., :-1]).cumsum(-1).exp()


def risk(hazards: Tensor, cuts: Tensor) -> Tensor:
    """The share, from 0 to 1, of the time up to the last cut that is expected to be lost to the event `(...)`.

    It is 1 less the restricted mean survival time over that time; survival is taken as straight between cuts.

    Args:
        hazards: logits `(..., k)`. cuts: `(k - 1,)`.
    """
    alive = survival(hazards)
    before = torch.cat([torch.ones_like(alive[..., :1]), alive[..., :-1]], dim=-1)
    lengths = cuts.diff(prepend=cuts.new_zeros(1))
    return 1 - ((before + alive) / 2 * lengths).sum(-1) / cuts[-1]
