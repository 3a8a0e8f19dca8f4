"""Batches of a whole dataset, and means over it that do not depend on the batch size."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from fitformer.config.schema import Recipe
from fitformer.data.order import EvaluationBatches
from fitformer.data.workers import dead_worker
from fitformer.tasks import task_of
from fitformer.tasks._means import Means
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


def mean_metrics(
    network: Any, examples: Iterator[Batch], recipe: Recipe, classes: Sequence[str] = ()
) -> Iterator[tuple[str, Any]]:
    """Held-out metrics of a recipe's task over all batches, each batch weighted by its number of examples or tokens.

    Yields:
        that number under its name (`examples` or `tokens`), then the mean of each metric, or what the task concludes
        from the means.
    """
    task, found = task_of(recipe), Means()
    with torch.inference_mode():
        for batch in examples:
            assert task.measure is not None
            found.add(*task.measure(network, batch, recipe))
    yield task.counted, found.weight
    means = found.means()
    if task.conclude is not None:
        yield from task.conclude(means, classes)
    else:
        yield from ((name, float(value)) for name, value in means.items())
