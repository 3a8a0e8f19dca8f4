"""Where the data tokens between two blocks are kept while slices come and go: in memory, on the host, or on disk."""

import errno
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from fitformer._support.bytesize import format_bytes

Keep = Literal["memory", "host", "disk"]
Shape = tuple[int, int, int, int]


class ScratchError(OSError):
    """The scratch folder for data tokens is absent, too full or failing: the input is not at fault."""


class TokenStore(Protocol):
    """Space for tokens `(b, t, n, c)`, written and read by slices of groups."""

    def put(self, groups: slice, x: Tensor) -> None:
        """Keep `x (b, s, n, c)` as the tokens of a slice of groups."""

    def get(self, groups: slice) -> Tensor:
        """The tokens `(b, s, n, c)` of a slice of groups."""

    def close(self) -> None:
        """Release the space."""


class MemoryStore:
    """Tokens in a tensor on the device that computes."""

    def __init__(self, shape: Shape, dtype: torch.dtype, like: Tensor) -> None:
        self.computed = like.dtype
        self.tokens: Tensor | None = torch.empty(shape, dtype=dtype, device=like.device)

    def put(self, groups: slice, x: Tensor) -> None:
        """Copy in."""
        assert self.tokens is not None
        self.tokens[:, groups] = x.detach()

    def get(self, groups: slice) -> Tensor:
        """The tokens themselves, unless they are kept in another type."""
        assert self.tokens is not None
        return self.tokens[:, groups].to(self.computed)

    def close(self) -> None:
        """Release the tensor."""
        self.tokens = None


class HostStore:
    """Tokens of a CUDA device in pinned memory of its host; copies to it run on a stream beside the kernels."""

    def __init__(self, shape: Shape, dtype: torch.dtype, like: Tensor) -> None:
        batch, groups, *token = shape
        self.device, self.computed = like.device, like.dtype
        # Groups first: a slice of groups is one piece of memory, which a copy needs to be asynchronous.
        pinned = torch.empty((groups, batch, *token), dtype=dtype, device="cpu", pin_memory=True)
        self.tokens: Tensor | None = pinned
        self.stream = torch.cuda.Stream(like.device)
        self.written: dict[int, torch.cuda.Event] = {}

    def put(self, groups: slice, x: Tensor) -> None:
        """Start to copy; later work on the caller's stream does not wait for it."""
        assert self.tokens is not None
        # Converted before it travels: a copy to pinned memory that converts makes another copy.
        x = x.detach().to(self.tokens.dtype).transpose(0, 1).contiguous()
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            self.tokens[groups].copy_(x, non_blocking=True)
            self.written[groups.start] = self.stream.record_event()
        x.record_stream(self.stream)

    def get(self, groups: slice) -> Tensor:
        """Copy back on the caller's stream, once the tokens have arrived."""
        assert self.tokens is not None
        waiting = torch.cuda.current_stream(self.device)
        if groups.start in self.written:
            waiting.wait_event(self.written[groups.start])
        else:  # another slice than those that were put
            waiting.wait_stream(self.stream)
        return self.tokens[groups].to(self.device, non_blocking=True).to(self.computed).transpose(0, 1)

    def close(self) -> None:
        """Release the memory; torch reuses it once the copies from and to it are done."""
        self.tokens = None


class DiskStore:
    """Tokens in a scratch file without a name: whatever happens to the process, nothing of it stays on the disk.

    Raises:
        ScratchError: the folder's disk failed or is full; names the folder. So do `put` and `get`.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, like: Tensor, folder: Path) -> None:
        batch, groups, *token = shape
        self.shape, self.dtype, self.device, self.computed = (batch, *token), dtype, like.device, like.dtype
        self.row, self.folder = batch * prod(token) * dtype.itemsize, folder
        with self._named():
            file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
            self.file = file.fileno()
            self.close = weakref.finalize(self, file.close)
            # Reserved now, so that no disk turns out full in the middle of a step.
            os.posix_fallocate(self.file, 0, groups * self.row)

    def put(self, groups: slice, x: Tensor) -> None:
        """Write."""
        first, _, _ = groups.indices(2**62)
        # Groups first: a slice of groups is one piece of the file.
        rows = x.detach().to("cpu", self.dtype).transpose(0, 1).contiguous()
        left, place = rows.view(torch.uint8).numpy().reshape(-1).data, first * self.row
        with self._named():
            while left:
                written = os.pwrite(self.file, left, place)
                left, place = left[written:], place + written

    def get(self, groups: slice) -> Tensor:
        """Read."""
        first, last, _ = groups.indices(2**62)
        batch, *token = self.shape
        rows = torch.empty(last - first, batch, *token, dtype=self.dtype, device="cpu")
        left, place = rows.view(torch.uint8).numpy().reshape(-1).data, first * self.row
        with self._named():
            while left:
                found = os.preadv(self.file, [left], place)
                if not found:
                    raise OSError(errno.EIO, "the file ends too early")
                left, place = left[found:], place + found
        return rows.transpose(0, 1).to(self.device, self.computed)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Name the folder, and what it is for, in the error of a failing disk."""
        try:
            yield
        except OSError as error:
            what = f"{error.strerror} (scratch for data tokens)"
            raise ScratchError(error.errno, what, str(self.folder)) from error


def check_disk_space(folder: Path, size: int) -> None:
    """Refuse scratch that a disk has no space for.

    Raises:
        ScratchError: there is no such folder, or it has less than `size` bytes free.
    """
    if not folder.is_dir():
        raise ScratchError(f"there is no folder {folder} for the scratch of data tokens")
    free = shutil.disk_usage(folder).free
    if free < size:
        raise ScratchError(
            f"the data tokens between blocks need {format_bytes(size)} of scratch, and {folder} has "
            f"{format_bytes(free)} free; give another folder, keep them in bf16 (half of it), or in memory"
        )


def make_stores(
    count: int, keep: Keep, shape: Shape, dtype: torch.dtype, like: Tensor, folder: Path | None
) -> Sequence[TokenStore]:
    """Stores for tokens `shape` where `keep` says, held as `dtype`, read with the device and type of `like`.

    Raises:
        ScratchError: there is no such folder, its disk has no space for all of them (says how much is needed), or it
            failed.
    """
    if keep == "disk":
        folder = Path(tempfile.gettempdir()) if folder is None else folder
        check_disk_space(folder, count * prod(shape) * dtype.itemsize)
        return [DiskStore(shape, dtype, like, folder) for _ in range(count)]
    kind = HostStore if keep == "host" and like.device.type == "cuda" else MemoryStore
    return [kind(shape, dtype, like) for _ in range(count)]
