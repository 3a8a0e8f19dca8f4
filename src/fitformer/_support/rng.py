"""Random numbers as pure functions of (seed, sample, draw): sample k does not depend on the batch size."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fitformer._support.checks import checked


@checked
def seeded_noise(seed: int, samples: Sequence[int], shape: Sequence[int], draw: int = 0) -> Tensor:
    """Standard normal noise `(len(samples), *shape)`, float32 on the CPU.

    Diffusion uses draw 0 for the start and draw k + 1 for step k.
    """
    drawn = [_stream(seed, sample, draw).standard_normal(tuple(shape), dtype=np.float32) for sample in samples]
    return torch.from_numpy(np.stack(drawn)) if drawn else torch.empty(0, *shape)


def seeded_uniforms(seed: int, samples: Sequence[int], draws: Sequence[int]) -> Tensor:
    """A number in [0, 1) for each sample and its draw, `(len(samples),)`, float64 on the CPU."""
    numbers = [_stream(seed, sample, draw).random() for sample, draw in zip(samples, draws, strict=True)]
    return torch.tensor(numbers, dtype=torch.float64)


def _stream(seed: int, sample: int, draw: int) -> np.random.Generator:
    # The three numbers are the key and the counter of a counter-based generator, so no hash is needed.
    key = np.array([seed % 2**64, sample % 2**64], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, draw]))


RandomState = tuple[Tensor, Tensor | None]


def random_state(device: torch.device) -> RandomState:
    """The state of torch's generators on the CPU and, if `device` is a GPU, on it."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_random_state(state: RandomState, device: torch.device) -> None:
    """Restore a state from `random_state`."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
