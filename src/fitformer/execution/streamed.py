"""Streaming: the group phase runs over slices of groups, and a slice's pixels are read when it is their turn.

The data tokens between blocks (`token_store.py`) and the latents are kept. The backward pass computes everything else
again, slice by slice and global layer by global layer, under the same random state; the gradients of the data tokens
take the tokens' place there. Memory holds one slice at a time, whatever the size of the input. Where there is more
memory, some results are remembered instead (`selective_checkpoint.py`).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fitformer.execution._streamed_pass import StreamedPass, StreamOptions
from fitformer.execution.base import Execution, Inputs, Outputs, Trunk

# Tokens of a slice where its size is not given: what a local layer makes of them stays in a processor's cache; a GPU is
# idle with fewer than its own.
SLICE_TOKENS = {"cpu": 4096, "cuda": 65536}


def default_slice(device: str, tokens_per_group: int, batch: int) -> int:
    """Groups of a slice where its size is not given, on a type of device."""
    return max(1, SLICE_TOKENS.get(device, SLICE_TOKENS["cpu"]) // (tokens_per_group * batch))


@dataclass(frozen=True)
class Streamed(StreamOptions, Execution):
    """Run the trunk over slices of groups.

    Attributes:
        slice_groups: groups of a slice, the same of all examples of the batch, or where they have different numbers of
            groups so many for each; by default as many as hold 4,096 data tokens, on a GPU 65,536.
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

    def run(self, trunk: Trunk, inputs: Inputs) -> Outputs:
        """As `Execution.run`; no tensor of all data tokens exists but for those that are kept or asked for."""
        streamed = StreamedPass(trunk, self, inputs, self._slices(trunk, inputs))
        # Each once: a tensor that is an input twice would get its gradient twice.
        parameters = {id(each): each for each in inputs.parameters}.values()
        tokens = inputs.tokens if isinstance(inputs.tokens, Tensor) else None
        latents, score, *wanted = _Stream.apply(streamed, tokens, inputs.latents, inputs.condition, *parameters)
        return Outputs(latents, score, tuple(wanted))

    def _slices(self, trunk: Trunk, inputs: Inputs) -> list[slice]:
        """The slices of groups, in their order."""
        latents = inputs.latents
        size = self.slice_groups or default_slice(latents.device.type, trunk.tokens_per_group, latents.shape[0])
        if self.slice_groups and inputs.examples is not None:
            size *= len(inputs.examples)
        return [slice(k, min(k + size, inputs.groups)) for k in range(0, inputs.groups, size)]


class _Stream(torch.autograd.Function):
    """A `StreamedPass` as one node of autograd's graph; parameters are inputs, so that hooks on them are called."""

    @staticmethod
    def forward(ctx: Any, streamed: StreamedPass, *inputs: Any) -> Any:
        # A result that no loss uses has no gradient, and neither have the layers that it alone came from.
        ctx.set_materialize_grads(False)
        ctx.streamed = streamed
        return streamed.forward(*inputs, graph=streamed.learns and any(ctx.needs_input_grad))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        # Released: a loss that is still referenced would keep all of it in memory.
        streamed, ctx.streamed = ctx.streamed, None
        if streamed is None:
            raise RuntimeError("the backward pass of a streamed pass can run once only: it overwrites what was kept")
        return None, *streamed.backward(*gradients)
