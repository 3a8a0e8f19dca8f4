"""Memory of this machine or of its GPU: total, available, peak of this process; trimming of the heap."""

import ctypes
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fitformer._support.bytesize import format_bytes
from fitformer.errors import InputError

# Memory limits of a container, in version 2 and version 1 of control groups.
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
# What is smaller than this is not worth asking the system.
FEW_NUMBERS = 2**24
_STATUS, _MEMORY = Path("/proc/self/status"), Path("/proc/meminfo")


def total_memory(device: str = "cpu") -> int:
    """Bytes of memory of the device; on a CPU those of the machine or of its container."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[1]
    limits = [text for path in _LIMITS if path.is_file() and (text := path.read_text().strip()).isdigit()]
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *map(int, limits)])


def available_memory(device: str = "cpu") -> int:
    """Bytes to use without a given budget: three quarters of the total, or the free memory if that is less."""
    most = total_memory(device) * 3 // 4
    if device == "cuda":
        return min(most, torch.cuda.mem_get_info()[0])
    return min(most, _field(_MEMORY, "MemAvailable") or most)


def check_room(what: str, numbers: int) -> None:
    """Refuse float32 tensors of so many numbers in all that this machine has no memory for them.

    Models on torch's meta device hold none.

    Raises:
        InputError: names both amounts.
    """
    if numbers < FEW_NUMBERS or torch.get_default_device().type == "meta":
        return
    if 4 * numbers > (most := total_memory()):
        raise InputError(
            f"{what} takes {format_bytes(4 * numbers)}, and this machine has {format_bytes(most)} of memory; ask for "
            "less of it"
        )


def _field(path: Path, name: str) -> int | None:
    """Bytes of a field that Linux reports in kB; None on other systems."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def peak_bytes(device: torch.device) -> int:
    """Peak memory so far: the resident set of the process, or on a GPU what torch allocated."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # On Linux `ru_maxrss` of a process starts at its parent's; VmHWM starts at 0.
    if (peak := _field(_STATUS, "VmHWM")) is not None:
        return peak
    import resource  # absent on Windows

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def trim_heap() -> None:
    """Return freed memory, which the C library holds, to the system.

    glibc allocates below 32 MiB in a heap that it shrinks only from the end, however many holes it has.
    """
    if (trim := _trim()) is not None:
        trim(0)


@cache
def _trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
