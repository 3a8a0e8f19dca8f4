"""How axes are cut into groups of patches: sizes, lengths, and the one clear error when they do not fit."""

from collections.abc import Iterable, Sequence
from math import isqrt, prod
from operator import index

import torch
from torch import Tensor

from fitformer._support.checks import shown
from fitformer.errors import InputError

Size = int | Sequence[int]

AXES = {"f": "frames", "h": "rows", "w": "columns"}
MOST_SIDE, MOST_CHANNELS = 10**8, 2**20
ORDERS = ("raster", "snake")


def inverse_pattern(pattern: str) -> str:
    """Read an einops pattern from right to left: the inverse of a rearrangement."""
    return " -> ".join(reversed(pattern.split(" -> ")))


def format_size(sides: Iterable[int]) -> str:
    """A size as text: `8 x 16`."""
    return " x ".join(str(side) for side in sides)


def to_sides(size: Size, axes: str, name: str = "a size") -> tuple[int, ...]:
    """Sides of a size, one for each letter of `axes`; `name` is what errors call it.

    Raises:
        InputError: not one positive whole number, nor one for each axis.
    """
    try:
        sides = tuple(index(side) for side in (size if isinstance(size, Sequence) else [size] * len(axes)))
    except TypeError:
        sides = ()
    if sides and max(sides) > MOST_SIDE:
        raise InputError(f"{name} is {shown(size)}; sides are at most {MOST_SIDE}")
    if len(sides) != len(axes) or min(sides) < 1:
        names = ", ".join(AXES[axis] for axis in axes)
        raise InputError(f"{name} is {shown(size)}; it must be one positive whole number or ({names})")
    return sides


def axis_lengths(whole: Size, group: Size, patch: Size, axes: str) -> dict[str, int]:
    """Lengths of the axes of a pattern: gX groups of X patches of pX pixels for each X of `axes`.

    Raises:
        InputError: patches that do not divide groups, or groups that do not divide the whole.
    """
    what = "a video" if "f" in axes else "an image"
    lengths: dict[str, int] = {}
    sizes = {f"{what.split()[1]}_size": whole, "group_size": group, "patch_size": patch}
    sides = (to_sides(size, axes, name) for name, size in sizes.items())
    for axis, size, of_group, of_patch in zip(axes, *sides, strict=True):
        unit = AXES[axis]
        if of_group == size:
            check_divisible(size, of_patch, (what, "patches", unit))
        check_divisible(of_group, of_patch, ("a group", "patches", unit), within=size)
        check_divisible(size, of_group, (what, "groups", unit), multiple=of_patch)
        lengths |= {f"g{axis}": size // of_group, axis: of_group // of_patch, f"p{axis}": of_patch}
    return lengths


def map_sizes(lengths: dict[str, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Sizes of a feature map and of its groups: it is an image whose pixels are the patches."""
    h, w = lengths["h"], lengths["w"]
    return (lengths["gh"] * h, lengths["gw"] * w), (h, w)


def check_divisible(whole: int, part: int, words: tuple[str, str, str], within: int = 0, multiple: int = 1) -> None:
    """Check that `part` divides `whole`; `words` name one whole, the parts and their unit.

    Raises:
        InputError: it does not; names the nearest wholes (dividing `within`) and parts (a `multiple`) that do.
    """
    if whole % part == 0:
        return
    one, parts, unit = words
    around = [whole // part * part, whole // part * part + part] if within == 0 else _divisors(within)
    wholes = _nearest(whole, [size for size in around if size and size % part == 0 and size <= whole + part])
    pieces = _nearest(part, [size for size in _divisors(whole) if size % multiple == 0])
    ways = [f"{wholes} {unit} would do"] * bool(wholes) + [f"{parts} of {pieces} {unit} would do"] * bool(pieces)
    raise InputError(f"{one} of {whole} {unit} does not divide into {parts} of {part}; {', or '.join(ways)}")


def _divisors(number: int) -> list[int]:
    """All divisors, in their order."""
    small = [size for size in range(1, isqrt(number) + 1) if number % size == 0]
    return small + [number // size for size in reversed(small) if size * size != number]


def _nearest(size: int, sizes: list[int]) -> str:
    below, above = [s for s in sizes if s < size], [s for s in sizes if s > size]
    return " or ".join(str(s) for s in below[-1:] + above[:1])


def check_axes(x: Tensor, what: str, axes: int) -> None:
    """Check the number of axes of `x`.

    Raises:
        InputError: it has another number.
    """
    if x.ndim != axes:
        raise InputError(f"{what} have {axes} axes; got shape {tuple(x.shape)}")


def check_groups(x: Tensor, lengths: dict[str, int]) -> None:
    """Check that `x` is `(b, t, n, pixels * channels)` for the lengths of a cut.

    Raises:
        InputError: it is not.
    """
    t = prod([length for axis, length in lengths.items() if axis.startswith("g")])
    n = prod([length for axis, length in lengths.items() if axis in AXES])
    pixels = prod([length for axis, length in lengths.items() if axis.startswith("p")])
    if x.ndim != 4 or tuple(x.shape[1:3]) != (t, n) or x.shape[3] % pixels:
        width = "c" if pixels == 1 else f"a multiple of {pixels}"
        raise InputError(f"groups of shape {tuple(x.shape)} where these sizes make (b, {t}, {n}, {width})")


def reorder(x: Tensor, lengths: dict[str, int], order: str) -> Tensor:
    """Change the order of the patches of groups `(b, t, n, c)` from `raster` to `order`, or back.

    `snake` reverses every second row of patches, which undoes itself: one function serves both ways.

    Raises:
        InputError: an unknown order.
    """
    if order not in ORDERS:
        raise InputError(f"unknown order of patches {order!r}; known are {' and '.join(ORDERS)}")
    if order == "raster":
        return x
    h, w = lengths["h"], lengths["w"]
    coords = torch.arange(h * w, device=x.device).view(h, w)
    odd = torch.arange(h, device=x.device)[:, None] % 2 == 1
    return x[:, :, torch.where(odd, coords.flip(1), coords).flatten()]
