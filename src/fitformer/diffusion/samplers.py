"""Sampling: one function a sampler, classifier-free guidance, the loop over steps.

Sources: `ddpm`, arXiv 2006.11239, in the form for any (alpha, sigma) of arXiv 2107.00630, appendix A; `ddim`,
arXiv 2010.02502; guidance, arXiv 2207.12598; `td`, asymmetric time intervals, arXiv 2208.04202; latent
self-conditioning, arXiv 2212.11972. Tensors are `(b, ...)` with any further axes; noise levels are `(b,)`.

A new sampler is one function of the signature `Sampler`, and one entry of `SAMPLERS` if it is to have a name.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fitformer._support.checks import checked, whole
from fitformer.diffusion.objectives import normalize
from fitformer.diffusion.process import (
    MOST_STEPS,
    PREDICTIONS,
    TINY,
    VARIANCE_PRESERVING,
    Clip,
    Denoise,
    Level,
    Process,
    check_alike,
    check_examples,
    check_guidance,
    lookup,
    mix,
    predict,
    scales_at,
    without_condition,
)
from fitformer.diffusion.schedules import gamma
from fitformer.errors import InputError

Draw = Callable[[], Tensor]
Sampler = Callable[[Tensor, Tensor, Tensor, Level, Level, Draw], Tensor]
"""`sampler(xt, x0, eps, now, after, draw) -> x`: one step from the level `now` to the lower one `after`.

`draw()` returns the step's standard normal noise; a deterministic sampler does not call it. Tensors are `(b, ...)`.
"""

Noise = Callable[[int], Tensor] | Sequence[Tensor] | Tensor | None


def ddim(xt: Tensor, x0: Tensor, eps: Tensor, now: Level, after: Level, draw: Draw) -> Tensor:
    """The deterministic step: predicted data and noise, mixed at the next level."""
    return mix(after, x0, eps)


def ddpm_large(xt: Tensor, x0: Tensor, eps: Tensor, now: Level, after: Level, draw: Draw) -> Tensor:
    """The ancestral step with the larger variance, that of the forward transition."""
    mean, variance = _ancestral(xt, eps, now, after)
    return mean + variance.sqrt() * draw()


def ddpm_small(xt: Tensor, x0: Tensor, eps: Tensor, now: Level, after: Level, draw: Draw) -> Tensor:
    """The ancestral step with the smaller variance, that of the posterior given the data."""
    mean, variance = _ancestral(xt, eps, now, after)
    posterior = variance * (after.sigma / now.sigma.clamp_min(TINY)).square()
    return mean + posterior.sqrt() * draw()


def _ancestral(xt: Tensor, eps: Tensor, now: Level, after: Level) -> tuple[Tensor, Tensor]:
    """Mean of the step and variance of the forward transition from the level `after` to `now`."""
    ratio = (now.alpha / after.alpha.clamp_min(TINY)).clamp(0, 1)
    variance = (now.sigma.square() - (ratio * after.sigma).square()).clamp_min(0)
    mean = (xt - variance / now.sigma.clamp_min(TINY) * eps) / ratio.clamp_min(TINY)
    return mean, variance


SAMPLERS: dict[str, Sampler] = {
    "ddim": ddim,
    "ddpm": ddpm_large,
    "ddpm@large": ddpm_large,
    "ddpm@small": ddpm_small,
}
"""All samplers by name."""


def sampler_of(sampler: str | Sampler) -> Sampler:
    """A sampler by name; a function is returned as it is.

    Raises:
        InputError: the name is not in `SAMPLERS`.
    """
    return lookup("sampler", sampler, SAMPLERS) if isinstance(sampler, str) else sampler


@checked
def transition(
    sampler: str | Sampler,
    xt: Tensor,
    x0: Tensor,
    eps: Tensor,
    gamma: Tensor,
    gamma_next: Tensor,
    noise: Tensor | None = None,
    process: Process = VARIANCE_PRESERVING,
) -> Tensor:
    """One step from `xt` at noise level `gamma` to the lower level `gamma_next`; tensors `(b, ...)`, levels `(b,)`.

    `ddim` needs no noise. `ddpm` adds `noise` of variance `1 - alpha` (`@large`, the default) or
    `(1 - gamma_next) / (1 - gamma) * (1 - alpha)` (`@small`), where `alpha = gamma / gamma_next`.

    Raises:
        InputError: the name of the sampler is not in `SAMPLERS`; it needs noise and none is given.
    """

    check_alike(gamma, xt=xt, x0=x0, eps=eps)
    check_alike(gamma_next, "gamma_next", xt=xt)

    def draw() -> Tensor:
        if noise is None:
            raise InputError(f"the sampler {sampler!r} adds noise and none is given; give noise of the shape of xt")
        return noise

    return sampler_of(sampler)(xt, x0, eps, scales_at(gamma, xt, process), scales_at(gamma_next, xt, process), draw)


@checked
def times(steps: int, td: float = 0.0) -> list[tuple[float, float]]:
    """The pairs `(t, t_next)` of a sampling run: `1 - k/K` and `max(1 - (k + 1 + td)/K, 0)` for k = 0..K-1.

    Raises:
        InputError: fewer than 1 step; `td` of -1 or less, with which time does not fall.
    """
    whole("steps", steps, 1, MOST_STEPS)
    if not (math.isfinite(td) and td > -1):
        raise InputError(f"td is {td}, with which time does not fall; it must be above -1 (usually 0)")
    return [(1 - k / steps, min(max(1 - (k + 1 + td) / steps, 0.0), 1.0)) for k in range(steps)]


@checked
def guided(
    denoise: Denoise, x: Tensor, gamma: Tensor, cond: Tensor | None, latents_prev: Tensor | None, guidance: float
) -> tuple[Tensor, Any]:
    """Classifier-free guidance of strength w: `(1 + w) output(cond) - w output(0)`, and the conditional call's latents.

    Raises:
        InputError: guidance without a condition.
    """
    if guidance and cond is None:
        raise InputError(f"guidance {guidance:g} needs a condition and none is given; give cond, or guidance 0")
    output, latents = denoise(x, gamma, cond, latents_prev)
    if cond is None or guidance == 0:
        return output, latents
    free, _ = denoise(x, gamma, without_condition(cond), latents_prev)
    return (1 + guidance) * output - guidance * free, latents


@checked
@torch.no_grad()
def sample(
    denoise: Denoise,
    init: Tensor,
    steps: int,
    *,
    schedule: str = "cosine",
    sampler: str | Sampler = "ddim",
    prediction: str = "eps",
    guidance: float = 0.0,
    td: float = 0.0,
    clip: Clip = (-1.0, 1.0),
    cond: Tensor | None = None,
    self_cond: bool = False,
    momentum: float = 0.0,
    noise: Noise = None,
    normalize_input: bool = False,
    on_step: Callable[[int, Tensor], None] | None = None,
    process: Process = VARIANCE_PRESERVING,
) -> Tensor:
    """Samples `(b, ...)` from Gaussian noise `init` `(b, ...)`: the last of `steps` predictions of the data.

    Args:
        denoise: the network, `denoise(x, gamma (b,), cond, latents_prev) -> (output, latents)`.
        init: the start, for instance `seeded_noise(seed, range(b), shape)`; its device and dtype are kept.
        steps: K, the number of calls of the network (twice as many with guidance).
        schedule: see `gamma`; it may differ from the schedule of training.
        sampler: a name in `SAMPLERS`, or a function of the signature `Sampler`.
        prediction: meaning of the network's output, `eps`, `x` or `v`.
        guidance: strength of classifier-free guidance, 0 for none; the unconditional call gets a zeroed condition.
        td: additional fall of time at each step (asymmetric time intervals), in steps.
        clip: range of the data, `(-b_scale, b_scale)` for images; None to leave predictions unclipped.
        cond: the condition `(b, e)` or `(b, s, e)`, or classes `(b,)` for a denoiser that takes them.
        self_cond: pass the latents of each step to the next one (latent self-conditioning); none at the first.
        momentum: weight of older latents in those passed on: `momentum * before + (1 - momentum) * new`.
        noise: noise of step k: `noise(k)`, or `noise[k]`; None draws from torch's default generator.
        normalize_input: divide the network's input by its standard deviation, see `normalize`.
        on_step: called as `on_step(k, x0)` with the prediction of every step.
        process: maps gamma to (alpha, sigma).

    Raises:
        InputError: no steps, an unknown schedule, sampler or prediction, guidance without a condition, another number
            of conditions than of samples, too little noise, or a `td` or `momentum` out of range.
    """
    check_guidance(guidance)
    step = sampler_of(sampler)
    _check_sampling(init, prediction, cond, momentum)
    # Gamma is almost 0 at t = 1 and its rounding error is amplified, which half precision does not allow.
    wide = torch.promote_types(init.dtype, torch.float32)
    x, latents_prev = init, None
    for k, pair in enumerate(times(steps, td)):
        now, after = gamma(schedule, torch.tensor(pair, dtype=wide)).to(init.device).unsqueeze(1).expand(2, len(init))
        seen = normalize(x) if normalize_input else x
        output, latents = guided(denoise, seen, now, cond, latents_prev, guidance)
        x0, eps = predict(prediction, x, output, now, clip, truncate=True, process=process)
        draw = _draw_of(noise, k, steps, x)
        x = step(x, x0, eps, scales_at(now, x, process), scales_at(after, x, process), draw).to(init.dtype)
        x0 = x0.to(init.dtype)
        if self_cond:
            older = 0 if latents_prev is None else momentum * latents_prev
            latents_prev = older + (1 - momentum) * latents
        if on_step is not None:
            on_step(k, x0)
    return x0


def _draw_of(noise: Noise, k: int, steps: int, x: Tensor) -> Draw:
    """The function that returns the noise of step k, of the shape of `x`."""

    def draw() -> Tensor:
        if noise is None:
            return torch.randn_like(x)
        if not callable(noise) and len(noise) < steps:
            raise InputError(f"there is noise for {len(noise)} of {steps} steps; give one for each")
        drawn = (noise(k) if callable(noise) else noise[k]).to(x)
        if drawn.shape != x.shape:
            raise InputError(
                f"noise of step {k} is {tuple(drawn.shape)}, samples are {tuple(x.shape)}; make them equal"
            )
        return drawn

    return draw


def _check_sampling(init: Tensor, prediction: str, cond: Tensor | None, momentum: float) -> None:
    lookup("prediction", prediction, PREDICTIONS)
    check_examples(init=init)
    conditions = None if cond is None else len(cond) if cond.ndim else 0
    if conditions not in (None, len(init)):
        raise InputError(f"cond has {conditions} conditions for {len(init)} samples; give one for each")
    if not 0 <= momentum < 1:
        raise InputError(f"momentum is {momentum}; it must be at least 0 and below 1")
