"""Local layers and writes in few calls, for one token or a few of every row at a time: what cached decoding runs.

A step of one token takes as long as its calls. So queries, keys and values are one product, of copied weights, and
functions stand in the place of modules.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Places:
    """Where new tokens stand in the current groups, which have n places.

    Args:
        places: int64, of the new tokens `(k,)` of all rows, or of each row's one `(b, 1)`.
        stop: the first place that no new token attends to.
        mask: of new tokens over places up to `stop`, None where all are attended to.
    """

    def __init__(self, places: Tensor, stop: int, mask: Tensor | None) -> None:
        self.places, self.stop, self.mask, self.count = places, stop, mask, places.shape[-1]
        self._rotation: Tensor | None = None
        self.rows = None if places.ndim == 1 else torch.arange(len(places), device=places.device)

    @classmethod
    def of(cls, starts: Sequence[int], count: int, device: torch.device) -> "Places":
        """Those of the next tokens of rows whose groups have so many: of one token, or of rows at one place."""
        if min(starts) == max(starts):
            return cls.together(starts[0], count, device)
        assert count == 1, "rows at several places read one token at a time"
        return cls.apart(torch.tensor(starts, device=device)[:, None], max(starts) + 1)

    @classmethod
    def together(cls, start: int, count: int, device: torch.device) -> "Places":
        """The same places from `start` on in all rows."""
        places = torch.arange(start, start + count, device=device)
        mask = torch.ones(count, start + count, dtype=torch.bool, device=device).tril(start) if count > 1 else None
        return cls(places, start + count, mask)

    @classmethod
    def apart(cls, places: Tensor, stop: int) -> "Places":
        """A place for each row `(b, 1)`, all below `stop`."""
        return cls(places, stop, (torch.arange(stop, device=places.device) <= places)[:, None, None])

    def rotation(self, attention: Any, dtype: torch.dtype) -> Tensor:
        """What turns queries and keys by their places, the same in all layers."""
        if self._rotation is None:
            self._rotation = attention.rotation(self.places, dtype)
        return self._rotation

    def put(self, kept: Tensor, new: Tensor, dim: int) -> None:
        """Write new tokens `(b, ..., k, w)` to their places along `dim`, 1 or 3, of `kept (b, ..., n, w)`."""
        if self.rows is None:
            kept.narrow(dim, self.stop - self.count, self.count).copy_(new)
        elif dim == 1:
            kept[self.rows, self.places[:, 0]] = new[:, 0].to(kept.dtype)
        else:
            kept[self.rows, :, :, self.places[:, 0]] = new[:, :, :, 0].to(kept.dtype)


class FusedLayer:
    """A local layer."""

    def __init__(self, layer: Any) -> None:
        attention = layer.attention
        self.attention, self.heads, self.ffn = attention, 0, _FeedForward(layer.ffn)
        if attention is None:
            return
        parts = [_weights(part) for part in (attention.query, attention.key, attention.value)]
        self.heads, self.width = attention.heads, attention.query.out_features // attention.heads
        self.norm, self.eps, self.output = _weights(layer.norm), layer.norm.eps, _weights(attention.output)
        self.normalizes, self.rotary = not isinstance(attention.query_norm, torch.nn.Identity), attention.rotary
        self.weight, self.bias = (torch.cat(tensors) for tensors in zip(*parts, strict=True))

    def __call__(self, x: Tensor, kept: Tensor | None, at: "Places") -> Tensor:
        """Tokens `(b, k, c)` that attended to those of their group that `kept` has, themselves included."""
        return self.ffn(x if kept is None else x + self._attend(x, kept, at))

    def _attend(self, x: Tensor, kept: Tensor, at: "Places") -> Tensor:
        batch, count, width = x.shape
        projected = F.linear(torch.layer_norm(x, (width,), *self.norm, self.eps), self.weight, self.bias)
        by_head = projected.view(batch, count, 3, self.heads, self.width).permute(2, 0, 3, 1, 4)
        query, new = by_head[0], by_head[1:]
        if self.normalizes or self.rotary:
            query, key = self._placed(by_head[:2], at)
            new = torch.stack([key, by_head[2]])
        at.put(kept, new.transpose(0, 1), dim=3)
        keys, values = kept.narrow(3, 0, at.stop).unbind(1)
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=at.mask)
        return F.linear(out.transpose(1, 2).reshape(batch, count, width), *self.output)

    def _placed(self, both: Tensor, at: "Places") -> tuple[Tensor, Tensor]:
        """Queries and keys `(2, b, h, k, e)`, normalised and turned."""
        attention = self.attention
        query, key = both.unbind(0)
        if self.normalizes:
            query, key = attention.query_norm(query), attention.key_norm(key)
        if self.rotary:
            turned = attention.turn(torch.stack([query, key]), at.rotation(attention, query.dtype))
            query, key = turned.unbind(0)
        return query, key


class FusedWrite:
    """The write of a block."""

    def __init__(self, layer: Any) -> None:
        self.attention = layer.attention
        self.norm, self.eps, self.query = _weights(layer.norm), layer.norm.eps, _weights(self.attention.query)
        self.normalizes = not isinstance(self.attention.query_norm, torch.nn.Identity)
        self.output, self.ffn = _weights(self.attention.output), layer.ffn and _FeedForward(layer.ffn)

    def __call__(self, x: Tensor, kept: Tensor) -> Tensor:
        """Tokens `(b, k, c)` that attended to latents of which the keys and values `(b, 2, h, m, e)` are kept."""
        query = F.linear(torch.layer_norm(x, x.shape[-1:], *self.norm, self.eps), *self.query)
        query = query.unflatten(-1, (self.attention.heads, -1)).transpose(1, 2)
        query = self.attention.query_norm(query) if self.normalizes else query
        out = F.scaled_dot_product_attention(query, kept[:, 0], kept[:, 1])
        x = x + F.linear(out.transpose(1, 2).flatten(2), *self.output)
        return x if self.ffn is None else self.ffn(x)


class _FeedForward:
    """A feed-forward and its residual."""

    def __init__(self, ffn: Any) -> None:
        self.norm, self.eps = _weights(ffn.norm), ffn.norm.eps
        self.inner, self.outer = _weights(ffn.inner), _weights(ffn.outer)

    def __call__(self, x: Tensor) -> Tensor:
        units = F.gelu(F.linear(torch.layer_norm(x, x.shape[-1:], *self.norm, self.eps), *self.inner))
        return x + F.linear(units, *self.outer)


def _weights(part: Any) -> tuple[Tensor, Tensor]:
    return part.weight.detach(), part.bias.detach()
