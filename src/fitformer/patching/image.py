"""Images and maps of features as groups of patches, and back (spec section 6).

Shapes: images are `(b, H, W, ch)`, feature maps `(b, c, H / p, W / p)`, grouped tokens `(b, t, n, c)`.
Groups stand row by row, and so do the patches in a group, or in `snake` order: every second row of patches reversed,
which makes neighbours in the sequence neighbours in the image.
"""

from einops import rearrange
from torch import Tensor

from fitformer._support.checks import checked
from fitformer.errors import InputError
from fitformer.patching.sizes import (
    Size,
    axis_lengths,
    check_axes,
    check_groups,
    format_size,
    inverse_pattern,
    map_sizes,
    reorder,
)

IMAGE = "b (gh h ph) (gw w pw) ch -> b (gh gw) (h w) (ph pw ch)"


@checked
def image_to_groups(images: Tensor, group_size: Size, patch_size: Size, order: str = "raster") -> Tensor:
    """Cut images `(b, H, W, ch)` into sub-images of patches: `(b, t, n, ph * pw * ch)`, channel fastest.

    Raises:
        InputError: not four axes; sizes that do not divide; an unknown order.
    """
    check_axes(images, "images (b, H, W, channels)", 4)
    lengths = axis_lengths(images.shape[1:3], group_size, patch_size, "hw")
    return reorder(rearrange(images, IMAGE, **lengths), lengths, order)


@checked
def groups_to_image(x: Tensor, image_size: Size, group_size: Size, patch_size: Size, order: str = "raster") -> Tensor:
    """Put groups `(b, t, n, ph * pw * ch)` back into images `(b, H, W, ch)`: the inverse of `image_to_groups`.

    Raises:
        InputError: `x` is not what these sizes make; sizes that do not divide; an unknown order.
    """
    lengths = axis_lengths(image_size, group_size, patch_size, "hw")
    check_groups(x, lengths)
    return rearrange(reorder(x, lengths, order), inverse_pattern(IMAGE), **lengths)


@checked
def extract_patches(images: Tensor, patch: Size, order: str = "raster") -> Tensor:
    """Cut images `(b, H, W, ch)` into patches `(b, N, ph * pw * ch)`, channel fastest: the whole image is one group.

    Raises:
        InputError: not four axes; patches that do not divide the image; an unknown order.
    """
    check_axes(images, "images (b, H, W, channels)", 4)
    return image_to_groups(images, images.shape[1:3], patch, order)[:, 0]


@checked
def merge_patches(patches: Tensor, image_size: Size, patch: Size, order: str = "raster") -> Tensor:
    """Put patches `(b, N, ph * pw * ch)` back into images `(b, H, W, ch)`: the inverse of `extract_patches`.

    Raises:
        InputError: `patches` is not what these sizes make; patches that do not divide the image; an unknown order.
    """
    check_axes(patches, "patches (b, N, patch rows * patch columns * channels)", 3)
    return groups_to_image(patches[:, None], image_size, image_size, patch, order)


@checked
def groups_to_map(x: Tensor, image_size: Size, group_size: Size, patch_size: Size, order: str = "raster") -> Tensor:
    """Lay tokens `(b, t, n, c)` out as a feature map `(b, c, H / ph, W / pw)`, each where its patch was in the image.

    Raises:
        InputError: `x` is not what these sizes make; sizes that do not divide; an unknown order.
    """
    lengths = axis_lengths(image_size, group_size, patch_size, "hw")
    return rearrange(groups_to_image(x, *map_sizes(lengths), 1, order), "b h w c -> b c h w")


@checked
def map_to_groups(maps: Tensor, image_size: Size, group_size: Size, patch_size: Size, order: str = "raster") -> Tensor:
    """Group a feature map `(b, c, H / ph, W / pw)` as the image is, `(b, t, n, c)`: the inverse of `groups_to_map`.

    Raises:
        InputError: the map is not of this image's size in patches; sizes that do not divide; an unknown order.
    """
    map_size, group = map_sizes(axis_lengths(image_size, group_size, patch_size, "hw"))
    check_axes(maps, "maps (b, channels, rows, columns)", 4)
    if tuple(maps.shape[2:]) != map_size:
        raise InputError(
            f"a map of {format_size(maps.shape[2:])} does not belong to these sizes: "
            f"the image has {format_size(map_size)} patches"
        )
    return image_to_groups(rearrange(maps, "b c h w -> b h w c"), group, 1, order)
