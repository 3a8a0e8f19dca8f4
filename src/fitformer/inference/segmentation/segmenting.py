"""What a segmenter's run is used for: the class of every pixel of image files."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fitformer.data.build import open_options
from fitformer.data.decoding import UnreadableImageError, decode, suffixes
from fitformer.errors import InputError, require
from fitformer.inference.find import Shard, find
from fitformer.inference.folder_work import Tell
from fitformer.inference.identity import identity
from fitformer.inference.image_run import ImageRun, as_json
from fitformer.inference.predict import Example, name_of, opened, paths_of
from fitformer.inference.segmentation.colours import class_colours
from fitformer.inference.segmentation.folder import Segmentations
from fitformer.inference.segmentation.label_map import LabelMap, labels_of, labels_of_fitted
from fitformer.models.image_segmenter import FITImageSegmenter
from fitformer.patching.any_size import PixelArray


class Segmenter(ImageRun):
    """A run of a segmenter and its model."""

    network: FITImageSegmenter

    def segment(
        self,
        paths: Iterable[str | Path],
        output: Path,
        shard: Shard | None = None,
        *,
        probabilities: bool = False,
        polygons: bool = True,
        scratch: str | None = None,
        **options: Any,
    ) -> tuple[Segmentations, int, int]:
        """Write the label maps of images into a folder; goes on where it was stopped.

        Args:
            paths: files and folders. output: the folder.
            shard: the part of the images that is this process's; all by default.
            probabilities: also write those of all classes. polygons: also write GeoJSON.
            scratch: folder for the maps of large images; by default as in the recipe.
            options: `y`, `show` and `on_broken` of `Segmentations`.

        Returns:
            the work, how many images there are, and how many were made now.

        Raises:
            InputError: as `FolderWork.run`, masks of foreground that do not go with the images.
            MissingDependencyError: polygons without rasterio, or tiles without tifffile.
        """
        require("tifffile", extra="gigapixel")
        if polygons:
            require("rasterio.features", extra="segment")
        folder = scratch or self.recipe.trainer.scratch

        def label(image: Any, tell: Tell) -> LabelMap:
            return self._labels(image, probabilities, folder, tell)

        if self.takes_any_size:
            slides = find(paths, output)
            made_with, ways = self._of_any_size(slides)
            del ways["group"]
        else:
            data = self.recipe.data
            slides, ways = find(paths, output, suffixes()), {"open": self._decoded}
            made_with = {name: as_json(getattr(data, name)) for name in ("resize", "pixel_range")}
        slides = slides if shard is None else shard.of(slides)
        classes: Sequence[str] = self.run.classes
        colours = self.recipe.data.colours or class_colours(len(classes))
        asked = {"probabilities": probabilities, "polygons": polygons, "alone": shard is None, **options}
        made_with = {"model": identity(self.network), **made_with}
        work = Segmentations(label, classes, colours, output, made_with, **ways, **asked)
        return work, len(slides), work.run(slides)

    def label_each(
        self, images: Sequence[Example], *, probabilities: bool = False, scratch: str | None = None
    ) -> Iterator[LabelMap | UnreadableImageError]:
        """The label map of each image, or why there is none; each is made when it is asked for.

        Args:
            images: files and arrays. probabilities: also those of all classes.
            scratch: folder of large maps, as in `labels_of`; by default as in the recipe.

        Raises:
            InputError: masks of foreground that do not go with the images.
        """
        self._masks([path for image in images for path in paths_of(image)])
        folder = scratch or self.recipe.trainer.scratch
        for image in images:
            if isinstance(image, tuple):
                yield UnreadableImageError(name_of(image), "several images in place of one: each has a label map")
            else:
                yield self._without_mask(image) or self._label_map(image, probabilities, folder)

    def _label_map(
        self, image: Path | np.ndarray, probabilities: bool, folder: str | None
    ) -> LabelMap | UnreadableImageError:
        try:
            with (
                opened(image, open_options(self.recipe.data)) if self.takes_any_size else self._decoded(image) as found
            ):
                return self._labels(found, probabilities, folder)
        except (InputError, PermissionError) as error:
            reason = error.__cause__ if isinstance(error.__cause__, UnreadableImageError) else error
            return (
                reason if isinstance(reason, UnreadableImageError) else UnreadableImageError(name_of(image), str(error))
            )

    def _labels(self, image: Any, probabilities: bool, folder: str | None, tell: Tell = lambda share: None) -> LabelMap:
        """The label map of an image that is open."""
        if self.takes_any_size:
            grouped = self._grouping()(image)
            return labels_of(self.network, grouped, probabilities=probabilities, folder=folder, tell=tell)
        return labels_of_fitted(self.network, image.pixels, self.recipe.data.resize, probabilities=probabilities)

    @contextmanager
    def _decoded(self, image: Path | np.ndarray) -> Iterator["_Decoded"]:
        """An image as it is decoded for a model of one size, before it is brought there.

        Raises:
            InputError: it is missing or no image.
        """
        try:
            yield _Decoded(image, decode(image, name_of(image), self.network.channels, self.recipe.data.pixel_range))
        except UnreadableImageError as fault:
            raise InputError(str(fault)) from fault


class _Decoded(PixelArray):
    """A decoded image that knows its file, whose coordinates its label map takes over."""

    def __init__(self, image: Path | np.ndarray, pixels: np.ndarray) -> None:
        super().__init__(pixels)
        if isinstance(image, Path):
            self.path = str(image)
