"""Callbacks of a run: metrics to JSON lines, CSV and TensorBoard, previews, and the terminal."""

import json
import sys
import time
import warnings
from math import isfinite
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from fitformer.config.schema import Recipe
from fitformer.data import mu_law
from fitformer.data.settings import Background, ImageData
from fitformer.tasks import task_of
from fitformer.tasks.preview import Preview, grid, in_a_row, save
from fitformer.training.run_dir import Run


class JsonLines(Logger):
    """Appends one JSON object a measurement to a file."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    @property
    def name(self) -> str:
        """Lightning wants one."""
        return self.path.stem

    @property
    def version(self) -> str:
        """Lightning wants one."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run directory holds the recipe."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append `{"step": ..., "time": ..., <name>: <value>, ...}`; null where a value is NaN or infinite."""
        numbers = {name: float(value) for name, value in metrics.items()}
        # JSON has no NaN.
        plain = {name: value if isfinite(value) else None for name, value in numbers.items()}
        line = {"step": step, "time": round(time.time(), 3), **plain}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def loggers(run: Run, step: int) -> list[Logger]:
    """The loggers of a run that resumes at `step`."""
    board = TensorBoardLogger(run.path, name="tensorboard", version="", purge_step=step + 1 if step else None)
    return [JsonLines(run.metrics_file), CSVLogger(run.path, name="csv", flush_logs_every_n_steps=1), board]


def memory_mb(device: torch.device) -> float:
    """Memory in MB: the peak allocated on a GPU, or on the CPU the resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        import psutil

        return psutil.Process().memory_info().rss / 1e6
    except ImportError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 1e6 if sys.platform == "darwin" else peak / 1e3


class MetricsLogger(Callback):
    """Logs training means every `log_every` steps, held-out means and previews at validation.

    `latest` is what the terminal shows. It must stand before `EMACallback`, which swaps the averaged weights out when
    the validation ends: previews are drawn with the averaged weights.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.latest: dict[str, float] = {}
        self._since, self._away, self._step, self._logged = 0.0, 0.0, 0, -1
        self._rate = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._restart(trainer)

    def _restart(self, trainer: pl.Trainer) -> None:
        self._since, self._away, self._step = time.perf_counter(), 0.0, trainer.global_step

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Note the learning rate of the step: at its end the schedule holds that of the next."""
        self._rate = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *rest: Any) -> None:
        """Log the means since the last time, every `log_every` optimizer steps."""
        training, step = self.run.recipe.trainer, trainer.global_step
        if step == self._logged or step == self._step or (step % training.log_every and step != training.steps):
            return
        self._logged = step
        examples = (step - self._step) * training.accumulate * training.batch_size * trainer.world_size
        self.latest = {
            **pl_module.take_recent(),
            "train/lr": self._rate,
            "train/examples_per_second": examples / max(time.perf_counter() - self._since - self._away, 1e-9),
            "train/memory_mb": memory_mb(pl_module.device),
        }
        self._log(trainer, self.latest)
        self._restart(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock: examples per second are those of training."""
        self._away -= time.perf_counter()

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Draw previews, while the averaged weights are in place."""
        recipe = self.run.recipe
        if trainer.is_global_zero and recipe.trainer.previews:
            preview = task_of(recipe).preview
            if preview is not None:
                self._show(trainer, preview(pl_module.network, recipe, recipe.trainer.previews))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the held-out means."""
        held_out = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        self._log(trainer, held_out)
        self.latest = {**self.latest, **held_out}
        self._away += time.perf_counter()

    def _log(self, trainer: pl.Trainer, metrics: dict[str, float]) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)

    def _show(self, trainer: pl.Trainer, preview: Preview) -> None:
        step = trainer.global_step
        save(preview, self.run.samples / f"step-{step:07d}")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                _add_preview(logger.experiment, preview, step)


def _add_preview(board: Any, preview: Preview, step: int) -> None:
    """Show a preview in TensorBoard."""
    if preview.images is not None:
        board.add_image("samples", grid(preview.images).numpy(), step, dataformats="HWC")
    elif preview.sound is not None:
        codes = in_a_row(preview.sound, preview.sample_rate).cpu().numpy()
        board.add_audio("samples", mu_law.decode(codes)[None], step, preview.sample_rate)
    else:
        text = "\n\n---\n\n".join("    " + sample.replace("\n", "\n    ") for sample in preview.text)
        board.add_text("samples", text, step)


class ForegroundReport(Callback):
    """Reports once, in one line, the share of foreground groups in the first images; warns if it is all of them.

    Where patches of background are absent too, the share is that of patches.
    """

    IMAGES = 8

    def __init__(self, data: ImageData) -> None:
        self.data = data
        self.images, self.kept, self.all = 0, 0, 0
        self.parts = "patches" if data.background_patches else "groups"

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, *rest: Any) -> None:
        """Count the groups of a batch, and report once there are enough images."""
        if self.images < self.IMAGES and trainer.is_global_zero:
            for image in batch["image"]:
                self.images += 1
                tokens = image.patch_grid.tokens_per_group
                by_patch = self.data.background_patches
                self.kept += image.count() - image.glimpses * tokens if by_patch else image.num_groups - image.glimpses
                self.all += image.groups_in_all * (tokens if by_patch else 1)
            if self.images >= self.IMAGES:
                self._tell()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report on fewer images, if there were no more."""
        if 0 < self.images < self.IMAGES:
            self._tell()

    def _tell(self) -> None:
        given = [] if self.data.background == "none" else [f"background {in_short(self.data.background)}"]
        given += [f"masks {self.data.masks}"] if self.data.masks else []
        share = f"{self.kept / self.all:.0%} of the {self.parts} of the first {self.images} images"
        words = f"{', '.join(given)}: {share}"
        if self.kept < self.all or self.data.background == "none":
            print(f"{words} hold something", flush=True)
        else:
            warnings.warn(
                f"{words} hold something, and none is skipped: data.background may be auto, or a level or colour as "
                "the files have it; data.tolerance and data.min_foreground say what may differ from it",
                stacklevel=2,
            )


def skipping(recipe: Recipe) -> list[Callback]:
    """The callback that reports skipped groups, for a recipe that skips some."""
    data = recipe.data
    if not isinstance(data, ImageData):
        return []
    return [ForegroundReport(data)] if data.background != "none" or data.masks is not None else []


def in_short(background: Background) -> str:
    """A background in short."""
    levels = background if isinstance(background, tuple) else (background,)
    return ", ".join(level if isinstance(level, str) else f"{level:g}" for level in levels)


def brief(metrics: dict[str, float]) -> dict[str, str]:
    """Metrics for the terminal: short names, three digits, speed and memory with their units."""
    words = {}
    for name, value in metrics.items():
        if name == "train/examples_per_second":
            words["examples/s"] = f"{value:,.0f}"
        elif name == "train/memory_mb":
            words["memory"] = f"{value:,.0f} MB"
        elif name != "train/lr":
            words[name.removeprefix("train/")] = f"{value:.3f}"
    return words


class ProgressBar(RichProgressBar):
    """Lightning's bar of one long epoch, with the latest metrics."""

    def __init__(self, observer: MetricsLogger) -> None:
        super().__init__(refresh_rate=10)
        self.observer = observer

    def _get_train_description(self, current_epoch: int) -> str:
        # There is one epoch only; its number would say nothing.
        return "training"

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Return what stands at the right of the bar."""
        return dict(brief(self.observer.latest))


def round_interval(steps: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, ... that is at least `steps`."""
    power = 1
    while 10 * power < steps:
        power *= 10
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= steps)


def time_left(seconds: float) -> str:
    """A duration in short: `50 s left`, `12 min left`, `3 h 20 min left`."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s left"
    return f"{minutes} min left" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min left"


class ConsoleLogger(Callback):
    """Output to a log file or a pipe: a line about every 10 seconds, at validations and at the end.

    Lines are of steps that are measured and round: every 1, 2, 5, 10, ... measurements, as often as it takes.
    """

    def __init__(self, observer: MetricsLogger, seconds: float = 10.0) -> None:
        self.observer, self.seconds = observer, seconds
        self._shown = observer.latest
        self._started, self._first = 0.0, 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._started, self._first = time.monotonic(), trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any) -> None:
        """Print what was measured at this step, if it is one to print."""
        if self.observer.latest is self._shown:
            return
        every = self.observer.run.recipe.trainer.log_every
        measurements = self.seconds / (every * self._seconds_per_step(trainer))
        if trainer.global_step % (every * round_interval(measurements)) == 0:
            self._print(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the last metrics, if no validation did."""
        self._print(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the held-out means."""
        self._print(trainer)

    def _seconds_per_step(self, trainer: pl.Trainer) -> float:
        """Of this start, validations counted."""
        return max(time.monotonic() - self._started, 1e-9) / max(trainer.global_step - self._first, 1)

    def _print(self, trainer: pl.Trainer) -> None:
        if self.observer.latest is self._shown:
            return
        self._shown, left = self.observer.latest, trainer.max_steps - trainer.global_step
        if trainer.is_global_zero:
            words = "  ".join(f"{name} {value}" for name, value in brief(self._shown).items())
            remaining = f"  {time_left(left * self._seconds_per_step(trainer))}" if left else ""
            print(f"step {trainer.global_step}/{trainer.max_steps}  {words}{remaining}", flush=True)
