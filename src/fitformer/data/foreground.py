"""Foreground: the groups of an image that are not empty, by a threshold against the background or by a mask file."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil

import numpy as np

from fitformer.data.background import Background, band_of, has_no_data
from fitformer.data.readers.area_resize import Overlap, overlap
from fitformer.data.readers.lazy import LazyImage, open_image
from fitformer.data.readers.levels import Pixels, blocks
from fitformer.data.symmetry import DIHEDRAL, IDENTITY, Symmetry
from fitformer.errors import InputError
from fitformer.patching.sizes import Size, to_sides

# Pixels that a coarse scan has at least along the side of a group.
_COARSE = 16


def foreground_groups(
    image: LazyImage,
    group_size: Size,
    *,
    background: Background | None = None,
    tolerance: float = 0.1,
    mask: str | os.PathLike[str] | None = None,
    min_foreground: float = 0.0,
    exact: bool = True,
) -> np.ndarray:
    """The groups with foreground, bool (group rows, group columns); groups at the edges may reach beyond the image.

    A pixel is foreground if one of its channels is further from `background` than `tolerance`, a share of the range
    (255 or 65535; 1 for floats, of which NaN is background). The background `auto` is the image's own: the commonest
    colour of pixels spread evenly over it, within its noise, at most `tolerance`. With a `mask`, an image of the same
    size or an even reduction of it, a pixel that is not zero there is foreground. A group counts if more than the share
    `min_foreground` of its pixels inside the image is foreground, by each of the two that is given; without either, all
    groups count. Pixels that the file says have no data (of a GeoTIFF), and absent patches of a slide's features, are
    background whatever is given. In a mask they are not drawn, nor are NaN, and a palette counts by its numbers, not
    its colours.

    All pixels are scanned, block by block: with `min_foreground` 0 not even a single one is missed. With `exact` off, a
    reduction that is stored in the file stands for them, where there is one with 16 pixels along a group's side:
    faster, but details smaller than its pixels are missed.

    Raises:
        InputError: a mask of another shape, a background of other channels, a share outside [0, 1).
    """
    found = foreground_groups_transformed(
        image,
        group_size,
        (IDENTITY,),
        background=background,
        tolerance=tolerance,
        mask=mask,
        min_foreground=min_foreground,
        exact=exact,
    )
    return found[IDENTITY]


def foreground_groups_transformed(
    image: LazyImage,
    group_size: Size,
    symmetries: Sequence[Symmetry] = DIHEDRAL,
    *,
    background: Background | None = None,
    tolerance: float = 0.1,
    mask: str | os.PathLike[str] | None = None,
    min_foreground: float = 0.0,
    exact: bool = True,
) -> dict[Symmetry, np.ndarray]:
    """`foreground_groups` of an image and its mask under each of several symmetries, in one scan.

    The groups of a turned image are other ones, not the same ones elsewhere: they are counted from another edge, and
    if their sides differ, a quarter turn lays them across.

    Raises:
        InputError: as `foreground_groups`.
    """
    _check_shares(min_foreground=min_foreground, tolerance=tolerance)
    rows, columns = to_sides(group_size, "hw")
    size = image.shape[:2]
    narrowest = [min(sides) for sides in zip(*(each.sides(rows, columns) for each in symmetries))]
    scans = _scans(
        image,
        _edges(size, (rows, columns), symmetries),
        narrowest=(narrowest[0], narrowest[1]),
        background=background,
        tolerance=tolerance,
        mask=mask,
        exact=exact,
    )
    return {each: _occupied(scans, each, size, (rows, columns), min_foreground) for each in symmetries}


def foreground_windows(
    image: LazyImage,
    tops: np.ndarray,
    lefts: np.ndarray,
    side: int,
    *,
    background: Background | None = None,
    tolerance: float = 0.1,
    mask: str | os.PathLike[str] | None = None,
    min_foreground: float = 0.0,
    exact: bool = True,
) -> np.ndarray:
    """The square windows with foreground, bool (tops, lefts), as `foreground_groups` finds groups; they may overlap.

    Args:
        image: the image.
        tops, lefts: rows and columns where windows begin, ascending, inside the image. side: of a window, in pixels;
            what of it lies beyond the image does not count.
        background, tolerance, mask, min_foreground, exact: as of `foreground_groups`.

    Raises:
        InputError: as `foreground_groups`.
    """
    _check_shares(min_foreground=min_foreground, tolerance=tolerance)
    starts, size = (tops, lefts), image.shape[:2]
    spans = [(start, np.minimum(start + side, length)) for start, length in zip(starts, size)]
    down, across = (np.unique([0, length, *start, *end]) for (start, end), length in zip(spans, size))
    found = np.ones((len(tops), len(lefts)), dtype=bool)
    for scan in _scans(
        image,
        (down, across),
        narrowest=(side, side),
        background=background,
        tolerance=tolerance,
        mask=mask,
        exact=exact,
    ):
        found &= scan.window_shares(spans) > min_foreground
    return found


def _check_shares(**shares: float) -> None:
    for name, share in shares.items():
        if not 0 <= share < 1:
            raise InputError(f"{name} is {share}: a share from 0 to below 1")


def _scans(
    image: LazyImage,
    edges: tuple[np.ndarray, np.ndarray],
    *,
    narrowest: tuple[int, int],
    background: Background | None,
    tolerance: float,
    mask: str | os.PathLike[str] | None,
    exact: bool,
) -> "list[_Scan]":
    """A scan of the image and one of its mask, where they are asked for; `narrowest` are the sides to be resolved."""
    scans = []
    nodata, presence = getattr(image, "nodata", None), getattr(image, "presence", None)
    if background is None and presence is not None:
        # What there is of its features need not be read.
        scans.append(_scan(presence, _is_there, edges))
    elif background is not None or nodata is not None:
        bounds = None
        if background is not None:
            bounds = band_of(image, background, tolerance, str(getattr(image, "path", "the image")))
        scans.append(
            _scan(
                image if exact else _reduced(image, *narrowest), partial(_differs, bounds=bounds, nodata=nodata), edges
            )
        )
    if mask is not None:
        with open_mask(mask) as drawn:
            check_mask(drawn, image)
            scans.append(_scan(drawn, partial(_drawn, nodata=drawn.nodata), edges))
    return scans


def _differs(pixels: np.ndarray, bounds: tuple[np.ndarray, np.ndarray] | None, nodata: np.ndarray | None) -> np.ndarray:
    """Pixels with data that lie outside the lowest and highest level of the background."""
    outside = np.full(pixels.shape[:2], bounds is None)
    if bounds is not None:
        # Channel by channel: over the short last axis numpy takes three times as long.
        for channel, (lowest, highest) in enumerate(zip(*bounds)):
            outside |= pixels[..., channel] < lowest
            outside |= pixels[..., channel] > highest
    return outside if nodata is None else outside & ~has_no_data(pixels, nodata)


def _is_there(presence: np.ndarray) -> np.ndarray:
    """Pixels (rows, columns) of an image's presence."""
    return presence[..., 0]


def open_mask(path: str | os.PathLike[str]) -> LazyImage:
    """A mask by its header; if it has a palette, its pixels are numbers in it, as it is drawn.

    Raises:
        InputError: it is missing, broken, or of a kind that cannot be read.
    """
    return open_image(path, palette_indices=True)


def _drawn(pixels: np.ndarray, nodata: np.ndarray | None) -> np.ndarray:
    """Pixels of a mask that are neither zero nor NaN; the fourth of four channels is alpha and is ignored."""
    colours = pixels[..., :3] if pixels.shape[2] == 4 else pixels
    drawn = np.asarray(((colours != 0) & (colours == colours)).any(axis=2))
    return drawn if nodata is None else drawn & ~has_no_data(pixels, nodata)


def _reduced(image: LazyImage, rows: int, columns: int) -> Pixels:
    """The smallest stored reduction that still shows a group of that size, or the image itself."""
    wanted = (ceil(side * _COARSE / group) for side, group in zip(image.shape, (rows, columns)))
    return next(iter(image.reductions(*wanted)), image)


@dataclass(frozen=True)
class _Scan:
    """Foreground `found` in each cell between `edges` (of rows, of columns, in pixels), and the cell's `whole` area."""

    edges: tuple[np.ndarray, np.ndarray]
    found: np.ndarray
    whole: np.ndarray

    def shares(self, symmetry: Symmetry, group: tuple[int, int]) -> np.ndarray:
        """The share of foreground in each group of the turned image."""
        return np.asarray(self._by_groups(self.found, symmetry, group) / self._by_groups(self.whole, symmetry, group))

    def window_shares(self, spans: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        """The share of foreground in windows that begin and end at these edges, of rows and of columns."""
        return np.asarray(self._by_windows(self.found, spans) / self._by_windows(self.whole, spans))

    def _by_windows(self, cells: np.ndarray, spans: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        for axis, (edges, span) in enumerate(zip(self.edges, spans)):
            # Sums from each start to its end, in turn with what follows; the last end is beyond the cells.
            places = np.searchsorted(edges, np.stack(span, axis=1)).ravel()
            padded = np.pad(cells, [(0, int(k == axis)) for k in range(2)])
            cells = np.add.reduceat(padded, places, axis).take(np.arange(0, len(places), 2), axis)
        return cells

    def _by_groups(self, cells: np.ndarray, symmetry: Symmetry, group: tuple[int, int]) -> np.ndarray:
        added = symmetry.turn(cells)
        turned = self.edges[::-1] if symmetry.transposed else self.edges
        for axis, (edges, side, backwards) in enumerate(zip(turned, group, symmetry.backwards)):
            edges = edges[-1] - edges[::-1] if backwards else edges
            added = np.add.reduceat(added, np.searchsorted(edges, np.arange(0, edges[-1], side)), axis)
        return added


def _edges(
    size: tuple[int, int], group: tuple[int, int], symmetries: Sequence[Symmetry]
) -> tuple[np.ndarray, np.ndarray]:
    """Where the groups of an image end, turned in any of these ways: in its own rows and columns, ends included."""
    edges: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for symmetry in symmetries:
        for axis, (length, side, backwards) in enumerate(zip(symmetry.sides(*size), group, symmetry.backwards)):
            ends = np.minimum(np.arange(ceil(length / side) + 1, dtype=np.int64) * side, length)
            edges[axis ^ symmetry.transposed].append(length - ends if backwards else ends)
    return np.unique(np.concatenate(edges[0])), np.unique(np.concatenate(edges[1]))


def _scan(
    source: Pixels, is_foreground: Callable[[np.ndarray], np.ndarray], edges: tuple[np.ndarray, np.ndarray]
) -> _Scan:
    """One scan of all pixels of a source, which lie evenly over the image between these edges."""
    down, across = (_over_cells(count, ends) for count, ends in zip(source.shape, edges))
    whole = np.outer(*(np.bincount(each.bins, each.lengths) for each in (down, across)))
    found = np.zeros(whole.shape)
    for top, left, height, width in blocks(source):
        part, row = down.sums(is_foreground(source.window(top, left, height, width)), top)
        part, column = across.sums(part.T, left)
        found[row : row + part.shape[1], column : column + part.shape[0]] += part.T
    return _Scan(edges, found, whole)


def _over_cells(count: int, edges: np.ndarray) -> Overlap:
    """Overlap of `count` evenly spread pixels of a source with the cells between edges."""
    return overlap(np.arange(count + 1, dtype=np.int64) * edges[-1], edges * count)


def _occupied(
    scans: Sequence[_Scan], symmetry: Symmetry, size: tuple[int, int], group: tuple[int, int], min_foreground: float
) -> np.ndarray:
    """The groups of the turned image of which every scan found more than the share `min_foreground`."""
    rows, columns = (ceil(length / side) for length, side in zip(symmetry.sides(*size), group))
    found = np.ones((rows, columns), dtype=bool)
    for scan in scans:
        found &= scan.shares(symmetry, group) > min_foreground
    return found


def check_mask(mask: LazyImage, image: LazyImage) -> None:
    """Raise InputError if a mask does not have the size of its image, or that divided by one number."""
    (rows, columns), (of_rows, of_columns) = image.shape[:2], mask.shape[:2]
    # The factors that lead from one size to the other, rounded up or down.
    least = max(rows / (of_rows + 1), columns / (of_columns + 1))
    most = min(rows / max(of_rows - 1, 1e-9), columns / max(of_columns - 1, 1e-9))
    if of_rows > rows or of_columns > columns or not least < most:
        raise InputError(
            f"the mask {mask.path} has {of_rows} x {of_columns} pixels and {image.path} {rows} x {columns}: a mask has "
            f"the size of its image, or that divided by one number"
        )
