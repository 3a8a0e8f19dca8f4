"""Prefetching: another thread fetches the next slice while the caller computes on this one."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def prefetch(fetch: Callable[[slice], Any], slices: Sequence[slice], device: torch.device) -> Iterator[Any]:
    """Yield `fetch(slice)` for each slice, one slice ahead of the caller; closing waits for the fetch in progress."""
    streaming = _stream_of(device)

    @torch.no_grad()
    def there(groups: slice) -> Any:
        with streaming():
            return fetch(groups)

    with ThreadPoolExecutor(1, thread_name_prefix="fitformer-read") as pool:
        following = pool.submit(there, slices[0])
        for groups in slices[1:]:
            found, following = following.result(), pool.submit(there, groups)
            yield found
            del found
        yield following.result()


def _stream_of(device: torch.device) -> Callable[[], AbstractContextManager]:
    """A context in which another thread copies on the caller's device and stream; a thread has its own of both."""
    if device.type != "cuda":
        return nullcontext
    stream = torch.cuda.current_stream(device)
    return lambda: torch.cuda.stream(stream)
