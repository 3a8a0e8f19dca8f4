"""Classification: cross-entropy of the class of an image."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from fitformer.config.schema import ClassifyRecipe
from fitformer.data.background import Background
from fitformer.data.dihedral import DIHEDRAL, IDENTITY, SYMMETRIES, Symmetry, TransformedImage
from fitformer.data.foreground import foreground_groups_transformed
from fitformer.data.masks import Masks
from fitformer.data.readers import LazyImage, open_image
from fitformer.data.settings import ImageData
from fitformer.diffusion import pixels_to_signal
from fitformer.errors import EmptyImageError, InputError
from fitformer.models.image_encoder import FITImageEncoder
from fitformer.patching.any_size import GroupedImage, PixelArray, PixelSource, Tiling, check_pixels
from fitformer.patching.sizes import Size
from fitformer.tasks.batch import Batch, arguments, need_classes, need_no_levels
from fitformer.tasks.registry import TaskSpec


def build(recipe: ClassifyRecipe, dataset: Any) -> FITImageEncoder:
    """An image encoder with a head for the dataset's classes; of images of any size with `row_column` positions.

    Raises:
        InputError: data without classes, sizes that do not divide, images of any size for an encoder of one.
    """
    need_no_levels(recipe)
    any_size = recipe.model.latent_position == "row_column"
    if any_size and recipe.data.masks is not None and recipe.data.image_size is not None:
        raise InputError("data.masks are those of image files of any size; set data.image_size to null")
    if not any_size:
        _need_one_size(recipe)
    return FITImageEncoder.from_preset(
        recipe.model.preset,
        image_size=None if any_size else recipe.data.image_size,
        channels=dataset.channels,
        num_classes=need_classes(dataset, "classification"),
        **arguments(recipe.model),
    )


def _need_one_size(recipe: ClassifyRecipe) -> None:
    data = recipe.data
    asked = {"image_size: null": data.image_size is None, "background": data.background != "none", "masks": data.masks}
    if named := [name for name, is_asked in asked.items() if is_asked]:
        raise InputError(
            f"data.{named[0]} is for models of images of any size; set model.latent_position to row_column"
        )


def logits(network: FITImageEncoder, images: Tensor | Sequence[PixelSource], data: ImageData | None = None) -> Tensor:
    """Logits `(b, classes)` of images, which the network sees in [-1, 1].

    Args:
        network: the classifier.
        images: uint8 `(b, H, W, ch)`, or sources of pixels of any size.
        data: says which groups are empty and skipped; none by default.
    """
    if network.groups is not None:
        assert isinstance(images, Tensor)
        return network(pixels_to_signal(images))
    return network([grouped(network, image, data) for image in images])


def grouped(
    network: FITImageEncoder,
    image: Tensor | PixelSource,
    data: ImageData | None = None,
    trained: np.dtype | None = None,
) -> GroupedImage:
    """An image of any size as groups of a network, without those that `data` calls empty.

    Raises:
        InputError: other channels than the network's, other pixels than those it was `trained` on, nothing but empty
            groups, no mask.
    """
    source = PixelArray(image) if isinstance(image, Tensor) else image
    if trained is not None:
        check_pixels(str(getattr(source, "path", "an image")), source.dtype, trained)
    return GroupedImage(source, network.tiling, _occupied(source, network.tiling, data), network.glimpses)


def _occupied(source: Any, tiling: Tiling, data: ImageData | None) -> np.ndarray | None:
    """The groups that hold something, by the settings; None for all."""
    if data is None or (data.background == "none" and data.masks is None):
        return None
    background = None if data.background == "none" else data.background
    image: Any
    image, symmetry = (source.source, source.symmetry) if isinstance(source, TransformedImage) else (source, IDENTITY)
    if not isinstance(image, LazyImage):
        found = foreground_groups_transformed(
            image,
            tiling.group_size,
            (symmetry,),
            background=background,
            tolerance=data.tolerance,
            min_foreground=data.min_foreground,
        )
    else:
        # An image that is turned at all will be turned in other ways, too, and one look serves them all.
        symmetries = (
            SYMMETRIES.get(data.augmentation, DIHEDRAL) if isinstance(source, TransformedImage) else (IDENTITY,)
        )
        found = _occupied_file(
            image.path, tiling.group_size, symmetries, background, data.tolerance, data.masks, data.min_foreground
        )
    return found[symmetry]


@lru_cache(maxsize=2**16)
def _occupied_file(
    path: str,
    group_size: Size,
    symmetries: tuple[Symmetry, ...],
    background: Background | None,
    tolerance: float,
    masks: str | None,
    min_foreground: float,
) -> dict[Symmetry, np.ndarray]:
    # Looking takes as long as reading the image: it is done once for all epochs.
    with open_image(path) as image:
        mask = None if masks is None else Masks(masks).of(path)
        found = foreground_groups_transformed(
            image,
            group_size,
            symmetries,
            background=background,
            tolerance=tolerance,
            mask=mask,
            min_foreground=min_foreground,
        )
    if not all(each.any() for each in found.values()):
        left = [f"background {background}, tolerance {tolerance}"] if background is not None else []
        left += [f"mask {mask}"] if mask else []
        left += [f"least {min_foreground}"] if min_foreground else []
        turned = ", as it is turned in training," if len(symmetries) > 1 else ""
        raise EmptyImageError(
            f"{path}{turned} has no group that holds anything ({', '.join(left)}): leave the image out, or change "
            f"data.{'masks' if background is None else 'tolerance'}"
        )
    return found


def loss(network: FITImageEncoder, batch: Batch, recipe: ClassifyRecipe) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy in nats, smoothed as the recipe says, and accuracy.

    Raises:
        InputError: images of any size are answered with no numbers (names them).
    """
    predicted = logits(network, batch["image"], recipe.data)
    value = F.cross_entropy(predicted.float(), batch["label"], label_smoothing=recipe.objective.label_smoothing)
    if network.groups is None and not bool(predicted.isfinite().all()):
        _refuse_answers(predicted, batch["image"])
    return value, {"accuracy": _accuracy(predicted, batch["label"])}


def _refuse_answers(predicted: Tensor, images: Any) -> None:
    """Raise InputError that images are answered with no numbers, by their names."""
    which = (~predicted.isfinite().all(-1)).nonzero().flatten().tolist()
    names = [getattr(images[k], "path", f"image {k} of a batch") for k in which]
    raise InputError(
        f"{', '.join(names)}: answered with no numbers; look for pixels that are none (nan, inf), else training "
        "diverged: lower optimizer.lr"
    )


def measure(network: FITImageEncoder, batch: Batch, recipe: ClassifyRecipe) -> tuple[dict[str, Tensor], int]:
    """Plain cross-entropy in nats and accuracy, means over the batch's examples.

    Raises:
        InputError: examples without a label.
    """
    label = batch["label"]
    if bool((label < 0).any()):
        raise InputError("some held-out examples have no label, so accuracy cannot be measured")
    predicted = logits(network, batch["image"], recipe.data)
    return {"loss": F.cross_entropy(predicted.float(), label), "accuracy": _accuracy(predicted, label)}, len(label)


def _accuracy(predicted: Tensor, label: Tensor) -> Tensor:
    return (predicted.detach().argmax(-1) == label).float().mean()


def labelled_logits(network: FITImageEncoder, batch: Batch, recipe: ClassifyRecipe) -> tuple[Tensor, Tensor]:
    """Logits `(b, classes)` of a batch, and its labels `(b,)`."""
    return logits(network, batch["image"], recipe.data), batch["label"]


TASK = TaskSpec(
    recipe=ClassifyRecipe,
    model=FITImageEncoder,
    build=build,
    loss=loss,
    measure=measure,
    monitor=("val/accuracy", "max"),
    logits=labelled_logits,
    verb="predict",
    # One of the encoder's two final norms is unused.
    find_unused_parameters=True,
)
