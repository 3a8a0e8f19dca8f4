"""What a batch holds, and how a recipe's model section becomes constructor arguments."""

from dataclasses import asdict
from typing import Any, TypedDict

from torch import Tensor

from fitformer.config.schema import Model
from fitformer.errors import InputError


class Batch(TypedDict, total=False):
    """A collated batch: of images, or of tokens.

    Attributes:
        image: uint8 `(b, H, W, ch)`, or a list of lazily read images.
        label: int64 `(b,)`, -1 where unknown. index: int64 `(b,)`, the example's number.
        tokens: int64 `(b, L)`. mask: bool `(b, L)`, true where a token counts.
    """

    image: Any
    label: Tensor
    index: Tensor
    tokens: Tensor
    mask: Tensor


def arguments(model: Model, *drop: str) -> dict[str, Any]:
    """A model section as arguments of `from_preset`: what departs from the preset, without the keys in `drop`."""
    return {key: value for key, value in asdict(model).items() if value is not None and key not in {"preset", *drop}}


def one_size(recipe: Any) -> int | tuple[int, int]:
    """The one size of a recipe's images, none of whose groups is skipped.

    Raises:
        InputError: `data.image_size` is null, images of any size; or `data.background` or `data.masks` is set.
    """
    if recipe.data.background != "none" or recipe.data.masks is not None:
        name = "masks" if recipe.data.background == "none" else "background"
        raise InputError(f"data.{name} is for the task classify: the task {recipe.task} skips no groups; remove it")
    if recipe.data.image_size is None:
        raise InputError(f"data.image_size is null; the task {recipe.task} needs images of one size")
    return recipe.data.image_size


def need_classes(dataset: Any, what: str) -> int:
    """The number of classes of a dataset.

    Raises:
        InputError: it has none, and `what` needs them.
    """
    if not dataset.classes:
        raise InputError(f"{what} needs classes, and the data have none: {dataset.describe()}")
    return len(dataset.classes)


def need_no_levels(recipe: Any) -> None:
    """Refuse a number of pixel levels where pixels are read as 0 .. 255.

    Raises:
        InputError: `data.levels` is set.
    """
    if recipe.data.levels is not None:
        raise InputError(
            f"data.levels is {recipe.data.levels}, which only the task autoregress reads; "
            f"remove it for the task {recipe.task}"
        )
