"""Keeping what was learned: whole checkpoints or none, averaged weights, a clean stop on a signal or an error."""

import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fitformer._support.atomic_files import write_atomically
from fitformer.errors import InputError
from fitformer.models.pretrained import Pretrained, difference
from fitformer.training.run_dir import Run


class TrainingInterruptedError(Exception):
    """Training was asked to stop, and its checkpoint is saved."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints written beside their place and renamed into it, and read back as tensors and plain values only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint; the one that stood at `path` stays if there is no room.

        Raises:
            OSError: it could not be written; the message says how much was needed and how much is free.
        """
        with (
            check_disk_space(path, size_of(checkpoint)),
            write_atomically(path) as scratch,
            open(scratch, "wb") as file,
        ):
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        """Read a checkpoint, never anything but tensors and plain values."""
        return load(path)


def load(path: str | Path, lazily: bool = False) -> dict[str, Any]:
    """Read a checkpoint's tensors and plain values; `lazily`, each tensor only when it is looked at.

    Raises:
        InputError: the file is not a whole checkpoint.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=lazily)
    except OSError:
        raise
    except Exception as error:
        raise InputError(
            f"{path} is not a whole checkpoint ({_first_line(error)}); remove it to start afresh"
        ) from error


def size_of(checkpoint: Any) -> int:
    """Bytes of all tensors in nested containers: nearly what a checkpoint takes on disk."""
    leaves = tree_leaves(checkpoint)
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, Tensor))


@contextmanager
def check_disk_space(path: str | Path, needed: int) -> Iterator[None]:
    """Run a write of about `needed` bytes to `path`; if it fails, say so with both numbers.

    Raises:
        OSError: there is no room, or writing failed on the way.
    """
    folder = Path(path).absolute().parent
    folder.mkdir(parents=True, exist_ok=True)
    if needed > (free := shutil.disk_usage(folder).free):
        raise OSError(_no_room(path, needed, free, "no room on the disk"))
    try:
        yield
    # torch and safetensors turn a failed write into errors of their own kinds.
    except Exception as error:
        free = shutil.disk_usage(folder).free
        raise OSError(_no_room(path, needed, free, _first_line(error))) from error


def _no_room(path: str | Path, needed: int, free: int, why: str) -> str:
    return (
        f"could not write {path}: {why}; about {needed / 1e6:,.1f} MB are needed, {free / 1e6:,.1f} MB are free; "
        "make room: what was saved before is unharmed"
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class EMACallback(WeightAveraging):
    """Exponential moving average of the weights, whose decay warms up as `(1 + k) / (10 + k)` to `decay`.

    Without the warm-up the random first weights would stay in the average of a short run.
    """

    def __init__(self, decay: float) -> None:
        super().__init__(multi_avg_fn=self._blend)
        self.decay, self.updates = decay, 0
        self._in_place = False

    def _blend(self, averaged: list[Tensor], current: list[Tensor], count: Tensor) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        with torch.no_grad():
            torch._foreach_lerp_(averaged, current, 1 - decay)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any) -> None:
        """Count optimizer steps on the host, so that a GPU need not be asked for its counter."""
        self.updates = trainer.global_step
        super().on_train_batch_end(trainer, pl_module, *rest)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the average in the place of the weights."""
        super().on_validation_epoch_start(trainer, pl_module)
        self._in_place = True

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the weights back."""
        super().on_validation_epoch_end(trainer, pl_module)
        self._in_place = False

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Put the weights back if a validation ended in an error, before a checkpoint is saved on the way out."""
        if self._in_place:
            self.on_validation_epoch_end(trainer, pl_module)

    def network(self) -> nn.Module:
        """The averaged network."""
        assert self._average_model is not None
        return self._average_model.module.network  # type: ignore[return-value]


class CheckpointCallback(Callback):
    """Writes `last.ckpt` and the exported model every so many steps, at the end, when asked to stop, after an error.

    Weights, optimizer and average change only from `on_before_optimizer_step` to the end of that batch. Anywhere else
    they are those of the last whole step, and only Lightning's counters run ahead of them, over the micro-batches of a
    step that is not whole yet; a checkpoint saved there takes the counters of the last whole step, so that the step is
    done again from its first micro-batch.

    Args:
        run: where to write.
        average: exported in place of the weights, if given.
        step: the step that stands in `last.ckpt`, 0 if there is none.
    """

    def __init__(self, run: Run, average: EMACallback | None, step: int = 0) -> None:
        self.run, self.average = run, average
        self.saved_at = self._tried_at = step
        self.stop_asked = False
        self._failure: Exception | None = None
        # Lightning's counters at the last whole step; None while a step is being taken.
        self._counters: dict[str, Any] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen to signals again: Lightning's own handler would end the run in the middle of a step."""
        self.install_signal_handlers()

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """From here on the weights are those of no whole step."""
        self._counters = None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any) -> None:
        """Save at the end of an optimizer step, if it is time.

        Raises:
            Interrupted: a signal asked to stop; everything is saved.
            OSError: no room on the disk.
            InputError: the weights are no numbers any more, and would take the place of a checkpoint.
        """
        training, step = self.run.recipe.trainer, trainer.global_step
        if trainer.fit_loop._should_accumulate():
            return
        self._counters = trainer.fit_loop.state_dict()
        stop = self._all_agree_to_stop(trainer)
        if (stop or step % training.checkpoint_every == 0 or step == training.steps) and step != self.saved_at:
            self._save(trainer, pl_module)
            trainer.strategy.barrier()
        if stop and step < training.steps:
            raise TrainingInterruptedError

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Save the last whole step after an error, unless that was tried; `resume_hint` says what came of it.

        The other processes may be gone, so that nothing here waits for them.
        """
        told_to_stop_at_once = not isinstance(exception, Exception)
        if told_to_stop_at_once or not trainer.is_global_zero or trainer.global_step == self._tried_at:
            return
        # Whatever goes wrong now must not take the place of the error.
        try:
            if self._counters is None and _stepped(trainer):
                # Only who watches failed: the step itself is whole but for its average.
                if self.average:
                    self.average.on_train_batch_end(trainer, pl_module, None, None, 0)
                self._counters = trainer.fit_loop.state_dict()
            if self._counters is not None:
                self._save(trainer, pl_module)
        except Exception as error:
            self._failure = error

    def resume_hint(self) -> str:
        """What to say after an error: what could not be saved, and where the same command goes on."""
        failed = f"; step {self._tried_at} was not saved: {_first_line(self._failure)}" if self._failure else ""
        if self.saved_at == self.run.recipe.trainer.steps:
            return f"{failed}; all {self.saved_at} steps are done and saved"
        return failed + (f"; the same command goes on from step {self.saved_at}" if self.saved_at else "")

    def _all_agree_to_stop(self, trainer: pl.Trainer) -> bool:
        # Ranks see a signal at different steps; stopping at different steps would leave the others waiting.
        if trainer.world_size == 1:
            return self.stop_asked
        return trainer.strategy.reduce_boolean_decision(self.stop_asked, all=False)

    def _save(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._tried_at = trainer.global_step
        if not all(bool(weight.isfinite().all()) for weight in pl_module.network.parameters()):
            raise InputError(
                f"training diverged: at step {trainer.global_step} some weights are no numbers; the checkpoint before "
                "is kept; lower optimizer.lr, or look for pixels that are no numbers"
            )
        # The model first: where the last checkpoint stands, nothing is left to be done.
        if trainer.is_global_zero:
            export(self.average.network() if self.average else pl_module.network, self.run.model_folder)
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        checkpoint["loops"]["fit_loop"] = self._counters
        trainer.strategy.save_checkpoint(checkpoint, self.run.last_checkpoint)
        self.saved_at = trainer.global_step

    def install_signal_handlers(self) -> dict[signal.Signals, Any]:
        """Handle both signals; gives the handlers before. They belong to the main thread: elsewhere, none."""
        if threading.current_thread() is not threading.main_thread():
            return {}
        return {number: signal.signal(number, self.ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: stop after the present step; a second signal stops at once.

        Raises:
            KeyboardInterrupt: this is the second one.
        """
        if self.stop_asked:
            raise KeyboardInterrupt
        self.stop_asked = True


def _stepped(trainer: pl.Trainer) -> bool:
    """Whether the optimizer has stepped, and the hooks at the end of that batch have not all run."""
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return batches.processed > batches.completed and not trainer.fit_loop._should_accumulate()


@contextmanager
def stopping_cleanly(keeper: CheckpointCallback) -> Iterator[None]:
    """While inside, Ctrl-C and a request to terminate end training after a step, with a checkpoint."""
    before = keeper.install_signal_handlers()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def export(network: Any, folder: Path) -> None:
    """Write a network so that `from_pretrained` reads it; the weights change from whole to whole.

    Raises:
        OSError: no room on the disk.
    """
    assert isinstance(network, Pretrained)
    with check_disk_space(folder / "model.safetensors", size_of(network.state_dict())):  # type: ignore[attr-defined]
        network.save_pretrained(folder)


def check_fits(checkpoint: dict[str, Any], network: nn.Module, path: Path) -> None:
    """Refuse a checkpoint of another architecture before anything is loaded.

    Raises:
        InputError: names what is missing, unknown or misshapen.
    """
    given = {name.removeprefix("network."): tuple(value.shape) for name, value in checkpoint["state_dict"].items()}
    faults = difference(given, {name: tuple(value.shape) for name, value in network.state_dict().items()})
    if faults:
        raise InputError(f"{path} is a checkpoint of another architecture: {faults}")
