"""What autograd keeps of each layer for the backward pass, in bytes, and what the backward pass adds for a moment.

Beside it, what streamed execution remembers of a layer, where it does not compute all of it again.

A layer counts what it makes, not what it was given: the tokens between two layers are kept once, by the one that made
them. Matrix products keep their inputs, norms their inputs and two numbers a token, attention its queries, keys,
values, results and one number a query and head; GELU keeps its input.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from fitformer.execution.selective_checkpoint import Kind, kind_of
from fitformer.models.layers import Attention, CrossLayer, FeedForward, TransformerLayer
from fitformer.models.trunk import Block, Trunk
from fitformer.profiling.flops import count_parameters

FLOAT = 4
STATISTICS = 2 * FLOAT


@dataclass(frozen=True)
class Stage:
    """A layer on some tokens: bytes kept for its backward pass, bytes for a moment there, and its parameters.

    `moment` is beside the gradients that come in from the layer after; `remembered` is what is not computed again.
    """

    kept: int
    moment: int
    parameters: int
    remembered: int = 0


@dataclass(frozen=True)
class DtypeSizes:
    """Bytes of a number that enters or leaves a matrix product: 4, or 2 in mixed precision, where norms stay at 4.

    `kinds` are those of the results that are remembered (`fitformer.execution.selective_checkpoint`).
    """

    product: int = FLOAT
    kinds: frozenset[Kind] = frozenset()

    def inputs(self, numbers: int, products: int) -> int:
        """Bytes of what `products` products are given: autograd keeps one, or in mixed precision a copy for each."""
        return numbers * self.product * (1 if self.product == FLOAT else products)


@dataclass(frozen=True)
class AttentionShape:
    """Rows of an attention, and queries and keys in each; `mask` counts the numbers of a mask that is not causal."""

    rows: int
    queries: int
    keys: int
    mask: int = 0


def of_attention(attention: Attention, at: AttentionShape, numbers: DtypeSizes, itself: bool) -> int:
    """Bytes kept of attention, from what it is given (its own tokens alone if `itself`) to what its output map is."""
    queries, keys = at.rows * at.queries, at.rows * at.keys
    width = attention.query.out_features
    if itself:
        given = numbers.inputs(queries * attention.query.in_features, 3)
    else:
        context = numbers.inputs(keys * attention.key.in_features, 2)
        given = queries * attention.query.in_features * numbers.product + context
    looked = (2 * queries + 2 * keys) * width * numbers.product + queries * attention.heads * FLOAT
    return given + looked + at.mask * FLOAT + _weights(attention, at, numbers)


def _weights(attention: Attention, at: AttentionShape, numbers: DtypeSizes) -> int:
    """Weights, weights after dropout and what was dropped: only with dropout does attention write them down."""
    if not attention.dropout:
        return 0
    return at.rows * attention.heads * at.queries * at.keys * (2 * numbers.product + 1)


def remembered_of_attention(attention: Attention, at: AttentionShape, numbers: DtypeSizes) -> int:
    """Bytes remembered of attention: of its linear maps, and of what the queries found."""
    queries, keys = at.rows * at.queries, at.rows * at.keys
    maps = ((queries, attention.query), (keys, attention.key), (keys, attention.value), (queries, attention.output))
    return sum(remembered_of_map(*each, numbers) for each in maps) + _found(attention, at, numbers)


def _found(attention: Attention, at: AttentionShape, numbers: DtypeSizes) -> int:
    width, queries = attention.query.out_features, at.rows * at.queries
    if "attention" not in numbers.kinds:
        return 0
    if not attention.dropout:
        return queries * width * numbers.product + queries * attention.heads * FLOAT
    # With dropout it is products, of queries by keys, and of weights by values.
    head = width // attention.heads
    pairs = queries * attention.heads * at.keys if head > at.keys else 0
    return (pairs + (queries * width if at.keys > head else 0)) * numbers.product


def remembered_of_map(tokens: int, layer: nn.Linear, numbers: DtypeSizes) -> int:
    """Bytes remembered of what a linear map makes of some tokens."""
    worth = kind_of(layer.in_features, layer.out_features) in numbers.kinds
    return tokens * layer.out_features * numbers.product if worth else 0


def remembered_of_ffn(ffn: FeedForward | None, tokens: int, numbers: DtypeSizes) -> int:
    """Bytes remembered of a feed-forward branch."""
    return 0 if ffn is None else sum(remembered_of_map(tokens, each, numbers) for each in (ffn.inner, ffn.outer))


def of_ffn(ffn: FeedForward | None, tokens: int, numbers: DtypeSizes) -> int:
    """Bytes kept of a feed-forward branch: normalised input, units before GELU and after dropout, what it dropped."""
    if ffn is None:
        return 0
    dim, units = ffn.inner.in_features, ffn.inner.out_features
    dropped = units if ffn.dropout else 0
    return tokens * (dim * numbers.product + 2 * units * numbers.product + dropped + STATISTICS)


def of_layer(layer: TransformerLayer, at: AttentionShape, numbers: DtypeSizes) -> Stage:
    """A local or global layer: its branches, and the tokens after each."""
    tokens, ffn = at.rows * at.queries, layer.ffn
    dim = ffn.inner.in_features
    kept = of_ffn(ffn, tokens, numbers) + tokens * dim * FLOAT
    remembered = remembered_of_ffn(ffn, tokens, numbers)
    if layer.attention is not None:
        kept += of_attention(layer.attention, at, numbers, itself=True) + tokens * (dim * FLOAT + STATISTICS)
        remembered += remembered_of_attention(layer.attention, at, numbers)
    return Stage(kept, _ffn_moment(ffn, tokens, numbers), count_parameters(layer), remembered)


def of_cross(layer: CrossLayer, at: AttentionShape, numbers: DtypeSizes) -> Stage:
    """Read, write or the look at the condition: norms, attention, the tokens after it."""
    attention, queries, keys = layer.attention, at.rows * at.queries, at.rows * at.keys
    dim, width = attention.query.in_features, attention.query.out_features
    kept = of_attention(attention, at, numbers, itself=False) + queries * (dim * FLOAT + STATISTICS)
    if layer.context_norm is not None:
        kept += keys * STATISTICS
    if layer.ffn is not None:
        kept += of_ffn(layer.ffn, queries, numbers) + queries * dim * FLOAT
    looking = (2 * queries + 2 * keys) * width * numbers.product
    moment = max(looking, _ffn_moment(layer.ffn, queries, numbers))
    remembered = remembered_of_attention(attention, at, numbers) + remembered_of_ffn(layer.ffn, queries, numbers)
    return Stage(kept, moment, count_parameters(layer), remembered)


def _ffn_moment(ffn: FeedForward | None, tokens: int, numbers: DtypeSizes) -> int:
    """The gradient of the units, and in mixed precision a copy of the incoming one."""
    if ffn is None:
        return 0
    copy = ffn.inner.in_features * numbers.product if numbers.product != FLOAT else 0
    return tokens * (ffn.inner.out_features * numbers.product + copy)


def group_stages(trunk: Trunk, i: int, groups: int, tokens_per_group: int, numbers: DtypeSizes) -> Iterator[Stage]:
    """The group phase of block i on a number of groups, of all examples together."""
    block, m = _block(trunk, i), trunk.latents_per_group
    if block.write is not None:
        yield of_cross(block.write, AttentionShape(groups, tokens_per_group, m), numbers)
    for layer in block.local_layers:
        yield of_layer(_layer(layer), AttentionShape(groups, tokens_per_group, tokens_per_group), numbers)
    if block.read is not None:
        yield of_cross(block.read, AttentionShape(groups, m, tokens_per_group), numbers)


def global_stages(
    trunk: Trunk, i: int, batch: int, latents: int, conditions: int, numbers: DtypeSizes
) -> Iterator[Stage]:
    """The global phase of block i on `latents` latents of each of `batch` examples."""
    block = _block(trunk, i)
    if block.condition is not None:
        yield of_cross(block.condition, AttentionShape(batch, latents, conditions), numbers)
    mask = latents**2 if trunk.blocks[i].causal_global else 0
    for layer in block.global_layers:
        yield of_layer(_layer(layer), AttentionShape(batch, latents, latents, mask), numbers)


def peak(stages: list[Stage], held: int = 0) -> tuple[int, int]:
    """The largest sum of activations, momentary bytes and gradients of parameters as the stages run backward.

    Args:
        stages: in forward order.
        held: bytes of gradients of parameters that are there from the start.

    Returns:
        bytes of activations, bytes of gradients of parameters, where their sum is largest.
    """
    activations, gradients = sum(stage.kept for stage in stages), held
    most = (activations, gradients)
    for stage in reversed(stages):
        gradients += stage.parameters * FLOAT
        most = max(most, (activations + stage.moment, gradients), key=sum)
        activations -= stage.kept
    return most


def _block(trunk: Trunk, i: int) -> Block:
    block = trunk.blocks[i]
    assert isinstance(block, Block)
    return block


def _layer(layer: nn.Module) -> Any:
    assert isinstance(layer, TransformerLayer)
    return layer
