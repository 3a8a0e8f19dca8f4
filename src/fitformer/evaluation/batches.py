"""Batches of a whole dataset, and means over it that do not depend on the batch size."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from fitformer.config.schema import Recipe
from fitformer.data.order import EvaluationBatches
from fitformer.data.workers import dead_worker
from fitformer.tasks import task_of
from fitformer.tasks.batch import Batch


def batches(dataset: Any, batch_size: int, device: str | torch.device = "cpu", workers: int = 0) -> Iterator[Batch]:
    """Yield every example of a dataset once, in order, as batches on a device; the last batch may be smaller.

    Held-out images that cannot be read are left out of their batch.

    Raises:
        ChildProcessError: a worker process of the loader died.
    """
    order = EvaluationBatches(len(dataset), batch_size)
    collate = getattr(dataset, "collate", None)
    loader = DataLoader(dataset, batch_sampler=order, num_workers=workers, collate_fn=collate)
    for batch in _loaded(loader):
        if not batch:
            continue
        yield {  # type: ignore[misc]
            name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()
        }


def _loaded(loader: DataLoader) -> Iterator[Any]:
    try:
        yield from loader
    except RuntimeError as error:
        if not (message := dead_worker(error)):
            raise
        raise ChildProcessError(f"{message}; data.num_workers 0 uses the least memory") from error


def mean_metrics(network: Any, examples: Iterator[Batch], recipe: Recipe) -> Iterator[tuple[str, float | int]]:
    """Held-out metrics of a recipe's task over all batches, each batch weighted by its number of examples or tokens.

    Yields:
        that number under its name (`examples` or `tokens`), then the mean of each metric.
    """
    task, sums, total = task_of(recipe), dict[str, float](), 0
    with torch.inference_mode():
        for batch in examples:
            assert task.measure is not None
            means, weight = task.measure(network, batch, recipe)
            total += weight
            for name, value in means.items():
                sums[name] = sums.get(name, 0.0) + float(value) * weight
    yield task.counted, total
    for name, added in sums.items():
        yield name, added / total
