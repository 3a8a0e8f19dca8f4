"""Segmentation: cross-entropy and Dice loss of the class of every pixel."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from fitformer._support.scratch_array import scratch_array
from fitformer.config.schema import SegmentRecipe
from fitformer.data.labels import UNLABELLED
from fitformer.data.readers.levels import blocks
from fitformer.diffusion import pixels_to_signal
from fitformer.errors import InputError
from fitformer.execution.examples import Examples
from fitformer.models.image_encoder import examples_of
from fitformer.models.image_segmenter import FITImageSegmenter
from fitformer.models.initialization import zero_trunk_branches
from fitformer.patching.any_size import GroupedImage, PixelArray, pieces_of_row, together
from fitformer.tasks._boundaries import Labels, boundary_counts
from fitformer.tasks._pixel_sums import confusions, loss_sums, losses, measures
from fitformer.tasks.batch import Batch, arguments, need_classes, scaled_weights, size_of_model
from fitformer.tasks.registry import TaskSpec


def build(recipe: SegmentRecipe, dataset: Any) -> FITImageSegmenter:
    """A segmenter for the dataset's classes, with the weights that training starts from.

    Of images of any size it has `row_column` positions.

    Raises:
        InputError: sizes that do not divide, a layer string that ends in global layers, images of any size for a model
            of one.
    """
    network = FITImageSegmenter.from_preset(
        recipe.model.preset,
        image_size=size_of_model(recipe),
        channels=dataset.channels,
        num_classes=need_classes(dataset, "segmentation"),
        **arguments(recipe.model),
    )
    if recipe.model.initialization == "zero_branches":
        zero_trunk_branches(network.trunk)
    return network


def prepare(recipe: SegmentRecipe, dataset: Any) -> SegmentRecipe:
    """The recipe with its class weights in numbers, whose mean over the labelled training pixels is 1.

    Raises:
        InputError: another number of weights than of classes, or of a class without pixels.
    """
    weights = recipe.objective.class_weights
    if weights == "none":
        return recipe
    counts = np.asarray(sum(map(_histogram, dataset.label_images())))[: len(dataset.classes)]
    scaled = scaled_weights(weights, counts, dataset.classes, "pixels")
    return replace(recipe, objective=replace(recipe.objective, class_weights=scaled))


@dataclass(frozen=True)
class _Part:
    """Images of a batch that run together, at these `places` in it, and their labels.

    Attributes:
        labels: of a slice of groups, classes of the pixels `(b, s, rows, columns)` uint8 on the model's device.
        examples: of images in one row, b = 1; None where every image is a row.
    """

    places: Sequence[int]
    images: Tensor | list[GroupedImage]
    labels: Callable[[slice], Tensor]
    examples: Examples | None = None

    def sums(self, of: Callable[..., Tensor], groups: slice, *values: Tensor) -> Tensor:
        """Sums `(images, k)` over the pixels of a slice of groups, `of` values `(b, s, ...)` for each of b."""
        if self.examples is None:
            return of(*values)
        # In a row each group by itself, then those of each image together.
        return self.examples.sums(of(*(each[0, :, None] for each in values))[None], groups)

    def pieces(self, groups: slice, values: np.ndarray) -> Iterator[tuple[int, slice, np.ndarray]]:
        """Values `(b, s, ...)` of a slice of groups image by image: which, which of its groups, and theirs."""
        if self.examples is None:
            yield from ((k, groups, own) for k, own in enumerate(values))
            return
        first = 0
        for k, own in pieces_of_row(self.images, groups):  # type: ignore[arg-type]
            last = first + own.stop - own.start
            yield k, own, values[0, first:last]
            first = last


def _parts(network: FITImageSegmenter, batch: Batch) -> Iterator[_Part]:
    images, labels = batch["image"], batch["labels"]
    if not network.patch_grid.any_size:
        rows, columns = network.patch_grid.shape  # type: ignore[misc]
        grouped = rearrange(labels, "b (gr r) (gc c) -> b (gr gc) r c", gr=rows, gc=columns)
        yield _Part(range(len(images)), pixels_to_signal(images), lambda groups: grouped[:, groups])
        return
    every = [network.grouped(image) for image in images]
    device = next(network.parameters()).device
    for places in together(every):
        some = [every[k] for k in places]
        examples = examples_of(some)
        read = partial(_read_labels, some, [labels[k] for k in places], in_a_row=examples is not None, device=device)
        yield _Part(places, some, read, examples)


def _read_labels(
    images: Sequence[GroupedImage], labels: Sequence[Any], groups: slice, *, in_a_row: bool, device: torch.device
) -> Tensor:
    """Classes `(b, s, rows, columns)` of a slice of the groups of images, or `(1, s, rows, columns)` of their row."""
    if in_a_row:
        pieces = [images[k].beside(labels[k], own, UNLABELLED) for k, own in pieces_of_row(images, groups)]
        found = np.concatenate(pieces)[None]
    else:
        found = np.stack([image.beside(own, groups, UNLABELLED) for image, own in zip(images, labels, strict=True)])
    return torch.from_numpy(found).to(device)


def _labels(part: _Part, groups: slice, mask: Tensor | None) -> Tensor:
    """Classes of a slice of groups; none where the image has no pixels."""
    labels = part.labels(groups)
    return labels if mask is None else labels.masked_fill(~mask, UNLABELLED)


def loss(network: FITImageSegmenter, batch: Batch, recipe: SegmentRecipe) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy in nats and Dice loss, weighted as the recipe says; both, and the share of pixels that are right.

    Raises:
        InputError: the logits of images of any size are NaN or infinite (names the images).
    """
    weights, device = recipe.objective.class_weights, next(network.parameters()).device
    given = None if weights == "none" else torch.tensor(weights, device=device)
    found = []
    for part in _parts(network, batch):

        def score(groups: slice, logits: Tensor, mask: Tensor | None, part: _Part = part) -> Tensor:
            return part.sums(partial(loss_sums, weights=given), groups, logits, _labels(part, groups, mask))

        found.append(network.score(part.images, score))
        if network.patch_grid.any_size and not bool(found[-1].isfinite().all()):
            broken = (~found[-1].isfinite()).any(dim=1).tolist()
            names = [
                getattr(image, "path", "an image of a batch")
                for image, is_broken in zip(part.images, broken, strict=True)
                if is_broken
            ]
            raise InputError(
                f"{', '.join(names)}: NaN or infinite logits; look for NaN or infinite pixels, else training diverged: "
                "lower optimizer.lr"
            )
    cross, dice, right = losses(torch.cat(found))
    value = recipe.objective.cross_entropy * cross + recipe.objective.dice * dice
    return value, {"cross_entropy": cross.detach(), "dice_loss": dice.detach(), "accuracy": right.detach()}


def measure(network: FITImageSegmenter, batch: Batch, recipe: SegmentRecipe) -> tuple[dict[str, Tensor], int]:
    """Means over the held-out images of a batch: cross-entropy in nats, confusion, boundaries, and pixels not seen.

    Confusion and boundaries are counts, from which `conclude` makes what they amount to over all images.
    """
    each = [measured for part in _parts(network, batch) for measured in _measured(network, part, batch["labels"])]
    return {name: torch.stack([one[name] for one in each]).mean(0) for name in each[0]}, len(each)


@torch.no_grad()
def _measured(network: FITImageSegmenter, part: _Part, labels: Any) -> Iterator[dict[str, Tensor]]:
    """The measures of each image of a part."""
    classes, images = network.num_classes, [network.grouped(image) for image in part.images]
    maps = [scratch_array(image.shape[:2], UNLABELLED) for image in images]

    def score(groups: slice, logits: Tensor, mask: Tensor | None) -> Tensor:
        guess = logits.argmax(2)
        for k, own, classes_of in part.pieces(groups, guess.to(torch.uint8).cpu().numpy()):
            images[k].put(maps[k], own, classes_of)
        return part.sums(counts, groups, logits, guess, _labels(part, groups, mask))

    def counts(logits: Tensor, guess: Tensor, true: Tensor) -> Tensor:
        return torch.cat([loss_sums(logits, true)[:, :2].double(), confusions(guess, true, classes).flatten(1)], dim=1)

    sums = network.score(part.images, score).cpu()
    for place, guess, (cross, count, *confusion) in zip(part.places, maps, sums, strict=True):
        true = labels[place].cpu().numpy() if isinstance(labels, Tensor) else labels[place]
        yield {
            "loss": cross / count.clamp(min=1),
            "confusion": torch.stack(confusion).view(classes, classes),
            "boundaries": boundary_counts(_windows(guess), _windows(true), guess.shape, classes),
            "unseen": _unseen(_windows(true), guess),
        }


def _windows(labels: Any) -> Labels:
    """Classes of windows, of an array or of a label image."""
    if isinstance(labels, np.ndarray):
        return lambda top, left, height, width: labels[top : top + height, left : left + width]
    return lambda *window: labels.window(*window)[..., 0]


def _unseen(true: Labels, guess: np.ndarray) -> Tensor:
    """Labelled pixels in groups that were skipped, and labelled pixels: float64 (2,)."""
    counts = torch.zeros(2, dtype=torch.float64)
    for top, left, height, width in blocks(PixelArray(guess[..., None])):
        known = true(top, left, height, width) != UNLABELLED
        counts[0] += int((known & (guess[top : top + height, left : left + width] == UNLABELLED)).sum())
        counts[1] += int(known.sum())
    return counts


def conclude(means: dict[str, Tensor], classes: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """The measures of `_pixel_sums.measures` over all images, after the `loss`.

    Pixels in groups that are skipped, as background, count in none of them; if there are any with a label, `unseen` is
    their share.
    """
    yield "loss", float(means["loss"])
    yield from measures(means["confusion"], means["boundaries"], classes)
    skipped, labelled = means["unseen"].tolist()
    if skipped:
        yield "unseen", skipped / labelled


def baselines(recipe: SegmentRecipe, train: Iterator[Batch], test: Iterator[Batch]) -> Iterator[tuple[str, float]]:
    """Accuracy and mIoU of the class that has most training pixels, said of every pixel."""
    counts, unseen = _counted(recipe, train), _counted(recipe, test)
    share = float(unseen[counts.argmax()] / max(unseen.sum(), 1))
    yield "most_frequent_class_accuracy", share
    # It has the only intersection, and the union with all pixels.
    yield "most_frequent_class_mIoU", share / max(int((unseen > 0).sum()), 1)


def _counted(recipe: SegmentRecipe, batches: Iterator[Batch]) -> np.ndarray:
    """Pixels of each class in batches."""
    counts = np.zeros(UNLABELLED + 1, dtype=np.int64)
    for batch in batches:
        for labels in batch["labels"]:
            image = PixelArray(labels[..., None]) if isinstance(labels, Tensor) else labels
            counts += _histogram(image)
    return counts[: len(recipe.data.classes)]


def _histogram(image: Any) -> np.ndarray:
    """Pixels of each class in a label image, and last those of none, read block by block."""
    found = [np.bincount(image.window(*window).ravel(), minlength=UNLABELLED + 1) for window in blocks(image)]
    return np.asarray(sum(found))


TASK = TaskSpec(
    recipe=SegmentRecipe,
    model=FITImageSegmenter,
    build=build,
    loss=loss,
    measure=measure,
    conclude=conclude,
    monitor=("val/mIoU", "max"),
    baselines=baselines,
    prepare=prepare,
    verb="predict",
    # The norm of the latents, which answer nothing here, is unused.
    find_unused_parameters=True,
)
