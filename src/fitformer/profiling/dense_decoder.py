"""What the autoregressive FIT is measured against: a dense decoder-only transformer, built as they are built today.

Pre-norm layers, rotary positions (arXiv 2104.09864), torch's fused attention, a gated feed-forward (SwiGLU, arXiv
2002.05202, stronger than GELU at equal parameters), projections without biases and fused where they can be, one
embedding for input and output. Its cache is taken once, whole, and written in place.

Letters: `b` examples, `k` tokens read at once, `h` heads, `e` width of a head, `p` position.
"""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fitformer._support.checks import checked, whole
from fitformer._support.system_memory import check_room
from fitformer.errors import InputError
from fitformer.execution.base import Score
from fitformer.models.decoder import FITDecoder
from fitformer.models.encoder import check_grouped
from fitformer.models.layers import check_heads, layer_norm
from fitformer.patching.sequence import check_vocabulary
from fitformer.profiling.flops import count_parameters

# Longest wave of the rotation, as usual.
ROTARY_BASE = 10_000.0
# Numbers of a mask in a chunk of a prompt.
MOST_MASK = 2**24
# Width over depth, and inner over outer width of a gated feed-forward, of the models in the field.
ASPECT, GATED_RATIO, HEAD_WIDTHS = 64, 8 / 3, (64, 48, 32, 16, 8)
TOLERANCE = 0.02


def rotary_table(length: int, width: int, like: Tensor) -> Tensor:
    """Cosines and sines `(2, length, width / 2)` of positions 0 to length - 1 (arXiv 2104.09864, equation 34).

    Of the kind of `like`, and where it is.
    """
    rates = ROTARY_BASE ** (-torch.arange(0, width, 2, device=like.device) / width)
    angles = torch.arange(length, device=like.device)[:, None] * rates
    return torch.stack([angles.cos(), angles.sin()]).to(like)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Queries or keys `(..., k, e)` turned by their positions' angles `(2, k, e / 2)`."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = table
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class DenseLayer(nn.Module):
    """Causal self-attention and a gated feed-forward, each a pre-norm residual branch."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.ffn_norm = layer_norm(dim), layer_norm(dim)
        self.qkv, self.output = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.inner, self.outer = nn.Linear(dim, 2 * hidden, bias=False), nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, table: Tensor, cache: Tensor | None = None, position: int = 0) -> Tensor:
        """Tokens `(b, k, dim)` in and out.

        Args:
            x: tokens of the positions from `position` on.
            table: `rotary_table` of these positions.
            cache: keys and values `(2, b, h, length, e)` of the tokens before; those of `x` are written into it.
            position: of the first token.
        """
        query, key, value = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = rotate(query, table), rotate(key, table)
        if cache is not None:
            end = position + x.shape[1]
            cache[0, :, :, position:end], cache[1, :, :, position:end] = key, value
            key, value = cache[:, :, :, :end]
        x = x + self.output(attention(query, key, value, position).transpose(1, 2).flatten(2))
        gate, units = self.inner(self.ffn_norm(x)).chunk(2, dim=-1)
        return x + self.outer(F.silu(gate) * units)


def attention(query: Tensor, key: Tensor, value: Tensor, position: int) -> Tensor:
    """Causal attention of queries `(b, h, k, e)` at `position` and after to keys `(b, h, position + k, e)`."""
    count = query.shape[2]
    if position == 0 or count == 1:
        return F.scaled_dot_product_attention(query, key, value, is_causal=count > 1)
    mask = torch.ones(count, position + count, dtype=torch.bool, device=query.device).tril(position)
    return F.scaled_dot_product_attention(query, key, value, mask)


class DenseDecoder(nn.Module):
    """A dense decoder of tokens, for any length; called as `FITDecoder` is, so that the same task trains it.

    Attributes:
        num_classes: 0; the model is unconditional.

    Args:
        vocab_size: number of different tokens.
        dim: width. depth: number of layers. heads: of the attention. hidden: units of the feed-forward.

    Raises:
        InputError: sizes that are not positive, heads that do not divide the width, or heads of an odd width.
    """

    num_classes = 0

    @checked
    def __init__(self, vocab_size: int, dim: int, depth: int, heads: int, hidden: int) -> None:
        super().__init__()
        sizes = {"vocab_size": vocab_size, "dim": dim, "depth": depth, "heads": heads, "hidden": hidden}
        for name, size in sizes.items():
            whole(name, size, 1)
        check_heads(heads, dim)
        if dim // heads % 2:
            raise InputError(f"heads of width {dim // heads} ({dim} / {heads}): rotary positions take an even width")
        check_room(f"a dense decoder of width {dim} and depth {depth}", _count(vocab_size, dim, depth, hidden))
        self.vocab_size, self.dim, self.heads = vocab_size, dim, heads
        self.embedding = nn.Embedding(vocab_size, dim)
        self.layers: Sequence[DenseLayer] = nn.ModuleList(  # type: ignore[assignment]
            DenseLayer(dim, heads, hidden) for _ in range(depth)
        )
        self.norm = layer_norm(dim)
        self._initialize()

    def _initialize(self) -> None:
        """Weights of unit gain, and residual branches that begin at zero.

        Embeddings are larger than the usual 0.02. With either choice a short training learns more.
        """
        nn.init.normal_(self.embedding.weight, std=0.1)
        for layer in self.layers:
            for inner in (layer.qkv, layer.inner):
                nn.init.normal_(inner.weight, std=inner.weight.shape[1] ** -0.5)
            for last in (layer.output, layer.outer):
                nn.init.zeros_(last.weight)

    def forward(
        self, tokens: Tensor, score: Score | None = None, labels: None = None, documents: Tensor | None = None
    ) -> Tensor:
        """Logits of the targets, given integer tokens shifted right by one.

        Args:
            tokens: `(b, t, n)`, read as one sequence of t * n.
            score: as of `FITDecoder.forward`; it is called once, with all groups.
            labels: None, for the model knows no classes.
            documents: None, for each row is read as one document.

        Returns:
            logits `(b, t, n, vocab_size)`, or the score.

        Raises:
            InputError: tokens of another shape or kind, or one outside the vocabulary; labels or documents.
        """
        if labels is not None or documents is not None:
            raise InputError("the dense decoder knows neither classes nor documents; give it each document as a row")
        check_grouped(tokens, tokens.shape[-1], "b t n")
        check_vocabulary(tokens, self.vocab_size)
        x = self.embedding(tokens.flatten(1).long())
        table = rotary_table(x.shape[1], self.dim // self.heads, x)
        for layer in self.layers:
            x = layer(x, table)
        logits = self.head(x).unflatten(1, tokens.shape[1:])
        return logits if score is None else score(slice(0, tokens.shape[1]), logits, None)

    def head(self, x: Tensor) -> Tensor:
        """Tokens `(b, k, dim)` as they leave the last layer to logits `(b, k, vocab_size)`."""
        return F.linear(self.norm(x), self.embedding.weight)


class DenseState:
    """What a `CachedDense` has read of `b` rows: keys and values of every token.

    Attributes:
        cache: `(depth, 2, b, h, length, e)`, taken whole. position: inputs read by each row, a list of b ints.
    """

    def __init__(self, cache: Tensor) -> None:
        self.cache, self.position = cache, [0] * cache.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values read so far."""
        return self.cache[..., : self.position[0], :].numel() * self.cache.element_size()

    def fill(self, position: int) -> None:
        """Stand at a position as if its tokens had been read: keys and values are random, and a step costs the same.

        Where more was read, go back.

        Raises:
            InputError: a position beyond the cache.
        """
        _check_length(position, self.cache.shape[4])
        for layer in self.cache:
            layer[..., self.position[0] : position, :].uniform_(-1, 1)
        self.position = [position] * len(self.position)


class CachedDense:
    """Token by token decoding with the interface of `fitformer.generation.CachedDecoder`; rows advance together.

    Args:
        decoder: in eval mode.
        length: tokens that a cache has space for.

    Raises:
        InputError: a length below 1.
    """

    @checked
    def __init__(self, decoder: DenseDecoder, length: int) -> None:
        self.decoder, self.length = decoder, whole("length", length)
        self.table = rotary_table(length, decoder.dim // decoder.heads, decoder.embedding.weight)

    def start(self, batch: int = 1, labels: None = None) -> DenseState:
        """The state of `batch` rows that have read nothing; there are no classes.

        Raises:
            InputError: a cache that does not fit the memory.
        """
        decoder = self.decoder
        shape = (len(decoder.layers), 2, batch, decoder.heads, self.length, decoder.dim // decoder.heads)
        check_room(f"a cache of {self.length} tokens for {batch} rows", math.prod(shape))
        return DenseState(decoder.embedding.weight.new_empty(shape))

    @torch.inference_mode()
    def feed(self, state: DenseState, inputs: Tensor, last: bool = False) -> Tensor:
        """Read the next inputs, in chunks whose masks are small.

        Args:
            state: is advanced by k.
            inputs: `(b, k)` int64, tokens shifted right by one.
            last: return the logits of the last position alone.

        Returns:
            logits `(b, k, vocab_size)`, or `(b, 1, vocab_size)`.

        Raises:
            InputError: more inputs than the cache has space for.
        """
        first = state.position[0]
        parts: list[Tensor] = []
        _check_length(first + inputs.shape[1], self.length)
        for start, stop in _chunks(first, first + inputs.shape[1]):
            x = self._read(state, inputs[:, start - first : stop - first], start, stop)
            parts = [x] if last else [*parts, x]
        state.position = [first + inputs.shape[1]] * len(state.position)
        if last:
            return self.decoder.head(parts[0][:, -1:])
        return self.decoder.head(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))

    def _read(self, state: DenseState, inputs: Tensor, start: int, stop: int) -> Tensor:
        x, table = self.decoder.embedding(inputs), self.table[:, start:stop]
        for layer, cache in zip(self.decoder.layers, state.cache, strict=True):
            x = layer(x, table, cache, start)
        return x


def _chunks(first: int, end: int) -> Iterator[tuple[int, int]]:
    """First and last position of each chunk of inputs: its mask has at most MOST_MASK numbers."""
    while first < end:
        stop = min(first + max(1, MOST_MASK // end), end)
        yield first, stop
        first = stop


def _check_length(length: int, most: int) -> None:
    if length > most:
        raise InputError(f"{length} tokens are more than the cache has space for, {most}; make it with a larger length")


def _count(vocab_size: int, dim: int, depth: int, hidden: int) -> int:
    """Parameters of a dense decoder."""
    return vocab_size * dim + depth * (4 * dim * dim + 3 * dim * hidden + 4 * dim) + 2 * dim


@checked
def dense_like(decoder: FITDecoder) -> DenseDecoder:
    """A dense decoder of as many parameters as a FIT, to 2%, and of usual proportions.

    The FIT's tables of positions are not counted: they compute nothing, and grow with the length.

    Raises:
        InputError: a FIT so small that no dense decoder comes near.
    """
    trunk = decoder.trunk
    tables = count_parameters(trunk.position) + count_parameters(trunk.latent_position)
    wanted = count_parameters(decoder) - tables
    found = [
        sizes for sizes in _shapes(decoder.vocab_size, wanted) if _off(decoder.vocab_size, sizes, wanted) <= TOLERANCE
    ]
    if not found:
        raise InputError(f"no dense decoder has {wanted} parameters to {TOLERANCE:.0%}; take a larger FIT")
    dim, depth, heads, hidden = min(found, key=_unusual)
    return DenseDecoder(decoder.vocab_size, dim, depth, heads, hidden)


Shape = tuple[int, int, int, int]


def _shapes(vocab_size: int, wanted: int) -> Iterator[Shape]:
    """Width, depth, heads and hidden units that may have so many parameters."""
    for width in HEAD_WIDTHS:
        for heads in range(1, 65):
            for depth in range(1, 65):
                dim = width * heads
                left = wanted - _count(vocab_size, dim, depth, 0)
                hidden = round(left / (3 * dim * depth) / 8) * 8
                if dim <= hidden <= 6 * dim:
                    yield dim, depth, heads, hidden


def _off(vocab_size: int, shape: Shape, wanted: int) -> float:
    dim, depth, _, hidden = shape
    return abs(_count(vocab_size, dim, depth, hidden) / wanted - 1)


def _unusual(shape: Shape) -> float:
    """How far the proportions are from the usual ones."""
    dim, depth, heads, hidden = shape
    ratios = dim / depth / ASPECT, hidden / dim / GATED_RATIO, dim / heads / HEAD_WIDTHS[0]
    return sum(abs(math.log(ratio)) for ratio in ratios)
