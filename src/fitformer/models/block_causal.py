"""Block-causal attention: a token attends to its own block of tokens and to earlier ones (spec section 5).

The mask of all tokens is quadratic in their number: 69 GB of booleans for 262,144 latents. So queries are computed in
chunks of whole blocks, with the keys up to each chunk's end, and the backward pass computes each chunk again: the mask
of one chunk exists at a time, and keys that no query of a chunk attends to cost nothing.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fitformer._support.rng import random_state, set_random_state

# Numbers of one chunk's mask; up to so many the whole is one chunk.
MOST_MASK = 2**22


def block_causal_attention(query: Tensor, key: Tensor, value: Tensor, block: int, dropout: float = 0.0) -> Tensor:
    """Attention `(r, h, q, e)` of queries `(r, h, q, e)`, keys and values `(r, h, k, e)` in blocks of `block` tokens.

    The queries are the last q of the k tokens, in whole blocks.
    """
    if query.shape[2] * key.shape[2] <= MOST_MASK:
        return _chunk(query, key, value, key.shape[2] - query.shape[2], block, dropout)
    # Mixed precision leaves normalised queries and keys in float32; there is none in the backward pass to cast them.
    return _InChunks.apply(query.to(value.dtype), key.to(value.dtype), value, block, dropout)


def _chunk(query: Tensor, key: Tensor, value: Tensor, start: int, block: int, dropout: float) -> Tensor:
    """Attention of the queries from token `start` on to the keys up to the last query's block."""
    row = torch.arange(start, start + query.shape[2], device=query.device) // block
    column = torch.arange(key.shape[2], device=query.device) // block
    return F.scaled_dot_product_attention(query, key, value, row[:, None] >= column, dropout)


def _chunks(start: int, tokens: int, block: int) -> Iterator[tuple[int, int]]:
    """First and last token of each chunk of queries, from `start` on: its mask has at most MOST_MASK numbers."""
    while start < tokens:
        blocks, stop = max(1, MOST_MASK // (tokens * block)), start
        stop = min(start + blocks * block, tokens)
        yield start, stop
        start = stop


class _InChunks(torch.autograd.Function):
    """The whole attention as one node, which keeps its inputs alone."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, block: int, dropout: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.block, ctx.dropout = block, dropout
        ctx.state = random_state(query.device) if dropout else None
        first = key.shape[2] - query.shape[2]
        parts = [
            _chunk(
                query[:, :, start - first : stop - first], key[:, :, :stop], value[:, :, :stop], start, block, dropout
            )
            for start, stop in _chunks(first, key.shape[2], block)
        ]
        return torch.cat(parts, dim=2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        whole = ctx.saved_tensors
        first = whole[1].shape[2] - whole[0].shape[2]
        sums = tuple(torch.zeros_like(each) for each in whole)
        now = random_state(gradient.device) if ctx.dropout else None
        if ctx.state is not None:
            set_random_state(ctx.state, gradient.device)
        for start, stop in _chunks(first, whole[1].shape[2], ctx.block):
            spans = slice(start - first, stop - first), slice(0, stop), slice(0, stop)
            q, k, v = (each[:, :, span].detach().requires_grad_() for each, span in zip(whole, spans, strict=True))
            with torch.enable_grad():
                out = _chunk(q, k, v, start, ctx.block, ctx.dropout)
            found = torch.autograd.grad(out, (q, k, v), gradient[:, :, spans[0]].to(out.dtype))
            for total, part, span in zip(sums, found, spans, strict=True):
                total[:, :, span] += part
        if now is not None:
            set_random_state(now, gradient.device)
        return *sums, None, None
