"""The standard transformer parts that FIT is made of (spec section 3).

Letters: `r` rows of the batch a layer sees, `q` queries, `k` keys, `h` heads, `e` width of a head.
Every layer takes plain tensors of shape `(r, tokens, width)`: it knows neither groups nor images.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fitformer._support.checks import checked, whole
from fitformer._support.checks import rate as rate_of
from fitformer._support.system_memory import check_room
from fitformer.errors import InputError
from fitformer.models.block_causal import Band, block_causal_attention
from fitformer.models.dropout import GroupRandom
from fitformer.models.positions import rotate, rotation, turn

# Keys and values of new tokens to those that they attend to, which a cache keeps.
Memory = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

NORM_EPS = 1e-6
# Sizes beyond are mistakes, whatever memory there is.
MOST_SIZE = 2**40


def layer_norm(width: int) -> nn.LayerNorm:
    """LayerNorm over the last axis with the reference's epsilon, scale and shift."""
    return nn.LayerNorm(width, eps=NORM_EPS)


def linear(inputs: int, outputs: int) -> nn.Linear:
    """Linear projection with bias; Glorot-uniform weights and zero bias, the defaults of the reference."""
    check_room(f"a projection from {inputs} to {outputs} channels", inputs * outputs)
    projection = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(projection.weight)
    nn.init.zeros_(projection.bias)
    return projection


def check_sizes(**sizes: int) -> None:
    """Refuse sizes that are not positive whole numbers.

    Raises:
        InputError: such a size, by its name.
    """
    for name, size in sizes.items():
        whole(name, size, 1, MOST_SIZE)


def check_heads(heads: int, width: int, what: str = "attention") -> None:
    """Refuse a number of heads that cannot share a width evenly.

    Raises:
        InputError: names the nearest numbers that can.
    """
    if heads < 1 or width % heads:
        near = [h for h in range(1, width + 1) if width % h == 0]
        below = max((h for h in near if h < heads), default=near[0])
        above = min((h for h in near if h > heads), default=near[-1])
        ways_out = f"{below} or {above} heads do" if below != above else f"{above} does"
        raise InputError(f"{heads} heads do not divide the width {width} of {what}; the nearest, {ways_out}")


def dropout(x: Tensor, rate: float, random: GroupRandom | None, shape: tuple[int, ...] | None = None) -> Tensor:
    """Zero elements of `x (r, ...)` with probability `rate` and scale up the others.

    `random` gives the numbers, torch's generator where it is None; `shape`, broadcast to that of `x`, is what is drawn.
    """
    shape = tuple(x.shape) if shape is None else shape
    kept = torch.rand(shape, device=x.device) >= rate if random is None else random.kept(shape, rate)
    return x * kept / (1 - rate)


class DropPath(nn.Module):
    """Leave out a residual branch, per row of the batch, with probability `rate`; the kept rows are scaled up.

    Raises:
        InputError: a rate outside 0 <= rate < 1.
    """

    @checked
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate_of("drop_path", rate)

    def forward(self, x: Tensor, random: GroupRandom | None = None) -> Tensor:
        """Return the branch `x (r, ...)` with whole rows zeroed in training, `x` itself otherwise."""
        if self.rate == 0.0 or not self.training:
            return x
        return dropout(x, self.rate, random, (x.shape[0],) + (1,) * (x.ndim - 1))

    def extra_repr(self) -> str:
        """Show the rate in `print(model)`."""
        return f"rate={self.rate}"


class Attention(nn.Module):
    """Multi-head attention of `width // heads` channels a head, from queries of width `dim` to a context.

    Args:
        dim: width of the queries, and of the output.
        heads: number of heads.
        context_dim: width of the context tokens; `dim` by default (self-attention).
        width: width of the attention itself, all heads together; `dim` by default.
        dropout: dropout of the attention weights in training.
        qk_norm: normalise queries and keys head by head.
        rotary: turn queries and keys by their positions, see `models.positions.rotate`.

    Raises:
        InputError: `heads` does not divide `width`, a head is of an odd width where it is turned, or a rate outside
            0 <= dropout < 1.
    """

    @checked
    def __init__(
        self,
        dim: int,
        heads: int,
        context_dim: int | None = None,
        width: int | None = None,
        dropout: float = 0.0,
        qk_norm: bool = False,
        rotary: bool = False,
    ) -> None:
        super().__init__()
        context_dim, width = context_dim or dim, width or dim
        check_heads(heads, width)
        if rotary and (width // heads) % 2:
            raise InputError(f"rotary turns pairs of channels, and {heads} heads of {width} have {width // heads} each")
        self.heads, self.dropout, self.rotary = heads, rate_of("drop_att", dropout), rotary
        self.query, self.key, self.value = linear(dim, width), linear(context_dim, width), linear(context_dim, width)
        self.output = linear(width, dim)
        self.query_norm = layer_norm(width // heads) if qk_norm else nn.Identity()
        self.key_norm = layer_norm(width // heads) if qk_norm else nn.Identity()

    def queries(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Queries `(r, h, q, e)` of tokens `x (r, q, dim)`; `positions` as in `attend`."""
        return self._turned(self.query_norm(self._by_head(self.query(x))), positions)

    def project(self, context: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values `(r, h, k, e)` of a context `(r, k, context_dim)`: what a cache keeps of it.

        `positions` are the context's, int64 `(k,)` or `(r, k)`.
        """
        key = self._turned(self.key_norm(self._by_head(self.key(context))), positions)
        return key, self._by_head(self.value(context))

    def _turned(self, by_head: Tensor, positions: Tensor | None) -> Tensor:
        """Queries or keys `(r, h, k, e)` turned by their positions, 0, 1, 2 ... by default, if the attention does."""
        if not self.rotary:
            return by_head
        positions = torch.arange(by_head.shape[2], device=by_head.device) if positions is None else positions
        return rotate(by_head, positions)

    def rotation(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """What `turn` needs of positions, once for queries and keys of any layer, see `models.positions.rotation`."""
        return rotation(positions, self.query.out_features // self.heads).to(dtype)

    def turn(self, by_head: Tensor, rotation: Tensor) -> Tensor:
        """Queries or keys `(r, h, k, e)` turned by a `rotation`."""
        return turn(by_head, rotation)

    def _by_head(self, tokens: Tensor) -> Tensor:
        return rearrange(tokens, "r s (h e) -> r h s e", h=self.heads)

    def attend(
        self,
        x: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        causal: int | Band = 0,
        random: GroupRandom | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Attend from `x (r, q, dim)` to keys and values `(r, h, k, e)` of `project`; returns `(r, q, dim)`.

        Args:
            x, key, value: queries' tokens, and the projected context.
            mask: boolean, broadcastable to `(r, h, q, k)`, true where a query attends.
            causal: a token attends to its own and earlier runs of so many tokens; 1 is the usual triangle, 0 is none. A
                `Band` says more, with runs of its `block`. Queries may be the last of the keys' tokens, in whole runs.
            random: gives the rows' own dropout.
            positions: of the queries, int64 `(q,)` or `(r, q)`, that rotary attention turns them by; 0, 1, 2 ... by
                default.
        """
        query, rate = self.queries(x, positions), self.dropout if self.training else 0.0
        if rate and random is not None:
            mask = triangle(x.shape[1], x.device) if causal else mask
            out = dropout(attention_weights(query, key, mask), rate, random) @ value
        elif isinstance(causal, Band) or causal > 1 or (causal and key.shape[2] > query.shape[2]):
            out = block_causal_attention(query, key, value, causal, rate)
        else:
            out = F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, dropout_p=rate, is_causal=causal == 1
            )
        return self.output(rearrange(out, "r h s e -> r s (h e)"))

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        mask: Tensor | None = None,
        causal: int | Band = 0,
        random: GroupRandom | None = None,
        positions: Tensor | None = None,
        memory: Memory | None = None,
    ) -> Tensor:
        """Attend from `x (r, q, dim)` to `context (r, k, context_dim)`, both at the same positions.

        Args:
            x, context: the queries' tokens, and those that they attend to.
            mask, causal, random, positions: as in `attend`.
            memory: given the keys and values of the context, those that are attended to instead: a cache puts earlier
                ones before them.
        """
        key, value = self.project(context, positions)
        if memory is not None:
            key, value = memory(key, value)
        return self.attend(x, key, value, mask, causal, random, positions)


def attention_weights(query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
    """Weights `(r, h, q, k)` of queries `(r, h, q, e)` over keys `(r, h, k, e)`, 0 where `mask` is false."""
    scores = query @ key.mT / query.shape[-1] ** 0.5
    return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(dim=-1)


def triangle(tokens: int, device: torch.device) -> Tensor:
    """Causal mask `(tokens, tokens)`, true where a query attends."""
    return torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()


class FeedForward(nn.Module):
    """Pre-norm branch of two linear maps with GELU between them, `dim -> ratio * dim -> dim`.

    Raises:
        InputError: a ratio that leaves no units, or a rate outside 0 <= dropout < 1.
    """

    @checked
    def __init__(self, dim: int, ratio: float = 4, dropout: float = 0.0) -> None:
        super().__init__()
        check_sizes(dim=dim)
        if int(ratio * dim) < 1:
            raise InputError(f"mlp_ratio is {ratio}, which leaves {dim} channels no units; 4 is usual")
        self.norm = layer_norm(dim)
        self.inner, self.outer = linear(dim, int(ratio * dim)), linear(int(ratio * dim), dim)
        self.dropout = rate_of("drop_units", dropout)

    def forward(self, x: Tensor, random: GroupRandom | None = None) -> Tensor:
        """Return the branch of `x (..., dim)`, without the residual; `random` gives the rows' own dropout."""
        units = F.gelu(self.inner(self.norm(x)))
        if self.dropout and self.training:
            # torch's own where it serves: it is faster.
            units = F.dropout(units, self.dropout) if random is None else dropout(units, self.dropout, random)
        return self.outer(units)


class TransformerLayer(nn.Module):
    """Pre-norm self-attention and feed-forward, each a residual branch (spec section 3: local and global layers).

    `self_attention=False` keeps only the feed-forward half. The other arguments are those of the parts.
    """

    @checked
    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        mlp_ratio: float = 4,
        self_attention: bool = True,
        drop_path: float = 0.0,
        drop_units: float = 0.0,
        drop_att: float = 0.0,
        qk_norm: bool = False,
        rotary: bool = False,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"dropout": drop_att, "qk_norm": qk_norm, "rotary": rotary}
        self.norm = layer_norm(dim) if self_attention else None
        self.attention = Attention(dim, heads, **options) if self_attention else None
        self.ffn = FeedForward(dim, mlp_ratio, drop_units)
        self.drop_path = DropPath(drop_path)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        causal: int | Band = 0,
        random: GroupRandom | None = None,
        positions: Tensor | None = None,
        memory: Memory | None = None,
    ) -> Tensor:
        """Transform tokens `x (r, s, dim)`; the rest as in `Attention.forward`."""
        if self.norm is not None and self.attention is not None:
            normed = self.norm(x)
            x = x + self.drop_path(self.attention(normed, normed, mask, causal, random, positions, memory), random)
        return x + self.drop_path(self.ffn(x, random), random)


class CrossLayer(nn.Module):
    """Residual pre-norm cross-attention: read, write, and attention to the condition (spec section 3).

    Args:
        dim: width of the queries' tokens.
        context_dim: width of the context tokens.
        width: width of the attention; `heads` must divide it.
        heads: number of heads.
        context_norm: normalise the context first (`xattn_enc_ln`).
        mlp_ratio: width of a feed-forward branch after the attention (`xattn_with_mlp`), none by default.
    """

    @checked
    def __init__(
        self,
        dim: int,
        context_dim: int,
        width: int,
        heads: int,
        *,
        context_norm: bool = True,
        mlp_ratio: float | None = None,
        drop_units: float = 0.0,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        self.norm = layer_norm(dim)
        self.context_norm = layer_norm(context_dim) if context_norm else None
        self.attention = Attention(dim, heads, context_dim, width, qk_norm=qk_norm)
        self.ffn = FeedForward(dim, mlp_ratio, drop_units) if mlp_ratio else None

    def forward(
        self, x: Tensor, context: Tensor, mask: Tensor | None = None, random: GroupRandom | None = None
    ) -> Tensor:
        """Tokens `x (r, q, dim)` that attended to `context (r, k, context_dim)`; the rest as in `Attention.attend`."""
        x = x + self.attention.attend(self.norm(x), *self.project(context), mask)
        return x if self.ffn is None else x + self.ffn(x, random)

    def project(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `(r, h, k, e)` of a context `(r, k, context_dim)`, normalised first if the layer does."""
        return self.attention.project(context if self.context_norm is None else self.context_norm(context))

    def weights(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention weights `(r, h, q, k)` of tokens `x (r, q, dim)` over their context, for pictures of attention."""
        return attention_weights(self.attention.queries(self.norm(x)), self.project(context)[0], mask)
