"""Classification: cross-entropy of the class of an image."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from fitformer.config.schema import ClassifyRecipe
from fitformer.diffusion import pixels_to_signal
from fitformer.errors import InputError
from fitformer.models.image_encoder import FITImageEncoder
from fitformer.tasks.batch import Batch, arguments, need_classes, need_no_levels, scaled_weights, size_of_model
from fitformer.tasks.registry import TaskSpec


def build(recipe: ClassifyRecipe, dataset: Any) -> FITImageEncoder:
    """An image encoder with a head for the dataset's classes; of images of any size with `row_column` positions.

    Raises:
        InputError: data without classes, sizes that do not divide, images of any size for an encoder of one.
    """
    need_no_levels(recipe)
    return FITImageEncoder.from_preset(
        recipe.model.preset,
        image_size=size_of_model(recipe),
        channels=dataset.channels,
        num_classes=need_classes(dataset, "classification"),
        **arguments(recipe.model),
    )


def prepare(recipe: ClassifyRecipe, dataset: Any) -> ClassifyRecipe:
    """The recipe with its class weights in numbers, whose mean over the training images is 1.

    `balanced` weights are inverse to the number of images of a class.

    Raises:
        InputError: another number of weights than of classes, or of a class without images.
    """
    weights, labels = recipe.objective.class_weights, dataset.source.labels
    if weights == "none":
        return recipe
    counts = np.bincount(labels, minlength=len(dataset.classes))
    scaled = scaled_weights(weights, counts, dataset.classes, "images")
    return replace(recipe, objective=replace(recipe.objective, class_weights=scaled))


def logits(network: FITImageEncoder, images: Tensor | Sequence[Any]) -> Tensor:
    """Logits `(b, classes)` of images, which the network sees in [-1, 1].

    Args:
        network: the classifier.
        images: uint8 `(b, H, W, ch)`; for a model of any size a sequence of `GroupedImage`s or pixel sources.
    """
    if not network.patch_grid.any_size:
        assert isinstance(images, Tensor)
        return network(pixels_to_signal(images))
    return network(list(images))


def loss(network: FITImageEncoder, batch: Batch, recipe: ClassifyRecipe) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy in nats, smoothed and weighted as the recipe says, and accuracy.

    Raises:
        InputError: the logits of images of any size are NaN or infinite (names the images).
    """
    predicted, label, weights = logits(network, batch["image"]), batch["label"], recipe.objective.class_weights
    smoothing = recipe.objective.label_smoothing
    if weights == "none":
        value = F.cross_entropy(predicted.float(), label, label_smoothing=smoothing)
    else:
        # Not over the weights of the batch, which would make an example's share depend on its neighbours.
        each = F.cross_entropy(predicted.float(), label, label_smoothing=smoothing, reduction="none")
        value = (each * each.new_tensor(weights)[label]).mean()
    if network.patch_grid.any_size and not bool(predicted.isfinite().all()):
        _refuse_logits(predicted, batch["image"])
    return value, {"accuracy": _accuracy(predicted, batch["label"])}


def _refuse_logits(predicted: Tensor, images: Any) -> None:
    """Raise InputError that names the images whose logits are NaN or infinite."""
    which = (~predicted.isfinite().all(-1)).nonzero().flatten().tolist()
    names = [getattr(images[k], "path", f"image {k} of a batch") for k in which]
    raise InputError(
        f"{', '.join(names)}: NaN or infinite logits; look for NaN or infinite pixels, else training diverged: lower "
        "optimizer.lr"
    )


def measure(network: FITImageEncoder, batch: Batch, recipe: ClassifyRecipe) -> tuple[dict[str, Tensor], int]:
    """Plain cross-entropy in nats and accuracy, means over the batch's examples.

    Raises:
        InputError: examples without a label.
    """
    label = batch["label"]
    if bool((label < 0).any()):
        raise InputError("some held-out examples have no label, so accuracy cannot be measured")
    predicted = logits(network, batch["image"])
    return {"loss": F.cross_entropy(predicted.float(), label), "accuracy": _accuracy(predicted, label)}, len(label)


def _accuracy(predicted: Tensor, label: Tensor) -> Tensor:
    return (predicted.detach().argmax(-1) == label).float().mean()


def labelled_logits(network: FITImageEncoder, batch: Batch, recipe: ClassifyRecipe) -> tuple[Tensor, Tensor]:
    """Logits `(b, classes)` of a batch, and its labels `(b,)`."""
    return logits(network, batch["image"]), batch["label"]


TASK = TaskSpec(
    recipe=ClassifyRecipe,
    model=FITImageEncoder,
    build=build,
    loss=loss,
    measure=measure,
    monitor=("val/accuracy", "max"),
    logits=labelled_logits,
    prepare=prepare,
    verb="predict",
    # One of the encoder's two final norms is unused.
    find_unused_parameters=True,
)
