"""FIT on one page: the layer string, the two phases of a block, and the plain loop over blocks.

Letters used in every shape of this project:
    b  examples            L  data tokens in all, t * n
    t  groups              n  data tokens in a group        m  latent tokens in a group
    c  width of a data token (dim)                          d  width of a latent (latent_dim)
    s  condition tokens

A block is a group phase, which never mixes groups, and a global phase, which never touches data tokens. Recomputing,
streaming, sharding and caching are other ways to run these same two functions (`fitformer.execution`).
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fitformer._support.checks import checked
from fitformer.errors import InputError
from fitformer.models.block_causal import Band
from fitformer.models.config import TrunkConfig
from fitformer.models.dropout import GroupRandom, draw_keys
from fitformer.models.layers import CrossLayer, TransformerLayer, triangle
from fitformer.models.positions import GridPositions, PositionTable, latent_positions, token_positions
from fitformer.models.present import Present, present
from fitformer.models.trunk_checks import check_trunk

MOST_LAYERS = 10_000


@checked
def parse_layers(layers: str) -> list[tuple[int, int]]:
    """Read a layer string: `(local)global(local)global...`, so `"(4)8(4)"` is `[(4, 8), (4, 0)]` (spec section 2).

    Raises:
        InputError: it does not parse, there are no layers or too many, or a block before the last has no global layers.
    """
    whole = layers + "0" if layers.endswith(")") else layers
    if not re.fullmatch(r"(\(\d+\)\d+)+", whole):
        raise InputError(
            f"layer string {layers!r} does not parse; write (local)global(local)global..., for example (4)8(4)8(4)"
        )
    depths = [(int(local), int(glob)) for local, glob in re.findall(r"\((\d+)\)(\d+)", whole)]
    if not 0 < (count := sum(map(sum, depths))) <= MOST_LAYERS:
        raise InputError(
            f"layer string {layers!r} has {count} layers; a trunk has at least 1 and at most {MOST_LAYERS}"
        )
    for i, (_, glob) in enumerate(depths[:-1]):
        if glob == 0:
            raise InputError(
                f"layer string {layers!r}: block {i + 1} of {len(depths)} has 0 global layers; every block but the "
                "last needs at least 1, or merge its local layers into the next block"
            )
    return depths


Causal = Literal["none", "global", "all"]


class Block(nn.Module):
    """One block: [write], local layers, [read, [attention to the condition], global layers].

    Args:
        index: number of the block, from 0; the first has no write.
        local, glob: counts of local and of global layers; a block without global layers has no read.
        config: widths, heads, dropout, options.
        causal: see `Trunk`. condition: latents attend to condition tokens.
    """

    # Whether what is absent runs too: each part of the block is then called once, on whole groups in their order.
    runs_absent = False

    @checked
    def __init__(
        self, index: int, local: int, glob: int, config: TrunkConfig, causal: Causal = "none", condition: bool = False
    ) -> None:
        super().__init__()
        self.index = index
        self.causal_local = causal == "all"
        self.causal_global = config.latents_per_group if causal != "none" else 0
        self.rotary, self.window = config.rotary, config.global_window
        self.drops_of_tokens = max(config.drop_units, config.drop_att) > 0
        qk_norm: dict[str, Any] = {"qk_norm": config.qk_norm}
        ffn: dict[str, Any] = {"mlp_ratio": config.mlp_ratio, "drop_units": config.drop_units}
        layer = {**ffn, **qk_norm, "drop_path": config.drop_path, "drop_att": config.drop_att, "rotary": config.rotary}
        cross = {**(ffn if config.xattn_with_mlp else {}), **qk_norm, "context_norm": config.xattn_enc_ln}
        c, d, heads, latent_heads = config.dim, config.latent_dim, config.heads, config.latent_heads
        narrow: dict[str, Any] = {"width": min(c, d), "heads": min(heads, latent_heads)}

        # In this order, which seeded initial weights depend on.
        def local_layer() -> TransformerLayer:
            return TransformerLayer(c, heads, self_attention=config.x_self_attention, **layer)

        locals_ = [local_layer() for _ in range(local)]
        globals_ = [TransformerLayer(d, latent_heads, **layer) for _ in range(glob)]
        read = CrossLayer(d, c, **narrow, **cross) if glob else None
        self.write = CrossLayer(c, d, **narrow, **cross) if index else None
        self.local_layers, self.read = nn.ModuleList(locals_), read
        norms = {"context_norm": config.xattn_enc_ln, **qk_norm}
        self.condition = CrossLayer(d, d, d, latent_heads, **norms) if glob and condition else None
        self.global_layers = nn.ModuleList(globals_)

    def group_phase(
        self,
        x: Tensor,
        latents: Tensor,
        write_latents: Tensor,
        mask: Tensor | None = None,
        keys: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Write, local layers, read, on any set of groups: no group attends to another.

        Args:
            x: data tokens `(b, t, n, c)`.
            latents: their groups' latents `(b, t, m, d)`.
            write_latents: the latents that write attends to, `Trunk.write_latents` of all groups cut to these.
            mask: booleans `(b, t, n)`, false for absent tokens, which nothing attends to and which stay as they are; at
                least one of a group is true.
            keys: of these groups' dropout `(b, t)`, see `Trunk.dropout_keys`.

        Returns:
            data tokens and latents, of the same shapes.
        """
        shape = x.shape[:2]
        x, latents, write_latents = x.flatten(0, 1), latents.flatten(0, 1), write_latents.flatten(0, 1)
        mask, keys = (None if each is None else each.flatten(0, 1) for each in (mask, keys))
        if (there := self._present(mask, keys)) is not None:
            taken, run = there.take(x), []
            for piece, part in zip(there.pieces, taken, strict=True):
                own, write = piece.of(latents), piece.of(write_latents)
                key = None if keys is None else piece.of(keys)
                run.append(self._run(part, own, write, piece.mask, key, piece.tokens))
            x, latents = there.put(x, taken, [left for left, _ in run]), there.join([read for _, read in run])
        else:
            left, latents = self._run(x, latents, write_latents, mask, keys)
            x = left if mask is None else torch.where(mask[..., None], left, x)
        return x.unflatten(0, shape), latents.unflatten(0, shape)

    def _present(self, mask: Tensor | None, keys: Tensor | None) -> Present | None:
        """How groups with a mask `(r, n)` run without what is absent; None if they run whole."""
        # A traced graph is one for all masks. What is dropped of a token depends on its place among those that run.
        if mask is None or self.runs_absent or torch.compiler.is_compiling():
            return None
        return None if self.drops_of_tokens and keys is not None else present(mask)

    def _run(
        self,
        x: Tensor,
        latents: Tensor,
        write_latents: Tensor,
        mask: Tensor | None,
        keys: Tensor | None,
        places: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The group phase of tokens `(r, n, c)`, which are at `places` in their groups, 0, 1, 2 ... by default."""
        random = None if keys is None else GroupRandom(keys, self.index)
        held = None if mask is None else mask[:, None, None]
        local: dict[str, Any] = {"mask": held, "causal": int(self.causal_local)}
        if held is not None and self.causal_local:
            local = {"mask": held & triangle(x.shape[1], x.device)}
        if self.write is not None:
            x = self.write(x, write_latents, random=random)
        for layer in self.local_layers:
            x = layer(x, **local, random=random, positions=places)
        if self.read is not None:
            latents = self.read(latents, x, held, random=random)
        return x, latents

    def global_phase(
        self,
        latents: Tensor,
        condition: Tensor | None = None,
        places: Tensor | None = None,
        call: Callable[..., Tensor] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Attention to the condition, and global layers, on all latents `(b, t, m, d)` of each example.

        Args:
            latents: of all groups.
            condition: tokens `(b, s, d)` that the latents attend to first, in a trunk built with `condition=True`.
            places: of the groups in their documents, int64 `(t,)` or `(b, t)`, see `Inputs.places`.
            call: how a layer is called, `call(layer, *inputs)`, if not plainly.
            mask: booleans `(b, t)`, false for groups after an example's last that fill up: no latent of its own attends
                to theirs.
        """
        t, m = latents.shape[1:3]
        latents = latents.flatten(1, 2)
        call = call or (lambda layer, *inputs: layer(*inputs))
        if self.condition is not None:
            latents = call(self.condition, latents, condition)
        causal, positions = self._causal(places), None
        if self.rotary:
            places = torch.arange(t, device=latents.device) if places is None else places
            positions = places.repeat_interleave(m, dim=-1)
        # Where attention is causal, none attends to what comes after it anyway.
        held = None if mask is None or causal else mask.repeat_interleave(m, dim=1)[:, None, None]
        for layer in self.global_layers:
            latents = call(layer, latents, held, causal, None, positions)
        return latents.unflatten(1, (t, m))

    def _causal(self, places: Tensor | None) -> int | Band:
        """What a latent attends to in global layers, as `Attention.attend` takes it."""
        if not self.causal_global or (self.window is None and places is None):
            return self.causal_global
        return Band(self.causal_global, self.window, None if places is None else _document_starts(places))


class Trunk(nn.Module):
    """The interleaved layers of FIT, the same in all three roles.

    Args:
        config: the options.
        num_groups: t. None is for any number, with `row_column`, `index` or `shared` latent positions; those take any
            number even if one is given.
        tokens_per_group: n.
        causal: `"none"`; `"global"`, a latent attends to latents of its own and of earlier groups; `"all"`, moreover
            local layers are causal inside the group, and write gives a group the latents of the group before.
        condition: latents attend to condition tokens `(b, s, d)` before the global layers of each block.

    Raises:
        InputError: the layer string does not parse, sizes are not positive, heads do not divide widths, a rate of
            dropout is not below 1, or options exclude each other.
    """

    @checked
    def __init__(
        self,
        config: TrunkConfig,
        num_groups: int | None,
        tokens_per_group: int,
        *,
        causal: Causal = "none",
        condition: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.block_depths = parse_layers(config.layers)
        check_trunk(config, self.block_depths, num_groups, tokens_per_group, causal)
        self.num_groups, self.tokens_per_group = num_groups, tokens_per_group
        self.latents_per_group = config.latents_per_group
        self.drops_out = max(config.drop_path, config.drop_units, config.drop_att) > 0
        self.shifts_write = causal == "all"
        self.position = token_positions(config.position, tokens_per_group, config.dim)
        self.latent_position = latent_positions(
            config.latent_position, num_groups, config.latents_per_group, config.latent_dim
        )
        self.blocks: Sequence[Block] = nn.ModuleList(  # type: ignore[assignment]
            Block(i, local, glob, config, causal, condition) for i, (local, glob) in enumerate(self.block_depths)
        )

    def layers(self) -> Iterator[TransformerLayer | CrossLayer]:
        """Every layer, in no particular order: the pieces to compile or to shard one by one."""
        return (part for part in self.modules() if isinstance(part, TransformerLayer | CrossLayer))

    @property
    def most_groups(self) -> int | None:
        """Groups that there are positions for; None for any number."""
        table = self.latent_position
        return table.weight.shape[0] // self.latents_per_group if isinstance(table, PositionTable) else None

    def initial_latents(
        self, batch: int, num_groups: int, coords: Tensor | None = None, places: Tensor | None = None
    ) -> Tensor:
        """The latents `(b, t, m, d)` that every example starts from: their positions.

        Args:
            batch: b. num_groups: t of the input; a table of more gives its first.
            coords: rows and columns of the groups, int64 `(t, 2)` or `(b, t, 2)`, of `row_column` positions; one row of
                groups by default.
            places: of the groups in their documents, int64 `(t,)` or `(b, t)`, see `Inputs.places`; 0, 1, 2 ... by
                default.

        Raises:
            InputError: more groups than there are positions, coords of another number of groups or given to other
                positions.
        """
        if isinstance(self.latent_position, GridPositions):
            if coords is None:
                columns = self._places(num_groups) if places is None else places
                coords = torch.stack([torch.zeros_like(columns), columns], dim=-1)
            if coords.shape[-2] != num_groups:
                raise InputError(f"coords of {coords.shape[-2]} groups given for an input of {num_groups}")
            return self.latent_position(coords).expand(batch, -1, -1, -1)
        if coords is not None:
            raise InputError("coords of groups given to a model of groups in one line; build it with 'row_column'")
        if isinstance(self.latent_position, PositionTable):
            self._check_table(num_groups, places)
            table = rearrange(self.latent_position(), "(t m) d -> t m d", m=self.latents_per_group)
            latents = table[:num_groups] if places is None else table[places]
        else:
            latents = self.latent_position(self._places(num_groups) if places is None else places)
        return latents.expand(batch, -1, -1, -1)

    def _places(self, num_groups: int) -> Tensor:
        """Places of the groups of one document."""
        return torch.arange(num_groups, device=next(self.latent_position.parameters()).device)

    def _check_table(self, num_groups: int, places: Tensor | None) -> None:
        most = self.most_groups
        if most is not None and places is not None and (num_groups > most or places.device.type == "cpu"):
            # Documents are shorter than the input. An accelerator is asked, and waited for, only where it matters.
            num_groups = int(places.max()) + 1 if places.numel() else 0
        if most is not None and num_groups > most:
            raise InputError(
                f"the input has {num_groups} groups, the model positions for {most}; build it with num_groups at least "
                "that large, cut the input into fewer groups, or take latent_position='index'"
            )

    def dropout_keys(self, batch: int, groups: int) -> Tensor | None:
        """What each group's dropout is drawn from, `(b, t)` by torch's generator; None where nothing is dropped."""
        if not (self.training and self.drops_out):
            return None
        return draw_keys(batch, groups).to(next(self.parameters()).device)

    def write_latents(self, latents: Tensor, places: Tensor | None = None) -> Tensor:
        """The latents that each group's tokens attend to in write, `(b, t, m, d)`: its own, or in the autoregressive
        role those of the group before, zeros for the first of a document (spec section 5)."""
        if not self.shifts_write:
            return latents
        shifted = F.pad(latents[:, :-1], (0, 0, 0, 0, 1, 0))
        return shifted if places is None else shifted.masked_fill((places == 0)[..., None, None], 0)

    def forward(
        self,
        x: Tensor,
        latents: Tensor,
        condition: Tensor | None = None,
        mask: Tensor | None = None,
        places: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run every block on data tokens `(b, t, n, c)` and latents `(b, t, m, d)`; returns both (spec section 5)."""
        keys = self.dropout_keys(*x.shape[:2])
        for block in self.blocks:
            x, latents = block.group_phase(x, latents, self.write_latents(latents, places), mask, keys)
            latents = block.global_phase(latents, condition, places)
        return x, latents


def _document_starts(places: Tensor) -> Tensor:
    """The first group of each group's document, of places `(..., t)`."""
    groups = torch.arange(places.shape[-1], device=places.device)
    return torch.where(places == 0, groups, 0).cummax(dim=-1).values
