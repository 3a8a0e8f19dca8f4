"""Prefetching: another thread fetches the next slice while the caller computes on this one."""

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

Fetched = TypeVar("Fetched", bound=tuple)


def prefetch(
    fetch: Callable[[slice], Fetched], slices: Sequence[slice], device: torch.device
) -> Generator[Fetched, None, None]:
    """Yield `fetch(slice)` for each slice, one slice ahead of the caller; closing waits for the fetch in progress.

    On a CUDA device the copies of a fetch run on a stream of their own, beside the caller's kernels.
    """
    computing = torch.cuda.current_stream(device) if device.type == "cuda" else None
    copying = torch.cuda.Stream(device) if device.type == "cuda" else None

    @torch.no_grad()
    def there(groups: slice, ready: torch.cuda.Event | None) -> tuple[Fetched, torch.cuda.Event | None]:
        # A thread has its own current device and stream.
        with torch.cuda.stream(copying):
            if copying is None or ready is None:
                return fetch(groups), None
            copying.wait_event(ready)
            return fetch(groups), copying.record_event()

    def submit(groups: slice) -> Future[tuple[Fetched, torch.cuda.Event | None]]:
        return pool.submit(there, groups, None if computing is None else computing.record_event())

    def arrived(future: Future[tuple[Fetched, torch.cuda.Event | None]]) -> Fetched:
        found, copied = future.result()
        if computing is not None and copied is not None:
            computing.wait_event(copied)
            for each in found:
                if isinstance(each, Tensor):
                    # Its memory belongs to the other stream, which must not take it back while kernels here read it.
                    each.record_stream(computing)
        return found

    with ThreadPoolExecutor(1, thread_name_prefix="fitformer-read") as pool:
        following = submit(slices[0])
        for groups in slices[1:]:
            found, following = arrived(following), submit(groups)
            yield found
            del found
        yield arrived(following)
