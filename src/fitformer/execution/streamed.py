"""Streaming: the group phase runs over slices of groups, whose pixels are read when it is their turn.

Kept are the data tokens between blocks (`kept.py`) and the latents; everything else is computed again in the backward
pass, slice by slice and global layer by global layer, under the same random state. There the gradients of the data
tokens take the place of the tokens. So memory holds one slice at a time, whatever the size of the input. Where there is
more memory, some of the results are remembered instead (`recompute.py`).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fitformer.errors import InputError
from fitformer.execution._streamed_pass import Pass
from fitformer.execution.base import ByWork, Work
from fitformer.execution.selective_checkpoint import Recompute
from fitformer.execution.token_store import Keep
from fitformer.models.trunk import Trunk

# Tokens of a slice where its size is not given: what a local layer makes of them stays in a processor's cache.
SLICE_TOKENS = 4096


@dataclass(frozen=True)
class Streamed(ByWork):
    """Run the trunk over slices of groups.

    Attributes:
        groups: of a slice, over all examples of the batch alike; by default so many that they hold 4,096 data tokens.
        keep: where the data tokens between blocks are kept: in the `memory` of the device that computes, on the `host`,
            or on `disk`.
        precision: in which they are kept, that of the computation by default; in `bf16` results are no longer exact.
        folder: for the scratch file; the system's folder for temporary files by default.
        recompute: what the backward pass computes again: everything (`full`); all but the dearest results of global
            layers (`local`), or of all layers (`selective`); or little more than pointwise functions (`light`). What it
            does not is remembered in the memory of the device that computes, a CPU or a CUDA one. Results are the same.
            Compiled layers run as if they were not, but under `full`.

    Raises:
        InputError: a slice of no groups, an unknown place, precision or recomputation.
    """

    groups: int | None = None
    keep: Keep = "memory"
    precision: Literal["bf16"] | None = None
    folder: str | Path | None = None
    recompute: Recompute = "full"

    def __post_init__(self) -> None:
        if self.groups is not None and self.groups < 1:
            raise InputError(f"a slice of {self.groups} groups; it needs at least 1")
        if self.keep not in get_args(Keep):
            raise InputError(f"keep is {self.keep!r}; known are {', '.join(get_args(Keep))}")
        if self.precision not in (None, "bf16"):
            raise InputError(f"precision is {self.precision!r}; data tokens are kept as they are (None) or in 'bf16'")
        if self.recompute not in get_args(Recompute):
            raise InputError(f"recompute is {self.recompute!r}; known are {', '.join(get_args(Recompute))}")

    def __call__(
        self, trunk: Trunk, x: Tensor, latents: Tensor, condition: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run the trunk on data tokens that are in memory, and put its tokens there; see `total` for others."""

        def read(groups: slice) -> tuple[Tensor, Tensor | None]:
            return x.detach()[:, groups], None if mask is None else mask[:, groups]

        work = Work(x.shape[1], latents, read, condition=condition)
        done = Pass(trunk, self, work, tokens=x.shape[2], whole=True)
        return _Stream.apply(done, x, latents, condition, *trunk.parameters())

    def total(self, role: Any, work: Work) -> tuple[Tensor | None, Tensor]:
        """The sum of scores over slices and the latents, as `fitformer.execution.total` has it."""
        done = Pass(role.trunk, self, work, role, tokens=role.tokens_per_group)
        # Each once: what is told of twice would get its gradient twice.
        parameters = {id(each): each for each in (*role.parameters(), *work.depends_on)}.values()
        return _Stream.apply(done, None, work.latents, work.condition, *parameters)

    def slices(self, work: Work, tokens_per_group: int) -> list[slice]:
        """The slices of groups, in their order."""
        size = self.groups or max(1, SLICE_TOKENS // (tokens_per_group * work.latents.shape[0]))
        return [slice(k, min(k + size, work.groups)) for k in range(0, work.groups, size)]


class _Stream(torch.autograd.Function):
    """A `Pass` as one node of autograd's graph; parameters are inputs, so that whatever hooks on to them is told."""

    @staticmethod
    def forward(ctx: Any, done: "Pass", x: Tensor | None, latents: Tensor, condition: Any, *parameters: Tensor) -> Any:
        # A result that no loss uses has no gradient, and neither have the layers that it alone came from.
        ctx.set_materialize_grads(False)
        ctx.done = done
        return done.forward(x, latents, condition, parameters, graph=done.learns and any(ctx.needs_input_grad))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_out: Tensor | None, g_latents: Tensor | None) -> Any:
        # Let go of: a loss that is still looked at would keep all of it in memory.
        done, ctx.done = ctx.done, None
        if done is None:
            raise RuntimeError("the backward pass of a streamed pass can run once only: it overwrites what was kept")
        return None, *done.backward(g_out, g_latents)
