"""Images, videos and sequences as groups of data tokens, and back (spec section 6).

Each way into groups is one einops pattern, and its inverse is the same pattern read backwards: round trips are exact,
of any dtype, by construction. In the patterns an axis X of the input is cut into gX groups of X patches of pX pixels.

Shapes: images are `(b, H, W, ch)`, feature maps `(b, c, H / p, W / p)`, grouped tokens `(b, t, n, c)`.
A size is one number for all axes or one number an axis: `(rows, columns)`, for video `(frames, rows, columns)`.
Groups stand row by row (video: frame by frame), so do the patches in a group, or in `snake` order: every second row of
patches reversed, which makes neighbours in the sequence neighbours in the image.

In this order: images and maps of features, glimpses, pixels, sequences, bytes, video.
"""

from dataclasses import dataclass
from math import prod

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from fitformer.errors import InputError
from fitformer.patching.sizes import (
    Size,
    axis_lengths,
    check_axes,
    check_divisible,
    check_groups,
    format_size,
    inverse_pattern,
    map_sizes,
    reorder,
    to_sides,
)

IMAGE = "b (gh h ph) (gw w pw) ch -> b (gh gw) (h w) (ph pw ch)"
VIDEO = "b (gf f pf) (gh h ph) (gw w pw) ch -> b (gf gh gw) (f h w) (pf ph pw ch)"
SEQUENCE = "b (t n) ... -> b t n ..."


def image_to_groups(images: Tensor, group_size: Size, patch_size: Size, order: str = "raster") -> Tensor:
    """Cut images `(b, H, W, ch)` into sub-images of patches: `(b, t, n, ph * pw * ch)`, channel fastest.

    Raises:
        InputError: not four axes; sizes that do not divide; an unknown order.
    """
    check_axes(images, "images (b, H, W, channels)", 4)
    lengths = axis_lengths(images.shape[1:3], group_size, patch_size, "hw")
    return reorder(rearrange(images, IMAGE, **lengths), lengths, order)


def groups_to_image(x: Tensor, image_size: Size, group_size: Size, patch_size: Size, order: str = "raster") -> Tensor:
    """Put groups `(b, t, n, ph * pw * ch)` back into images `(b, H, W, ch)`: the inverse of `image_to_groups`.

    Raises:
        InputError: `x` is not what these sizes make; sizes that do not divide; an unknown order.
    """
    lengths = axis_lengths(image_size, group_size, patch_size, "hw")
    check_groups(x, lengths)
    return rearrange(reorder(x, lengths, order), inverse_pattern(IMAGE), **lengths)


def extract_patches(images: Tensor, patch: Size, order: str = "raster") -> Tensor:
    """Cut images `(b, H, W, ch)` into patches `(b, N, ph * pw * ch)`, channel fastest: the whole image is one group.

    Raises:
        InputError: not four axes; patches that do not divide the image; an unknown order.
    """
    check_axes(images, "images (b, H, W, channels)", 4)
    return image_to_groups(images, images.shape[1:3], patch, order)[:, 0]


def merge_patches(patches: Tensor, image_size: Size, patch: Size, order: str = "raster") -> Tensor:
    """Put patches `(b, N, ph * pw * ch)` back into images `(b, H, W, ch)`: the inverse of `extract_patches`.

    Raises:
        InputError: `patches` is not what these sizes make; patches that do not divide the image; an unknown order.
    """
    check_axes(patches, "patches (b, N, patch rows * patch columns * channels)", 3)
    return groups_to_image(patches[:, None], image_size, image_size, patch, order)


def groups_to_map(x: Tensor, image_size: Size, group_size: Size, patch_size: Size, order: str = "raster") -> Tensor:
    """Lay tokens `(b, t, n, c)` out as a feature map `(b, c, H / ph, W / pw)`, each where its patch was in the image.

    Raises:
        InputError: `x` is not what these sizes make; sizes that do not divide; an unknown order.
    """
    lengths = axis_lengths(image_size, group_size, patch_size, "hw")
    return rearrange(groups_to_image(x, *map_sizes(lengths), 1, order), "b h w c -> b c h w")


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


@dataclass(frozen=True)
class ImageGroups:
    """How images of one size are cut: checked once, then `group` and its inverse `ungroup`, and `map` for features.

    Raises:
        InputError: sizes that do not divide (names the nearest that do), or are not positive whole numbers.
    """

    image_size: Size
    group_size: Size
    patch_size: Size
    channels: int = 3

    def __post_init__(self) -> None:
        axis_lengths(self.image_size, self.group_size, self.patch_size, "hw")
        if self.channels < 1:
            raise InputError(f"images need at least one channel, not {self.channels}")
        # One way to write a size, so that equal cuts are equal objects.
        for name in ("image_size", "group_size", "patch_size"):
            object.__setattr__(self, name, to_sides(getattr(self, name), "hw"))

    @property
    def _lengths(self) -> dict[str, int]:
        return axis_lengths(self.image_size, self.group_size, self.patch_size, "hw")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the grid of groups."""
        return self._lengths["gh"], self._lengths["gw"]

    @property
    def num_groups(self) -> int:
        """Groups in an image, t."""
        return prod(self.grid)

    @property
    def tokens_per_group(self) -> int:
        """Patches in a group, n."""
        return self._lengths["h"] * self._lengths["w"]

    @property
    def token_dim(self) -> int:
        """Numbers in a patch: rows * columns * channels."""
        return self._lengths["ph"] * self._lengths["pw"] * self.channels

    def group(self, images: Tensor) -> Tensor:
        """Cut images `(b, H, W, channels)` into `(b, t, n, token_dim)`.

        Raises:
            InputError: images of another size or channel count, or with the channels first.
        """
        (h, w), got = to_sides(self.image_size, "hw"), tuple(images.shape)
        if got[1:] != (h, w, self.channels):
            hint = "; channels come last: images.permute(0, 2, 3, 1)" if got[1:] == (self.channels, h, w) else ""
            raise InputError(f"images of shape {got} where (b, {h}, {w}, {self.channels}) is expected{hint}")
        return image_to_groups(images, self.group_size, self.patch_size)

    def ungroup(self, x: Tensor) -> Tensor:
        """Put `(b, t, n, token_dim)` back into images `(b, H, W, channels)`.

        Raises:
            InputError: `x` has another shape.
        """
        if x.shape[-1] != self.token_dim:
            raise InputError(f"tokens have width {x.shape[-1]} where patches of {self.token_dim} numbers are expected")
        return groups_to_image(x, self.image_size, self.group_size, self.patch_size)

    def map(self, x: Tensor) -> Tensor:
        """Lay tokens `(b, t, n, c)` of any width out as a feature map `(b, c, H / ph, W / pw)`.

        Raises:
            InputError: `x` has another number of groups or of tokens in a group.
        """
        return groups_to_map(x, self.image_size, self.group_size, self.patch_size)


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
    if copies < 0:
        raise InputError(f"the number of glimpses must be 0 or more, not {copies}")
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


def glimpses_to_image(
    x: Tensor, y: Tensor, image_size: Size, group_size: Size, patch_size: Size, copies: int = 1
) -> Tensor:
    """Images `(b, H, W, ch)` from what `glimpses` gave: undo the shuffling told by `y`, drop the coarse copies.

    Raises:
        InputError: `x` or `y` is not what these sizes make; sizes that do not divide.
    """
    check_axes(x, "groups (b, copies + t, n, c)", 4)
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


def image_to_pixels(images: Tensor, patch: Size, order: str = "snake") -> Tensor:
    """Pixel values of uint8 images `(b, H, W, ch)` as int64 tokens `(b, t, n)`: a group is a patch, channel fastest.

    These are an autoregressive decoder's targets; `shift_right` makes its input of them. n = ph * pw * ch.

    Raises:
        InputError: images that are not uint8, and what `extract_patches` raises.
    """
    if images.dtype != torch.uint8:
        raise InputError(f"pixel tokens are made of uint8 images, not {images.dtype}; scale to 0..255 and convert")
    return extract_patches(images, patch, order).long()


def pixels_to_image(tokens: Tensor, image_size: Size, patch: Size, channels: int, order: str = "snake") -> Tensor:
    """Images uint8 `(b, H, W, channels)` of pixel tokens `(b, t, n)`: the inverse of `image_to_pixels`.

    Raises:
        InputError: tokens outside 0..255, or of another shape than these sizes make.
    """
    check_axes(tokens, "tokens (b, t, n)", 3)
    values = (*to_sides(patch, "hw"), channels)
    if tokens.shape[-1] != prod(values):
        raise InputError(f"a patch of {format_size(values)} values has {prod(values)} tokens, not {tokens.shape[-1]}")
    return merge_patches(_as_bytes(tokens), image_size, patch, order)


def sequence_to_groups(tokens: Tensor, n: int) -> Tensor:
    """Cut a sequence `(b, L)` or `(b, L, c)` into groups of `n`: `(b, t, n)` or `(b, t, n, c)`.

    Raises:
        InputError: `n` does not divide L.
    """
    if tokens.ndim < 2:
        raise InputError(f"a batch of sequences (b, L) is expected, not shape {tuple(tokens.shape)}; try tokens[None]")
    if n < 1:
        raise InputError(f"a group needs at least one token, not {n}")
    check_divisible(tokens.shape[1], n, ("a sequence", "groups", "tokens"))
    return rearrange(tokens, SEQUENCE, n=n)


def groups_to_sequence(x: Tensor) -> Tensor:
    """Join groups `(b, t, n)` or `(b, t, n, c)` into `(b, t * n)` or `(b, t * n, c)`.

    Raises:
        InputError: fewer than three axes.
    """
    if x.ndim < 3:
        raise InputError(f"groups (b, t, n) are expected, not shape {tuple(x.shape)}")
    return rearrange(x, inverse_pattern(SEQUENCE))


def shift_right(tokens: Tensor) -> Tensor:
    """Input `(b, t, n)` of an autoregressive decoder for targets `(b, t, n)`: position k holds target k-1, the first 0.

    The shift runs through the whole sequence, across groups (spec section 5, autoregressive decoder).

    Raises:
        InputError: not three axes.
    """
    check_axes(tokens, "tokens (b, t, n)", 3)
    return sequence_to_groups(F.pad(groups_to_sequence(tokens)[:, :-1], (1, 0)), tokens.shape[2])


def bytes_to_tokens(data: bytes | bytearray | memoryview) -> Tensor:
    """Bytes as int64 tokens `(L,)`, 0..255."""
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).astype(np.int64))


def tokens_to_bytes(tokens: Tensor) -> bytes:
    """Bytes of tokens of any shape, in their order: the inverse of `bytes_to_tokens`.

    Raises:
        InputError: tokens that are not whole numbers in 0..255.
    """
    return _as_bytes(tokens).cpu().numpy().tobytes()


def _as_bytes(tokens: Tensor) -> Tensor:
    if tokens.is_floating_point() or tokens.is_complex():
        raise InputError(f"tokens are whole numbers, not {tokens.dtype}")
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) <= 255:
        raise InputError(f"tokens from {int(tokens.min())} to {int(tokens.max())} are not all within 0..255")
    return tokens.to(torch.uint8)


def video_to_groups(video: Tensor, group_size: Size, patch_size: Size) -> Tensor:
    """Cut video `(b, T, H, W, ch)` into space-time groups of space-time patches: `(b, t, n, pt * ph * pw * ch)`.

    Raises:
        InputError: not five axes; sizes that do not divide.
    """
    check_axes(video, "video (b, frames, H, W, channels)", 5)
    return rearrange(video, VIDEO, **axis_lengths(video.shape[1:4], group_size, patch_size, "fhw"))


def groups_to_video(x: Tensor, video_size: Size, group_size: Size, patch_size: Size) -> Tensor:
    """Put space-time groups back into video `(b, T, H, W, ch)`: the inverse of `video_to_groups`.

    Raises:
        InputError: `x` is not what these sizes make; sizes that do not divide.
    """
    lengths = axis_lengths(video_size, group_size, patch_size, "fhw")
    check_groups(x, lengths)
    return rearrange(x, inverse_pattern(VIDEO), **lengths)
