"""Sampling tokens from an autoregressive decoder (spec section 7: the reference never samples).

One loop, `generate`, asks a `Step` for the logits of the next token, filters and draws. A step is any callable
`step(tokens (b, p) so far) -> logits (b, vocab) of token p`; `uncached` makes the plain one, which runs the decoder on
all groups begun so far. A faster one (with caches, say) takes its place and must agree with it.
The draw for token p of sample k is a pure function of (seed, k, p): batch size, prompt and way of running do not enter.
"""

import itertools
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fitformer._support.checks import checked, whole
from fitformer._support.rng import seeded_uniforms
from fitformer._support.system_memory import check_room
from fitformer.errors import InputError
from fitformer.generation.logits import check_filters, draw, filter_logits

Step = Callable[[Tensor], Tensor]
"""`step(tokens (b, p) so far) -> logits (b, vocab) of token p`; called with one more token each time."""


@runtime_checkable
class Decoder(Protocol):
    """What is needed of a decoder; `FITDecoder` has it.

    Fewer groups than `num_groups` are to be the first ones; None takes any number.
    """

    num_groups: int | None
    tokens_per_group: int
    vocab_size: int

    def __call__(self, tokens: Tensor, /) -> Tensor:
        """Logits `(b, t, n, vocab)` of the targets, given tokens `(b, t, n)` shifted right by one."""


@checked
@torch.no_grad()
def generate(
    decoder: Decoder,
    prompt: Tensor | None,
    length: int,
    *,
    count: int = 1,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    first: int = 0,
    stop: int | None = None,
    window: bool = False,
    on_token: Callable[[int, Tensor], None] | None = None,
    step: Step | None = None,
) -> Tensor:
    """Tokens, int64 `(b, length)`: the prompt as it is, then drawn ones. The decoder should be in eval mode.

    Args:
        decoder: a `Decoder`.
        prompt: integer tokens `(b, L0)` that every sequence begins with; None begins `count` sequences from nothing.
        length: L, tokens in all, the prompt's included.
        count: b where there is no prompt.
        temperature, top_k, top_p: see `filter_logits`; temperature 0 takes the likeliest token.
        seed, first: row k is sample `first + k`, and depends on (seed, first + k) and its own prompt alone.
        stop: a token that ends a sequence when drawn. What follows in its row is filled with it, and the result is
            shorter than `length` when all rows have ended.
        window: go past the length the decoder was built for, with the last groups as context (see `uncached`).
        on_token: called as `on_token(p, tokens (b,))` with every column as it is drawn.
        step: what gives the logits; None for `uncached(decoder, window)`.

    Raises:
        InputError: a prompt of another shape or kind, longer than `length` or outside the vocabulary; a length that the
            decoder cannot reach without `window`; bad numbers for the filters; a stop token outside the vocabulary.
    """
    check_filters(temperature, top_k, top_p)
    _check_stop(stop, decoder.vocab_size)
    tokens = _start(decoder, prompt, count)
    _check_length(decoder, tokens.shape[1], length, window)
    # Tokens are int64: as much as two numbers each.
    check_room(f"tokens of {len(tokens)} sequences of length {length}", 2 * len(tokens) * length)
    step = uncached(decoder, window) if step is None else step
    samples = range(first, first + len(tokens))
    ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    for position in range(tokens.shape[1], length):
        if not len(tokens) or (stop is not None and bool(ended.all())):
            break
        logits = filter_logits(step(tokens), temperature, top_k, top_p)
        column = draw(logits, seeded_uniforms(seed, samples, position))
        if stop is not None:
            column = column.masked_fill(ended, stop)
            ended = column == stop
        tokens = torch.cat([tokens, column.unsqueeze(1)], dim=1)
        if on_token is not None:
            on_token(position, column)
    return tokens


@checked
def uncached(decoder: Decoder, window: bool = False) -> Step:
    """The plain step: the decoder runs on every group begun so far.

    With `window`, tokens past the decoder's length are drawn with the last `num_groups - 1` full groups and the current
    one as context: whole groups are dropped from the front, and the rest is read as if it were the beginning.

    Raises (the step):
        InputError: a token beyond the decoder's length, without `window`.
    """
    n, groups = decoder.tokens_per_group, decoder.num_groups

    def step(tokens: Tensor) -> Tensor:
        _check_length(decoder, tokens.shape[1], tokens.shape[1] + 1, window)
        context = tokens if groups is None else tokens[:, context_start(tokens.shape[1], n, groups) :]
        group, place = divmod(context.shape[1], n)
        # Shifted by one: place k holds token k - 1, the first is 0. What follows the last token is not seen by it.
        shifted = nn.functional.pad(context, (1, (group + 1) * n - context.shape[1] - 1))
        return decoder(shifted.unflatten(1, (group + 1, n)))[:, group, place]

    return step


@checked
def context_start(position: int, n: int, groups: int) -> int:
    """Where the context of token `position` begins if at most `groups` groups of `n` may be read, its own included.

    Raises:
        InputError: a place below 0, or counts below 1.
    """
    whole("position", position, 0), whole("n", n), whole("groups", groups)
    return max(position // n - groups + 1, 0) * n


def _start(decoder: Any, prompt: Tensor | None, count: int) -> Tensor:
    if prompt is None:
        whole("count", count)
        check_room(f"tokens of count={count} sequences", 2 * count)
        return torch.zeros(count, 0, dtype=torch.int64, device=_device(decoder))
    if prompt.ndim != 2 or prompt.is_floating_point() or prompt.is_complex() or prompt.dtype == torch.bool:
        raise InputError(f"the prompt is {prompt.dtype} {tuple(prompt.shape)}; give integer tokens (b, length)")
    prompt = prompt.long()
    outside = prompt[(prompt < 0) | (prompt >= decoder.vocab_size)]
    if len(outside):
        size = decoder.vocab_size
        raise InputError(f"the prompt has token {outside[0].item()}, the vocabulary has {size} (0 to {size - 1})")
    return prompt


def _device(decoder: Any) -> torch.device:
    if not isinstance(decoder, nn.Module):
        return torch.device("cpu")
    tensors = itertools.chain(decoder.parameters(), decoder.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _check_length(decoder: Any, begun: int, length: int, window: bool) -> None:
    if length < begun:
        raise InputError(f"the prompt has {begun} tokens, more than the length of {length}; ask for a greater length")
    groups, n = decoder.num_groups, decoder.tokens_per_group
    if groups is not None and length > groups * n and not window:
        raise InputError(
            f"a length of {length} is beyond the decoder's {groups * n} ({groups} groups of {n} tokens); "
            "ask for less, or for window=True, which goes on with the last groups as context"
        )


def _check_stop(stop: int | None, vocab_size: int) -> None:
    if stop is not None and not 0 <= stop < vocab_size:
        raise InputError(f"the stop token {stop} is outside the vocabulary of {vocab_size} (0 to {vocab_size - 1})")
