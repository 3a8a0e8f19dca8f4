"""The logits of the next token of each sequence: by a cache, or by the decoder on all of the context again.

A step is any callable `step(tokens (b, p), starts) -> logits (b, vocab)`, called with one more token each time; row k's
sequence begins at column `starts[k]`, so that rows of several lengths end at the same column.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fitformer._support.checks import checked, whole
from fitformer.errors import InputError
from fitformer.generation.cached_decoder import CachedDecoder, DecodingState, rows_by

Step = Callable[[Tensor, Sequence[int]], Tensor]


@runtime_checkable
class Decoder(Protocol):
    """What is needed of a decoder; `FITDecoder` has it. Fewer groups than `most_groups` are to be the first ones."""

    @property
    def most_groups(self) -> int | None:
        """Groups at most, None for any number."""

    @property
    def tokens_per_group(self) -> int:
        """Tokens of a group."""

    @property
    def vocab_size(self) -> int:
        """Number of different tokens."""

    def __call__(self, tokens: Tensor, /, **labels: Any) -> Tensor:
        """Logits `(b, t, n, vocab)` of the targets, given tokens `(b, t, n)` shifted right by one.

        A class-conditional decoder is told `labels (b,)` as well.
        """


@checked
def context_start(position: int, n: int, groups: int | None) -> int:
    """Where the context of token `position` begins if at most `groups` groups of `n` may be read, its own included.

    When they are full, the first half of them is dropped at once, and the rest is read as if it were the beginning: so
    half of the groups are read again once for as many new ones. None for no limit.

    Raises:
        InputError: a place below 0, or counts below 1.
    """
    whole("position", position, 0), whole("n", n)
    if groups is None:
        return 0
    beyond, half = position // n - whole("groups", groups) + 1, max(groups // 2, 1)
    return max(-(-beyond // half), 0) * half * n


def group_limit(decoder: Decoder, window: int | None) -> int | None:
    """Groups of context at most: the window, the decoder's own number, or None for no limit."""
    limits = [limit for limit in (window, decoder.most_groups) if limit is not None]
    return min(limits, default=None)


def check_held(decoder: Decoder, length: int, window: int | None = None) -> None:
    """Refuse a prompt of `length` tokens that a decoder cannot hold, unless a window says how much of its end is read.

    Raises:
        InputError: it is longer than the decoder's length.
    """
    groups, n = decoder.most_groups, decoder.tokens_per_group
    if window is None and groups is not None and length > groups * n:
        raise InputError(
            f"the prompt has {length} tokens, and the model holds {groups * n} ({groups} groups of {n}): give less of "
            f"it, or a window of at most {groups} groups, with which its end alone is read"
        )


class Uncached:
    """The plain step: the decoder runs on every group of the context.

    Args:
        decoder: a `Decoder`. window: groups of context at most. labels: classes `(b,)`, for a class-conditional one.
    """

    @checked
    def __init__(self, decoder: Decoder, window: int | None = None, labels: Tensor | None = None) -> None:
        self.decoder, self.groups, self.labels = decoder, group_limit(decoder, window), labels

    def __call__(self, tokens: Tensor, starts: Sequence[int]) -> Tensor:
        """Logits `(b, vocab)` of the token after `tokens (b, p)`, whose rows begin at `starts`."""
        logits: list[Any] = [None] * len(tokens)
        for start, rows in rows_by(starts).items():
            for row, own in zip(rows, self._of(tokens[rows, start:], rows), strict=True):
                logits[row] = own
        return torch.stack(logits)

    def _of(self, tokens: Tensor, rows: list[int]) -> Tensor:
        n = self.decoder.tokens_per_group
        context = tokens[:, context_start(tokens.shape[1], n, self.groups) :]
        group, place = divmod(context.shape[1], n)
        # Shifted by one: place k holds token k - 1, the first is 0. What follows the last token is not seen by it.
        shifted = nn.functional.pad(context, (1, (group + 1) * n - context.shape[1] - 1))
        told = {} if self.labels is None else {"labels": self.labels[rows]}
        return self.decoder(shifted.unflatten(1, (group + 1, n)), **told)[:, group, place]


class Cached:
    """The step with a cache, which reads each token once but for those of a context that begins anew.

    Args:
        decoder: a `FITDecoder`. window: groups of context at most.
        labels: classes `(b,)`, for a class-conditional decoder. compile: see `CachedDecoder`.

    Raises:
        InputError: the decoder is in training mode with dropout, or on a GPU with `compile`.
    """

    @checked
    def __init__(
        self, decoder: Decoder, window: int | None = None, labels: Tensor | None = None, *, compile: bool = False
    ) -> None:
        self.decoder, self.groups = CachedDecoder(decoder, compile=compile), group_limit(decoder, window)
        self.labels = labels
        self.state: DecodingState | None = None
        self.begins: list[int] = []

    def __call__(self, tokens: Tensor, starts: Sequence[int]) -> Tensor:
        """As `Uncached` gives them."""
        n, length = self.decoder.n, tokens.shape[1]
        begins = [start + context_start(length - start, n, self.groups) for start in starts]
        before, self.begins = self.begins, begins
        if self.state is not None and begins == before:
            return self.decoder.feed(self.state, tokens[:, -1:], last=True)[:, 0]
        if self.state is None:
            self.state, before = self._start(list(range(len(tokens)))), [-1] * len(tokens)
        logits: list[Any] = [None] * len(tokens)
        for (begin, old), rows in rows_by(list(zip(begins, before, strict=True))).items():
            if begin == old:
                some, inputs = self.state.select(rows), tokens[rows, -1:]
            else:
                some, inputs = self._start(rows), nn.functional.pad(tokens[rows, begin:], (1, 0))
            for row, own in zip(rows, self.decoder.feed(some, inputs, last=True)[:, 0], strict=True):
                logits[row] = own
            self.state.cache.put(rows, some.cache)
        return torch.stack(logits)

    def _start(self, rows: list[int]) -> DecodingState:
        return self.decoder.start(len(rows), None if self.labels is None else self.labels[rows])
