"""What a segmenter's run is used for: the class of every pixel of image files."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fitformer.data.decoding import UnreadableImageError, decode, suffixes
from fitformer.errors import InputError, require
from fitformer.inference.find import Shard, find
from fitformer.inference.folder_work import Tell
from fitformer.inference.identity import identity
from fitformer.inference.image_run import ImageRun, as_json
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
        if self.takes_any_size:
            slides, made_with, ways = self._of_any_size(paths, output)
            group, folder = ways.pop("group"), scratch or self.recipe.trainer.scratch

            def label(image: Any, tell: Tell) -> LabelMap:
                how: dict[str, Any] = {"probabilities": probabilities, "folder": folder, "tell": tell}
                return labels_of(self.network, group(image), **how)

        else:
            data = self.recipe.data
            slides, ways = find(paths, output, suffixes()), {"open": self._decoded}
            made_with = {name: as_json(getattr(data, name)) for name in ("resize", "pixel_range")}

            def label(image: Any, tell: Tell) -> LabelMap:
                return labels_of_fitted(self.network, image.pixels, data.resize, probabilities=probabilities)

        slides = slides if shard is None else shard.of(slides)
        classes: Sequence[str] = self.run.classes
        colours = self.recipe.data.colours or class_colours(len(classes))
        asked = {"probabilities": probabilities, "polygons": polygons, "alone": shard is None, **options}
        made_with = {"model": identity(self.network), **made_with}
        work = Segmentations(label, classes, colours, output, made_with, **ways, **asked)
        return work, len(slides), work.run(slides)

    @contextmanager
    def _decoded(self, path: Path) -> Iterator["_Decoded"]:
        """An image file as it is decoded for a model of one size, before it is brought there.

        Raises:
            InputError: it is missing or no image.
        """
        try:
            yield _Decoded(path, decode(path, str(path), self.network.channels, self.recipe.data.pixel_range))
        except UnreadableImageError as fault:
            raise InputError(str(fault)) from fault


class _Decoded(PixelArray):
    """A decoded image that knows its file, whose coordinates its label map takes over."""

    def __init__(self, path: Path, pixels: Any) -> None:
        super().__init__(pixels)
        self.path = str(path)
