"""Classification: cross-entropy of the class of an image."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fitformer.diffusion import pixels_to_signal
from fitformer.encoder import FITImageEncoder
from fitformer.errors import InputError
from fitformer.settings import ClassifyRecipe
from fitformer.tasks.batch import Batch, arguments, need_classes, need_no_levels


def build(recipe: ClassifyRecipe, dataset: Any) -> FITImageEncoder:
    """An image encoder with a head for the dataset's classes.

    Raises:
        InputError: data without classes, sizes that do not divide.
    """
    need_no_levels(recipe)
    return FITImageEncoder.from_preset(
        recipe.model.preset,
        image_size=recipe.data.image_size,
        channels=dataset.channels,
        num_classes=need_classes(dataset, "classification"),
        **arguments(recipe.model),
    )


def logits(network: FITImageEncoder, images: Tensor) -> Tensor:
    """Logits `(b, classes)` of uint8 images `(b, H, W, ch)`, which the network sees in [-1, 1]."""
    return network(pixels_to_signal(images))


def loss(network: FITImageEncoder, batch: Batch, recipe: ClassifyRecipe) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy in nats, smoothed as the recipe says, and accuracy."""
    predicted = logits(network, batch["image"])
    value = F.cross_entropy(predicted.float(), batch["label"], label_smoothing=recipe.objective.label_smoothing)
    return value, {"accuracy": _accuracy(predicted, batch["label"])}


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


def preview(network: FITImageEncoder, recipe: ClassifyRecipe, count: int) -> None:
    """A classifier has nothing to show."""
    return None


def watch(recipe: ClassifyRecipe) -> tuple[str, str]:
    """The best checkpoint has the highest held-out accuracy."""
    return "val/accuracy", "max"


def _accuracy(predicted: Tensor, label: Tensor) -> Tensor:
    return (predicted.detach().argmax(-1) == label).float().mean()
