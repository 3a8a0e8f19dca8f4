"""Several labels of an image, each there or not: binary cross-entropy."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fitformer._support.listed import listed
from fitformer.config.schema import MultilabelRecipe
from fitformer.errors import InputError
from fitformer.models.image_encoder import FITImageEncoder
from fitformer.tasks.answers import Answers, LabelAnswers
from fitformer.tasks.batch import Batch
from fitformer.tasks.image_outputs import build_encoder, finite_outputs, mean_of_defined, outputs
from fitformer.tasks.registry import TaskSpec


def build(recipe: MultilabelRecipe, dataset: Any) -> FITImageEncoder:
    """An image encoder with a logit for each label, see `build_encoder`."""
    return build_encoder(recipe, dataset, len(recipe.data.number_columns.names))


def prepare(recipe: MultilabelRecipe, dataset: Any) -> MultilabelRecipe:
    """The recipe with its positive weights in numbers.

    Raises:
        InputError: another number of weights than of labels, or of a label that no example to train on has.
    """
    weights, names = recipe.objective.positive_weights, recipe.data.number_columns.names
    if weights == "none":
        return recipe
    if weights != "balanced":
        if len(weights) != len(names):
            raise InputError(
                f"objective.positive_weights has {len(weights)} numbers, and there are {len(names)} labels"
            )
        return recipe
    labels = dataset.source.labels
    positive = labels.sum(axis=0)
    if not positive.all():
        absent = [name for name, count in zip(names, positive, strict=True) if not count]
        raise InputError(
            f"objective.positive_weights is balanced, and no example to train on has {listed(absent)}; leave it out of "
            "data.targets"
        )
    balanced = tuple(((len(labels) - positive) / positive).tolist())
    return replace(recipe, objective=replace(recipe.objective, positive_weights=balanced))


def loss(network: FITImageEncoder, batch: Batch, recipe: MultilabelRecipe) -> tuple[Tensor, dict[str, Tensor]]:
    """Binary cross-entropy in nats, a mean over labels, weighted as the recipe says.

    Raises:
        InputError: the logits of images of any size are NaN or infinite (names the images).
    """
    predicted, labels = finite_outputs(network, batch)
    weights = recipe.objective.positive_weights
    positive = None if isinstance(weights, str) else predicted.new_tensor(weights)
    return F.binary_cross_entropy_with_logits(predicted, labels, pos_weight=positive), {}


def scores(
    network: FITImageEncoder, predicted: Tensor, labels: Tensor, recipe: MultilabelRecipe
) -> Iterator[tuple[str, Any]]:
    """Plain binary cross-entropy; area under the ROC curve, average precision and F1 (at one half) of the labels.

    Each is a mean over the labels for which it is defined: some examples must have the label, and some not.
    """
    from torchmetrics.functional.classification import binary_auroc, binary_average_precision, binary_f1_score

    yield "loss", float(F.binary_cross_entropy_with_logits(predicted, labels))
    measures: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "auc": binary_auroc,
        "average_precision": binary_average_precision,
        "f1": binary_f1_score,
    }
    shares, there = predicted.sigmoid(), labels.int()
    for name, measure in measures.items():
        found = {}
        for k, label in enumerate(recipe.data.number_columns.names):
            both = 0 < int(there[:, k].sum()) < len(there)
            found[label] = float(measure(shares[:, k], there[:, k])) if both else float("nan")
        yield name, mean_of_defined(found)
        yield f"{name}_by_label", found


def answers(network: FITImageEncoder, recipe: MultilabelRecipe, classes: Sequence[str]) -> Answers:
    """The probability of each label."""
    return LabelAnswers(recipe.data.number_columns.names)


TASK = TaskSpec(
    recipe=MultilabelRecipe,
    model=FITImageEncoder,
    build=build,
    loss=loss,
    measure=None,
    outputs=outputs,
    scores=scores,
    monitor=("val/auc", "max"),
    prepare=prepare,
    answers=answers,
    verb="predict",
    # One of the encoder's two final norms is unused.
    find_unused_parameters=True,
)
