"""The diffusion process: signal and noise scales (alpha, sigma), noising, and what a network's output means.

A process maps a noise level to the scales of `x_t = alpha x0 + sigma eps`. Every prediction kind is an entry of
`PREDICTIONS`: linear maps whose coefficients are functions of (alpha, sigma). No other formula knows the process.

Tensors are `(b, ...)` with any further axes; noise levels are `(b,)`, or of a shape that broadcasts.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from fitformer._support.checks import check_fields, checked, number, rate, whole
from fitformer.errors import InputError

Clip = tuple[float, float] | None
"""Range `(low, high)` of the data; None where predictions are not clipped."""

Denoise = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], tuple[Tensor, Any]]
"""`denoise(x (b, ...), level (b,), cond, latents_prev) -> (output (b, ...), latents)`, as `FITDenoiser.forward` is."""

Scale = Tensor | float

# Smallest divisor. Float32 scales fall below it only where gamma is exactly 0 or 1, where the formulas are 0 / 0.
TINY = 1e-5


class Level(NamedTuple):
    """Scales of signal and noise, each of a shape that broadcasts with the data."""

    alpha: Tensor
    sigma: Tensor


@runtime_checkable
class Process(Protocol):
    """A diffusion process `x_t = alpha x0 + sigma eps`."""

    def scales(self, level: Tensor) -> Level:
        """(alpha, sigma) at a noise level, each of the shape of `level`."""


@dataclass(frozen=True)
class VariancePreserving:
    """`x_t = sqrt(gamma) x0 + sqrt(1 - gamma) eps`; the noise level is gamma (arXiv 2301.10972, section 2)."""

    def scales(self, level: Tensor) -> Level:
        """`(sqrt(gamma), sqrt(1 - gamma))`."""
        return Level(level.sqrt(), (1 - level).sqrt())


VARIANCE_PRESERVING: Process = VariancePreserving()


@dataclass(frozen=True)
class Prediction:
    """A prediction kind as linear maps whose coefficients depend on (alpha, sigma).

    Attributes:
        output: `(p, q)` with `output = p x0 + q eps`.
        data: `(p, q, divisor)` with `x0 = (p x_t + q output) / divisor`.
        noise: the same for eps; None where eps is always `(x_t - alpha x0) / sigma`.
    """

    output: Callable[[Tensor, Tensor], tuple[Scale, Scale]]
    data: Callable[[Tensor, Tensor], tuple[Scale, Scale, Scale]]
    noise: Callable[[Tensor, Tensor], tuple[Scale, Scale, Scale]] | None = None


PREDICTIONS: dict[str, Prediction] = {
    "eps": Prediction(
        output=lambda alpha, sigma: (0, 1),
        data=lambda alpha, sigma: (1, -sigma, alpha),
        noise=lambda alpha, sigma: (0, 1, 1),
    ),
    "x": Prediction(
        output=lambda alpha, sigma: (1, 0),
        data=lambda alpha, sigma: (0, 1, 1),
    ),
    # arXiv 2202.00512, section 4, for scales of any norm.
    "v": Prediction(
        output=lambda alpha, sigma: (-sigma, alpha),
        data=lambda alpha, sigma: (alpha, -sigma, alpha.square() + sigma.square()),
        noise=lambda alpha, sigma: (sigma, alpha, alpha.square() + sigma.square()),
    ),
}
"""All prediction kinds by name; a new kind is one entry."""


MOST_GUIDANCE, MOST_STEPS = 100.0, 100_000


def check_guidance(guidance: float) -> None:
    """Refuse a strength of guidance that means nothing.

    Raises:
        InputError: NaN, infinite, negative, or above 100.
    """
    if not 0 <= guidance <= MOST_GUIDANCE:
        raise InputError(f"guidance is {guidance}; it must lie between 0 (none) and {MOST_GUIDANCE:g}")


@dataclass(frozen=True)
class DiffusionConfig:
    """Options of a denoiser that training fixed and sampling needs.

    Attributes:
        prediction: meaning of the network's output, a name in `PREDICTIONS`.
        train_schedule: gamma(t) of training. sample_schedule: gamma(t) of sampling. See `fitformer.diffusion.gamma`.
        b_scale: images are scaled to [-b_scale, b_scale]. normalize_input: see `fitformer.diffusion.normalize`.
        condition_dropout: share of training examples without their condition; above 0 allows guidance.
        sampler, sample_steps, guidance: defaults of sampling.

    Raises:
        InputError: a value out of range, or an unknown prediction.
    """

    prediction: str = "eps"
    train_schedule: str = "sigmoid@-3,3,0.9"
    sample_schedule: str = "cosine"
    b_scale: float = 1.0
    normalize_input: bool = False
    condition_dropout: float = 0.0
    sampler: str = "ddim"
    sample_steps: int = 100
    guidance: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        lookup("prediction", self.prediction, PREDICTIONS)
        rate("condition_dropout", self.condition_dropout)
        check_guidance(self.guidance)
        number("b_scale", self.b_scale)
        whole("sample_steps", self.sample_steps, 1, MOST_STEPS)


def scales_at(level: Tensor, x: Tensor, process: Process = VARIANCE_PRESERVING) -> Level:
    """(alpha, sigma) of noise levels `(b,)` as `(b, 1, ...)`, to multiply `x (b, ...)`."""
    return process.scales(as_column(level, x))


def mix(level: Level, x0: Tensor, eps: Tensor) -> Tensor:
    """`alpha x0 + sigma eps`."""
    return level.alpha * x0 + level.sigma * eps


@checked
def add_noise(x0: Tensor, gamma: Tensor, noise: Tensor, process: Process = VARIANCE_PRESERVING) -> Tensor:
    """`x_t = alpha x0 + sigma noise`; `x0` and `noise` `(b, ...)`, noise level `gamma` `(b,)`.

    Raises:
        InputError: shapes differ.
    """
    check_alike(gamma, x0=x0, noise=noise)
    return mix(scales_at(gamma, x0, process), x0, noise)


@checked
def target(kind: str, x0: Tensor, eps: Tensor, gamma: Tensor, process: Process = VARIANCE_PRESERVING) -> Tensor:
    """The output of a perfect network of prediction `kind`: `eps`, `x0`, or `v = alpha eps - sigma x0`.

    Raises:
        InputError: `kind` is not in `PREDICTIONS`, or shapes differ.
    """
    check_alike(gamma, x0=x0, eps=eps)
    of_data, of_noise = lookup("prediction", kind, PREDICTIONS).output(*scales_at(gamma, x0, process))
    return of_data * x0 + of_noise * eps


@checked
def predict(
    kind: str,
    xt: Tensor,
    output: Tensor,
    gamma: Tensor,
    clip: Clip = (-1.0, 1.0),
    truncate: bool = False,
    process: Process = VARIANCE_PRESERVING,
) -> tuple[Tensor, Tensor]:
    """Data and noise `(x0, eps)` from the network's `output` for `xt`; all `(b, ...)`, noise level `gamma` `(b,)`.

    `x0` is clipped to the range `clip`. With `truncate` (used in sampling) `eps` is computed from the clipped `x0`, so
    that both still add up to `xt`. With `kind="x"` it always is.

    Raises:
        InputError: `kind` is not in `PREDICTIONS`; `output` has another shape than `xt`, or gammas do not fit it.
    """
    prediction = lookup("prediction", kind, PREDICTIONS)
    if output.shape != xt.shape:
        raise InputError(
            f"the denoiser's output is {tuple(output.shape)} for an xt of {tuple(xt.shape)}; set its out_dim to match"
        )
    check_alike(gamma, xt=xt)
    level = scales_at(gamma, xt, process)
    x0 = _combine(prediction.data(*level), xt, output)
    x0 = x0 if clip is None else x0.clamp(*clip)
    if truncate or prediction.noise is None:
        return x0, (xt - level.alpha * x0) / level.sigma.clamp_min(TINY)
    return x0, _combine(prediction.noise(*level), xt, output)


def _combine(coefficients: tuple[Scale, Scale, Scale], xt: Tensor, output: Tensor) -> Tensor:
    of_input, of_output, divisor = coefficients
    total = of_input * xt + of_output * output
    return total / (divisor.clamp_min(TINY) if isinstance(divisor, Tensor) else divisor)


Entry = TypeVar("Entry")


def lookup(what: str, name: str, table: Mapping[str, Entry]) -> Entry:
    """The entry of a table.

    Raises:
        InputError: no such entry; lists all names.
    """
    if name not in table:
        raise InputError(f"no {what} {name!r}; choose one of {', '.join(table)}")
    return table[name]


def without_condition(cond: Tensor) -> Tensor:
    """What no condition is, in place of `cond`: zeros, or -1 for classes by number `(b,)`."""
    classes = cond.ndim == 1 and not cond.is_floating_point()
    return torch.full_like(cond, -1) if classes else torch.zeros_like(cond)


def check_fraction(what: str, value: float) -> None:
    """Check that a value lies in [0, 1].

    Raises:
        InputError: it does not.
    """
    if not 0 <= value <= 1:
        raise InputError(f"{what} is {value}; it must lie in [0, 1]")


def check_examples(**tensors: Tensor | None) -> None:
    """Check that tensors are `(b, ...)` with the same number b of examples; None is no tensor.

    Raises:
        InputError: names one that is not, with its shape.
    """
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    (first, like), *_ = given.items()
    for name, tensor in given.items():
        if tensor.ndim == 0 or tensor.shape[0] != like.shape[0]:
            raise InputError(f"{name} is {tuple(tensor.shape)}; it needs a row for each example of {first}")


def check_alike(level: Tensor, level_name: str = "gamma", **tensors: Tensor) -> None:
    """Check that tensors have one shape `(b, ...)`, and that noise levels are `(b,)` or broadcast to it.

    Raises:
        InputError: names those that differ, with their shapes.
    """
    (first, like), *rest = tensors.items()
    for name, tensor in rest:
        if tensor.shape != like.shape:
            raise InputError(f"{name} is {tuple(tensor.shape)} and {first} {tuple(like.shape)}; make them equal")
    check_examples(**{first: like})
    fits = zip(reversed(level.shape), reversed(like.shape))
    wrong = len(level) != len(like) if level.ndim == 1 else any(a not in (1, b) for a, b in fits)
    if wrong and not (level.ndim == 1 and len(level) == 1):
        raise InputError(
            f"{level_name} is {tuple(level.shape)}; {first} {tuple(like.shape)} needs one for each example"
        )


def as_column(per_example: Tensor, x: Tensor) -> Tensor:
    """`(b,)` as `(b, 1, ...)`, to broadcast with `x (b, ...)`; other shapes are returned as they are."""
    if per_example.ndim != 1:
        return per_example
    return per_example.reshape(-1, *[1] * (x.ndim - 1))
