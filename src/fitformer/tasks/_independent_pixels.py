"""A baseline of autoregression over pixels: a distribution of its own at each position, without context."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from fitformer.errors import InputError


class IndependentPixels:
    """Independent categorical distributions, one for each position, estimated from counts.

    Args:
        positions: values of an example. levels: number of different values.
        smoothing: added to every count, so that an unseen value has a probability above 0; 1 is Laplace's rule.

    Raises:
        InputError: a smoothing of 0 or less.
    """

    def __init__(self, positions: int, levels: int, smoothing: float = 1.0) -> None:
        if smoothing <= 0:
            raise InputError(
                f"smoothing is {smoothing}; it must be above 0, so that the bits of unseen values are finite"
            )
        self.levels, self.smoothing = levels, smoothing
        self.counts = torch.zeros(positions, levels, dtype=torch.int64)

    def fit(self, tokens: Tensor) -> None:
        """Count the values of more examples, integers `(b, ...)`, whose positions are always in the same order."""
        flat = tokens.flatten(1).cpu()
        positions = torch.arange(flat.shape[1]).expand_as(flat)
        self.counts.index_put_((positions, flat), torch.ones_like(flat), accumulate=True)

    def bits(self, tokens: Tensor) -> float:
        """Negative log-likelihood of examples `(b, ...)` in bits, a sum."""
        share = self.counts + self.smoothing
        table = (share.sum(dim=1, keepdim=True).double().log2()) - share.double().log2()
        flat = tokens.flatten(1).cpu()
        return float(table[torch.arange(flat.shape[1]), flat].sum())


def independent_bits(train: Iterable[Tensor], test: Iterable[Tensor], levels: int, smoothing: float = 1.0) -> float:
    """Mean bits of a value of the test batches `(b, ...)` under `IndependentPixels` fitted on the training batches.

    Raises:
        InputError: no training or no test examples.
    """
    model, bits, values = None, 0.0, 0
    for tokens in train:
        model = model or IndependentPixels(math.prod(tokens.shape[1:]), levels, smoothing)
        model.fit(tokens)
    for tokens in test if model else ():
        bits, values = bits + model.bits(tokens), values + tokens.numel()  # type: ignore[union-attr]
    if not values:
        raise InputError("the baseline needs at least one training example and one test example")
    return bits / values
