"""Text as it is generated, byte by byte."""

import codecs
import sys
from typing import Any

from torch import Tensor

from fitformer._support.checks import checked, shown
from fitformer.errors import InputError
from fitformer.patching.sequence import tokens_to_bytes


class TextStreamer:
    """Writes one sequence of bytes as UTF-8 text while it is generated; a `Streamer`.

    The bytes of a character wait for its last one. What is no UTF-8 is written as U+FFFD, and so is a character that is
    cut off at the end.

    Args:
        file: where to, open for text; standard output by default. skip_prompt: leave the prompt out.

    Raises:
        InputError: a file that nothing can be written to.
    """

    @checked
    def __init__(self, file: Any = None, skip_prompt: bool = False) -> None:
        if file is not None and not (hasattr(file, "write") and hasattr(file, "flush")):
            raise InputError(f"file is {shown(file)}; it must be a file that is open for text")
        self.file, self.skip_prompt = file, skip_prompt
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._begun = False

    def put(self, tokens: Tensor) -> None:
        """Take the prompt `(1, L)`, then each byte `(1,)`.

        Raises:
            InputError: more than one sequence.
        """
        if len(tokens) != 1:
            raise InputError(f"a text is streamed for one sequence, not for {len(tokens)}")
        prompt, self._begun = not self._begun, True
        if not (prompt and self.skip_prompt):
            self._write(self._decoder.decode(tokens_to_bytes(tokens)))

    def end(self) -> None:
        """Write what still waits; the next sequence begins anew."""
        self._write(self._decoder.decode(b"", final=True))
        self._decoder.reset()
        self._begun = False

    def _write(self, text: str) -> None:
        file = sys.stdout if self.file is None else self.file
        file.write(text)
        file.flush()
