"""FIT as a diffusion decoder: noisy tokens, noise level and condition in; the prediction out (spec section 5)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fitformer._support.checks import checked, whole
from fitformer.errors import InputError
from fitformer.execution import Inputs
from fitformer.execution.base import Read, Score
from fitformer.models.base import FITModel
from fitformer.models.config import TrunkConfig
from fitformer.models.encoder import Stem, causal_of, check_grouped
from fitformer.models.layers import MOST_SIZE, FeedForward, check_sizes, layer_norm, linear
from fitformer.models.positions import sin_cos_1d
from fitformer.models.trunk import Trunk

SELF_CONDITIONING = ("none", "latent")


class TimeEmbedding(nn.Module):
    """Embedding of the noise level and of `extra` more scalars as one token of width d (spec section 5).

    Raises:
        InputError: d is below 8, where the code of width d / 4 has no spread to standardise.
    """

    @checked
    def __init__(self, latent_dim: int, extra: int = 0) -> None:
        super().__init__()
        if latent_dim < 8:
            raise InputError(f"latent_dim is {latent_dim}; a denoiser needs at least 8 to tell noise levels apart")
        self.code_width = latent_dim // 4
        self.inner, self.outer = linear(self.code_width, latent_dim), linear(latent_dim + extra, latent_dim)

    def forward(self, time: Tensor) -> Tensor:
        """Embed `time (b,)` or `(b, 1 + extra)` as `(b, d)`.

        Raises:
            InputError: another number of scalars.
        """
        scalars = time[:, None] if time.ndim == 1 else time
        wanted = 1 + self.outer.in_features - self.outer.out_features
        if scalars.ndim != 2 or scalars.shape[1] != wanted:
            raise InputError(f"time has shape {tuple(time.shape)}, the denoiser was built for (b, {wanted})")
        code = sin_cos_1d(1000.0 * scalars[:, 0].float(), self.code_width)
        code = F.layer_norm(code, (self.code_width,), eps=0.0)
        hidden = F.silu(self.inner(code.to(self.inner.weight.dtype)))
        return self.outer(torch.cat([hidden, scalars[:, 1:].to(hidden.dtype)], dim=-1))


class LatentSelfConditioning(nn.Module):
    """What the latents of an earlier pass add to the initial ones; nothing at first, its last scale starts at 0."""

    @checked
    def __init__(self, latent_dim: int, mlp_ratio: float) -> None:
        super().__init__()
        self.ffn, self.norm = FeedForward(latent_dim, mlp_ratio), layer_norm(latent_dim)
        nn.init.zeros_(self.norm.weight)

    def forward(self, latents_prev: Tensor) -> Tensor:
        """Return what is added to the initial latents, of the shape of `latents_prev (b, t, m, d)`."""
        return self.norm(latents_prev + self.ffn(latents_prev))


class FITDenoiser(FITModel):
    """FIT diffusion decoder (spec section 5).

    Args:
        trunk: options of the trunk; its layer string should end in `)`, as global layers at the end reach no data
            token.
        num_groups: t; None for any number, see `Trunk`.
        tokens_per_group: n.
        out_dim: channels of a token, noisy and predicted.
        cond_dim: width e of the condition tokens; None for an unconditional model.
        cond_proj: project the condition to width d; False needs `cond_dim` equal to `latent_dim`.
        extra_time: scalars that `time` has beside the noise level.
        self_cond: `"latent"` takes the latents of an earlier pass, `"none"` does not.
        mask: as in `FITEncoder`.

    Raises:
        InputError: arguments that do not fit together, see `Trunk`.
    """

    @checked
    def __init__(
        self,
        trunk: TrunkConfig,
        num_groups: int | None,
        tokens_per_group: int,
        out_dim: int,
        *,
        cond_dim: int | None = None,
        cond_proj: bool = True,
        extra_time: int = 0,
        self_cond: str = "none",
        mask: str | None = None,
    ) -> None:
        super().__init__()
        if self_cond not in SELF_CONDITIONING:
            raise InputError(f"unknown self_cond {self_cond!r}; known are {', '.join(SELF_CONDITIONING)}")
        check_sizes(out_dim=out_dim, cond_dim=1 if cond_dim is None else cond_dim)
        whole("extra_time", extra_time, 0, MOST_SIZE)
        dim, latent_dim = trunk.dim, trunk.latent_dim
        if cond_dim is not None and not cond_proj and cond_dim != latent_dim:
            raise InputError(f"cond_proj=False needs cond_dim equal to latent_dim, not {cond_dim} and {latent_dim}")
        self.num_groups, self.tokens_per_group, self.cond_dim = num_groups, tokens_per_group, cond_dim
        self.stem, self.time = Stem(out_dim, dim), TimeEmbedding(latent_dim, extra_time)
        self.cond_proj = linear(cond_dim, latent_dim) if cond_dim is not None and cond_proj else None
        self.self_conditioning = LatentSelfConditioning(latent_dim, trunk.mlp_ratio) if self_cond == "latent" else None
        self.trunk = Trunk(trunk, num_groups, tokens_per_group, causal=causal_of(mask), condition=True)
        self.norm, self.output = layer_norm(dim), linear(dim, out_dim)

    def condition(self, batch: int, time: Tensor, cond: Tensor | None) -> Tensor:
        """Condition tokens `(b, 1 + s, d)`: the time, then `cond (b, e)` or `(b, s, e)`, in the weights' precision.

        Raises:
            InputError: a condition given, not given, or of a width other than the model was built for; times or
                conditions of another number of examples.
        """
        for name, tensor in {"time": time, "cond": cond}.items():
            if tensor is not None and (tensor.ndim == 0 or tensor.shape[0] != batch):
                raise InputError(f"{name} {tuple(tensor.shape)} needs one row for each of the {batch} examples of x")
        if cond is not None and cond.ndim == 1:
            raise InputError(
                f"cond {tuple(cond.shape)} holds one number for each example, and the denoiser takes rows (b, e): give "
                "classes as torch.nn.functional.one_hot(cond, e), or take a FITImageDenoiser, which takes their numbers"
            )
        given = None if cond is None else cond.shape[-1]
        if given != self.cond_dim:
            raise InputError(f"a condition of width {given} given to a denoiser built with cond_dim={self.cond_dim}")
        tokens = self.time(time)[:, None]
        if cond is None:
            return tokens
        cond = cond.to(self.output.weight.dtype)
        cond = cond if self.cond_proj is None else self.cond_proj(cond)
        return torch.cat([tokens, cond[:, None] if cond.ndim == 2 else cond], dim=1)

    def initial_latents(
        self, batch: int, num_groups: int, latents_prev: Tensor | None, coords: Tensor | None = None
    ) -> Tensor:
        """Initial latents `(b, t, m, d)`, self-conditioned on those of an earlier pass (zeros if absent).

        `coords` are as in `Trunk.initial_latents`.

        Raises:
            InputError: `latents_prev` of another shape, or given to a model without latent self-conditioning.
        """
        latents = self.trunk.initial_latents(batch, num_groups, coords)
        if latents_prev is not None and latents_prev.shape != latents.shape:
            raise InputError(f"latents_prev has shape {tuple(latents_prev.shape)}, wanted {tuple(latents.shape)}")
        if latents_prev is not None:
            latents_prev = latents_prev.to(latents.dtype)
        if self.self_conditioning is not None:
            return latents + self.self_conditioning(torch.zeros_like(latents) if latents_prev is None else latents_prev)
        if latents_prev is not None:
            raise InputError("latents_prev given to a denoiser built with self_cond='none'; build it with 'latent'")
        return latents

    def embed(self, x: Tensor) -> Tensor:
        """Noisy tokens `(b, t, n, out_dim)` as data tokens `(b, t, n, c)`.

        Raises:
            InputError: shapes that the model was not built for.
        """
        check_grouped(x, self.tokens_per_group, "b t n out_dim")
        return self.stem(x) + self.trunk.position.at()

    def head(self, x: Tensor) -> Tensor:
        """Data tokens `(b, t, n, c)` as they leave the trunk to the prediction `(b, t, n, out_dim)`."""
        return self.output(self.norm(x))

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        cond: Tensor | None = None,
        latents_prev: Tensor | None = None,
        mask: Tensor | None = None,
        coords: Tensor | None = None,
        score: Score | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Denoise.

        Args:
            x: noisy tokens `(b, t, n, out_dim)`.
            time: noise level gamma in [0, 1], `(b,)`, or `(b, 1 + extra_time)`.
            cond: `(b, e)` or `(b, s, e)`; zeros mean no condition (guidance).
            latents_prev: latents of an earlier pass, `(b, t, m, d)`.
            mask, coords: of tokens and of groups, as in `FITEncoder.forward`.
            score: function of a slice of groups, its prediction and its mask, whose sum over slices takes the place of
                the prediction: a loss that never holds it whole.

        Returns:
            the prediction `(b, t, n, out_dim)`, or the score; and the latents `(b, t, m, d)`, not normalised.
        """
        check_grouped(x, self.tokens_per_group, "b t n out_dim")
        latents = self.initial_latents(x.shape[0], x.shape[1], latents_prev, coords)
        return self.read(x, latents, self.condition(x.shape[0], time, cond), mask, score)

    def read(
        self,
        tokens: Tensor | Read,
        latents: Tensor,
        condition: Tensor,
        mask: Tensor | None = None,
        score: Score | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `forward`, for noisy tokens in memory or a function that reads a slice of them with its mask.

        `latents` are those of `initial_latents`, `condition` those of `condition`.
        """
        scored = None if score is None else (lambda groups, x, mask: score(groups, self.head(x), mask))
        inputs = Inputs(
            tokens=tokens,
            latents=latents,
            embed=lambda groups, raw: self.embed(raw),
            mask=mask,
            score=scored,
            blocks=() if score else self.last_block(),
            condition=condition,
            parameters=self.all_parameters(),
        )
        outputs = self.execute(inputs)
        return self.head(outputs.tokens[0]) if outputs.score is None else outputs.score, outputs.latents
