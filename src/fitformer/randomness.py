"""Random numbers as pure functions of (seed, sample, draw): sample k is the same in a batch of any size."""

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor


def seeded_noise(seed: int, samples: Sequence[int], shape: Sequence[int], draw: int = 0) -> Tensor:
    """Standard normal noise `(len(samples), *shape)`, float32 on the CPU.

    For diffusion, draw 0 is meant for the start and draw k + 1 for step k.
    """
    drawn = [_stream(seed, sample, draw).standard_normal(tuple(shape), dtype=np.float32) for sample in samples]
    return torch.from_numpy(np.stack(drawn)) if drawn else torch.empty(0, *shape)


def seeded_uniforms(seed: int, samples: Sequence[int], draw: int = 0) -> Tensor:
    """One number in [0, 1) for each sample, `(len(samples),)`, float64 on the CPU."""
    return torch.tensor([_stream(seed, sample, draw).random() for sample in samples], dtype=torch.float64)


def _stream(seed: int, sample: int, draw: int) -> np.random.Generator:
    # A counter-based generator needs no hash of the three numbers: they are its key and its counter.
    key = np.array([seed % 2**64, sample % 2**64], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, draw]))


class GroupRandom:
    """Random numbers of each group's own, for dropout: what a group draws does not depend on the groups beside it.

    So every way to run the trunk, in slices of any size and on any device, drops the same units from the same keys.
    An element is dropped by a hash of its group's key, the number of the draw, and its place in the group.

    Args:
        keys: a key a group, int64 `(r,)`, of `group_keys`.
        stream: draws of another stream are others, for the same keys; the block's number.
    """

    def __init__(self, keys: Tensor, stream: int) -> None:
        self.low, self.high = (keys & 0x7FFFFFFF).int(), (keys >> 31).int()
        self.drawn = stream << 16

    def kept(self, shape: Sequence[int], rate: float) -> Tensor:
        """Booleans of a shape `(r, ...)`, each false with probability `rate`."""
        self.drawn += 1
        seeds = _hashed(self.low ^ _hashed(self.high + self.drawn))
        places = torch.arange(prod(shape[1:]), dtype=torch.int32, device=seeds.device) * -0x61C88647
        kept = torch.empty(len(seeds), len(places), dtype=torch.bool, device=seeds.device)
        # Piece by piece: what stays in the cache costs a CPU half as much.
        rows = len(seeds) if seeds.is_cuda else max(1, 2**17 // len(places))
        for part, piece in zip(seeds.split(rows), kept.split(rows), strict=True):
            torch.ge(_hashed(places ^ part[:, None]) & 0x7FFFFFFF, round(rate * 2**31), out=piece)
        return kept.view(tuple(shape))


def _hashed(x: Tensor) -> Tensor:
    # Wellons' lowbias32, https://github.com/skeeto/hash-prospector; torch shifts int32 with its sign, hence the masks.
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x.mul_(0x7FEB352D)
    x ^= (x >> 15) & 0x1FFFF
    x = x.mul_(0x846CA68B - 2**32)
    x ^= (x >> 16) & 0xFFFF
    return x


def group_keys(batch: int, groups: int) -> Tensor:
    """Keys `(b, t)` for `GroupRandom`, drawn from torch's own generator on the CPU."""
    return torch.randint(2**62, (batch, groups), device="cpu")


RandomState = tuple[Tensor, Tensor | None]


def random_state(device: torch.device) -> RandomState:
    """The state of torch's generators, on the CPU and on a GPU that computes."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_random_state(state: RandomState, device: torch.device) -> None:
    """Go back to a state of `random_state`."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
