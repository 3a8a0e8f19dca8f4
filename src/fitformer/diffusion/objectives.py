"""Training objectives: the loss, input normalisation, dropped conditions, latent self-conditioning.

Sources: normalised input, arXiv 2301.10972; latent self-conditioning, arXiv 2212.11972 (RIN); dropped conditions,
arXiv 2207.12598. Tensors are `(b, ...)` with any further axes; noise levels are `(b,)`.
"""

import torch
from torch import Tensor

from fitformer._support.checks import checked
from fitformer.diffusion.process import (
    TINY,
    VARIANCE_PRESERVING,
    Clip,
    Denoise,
    Process,
    as_column,
    check_examples,
    check_fraction,
    predict,
    target,
    without_condition,
)
from fitformer.errors import InputError


@checked
def normalize(x: Tensor) -> Tensor:
    """A noisy input `(b, ...)` over each example's population standard deviation (arXiv 2301.10972, section 2.2).

    Raises:
        InputError: no axis besides that of the examples.
    """
    if x.ndim < 2:
        raise InputError(f"x is {tuple(x.shape)}; a noisy input is (b, ...)")
    deviation = x.float().flatten(1).std(dim=1, correction=0)
    return x / as_column(deviation.clamp_min(TINY), x)


@checked
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
    process: Process = VARIANCE_PRESERVING,
) -> Tensor:
    """Mean squared error, a scalar, of a network of prediction `kind`, measured on `eps`, `x` or `v` (None: on `kind`).

    Data are measured in units of `b_scale`: the true and the predicted `x0` are both divided by it.
    `predict` without truncation translates the output, so that any `kind` can be measured on any target.

    Raises:
        InputError: `kind` or `on` is not in `PREDICTIONS`; `output` has another shape than `xt`.
    """
    on = kind if on is None else on
    found = target(on, *predict(kind, xt, output, gamma, clip, process=process), gamma, process)
    error = found - target(on, x0, eps, gamma, process)
    return (error / b_scale if on == "x" else error).square().mean()


@checked
def drop_condition(cond: Tensor, probability: float, generator: torch.Generator | None = None) -> Tensor:
    """`cond` `(b, ...)` with the condition of each example zeroed with `probability`, as guidance needs.

    Classes by number `(b,)` become -1, which is none.

    Raises:
        InputError: `probability` is outside [0, 1].
    """
    check_fraction("the probability of dropping a condition", probability)
    check_examples(cond=cond)
    kept = torch.rand(len(cond), generator=generator, device=cond.device) >= probability
    return torch.where(as_column(kept, cond), cond, without_condition(cond))


@checked
def self_condition_half(
    denoise: Denoise,
    x: Tensor,
    gamma: Tensor,
    cond: Tensor | None = None,
    rate: float = 0.5,
    generator: torch.Generator | None = None,
) -> Tensor | None:
    """Latents for training with self-conditioning (RIN): the first `rate * b` examples get their own.

    Only these make the first pass, without gradients; the others get zeros. A fraction of an example is drawn: of 5
    examples at rate 0.5, 2 or 3 are chosen with equal probability. None if no example is chosen.

    Raises:
        InputError: `rate` is outside [0, 1], or numbers of examples differ.
    """
    check_fraction("the rate of self-conditioning", rate)
    check_examples(x=x, gamma=gamma, cond=cond)
    first = _whole(len(x) * rate, generator)
    if first == 0:
        return None
    latents = _first_pass(denoise, x[:first], gamma[:first], None if cond is None else cond[:first])
    return torch.cat([latents, latents.new_zeros(len(x) - first, *latents.shape[1:])])


def _whole(count: float, generator: torch.Generator | None) -> int:
    """A whole number whose mean is `count`; whole counts, up to rounding, draw no random number."""
    nearest = round(count)
    if abs(count - nearest) < 1e-6:
        return nearest
    device = "cpu" if generator is None else generator.device
    drawn = torch.rand((), generator=generator, device=device).item()
    return int(count) + (drawn < count % 1)


@checked
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
        InputError: `rate` is outside [0, 1], or numbers of examples differ.
    """
    check_fraction("the rate of self-conditioning", rate)
    check_examples(x=x, gamma=gamma, cond=cond)
    latents = _first_pass(denoise, x, gamma, cond)
    kept = torch.rand(len(x), generator=generator, device=x.device) < rate
    return latents * as_column(kept.to(latents.dtype), latents)


def _first_pass(denoise: Denoise, x: Tensor, gamma: Tensor, cond: Tensor | None) -> Tensor:
    with torch.no_grad():
        latents = denoise(x, gamma, cond, None)[1]
    # Autocast caches weights that are cast here without gradients, and would reuse them in the pass with gradients.
    torch.clear_autocast_cache()
    return latents.detach()
