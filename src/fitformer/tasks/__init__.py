"""What is learned. Each task is a module of plain functions; any training loop can call them.

`build(recipe, dataset)` makes the network, `loss(network, batch, recipe)` the training loss and its metrics,
`measure(network, batch, recipe)` held-out metrics, `preview(network, recipe, count)` something to look at.
"""

import importlib
from typing import Any, Protocol, cast

from torch import Tensor

from fitformer.config.schema import Recipe, Training
from fitformer.execution import Streamed
from fitformer.models.base import FITModel
from fitformer.tasks.batch import Batch
from fitformer.tasks.preview import Preview

__all__ = ["Batch", "Preview", "Task", "build_model", "set_execution", "task_of"]


class Task(Protocol):
    """What the modules `classify`, `diffuse` and `autoregress` have in common."""

    def build(self, recipe: Any, dataset: Any) -> FITModel:
        """Make the network for a recipe and a dataset, with random weights from torch's generator."""

    def loss(self, network: Any, batch: Batch, recipe: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Training loss, a scalar mean over the batch, and further means to log, detached."""

    def measure(self, network: Any, batch: Batch, recipe: Any) -> tuple[dict[str, Tensor], int]:
        """Held-out means over the batch, and what they are means over: the number of examples, or of tokens."""

    def preview(self, network: Any, recipe: Any, count: int) -> Preview | None:
        """Samples to look at, always the same `count` ones for the same weights; None where there is nothing."""

    def monitor(self, recipe: Any) -> tuple[str, str]:
        """The held-out metric that says which checkpoint is best, and `min` or `max`."""


def task_of(recipe: Recipe) -> Task:
    """The module of a recipe's task."""
    return cast(Task, importlib.import_module(f"fitformer.tasks.{recipe.task}"))


def build_model(recipe: Recipe, dataset: Any) -> FITModel:
    """The network of a recipe, for the sizes and classes of a dataset.

    Raises:
        InputError: sizes that do not fit together, no classes where the task needs them.
    """
    return task_of(recipe).build(recipe, dataset)


def set_execution(network: Any, training: Training) -> None:
    """Have a network's trunk run as `trainer.execution` says."""
    streamed = Streamed(
        training.slice_groups, training.keep, training.keep_precision, training.scratch, training.recompute or "full"
    )
    network.set_execution(streamed if training.execution == "streamed" else training.execution)
