"""Images as the groups of a model of any size, without those that hold nothing; made where data are read."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import get_worker_info

from fitformer.data.dihedral import TransformedImage
from fitformer.data.foreground import foreground_groups_transformed
from fitformer.data.foreground_cache import Grids, cached, file_identity
from fitformer.data.masks import Masks
from fitformer.data.readers import LazyImage
from fitformer.data.settings import ImageData
from fitformer.data.symmetry import IDENTITY, Symmetry
from fitformer.errors import EmptyImageError
from fitformer.patching import PatchGrid
from fitformer.patching.any_size import GroupedImage, PixelArray, PixelSource, check_pixels
from fitformer.patching.joined_images import JoinedImages
from fitformer.patching.sizes import Size, to_sides

# A worker reads the groups of an image ahead if they are at most so many bytes; larger ones are read slice by slice.
MOST_READ_AHEAD = 64 * 2**20


@dataclass(frozen=True)
class Grouping:
    """How images become groups.

    Attributes:
        patch_grid, glimpses: the model's cut, and its copies of the whole image.
        settings: say which groups are background or masked out; None for none.
        symmetries: in which an image may be turned; one scan serves them all.
        trained: the type of the pixels that the model was trained on; None for any.
    """

    patch_grid: PatchGrid
    glimpses: int = 0
    settings: ImageData | None = None
    symmetries: Sequence[Symmetry] = (IDENTITY,)
    trained: np.dtype | None = None

    def __call__(self, image: Tensor | PixelSource | tuple[PixelSource, ...]) -> GroupedImage:
        """An image as groups, or all images of a patient; in a worker process, with pixels read unless too many.

        Raises:
            InputError: other channels than the model's, other pixels than it was trained on, no mask, a broken file.
            EmptyImageError: nothing but background, or masked out.
        """
        if isinstance(image, tuple):
            return self._joined(image)
        source = PixelArray(image) if isinstance(image, Tensor) else image
        if self.trained is not None:
            check_pixels(str(getattr(source, "path", "an image")), source.dtype, self.trained)
        grouped = GroupedImage(source, self.patch_grid, self._groups(source), self.glimpses, self._patches(source))
        if get_worker_info() is not None and grouped.nbytes <= MOST_READ_AHEAD:
            grouped.read_ahead()
        return grouped

    def _joined(self, images: tuple[PixelSource, ...]) -> JoinedImages:
        """The images of a patient, without those that hold nothing.

        Raises:
            EmptyImageError: none holds anything.
        """
        grouped, blank = [], []
        for image in images:
            try:
                grouped.append(self(image))
            except EmptyImageError as error:
                blank.append(str(error))
        if not grouped:
            raise EmptyImageError("; ".join(blank))
        return JoinedImages(grouped)

    def _groups(self, source: Any) -> np.ndarray | None:
        """The groups that hold something; None for all, or where what their patches hold says it."""
        settings = self.settings
        if settings is None or (settings.background_patches and not settings.min_foreground):
            return None
        return self._foreground(source, settings, self.patch_grid.group_size, settings.min_foreground)

    def _patches(self, source: Any) -> np.ndarray | None:
        """The patches that hold something; None for all."""
        settings = self.settings
        if settings is None or not settings.background_patches:
            return None
        return self._foreground(source, settings, self.patch_grid.patch_size, 0.0)

    def _foreground(self, source: Any, settings: ImageData, size: Size, least: float) -> np.ndarray | None:
        """The cells of a size of which a larger share than the least is something; None for all."""
        turned = isinstance(source, TransformedImage)
        image, symmetry = (source.source, source.symmetry) if turned else (source, IDENTITY)
        # An image that says itself where it has pixels has its other groups skipped without a scan.
        scanned = getattr(image, "nodata", None) is not None and getattr(image, "presence", None) is None
        if settings.background == "none" and settings.masks is None and not scanned:
            return None
        if not isinstance(image, LazyImage):
            return _scan(image, settings, (symmetry,), None, size, least)[0]
        symmetries = tuple(self.symmetries) if symmetry in self.symmetries else (symmetry,)
        mask = None if settings.masks is None else Masks(settings.masks).of(image.path)
        grids = cached(
            _identity(image, settings, symmetries, mask, size, least),
            lambda: _scan(image, settings, symmetries, mask, size, least),
        )
        if not all(grid.any() for grid in grids):
            raise EmptyImageError(_empty(image, len(symmetries) > 1, settings, mask))
        return grids[symmetries.index(symmetry)]


def _scan(
    image: Any, settings: ImageData, symmetries: Sequence[Symmetry], mask: Path | None, size: Size, least: float
) -> Grids:
    background = None if settings.background == "none" else settings.background
    found = foreground_groups_transformed(
        image,
        size,
        symmetries,
        background=background,
        tolerance=settings.tolerance,
        mask=mask,
        min_foreground=least,
    )
    return [found[symmetry] for symmetry in symmetries]


def _identity(
    image: LazyImage, settings: ImageData, symmetries: Sequence[Symmetry], mask: Path | None, size: Size, least: float
) -> dict[str, Any]:
    return {
        "image": file_identity(image.path),
        "pixel_range": image.options.pixel_range,
        "channels": image.options.channels,
        "mask": None if mask is None else file_identity(mask),
        "group_size": list(to_sides(size, "hw")),
        "symmetries": [[each.transposed, *each.backwards] for each in symmetries],
        **{name: getattr(settings, name) for name in ("background", "tolerance")},
        "min_foreground": least,
    }


def _empty(image: LazyImage, turned: bool, settings: ImageData, mask: Path | None) -> str:
    """Why an image has no group that holds anything, and the way out."""
    plain = settings.background == "none"
    reasons = [] if plain else [f"background {settings.background}, tolerance {settings.tolerance}"]
    reasons += [] if image.nodata is None else [f"no data where it is {image.nodata.tolist()}"]
    reasons += [f"mask {mask}"] if mask else []
    reasons += [f"min_foreground {settings.min_foreground}"] if settings.min_foreground else []
    change = [", or change data.masks"] * (mask is not None) if plain else [", or change data.tolerance"]
    return (
        f"{image.path}{', as it is turned in training,' if turned else ''} has no group that holds anything "
        f"({', '.join(reasons)}): leave the image out{''.join(change)}"
    )
