"""The device to compute on, and the name of the processor."""

import platform
from pathlib import Path
from typing import TYPE_CHECKING

from fitformer.errors import InputError

if TYPE_CHECKING:
    import torch


def usable_device(name: str | None) -> "torch.device":
    """The device of this name, such as `cpu` or `cuda:0`; by default the GPU if there is one.

    Raises:
        InputError: the device cannot be used.
    """
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise InputError(f"the device {name!r} cannot be used ({first}); try the device cpu") from error
    if device.type == "meta":
        raise InputError("the device 'meta' holds no numbers; try the device cpu")
    return device


def processor_name() -> str:
    """The name of this machine's processor, or of its kind where the system tells no name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
