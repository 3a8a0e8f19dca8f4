"""Evaluation of a run by its task, on a part of its data."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fitformer import data
from fitformer.config.schema import Recipe
from fitformer.data.build import Split
from fitformer.data.datasets.images import ImageDataset
from fitformer.data.datasets.lazy_source import sizes_of
from fitformer.data.masks import masks_of
from fitformer.data.settings import ImageData
from fitformer.errors import InputError
from fitformer.evaluation.batches import batches, mean_metrics
from fitformer.evaluation.classification import classification
from fitformer.evaluation.sample_accuracy import sample_accuracy
from fitformer.tasks import group_examples, task_of
from fitformer.tasks.batch import Batch
from fitformer.training.run_dir import Run


def evaluate(
    run: Run,
    split: Split = "test",
    *,
    device: str | torch.device = "cpu",
    batch_size: int = 64,
    checkpoint: str = "last",
    baselines: bool = True,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[tuple[str, Any]]:
    """Measure the model of a run on a part of its data.

    Args:
        run: the run. split: `test`, `val` or `train`; the last without augmentation.
        device: where to run. batch_size: examples at once; it does not change the values.
        checkpoint: `last`, `best` or a path, see `Run.model`.
        baselines: also measure the baselines of the task, if it has any.
        on_batch: called after every batch with the number of batches done and the number of all.

    Yields:
        the metrics of `classification` for a classifier; for other tasks the number of examples or tokens, the
        held-out means or scores of the task, or what it concludes from the means, and its baselines. After these
        `left_out`, the number of images that could not be read, if there were any: no measure counts them.

    Raises:
        InputError: no model was exported yet, there is no such part, or the data are missing or have changed.
    """
    network, recipe, task = run.model(checkpoint).to(device), run.recipe, task_of(run.recipe)
    dataset = plain_dataset(run, split)
    _check_images(run, dataset)
    group_examples(network, dataset, recipe)
    total = -(-len(dataset) // batch_size)
    examples = _reported(batches(dataset, batch_size, device, recipe.data.num_workers), total, on_batch)
    if task.logits is not None:
        yield from classification(_outputs(task.logits, network, examples, recipe), dataset.classes)
    elif task.outputs is not None:
        yield from _scores(network, list(_outputs(task.outputs, network, examples, recipe)), recipe)
    else:
        yield from mean_metrics(network, examples, recipe, getattr(dataset, "classes", ()))
    if left_out := len(getattr(dataset, "unreadable", ())):
        yield "left_out", left_out
    if baselines and task.baselines is not None:
        yield from baseline_metrics(run, dataset, batch_size)


def _check_images(run: Run, dataset: Any) -> None:
    """Check the files of images of any size, by their headers alone, before the first batch."""
    if getattr(dataset, "reference_image", None) is not None:
        run.check_pixels(dataset)
        masks = masks_of(run.recipe.data)
        sizes_of(dataset.source, masks.check if masks else None)


def plain_dataset(run: Run, split: Split) -> Any:
    """A part of a run's data without the augmentation of training, and without stand-ins for what cannot be read."""
    settings = run.recipe.data
    if isinstance(settings, ImageData):
        settings = replace(settings, augmentation="none")
    dataset = data.build_dataset(settings, split, seed=run.recipe.trainer.seed)
    if isinstance(dataset, ImageDataset):
        dataset.held_out = True
    return dataset


def _reported(examples: Iterable[Batch], total: int, on_batch: Callable[[int, int], None]) -> Iterator[Batch]:
    for done, batch in enumerate(examples, start=1):
        yield batch
        on_batch(done, total)


@torch.inference_mode()
def _outputs(
    outputs: Callable[[Any, Batch, Any], tuple[Tensor, Tensor]],
    network: Any,
    examples: Iterable[Batch],
    recipe: Recipe,
) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in examples:
        yield outputs(network, batch, recipe)


@torch.inference_mode()
def _scores(network: Any, found: Sequence[tuple[Tensor, Tensor]], recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """How many examples there are, and the metrics of a task on all of them at once.

    Raises:
        InputError: there are none.
    """
    scores = task_of(recipe).scores
    assert scores is not None
    if not found:
        raise InputError("there are no examples to evaluate")
    outputs, labels = (torch.cat(each) for each in zip(*found, strict=True))
    yield "examples", len(outputs)
    yield from scores(network, outputs, labels, recipe)


def baseline_metrics(run: Run, dataset: Any, batch_size: int = 64) -> Iterator[tuple[str, float]]:
    """Baselines of a run's task on a dataset, which its model should surpass; nothing if the task has none."""
    recipe = run.recipe
    baselines = task_of(recipe).baselines
    if baselines is not None:
        test = batches(dataset, batch_size, workers=recipe.data.num_workers)
        yield from baselines(recipe, _training_batches(run, batch_size), test)


def _training_batches(run: Run, batch_size: int) -> Iterator[Batch]:
    # A generator: the training part is opened only if the baseline reads it.
    yield from batches(plain_dataset(run, "train"), batch_size, workers=run.recipe.data.num_workers)


def recognition(
    run: Run,
    classifier: Run,
    count: int = 500,
    *,
    device: str | torch.device = "cpu",
    batch_size: int = 64,
    checkpoint: str = "last",
    **sampling: Any,
) -> Iterator[tuple[str, Any]]:
    """Draw `count` samples of a class-conditional diffusion run, classes in turn, and classify them with another run.

    `checkpoint` is that of the diffusion run, see `Run.model`; `sampling` are the options of `FITImageDenoiser.sample`
    (steps, sampler, guidance, seed).

    Yields:
        the metrics of `sample_accuracy`.

    Raises:
        InputError: a run that draws no images by class or was trained without classes, a `classifier` that is none or
            has other classes.
    """
    if task_of(run.recipe).verb != "sample" or task_of(classifier.recipe).logits is None:
        raise InputError(
            f"a classifier is applied to the samples of a diffusion run; {run.path} is a {run.recipe.task} run and "
            f"{classifier.path} a {classifier.recipe.task} run"
        )
    network, judge = run.model(checkpoint).to(device), classifier.model().to(device)
    if not network.num_classes:
        raise InputError(f"{run.path} was trained without classes, so its samples have no class to recognise")
    if run.classes != classifier.classes:
        raise InputError(f"{run.path} has the classes {run.classes}, {classifier.path} {classifier.classes}")
    labels = [k % len(run.classes) for k in range(count)]
    images = network.sample(count, labels, batch_size=batch_size, **sampling)
    yield from sample_accuracy(judge, images, labels, run.classes)
