"""The contents of a batch, constructor arguments from a recipe, and checks that several tasks make."""

from dataclasses import asdict
from typing import Any, TypedDict

from torch import Tensor

from fitformer.config.schema import Model
from fitformer.errors import InputError


class Batch(TypedDict, total=False):
    """A collated batch of images or of tokens.

    Attributes:
        image: uint8 `(b, H, W, ch)`, or a list of images that are read on demand.
        label: int64 `(b,)`, -1 where unknown; or float32 `(b, k)`, the numbers of a table.
        index: int64 `(b,)`, the number of the example.
        tokens: int64 `(b, L)`. mask: bool `(b, L)`, true where a token counts.
        documents: int64 `(b, t)`, the number of each group's document, see `patching.pack_documents`.
    """

    image: Any
    label: Tensor
    index: Tensor
    tokens: Tensor
    mask: Tensor
    documents: Tensor


def arguments(model: Model, *drop: str) -> dict[str, Any]:
    """Arguments of `from_preset`: the fields of a model section that are not None, without `preset` and `drop`."""
    return {key: value for key, value in asdict(model).items() if value is not None and key not in {"preset", *drop}}


def one_size(recipe: Any) -> int | tuple[int, int]:
    """The image size of a recipe whose task needs one size and skips no groups.

    Raises:
        InputError: `data.image_size` is null (images of any size), or `data.background` or `data.masks` is set.
    """
    if recipe.data.background != "none" or recipe.data.masks is not None:
        name = "masks" if recipe.data.background == "none" else "background"
        raise InputError(f"the task {recipe.task} skips no groups; remove data.{name}")
    if recipe.data.image_size is None:
        raise InputError(f"data.image_size is null; the task {recipe.task} needs images of one size, such as 32")
    return recipe.data.image_size


def need_classes(dataset: Any, what: str) -> int:
    """The number of classes of a dataset.

    Raises:
        InputError: it has none; `what` names what needs them.
    """
    if not dataset.classes:
        raise InputError(f"{what} needs classes, and the data have none: {dataset.describe()}")
    return len(dataset.classes)


def need_no_levels(recipe: Any) -> None:
    """Check that pixels are read as 0 .. 255.

    Raises:
        InputError: `data.levels` is set.
    """
    if recipe.data.levels is not None:
        raise InputError(
            f"data.levels is {recipe.data.levels}; the task {recipe.task} needs pixel values 0 to 255: "
            "remove data.levels"
        )
