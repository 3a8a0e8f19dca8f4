"""Examples with different numbers of groups in one pass: all groups in one row, apart where latents meet."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class Examples:
    """How many groups each example has, in a row `(1, t, ...)` of the groups of all, one example after the other.

    A group phase never mixes groups, so it runs on the row as it is and computes nothing that fills up. For a global
    phase the examples are laid `apart`, each with as many groups as the largest, and `joined` again after it.
    """

    counts: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.counts)

    def apart(self, row: Tensor) -> Tensor:
        """Values `(1, t, ...)` of the row as `(b, most, ...)`, 0 beyond an example's own."""
        return pad_sequence(list(row[0].split(self.counts)), batch_first=True)

    def joined(self, apart: Tensor) -> Tensor:
        """Values `(b, most, ...)` as `(1, t, ...)` of the row."""
        return torch.cat([one[:count] for one, count in zip(apart, self.counts, strict=True)])[None]

    def sums(self, row: Tensor, groups: slice = slice(None)) -> Tensor:
        """The sum over each example's groups `(b, ...)`, of values `(1, s, ...)` of a slice of the row."""
        which = self.numbers[groups].to(row.device)
        return row.new_zeros(len(self), *row.shape[2:]).index_add(0, which, row[0])

    @cached_property
    def numbers(self) -> Tensor:
        """Which example each group of the row is of, int64 `(t,)`."""
        return torch.repeat_interleave(torch.tensor(self.counts))

    @cached_property
    def mask(self) -> Tensor:
        """Which groups are an example's own when they lie apart, booleans `(b, most)`."""
        return torch.arange(max(self.counts)) < torch.tensor(self.counts)[:, None]
