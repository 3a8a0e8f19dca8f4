"""What is learned. Each task is a module of plain functions; any training loop can call them.

`build(recipe, dataset)` makes the network, `loss(network, batch, recipe)` the training loss and its metrics,
`measure(network, batch, recipe)` held-out metrics, `preview(network, recipe, count)` something to look at.
"""

import importlib
from typing import Any, Protocol, cast

from torch import Tensor, nn

from fitformer.config.schema import Recipe, Training
from fitformer.execution import Execution, Streamed, checkpointed, plain
from fitformer.models.trunk import Trunk
from fitformer.tasks.batch import Batch
from fitformer.tasks.preview import Preview

__all__ = ["Batch", "Preview", "Task", "build_model", "set_execution", "task_of", "trunk_of"]


class Task(Protocol):
    """What the modules `classify`, `diffuse` and `autoregress` have in common."""

    def build(self, recipe: Any, dataset: Any) -> nn.Module:
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


def build_model(recipe: Recipe, dataset: Any) -> nn.Module:
    """The network of a recipe, for the sizes and classes of a dataset.

    Raises:
        InputError: sizes that do not fit together, no classes where the task needs them.
    """
    return task_of(recipe).build(recipe, dataset)


def set_execution(network: Any, training: Training) -> None:
    """Have a network's trunk run as `trainer.execution` says."""
    ways: dict[str, Execution] = {"plain": plain, "checkpointed": checkpointed}
    if training.execution == "streamed":
        way: Execution = Streamed(
            groups=training.slice_groups,
            keep=training.keep,
            precision=training.keep_precision,
            folder=training.scratch,
            recompute=training.recompute or "full",
        )
    else:
        way = ways[training.execution]
    getattr(network, "encoder", network).run = way


def trunk_of(network: Any) -> Trunk:
    """The trunk inside any role."""
    return network.encoder.trunk if hasattr(network, "encoder") else network.trunk
