"""What an autoregressive model must beat: knowing only where a pixel is, and the usual file compressors."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from fitformer.errors import InputError


class IndependentPixels:
    """Each value drawn by itself, from how often each occurred at its place in training: no value tells of another.

    Args:
        coords: values in an example. levels: different values.
        smoothing: added to every count, so that what never occurred is rare, not impossible; 1 is Laplace's rule.
    """

    def __init__(self, coords: int, levels: int, smoothing: float = 1.0) -> None:
        if smoothing <= 0:
            raise InputError(f"smoothing is {smoothing}; above 0 it keeps the bits of unseen values finite")
        self.levels, self.smoothing = levels, smoothing
        self.counts = torch.zeros(coords, levels, dtype=torch.int64)

    def fit(self, tokens: Tensor) -> None:
        """Count more examples `(b, ...)` of integers, their values in any order that is always the same."""
        flat = tokens.flatten(1).cpu()
        coords = torch.arange(flat.shape[1]).expand_as(flat)
        self.counts.index_put_((coords, flat), torch.ones_like(flat), accumulate=True)

    def bits(self, tokens: Tensor) -> float:
        """Bits that examples `(b, ...)` take in all."""
        share = self.counts + self.smoothing
        table = (share.sum(dim=1, keepdim=True).double().log2()) - share.double().log2()
        flat = tokens.flatten(1).cpu()
        return float(table[torch.arange(flat.shape[1]), flat].sum())


def independent_bits(train: Iterable[Tensor], test: Iterable[Tensor], levels: int, smoothing: float = 1.0) -> float:
    """Bits a value of the test examples take under `IndependentPixels` fitted on the training ones, batches `(b, ...)`.

    Raises:
        InputError: no examples on one side.
    """
    model, bits, values = None, 0.0, 0
    for tokens in train:
        model = model or IndependentPixels(math.prod(tokens.shape[1:]), levels, smoothing)
        model.fit(tokens)
    for tokens in test if model else ():
        bits, values = bits + model.bits(tokens), values + tokens.numel()  # type: ignore[union-attr]
    if not values:
        raise InputError("a baseline needs examples to be fitted on, and examples to be measured on")
    return bits / values
