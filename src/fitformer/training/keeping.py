"""Keeping what was learned: whole checkpoints or none, averaged weights, a clean stop on Ctrl-C."""

import shutil
import signal
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

from fitformer.errors import InputError
from fitformer.files import write_atomically
from fitformer.pretrained import Pretrained, difference
from fitformer.runs import Run


class Interrupted(Exception):
    """Training was asked to stop, and its checkpoint is saved."""


class WholeFiles(TorchCheckpointIO):
    """Checkpoints written beside their place and renamed into it, and read back as tensors and plain values only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint; the one that stood at `path` stays if there is no room.

        Raises:
            OSError: it could not be written; the message says how much was needed and how much is free.
        """
        with room_for(path, size_of(checkpoint)), write_atomically(path) as scratch, open(scratch, "wb") as file:
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
def room_for(path: str | Path, needed: int) -> Iterator[None]:
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
        f"could not write {path}: {why}; about {needed / 1e6:,.1f} MB are needed, {free / 1e6:,.1f} MB are free. "
        "What was saved before is unharmed; make room and give the same command to go on"
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class Average(WeightAveraging):
    """Exponential moving average of the weights, whose decay warms up as `(1 + k) / (10 + k)` to `decay`.

    Without the warm-up the random first weights would stay in the average of a short run.
    """

    def __init__(self, decay: float) -> None:
        super().__init__(multi_avg_fn=self._blend)
        self.decay, self.updates = decay, 0

    def _blend(self, averaged: list[Tensor], current: list[Tensor], count: Tensor) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        with torch.no_grad():
            torch._foreach_lerp_(averaged, current, 1 - decay)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any) -> None:
        """Count optimizer steps on the host, so that a GPU need not be asked for its counter."""
        self.updates = trainer.global_step
        super().on_train_batch_end(trainer, pl_module, *rest)

    def network(self) -> nn.Module:
        """The averaged network."""
        assert self._average_model is not None
        return self._average_model.module.network  # type: ignore[return-value]


class Keeper(Callback):
    """Writes `last.ckpt` and the exported model every so many steps, at the end, and when asked to stop."""

    def __init__(self, run: Run, average: Average | None) -> None:
        self.run, self.average = run, average
        self.saved_at = -1
        self.stop_asked = False

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
        stop = self._all_agree_to_stop(trainer)
        if (stop or step % training.checkpoint_every == 0 or step == training.steps) and step != self.saved_at:
            self._save(trainer, pl_module)
        if stop and step < training.steps:
            raise Interrupted

    def _all_agree_to_stop(self, trainer: pl.Trainer) -> bool:
        # Ranks see a signal at different steps; stopping at different steps would leave the others waiting.
        if trainer.world_size == 1:
            return self.stop_asked
        return trainer.strategy.reduce_boolean_decision(self.stop_asked, all=False)

    def _save(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if not all(bool(weight.isfinite().all()) for weight in pl_module.network.parameters()):
            raise InputError(
                f"training diverged: at step {trainer.global_step} some weights are no numbers; the checkpoint before "
                "is kept; lower optimizer.lr, or look for pixels that are no numbers"
            )
        trainer.save_checkpoint(self.run.last_checkpoint)
        if trainer.is_global_zero:
            export(self.average.network() if self.average else pl_module.network, self.run.model_folder)
        self.saved_at = trainer.global_step

    def ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: stop after the present step; a second signal stops at once.

        Raises:
            KeyboardInterrupt: this is the second one.
        """
        if self.stop_asked:
            raise KeyboardInterrupt
        self.stop_asked = True


@contextmanager
def stopping_cleanly(keeper: Keeper) -> Iterator[None]:
    """While inside, Ctrl-C and a request to terminate end training after a step, with a checkpoint."""
    signals = (signal.SIGINT, signal.SIGTERM)
    try:
        before = {number: signal.signal(number, keeper.ask_to_stop) for number in signals}
    except ValueError:
        # Signals belong to the main thread; elsewhere they are somebody else's business.
        yield
        return
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
    with room_for(folder / "model.safetensors", size_of(network.state_dict())):  # type: ignore[attr-defined]
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
