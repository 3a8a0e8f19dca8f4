"""Images of any size as groups, read when they are needed: padded edges, skipped groups, glimpses of the whole.

A `PixelSource` is anything that hands out windows of pixels: a file that is opened lazily, or an array in memory.
`PatchGrid` says how images are cut, `GroupedImage` is one image cut so: which groups it has, and any slice of them as
raw tokens with a mask.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from math import prod
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from fitformer.errors import EmptyImageError, InputError
from fitformer.patching.grid import PatchGrid
from fitformer.patching.image import image_to_groups
from fitformer.patching.sizes import format_size

PixelsAt = Callable[[np.ndarray, np.ndarray], Iterable[tuple[np.ndarray, np.ndarray]]]


@runtime_checkable
class PixelSource(Protocol):
    """An image that gives windows: `shape` is (rows, columns, channels), `dtype` numpy's uint8, uint16 or a float.

    An image that has pixels only in some places, such as features of the patches of a slide, says where by an attribute
    `presence`, booleans (rows, columns, 1) with the same `window`. It may have a function `pixels_at(rows, columns)`
    too, which takes places (k,) that hold pixels and yields these, some at a time in the order that suits it: which of
    the places, int64 (j,), and their pixels (j, channels). Many groups are then read at once.
    """

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows, columns, channels."""

    @property
    def dtype(self) -> np.dtype:
        """Of the pixels."""

    def window(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """Pixels `(height, width, channels)` of a window inside the image."""

    def thumbnail(self, rows: int, columns: int) -> np.ndarray:
        """The whole image, averaged down to `(rows, columns, channels)`."""


class PixelArray:
    """An image in memory, `(H, W, channels)`, as a source of windows.

    Raises:
        InputError: not three axes.
    """

    def __init__(self, pixels: np.ndarray | Tensor) -> None:
        if isinstance(pixels, Tensor):
            # numpy knows no bfloat16.
            pixels = (pixels.detach().float() if pixels.dtype == torch.bfloat16 else pixels.detach()).cpu().numpy()
        array = pixels
        if array.ndim != 3:
            raise InputError(f"an image has three axes (rows, columns, channels), not shape {tuple(array.shape)}")
        self.pixels = array

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows, columns, channels."""
        rows, columns, channels = self.pixels.shape
        return rows, columns, channels

    @property
    def dtype(self) -> np.dtype:
        """Of the array."""
        return self.pixels.dtype

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns that are as easily read as less of them: all."""
        return self.shape[:2]

    def window(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """A view of the window."""
        return self.pixels[top : top + height, left : left + width]

    def thumbnail(self, rows: int, columns: int) -> np.ndarray:
        """The whole image, averaged down to `(rows, columns, channels)`."""
        pixels = rearrange(torch.from_numpy(np.ascontiguousarray(self.pixels)).float(), "h w ch -> 1 ch h w")
        small = rearrange(F.interpolate(pixels, (rows, columns), mode="area"), "1 ch h w -> h w ch").numpy()
        return small.astype(self.dtype) if self.dtype.kind == "f" else small.round().astype(self.dtype)


def to_signal(tokens: Tensor) -> Tensor:
    """Raw tokens as the network takes them: whole-number pixels over their range as [-1, 1], floats as they are.

    Raises:
        InputError: whole numbers other than uint8 and uint16.
    """
    if tokens.is_floating_point():
        return tokens
    if tokens.dtype not in (torch.uint8, torch.uint16):
        raise InputError(f"pixels are {tokens.dtype}; images hold uint8, uint16 or floats")
    half = torch.iinfo(tokens.dtype).max / 2
    return tokens.float().div_(half).sub_(1)


def scaled_alike(one: np.dtype, other: np.dtype) -> bool:
    """Whether `to_signal` makes the same of images stored in either type: whole numbers of any depth, or floats."""
    return (one.kind == "f") == (other.kind == "f")


def check_pixels(name: str, found: np.dtype, trained: np.dtype) -> None:
    """Check that an image holds such numbers as a model was trained on.

    Raises:
        InputError: one holds floats and the other whole numbers.
    """
    if scaled_alike(found, trained):
        return
    if found.kind == "f":
        way = f"store it as uint8 or uint16, or train on {found}"
    else:
        way = f"store it as {trained}, as the images of the training are, or train on {found}"
    raise InputError(
        f"{name} has {found} pixels and the model was trained on {trained}; floats are read as they are, whole numbers "
        f"scaled to -1 .. 1: {way}"
    )


class GroupedImage:
    """An image cut into groups, of which any slice can be read.

    Args:
        source: the image.
        patch_grid: how it is cut.
        occupied: booleans (rows, columns) of the grid of groups; the others are skipped. All by default. Groups without
            any pixel, of a source that says where it has some, are skipped as well.
        glimpses: copies of the whole image, averaged down to one group, that stand in front as groups of their own.
        patches: booleans (rows, columns) of the patches of the image; the others are absent, as if there were no
            pixels, but for glimpses. All by default. Groups without any patch are skipped.

    Attributes:
        coords: row and column of each group, int64 `(t, 2)`; glimpse k is at (-1, k).
        images: how many images it is, 1; of `JoinedImages` more.

    Raises:
        InputError: another number of channels, another size than that of the grid, a grid of another size, no
            occupied group or patch.
    """

    images = 1

    def __init__(
        self,
        source: PixelSource,
        patch_grid: PatchGrid,
        occupied: np.ndarray | Tensor | None = None,
        glimpses: int = 0,
        patches: np.ndarray | None = None,
    ) -> None:
        if source.shape[2] != patch_grid.channels:
            raise InputError(
                f"{_name(source)} has {source.shape[2]} channels, the model was built for {patch_grid.channels}"
            )
        patch_grid.check_size(*source.shape[:2])
        self.source, self.patch_grid, self.glimpses = source, patch_grid, glimpses
        # Noted, so that asking for it never opens a file again.
        self.shape, self.dtype = source.shape, source.dtype
        self.grid = patch_grid.cover(*source.shape[:2])
        kept = np.ones(self.grid, dtype=bool) if occupied is None else np.asarray(occupied, dtype=bool)
        if kept.shape != self.grid:
            raise InputError(
                f"{_name(source)} has {format_size(self.grid)} groups, and `occupied` has {format_size(kept.shape)}"
            )
        presence = getattr(source, "presence", None)
        there = None if presence is None else presence.window(0, 0, *self.shape[:2])[..., 0]
        held = None if there is None else _tokens_with_pixels(there, patch_grid)
        if patches is not None:
            held = self._tokens_of(patches) if held is None else held & self._tokens_of(patches)
        if held is not None:
            kept = kept & held.any(axis=-1)
        if not kept.any():
            raise EmptyImageError(f"{_name(source)} has {kept.size} groups, and none is occupied")
        coarse = np.stack([np.full(glimpses, -1), np.arange(glimpses)], axis=1)
        self.coords = torch.from_numpy(np.concatenate([coarse, np.argwhere(kept)]).astype(np.int64))
        self._held = None if held is None else torch.from_numpy(held[kept])
        if self._held is not None and glimpses:
            seen = np.ones((1, patch_grid.tokens_per_group), dtype=bool)
            if there is not None:
                seen = _tokens_with_pixels(_shrunk(there, *patch_grid.group_size), patch_grid).reshape(1, -1)  # type: ignore[misc]
            self._held = torch.cat([torch.from_numpy(seen).expand(glimpses, -1), self._held])
        self._glimpse: np.ndarray | None = None
        self._pixels: Tensor | None = None

    @property
    def path(self) -> Any:
        """Of the image's file; AttributeError where it has none."""
        return self.source.path  # type: ignore[attr-defined]

    @property
    def parts(self) -> "tuple[GroupedImage, ...]":
        """Itself."""
        return (self,)

    def split(self, x: Tensor) -> list[Tensor]:
        """What belongs to the groups of each part, of values `(t, ...)` of all groups: all."""
        return [x]

    def origin(self, group: int) -> tuple[int, int]:
        """Which part a group is of, and its number there."""
        return 0, group

    @property
    def nbytes(self) -> int:
        """Bytes of the pixels of all groups that are read."""
        return self.num_groups * prod(self.patch_grid.group_size) * self.shape[2] * self.dtype.itemsize  # type: ignore[arg-type]

    @property
    def groups_in_all(self) -> int:
        """Groups that the image is cut into, those that are skipped counted, glimpses not."""
        return prod(self.grid)

    def read_ahead(self) -> None:
        """Read the pixels of all groups now: `read` takes them from memory, in whatever process."""
        self._pixels = torch.from_numpy(self._groups(slice(None)))

    @property
    def num_groups(self) -> int:
        """Groups that are read, glimpses counted, t."""
        return len(self.coords)

    def read(self, groups: slice) -> tuple[Tensor, Tensor | None]:
        """Raw tokens `(1, s, n, token_dim)` of a slice of groups, of the image's dtype, and their mask `(1, s, n)`.

        A patch that lies outside the image, or where the source has no pixels, is false in the mask, and the mask None
        where there is none. What a patch at the edge lacks is filled with the image's last row and column. Floats
        without data, if the source names such a level (`nodata`), are 0, the middle of the range, as is what is absent.
        """
        pixels = torch.from_numpy(self._groups(groups)) if self._pixels is None else self._pixels[groups]
        tokens = image_to_groups(pixels, self.patch_grid.group_size, self.patch_grid.patch_size)
        return tokens.transpose(0, 1), self.mask(groups)

    def mask(self, groups: slice) -> Tensor | None:
        """Which tokens of a slice of groups hold pixels, booleans `(1, s, n)`; None if all do."""
        mask = self._inside(groups) if self._held is None else self._held[groups][None]
        return None if bool(mask.all()) else mask

    def _inside(self, groups: slice) -> Tensor:
        """Which tokens of a slice of groups begin inside the image, booleans `(1, s, n)`."""
        (rows, columns, _), (gh, gw), (ph, pw) = self.shape, self.patch_grid.group_size, self.patch_grid.patch_size  # type: ignore[misc]
        coords = self.coords[groups]
        high, wide = self.patch_grid.patches
        inside = [
            (place[:, None] * side + torch.arange(count) * patch < size) | glimpse
            for place, side, count, patch, size, glimpse in (
                (coords[:, 0], gh, high, ph, rows, coords[:, :1] < 0),
                (coords[:, 1], gw, wide, pw, columns, coords[:, :1] < 0),
            )
        ]
        return (inside[0][:, :, None] & inside[1][:, None]).flatten(1)[None]

    def _tokens_of(self, patches: np.ndarray) -> np.ndarray:
        """Which tokens are there, booleans (rows of groups, columns of groups, n), of patches of the image."""
        (high, wide), (ph, pw) = self.patch_grid.patches, self.patch_grid.patch_size  # type: ignore[misc]
        wanted = -(-self.shape[0] // ph), -(-self.shape[1] // pw)
        if patches.shape != wanted:
            raise InputError(
                f"{_name(self.source)} has {format_size(wanted)} patches, and `patches` has "
                f"{format_size(patches.shape)}"
            )
        rows, columns = self.grid
        whole = np.pad(patches, ((0, rows * high - wanted[0]), (0, columns * wide - wanted[1])))
        return np.asarray(rearrange(whole, "(r h) (c w) -> r c (h w)", h=high, w=wide))

    def count(self) -> int:
        """Tokens that hold pixels."""
        mask = self.mask(slice(None))
        return self.num_groups * self.patch_grid.tokens_per_group if mask is None else int(mask.sum())

    def map(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """Lay tokens `(t, n, c)` out as a map `(c, rows, columns)` of patches; `fill` where there were no pixels.

        Glimpses are left out, and so are patches beyond the image.
        """
        (high, wide), (rows, columns) = self.patch_grid.patches, self.grid
        if (mask := self.mask(slice(None))) is not None:
            x = x.masked_fill(~mask[0, ..., None].to(x.device), fill)
        cells = x.new_full((rows, columns, high, wide, x.shape[-1]), fill)
        own = self.coords[self.glimpses :].to(x.device)
        cells[own[:, 0], own[:, 1]] = x[self.glimpses :].unflatten(1, (high, wide))
        ph, pw = self.patch_grid.patch_size  # type: ignore[misc]
        whole = rearrange(cells, "gh gw h w c -> c (gh h) (gw w)")
        return whole[:, : -(-self.shape[0] // ph), : -(-self.shape[1] // pw)]

    def beside(self, source: PixelSource, groups: slice, fill: int) -> np.ndarray:
        """Numbers `(s, rows, columns)` of another source of the image's size and one channel, group by group.

        `fill` stands beyond the image's edges, and throughout glimpses.
        """
        found = np.full((len(self.coords[groups]), *self.patch_grid.group_size), fill, source.dtype)  # type: ignore[misc]
        for own, (top, left, height, width) in self.windows(groups):
            found[own, :height, :width] = source.window(top, left, height, width)[..., 0]
        return found

    def windows(self, groups: slice) -> Iterator[tuple[int, tuple[int, int, int, int]]]:
        """Of each group of a slice but glimpses: its number in the slice, and its window (top, left, rows, columns)."""
        for number, (row, column) in enumerate(self.coords[groups].tolist()):
            if row >= 0:
                yield number, self._place(row, column)

    def put(self, whole: np.ndarray, groups: slice, values: np.ndarray) -> None:
        """Put values `(s, rows, columns)` of the pixels of a slice of groups into an array `(H, W)`."""
        for own, (top, left, height, width) in self.windows(groups):
            whole[top : top + height, left : left + width] = values[own, :height, :width]

    def pixel_map(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """Lay pixels of groups `(t, c, rows, columns)` out as a map `(c, H, W)`; `fill` where groups were skipped."""
        whole = x.new_full((x.shape[1], *self.shape[:2]), fill)
        for own, (top, left, height, width) in self.windows(slice(None)):
            whole[:, top : top + height, left : left + width] = x[own, :, :height, :width]
        return whole

    def _place(self, row: int, column: int) -> tuple[int, int, int, int]:
        """The window of a group, cut off at the image's edges: top, left, height, width."""
        gh, gw = self.patch_grid.group_size  # type: ignore[misc]
        top, left = row * gh, column * gw
        return top, left, min(gh, self.shape[0] - top), min(gw, self.shape[1] - left)

    def _groups(self, groups: slice) -> np.ndarray:
        """Pixels `(s, rows, columns, channels)` of a slice of groups."""
        pixels_at = getattr(self.source, "pixels_at", None)
        # In larger patches, what lies beyond the edge of the image is filled.
        if pixels_at is not None and self._held is not None and self.patch_grid.patch_size == (1, 1):
            return self._places(groups, pixels_at)
        return np.stack([self._group(row, column) for row, column in self.coords[groups].tolist()])

    def _places(self, groups: slice, pixels_at: PixelsAt) -> np.ndarray:
        """`_groups` of an image that has pixels in some places: these are read together, all else is 0."""
        gh, gw = self.patch_grid.group_size  # type: ignore[misc]
        coords, held = self.coords[groups].numpy(), self._held[groups].numpy()  # type: ignore[index]
        out = np.zeros((len(coords), gh, gw, self.shape[2]), self.dtype)
        glimpses = coords[:, 0] < 0
        if glimpses.any():
            out[glimpses] = self._group(-1, 0)
        group, token = (held & ~glimpses[:, None]).nonzero()
        inside = np.stack([token // gw, token % gw], axis=1)
        tokens = out.reshape(-1, self.shape[2])
        for which, pixels in pixels_at(*(coords[group] * (gh, gw) + inside).T):
            tokens[group[which] * (gh * gw) + token[which]] = pixels
        return out

    def _group(self, row: int, column: int) -> np.ndarray:
        """Pixels of one group, filled up at the edges."""
        gh, gw = self.patch_grid.group_size  # type: ignore[misc]
        if row < 0:
            if self._glimpse is None:
                self._glimpse = self._with_data(self.source.thumbnail(gh, gw))
            return self._glimpse
        top, left, height, width = self._place(row, column)
        pixels = self._with_data(self.source.window(top, left, height, width))
        if getattr(self.source, "presence", None) is not None:
            pixels = np.where(self.source.presence.window(top, left, height, width), pixels, pixels.dtype.type(0))  # type: ignore[attr-defined]
        if (height, width) != (gh, gw):
            pixels = np.pad(pixels, ((0, gh - height), (0, gw - width), (0, 0)), mode="edge")
        return pixels

    def _with_data(self, pixels: np.ndarray) -> np.ndarray:
        """NaN that the source says mean no data become 0; any others reach the model, whose answer is then NaN."""
        if pixels.dtype.kind == "f" and getattr(self.source, "nodata", None) is not None:
            return np.where(np.isnan(pixels), pixels.dtype.type(0), pixels)
        return pixels


def _tokens_with_pixels(there: np.ndarray, patch_grid: PatchGrid) -> np.ndarray:
    """Which tokens have a pixel, booleans (rows of groups, columns of groups, n), from those of pixels (H, W)."""
    (gh, gw), (ph, pw) = patch_grid.group_size, patch_grid.patch_size  # type: ignore[misc]
    rows, columns = patch_grid.cover(*there.shape)
    whole = np.pad(there, ((0, rows * gh - there.shape[0]), (0, columns * gw - there.shape[1])))
    pixels = rearrange(whole, "(r h ph) (c w pw) -> r c (h w) (ph pw)", r=rows, c=columns, ph=ph, pw=pw)
    return np.asarray(pixels.any(axis=-1))


def _shrunk(there: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Which of (rows, columns) equal areas have a pixel."""
    return F.adaptive_max_pool2d(torch.from_numpy(there)[None].float(), (rows, columns))[0].bool().numpy()


def stacked(images: Sequence[GroupedImage], groups: slice) -> tuple[Tensor, Tensor | None]:
    """`GroupedImage.read` of images with the same number of groups: tokens and mask with a batch of them."""
    return _together([image.read(groups) for image in images], dim=0)


def in_a_row(images: Sequence[GroupedImage], groups: slice) -> tuple[Tensor, Tensor | None]:
    """`GroupedImage.read` of images with any numbers of groups, of a slice of the groups of one after the other."""
    return _together([images[k].read(own) for k, own in pieces_of_row(images, groups)], dim=1)


def pieces_of_row(images: Sequence[GroupedImage], groups: slice) -> list[tuple[int, slice]]:
    """Which images a slice of the groups of one after the other is of, and which groups of each, in their order."""
    first, last, _ = groups.indices(sum(image.num_groups for image in images))
    pieces = []
    for k, image in enumerate(images):
        if first < image.num_groups and last > 0:
            pieces.append((k, slice(max(first, 0), min(last, image.num_groups))))
        first, last = first - image.num_groups, last - image.num_groups
    return pieces


def _together(read: Sequence[tuple[Tensor, Tensor | None]], dim: int) -> tuple[Tensor, Tensor | None]:
    """Tokens `(1, s, n, token_dim)` of several images and their masks `(1, s, n)`, as those of one."""
    tokens, masks = zip(*read, strict=True)
    if len(tokens) == 1:
        return tokens[0], masks[0]
    if len({each.dtype for each in tokens}) > 1:
        tokens = tuple(to_signal(each) for each in tokens)
    if all(mask is None for mask in masks):
        return torch.cat(tokens, dim), None
    held = [
        torch.ones(each.shape[:3], dtype=torch.bool) if mask is None else mask
        for each, mask in zip(tokens, masks, strict=True)
    ]
    return torch.cat(tokens, dim), torch.cat(held, dim)


# Images with up to so many groups run together whatever the others have.
FEW_GROUPS = 64


def together(images: Sequence[GroupedImage]) -> list[list[int]]:
    """The places in a sequence of images of those that one pass costs less than several, by numbers of groups.

    Global layers fill all up to the largest, so that images of a pass have at least half as many groups, or few.
    """
    found: list[list[int]] = []
    for place in sorted(range(len(images)), key=lambda place: images[place].num_groups):
        groups = images[place].num_groups
        if found and groups <= max(FEW_GROUPS, 2 * images[found[-1][0]].num_groups):
            found[-1].append(place)
        else:
            found.append([place])
    return found


def _name(source: Any) -> str:
    return f"the image {source.path}" if hasattr(source, "path") else "an image"
