"""Bytes by documents: files, or the parts of files that a separator ends, packed into rows that share no context."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, pairwise
from typing import Any

import numpy as np
import torch

from fitformer.data.datasets.text import ByteBuffer, BytesDataset, Piece
from fitformer.patching import pack_rows

# Files are searched for separators so many bytes at a time.
_SEARCHED_AT_ONCE = 16 * 2**20


def document_ends(buffer: ByteBuffer, separator: bytes | None) -> np.ndarray:
    """Where each document of a buffer ends, int64 and ascending: at the end of a piece, and after each separator.

    A separator belongs to the document that it ends, and so do further ones that follow it at once.
    """
    pieces = np.cumsum([0, *(len(piece) for piece in buffer.pieces)])
    if separator is None:
        return pieces[1:]
    inside = [_separated(buffer, int(start), int(stop), separator) for start, stop in pairwise(pieces)]
    return np.union1d(pieces[1:], np.concatenate(inside)).astype(np.int64)


def _separated(buffer: ByteBuffer, start: int, stop: int, separator: bytes) -> np.ndarray:
    """Ends of the runs of separators between two places of a buffer."""
    found = np.fromiter(_separator_ends(buffer, start, stop, separator), np.int64)
    last_of_run = np.append(np.diff(found) > len(separator), True) if len(found) else np.zeros(0, bool)
    return found[last_of_run]


def _separator_ends(buffer: ByteBuffer, start: int, stop: int, separator: bytes) -> Iterator[int]:
    pattern, at_once = re.compile(re.escape(separator)), max(_SEARCHED_AT_ONCE, 2 * len(separator))
    while start < stop:
        read = min(start + at_once, stop)
        end = start
        for match in pattern.finditer(buffer.window(start, read).tobytes()):
            end = start + match.end()
            yield end
        # A separator may begin in the last bytes that were read.
        start = read if read == stop else max(end, read - len(separator) + 1)


def end_at_separator(
    kept: Sequence[Piece], held: Sequence[Piece], separator: bytes
) -> tuple[Sequence[Piece], Sequence[Piece]]:
    """Two parts of the data, with the place where one file was cut between them moved on to the next separator.

    It stays where it is if no separator follows that leaves something after it.
    """
    *before, last = kept
    first, *after = held
    if (last.name, last.stop) != (first.name, first.start):
        return kept, held
    # The separator may have been cut itself.
    begin = max(last.start, last.stop - len(separator))
    buffer = ByteBuffer([replace(last, start=begin), first])
    ends = (begin + end for end in _separator_ends(buffer, 0, len(buffer), separator))
    place = next((end for end in ends if end >= last.stop), first.stop)
    if place == first.stop:
        return kept, held
    return [*before, replace(last, stop=place)], [replace(first, start=place), *after]


class DocumentsDataset(BytesDataset):
    """Documents in rows of at least `length` bytes, whole groups of a decoder; `dataset[index]`.

    An item is `tokens` int64 `(t * n,)` in 0 .. 255, `mask` bool of the same shape, true where there is a byte,
    `documents` int64 `(t,)`, the number of each group's document in the row and -1 for none, and `index`. Every byte
    comes exactly once an epoch. A document longer than a row is cut into several. Groups have one byte until
    `group_for` says how many.

    Args:
        buffer: the bytes. ends: of the documents, see `document_ends`. length: of a row, rounded up to whole groups.
        title: for messages.

    Raises:
        InputError: no bytes.
    """

    def __init__(self, buffer: ByteBuffer, ends: np.ndarray, length: int, *, title: str = "bytes"):
        super().__init__(buffer, length, train=False, title=title)
        self.ends = ends
        self.group_for(1)

    def group_for(self, tokens_per_group: int) -> None:
        """Pack the documents into rows of groups of so many bytes, as a decoder takes them."""
        self.tokens_per_group, self.groups = tokens_per_group, -(-self.length // tokens_per_group)
        row = self.groups * tokens_per_group
        begins = np.concatenate([[0], self.ends[:-1]])
        cuts = [np.arange(begin, end, row) for begin, end in zip(begins.tolist(), self.ends.tolist())]
        self.starts = np.concatenate(cuts)
        self.sizes = np.append(self.starts[1:], self.ends[-1]) - self.starts
        rows = pack_rows((-(-self.sizes // tokens_per_group)).tolist(), self.groups)
        self.members = np.array(list(chain.from_iterable(rows)))
        self.places = np.cumsum([0, *map(len, rows)])

    def describe(self) -> str:
        """One line: what and how much."""
        filled = len(self.buffer) / (len(self) * self.groups * self.tokens_per_group)
        return (
            f"{self.title}: {len(self.buffer):,} bytes, {len(self.ends):,} documents in {len(self):,} rows of "
            f"{self.groups * self.tokens_per_group:,}, {filled:.0%} full"
        )

    def __len__(self) -> int:
        return len(self.places) - 1

    def __getitem__(self, where: int | tuple[int, int]) -> dict[str, Any]:
        _, index = where if isinstance(where, tuple) else (0, where)
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        n, group = self.tokens_per_group, 0
        tokens = torch.zeros(self.groups * n, dtype=torch.int64)
        mask, documents = torch.zeros(len(tokens), dtype=torch.bool), torch.full((self.groups,), -1)
        for number, k in enumerate(self.members[self.places[index] : self.places[index + 1]].tolist()):
            start, size = int(self.starts[k]), int(self.sizes[k])
            found = self.buffer.window(start, start + size).astype(np.int64)
            tokens[group * n : group * n + size] = torch.from_numpy(found)
            mask[group * n : group * n + size] = True
            stop = group + -(-size // n)
            documents[group:stop], group = number, stop
        return {"tokens": tokens, "mask": mask, "documents": documents, "index": index}
