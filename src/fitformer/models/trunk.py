"""FIT on one page: the layer string, the two phases of a block, and the plain loop over blocks.

Letters used in every shape of this project:
    b  examples            L  data tokens in all, t * n
    t  groups              n  data tokens in a group        m  latent tokens in a group
    c  width of a data token (dim)                          d  width of a latent (latent_dim)
    s  condition tokens

A block is a group phase, which never mixes groups, and a global phase, which never touches data tokens. Everything
else this project does (recomputing, streaming, sharding, caching) is another way to run these same two functions.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fitformer.errors import InputError
from fitformer.models.dropout import GroupRandom, group_keys
from fitformer.models.layers import CrossLayer, TransformerLayer, check_heads, check_sizes, triangle
from fitformer.models.positions import PositionTable, latent_positions, token_positions


def parse_layers(layers: str) -> list[tuple[int, int]]:
    """Read a layer string: `(local)global(local)global...`, so `"(4)8(4)"` is `[(4, 8), (4, 0)]` (spec section 2).

    Raises:
        InputError: it does not parse, or a block before the last has no global layers.
    """
    whole = layers + "0" if layers.endswith(")") else layers
    if not re.fullmatch(r"(\(\d+\)\d+)+", whole):
        raise InputError(
            f"layer string {layers!r} does not parse; write (local)global(local)global..., for example (4)8(4)8(4)"
        )
    plan = [(int(local), int(glob)) for local, glob in re.findall(r"\((\d+)\)(\d+)", whole)]
    for i, (_, glob) in enumerate(plan[:-1]):
        if glob == 0:
            raise InputError(
                f"layer string {layers!r}: block {i + 1} of {len(plan)} has 0 global layers; every block but the last "
                "needs at least 1, or merge its local layers into the next block"
            )
    return plan


class Block(nn.Module):
    """One block: [write], local layers, [read, [condition], global layers].

    A module of parts only; the phases that use them are `Trunk`'s.
    """

    def __init__(
        self,
        local: list[TransformerLayer],
        glob: list[TransformerLayer],
        read: CrossLayer | None,
        write: CrossLayer | None,
        condition: CrossLayer | None,
    ) -> None:
        super().__init__()
        self.write = write
        self.local_layers = nn.ModuleList(local)
        self.read = read
        self.condition = condition
        self.global_layers = nn.ModuleList(glob)


class Trunk(nn.Module):
    """The interleaved layers of FIT, the same in all three roles.

    Args:
        layers: layer string, see `parse_layers`.
        num_groups: t; None for any number, with `row_column` latent positions.
        tokens_per_group: n. latents_per_group: m.
        dim: c. latent_dim: d. heads, latent_heads: of local and of global layers.
        position, latent_position: kinds of positions (`positions.py`).
        mlp_ratio: inner width of the feed-forwards over the outer one.
        drop_path, drop_units, drop_att: dropout of residual branches, feed-forward units, attention weights.
        causal: `"none"`; `"global"`, a latent sees latents of its own and of earlier groups; `"all"`, moreover
            local layers are causal inside the group, and write gives a group the latents of the group before.
        condition: latents look at condition tokens `(b, s, d)` before the global layers of each block.
        self_attention: local layers have attention, not only their feed-forward half.
        cross_mlp: a feed-forward after read and write. cross_norm: normalise what cross-attention looks at.

    Raises:
        InputError: the layer string does not parse, sizes are not positive, heads do not divide widths, or a rate of
            dropout is not below 1.
    """

    def __init__(
        self,
        layers: str,
        num_groups: int | None,
        tokens_per_group: int,
        latents_per_group: int,
        dim: int,
        latent_dim: int,
        heads: int,
        latent_heads: int,
        *,
        position: str = "learned",
        latent_position: str = "learned",
        mlp_ratio: float = 4,
        drop_path: float = 0.0,
        drop_units: float = 0.0,
        drop_att: float = 0.0,
        causal: str = "none",
        condition: bool = False,
        self_attention: bool = True,
        cross_mlp: bool = False,
        cross_norm: bool = True,
    ) -> None:
        super().__init__()
        self.plan = parse_layers(layers)
        check_sizes(tokens_per_group=tokens_per_group, latents_per_group=latents_per_group)
        check_sizes(num_groups=1 if num_groups is None else num_groups, dim=dim, latent_dim=latent_dim)
        has_local, has_global = (any(counts) for counts in zip(*self.plan, strict=True))
        if has_local and self_attention:
            check_heads(heads, dim, "local layers, dim")
        if has_global:
            check_heads(latent_heads, latent_dim, "global layers, latent_dim")
            check_heads(min(heads, latent_heads), min(dim, latent_dim), "read and write, the smaller of both widths")
        self.latents_per_group = latents_per_group
        self.drops_out = max(drop_path, drop_units, drop_att) > 0
        self.causal_global, self.causal_local = causal in ("global", "all"), causal == "all"
        self.position = token_positions(position, tokens_per_group, dim)
        self.latent_position = latent_positions(latent_position, num_groups, latents_per_group, latent_dim)

        ffn: dict[str, Any] = {"mlp_ratio": mlp_ratio, "drop_units": drop_units}
        layer = {**ffn, "drop_path": drop_path, "drop_att": drop_att}
        cross = {**(ffn if cross_mlp else {}), "context_norm": cross_norm}
        cross |= {"width": min(dim, latent_dim), "heads": min(heads, latent_heads)}

        def look() -> CrossLayer:
            return CrossLayer(latent_dim, latent_dim, latent_dim, latent_heads, context_norm=cross_norm)

        def block(i: int, local: int, glob: int) -> Block:
            return Block(
                [TransformerLayer(dim, heads, self_attention=self_attention, **layer) for _ in range(local)],
                [TransformerLayer(latent_dim, latent_heads, **layer) for _ in range(glob)],
                read=CrossLayer(latent_dim, dim, **cross) if glob else None,
                write=CrossLayer(dim, latent_dim, **cross) if i > 0 else None,
                condition=look() if glob and condition else None,
            )

        self.blocks = nn.ModuleList(block(i, local, glob) for i, (local, glob) in enumerate(self.plan))

    def layers(self) -> Iterator[TransformerLayer | CrossLayer]:
        """Every layer, in no particular order: the pieces to compile or to shard one by one."""
        return (part for part in self.modules() if isinstance(part, TransformerLayer | CrossLayer))

    def initial_latents(self, batch: int, num_groups: int, coords: Tensor | None = None) -> Tensor:
        """The latents `(b, t, m, d)` that every example starts from: their positions.

        A table has them in the order of groups, and fewer groups than the model was built for take the first ones.
        `row_column` positions take rows and columns of the groups, `places (t, 2)` or `(b, t, 2)` int64; one row of
        groups by default.

        Raises:
            InputError: more groups than there are positions, places of another number of groups or given to a table.
        """
        if not isinstance(self.latent_position, PositionTable):
            if coords is None:
                coords = torch.arange(num_groups, device=self.latent_position.slots.device)
                coords = torch.stack([torch.zeros_like(coords), coords], dim=-1)
            if coords.shape[-2] != num_groups:
                raise InputError(f"places of {coords.shape[-2]} groups given for an input of {num_groups}")
            return self.latent_position(coords).expand(batch, -1, -1, -1)
        if coords is not None:
            raise InputError("places of groups given to a model with a table of latents; build it with 'row_column'")
        table = rearrange(self.latent_position(), "(t m) d -> t m d", m=self.latents_per_group)
        if num_groups > table.shape[0]:
            raise InputError(
                f"the input has {num_groups} groups, the model positions for {table.shape[0]}; "
                "build it with num_groups at least that large, or cut the input into fewer groups"
            )
        return table[:num_groups].expand(batch, -1, -1, -1)

    def group_keys(self, batch: int, groups: int) -> Tensor | None:
        """What each group's dropout is drawn from, `(b, t)` by torch's generator; None where nothing is dropped."""
        if not (self.training and self.drops_out):
            return None
        return group_keys(batch, groups).to(next(self.parameters()).device)

    def write_source(self, latents: Tensor) -> Tensor:
        """What each group's tokens are written from, `(b, t, m, d)`: its own latents, or in the autoregressive
        role those of the group before, zeros for the first (spec section 5)."""
        return F.pad(latents[:, :-1], (0, 0, 0, 0, 1, 0)) if self.causal_local else latents

    def group_phase(
        self,
        i: int,
        x: Tensor,
        latents: Tensor,
        source: Tensor,
        mask: Tensor | None = None,
        keys: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Write, local layers, read of block i, on any set of groups: no group sees another.

        Args:
            i: block.
            x: data tokens `(b, t, n, c)`.
            latents: their groups' latents `(b, t, m, d)`.
            source: the latents that write looks at, `write_source` of all groups cut to these.
            mask: booleans `(b, t, n)`, false for tokens that nobody may look at; at least one of a group is true.
            keys: of these groups' dropout `(b, t)`, see `group_keys`.

        Returns:
            data tokens and latents, of the same shapes.
        """
        block: Block = self.blocks[i]  # type: ignore[assignment]
        batch, groups = x.shape[:2]
        x, latents = x.flatten(0, 1), latents.flatten(0, 1)
        random = None if keys is None else GroupRandom(keys.flatten(), i)
        seen = None if mask is None else mask.flatten(0, 1)[:, None, None]
        local = {"mask": seen, "causal": self.causal_local}
        if seen is not None and self.causal_local:
            local = {"mask": seen & triangle(x.shape[1], x.device)}
        if block.write is not None:
            x = block.write(x, source.flatten(0, 1), random=random)
        for layer in block.local_layers:
            x = layer(x, **local, random=random)
        if block.read is not None:
            latents = block.read(latents, x, seen, random=random)
        return x.unflatten(0, (batch, groups)), latents.unflatten(0, (batch, groups))

    def global_phase(
        self, i: int, latents: Tensor, condition: Tensor | None = None, call: Callable[..., Tensor] | None = None
    ) -> Tensor:
        """Condition and global layers of block i on all latents `(b, t, m, d)` of each example.

        Args:
            i: block.
            latents: of all groups.
            condition: tokens `(b, s, d)` that the latents look at first, in a trunk built with `condition=True`.
            call: how a layer is called, `call(layer, *inputs)`, if not plainly.
        """
        block: Block = self.blocks[i]  # type: ignore[assignment]
        t, m = latents.shape[1:3]
        latents = latents.flatten(1, 2)
        call = call or (lambda layer, *inputs: layer(*inputs))
        if block.condition is not None:
            latents = call(block.condition, latents, condition)
        mask = block_causal_mask(t, m, latents.device) if self.causal_global and len(block.global_layers) else None
        for layer in block.global_layers:
            latents = call(layer, latents, mask)
        return latents.unflatten(1, (t, m))

    def forward(
        self, x: Tensor, latents: Tensor, condition: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run every block on data tokens `(b, t, n, c)` and latents `(b, t, m, d)`; returns both (spec section 5).

        `condition` and `mask` are as in the phases.
        """
        keys = self.group_keys(*x.shape[:2])
        for i in range(len(self.blocks)):
            x, latents = self.group_phase(i, x, latents, self.write_source(latents), mask, keys)
            latents = self.global_phase(i, latents, condition)
        return x, latents


def block_causal_mask(t: int, m: int, device: torch.device) -> Tensor:
    """Mask `(t*m, t*m)`, true where a latent may look: at those of its own and of earlier groups."""
    group = torch.arange(t, device=device).repeat_interleave(m)
    return group[:, None] >= group[None, :]
