"""The plain way: every phase on everything, all activations kept. The oracle for all the others."""

from torch import Tensor

from fitformer.models.trunk import Trunk


def plain(
    trunk: Trunk, x: Tensor, latents: Tensor, condition: Tensor | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run the trunk as it is written."""
    return trunk(x, latents, condition, mask)
