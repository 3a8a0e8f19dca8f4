"""What the tasks of an image encoder with a head share: the model, and its outputs for a batch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fitformer.diffusion import pixels_to_signal
from fitformer.errors import InputError
from fitformer.models.heads import Meaning
from fitformer.models.image_encoder import FITImageEncoder
from fitformer.models.initialization import zero_trunk_branches
from fitformer.tasks.batch import Batch, arguments, need_no_levels, size_of_model


def build_encoder(recipe: Any, dataset: Any, outputs: int, meaning: Meaning = "logits") -> FITImageEncoder:
    """An image encoder with a head of so many outputs and the weights that training starts from.

    Of images of any size it has `row_column` positions.

    Raises:
        InputError: sizes that do not divide, images of any size for an encoder of one.
    """
    need_no_levels(recipe)
    network = FITImageEncoder.from_preset(
        recipe.model.preset,
        image_size=size_of_model(recipe),
        channels=dataset.channels,
        num_classes=outputs,
        outputs=meaning,
        **arguments(recipe.model),
    )
    if recipe.model.initialization == "zero_branches":
        zero_trunk_branches(network.trunk)
    return network


def outputs_of(network: FITImageEncoder, images: Tensor | Sequence[Any]) -> Tensor:
    """Outputs `(b, k)` for images, which the network sees in [-1, 1].

    Args:
        network: with a head.
        images: uint8 `(b, H, W, ch)`; for a model of any size a sequence of `GroupedImage`s or pixel sources.
    """
    if not network.patch_grid.any_size:
        assert isinstance(images, Tensor)
        return network(pixels_to_signal(images))
    return network(list(images))


def finite_outputs(network: FITImageEncoder, batch: Batch) -> tuple[Tensor, Tensor]:
    """Outputs `(b, k)` in float32 for the images of a batch, and its labels.

    Raises:
        InputError: the outputs for images of any size are NaN or infinite (names the images).
    """
    found = outputs_of(network, batch["image"]).float()
    if network.patch_grid.any_size and not bool(found.isfinite().all()):
        _refuse(found, batch["image"])
    return found, batch["label"]


def outputs(network: FITImageEncoder, batch: Batch, recipe: Any) -> tuple[Tensor, Tensor]:
    """Outputs `(b, k)` for a batch, and its labels."""
    return outputs_of(network, batch["image"]).float(), batch["label"]


def _refuse(found: Tensor, images: Any) -> None:
    """Raise InputError that names the images whose outputs are NaN or infinite."""
    which = (~found.isfinite().all(-1)).nonzero().flatten().tolist()
    names = [getattr(images[k], "path", f"image {k} of a batch") for k in which]
    raise InputError(
        f"{', '.join(names)}: NaN or infinite outputs; look for NaN or infinite pixels, else training diverged: lower "
        "optimizer.lr"
    )


def mean_of_defined(values: dict[str, float]) -> float:
    """Their mean without those that are NaN; NaN of none."""
    return float(torch.tensor(list(values.values())).nanmean())
