"""What the rest of the library knows of a task: one `TaskSpec`, named `TASK`, in each task's module."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from fitformer.config.schema import Recipe

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from torch import Tensor

    from fitformer.data.datasets.text import ByteBuffer
    from fitformer.tasks.answers import Answers
    from fitformer.tasks.batch import Batch
    from fitformer.tasks.preview import Preview


@dataclass(frozen=True)
class TaskSpec:
    """A task as plain functions and facts; training, evaluation and the command line read it and name no task.

    Attributes:
        recipe: the recipe class; its default `task` is the task's name and the name of its module.
        model: the class of the exported model, for `from_pretrained`; one of the verb `sample` samples by itself.
        build: `(recipe, dataset) -> model`, with random weights from torch's generator.
        loss: `(model, batch, recipe) -> loss, metrics`: the training loss, a scalar mean over the batch, and further
            means to log, detached.
        measure: `(model, batch, recipe) -> means, count`: held-out means over the batch, and the number of examples
            or tokens that each is a mean over; None of a task with `scores`.
        conclude: `(means, classes) -> (name, value), ...`: what the means of `measure` over all batches, there tensors
            of any shape, amount to: numbers, of which `monitor` is one, and numbers by class; None where they are it.
        monitor: the held-out metric that selects the best checkpoint, such as `val/loss`, and `min` or `max`.
        preview: `(model, recipe, count) -> Preview`: samples that depend on the weights alone; None without samples.
        counted: what `measure` counts: `examples` or `tokens`.
        logits: `(model, batch, recipe) -> logits (b, classes), labels (b,)` of a classifier, which is then evaluated
            with accuracy by class and confusion; None for other tasks.
        outputs: `(model, batch, recipe) -> outputs (b, k), labels (b, ...)` of a task whose held-out metrics are no
            means over batches; then `scores` is in the place of `measure`.
        scores: `(model, outputs (n, k), labels (n, ...), recipe) -> (name, value), ...`: its metrics on all held-out
            examples at once, numbers, or numbers by name; NaN where one is not defined.
        answers: `(model, recipe, classes) -> Answers` for the verb `predict`: what the outputs of the model mean.
        baselines: `(recipe, train, test) -> (name, value), ...`: results that a model should surpass, from the batches
            of the training part and of the part that is evaluated; each is an iterator that is read at most once.
        prepare: `(recipe, dataset) -> recipe` for `loss`: settings that follow from the training part, in numbers; None
            if there are none.
        verb: the command that uses a trained model.
        generate_images, generate_bytes, generate_audio: draw tokens one by one, see `tasks.pixels.generate_images`,
            `tasks.bytes.generate_bytes` and `tasks.audio.generate_audio`; one of the three for the verb `generate`.
        complete_images: draw the rest of images, see `tasks.pixels.complete_images`.
        file_tokens: `(model, recipe, path) -> ByteBuffer`: a file as the tokens of one sequence, whose likelihood the
            verb `evaluate` gives in `unit`, such as `bits_per_byte`; None where files have none.
        exact_tokens, restored: the same for lossless compression, of a file whose tokens tell all that is in it, and
            `(model, recipe, tokens) -> content`, the file's bytes; None where the tokens are these bytes.
        find_unused_parameters: some parameters get no gradient, which distributed training must be told.
    """

    recipe: type[Recipe]
    model: type[Any]
    build: Callable[[Any, Any], Any]
    loss: "Callable[[Any, Batch, Any], tuple[Tensor, dict[str, Tensor]]]"
    measure: "Callable[[Any, Batch, Any], tuple[dict[str, Tensor], int]] | None"
    monitor: tuple[str, Literal["min", "max"]]
    conclude: "Callable[[dict[str, Tensor], Sequence[str]], Iterable[tuple[str, Any]]] | None" = None
    preview: "Callable[[Any, Any, int], Preview] | None" = None
    counted: str = "examples"
    logits: "Callable[[Any, Batch, Any], tuple[Tensor, Tensor]] | None" = None
    outputs: "Callable[[Any, Batch, Any], tuple[Tensor, Tensor]] | None" = None
    scores: "Callable[[Any, Tensor, Tensor, Any], Iterable[tuple[str, Any]]] | None" = None
    answers: "Callable[[Any, Any, Sequence[str]], Answers] | None" = None
    baselines: "Callable[[Any, Iterator[Batch], Iterator[Batch]], Iterable[tuple[str, float]]] | None" = None
    prepare: "Callable[[Any, Any], Any] | None" = None
    verb: Literal["predict", "sample", "generate"] | None = None
    generate_images: "Callable[..., Tensor] | None" = None
    complete_images: "Callable[..., Tensor] | None" = None
    generate_bytes: "Callable[..., list[bytes]] | None" = None
    generate_audio: "Callable[..., list[np.ndarray]] | None" = None
    file_tokens: "Callable[[Any, Any, Path], ByteBuffer] | None" = None
    unit: str = ""
    exact_tokens: "Callable[[Any, Any, Path], ByteBuffer] | None" = None
    restored: "Callable[[Any, Any, bytes], bytes] | None" = None
    find_unused_parameters: bool = False

    @property
    def name(self) -> str:
        """The name of the task, as recipes write it."""
        return self.recipe.task


def task_of(recipe: Recipe) -> TaskSpec:
    """The task of a recipe; imports its module."""
    return import_module(f"fitformer.tasks.{recipe.task}").TASK
