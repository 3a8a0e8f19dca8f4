"""The memory of this machine or of its GPU: how much there is, the most this process has taken, what it gives back."""

import ctypes
import os
import resource
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

# What the kernel lets the processes of a container have, in its second and its first version of control groups.
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_STATUS = Path("/proc/self/status")


def machine_memory(device: str = "cpu") -> int:
    """Bytes of memory that this process may have: the device's, or on a CPU the machine's or its container's."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[1]
    limits = [text for path in _LIMITS if path.is_file() and (text := path.read_text().strip()).isdigit()]
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *map(int, limits)])


def peak_bytes(device: torch.device) -> int:
    """The most memory so far: resident set of the process, or what torch allocated on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.is_file():
        # Linux lets `ru_maxrss` of a process start from its parent's; this starts from nothing.
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def give_back() -> None:
    """Give memory that was freed, and that the C library keeps for itself, back to the system.

    glibc keeps what is smaller than 32 MiB in a heap that it shortens from its end alone, however many holes there are.
    """
    if (trim := _trim()) is not None:
        trim(0)


@cache
def _trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
