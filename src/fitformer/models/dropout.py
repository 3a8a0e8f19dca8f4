"""Dropout whose draws belong to a group: what a group drops does not depend on the groups beside it."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor


class GroupRandom:
    """Random numbers of each group's own, for dropout: what a group draws does not depend on the groups beside it.

    So every way to run the trunk, in slices of any size and on any device, drops the same units from the same keys.
    An element is dropped by a hash of its group's key, the number of the draw, and its place in the group.

    Args:
        keys: a key a group, int64 `(r,)`, of `draw_keys`.
        stream: draws of another stream are others, for the same keys; the block's number.
    """

    def __init__(self, keys: Tensor, stream: int) -> None:
        self.low, self.high = (keys & 0x7FFFFFFF).int(), (keys >> 31).int()
        self.drawn = stream << 16

    def kept(self, shape: Sequence[int], rate: float) -> Tensor:
        """Booleans of a shape `(r, ...)`, each false with probability `rate`."""
        self.drawn += 1
        seeds = _hashed(self.low ^ _hashed(self.high + self.drawn))
        coords = torch.arange(prod(shape[1:]), dtype=torch.int32, device=seeds.device) * -0x61C88647
        kept = torch.empty(len(seeds), len(coords), dtype=torch.bool, device=seeds.device)
        # Piece by piece: what stays in the cache costs a CPU half as much.
        rows = len(seeds) if seeds.is_cuda else max(1, 2**17 // len(coords))
        for part, piece in zip(seeds.split(rows), kept.split(rows), strict=True):
            torch.ge(_hashed(coords ^ part[:, None]) & 0x7FFFFFFF, round(rate * 2**31), out=piece)
        return kept.view(tuple(shape))


def _hashed(x: Tensor) -> Tensor:
    # Wellons' lowbias32, https://github.com/skeeto/hash-prospector; torch shifts int32 with its sign, hence the masks.
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x.mul_(0x7FEB352D)
    x ^= (x >> 15) & 0x1FFFF
    x = x.mul_(0x846CA68B - 2**32)
    x ^= (x >> 16) & 0xFFFF
    return x


def draw_keys(batch: int, groups: int) -> Tensor:
    """Keys `(b, t)` for `GroupRandom`, drawn from torch's own generator on the CPU."""
    return torch.randint(2**62, (batch, groups), device="cpu")
