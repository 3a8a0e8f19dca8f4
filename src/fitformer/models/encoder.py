"""FIT as an encoder of grouped tokens (spec section 5). `image_encoder.py` stands on it."""

import torch
from torch import Tensor, nn

from fitformer.errors import InputError
from fitformer.execution import Execution, plain
from fitformer.models.layers import check_sizes, layer_norm, linear
from fitformer.models.pretrained import Pretrained
from fitformer.models.trunk import Trunk

MASKS = {None: "none", "none": "none", "causal": "global"}


def causal_of(mask: str | None) -> str:
    """Translate the reference's `mask` into the trunk's `causal`.

    Raises:
        InputError: an unknown mask.
    """
    if mask not in MASKS:
        raise InputError(f"unknown mask {mask!r}; known are 'none' and 'causal'")
    return MASKS[mask]


class Stem(nn.Module):
    """Linear projection of raw tokens and LayerNorm: `(..., channels) -> (..., width)`."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        check_sizes(channels=channels, dim=width)
        self.projection, self.norm = linear(channels, width), layer_norm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Embed tokens `(..., channels)`.

        Raises:
            InputError: the tokens have another number of channels, or are whole numbers.
        """
        if not x.is_floating_point():
            raise InputError(f"tokens are {x.dtype}; turn pixels into floats first, for example x.float() / 255")
        if x.shape[-1] != self.projection.in_features:
            raise InputError(
                f"tokens of {x.shape[-1]} channels given to a model built for {self.projection.in_features}"
            )
        return self.norm(self.projection(x))


def check_grouped(x: Tensor, tokens_per_group: int, axes: str) -> None:
    """Refuse an input that is not grouped as the model was built.

    Raises:
        InputError: another number of axes, or of tokens in a group.
    """
    if x.ndim != len(axes.split()):
        raise InputError(f"expected a tensor ({', '.join(axes.split())}), got one of shape {tuple(x.shape)}")
    if x.shape[2] != tokens_per_group:
        raise InputError(f"groups of {x.shape[2]} tokens given to a model built for {tokens_per_group} in a group")


class FITEncoder(Pretrained, nn.Module):
    """FIT encoder of grouped tokens (spec section 5).

    Args:
        layers: layer string such as `"(2)4(2)4"`; ends in global layers to answer in latents, in `)` for tokens.
        num_groups: t; None for any number, with `row_column` latent positions.
        tokens_per_group: n. latents_per_group: m.
        in_channels: channels of a raw token, for images patch height * width * channels.
        dim: c. latent_dim: d. heads, latent_heads: of local and of global attention.
        y_channels: channels of the extra tokens `y` that a group may be given, none by default.
        mask: `"causal"` lets a latent see only latents of its own and of earlier groups.
        position: `"learned"`, `"sin_cos"` or `"sin_cos2d"`.
        latent_position: `"learned"`, `"sin_cos"`, or `"row_column"` for any number of groups.
        mlp_ratio, drop_path, drop_units, drop_att: as in `Trunk`.

    Raises:
        InputError: arguments that do not fit together, see `Trunk`.
    """

    ends_local = False

    def __init__(
        self,
        layers: str,
        num_groups: int | None,
        tokens_per_group: int,
        latents_per_group: int,
        in_channels: int,
        dim: int,
        latent_dim: int,
        heads: int,
        latent_heads: int,
        *,
        y_channels: int | None = None,
        mask: str | None = None,
        position: str = "learned",
        latent_position: str = "learned",
        mlp_ratio: float = 4,
        drop_path: float = 0.0,
        drop_units: float = 0.0,
        drop_att: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_groups, self.tokens_per_group = num_groups, tokens_per_group
        self.stem = Stem(in_channels, dim)
        self.stem_y = Stem(y_channels, dim) if y_channels is not None else None
        self.trunk = Trunk(
            layers,
            num_groups,
            tokens_per_group,
            latents_per_group,
            dim,
            latent_dim,
            heads,
            latent_heads,
            position=position,
            latent_position=latent_position,
            mlp_ratio=mlp_ratio,
            drop_path=drop_path,
            drop_units=drop_units,
            drop_att=drop_att,
            causal=causal_of(mask),
        )
        self.norm, self.latent_norm = layer_norm(dim), layer_norm(latent_dim)
        self.run: Execution = plain

    def embed(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Stem: raw tokens `x (b, t, n, channels)` and extra ones `y (b, t, k, y_channels)` to `(b, t, k+n, c)`.

        Raises:
            InputError: shapes that the model was not built for, or `y` given without `y_channels` (or not given with).
        """
        check_grouped(x, self.tokens_per_group, "b t n channels")
        if (y is None) != (self.stem_y is None):
            raise InputError(
                f"extra tokens y are {'missing' if y is None else 'given'}, and the encoder was built "
                f"with{'out' if self.stem_y is None else ''} y_channels"
            )
        x = self.stem(x) + self.trunk.position()
        if self.stem_y is None or y is None:
            return x
        if y.ndim != 4 or y.shape[:2] != x.shape[:2]:
            raise InputError(f"extra tokens y {tuple(y.shape)} do not belong to the groups of x {tuple(x.shape)}")
        return torch.cat([self.stem_y(y), x], dim=2)

    def forward(
        self, x: Tensor, y: Tensor | None = None, mask: Tensor | None = None, coords: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encode raw tokens `x (b, t, n, channels)`, `y (b, t, k, y_channels)`.

        Args:
            x, y: tokens.
            mask: booleans `(b, t, n)`, false for tokens of x that nobody may look at; at least one of a group is true.
            places: rows and columns of the groups, see `Trunk.initial_latents`.

        Returns:
            normalised data tokens `(b, t, k+n, c)` and latents `(b, t, m, d)`; use the latents downstream where the
            layer string ends in global layers, else the data tokens.
        """
        x = self.embed(x, y)
        if mask is not None and y is not None:
            mask = torch.cat([mask.new_ones(y.shape[:3]), mask], dim=2)
        latents = self.trunk.initial_latents(x.shape[0], x.shape[1], coords)
        x, latents = self.run(self.trunk, x, latents, None, mask)
        return self.finish(x), self.latent_norm(latents)

    def finish(self, x: Tensor) -> Tensor:
        """Data tokens `(b, t, n, c)` as they leave the trunk to what the encoder hands out: normalised."""
        return self.norm(x)
