"""Exact likelihoods of sequences of any length, in bounded memory: what a lossless compressor by the model would spend.

A decoder for any number of groups reads a sequence as one; a decoder of a fixed length, or one that is given a
`context`, reads it in windows that overlap, and every token is scored once, by the window in which it has the context.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fitformer._support.checks import checked, whole
from fitformer.data.datasets.text import ByteBuffer
from fitformer.errors import InputError
from fitformer.generation import CachedDecoder, Decoder

Tokens = ByteBuffer | Tensor | bytes
"""A sequence: the bytes of files, integer tokens `(L,)`, or bytes."""

Read = Callable[[int, int], Tensor]

# Logits of so many tokens are held at a time.
MOST_LOGITS = 4096


@dataclass(frozen=True)
class Windows:
    """Windows of `context + stride` tokens, each beginning `stride` after the one before.

    The first scores all of its tokens, every other one the last `stride`, which have at least `context` before them.
    """

    context: int
    stride: int

    @property
    def length(self) -> int:
        """Tokens of a window."""
        return self.context + self.stride

    @classmethod
    def of(cls, decoder: Any, context: int | None = None, stride: int | None = None) -> "Windows | None":
        """The windows in which a decoder reads; None for a decoder that reads a sequence of any length as one.

        Args:
            decoder: a `FITDecoder`.
            context, stride: of the windows. For a decoder of a fixed length they fill it by default, half and half in
                whole groups; for one of any length the missing one is as the other.

        Raises:
            InputError: a context below 0, a stride below 1, or windows longer than the decoder reads.
        """
        if context is not None:
            whole("context", context, 0)
        if stride is not None:
            whole("stride", stride)
        n, groups = decoder.tokens_per_group, decoder.most_groups
        if groups is not None:
            return cls._within(n, groups, context, stride)
        if context is None and stride is None:
            return None
        context = stride if context is None else context
        assert context is not None
        return cls(context, stride or context or n)

    @classmethod
    def _within(cls, n: int, groups: int, context: int | None, stride: int | None) -> "Windows":
        """Windows for a decoder of so many groups."""
        length = groups * n
        if context is None:
            stride = max(groups // 2, 1) * n if stride is None else stride
            context = length - stride
        stride = length - context if stride is None else stride
        if context < 0 or stride < 1 or context + stride > length:
            raise InputError(
                f"a context of {max(context, 0)} tokens and a stride of {max(stride, 1)} make windows beyond the "
                f"decoder's {length} ({groups} groups of {n} tokens); ask for a smaller context or stride"
            )
        return cls(context, stride)


@checked
def token_log_likelihoods(
    decoder: Decoder, tokens: Tokens, *, context: int | None = None, stride: int | None = None, batch_size: int = 8
) -> Iterator[Tensor]:
    """The log-likelihood in nats of every token given those before it, in order, as float64 pieces `(k,)`.

    Args:
        decoder: a `FITDecoder` in eval mode.
        tokens: the sequence. Files are read piece by piece.
        context, stride: see `Windows.of`.
        batch_size: windows at once; it does not change the values, but for rounding.

    Raises:
        InputError: tokens outside the vocabulary or of another shape, windows that do not fit the decoder, a file that
            has become shorter, or logits that are no finite numbers.
    """
    sequence, windows = _Sequence.of(tokens), Windows.of(decoder, context, stride)
    whole("batch_size", batch_size)
    return _pieces(_Scorer(decoder), sequence, windows, batch_size)


@checked
def log_likelihood(
    decoder: Decoder, tokens: Tokens, *, context: int | None = None, stride: int | None = None, batch_size: int = 8
) -> float:
    """The log-likelihood in nats of a sequence: the sum of `token_log_likelihoods`, 0 for an empty one.

    Raises:
        InputError: as `token_log_likelihoods`.
    """
    pieces = token_log_likelihoods(decoder, tokens, context=context, stride=stride, batch_size=batch_size)
    return math.fsum(float(piece.sum()) for piece in pieces)


@dataclass(frozen=True)
class _Sequence:
    """Tokens that are read piece by piece."""

    source: ByteBuffer | Tensor

    @classmethod
    def of(cls, tokens: Tokens) -> "_Sequence":
        if isinstance(tokens, bytes):
            tokens = torch.frombuffer(bytearray(tokens), dtype=torch.uint8) if tokens else torch.zeros(0).byte()
        kind = isinstance(tokens, Tensor) and (tokens.is_floating_point() or tokens.is_complex())
        if isinstance(tokens, Tensor) and (tokens.ndim != 1 or kind or tokens.dtype == torch.bool):
            raise InputError(f"tokens are {tokens.dtype} {tuple(tokens.shape)}; give integer tokens (length,)")
        return cls(tokens)

    def __len__(self) -> int:
        return len(self.source)

    def read(self, start: int, stop: int) -> Tensor:
        """Tokens `(k,)` from `start` to `stop`, or to the end, int64."""
        if isinstance(self.source, Tensor):
            return self.source[start:stop].long()
        return torch.from_numpy(self.source.window(start, min(stop, len(self))).astype(np.int64))


class _Scorer:
    """Log-likelihoods of rows of tokens, a piece after the other, by a cache."""

    def __init__(self, decoder: Any) -> None:
        self.decoder = CachedDecoder(decoder)
        self.device = next(decoder.parameters()).device

    @torch.inference_mode()
    def scores(self, rows: int, length: int, skip: int, read: Read) -> Iterator[Tensor]:
        """Log-likelihoods `(rows, k)` of the tokens from `skip` to `length`, read by `read(start, stop)`."""
        state, before = self.decoder.start(rows), torch.zeros(rows, 1, dtype=torch.int64, device=self.device)
        step, start = max(MOST_LOGITS // rows // self.decoder.n, 1) * self.decoder.n, 0
        while start < length:
            # To the end of a group, so that the next piece is whole groups.
            stop = skip if start < skip else min((start // step + 1) * step, length)
            tokens = read(start, stop).to(self.device)
            inputs, before = torch.cat([before, tokens[:, :-1]], dim=1), tokens[:, -1:]
            logits = self.decoder.feed(state, inputs, last=start < skip)
            if start >= skip:
                yield _chosen(logits, tokens)
            start = stop


def _chosen(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-likelihoods `(b, k)`, float64 on the CPU, of tokens `(b, k)` by logits `(b, k, vocab)`."""
    _check_inside(tokens, logits.shape[-1])
    found = logits.double().log_softmax(-1).gather(2, tokens[..., None])[..., 0].cpu()
    if not bool(found.isfinite().all()):
        raise InputError("the decoder's logits are not finite numbers; its weights or its precision are broken")
    return found


def _check_inside(tokens: Tensor, vocab_size: int) -> None:
    low, high = (int(end) for end in torch.aminmax(tokens))
    if low < 0 or high >= vocab_size:
        outside = low if low < 0 else high
        raise InputError(f"the tokens have {outside}, outside the vocabulary of {vocab_size} (0 to {vocab_size - 1})")


def _pieces(scorer: _Scorer, sequence: _Sequence, windows: Windows | None, batch_size: int) -> Iterator[Tensor]:
    """Log-likelihoods `(k,)` of a sequence, in order."""
    length = len(sequence)
    begun = length if windows is None else min(windows.length, length)
    scorer.decoder.check_room(1, begun)
    for piece in scorer.scores(1, begun, 0, lambda start, stop: sequence.read(start, stop)[None]):
        yield piece[0]
    if windows is None or windows.length >= length:
        return
    starts = range(windows.stride, length - windows.context, windows.stride)
    for first in range(0, len(starts), batch_size):
        some = starts[first : first + batch_size]
        rows = _rows(sequence, some, windows)
        scored = scorer.scores(len(some), windows.length, windows.context, partial(_columns, rows))
        joined = torch.cat(list(scored), dim=1).flatten()
        # The last window is filled up, and what fills it counts nothing.
        yield joined[: length - some[0] - windows.context]


def _columns(rows: Tensor, start: int, stop: int) -> Tensor:
    return rows[:, start:stop]


def _rows(sequence: _Sequence, starts: range, windows: Windows) -> Tensor:
    """The tokens of windows `(b, length)`, the last filled up with 0."""
    tokens = sequence.read(starts[0], starts[-1] + windows.length)
    filled = torch.nn.functional.pad(tokens, (0, starts[-1] + windows.length - starts[0] - len(tokens)))
    return filled.unfold(0, windows.length, windows.stride)
