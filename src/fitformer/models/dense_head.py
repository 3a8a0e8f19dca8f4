"""From data tokens to the pixels of their patches: logits of classes, group by group."""

from math import prod

import torch
from einops import rearrange
from torch import Tensor, nn

from fitformer._support.checks import whole
from fitformer._support.system_memory import check_room
from fitformer.models.layers import MOST_SIZE, linear
from fitformer.patching import PatchGrid

_KERNEL = 3


class DenseHead(nn.Module):
    """Decodes each token to its patch's pixels, and refines the pixels of a group by two convolutions.

    The convolutions see the decoded pixels and those of the image, two pixels far: across the borders of patches, but
    not across those of groups, whose outermost pixels are repeated. So a group's logits are a function of its own
    tokens and pixels, and slices of groups are exact.

    Args:
        width: of a token, c.
        grid: how images are cut.
        num_classes: logits of a pixel.
        refinement: numbers of a decoded pixel that the convolutions work on; 0 decodes to logits at once.

    Attributes:
        numbers: of a group's decoded pixels.

    Raises:
        InputError: sizes that are no positive whole numbers, or too large.
    """

    def __init__(self, width: int, grid: PatchGrid, num_classes: int, refinement: int) -> None:
        super().__init__()
        whole("num_classes", num_classes, 1, MOST_SIZE)
        whole("refinement", refinement, 0, MOST_SIZE)
        self.grid, self.refinement = grid, refinement
        per_patch = prod(grid.patch_size) * (refinement or num_classes)  # type: ignore[arg-type]
        self.numbers = prod(grid.patches) * per_patch
        self.decode = linear(width, per_patch)
        self.mix = self.smooth = self.classes = None
        if refinement:
            self.mix = _convolution(refinement + grid.channels, refinement)
            self.smooth = _convolution(refinement, refinement)
            self.classes = linear(refinement, num_classes)

    def forward(self, x: Tensor, patches: Tensor | None = None) -> Tensor:
        """Logits `(b, s, classes, rows, columns)` of the pixels of groups.

        Args:
            x: data tokens `(b, s, n, c)`.
            patches: the image's pixels as signals `(b, s, n, ph * pw * channels)`, which the refinement sees.
        """
        # A pixel's numbers stay side by side, as they are decoded: convolutions are faster so, and nothing is copied.
        pixels = self._laid_out(self.decode(x))
        if self.mix is not None and self.smooth is not None and self.classes is not None:
            assert patches is not None
            seen = torch.cat([pixels, self._laid_out(patches.to(pixels.dtype))], dim=-1)
            mixed = nn.functional.gelu(self.mix(seen.movedim(-1, 1)))
            pixels = self.classes(pixels + self.smooth(mixed).movedim(1, -1))
        return pixels.movedim(-1, 1).unflatten(0, x.shape[:2])

    def _laid_out(self, patches: Tensor) -> Tensor:
        """Patches `(b, s, n, ph * pw * k)`, k fastest, as pixels of groups `(b * s, rows, columns, k)`."""
        (high, wide), (ph, pw) = self.grid.patches, self.grid.patch_size  # type: ignore[misc]
        pattern = "b s (h w) (ph pw k) -> (b s) (h ph) (w pw) k"
        return rearrange(patches, pattern, h=high, w=wide, ph=ph, pw=pw)


def _convolution(inputs: int, outputs: int) -> nn.Conv2d:
    check_room(f"a convolution from {inputs} to {outputs} channels", inputs * outputs * _KERNEL**2)
    return nn.Conv2d(inputs, outputs, _KERNEL, padding="same", padding_mode="replicate")
