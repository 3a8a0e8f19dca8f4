"""A baseline of autoregression over sound: a sample given the one before it, counted in the training part."""

from collections.abc import Iterable

import torch
from torch import Tensor

from fitformer.errors import InputError

Masked = tuple[Tensor, Tensor]


class GivenTheLast:
    """A Markov chain of `levels` values, from counts of pairs.

    A row of counts is smoothed by `smoothing` values drawn from the frequencies of all values (a Dirichlet prior), and
    those by one of each value, so that what was never seen has a probability above 0.
    """

    def __init__(self, levels: int, smoothing: float = 16.0) -> None:
        self.levels, self.smoothing = levels, smoothing
        # The last row: what comes first.
        self.pairs = torch.zeros(levels + 1, levels, dtype=torch.int64)

    def fit(self, tokens: Tensor, mask: Tensor) -> None:
        """Count more sequences `(b, L)`; only those tokens where `mask (b, L)` is true."""
        before, after = self._pairs(tokens, mask)
        self.pairs.index_put_((before, after), torch.ones_like(after), accumulate=True)

    def bits(self, tokens: Tensor, mask: Tensor) -> float:
        """Negative log-likelihood of sequences `(b, L)` in bits, a sum over the tokens where `mask (b, L)` is true."""
        of_all = self.pairs.sum(dim=0).double() + 1
        rows = self.pairs.double() + self.smoothing * of_all / of_all.sum()
        # The first of a sequence has none before it.
        rows[-1] = of_all
        before, after = self._pairs(tokens, mask)
        return float((rows.sum(dim=1).log2()[before] - rows.log2()[before, after]).sum())

    def _pairs(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        before = torch.cat([torch.full_like(tokens[:, :1], self.levels), tokens[:, :-1]], dim=1)
        return before[mask].cpu(), tokens[mask].cpu()


def given_the_last_bits(train: Iterable[Masked], test: Iterable[Masked], levels: int) -> float:
    """Mean bits of a token of the test batches under `GivenTheLast` fitted on the training batches.

    Both are batches `(tokens (b, L), mask (b, L))`.

    Raises:
        InputError: no training or no test tokens.
    """
    model, bits, count = GivenTheLast(levels), 0.0, 0
    for tokens, mask in train:
        model.fit(tokens, mask)
    for tokens, mask in test:
        bits, count = bits + model.bits(tokens, mask), count + int(mask.sum())
    if not count or not int(model.pairs.sum()):
        raise InputError("the baseline needs at least one training example and one test example")
    return bits / count
