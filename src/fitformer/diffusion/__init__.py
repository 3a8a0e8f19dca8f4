"""Continuous-time diffusion as free functions on tensors: schedules, predictions, transitions, the sampling loop.

Sources: schedules, `b_scale` and normalised inputs, arXiv 2301.10972; latent self-conditioning, arXiv 2212.11972 (RIN);
`ddpm`, arXiv 2006.11239; `ddim`, arXiv 2010.02502; `v`, arXiv 2202.00512; guidance, arXiv 2207.12598; `td`, asymmetric
time intervals, arXiv 2208.04202.

Time `t` runs in [0, 1]; `gamma(t)` falls from 1 (data) to 0 (noise), and `x_t = sqrt(gamma) x0 + sqrt(1 - gamma) eps`.
The denoiser is told gamma, not t. Every tensor is `(b, ...)` with any further axes; gammas are `(b,)`, or broadcast as
they are.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fitformer._support.rng import seeded_noise as seeded_noise
from fitformer.diffusion.schedules import SCHEDULES as SCHEDULES
from fitformer.diffusion.schedules import gamma as gamma
from fitformer.errors import InputError

Denoise = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], tuple[Tensor, Any]]
"""`denoise(x (b, ...), gamma (b,), cond, latents_prev) -> (output (b, ...), latents)`, as `FITDenoiser.forward` is."""

Clip = tuple[float, float] | None
Noise = Callable[[int], Tensor] | Sequence[Tensor] | Tensor | None

PREDICTIONS = ("eps", "x", "v")
SAMPLERS = ("ddim", "ddpm", "ddpm@large", "ddpm@small")

# A divisor that float32 arithmetic reaches only where gamma is exactly 0 or 1, where the formulas would say 0/0.
_TINY = 1e-5


# ---- pixels ---------------------------------------------------------------------------------------------------------


def pixels_to_signal(images: Tensor, b_scale: float = 1.0) -> Tensor:
    """Pixels 0..255, any shape, as floats in `[-1, 1] * b_scale` (arXiv 2301.10972, section 2.2)."""
    return (images.float() / 127.5 - 1.0) * b_scale


def signal_to_pixels(signal: Tensor, b_scale: float = 1.0) -> Tensor:
    """The uint8 pixels nearest to a signal in `[-1, 1] * b_scale`; what lies outside is clipped."""
    return ((signal.float() / b_scale + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def normalize(x: Tensor) -> Tensor:
    """A noisy input `(b, ...)` over each example's population standard deviation (arXiv 2301.10972, section 2.2)."""
    deviation = x.float().flatten(1).std(dim=1, correction=0)
    return x / _as_column(deviation.clamp_min(_TINY), x)


# ---- noising, predictions, loss -------------------------------------------------------------------------------------


def add_noise(x0: Tensor, gamma: Tensor, noise: Tensor) -> Tensor:
    """`x_t = sqrt(gamma) x0 + sqrt(1 - gamma) eps`; `x0` and `noise` `(b, ...)`, `gamma` `(b,)`."""
    g = _as_column(gamma, x0)
    return g.sqrt() * x0 + (1 - g).sqrt() * noise


def target(kind: str, x0: Tensor, eps: Tensor, gamma: Tensor) -> Tensor:
    """What a network of prediction `kind` should put out: `eps`, `x0`, or `v = sqrt(gamma) eps - sqrt(1 - gamma) x0`.

    Raises:
        InputError: `kind` is none of `PREDICTIONS`.
    """
    _check_choice("prediction", kind, PREDICTIONS)
    if kind == "v":
        g = _as_column(gamma, x0)
        return g.sqrt() * eps - (1 - g).sqrt() * x0
    return eps if kind == "eps" else x0


def predict(
    kind: str, xt: Tensor, output: Tensor, gamma: Tensor, clip: Clip = (-1.0, 1.0), truncate: bool = False
) -> tuple[Tensor, Tensor]:
    """The data and the noise `(x0, eps)` that a network's `output` for `xt` means; all `(b, ...)`, `gamma` `(b,)`.

    `x0` is clipped to the range `clip`; with `truncate` (as in sampling) `eps` is computed again from the clipped `x0`,
    so that the two still add up to `xt`. With `kind="x"` it always is, there being no other.

    Raises:
        InputError: `kind` is none of `PREDICTIONS`; `output` has another shape than `xt`.
    """
    _check_choice("prediction", kind, PREDICTIONS)
    if output.shape != xt.shape:
        raise InputError(
            f"the denoiser gave {tuple(output.shape)} for an input of {tuple(xt.shape)}; its out_dim must match"
        )
    g = _as_column(gamma, xt)
    signal, spread = g.sqrt(), (1 - g).sqrt()
    if kind == "eps":
        x0, eps = (xt - spread * output) / signal.clamp_min(_TINY), output
    elif kind == "x":
        x0, eps = output, None
    else:
        x0, eps = signal * xt - spread * output, spread * xt + signal * output
    x0 = x0 if clip is None else x0.clamp(*clip)
    if eps is None or truncate:
        eps = (xt - signal * x0) / spread.clamp_min(_TINY)
    return x0, eps


def loss(
    kind: str,
    output: Tensor,
    xt: Tensor,
    x0: Tensor,
    eps: Tensor,
    gamma: Tensor,
    on: str | None = None,
    b_scale: float = 1.0,
    clip: Clip = None,
) -> Tensor:
    """Mean squared error, a scalar, of a network of prediction `kind`, measured on `eps`, `x` or `v` (None: on `kind`).

    Data are measured in units of `b_scale`: both the true and the predicted `x0` are divided by it.
    The output is translated by `predict` without truncation, so any `kind` may be measured on any target.

    Raises:
        InputError: `kind` or `on` is none of `PREDICTIONS`; `output` has another shape than `xt`.
    """
    on = kind if on is None else on
    guess = target(on, *predict(kind, xt, output, gamma, clip), gamma)
    error = guess - target(on, x0, eps, gamma)
    return (error / b_scale if on == "x" else error).square().mean()


# ---- training -------------------------------------------------------------------------------------------------------


def drop_condition(cond: Tensor, probability: float, generator: torch.Generator | None = None) -> Tensor:
    """`cond` `(b, ...)` with whole examples' conditions zeroed with `probability`: what guidance needs to be learned.

    Raises:
        InputError: `probability` is outside [0, 1].
    """
    _check_fraction("the probability of dropping a condition", probability)
    kept = torch.rand(len(cond), generator=generator, device=cond.device) >= probability
    return cond * _as_column(kept.to(cond.dtype), cond)


def self_condition_half(
    denoise: Denoise, x: Tensor, gamma: Tensor, cond: Tensor | None = None, rate: float = 0.5
) -> Tensor | None:
    """Latents for training with self-conditioning (RIN): the first `floor(rate * b)` examples get their own.

    Those alone make the first pass, without gradients; the rest get zeros. None if no example makes it.

    Raises:
        InputError: `rate` is outside [0, 1].
    """
    _check_fraction("the rate of self-conditioning", rate)
    first = int(len(x) * rate)
    if first == 0:
        return None
    latents = _first_pass(denoise, x[:first], gamma[:first], None if cond is None else cond[:first])
    return torch.cat([latents, latents.new_zeros(len(x) - first, *latents.shape[1:])])


def self_condition_masked(
    denoise: Denoise,
    x: Tensor,
    gamma: Tensor,
    cond: Tensor | None = None,
    rate: float = 0.9,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Latents for training with self-conditioning by masking: all examples make the first pass, each is kept at `rate`.

    Raises:
        InputError: `rate` is outside [0, 1].
    """
    _check_fraction("the rate of self-conditioning", rate)
    latents = _first_pass(denoise, x, gamma, cond)
    kept = torch.rand(len(x), generator=generator, device=x.device) < rate
    return latents * _as_column(kept.to(latents.dtype), latents)


def _first_pass(denoise: Denoise, x: Tensor, gamma: Tensor, cond: Tensor | None) -> Tensor:
    with torch.no_grad():
        latents = denoise(x, gamma, cond, None)[1]
    # Autocast may remember weights cast here without gradients, and hand them to the pass that needs gradients.
    torch.clear_autocast_cache()
    return latents.detach()


# ---- sampling -------------------------------------------------------------------------------------------------------


def times(steps: int, td: float = 0.0) -> list[tuple[float, float]]:
    """The pairs `(t, t_next)` of a sampling run: `1 - k/K` and `max(1 - (k + 1 + td)/K, 0)` for k = 0..K-1.

    Raises:
        InputError: there is not at least one step; `td` is -1 or less, so that time would not fall.
    """
    if steps < 1:
        raise InputError(f"cannot sample in {steps} steps; at least 1 is needed")
    if not (math.isfinite(td) and td > -1):
        raise InputError(f"td is {td}, and time would not fall from step to step; it must be above -1 (0 is usual)")
    return [(1 - k / steps, min(max(1 - (k + 1 + td) / steps, 0.0), 1.0)) for k in range(steps)]


def transition(
    sampler: str, xt: Tensor, x0: Tensor, eps: Tensor, gamma: Tensor, gamma_next: Tensor, noise: Tensor | None = None
) -> Tensor:
    """From `xt` at noise level `gamma` to a lower one, `gamma_next`; tensors `(b, ...)`, gammas `(b,)`.

    `ddim` needs no noise. `ddpm` adds `noise` of variance `1 - alpha` (`@large`, the default) or of the posterior's
    `(1 - gamma_next) / (1 - gamma) * (1 - alpha)` (`@small`), `alpha = gamma / gamma_next`.

    Raises:
        InputError: `sampler` is none of `SAMPLERS`; a `ddpm` one has no noise.
    """
    _check_choice("sampler", sampler, SAMPLERS)
    g, g_next = _as_column(gamma, xt), _as_column(gamma_next, xt)
    if sampler == "ddim":
        return g_next.sqrt() * x0 + (1 - g_next).sqrt() * eps
    if noise is None:
        raise InputError(f"sampler {sampler!r} adds noise at every step, and none was given")
    alpha = (g / g_next.clamp_min(_TINY**2)).clamp(0, 1)
    spread = (1 - g).sqrt().clamp_min(_TINY)
    mean = (xt - (1 - alpha) / spread * eps) / alpha.sqrt().clamp_min(_TINY)
    variance = (1 - g_next) / spread.square() * (1 - alpha) if sampler == "ddpm@small" else 1 - alpha
    return mean + variance.sqrt() * noise


def guided(
    denoise: Denoise, x: Tensor, gamma: Tensor, cond: Tensor | None, latents_prev: Tensor | None, guidance: float
) -> tuple[Tensor, Any]:
    """Classifier-free guidance of strength w: `(1 + w) output(cond) - w output(0)`, and the conditional call's latents.

    Raises:
        InputError: there is guidance but no condition.
    """
    if guidance and cond is None:
        raise InputError(f"guidance {guidance:g} needs a condition, and none was given; give cond, or guidance 0")
    output, latents = denoise(x, gamma, cond, latents_prev)
    if cond is None or guidance == 0:
        return output, latents
    free, _ = denoise(x, gamma, torch.zeros_like(cond), latents_prev)
    return (1 + guidance) * output - guidance * free, latents


@torch.no_grad()
def sample(
    denoise: Denoise,
    init: Tensor,
    steps: int,
    *,
    schedule: str = "cosine",
    sampler: str = "ddim",
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
) -> Tensor:
    """Samples `(b, ...)` from Gaussian noise `init` `(b, ...)`: the last of `steps` predictions of the data.

    Args:
        denoise: the network, `denoise(x, gamma (b,), cond, latents_prev) -> (output, latents)`.
        init: where to start, for instance `seeded_noise(seed, range(b), shape)`; its device and dtype are kept.
        steps: K, the number of calls of the network (twice that with guidance).
        schedule: see `gamma`; it need not be the one of training.
        sampler: `ddim`, `ddpm` (the same as `ddpm@large`) or `ddpm@small`, see `transition`.
        prediction: what the network puts out, `eps`, `x` or `v`.
        guidance: strength of classifier-free guidance, 0 for none; the unconditional call gets a zeroed condition.
        td: how much further than one step time moves on at each step (asymmetric time intervals), in steps.
        clip: range of the data, `(-b_scale, b_scale)` for images; None to leave predictions as they are.
        cond: the condition `(b, e)` or `(b, s, e)`.
        self_cond: hand the latents of each step to the next one (latent self-conditioning); none at the first.
        momentum: how much of the latents handed on is older ones: `momentum * before + (1 - momentum) * new`.
        noise: what ddpm adds at step k: `noise(k)`, or `noise[k]`; None draws from torch's own generator.
        normalize_input: divide what the network sees by its deviation, see `normalize`.
        on_step: called as `on_step(k, x0)` with the prediction of every step.

    Raises:
        InputError: no steps, an unknown schedule, sampler or prediction, guidance without a condition, a condition for
            another number of examples, too little noise, or a `td` or `momentum` out of range.
    """
    _check_sampling(init, steps, sampler, prediction, cond, momentum, noise)
    # At t = 1 gamma is almost 0 and its rounding is magnified: half precision would not do; the reference has float32.
    wide = torch.promote_types(init.dtype, torch.float32)
    x, latents_prev = init, None
    for k, pair in enumerate(times(steps, td)):
        now, after = gamma(schedule, torch.tensor(pair, dtype=wide)).to(init.device).unsqueeze(1).expand(2, len(init))
        seen = normalize(x) if normalize_input else x
        output, latents = guided(denoise, seen, now, cond, latents_prev, guidance)
        x0, eps = predict(prediction, x, output, now, clip, truncate=True)
        x = transition(sampler, x, x0, eps, now, after, _noise_at(noise, k, x) if sampler != "ddim" else None)
        x, x0 = x.to(init.dtype), x0.to(init.dtype)
        if self_cond:
            older = 0 if latents_prev is None else momentum * latents_prev
            latents_prev = older + (1 - momentum) * latents
        if on_step is not None:
            on_step(k, x0)
    return x0


def _noise_at(noise: Noise, k: int, x: Tensor) -> Tensor:
    if noise is None:
        return torch.randn_like(x)
    drawn = (noise(k) if callable(noise) else noise[k]).to(x)
    if drawn.shape != x.shape:
        raise InputError(
            f"the noise of step {k} is {tuple(drawn.shape)}, the samples are {tuple(x.shape)}; they must agree"
        )
    return drawn


def _check_sampling(
    init: Tensor, steps: int, sampler: str, prediction: str, cond: Tensor | None, momentum: float, noise: Noise
) -> None:
    _check_choice("sampler", sampler, SAMPLERS)
    _check_choice("prediction", prediction, PREDICTIONS)
    if cond is not None and len(cond) != len(init):
        raise InputError(f"there are {len(cond)} conditions for {len(init)} samples; give one to each")
    if not 0 <= momentum < 1:
        raise InputError(f"the momentum of the latents is {momentum}; it must be at least 0 and below 1")
    if sampler != "ddim" and noise is not None and not callable(noise) and len(noise) < steps:
        raise InputError(f"there is noise for {len(noise)} steps, and {steps} are to be taken")


def _check_choice(what: str, given: str, known: Sequence[str]) -> None:
    if given not in known:
        raise InputError(f"there is no {what} {given!r}; write one of {', '.join(known)}")


def _check_fraction(what: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise InputError(f"{what} is {value}; it must lie in [0, 1]")


def _as_column(per_example: Tensor, x: Tensor) -> Tensor:
    """`(b,)` as `(b, 1, ...)`, to go with `x` `(b, ...)`; anything else broadcasts as it is."""
    if per_example.ndim != 1:
        return per_example
    return per_example.reshape(-1, *[1] * (x.ndim - 1))
