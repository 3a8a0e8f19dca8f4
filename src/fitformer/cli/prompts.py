"""Prompts of the command line: bytes or files, read and shown as they are needed."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fitformer.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 2**20


@dataclass(frozen=True)
class Prompt:
    """What is continued: `data`, or the file at `path`, which may be larger than memory.

    `shown` is false of what stands in where nothing was given.
    """

    data: bytes = b""
    path: Path | None = None
    shown: bool = True

    @classmethod
    def of_text(cls, text: str) -> "Prompt":
        """The bytes of an argument, as the shell gave them."""
        return cls(os.fsencode(text))

    @classmethod
    def of_file(cls, text: str) -> "Prompt":
        """A file by its name."""
        return cls(path=Path(text))

    def check(self) -> None:
        """Refuse a prompt of nothing.

        Raises:
            InputError: it is empty, or its file is not there.
        """
        if self.path is not None and not self.path.is_file():
            raise InputError(f"there is no prompt file {self.path}")
        if not len(self):
            raise InputError("the prompt is empty; leave it out to start without one")

    def __len__(self) -> int:
        return len(self.data) if self.path is None else self.path.stat().st_size

    def blocks(self, start: int = 0) -> Iterator[bytes]:
        """The bytes from `start` on, in pieces."""
        if self.path is None:
            yield self.data[start:]
            return
        with self.path.open("rb") as file:
            file.seek(start)
            while block := file.read(_BLOCK):
                yield block


class Printer:
    """Prints a prompt, then each byte that is generated; the bytes of an incomplete character wait. A `Streamer`.

    Nothing is printed before the first tokens come, so not for what cannot be generated.

    Args:
        prompt: what is continued. heading: a line before it.
    """

    def __init__(self, prompt: Prompt, heading: str = "") -> None:
        from fitformer.generation import TextStreamer

        self.prompt, self.heading, self.text = prompt, heading, TextStreamer()

    def put(self, tokens: "Tensor") -> None:
        """Take the prompt `(1, L)`, in whose place all of it is printed, then each byte `(1,)`."""
        if tokens.ndim == 1:
            self.text.put(tokens)
        else:
            self.begin()

    def begin(self) -> None:
        """Print the heading and the prompt."""
        print(self.heading, end="")
        for block in self.prompt.blocks() if self.prompt.shown else ():
            self.add(block)

    def add(self, data: bytes) -> None:
        """Print bytes."""
        from fitformer.patching import bytes_to_tokens

        self.text.put(bytes_to_tokens(data)[None])

    def end(self) -> None:
        """Print what waits, and end the line."""
        self.text.end()
        print(flush=True)
