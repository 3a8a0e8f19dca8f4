"""A run of a model of images, and how it reads the files that it is used on."""

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fitformer.data.build import open_options
from fitformer.data.decoding import UnreadableImageError
from fitformer.data.grouping import Grouping
from fitformer.data.masks import Masks, masks_of
from fitformer.data.readers import LazyImage
from fitformer.errors import InputError
from fitformer.execution import Streamed
from fitformer.execution.token_store import Keep
from fitformer.inference.find import Slide
from fitformer.inference.predict import Example, name_of, paths_of
from fitformer.training.run_dir import Run

Made = dict[str, Any]
Ways = dict[str, Any]

# Settings of the data that say what of images of any size a model sees.
WHAT_IS_READ = ("background", "tolerance", "background_patches", "min_foreground", "masks", "pixel_range", "channels")


class ImageRun:
    """A run of a model that reads images, on the device where the model is.

    Args:
        run: its recipe says how images are brought to one size, or which groups of images of any size are empty.
        network: the exported model of the run.
    """

    def __init__(self, run: Run, network: Any) -> None:
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

    def _of_any_size(self, slides: Iterable[Slide]) -> tuple[Made, Ways]:
        """What outputs of images of any size depend on beside the model, and how they are read.

        Raises:
            InputError: masks that do not go with the images.
        """
        masks, data = self._masks([slide.path for slide in slides]), self.recipe.data
        made_with = {name: as_json(getattr(data, name)) for name in WHAT_IS_READ}
        opened = partial(LazyImage, options=open_options(data))
        beside = None if masks is None else masks.state
        return made_with, {"group": self._grouping(), "beside": beside, "open": opened}

    def _grouping(self) -> Grouping:
        network = self.network
        return Grouping(network.patch_grid, network.glimpses, self.recipe.data, trained=self.run.pixels)

    def _without_mask(self, example: Example) -> UnreadableImageError | None:
        """A fault of an example with an array, which has no name to find a mask by, where the run has masks."""
        images = example if isinstance(example, tuple) else (example,)
        if self.takes_any_size and self.recipe.data.masks is not None and len(paths_of(example)) < len(images):
            return UnreadableImageError(
                name_of(example), "the run has data.masks, which are found by an image's path: give its file"
            )
        return None

    def _masks(self, files: Sequence[Path]) -> Masks | None:
        """The masks of the run's data, none of which two of these images share."""
        masks = masks_of(self.recipe.data)
        if masks is not None:
            masks.check_shared(files)
        return masks


def as_json(value: Any) -> Any:
    """A setting as JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value
