"""Gradient checkpointing: each phase keeps its inputs alone and is computed again in the backward pass."""

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fitformer.models.trunk import Trunk


def checkpointed(
    trunk: Trunk, x: Tensor, latents: Tensor, condition: Tensor | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run the trunk, recomputing each phase in the backward pass under the same random state."""
    keys = trunk.group_keys(*x.shape[:2])
    for i in range(len(trunk.blocks)):
        source = trunk.write_source(latents)
        x, latents = checkpoint(trunk.group_phase, i, x, latents, source, mask, keys, use_reentrant=False)
        latents = checkpoint(trunk.global_phase, i, latents, condition, use_reentrant=False)
    return x, latents
