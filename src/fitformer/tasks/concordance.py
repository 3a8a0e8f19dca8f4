"""The concordance index, and the partial likelihood of Cox's model of survival."""

import torch
from torch import Tensor

# Pairs that are compared at once.
_PAIRS = 2**24


def concordance_index(risk: Tensor, time: Tensor, event: Tensor) -> float:
    """Harrell's C: the share of comparable pairs in which the one with the event first has the higher risk.

    A pair is comparable if it is known whose event came first: one has its event at a time at which the other is still
    observed, or was observed last. Equal risks count one half; NaN if no pair is comparable.

    Args:
        risk, time: `(n,)`. event: `(n,)`, whether the event happened at that time.
    """
    happened = event > 0
    first = happened.nonzero()[:, 0]
    right, pairs = 0.0, 0
    for some in first.split(max(1, _PAIRS // max(len(time), 1))):
        own = time[some, None]
        later = (time > own) | ((time == own) & ~happened)
        higher, equal = risk[some, None] > risk, risk[some, None] == risk
        right += float((higher & later).sum()) + float((equal & later).sum()) / 2
        pairs += int(later.sum())
    return right / pairs if pairs else float("nan")


def cox_loss(log_hazard: Tensor, time: Tensor, event: Tensor) -> Tensor:
    """Negative logarithm of Cox's partial likelihood, a mean over events; equal times as Breslow has them.

    Of examples without an event it is 0, with a gradient of 0.

    Args:
        log_hazard: `(b,)`, of each example relative to the others. time: `(b,)`. event: `(b,)`, 0 or 1.
    """
    order = time.argsort(descending=True)
    hazard, time, event = log_hazard[order], time[order].contiguous(), event[order]
    sums = hazard.logcumsumexp(0)
    # All that are observed at an event's time are at risk: up to the last of equal times.
    at_risk = sums[torch.searchsorted(-time, -time, right=True) - 1]
    return ((at_risk - hazard) * event).sum() / event.sum().clamp(min=1)
