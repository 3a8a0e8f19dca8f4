"""The memory of this machine or of its GPU: how much there is, the most this process has taken, what it gives back."""

import ctypes
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

# What the kernel lets the processes of a container have, in its second and its first version of control groups.
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_STATUS, _MEMORY = Path("/proc/self/status"), Path("/proc/meminfo")


def total_memory(device: str = "cpu") -> int:
    """Bytes of memory that this process may have: the device's, or on a CPU the machine's or its container's."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[1]
    limits = [text for path in _LIMITS if path.is_file() and (text := path.read_text().strip()).isdigit()]
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *map(int, limits)])


def available_memory(device: str = "cpu") -> int:
    """Bytes that may be filled unasked: three quarters of all, or what is free, if that is less."""
    most = total_memory(device) * 3 // 4
    if device == "cuda":
        return min(most, torch.cuda.mem_get_info()[0])
    return min(most, _field(_MEMORY, "MemAvailable") or most)


def _field(path: Path, name: str) -> int | None:
    """Bytes that Linux tells under a name, given in kB; None elsewhere."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def peak_bytes(device: torch.device) -> int:
    """The most memory so far: resident set of the process, or what torch allocated on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux lets `ru_maxrss` of a process start from its parent's; this starts from nothing.
    if (peak := _field(_STATUS, "VmHWM")) is not None:
        return peak
    import resource  # not everywhere

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def trim_heap() -> None:
    """Give memory that was freed, and that the C library keeps for itself, back to the system.

    glibc keeps what is smaller than 32 MiB in a heap that it shortens from its end alone, however many holes there are.
    """
    if (trim := _trim()) is not None:
        trim(0)


@cache
def _trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
