"""Sampling tokens from an autoregressive decoder (spec section 7: the reference never samples).

One loop, `generate`, asks a `Step` for the logits of the next token, filters and draws. A step is any callable
`step(tokens (b, p) so far) -> logits (b, vocab) of token p`; `uncached` makes the plain one, which runs the decoder on
all groups begun so far. A faster one (with caches, say) takes its place and must agree with it.
The draw for token p of sample k is a pure function of (seed, k, p): batch size, prompt and way of running do not enter.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fitformer._support.rng import seeded_uniforms
from fitformer.errors import InputError

Step = Callable[[Tensor], Tensor]
"""`step(tokens (b, p) so far) -> logits (b, vocab) of token p`; called with one more token each time."""


class Decoder(Protocol):
    """What is needed of a decoder; `FITDecoder` has it. Fewer groups than `num_groups` are to be the first ones."""

    num_groups: int
    tokens_per_group: int
    vocab_size: int

    def __call__(self, tokens: Tensor, /) -> Tensor:
        """Logits `(b, t, n, vocab)` of the targets, given tokens `(b, t, n)` shifted right by one."""


@torch.no_grad()
def generate(
    decoder: Any,
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
    _check_filters(temperature, top_k, top_p)
    _check_stop(stop, decoder.vocab_size)
    tokens = _start(decoder, prompt, count)
    _check_length(decoder, tokens.shape[1], length, window)
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


def uncached(decoder: Any, window: bool = False) -> Step:
    """The plain step: the decoder runs on every group begun so far.

    With `window`, tokens past the decoder's length are drawn with the last `num_groups - 1` full groups and the current
    one as context: whole groups are dropped from the front, and the rest is read as if it were the beginning.

    Raises (the step):
        InputError: a token beyond the decoder's length, without `window`.
    """
    n, groups = decoder.tokens_per_group, decoder.num_groups

    def step(tokens: Tensor) -> Tensor:
        _check_length(decoder, tokens.shape[1], tokens.shape[1] + 1, window)
        context = tokens[:, context_start(tokens.shape[1], n, groups) :]
        group, place = divmod(context.shape[1], n)
        # Shifted by one: place k holds token k - 1, the first is 0. What follows the last token is not seen by it.
        shifted = nn.functional.pad(context, (1, (group + 1) * n - context.shape[1] - 1))
        return decoder(shifted.unflatten(1, (group + 1, n)))[:, group, place]

    return step


def context_start(position: int, n: int, groups: int) -> int:
    """Where the context of token `position` begins if at most `groups` groups of `n` may be read, its own included."""
    return max(position // n - groups + 1, 0) * n


def filter_logits(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Logits `(..., vocab)` in float32, with -inf for tokens that must not be drawn.

    Args:
        logits: of any floating dtype.
        temperature: divides the logits; 0 keeps the likeliest token alone (the first of equals).
        top_k: keep the k likeliest tokens.
        top_p: of those, keep the likeliest until their probabilities add up to p (Holtzman et al., arXiv 1904.09751).

    Raises:
        InputError: a temperature below 0, a `top_k` below 1, a `top_p` outside (0, 1].
    """
    _check_filters(temperature, top_k, top_p)
    top_p = None if top_p == 1 else top_p
    if temperature == 0:
        top_k, temperature = 1, 1.0
    logits = logits.float()
    # The largest is subtracted first, so that a tiny temperature cannot overflow.
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if top_k is None and top_p is None:
        return logits
    ranked, order = logits.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        ranked[..., top_k:] = -math.inf
    if top_p is not None:
        probability = ranked.softmax(-1)
        ranked = ranked.masked_fill(probability.cumsum(-1) - probability >= top_p, -math.inf)
    return torch.full_like(logits, -math.inf).scatter(-1, order, ranked)


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens, int64 `(b,)`, with probabilities `softmax(logits (b, vocab))`, from `uniforms` `(b,)` in [0, 1).

    The token is where the cumulative distribution passes the uniform number; one of probability 0 is never drawn.

    Raises:
        InputError: logits that are not numbers, or all -inf.
    """
    cumulative = logits.double().softmax(-1).cumsum(-1)
    total = cumulative[:, -1:]
    if not bool(total.isfinite().all()):
        raise InputError("the decoder's logits are not finite numbers; its weights or its precision are broken")
    # Just under 1, so that rounding cannot carry the product up to the total, past the last token that is possible.
    passed = uniforms.to(total).clamp_max(1 - 2**-40).unsqueeze(1) * total
    return torch.searchsorted(cumulative, passed, right=True).squeeze(1)


def _start(decoder: Any, prompt: Tensor | None, count: int) -> Tensor:
    if prompt is None:
        if count < 1:
            raise InputError(f"cannot generate {count} sequences; count must be at least 1")
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
    if length > groups * n and not window:
        raise InputError(
            f"a length of {length} is beyond the decoder's {groups * n} ({groups} groups of {n} tokens); "
            "ask for less, or for window=True, which goes on with the last groups as context"
        )


def _check_filters(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise InputError(f"the temperature is {temperature}; it must be 0 (the likeliest token) or above")
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k is {top_k}; at least 1 token must be kept (None keeps all)")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p is {top_p}; it must be above 0 and at most 1 (None keeps all)")


def _check_stop(stop: int | None, vocab_size: int) -> None:
    if stop is not None and not 0 <= stop < vocab_size:
        raise InputError(f"the stop token {stop} is outside the vocabulary of {vocab_size} (0 to {vocab_size - 1})")
