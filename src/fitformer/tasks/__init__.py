"""Tasks: what is learned. Each is one module of plain functions that any training loop can call.

A module of this package is a task unless it is a helper (`answers`, `batch`, `concordance`, `image_outputs`,
`optimizers`, `preview`, `registry`, or a name that begins with an underscore). It ends with `TASK`, a `TaskSpec`;
nothing else in the library names the task (docs/extending.md). This file imports no torch, so that a task's recipe can
be read without it.
"""

from typing import TYPE_CHECKING, Any

from fitformer.config.schema import Recipe, Training
from fitformer.tasks.registry import TaskSpec, task_of

if TYPE_CHECKING:
    from fitformer.models.base import FITModel

__all__ = ["TaskSpec", "build_model", "group_examples", "set_execution", "task_of"]


def build_model(recipe: Recipe, dataset: Any) -> "FITModel":
    """The model of a recipe, for the sizes and classes of a dataset, with random weights from torch's generator.

    Raises:
        InputError: sizes that do not divide, no classes where the task needs them.
    """
    model: FITModel = task_of(recipe).build(recipe, dataset)
    return model


def group_examples(network: "FITModel", dataset: Any, recipe: Recipe) -> None:
    """Have a dataset hand examples out in the groups of a model, where it asks for them.

    Those are images, as a model of any size cuts them, and documents, which begin at a group's start.
    """
    grid = getattr(network, "patch_grid", None)
    if grid is not None and grid.any_size and dataset is not None:
        dataset.group_for(grid, getattr(network, "glimpses", 0), recipe.data)
    elif dataset is not None and getattr(recipe.data, "documents", False):
        dataset.group_for(network.trunk.tokens_per_group)


def set_execution(network: "FITModel", training: Training) -> None:
    """Make a model's trunk run as `trainer.execution` says."""
    from fitformer.execution import Streamed

    if training.execution != "streamed":
        network.set_execution(training.execution)
        return
    recompute = training.recompute or "full"
    keep = training.keep, training.keep_precision, training.scratch
    network.set_execution(Streamed(training.slice_groups, *keep, recompute))
