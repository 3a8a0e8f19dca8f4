"""The contents of a batch, constructor arguments from a recipe, and checks that several tasks make."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal, TypedDict

import numpy as np
from torch import Tensor

from fitformer.config.model_sections import Model
from fitformer.errors import InputError


class Batch(TypedDict, total=False):
    """A collated batch of images or of tokens.

    Attributes:
        image: uint8 `(b, H, W, ch)`, or a list of images that are read on demand.
        labels: classes of pixels, uint8 `(b, H, W)`, or a list of label images that are read on demand.
        label: int64 `(b,)`, -1 where unknown; or float32 `(b, k)`, the numbers of a table.
        index: int64 `(b,)`, the number of the example.
        short: int64 `(b, k, l)`, k shorter examples that may take the place of each.
        tokens: int64 `(b, L)`. mask: bool `(b, L)`, true where a token counts.
        documents: int64 `(b, t)`, the number of each group's document, see `patching.pack_documents`.
        done: the share of the training's steps that were made before this one; not there in evaluation.
    """

    image: Any
    labels: Any
    label: Tensor
    index: Tensor
    short: Tensor
    tokens: Tensor
    mask: Tensor
    documents: Tensor
    done: float


def arguments(model: Model, *drop: str) -> dict[str, Any]:
    """Arguments of `from_preset`: the fields of a model section that are not None, without `drop`.

    `preset` and `initialization` are no such arguments: the one names the sizes, the other the weights afterwards.
    """
    left_out = {"preset", "initialization", *drop}
    return {key: value for key, value in asdict(model).items() if value is not None and key not in left_out}


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


def size_of_model(recipe: Any) -> int | tuple[int, int] | None:
    """The image size of a model of images; None for images of any size, which `row_column` positions ask for.

    Raises:
        InputError: settings of images of any size for a model of one size, or masks of images that are not read lazily.
    """
    data = recipe.data
    if recipe.model.latent_position == "row_column":
        if data.masks is not None and data.image_size is not None:
            raise InputError("data.masks are those of image files of any size; set data.image_size to null")
        return None
    asked = {"image_size: null": data.image_size is None, "background": data.background != "none", "masks": data.masks}
    if named := [name for name, is_asked in asked.items() if is_asked]:
        raise InputError(
            f"data.{named[0]} is for models of images of any size; set model.latent_position to row_column"
        )
    size: int | tuple[int, int] = data.image_size
    return size


def scaled_weights(
    weights: Literal["balanced"] | Sequence[float], counts: np.ndarray, classes: Sequence[str], what: str
) -> tuple[float, ...]:
    """Weights of classes whose mean over what is trained on is 1; `balanced` ones are inverse to its `counts`.

    Raises:
        InputError: another number of weights than of classes, or balanced ones of a class without any of `what`.
    """
    if weights != "balanced" and len(weights) != len(counts):
        raise InputError(f"objective.class_weights has {len(weights)} numbers, and there are {len(counts)} classes")
    if weights == "balanced" and not counts.all():
        names = [name for name, count in zip(classes, counts) if not count]
        raise InputError(f"objective.class_weights is balanced, and there are no {what} to train on of {names}")
    raw = 1 / counts if weights == "balanced" else np.array(weights)
    return tuple((raw * counts.sum() / (raw * counts).sum()).tolist())
