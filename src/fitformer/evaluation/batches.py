"""A dataset once from end to end, in batches, and means over it that are exact however the batches fall."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from fitformer.config.schema import Recipe
from fitformer.data.order import EvaluationBatches
from fitformer.data.workers import dead_worker
from fitformer.tasks import Batch, task_of


def batches(dataset: Any, batch_size: int, device: str | torch.device = "cpu", workers: int = 0) -> Iterator[Batch]:
    """Every example of a dataset once, in its order, as batches on a device; the last may be smaller.

    Raises:
        ChildProcessError: a process that reads ahead died.
    """
    order = EvaluationBatches(len(dataset), batch_size)
    collate = getattr(dataset, "collate", None)
    loader = DataLoader(dataset, batch_sampler=order, num_workers=workers, collate_fn=collate)
    for batch in _loaded(loader):
        yield {  # type: ignore[misc]
            name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()
        }


def _loaded(loader: DataLoader) -> Iterator[Any]:
    try:
        yield from loader
    except RuntimeError as error:
        if not (said := dead_worker(error)):
            raise
        raise ChildProcessError(f"{said}; with data.num_workers 0 it takes least memory") from error


def measured(
    network: Any, found: Iterator[Batch], recipe: Recipe, count: str = "examples"
) -> Iterator[tuple[str, float | int]]:
    """The task's own held-out metrics over all batches, weighted by what each is a mean over, and that number."""
    measure, sums, whole = task_of(recipe).measure, dict[str, float](), 0
    with torch.inference_mode():
        for batch in found:
            means, weight = measure(network, batch, recipe)
            whole += weight
            for name, value in means.items():
                sums[name] = sums.get(name, 0.0) + float(value) * weight
    yield count, whole
    for name, together in sums.items():
        yield name, together / whole
