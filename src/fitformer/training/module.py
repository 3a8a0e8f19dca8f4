"""The objective in Lightning's terms: one module for all tasks, and the data in the order of `data.order`."""

import hashlib
from collections.abc import Iterable
from itertools import chain
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fitformer._support.processes import from_all_processes
from fitformer.config.schema import Recipe
from fitformer.data.order import EvaluationBatches, StepBatches, spread_part
from fitformer.models.base import FITModel
from fitformer.tasks import optimizers, set_execution, task_of
from fitformer.tasks._means import Means, joined
from fitformer.tasks.batch import Batch


def step_seed(seed: int, micro_step: int, rank: int) -> int:
    """The seed of all randomness of one training step (dropout, noise): a hash, so that no two steps are near."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{micro_step}/{rank}".encode(), digest_size=8).digest())


class FITModule(pl.LightningModule):
    """A network and a recipe; what to compute is asked of the task's plain functions.

    `recent` holds the training metrics summed since they were last taken: logging them is the observers' business.
    Checkpoints keep it, so that a run that was stopped between two measurements averages over the same steps.
    """

    def __init__(self, network: FITModel, recipe: Recipe) -> None:
        super().__init__()
        self.network: FITModel = network
        self.recipe = recipe
        self.recent: dict[str, Tensor] = {}
        self.recent_count = 0
        self._held_out = Means()
        self._outputs: list[tuple[Tensor, Tensor]] = []

    def on_fit_start(self) -> None:
        """Choose how the trunk runs; after the average was copied, which is only ever evaluated."""
        set_execution(self.network, self.recipe.trainer)
        if self.recipe.trainer.compile:
            # Layers of a class share their compiled variants (widths, training or not), and torch gives up after 8.
            torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
            for layer in self.network.trunk.layers():
                layer.compile()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Make dropout and noise a function of the step alone, so that a resumed run repeats none of them."""
        torch.manual_seed(step_seed(self.recipe.trainer.seed, batch_idx, self.global_rank))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The task's loss on one micro-batch."""
        done = self.global_step / self.recipe.trainer.steps
        loss, metrics = task_of(self.recipe).loss(self.network, {**batch, "done": done}, self.recipe)
        for name, value in {"loss": loss.detach(), **metrics}.items():
            self.recent[name] = self.recent[name] + value if name in self.recent else value
        self.recent_count += 1
        return loss

    def take_recent(self) -> dict[str, float]:
        """Means of the training metrics since the last call."""
        means = {f"train/{name}": float(value) / self.recent_count for name, value in self.recent.items()}
        self.recent, self.recent_count = {}, 0
        return means

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The task's held-out metrics, weighted over batches and ranks by what they are means over.

        Of a task whose metrics are of all examples at once, the outputs are kept for the end.
        """
        if not batch:
            # None of its images could be read.
            return
        task = task_of(self.recipe)
        if task.outputs is not None:
            outputs, labels = task.outputs(self.network, batch, self.recipe)
            self._outputs.append((outputs.cpu(), labels.cpu()))
            return
        assert task.measure is not None
        metrics, weight = task.measure(self.network, batch, self.recipe)
        if task.conclude is not None:
            self._held_out.add(metrics, weight)
            return
        named = {f"val/{name}": value for name, value in metrics.items()}
        self.log_dict(named, batch_size=weight, on_epoch=True, sync_dist=True, logger=False)

    def on_validation_epoch_start(self) -> None:
        """Forget what a validation that an error ended had measured."""
        self._held_out, self._outputs = Means(), []

    def on_validation_epoch_end(self) -> None:
        """What all held-out examples of all ranks amount to, of a task whose measures are no means themselves."""
        found = {f"val/{name}": value for name, value in self._concluded() if isinstance(value, float)}
        if found:
            self.log_dict(found, on_epoch=True, logger=False)

    def _concluded(self) -> Iterable[tuple[str, Any]]:
        task = task_of(self.recipe)
        if task.conclude is not None and (means := joined(self._held_out).means()):
            return task.conclude(means, self.trainer.datamodule.held_out.classes)  # type: ignore[attr-defined]
        if task.scores is not None and (held_out := list(chain.from_iterable(from_all_processes(self._outputs)))):
            outputs, labels = (torch.cat(each).to(self.device) for each in zip(*held_out, strict=True))
            return task.scores(self.network, outputs, labels, self.recipe)
        return ()

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip the global norm. Lightning refuses to with a fused optimizer under bf16, where nothing is scaled."""
        if gradient_clip_val:
            nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)

    def on_train_start(self) -> None:
        """Set the learning rate by the recipe: a checkpoint holds that of its own schedule, which may be shorter."""
        settings = self.recipe.optimizer
        share = optimizers.rate(self.global_step, settings, self.recipe.trainer.steps)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = settings.lr * share

    def configure_optimizers(self) -> Any:
        """The optimizer and its schedule, stepped with it."""
        optimizer, schedule = optimizers.build(self.network, self.recipe.optimizer, self.recipe.trainer.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class StepLoader(DataLoader):
    """A loader whose batches are a function of the step; the two methods tell Lightning that it can be resumed."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the step is all there is to know."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing: `Data.train_dataloader` starts the order at the resumed step."""


class Data(pl.LightningDataModule):
    """Training data as one endless epoch from the resumed step on; held-out data in order, split over ranks."""

    def __init__(self, recipe: Recipe, train: Any, held_out: Any) -> None:
        super().__init__()
        self.recipe, self.train, self.held_out = recipe, train, held_out

    def train_dataloader(self) -> StepLoader:
        """Batches from the trainer's present step to the last."""
        training, trainer = self.recipe.trainer, self.trainer
        assert trainer is not None
        batches = StepBatches(
            len(self.train),
            training.batch_size,
            training.seed,
            trainer.global_rank,
            trainer.world_size,
            trainer.global_step * training.accumulate,
            total_steps=trainer.max_steps * training.accumulate,
            labels=self.train.source.labels if getattr(self.recipe.data, "sampling", "") == "balanced" else None,
        )
        return StepLoader(self.train, batch_sampler=batches, **self._reading(self.train))

    def val_dataloader(self) -> DataLoader:
        """Every held-out example once, or those of `validate_batches`, spread over all and the same each time."""
        trainer = self.trainer
        assert trainer is not None
        size = self.recipe.trainer.batch_size
        length, most = len(self.held_out), self.recipe.trainer.validate_batches
        count = length if most is None else most * size * trainer.world_size
        places = spread_part(length, count, self.recipe.trainer.seed)
        batches = EvaluationBatches(length, size, trainer.global_rank, trainer.world_size, places)
        return DataLoader(self.held_out, batch_sampler=batches, **self._reading(self.held_out))

    def _reading(self, dataset: Any) -> dict[str, Any]:
        workers = self.recipe.data.num_workers
        return {
            "collate_fn": getattr(dataset, "collate", None),
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }
