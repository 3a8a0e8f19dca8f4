"""FIT as an encoder of grouped tokens (spec section 5). `image_encoder.py` stands on it."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fitformer._support.checks import checked, shown
from fitformer.errors import InputError
from fitformer.execution import Inputs
from fitformer.execution.base import Score
from fitformer.models.base import FITModel
from fitformer.models.config import TrunkConfig
from fitformer.models.layers import check_sizes, layer_norm, linear
from fitformer.models.trunk import Causal, Trunk

MASKS: dict[str | None, Causal] = {None: "none", "none": "none", "causal": "global"}


@checked
def causal_of(mask: str | None) -> Causal:
    """Translate the reference's `mask` into the trunk's `causal`.

    Raises:
        InputError: an unknown mask.
    """
    if mask not in MASKS:
        raise InputError(f"unknown mask {mask!r}; known are 'none' and 'causal'")
    return MASKS[mask]


class Stem(nn.Module):
    """Linear projection of raw tokens and LayerNorm: `(..., channels) -> (..., width)`."""

    @checked
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        check_sizes(channels=channels, dim=width)
        self.projection, self.norm = linear(channels, width), layer_norm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Embed tokens `(..., channels)`, floats of any precision: they take that of the weights.

        Raises:
            InputError: the tokens have another number of channels, or are whole numbers.
        """
        if not x.is_floating_point():
            raise InputError(f"tokens are {x.dtype}; turn pixels into floats first, for example x.float() / 255")
        if x.shape[-1] != self.projection.in_features:
            raise InputError(
                f"tokens of {x.shape[-1]} channels given to a model built for {self.projection.in_features}"
            )
        return self.norm(self.projection(x.to(self.projection.weight.dtype)))


def check_grouped(x: Tensor, tokens_per_group: int, axes: str) -> None:
    """Refuse an input that is not grouped as the model was built.

    Raises:
        InputError: another number of axes, or of tokens in a group.
    """
    if not isinstance(x, Tensor):
        raise InputError(f"expected a tensor ({', '.join(axes.split())}), got {shown(x)}")
    if x.ndim != len(axes.split()):
        raise InputError(f"expected a tensor ({', '.join(axes.split())}), got one of shape {tuple(x.shape)}")
    if x.shape[2] != tokens_per_group:
        raise InputError(f"groups of {x.shape[2]} tokens given to a model built for {tokens_per_group} in a group")


class FITEncoder(FITModel):
    """FIT encoder of grouped tokens (spec section 5).

    Args:
        trunk: options of the trunk; a layer string that ends in global layers answers in latents, one that ends in
            `)` in data tokens.
        num_groups: t; None for any number, see `Trunk`.
        tokens_per_group: n.
        in_channels: channels of a raw token, for images patch height * width * channels.
        y_channels: channels of the extra tokens `y` that a group may be given, none by default.
        mask: `"causal"` lets a latent attend only to latents of its own and of earlier groups.

    Raises:
        InputError: arguments that do not fit together, see `Trunk`.
    """

    ends_local = False

    @checked
    def __init__(
        self,
        trunk: TrunkConfig,
        num_groups: int | None,
        tokens_per_group: int,
        in_channels: int,
        *,
        y_channels: int | None = None,
        mask: str | None = None,
    ) -> None:
        super().__init__()
        check_sizes(in_channels=in_channels, y_channels=1 if y_channels is None else y_channels)
        self.num_groups, self.tokens_per_group = num_groups, tokens_per_group
        self.stem = Stem(in_channels, trunk.dim)
        self.stem_y = Stem(y_channels, trunk.dim) if y_channels is not None else None
        self.trunk = Trunk(trunk, num_groups, tokens_per_group, causal=causal_of(mask))
        self.norm, self.latent_norm = layer_norm(trunk.dim), layer_norm(trunk.latent_dim)

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
        x = self.stem(x) + self.trunk.position.at()
        if self.stem_y is None or y is None:
            return x
        if y.ndim != 4 or y.shape[:2] != x.shape[:2]:
            raise InputError(f"extra tokens y {tuple(y.shape)} do not belong to the groups of x {tuple(x.shape)}")
        return torch.cat([self.stem_y(y), x], dim=2)

    def inputs(
        self,
        x: Tensor,
        y: Tensor | None = None,
        mask: Tensor | None = None,
        coords: Tensor | None = None,
        blocks: Sequence[int] = (),
    ) -> Inputs:
        """One pass on tokens in memory; arguments as in `forward`, and the blocks whose data tokens are wanted."""
        check_grouped(x, self.tokens_per_group, "b t n channels")
        if y is not None and y.shape[:2] != x.shape[:2]:
            raise InputError(f"extra tokens y {tuple(y.shape)} do not belong to the groups of x {tuple(x.shape)}")
        if mask is not None and y is not None:
            mask = torch.cat([mask.new_ones(y.shape[:3]), mask], dim=2)
        return Inputs(
            tokens=x,
            latents=self.trunk.initial_latents(x.shape[0], x.shape[1], coords),
            embed=lambda groups, tokens: self.embed(tokens, None if y is None else y[:, groups]),
            mask=mask,
            blocks=blocks,
            parameters=self.all_parameters(y),
        )

    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        mask: Tensor | None = None,
        coords: Tensor | None = None,
        score: Score | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Encode raw tokens `x (b, t, n, channels)`, `y (b, t, k, y_channels)`.

        Args:
            x, y: tokens.
            mask: booleans `(b, t, n)`, false for tokens of x that nothing attends to; at least one of a group is true.
            coords: rows and columns of the groups, see `Trunk.initial_latents`.
            score: function of a slice of groups, its normalised data tokens and their mask, whose sum over slices takes
                the place of the data tokens: what streams need never hold them whole.

        Returns:
            normalised data tokens `(b, t, k+n, c)`, or the score; and latents `(b, t, m, d)`. Use the latents
            downstream where the layer string ends in global layers, else the data tokens.
        """
        inputs = self.inputs(x, y, mask, coords, () if score else self.last_block())
        return self.answer(inputs, score)

    def answer(self, inputs: Inputs, score: Score | None = None) -> tuple[Tensor, Tensor]:
        """Run some inputs; normalised data tokens of their last wanted block, or the sum of scores, and latents."""
        if score is not None:
            inputs = replace(inputs, score=lambda groups, x, mask: score(groups, self.head(x), mask))
        outputs = self.execute(inputs)
        first = outputs.score if outputs.score is not None else self.head(outputs.tokens[-1])
        return first, self.latent_norm(outputs.latents)

    def head(self, x: Tensor) -> Tensor:
        """Data tokens `(b, t, n, c)` as they leave the trunk to what the encoder gives: normalised."""
        return self.norm(x)
