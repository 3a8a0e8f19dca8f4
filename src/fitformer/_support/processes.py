"""Processes that train together."""

from typing import TypeVar

import torch.distributed

T = TypeVar("T")


def from_all_processes(own: T) -> list[T]:
    """What each process has, in the order of their ranks; of a process that trains alone its own."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [own]
    found: list[T | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, own)
    return found  # type: ignore[return-value]
