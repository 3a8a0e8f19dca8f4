"""When a run is saved: every so many steps, at the end, at a clean stop on a signal, and after an error."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from torch import nn

from fitformer.config.schema import Training
from fitformer.errors import InputError
from fitformer.models.pretrained import Pretrained
from fitformer.training.checkpoint_file import check_disk_space, first_line, tensor_bytes
from fitformer.training.ema import EMACallback
from fitformer.training.run_dir import Run


class TrainingInterruptedError(Exception):
    """Training was asked to stop, and its checkpoint is saved."""


def noted(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What `CheckpointCallback` noted in a checkpoint, see `CheckpointCallback.state_dict`."""
    return checkpoint["callbacks"].get(CheckpointCallback.__qualname__, {})


def global_batch(training: Training, devices: int) -> int:
    """Examples of an optimizer step."""
    return training.batch_size * training.accumulate * devices


class CheckpointCallback(Checkpoint):
    """Writes `last.ckpt` and the exported model every so many steps, at the end, on a signal, and after an error.

    A checkpoint of a step that is validated too is written after the validation, so that it holds the best score. After
    a signal or an error in the validation it is written without, and says that the validation is pending: a run that
    goes on from it begins with that. As a `Checkpoint` the callback runs after the one that keeps the best.

    Weights, optimizer and average change only between `on_before_optimizer_step` and the end of that batch. Elsewhere
    they belong to the last complete step, and only Lightning's counters run ahead, over the micro-batches of the step
    in progress. A checkpoint saved there takes the counters of the last complete step, so that the step in progress is
    repeated from its first micro-batch.

    Args:
        run: where to write.
        average: exported in place of the weights, if given.
        step: the step of the present `last.ckpt`, 0 if there is none.
    """

    def __init__(self, run: Run, average: EMACallback | None, step: int = 0) -> None:
        self.run, self.average = run, average
        self.saved_at = self._tried_at = step
        self.stop_asked = self.validation_pending = False
        self._failure: Exception | None = None
        # Lightning's counters at the last complete step; None during an optimizer step.
        self._counters: dict[str, Any] | None = None
        # The training metrics since they were last logged, and over how many micro-batches, at that step.
        self._recent: tuple[dict[str, Any], int] = ({}, 0)
        self._batch = 0

    def state_dict(self) -> dict[str, Any]:
        """Whether the step's validation is still to come, the metrics that are not logged yet, examples of a step."""
        return {
            "validation_pending": self.validation_pending,
            "recent": self._recent[0],
            "recent_count": self._recent[1],
            "global_batch": self._batch,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.validation_pending = bool(state_dict["validation_pending"])

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Take the counters and the metrics of the step that the run goes on from."""
        self._counters = checkpoint["loops"]["fit_loop"]
        saved = checkpoint["callbacks"][self.state_key]
        self._recent = saved["recent"], saved["recent_count"]
        pl_module.recent, pl_module.recent_count = self._recent

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Install the signal handlers again, since Lightning's own would end the run in the middle of a step.

        Run the validation that the checkpoint lacks, if it lacks one.
        """
        self.install_signal_handlers()
        self._batch = global_batch(self.run.recipe.trainer, trainer.world_size)
        # One more if only the last step's validation is missing: Lightning would not start otherwise.
        trainer.fit_loop.epoch_loop.max_steps = self.run.recipe.trainer.steps
        if self.validation_pending:
            validation = trainer.fit_loop.epoch_loop.val_loop
            validation.restarting, trainer.validating = False, True
            validation.run()
            trainer.training = True

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Mark the weights as those of no complete step, if the gradient lets the step be taken.

        Raises:
            InputError: the gradient is NaN or infinite; the weights are still those of the step before.
        """
        _check_gradient(pl_module, trainer.global_step + 1)
        self._counters = None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any) -> None:
        """Save at the end of an optimizer step, if a checkpoint is due.

        Raises:
            TrainingInterruptedError: a signal asked to stop; everything is saved.
            OSError: no space on the disk.
            InputError: weights are NaN or infinite, and would replace a good checkpoint.
        """
        if trainer.fit_loop._should_accumulate():
            return
        self._note_step(trainer, pl_module)
        stop = self._all_agree_to_stop(trainer)
        if not self.validation_pending or stop:
            self._save_if_due(trainer, pl_module, stop)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save after the validation, if a checkpoint is due or the present one lacks it.

        Raises:
            TrainingInterruptedError, OSError, InputError: as `on_train_batch_end`.
        """
        lacking = self.validation_pending and self.saved_at == trainer.global_step
        self.validation_pending = False
        self._save_if_due(trainer, pl_module, self._all_agree_to_stop(trainer), lacking)

    def _note_step(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Take the counters and the metrics of a complete step, and whether its validation follows."""
        loop: Any = trainer.fit_loop
        self._counters = loop.state_dict()
        self._recent = dict(pl_module.recent), pl_module.recent_count
        self.validation_pending = trainer.enable_validation and loop.epoch_loop._should_check_val_fx(loop._data_fetcher)

    def _save_if_due(self, trainer: pl.Trainer, pl_module: Any, stop: bool, again: bool = False) -> None:
        training, step = self.run.recipe.trainer, trainer.global_step
        due = stop or step % training.checkpoint_every == 0 or step == training.steps
        if again or (due and step != self.saved_at):
            self._save(trainer, pl_module)
            trainer.strategy.barrier()
        if stop and (step < training.steps or self.validation_pending):
            raise TrainingInterruptedError

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Save the last complete step after an error, unless that was tried; `resume_hint` has the result.

        Nothing here waits for the other processes: they may be gone.
        """
        told_to_stop_at_once = not isinstance(exception, Exception)
        if told_to_stop_at_once or not trainer.is_global_zero or trainer.global_step == self._tried_at:
            return
        # A failure here must not replace the original error.
        try:
            if self._counters is None and _stepped(trainer):
                # A later callback failed: the step itself is complete but for its average.
                if self.average:
                    self.average.on_train_batch_end(trainer, pl_module, None, None, 0)
                self._note_step(trainer, pl_module)
            if self._counters is not None:
                self._save(trainer, pl_module)
        except Exception as error:
            self._failure = error

    def resume_hint(self) -> str:
        """Text for the end of an error message: what could not be saved, and where the same command resumes."""
        failed = f"; step {self._tried_at} was not saved: {first_line(self._failure)}" if self._failure else ""
        if self.saved_at == self.run.recipe.trainer.steps:
            return f"{failed}; all {self.saved_at} steps are done and saved"
        return failed + (f"; the same command goes on from step {self.saved_at}" if self.saved_at else "")

    def _all_agree_to_stop(self, trainer: pl.Trainer) -> bool:
        # Ranks receive a signal at different steps; stopping at different steps would leave some waiting.
        if trainer.world_size == 1:
            return self.stop_asked
        return trainer.strategy.reduce_boolean_decision(self.stop_asked, all=False)

    def _save(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._tried_at = trainer.global_step
        if not all(bool(weight.isfinite().all()) for weight in pl_module.network.parameters()):
            raise InputError(
                f"training diverged: at step {trainer.global_step} some weights are NaN or infinite; the checkpoint "
                "before is kept; lower optimizer.lr, or look for NaN or infinite pixels"
            )
        # The model first: once the last checkpoint is written, the run is complete.
        if trainer.is_global_zero:
            export(self.average.network() if self.average else pl_module.network, self.run.model_folder)
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        checkpoint["loops"]["fit_loop"] = self._counters
        # A run may go on with more steps: the last batch of the present ones does not end its one epoch.
        checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"] = False
        trainer.strategy.save_checkpoint(checkpoint, self.run.last_checkpoint)
        self.saved_at = trainer.global_step

    def install_signal_handlers(self) -> dict[signal.Signals, Any]:
        """Handle SIGINT and SIGTERM; returns the previous handlers. Only the main thread can: elsewhere, none."""
        if threading.current_thread() is not threading.main_thread():
            return {}
        return {number: signal.signal(number, self.ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: stop after the current step; a second signal stops at once.

        Raises:
            KeyboardInterrupt: this is the second signal.
        """
        if self.stop_asked:
            raise KeyboardInterrupt
        self.stop_asked = True


def _check_gradient(module: nn.Module, step: int) -> None:
    """Refuse a step whose gradient is NaN or infinite.

    Raises:
        InputError: names the step and the first such parameter.
    """
    gradients = {name: each.grad for name, each in module.named_parameters() if each.grad is not None}
    # The norm is NaN or infinite if one number is: one value to wait for, whatever the number of parameters.
    if bool(nn.utils.get_total_norm(list(gradients.values())).isfinite()):
        return
    wrong = [name for name, gradient in gradients.items() if not bool(gradient.isfinite().all())]
    which = f"of {wrong[0].removeprefix('network.')}, the first of {len(wrong)}," if wrong else "as a whole"
    raise InputError(
        f"training diverged at step {step}: the gradient {which} is NaN or infinite, and the step was not taken; lower "
        "optimizer.lr, or look for NaN or infinite pixels"
    )


def _stepped(trainer: pl.Trainer) -> bool:
    """Whether the optimizer has stepped, while hooks at the end of that batch are still to run."""
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return batches.processed > batches.completed and not trainer.fit_loop._should_accumulate()


@contextmanager
def stopping_cleanly(keeper: CheckpointCallback) -> Iterator[None]:
    """Within this context, SIGINT and SIGTERM end training after a step, with a checkpoint."""
    before = keeper.install_signal_handlers()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def export(network: Any, folder: Path) -> None:
    """Write a network for `from_pretrained`; each file is replaced as a whole.

    Raises:
        OSError: no space on the disk.
    """
    assert isinstance(network, Pretrained)
    with check_disk_space(folder / "model.safetensors", tensor_bytes(network.state_dict())):  # type: ignore[attr-defined]
        network.save_pretrained(folder)
