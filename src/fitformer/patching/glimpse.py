"""Glimpses: copies of the whole image, shrunk to the size of one group, in front of its groups (spec section 6).

Shapes: images are `(b, H, W, ch)`, feature maps `(b, c, H / p, W / p)`, grouped tokens `(b, t, n, c)`.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from fitformer._support.checks import checked, whole
from fitformer.errors import InputError
from fitformer.patching.image import extract_patches, groups_to_image, image_to_groups
from fitformer.patching.sizes import Size, check_axes, to_sides

# Beyond these, copies of the whole are a mistake.
MOST_GLIMPSES = 1024


@checked
def glimpses(
    images: Tensor,
    group_size: Size,
    patch_size: Size,
    copies: int = 1,
    shuffle: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Groups of images with `copies` of the whole image, shrunk to one group, in front (spec section 6, glimpses).

    Some groups then see everything coarsely. With `shuffle` the groups of each example stand in an order of its own,
    drawn from `generator`.

    Returns:
        x: `(b, copies + t, n, ph * pw * ch)`, of the images' dtype.
        y: `(b, copies + t, 1, copies + t)`, one-hot: which group stands here, glimpses counted first; an encoder's `y`.

    Raises:
        InputError: a negative number of copies, and what `image_to_groups` raises.
    """
    whole("copies", copies, 0, MOST_GLIMPSES)
    x = image_to_groups(images, group_size, patch_size)
    coarse = extract_patches(_shrunk(images, to_sides(group_size, "hw")), patch_size)
    x = torch.cat([coarse[:, None].expand(-1, copies, -1, -1), x], dim=1)
    b, t = x.shape[:2]
    which = torch.arange(t, device=x.device).expand(b, t)
    if shuffle:
        # Drawn where the generator lives, so that a seed gives one order whatever device the images are on.
        device = generator.device if generator else "cpu"
        which = torch.rand(b, t, generator=generator, device=device).argsort(dim=1).to(x.device)
    y = F.one_hot(which, t)[:, :, None].to(x.dtype if x.is_floating_point() else torch.float32)
    return torch.take_along_dim(x, which[:, :, None, None], dim=1), y


@checked
def glimpses_to_image(
    x: Tensor, y: Tensor, image_size: Size, group_size: Size, patch_size: Size, copies: int = 1
) -> Tensor:
    """Images `(b, H, W, ch)` from what `glimpses` gave: undo the shuffling told by `y`, drop the coarse copies.

    Raises:
        InputError: `x` or `y` is not what these sizes make; sizes that do not divide.
    """
    check_axes(x, "groups (b, copies + t, n, c)", 4)
    whole("copies", copies, 0, min(MOST_GLIMPSES, x.shape[1]))
    b, t = x.shape[:2]
    if tuple(y.shape) != (b, t, 1, t):
        raise InputError(f"the one-hot index of groups {tuple(x.shape)} is {(b, t, 1, t)}, not {tuple(y.shape)}")
    coords = y[:, :, 0].argmax(dim=-1).argsort(dim=1)
    x = torch.take_along_dim(x, coords[:, :, None, None], dim=1)
    return groups_to_image(x[:, copies:], image_size, group_size, patch_size)


def _shrunk(images: Tensor, size: tuple[int, ...]) -> Tensor:
    # Plain bilinear, half-pixel centres, no anti-aliasing: what the reference's resize does, also where it aliases.
    pixels = images if images.dtype == torch.float64 else images.float()
    small = F.interpolate(rearrange(pixels, "b h w ch -> b ch h w"), size, mode="bilinear", align_corners=False)
    small = rearrange(small, "b ch h w -> b h w ch")
    return (small if images.is_floating_point() else small.round()).to(images.dtype)
