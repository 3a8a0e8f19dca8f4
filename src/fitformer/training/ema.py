"""The average of the weights, which is validated, exported and sampled from."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn

from fitformer._support.checks import rate


class EMACallback(WeightAveraging):
    """Exponential moving average of the weights, whose decay warms up as `(1 + k) / (10 + k)` to `decay`.

    Without the warm-up the random initial weights would dominate the average of a short run.

    Raises:
        InputError: a decay that is not at least 0 and below 1.
    """

    def __init__(self, decay: float) -> None:
        super().__init__(multi_avg_fn=self._blend)
        self.decay, self.updates = rate("decay", decay), 0
        self._in_place = False

    def _blend(self, averaged: list[Tensor], current: list[Tensor], count: Tensor) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        with torch.no_grad():
            torch._foreach_lerp_(averaged, current, 1 - decay)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any) -> None:
        """Count optimizer steps on the host: reading a counter on a GPU would wait for it."""
        self.updates = trainer.global_step
        super().on_train_batch_end(trainer, pl_module, *rest)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Swap the average in for the weights."""
        super().on_validation_epoch_start(trainer, pl_module)
        self._in_place = True

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Swap the weights back in."""
        super().on_validation_epoch_end(trainer, pl_module)
        self._in_place = False

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Swap the weights back in if a validation failed, before a checkpoint is saved on the way out."""
        if self._in_place:
            self.on_validation_epoch_end(trainer, pl_module)

    def network(self) -> nn.Module:
        """The averaged network."""
        assert self._average_model is not None
        return self._average_model.module.network  # type: ignore[return-value]
