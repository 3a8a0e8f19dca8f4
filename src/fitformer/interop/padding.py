"""Rows of several lengths in one batch of columns, padded on any side: read each as if it had no padding."""

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from fitformer.errors import InputError


@dataclass(frozen=True)
class Columns:
    """Tokens of a batch, moved to the front of their rows. What a causal decoder makes of them, padding cannot reach.

    Attributes:
        tokens: `(b, k)`, zeros behind a row's own.
        counts: a row's own tokens up to each column, itself included, int64 `(b, k)`.
    """

    tokens: Tensor
    counts: Tensor

    @classmethod
    def of(cls, tokens: Tensor, mask: Tensor | None) -> Self:
        """Take the tokens that a mask leaves.

        Args:
            tokens: `(b, k)`.
            mask: `(b, at least k)`, its last columns those of the tokens; 0 for padding. None for no padding.

        Raises:
            InputError: another shape.
        """
        if tokens.ndim != 2 or not tokens.shape[1]:
            raise InputError(f"tokens are {tuple(tokens.shape)}; give (b, L), L at least 1")
        batch, count = tokens.shape
        every = torch.arange(1, count + 1, device=tokens.device).expand(batch, count)
        if mask is None:
            return cls(tokens, every)
        if mask.ndim != 2 or len(mask) != batch or mask.shape[1] < count:
            raise InputError(f"attention_mask is {tuple(mask.shape)}; tokens of {(batch, count)} need one (b, L)")
        own = mask[:, -count:] != 0
        if bool(own.all()):
            return cls(tokens, every)
        counts = own.cumsum(1)
        front = tokens.gather(1, own.long().argsort(dim=1, descending=True, stable=True))
        return cls(front.masked_fill(every > counts[:, -1:], 0), counts)

    def inputs(self) -> Tensor:
        """Inputs of a decoder `(b, 1 + k)`: 0, then the tokens."""
        return F.pad(self.tokens, (1, 0))

    def after(self, outputs: Tensor) -> Tensor:
        """Of outputs `(b, at least 1 + k, ...)`, first that before any token, those after the tokens up to each column.

        Returns:
            `(b, k, ...)`.
        """
        rows = torch.arange(len(self.counts), device=self.counts.device)
        return outputs[rows[:, None], self.counts]
