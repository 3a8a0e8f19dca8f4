"""Tasks: what is learned. Each is one module of plain functions that any training loop can call.

A module of this package is a task unless it is a helper (`batch`, `optimizers`, `preview`, `registry`, or a name that
begins with an underscore). It ends with `TASK`, a `TaskSpec`; nothing else in the library names the task
(docs/extending.md). This file imports no torch, so that a task's recipe can be read without it.
"""

from typing import TYPE_CHECKING, Any

from fitformer.config.schema import Recipe, Training
from fitformer.tasks.registry import TaskSpec, task_of

if TYPE_CHECKING:
    from torch import nn

    from fitformer.execution import Execution
    from fitformer.models.trunk import Trunk

__all__ = ["TaskSpec", "build_model", "set_execution", "task_of", "trunk_of"]


def build_model(recipe: Recipe, dataset: Any) -> "nn.Module":
    """The model of a recipe, for the sizes and classes of a dataset, with random weights from torch's generator.

    Raises:
        InputError: sizes that do not divide, no classes where the task needs them.
    """
    return task_of(recipe).build(recipe, dataset)


def set_execution(network: Any, training: Training) -> None:
    """Make a model's trunk run as `trainer.execution` says."""
    getattr(network, "encoder", network).run = _execution(training)


def _execution(training: Training) -> "Execution":
    from fitformer.execution import Streamed, checkpointed, plain

    if training.execution == "streamed":
        return Streamed(
            groups=training.slice_groups,
            keep=training.keep,
            precision=training.keep_precision,
            folder=training.scratch,
            recompute=training.recompute or "full",
        )
    return checkpointed if training.execution == "checkpointed" else plain


def trunk_of(network: Any) -> "Trunk":
    """The trunk of a model of any role."""
    return network.encoder.trunk if hasattr(network, "encoder") else network.trunk
