"""What a classifier's run is used for: labels of image files, and for images of any size explanations of them."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from fitformer.data.build import open_options
from fitformer.data.decoding import UnreadableImageError
from fitformer.data.grouping import Grouping
from fitformer.data.masks import Masks, masks_of
from fitformer.errors import InputError
from fitformer.execution import Streamed
from fitformer.execution.token_store import Keep
from fitformer.inference.explain.batch import Slides, find, identity
from fitformer.inference.predict import Prediction, expand, predict
from fitformer.models.image_encoder import FITImageEncoder
from fitformer.training.run_dir import Run


class Labeller:
    """A run of a classifier and its model, on the device where the model is.

    Args:
        run: its recipe says how images are brought to one size, or which groups of images of any size are empty.
        network: the exported model of the run.
    """

    def __init__(self, run: Run, network: FITImageEncoder) -> None:
        self.run, self.network = run, network
        # Of a task that the verb `predict` serves, which reads images.
        self.recipe: Any = run.recipe

    @property
    def takes_any_size(self) -> bool:
        """Whether images are read piece by piece, whatever their size."""
        return self.network.patch_grid.any_size

    def stream(self, keep: Keep | None = None, scratch: str | None = None) -> None:
        """Read images piece by piece, also where the run was trained otherwise.

        Args:
            keep: where data tokens are kept between blocks; by default as in the recipe.
            scratch: folder for them on disk; by default as in the recipe.

        Raises:
            InputError: a scratch folder for tokens that are kept elsewhere.
        """
        training = self.recipe.trainer
        keep = keep or ("disk" if scratch else training.keep)
        if scratch and keep != "disk":
            raise InputError(f"--scratch is for data tokens on disk, and --keep is {keep}; leave one of them out")
        folder = scratch or training.scratch
        self.network.set_execution(Streamed(training.slice_groups, keep, training.keep_precision, folder))

    def label(
        self, paths: Iterable[str | Path], batch_size: int, on_unreadable: Callable[[UnreadableImageError], None]
    ) -> list[Prediction]:
        """The labels of image files, and of all image files below folders; see `predict`.

        Raises:
            InputError: no image file, none that can be read, or masks that do not go with them.
        """
        files = [slide.path for slide in find(paths)] if self.takes_any_size else expand(paths)
        self._masks(files)
        found = predict(
            self.network,
            files,
            self.run.classes,
            resize=self.recipe.data.resize,
            options=open_options(self.recipe.data),
            batch_size=batch_size,
            group=self._grouping(),
            on_unreadable=on_unreadable,
        )
        return list(found)

    def explain(self, paths: Iterable[str | Path], output: Path, **options: Any) -> tuple[Slides, int, int]:
        """Label images of any size and write their maps into a folder; goes on where it was stopped.

        Args:
            paths: files and folders. output: the folder.
            options: `y`, `show` and `on_broken` of `Slides`.

        Returns:
            the work, how many images there are, and how many were made now.

        Raises:
            InputError: as `Slides.run`, or masks that do not go with the images.
        """
        slides = find(paths, output)
        masks, data = self._masks([slide.path for slide in slides]), self.recipe.data
        made_with = {
            "model": identity(self.run.model_folder),
            # As JSON gives it back.
            "background": list(data.background) if isinstance(data.background, tuple) else data.background,
            **{name: getattr(data, name) for name in ("tolerance", "min_foreground", "masks")},
        }
        beside = None if masks is None else masks.state
        group = self._grouping()
        work = Slides(self.network, self.run.classes, output, made_with, group=group, beside=beside, **options)
        return work, len(slides), work.run(slides)

    def _grouping(self) -> Grouping:
        network = self.network
        return Grouping(network.patch_grid, network.glimpses, self.recipe.data, trained=self.run.pixels)

    def _masks(self, files: Sequence[Path]) -> Masks | None:
        """The masks of the run's data, none of which two of these images share."""
        masks = masks_of(self.recipe.data)
        if masks is not None:
            masks.check_shared(files)
        return masks
