"""Regression: numbers of an image, learned in standard deviations and predicted in their own units."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fitformer.config.schema import RegressRecipe
from fitformer.errors import InputError
from fitformer.models.heads import NumbersHead
from fitformer.models.image_encoder import FITImageEncoder
from fitformer.tasks.answers import Answers, NumberAnswers
from fitformer.tasks.batch import Batch
from fitformer.tasks.image_outputs import build_encoder, finite_outputs, mean_of_defined, outputs
from fitformer.tasks.registry import TaskSpec


def build(recipe: RegressRecipe, dataset: Any) -> FITImageEncoder:
    """An image encoder whose outputs have the mean and the deviation of the dataset's numbers, see `NumbersHead`.

    Raises:
        InputError: numbers that are all the same, or what `build_encoder` refuses.
    """
    names, numbers = recipe.data.number_columns.names, torch.as_tensor(dataset.source.labels).double()
    mean, scale = numbers.mean(0), numbers.std(0, correction=0)
    if alike := [name for name, value in zip(names, scale.tolist(), strict=True) if not value]:
        raise InputError(
            f"{alike[0]!r} is {mean[names.index(alike[0])]:g} in all {len(numbers)} examples to train on, so there is "
            "nothing to learn; leave it out of data.targets"
        )
    network = build_encoder(recipe, dataset, len(names), "numbers")
    assert isinstance(network.head, NumbersHead)
    network.head.mean.copy_(mean)
    network.head.scale.copy_(scale)
    return network


def _error(network: FITImageEncoder, predicted: Tensor, numbers: Tensor, recipe: RegressRecipe) -> Tensor:
    """The mean error in deviations, of numbers in their own units."""
    assert isinstance(network.head, NumbersHead)
    error = (predicted - numbers) / network.head.scale.to(predicted)
    return (error.square() if recipe.objective.loss == "mse" else error.abs()).mean()


def loss(network: FITImageEncoder, batch: Batch, recipe: RegressRecipe) -> tuple[Tensor, dict[str, Tensor]]:
    """Squared or absolute error, in standard deviations of each number.

    Raises:
        InputError: the outputs for images of any size are NaN or infinite (names the images).
    """
    predicted, numbers = finite_outputs(network, batch)
    return _error(network, predicted, numbers, recipe), {}


def scores(
    network: FITImageEncoder, predicted: Tensor, numbers: Tensor, recipe: RegressRecipe
) -> Iterator[tuple[str, Any]]:
    """The loss; R2 and mean absolute error, which is in the number's own units, of one number or of each.

    R2 is the share of the variance that is predicted; of several numbers `r2` is its mean over them.
    """
    yield "loss", float(_error(network, predicted, numbers, recipe))
    rest = (predicted - numbers).double().square().sum(0)
    variance = (numbers.double() - numbers.double().mean(0)).square().sum(0)
    names = recipe.data.number_columns.names
    r2 = torch.where(variance > 0, 1 - rest / variance, torch.nan).tolist()
    mae = F.l1_loss(predicted.double(), numbers.double(), reduction="none").mean(0).tolist()
    by_name = {name: dict(zip(names, values, strict=True)) for name, values in (("r2", r2), ("mae", mae))}
    yield "r2", mean_of_defined(by_name["r2"])
    if len(names) == 1:
        yield "mae", mae[0]
        return
    for name, values in by_name.items():
        yield f"{name}_by_target", values


def answers(network: FITImageEncoder, recipe: RegressRecipe, classes: Sequence[str]) -> Answers:
    """The numbers."""
    return NumberAnswers(recipe.data.number_columns.names)


TASK = TaskSpec(
    recipe=RegressRecipe,
    model=FITImageEncoder,
    build=build,
    loss=loss,
    measure=None,
    outputs=outputs,
    scores=scores,
    monitor=("val/loss", "min"),
    answers=answers,
    verb="predict",
    # One of the encoder's two final norms is unused.
    find_unused_parameters=True,
)
