"""Bytes to model: files, folders, and the text that comes with Python itself."""

import gzip
import importlib
import lzma
import os
import sysconfig
import weakref
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from fitformer._support.listed import listed
from fitformer.data.datasets.sources import existing
from fitformer.data.order import example_generator, permutation
from fitformer.errors import InputError

VOCABULARY = 256
# Files from here on are read window by window: they may be larger than memory.
_LARGE_FROM = 16 * 2**20
_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib-dynload", "__pycache__"}


@dataclass(frozen=True)
class Piece:
    """Bytes `start` to `stop` of a file, or of `data` where there is no file; `name` for messages."""

    name: str
    start: int
    stop: int
    data: bytes | None = None

    def __len__(self) -> int:
        return self.stop - self.start


class LargeFile:
    """A piece of a large file, whose bytes are read when they are asked for.

    Not mapped into memory: a mapped file that is cut short ends the process by a signal, without a word.
    """

    def __init__(self, piece: Piece) -> None:
        self.piece = piece
        self._file = os.open(piece.name, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def __len__(self) -> int:
        return len(self.piece)

    def __getitem__(self, where: slice) -> np.ndarray:
        """Bytes of the piece, a copy, uint8.

        Raises:
            InputError: the file has become shorter.
        """
        start, stop, _ = where.indices(len(self))
        begin, parts, missing = self.piece.start + start, [], stop - start
        while missing > 0:
            # By place: processes that inherit the file share where it is read otherwise.
            part = os.pread(self._file, missing, begin)
            if not part:
                raise _truncated(self.piece, os.fstat(self._file).st_size)
            parts.append(part)
            begin, missing = begin + len(part), missing - len(part)
        return np.frombuffer(b"".join(parts), np.uint8)


def _open(piece: Piece) -> "np.ndarray | LargeFile":
    if piece.data is not None:
        return np.frombuffer(piece.data, np.uint8)[piece.start : piece.stop]
    size = os.path.getsize(piece.name)
    if size < piece.stop:
        raise _truncated(piece, size)
    if len(piece) >= _LARGE_FROM:
        return LargeFile(piece)
    found = np.fromfile(piece.name, np.uint8, count=len(piece), offset=piece.start)
    if len(found) < len(piece):
        raise _truncated(piece, piece.start + len(found))
    return found


def _truncated(piece: Piece, size: int) -> InputError:
    return InputError(
        f"{piece.name} is truncated: it had {piece.stop} bytes when it was listed and has {size} now; put the file "
        "back as it was"
    )


class ByteBuffer:
    """The bytes of several pieces, one after the other; large files stay on the disk.

    Pickled as the list of pieces, so that worker processes open the files again instead of receiving their contents.

    Raises:
        InputError: a file is shorter than its piece.
    """

    def __init__(self, pieces: Sequence[Piece]):
        self.pieces = tuple(piece for piece in pieces if len(piece))
        self._ends = list(accumulate(len(piece) for piece in self.pieces))
        self._arrays = [_open(piece) for piece in self.pieces]

    def __reduce__(self) -> tuple[type["ByteBuffer"], tuple[tuple[Piece, ...]]]:
        return ByteBuffer, (self.pieces,)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def window(self, start: int, stop: int) -> np.ndarray:
        """Bytes `start` to `stop` (at most to the end), a copy, uint8 (stop - start,)."""
        parts = []
        first = bisect_right(self._ends, start)
        for array, end in zip(self._arrays[first:], self._ends[first:]):
            begin = end - len(array)
            if begin >= stop:
                break
            parts.append(array[max(start - begin, 0) : stop - begin])
        return np.concatenate(parts) if parts else np.empty(0, np.uint8)


def whole_file(path: str | Path) -> ByteBuffer:
    """All bytes of a file, which is read when they are asked for if it is large.

    Raises:
        InputError: there is no file.
    """
    path = Path(path)
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "is no regular file" if path.exists() else "is not there"
        raise InputError(f"{path} {kind}; give a file")
    return ByteBuffer([Piece(str(path), 0, path.stat().st_size)])


def file_pieces(path: str | None, glob: str = "**/*") -> list[Piece]:
    """A file, or the files below a folder that match `glob`, hidden ones left out, in sorted order.

    Raises:
        InputError: nothing is there, nothing matches, or all of it is empty.
    """
    root = existing(path, "files", "a file, or a folder of files")
    files = [root] if root.is_file() else sorted(file for file in root.glob(glob) if _plain(file, root))
    if not files:
        raise InputError(f"no file below {root} matches {glob!r}; set data.glob, e.g. to '**/*.txt'")
    pieces = [Piece(str(file), 0, file.stat().st_size) for file in files]
    if not any(map(len, pieces)):
        raise InputError(f"{root} has no bytes: {listed([piece.name for piece in pieces], 3)} empty")
    return pieces


def _plain(file: Path, root: Path) -> bool:
    return file.is_file() and not any(part.startswith(".") for part in file.relative_to(root).parts)


def python_sources() -> list[Piece]:
    """The running Python's standard library, .py files without its tests and installed packages, in sorted order.

    Raises:
        InputError: this Python comes without its sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files: list[Path] = []
    for where, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_LIBRARY]
        files += [Path(where, name) for name in names if name.endswith(".py")]
    if not files:
        raise InputError(f"this Python has no sources in {root}: give your own with data.source=files, data.path=...")
    files.sort(key=lambda file: file.relative_to(root).as_posix())
    return [Piece(str(file), 0, file.stat().st_size) for file in files]


def python_docs() -> list[Piece]:
    """The language reference that Python's `help` shows, English, a piece per topic, in sorted order.

    Raises:
        InputError: this Python comes without it.
    """
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ModuleNotFoundError as error:
        raise InputError("this Python has no pydoc_data: give a text with data.source=files, data.path=...") from error
    texts = {f"topic {name}": topics[name].encode() for name in sorted(topics)}
    return [Piece(name, 0, len(text), text) for name, text in texts.items()]


def split_pieces(pieces: Sequence[Piece], share: float, seed: int) -> tuple[list[Piece], list[Piece]]:
    """Kept and held-out pieces, in their order; about `share` of the bytes is held out.

    Whole pieces are held out, drawn by seed, as long as they do not go beyond the share; of a single piece, its tail.

    Raises:
        InputError: `share` is not between 0 and 1, or leaves one side without bytes.
    """
    pieces = [piece for piece in pieces if len(piece)]
    total = sum(map(len, pieces))
    wanted = round(share * total)
    if not 0 < share < 1 or not 0 < wanted < total:
        raise InputError(
            f"holding out {share:g} of {total} bytes leaves {wanted} held out and {total - wanted} to train on: "
            "choose a share between 0 and 1 that leaves some on both sides"
        )
    held: set[int] = set()
    for place in permutation(len(pieces), seed, 0).tolist():
        if len(pieces[place]) <= wanted:
            held.add(place)
            wanted -= len(pieces[place])
    if held:
        return [p for i, p in enumerate(pieces) if i not in held], [p for i, p in enumerate(pieces) if i in held]
    # One piece, or all of them larger than what is wanted: cut the tail off the last.
    *before, last = pieces
    middle = last.stop - wanted
    return (
        [*before, Piece(last.name, last.start, middle, last.data)],
        [Piece(last.name, middle, last.stop, last.data)],
    )


class BytesDataset(Dataset[dict[str, Any]]):
    """Windows of `length` bytes; `dataset[(epoch, index)]`, or `dataset[index]` for epoch 0.

    An item is `tokens` int64 (length,) in 0 .. 255, `mask` bool (length,), true where there is a byte, and `index`.
    In training a window starts anywhere, drawn from (seed, epoch, index), and an epoch has as many as fit side by side.
    With `short_length` there are `short` windows then, too, int64 (length / short_length, short_length), each from
    anywhere. Otherwise windows follow one another and cover every byte exactly once; the last is padded with 0.

    Raises:
        InputError: fewer bytes than one training window, or none.
    """

    classes: tuple[str, ...] = ()
    channels = 0
    vocabulary = VOCABULARY
    unit = "bytes"
    is_test = False

    def __init__(
        self,
        buffer: ByteBuffer,
        length: int,
        *,
        train: bool,
        seed: int = 0,
        title: str = "bytes",
        short_length: int | None = None,
    ):
        if length < 1:
            raise InputError(f"length is {length}: it must be at least 1")
        if len(buffer) < (length if train else 1):
            raise InputError(
                f"{title} is too short: it has {len(buffer)} {self.unit} and one window takes {length}; "
                f"set data.length to at most {len(buffer)}, or give more of it"
            )
        self.buffer, self.length, self.train, self.seed, self.title = buffer, length, train, seed, title
        self.short_length = short_length

    def describe(self) -> str:
        """One line: what and how much."""
        kind = "drawn at random" if self.train else "side by side"
        return f"{self.title}: {len(self.buffer):,} {self.unit}, {len(self):,} windows of {self.length:,} {kind}"

    def contents(self) -> bytes:
        """All of the bytes, for a baseline to compress."""
        return self.buffer.window(0, len(self.buffer)).tobytes()

    def __len__(self) -> int:
        return len(self.buffer) // self.length if self.train else -(-len(self.buffer) // self.length)

    def __getitem__(self, where: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = where if isinstance(where, tuple) else (0, where)
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        # Held-out windows draw nothing.
        random = example_generator(self.seed, epoch, index) if self.train else None
        start = index * self.length if random is None else int(random.integers(len(self.buffer) - self.length + 1))
        found = self._window(start, self.length)
        tokens = torch.zeros(self.length, dtype=torch.int64)
        tokens[: len(found)] = found
        item = {"tokens": tokens, "mask": torch.arange(self.length) < len(found), "index": index}
        if random is not None and self.short_length is not None:
            starts = random.integers(len(self.buffer) - self.short_length + 1, size=self.length // self.short_length)
            item["short"] = torch.stack([self._window(start, self.short_length) for start in starts.tolist()])
        return item

    def _window(self, start: int, length: int) -> torch.Tensor:
        return torch.from_numpy(self.buffer.window(start, start + length).astype(np.int64))


def compressed_bits_per_byte(data: bytes, method: str) -> float:
    """What `gzip -9` or `xz -9` makes of the data, bits per byte: the mark for a byte model on the same data.

    Raises:
        InputError: an unknown method, or no data.
    """
    if not data:
        raise InputError("there is nothing to compress: 0 bytes")
    if method == "gzip":
        size = len(gzip.compress(data, compresslevel=9))
    elif method == "xz":
        size = len(lzma.compress(data, preset=9))
    else:
        raise InputError(f"method is {method!r}: choose gzip or xz")
    return 8 * size / len(data)
