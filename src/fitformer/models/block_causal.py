"""Block-causal attention: a token attends to its own block of tokens and to earlier ones (spec section 5).

How far back is all the way, to the first block of a document, or over a window of so many blocks: a `Band` says it.
The mask of all tokens is quadratic in their number: 69 GB of booleans for 262,144 latents. So queries are computed in
chunks of whole blocks, with the keys from the window's begin up to each chunk's end, and the backward pass computes
each chunk again: the mask of one chunk exists at a time, and keys that no query of a chunk attends to cost nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fitformer._support.rng import random_state, set_random_state

# Numbers of one chunk's mask; up to so many the whole is one chunk.
MOST_MASK = 2**22
# Queries of a chunk of a window are as many as the window's tokens, but for small windows: short chunks are slow.
LEAST_QUERIES = 256


@dataclass(frozen=True)
class Band:
    """Which blocks of tokens a token attends to: its own and earlier ones.

    Attributes:
        block: tokens of a block.
        window: most blocks that a token attends to, its own included; None for all.
        starts: for each block the first that it may attend to, int64 `(blocks,)` or `(r, blocks)`; None for block 0.
    """

    block: int
    window: int | None = None
    starts: Tensor | None = None

    def first(self, blocks: Tensor) -> Tensor:
        """The first block that the tokens of each of these blocks attend to, `(s,)` or `(r, s)`."""
        reach = torch.zeros_like(blocks) if self.window is None else blocks - (self.window - 1)
        return reach if self.starts is None else torch.maximum(reach, self.starts[..., blocks])

    def rows(self, batch: int) -> int:
        """Masks that `batch` rows need: one for all of them, or one each."""
        return batch if self.starts is not None and self.starts.ndim > 1 else 1


class Chunk(NamedTuple):
    """Queries `start` to `stop`, and their keys from `begin` to `stop`."""

    begin: int
    start: int
    stop: int

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key."""
        return (self.stop - self.start) * (self.stop - self.begin)


def block_causal_attention(query: Tensor, key: Tensor, value: Tensor, band: int | Band, dropout: float = 0.0) -> Tensor:
    """Attention `(r, h, q, e)` of queries to keys and values `(r, h, k, e)` in a band, or in blocks of so many tokens.

    The queries are the last q of the k tokens, in whole blocks.
    """
    band = band if isinstance(band, Band) else Band(band)
    tokens = key.shape[2]
    if isinstance(tokens, torch.SymInt):
        # A graph that is traced for any number of tokens: how many chunks would be that of the traced one.
        return _attend(query, key, value, Chunk(0, tokens - query.shape[2], tokens), band, dropout)
    only, *more = _chunks_of(query, key, band)
    if not more and only.pairs * band.rows(query.shape[0]) <= MOST_MASK:
        return _attend(*_cut((query, key, value), only), only, band, dropout)
    # Mixed precision leaves normalised queries and keys in float32; there is none in the backward pass to cast them.
    return _InChunks.apply(query.to(value.dtype), key.to(value.dtype), value, band, dropout)


def chunks(tokens: int, band: Band, rows: int = 1, first: int = 0) -> Iterator[Chunk]:
    """The chunks of queries from `first` to `tokens`; masks of one, for `rows` rows, have at most MOST_MASK numbers."""
    behind = tokens if band.window is None else (band.window - 1) * band.block
    if behind + LEAST_QUERIES >= tokens:
        behind, most = tokens, MOST_MASK // max(tokens * rows, 1)
    else:
        # As many queries as keys behind them: of the pairs that are computed, half are attended to.
        most = max(behind, LEAST_QUERIES)
        most = min(most, MOST_MASK // (2 * most * rows))
    size, stop = max(1, most // band.block) * band.block, -1
    while stop < tokens:
        start = max(stop, first)
        stop = min(start + size, tokens)
        yield Chunk(max(start - behind, 0), start, stop)


def _chunks_of(query: Tensor, key: Tensor, band: Band) -> list[Chunk]:
    """The chunks of queries that are the last of the keys' tokens."""
    tokens = key.shape[2]
    return list(chunks(tokens, band, band.rows(query.shape[0]), tokens - query.shape[2]))


def _attend(query: Tensor, key: Tensor, value: Tensor, chunk: Chunk, band: Band, dropout: float) -> Tensor:
    """Attention of a chunk's queries to its keys."""
    begin, start, stop = chunk
    row = torch.arange(start, stop, device=query.device) // band.block
    column = torch.arange(begin, stop, device=query.device) // band.block
    mask = row[:, None] >= column
    if band.window is not None or band.starts is not None:
        mask = mask & (band.first(row)[..., None] <= column)
    mask = mask if mask.ndim == 2 else mask[:, None]
    return F.scaled_dot_product_attention(query, key, value, mask, dropout)


class _InChunks(torch.autograd.Function):
    """The whole attention as one node, which keeps its inputs alone."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, band: Band, dropout: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.band, ctx.dropout = band, dropout
        ctx.state = random_state(query.device) if dropout else None
        parts = [
            _attend(*_cut((query, key, value), chunk), chunk, band, dropout) for chunk in _chunks_of(query, key, band)
        ]
        return torch.cat(parts, dim=2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        whole = ctx.saved_tensors
        sums = tuple(torch.zeros_like(each) for each in whole)
        now = random_state(gradient.device) if ctx.dropout else None
        if ctx.state is not None:
            set_random_state(ctx.state, gradient.device)
        for chunk in _chunks_of(whole[0], whole[1], ctx.band):
            q, k, v = (part.detach().requires_grad_() for part in _cut(whole, chunk))
            with torch.enable_grad():
                out = _attend(q, k, v, chunk, ctx.band, ctx.dropout)
            found = torch.autograd.grad(out, (q, k, v), _queries(gradient, whole[1], chunk).to(out.dtype))
            for total, part in zip(_cut(sums, chunk), found, strict=True):
                total += part
        if now is not None:
            set_random_state(now, gradient.device)
        return *sums, None, None


def _cut(whole: tuple[Tensor, ...], chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
    """Views of the queries, keys and values of a chunk."""
    query, key, value = whole
    return (
        _queries(query, key, chunk),
        key[:, :, chunk.begin : chunk.stop],
        value[:, :, chunk.begin : chunk.stop],
    )


def _queries(query: Tensor, key: Tensor, chunk: Chunk) -> Tensor:
    first = key.shape[2] - query.shape[2]
    return query[:, :, chunk.start - first : chunk.stop - first]
