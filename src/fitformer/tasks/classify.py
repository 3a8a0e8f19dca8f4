"""Classification: cross-entropy of the class of an image."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from fitformer.config.schema import ClassifyRecipe
from fitformer.errors import InputError
from fitformer.models.image_encoder import FITImageEncoder
from fitformer.tasks.answers import Answers, ClassAnswers
from fitformer.tasks.batch import Batch, need_classes, scaled_weights
from fitformer.tasks.image_outputs import build_encoder, finite_outputs, outputs
from fitformer.tasks.registry import TaskSpec


def build(recipe: ClassifyRecipe, dataset: Any) -> FITImageEncoder:
    """An image encoder with a head for the dataset's classes, see `build_encoder`.

    Raises:
        InputError: data without classes, sizes that do not divide, images of any size for an encoder of one.
    """
    return build_encoder(recipe, dataset, need_classes(dataset, "classification"))


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


def loss(network: FITImageEncoder, batch: Batch, recipe: ClassifyRecipe) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy in nats, smoothed and weighted as the recipe says, and accuracy.

    Raises:
        InputError: the logits of images of any size are NaN or infinite (names the images).
    """
    predicted, label = finite_outputs(network, batch)
    weights, smoothing = recipe.objective.class_weights, recipe.objective.label_smoothing
    if weights == "none":
        value = F.cross_entropy(predicted, label, label_smoothing=smoothing)
    else:
        # Not over the weights of the batch, which would make an example's share depend on its neighbours.
        each = F.cross_entropy(predicted, label, label_smoothing=smoothing, reduction="none")
        value = (each * each.new_tensor(weights)[label]).mean()
    return value, {"accuracy": _accuracy(predicted, label)}


def measure(network: FITImageEncoder, batch: Batch, recipe: ClassifyRecipe) -> tuple[dict[str, Tensor], int]:
    """Plain cross-entropy in nats and accuracy, means over the batch's examples.

    Raises:
        InputError: examples without a label.
    """
    predicted, label = outputs(network, batch, recipe)
    if bool((label < 0).any()):
        raise InputError("some held-out examples have no label, so accuracy cannot be measured")
    return {"loss": F.cross_entropy(predicted, label), "accuracy": _accuracy(predicted, label)}, len(label)


def _accuracy(predicted: Tensor, label: Tensor) -> Tensor:
    return (predicted.detach().argmax(-1) == label).float().mean()


def answers(network: FITImageEncoder, recipe: ClassifyRecipe, classes: Sequence[str]) -> Answers:
    """A class, and the probability of each."""
    return ClassAnswers(tuple(classes))


TASK = TaskSpec(
    recipe=ClassifyRecipe,
    model=FITImageEncoder,
    build=build,
    loss=loss,
    measure=measure,
    monitor=("val/accuracy", "max"),
    logits=outputs,
    answers=answers,
    prepare=prepare,
    verb="predict",
    # One of the encoder's two final norms is unused.
    find_unused_parameters=True,
)
