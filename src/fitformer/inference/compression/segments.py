"""A sequence cut into segments, which are coded side by side as the rows of a batch."""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path

import numpy as np

from fitformer.data.datasets.text import ByteBuffer
from fitformer.inference.compression.container import CHECKSUM_BYTES, checksum

# Columns that are read or written at a time.
BLOCK = 4096
# Fewer bytes a segment would lose more by beginning anew than a larger batch is worth.
LEAST_LENGTH, USUAL_SEGMENTS = 16384, 64


@dataclass(frozen=True)
class Segments:
    """`rows` segments of a sequence of `length` tokens; the first ones have one token more where they are not equal."""

    length: int
    rows: int

    @property
    def steps(self) -> int:
        """Tokens of the longest segment."""
        return -(-self.length // self.rows)

    def live(self, step: int) -> int:
        """Rows that have a token at a step; they are the first ones."""
        return self.rows if (step + 1) * self.rows <= self.length else self.length % self.rows

    @property
    def starts(self) -> list[int]:
        """Where the segments begin in the sequence."""
        least, more = divmod(self.length, self.rows)
        return [0, *accumulate(least + (row < more) for row in range(self.rows - 1))]

    def stop(self, row: int) -> int:
        """Where a segment ends in the sequence."""
        return self.length if row == self.rows - 1 else self.starts[row + 1]


def default_segments(length: int) -> int:
    """Segments of a sequence of so many tokens: as many as have `LEAST_LENGTH`, at most `USUAL_SEGMENTS`."""
    return max(min(length // LEAST_LENGTH, USUAL_SEGMENTS), 1)


class Digest:
    """A checksum of a sequence that is read or written segment by segment, all of them side by side."""

    def __init__(self, rows: int) -> None:
        self.parts = [blake2b(digest_size=CHECKSUM_BYTES) for _ in range(rows)]

    def update(self, row: int, content: bytes) -> None:
        """Add the next bytes of a segment."""
        self.parts[row].update(content)

    def value(self) -> str:
        """The checksum of what was added."""
        return checksum(*(part.digest() for part in self.parts)).hex()


class Reader:
    """Columns of the segments of some bytes, in order, and the checksum of those that were read."""

    def __init__(self, source: ByteBuffer, segments: Segments) -> None:
        self.source, self.segments, self.digest = source, segments, Digest(segments.rows)

    def columns(self) -> Iterator[np.ndarray]:
        """The bytes (live,), uint8, of every step.

        Raises:
            InputError: the file has become shorter.
        """
        for begin in range(0, self.segments.steps, BLOCK):
            block = np.zeros((self.segments.rows, min(BLOCK, self.segments.steps - begin)), np.uint8)
            for row, start in enumerate(self.segments.starts):
                found = self.source.window(start + begin, min(start + begin + BLOCK, self.segments.stop(row)))
                block[row, : len(found)] = found
                self.digest.update(row, found.tobytes())
            for step, column in enumerate(block.T, start=begin):
                yield column[: self.segments.live(step)]


class Writer:
    """A file that is written column by column of its segments, and the checksum of what was written.

    It is whole after `flush`.
    """

    def __init__(self, path: Path, segments: Segments) -> None:
        self.path, self.segments, self.digest = path, segments, Digest(segments.rows)
        self._block = np.zeros((segments.rows, BLOCK), np.uint8)
        self._begin = self._step = 0

    def add(self, column: np.ndarray) -> None:
        """Write the bytes (live,) of the next step."""
        self._block[: len(column), self._step - self._begin] = column
        self._step += 1
        if self._step - self._begin == BLOCK:
            self.flush()

    def flush(self) -> None:
        """Write what is still in memory."""
        with open(self.path, "r+b") as file:
            for row, start in enumerate(self.segments.starts):
                count = min(self._step, self.segments.stop(row) - start) - self._begin
                content = self._block[row, : max(count, 0)].tobytes()
                self.digest.update(row, content)
                file.seek(start + self._begin)
                file.write(content)
        self._begin = self._step
