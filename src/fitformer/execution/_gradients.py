"""Arithmetic on gradients, any of which may be absent."""

from collections.abc import Sequence

import torch
from torch import Tensor


def plus(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The sum of two gradients, either of which may be absent."""
    return other if one is None else one if other is None else one + other


def put_slice(whole: Tensor | None, groups: slice, part: Tensor | None, like: Tensor) -> Tensor | None:
    """Put the part of a slice of groups in its place; what no slice has a part of stays None."""
    if part is None:
        return whole
    whole = torch.zeros_like(like) if whole is None else whole
    whole[:, groups] = part
    return whole


def gradients_of(outputs: Sequence[tuple[Tensor, Tensor | None]], inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients of the inputs from those of the outputs; None where nothing leads from one to the other."""
    reached = [(out, g.to(out.dtype)) for out, g in outputs if g is not None and out.requires_grad]
    if not reached:
        return [None] * len(inputs)
    ends, gradients = zip(*reached, strict=True)
    return list(torch.autograd.grad(ends, inputs, gradients, allow_unused=True))
