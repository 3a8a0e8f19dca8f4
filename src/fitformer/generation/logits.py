"""Which token comes next: logits filtered by temperature, top-k and top-p, and a draw from them."""

import math

import torch
from torch import Tensor

from fitformer._support.checks import checked
from fitformer.errors import InputError


@checked
def filter_logits(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """Logits `(..., vocab)` in float32, with -inf for tokens that must not be drawn.

    Args:
        logits: of any floating dtype.
        temperature: divides the logits; 0 keeps the likeliest token alone (the first of equals).
        top_k: keep the k likeliest tokens.
        top_p: of those, keep the likeliest until their probabilities add up to p (Holtzman et al., arXiv 1904.09751).
        min_p: of those, keep the ones at least `min_p` times as likely as the likeliest (Nguyen et al., arXiv
            2407.01082).

    Raises:
        InputError: a temperature below 0, a `top_k` below 1, a `top_p` outside (0, 1], a `min_p` outside [0, 1], logits
            of no tokens.
    """
    check_filters(temperature, top_k, top_p, min_p)
    if not logits.ndim or not logits.shape[-1]:
        raise InputError(f"logits are {tuple(logits.shape)}; they have an axis (..., vocab) of at least 1")
    top_p = None if top_p == 1 else top_p
    if temperature == 0:
        top_k, temperature = 1, 1.0
    logits = logits.float()
    # The largest is subtracted first, so that a tiny temperature cannot overflow.
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if min_p:
        # The likeliest has logit 0 now.
        logits = logits.masked_fill(logits < math.log(min_p), -math.inf)
    if top_k is None and top_p is None:
        return logits
    ranked, order = logits.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        ranked[..., top_k:] = -math.inf
    if top_p is not None:
        probability = ranked.softmax(-1)
        ranked = ranked.masked_fill(probability.cumsum(-1) - probability >= top_p, -math.inf)
    return torch.full_like(logits, -math.inf).scatter(-1, order, ranked)


@checked
def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits `(b, vocab)` in which tokens that a row has `seen`, booleans `(b, vocab)`, are less likely.

    Positive logits are divided by the penalty and negative ones multiplied (Keskar et al., arXiv 1909.05858, section
    4.1, with the sign as transformers has it).

    Raises:
        InputError: shapes that differ.
    """
    if logits.shape != seen.shape:
        raise InputError(f"logits are {tuple(logits.shape)} and seen {tuple(seen.shape)}; both are (b, vocab)")
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


@checked
def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens, int64 `(b,)`, with probabilities `softmax(logits (b, vocab))`, from `uniforms` `(b,)` in [0, 1).

    The token is where the cumulative distribution passes the uniform number; one of probability 0 is never drawn.

    Raises:
        InputError: logits that are not numbers, or all -inf; shapes that do not go together.
    """
    if logits.ndim != 2 or uniforms.shape != logits.shape[:1]:
        raise InputError(
            f"logits are {tuple(logits.shape)} and uniforms {tuple(uniforms.shape)}; they are (b, vocab) and (b,)"
        )
    cumulative = logits.double().softmax(-1).cumsum(-1)
    total = cumulative[:, -1:]
    _check_finite(total)
    # Just under 1, so that rounding cannot carry the product up to the total, past the last token that is possible.
    passed = uniforms.to(total).clamp_max(1 - 2**-40).unsqueeze(1) * total
    return torch.searchsorted(cumulative, passed, right=True).squeeze(1)


@checked
def likeliest(logits: Tensor) -> Tensor:
    """The likeliest token of each row, int64 `(b,)`, the first of equals, of logits `(b, vocab)`.

    Raises:
        InputError: logits that are not numbers, or all -inf.
    """
    if logits.ndim != 2 or not logits.shape[1]:
        raise InputError(f"logits are {tuple(logits.shape)}; they are (b, vocab), with at least 1 token")
    largest, tokens = logits.max(-1)
    _check_finite(largest)
    return tokens


def _check_finite(numbers: Tensor) -> None:
    if not bool(numbers.isfinite().all()):
        raise InputError("the decoder's logits are not finite numbers; its weights or its precision are broken")


@checked
def check_filters(temperature: float, top_k: int | None, top_p: float | None, min_p: float | None = None) -> None:
    """Refuse filters that leave no token.

    Raises:
        InputError: a temperature below 0, a `top_k` below 1, a `top_p` outside (0, 1], a `min_p` outside [0, 1].
    """
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise InputError(f"the temperature is {temperature}; it must be 0 (the likeliest token) or above")
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k is {top_k}; at least 1 token must be kept (None keeps all)")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p is {top_p}; it must be above 0 and at most 1 (None keeps all)")
    if min_p is not None and not 0 <= min_p <= 1:
        raise InputError(f"min_p is {min_p}; it must be at least 0 and at most 1 (None keeps all)")
