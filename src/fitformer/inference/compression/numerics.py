"""What decides the bits of a probability: the weights, and the build and the machine that compute with them.

A decoder's probabilities differ in their last bits from one build of torch to the next, from one kind of processor to
the next, and with the number of threads. A range coder needs the very same bits on both sides.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from importlib.metadata import version
from typing import Any

import torch

from fitformer._support.device import processor_name
from fitformer.errors import InputError
from fitformer.inference.compression.container import CHECKSUM_BYTES, checksum


def fingerprint(decoder: Any) -> str:
    """A checksum of a decoder's configuration and weights."""
    digest = blake2b(json.dumps(decoder.config, sort_keys=True).encode(), digest_size=CHECKSUM_BYTES)
    for name, tensor in sorted(decoder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def device_of(decoder: Any) -> torch.device:
    """The device that a decoder computes on."""
    return next(decoder.parameters()).device


def environment(device: torch.device) -> dict[str, str]:
    """What decides the bits besides the weights and the number of threads, by name."""
    known = {
        "device": device.type,
        "torch": torch.__version__,
        "build of torch": checksum(torch.__config__.show().encode()).hex()[:16],
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "processor": processor_name(),
        "precision of products": torch.get_float32_matmul_precision(),
        "constriction": version("constriction"),
    }
    if device.type == "cuda":
        known["accelerator"] = torch.cuda.get_device_name(device)
    return known


def check_environment(where: str, then: dict[str, str], now: dict[str, str]) -> None:
    """Refuse a file that was compressed where numbers may come out otherwise.

    Raises:
        InputError: names all that differs.
    """
    names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    if names:
        listed = "; ".join(f"{name} {then.get(name, 'none')} there, {now.get(name, 'none')} here" for name in names)
        raise InputError(
            f"{where} was compressed elsewhere ({listed}), where the model's probabilities may differ in their last "
            "bits; decompress it there"
        )


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run torch with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
