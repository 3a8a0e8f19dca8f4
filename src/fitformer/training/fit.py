"""Training a recipe into a run directory, on Lightning: one endless epoch that goes on where it stopped."""

import hashlib
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from fitformer import data
from fitformer.config.schema import Recipe
from fitformer.data.datasets.lazy_source import sizes_of
from fitformer.data.masks import Masks, masks_of
from fitformer.data.workers import dead_worker, message_of
from fitformer.errors import InputError, MissingDependencyError
from fitformer.models.base import FITModel
from fitformer.models.pretrained import file_of
from fitformer.tasks import build_model, group_examples, task_of
from fitformer.training import checkpoint, checkpoint_file
from fitformer.training.callbacks import ConsoleLogger, MetricsLogger, ProgressBar, loggers, skipping
from fitformer.training.ema import EMACallback
from fitformer.training.memory_check import fit_to_memory
from fitformer.training.module import Data, FITModule
from fitformer.training.run_dir import (
    Run,
    check_run,
    is_first_process,
    locked,
    place_before,
    start_run,
    truncate_metrics,
    write_data_card,
)

__all__ = ["train"]


def train(recipe: Recipe, run_dir: str | Path, init_from: str | Path | None = None) -> bool:
    """Train a recipe in a run directory, from its last checkpoint if it has one.

    Stopped anywhere and given again, the same recipe ends with the same weights as if it had not been stopped
    (bit for bit on a CPU): the order of the data, augmentation, dropout and noise are functions of (seed, step).
    After an error, too, the last whole step is saved, and the message says from where the same recipe goes on.

    Args:
        recipe: what to train, see `fitformer.config.load`.
        run_dir: made if it is not there, see `fitformer.training.run_dir`. A run that is complete goes on if the recipe
            has more steps than it took.
        init_from: a run or a saved model whose weights a new run starts from, see `FITModel.load_weights`.

    Returns:
        whether the run is complete; false if a signal stopped it, with everything saved.

    Raises:
        InputError: the directory belongs to another recipe, a checkpoint does not fit, the data or sizes are wrong.
        OSError: a checkpoint could not be written, or a process that reads data died.
    """
    examples = data.build_dataset(recipe.data, "train", seed=recipe.trainer.seed)
    task = task_of(recipe)
    masks = masks_of(recipe.data)
    held_out = _held_out(recipe, masks)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.trainer.seed)
        network = build_model(recipe, examples)
    training = fit_to_memory(recipe, network, examples, masks)
    prepared = recipe if task.prepare is None else task.prepare(recipe, examples)
    check_run(run_dir, recipe)
    with locked(run_dir):
        learner = FITModule(network, replace(prepared, trainer=training))
        return _train(Run(Path(run_dir), recipe), learner, examples, held_out, init_from)


def _train(run: Run, learner: FITModule, examples: Any, held_out: Any, init_from: str | Path | None) -> bool:
    """Begin the run or go on with it, in a directory that is this process's own."""
    recipe, network = run.recipe, learner.network
    step, noted = _resumed_step(run, network)
    validation_pending = bool(noted.get("validation_pending"))
    _check_steps(run, step)
    _check_source(run, init_from, step)
    note = None if init_from is None or step else _initialise(network, init_from)
    elsewhere = place_before(run.path)
    run = start_run(run.path, recipe, note)
    if elsewhere is not None:
        how = "is a copy of" if Path(elsewhere).is_dir() else "was moved from"
        _say(f"{run.path} {how} {elsewhere}, where it was trained before")
    if step:
        run.check_pixels(examples)
    write_data_card(run, examples, held_out)
    if step >= recipe.trainer.steps and not validation_pending:
        _say(f"{run.path} is complete: {step} steps; its model is {run.model_folder}")
        return True
    for part, dataset in (("training", examples), ("held out", held_out)):
        group_examples(network, dataset, recipe)
        if dataset is not None:
            _say(f"{part}: {dataset.describe()}")
    if step:
        _say(f"{run.path} goes on from step {step} of {recipe.trainer.steps}")
    return _fit(run, learner, Data(recipe, examples, held_out), step, noted)


def _say(text: str) -> None:
    if is_first_process():
        print(text, flush=True)


def _held_out(recipe: Recipe, masks: Masks | None) -> Any:
    if recipe.trainer.validate_batches == 0:
        return None
    held_out: Any = data.build_dataset(recipe.data, "val", seed=recipe.trainer.seed)
    if recipe.trainer.keep_best and held_out.is_test:
        raise InputError(
            "trainer.keep_best would choose a checkpoint by the test part, whose measure would then be too good: set "
            "aside a share of the training part, such as data.validation=0.1"
        )
    if getattr(held_out, "image_size", 0) is None:
        # Files that do not go with the others are found now, not at the first validation.
        sizes_of(held_out.source, masks.check if masks else None)
    return held_out


def _resumed_step(run: Run, network: torch.nn.Module) -> tuple[int, dict[str, Any]]:
    """The step of the last checkpoint, 0 if there is none, and what was noted there (`checkpoint.noted`)."""
    if not run.last_checkpoint.is_file():
        return 0, {}
    saved = checkpoint_file.load(run.last_checkpoint, lazily=True)
    checkpoint_file.check_fits(saved, network, run.last_checkpoint)
    return int(saved["global_step"]), checkpoint.noted(saved)


def _check_steps(run: Run, step: int) -> None:
    """Say what another number of steps means to a run.

    Raises:
        InputError: the run took more steps already.
    """
    steps = run.recipe.trainer.steps
    if not step:
        return
    if steps < step:
        raise InputError(f"{run.path} took {step} steps already, and trainer.steps is {steps}; ask for more")
    before = Run.open(run.path).recipe.trainer.steps
    if before != steps and run.recipe.optimizer.schedule != "constant":
        _say(f"the {run.recipe.optimizer.schedule} schedule runs over {steps} steps from here on, instead of {before}")


def _check_source(run: Run, source: str | Path | None, step: int) -> None:
    """Refuse a run that has begun from other weights; the source itself need not be there any more.

    Raises:
        InputError: names both sources.
    """
    begun = run.describe_start()
    there = begun.get("source", "random weights")
    if source is None:
        if begun and not step:
            raise InputError(f"{run.path} begins from {there} and has no checkpoint yet; give --init-from {there}")
    elif step and str(source) != there and _digest(source) != begun.get("sha256"):
        raise InputError(f"{run.path} began from {there}, not from {source}; give another --run-dir")


def _initialise(network: FITModel, source: str | Path) -> dict[str, str]:
    """Give the network of a new run the weights of a saved model; returns where they came from.

    Raises:
        InputError: weights that do not fit.
    """
    report = network.load_weights(source)
    _say(f"weights of {source}: {report}")
    return {"source": str(source), "sha256": _digest(source), "weights": str(report)}


def _digest(source: str | Path) -> str:
    with file_of(source, "model.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fit(run: Run, learner: FITModule, examples: Data, step: int, noted: dict[str, Any]) -> bool:
    validation_pending = bool(noted.get("validation_pending"))
    average = EMACallback(run.recipe.trainer.ema) if run.recipe.trainer.ema else None
    keeper = checkpoint.CheckpointCallback(run, average, step)
    with _quiet(), checkpoint.stopping_cleanly(keeper):
        try:
            trainer = _trainer(run, keeper, average, step, validate=examples.held_out is not None)
            trainer.fit_loop.epoch_loop.max_steps += validation_pending  # See `CheckpointCallback.on_train_start`.
        except (MisconfigurationException, ValueError, TypeError) as error:
            raise InputError(f"these devices cannot be used: {error}") from error
        _check_global_batch(run, trainer.num_devices, noted)
        truncate_metrics(run, step, validation_pending)
        try:
            resumed = str(run.last_checkpoint) if step else None
            trainer.fit(learner, datamodule=examples, ckpt_path=resumed, weights_only=True)
        except checkpoint.TrainingInterruptedError:
            _say(f"stopped at step {trainer.global_step} of {trainer.max_steps}; the same command goes on from there")
            return False
        except SystemExit as error:
            # Told to stop at once, Lightning ends the process without a word.
            raise KeyboardInterrupt from error
        except Exception as error:
            resume_hint = keeper.resume_hint()
            if mendable := _mendable(error, resume_hint):
                raise mendable from error
            if resume_hint:
                error.add_note(resume_hint.removeprefix("; "))
            raise
    _say(f"{run.path} is complete: {trainer.global_step} steps; its model is {run.model_folder}")
    return True


def _check_global_batch(run: Run, devices: int, noted: dict[str, Any]) -> None:
    """Refuse to go on with steps of another number of examples: other data would be learned, in other portions.

    Raises:
        InputError: names both numbers, and the devices that make up the former.
    """
    training = run.recipe.trainer
    now, before = checkpoint.global_batch(training, devices), noted.get("global_batch")
    if before in (None, now):
        return
    former = before // checkpoint.global_batch(training, 1)
    raise InputError(
        f"{run.path} took steps of {before} examples, on {former} devices, and would take steps of {now} on {devices}: "
        f"go on with --trainer.devices={former}, or begin another --run-dir with --trainer.accumulate and "
        "--trainer.batch_size for the present devices"
    )


def _mendable(error: Exception, resume_hint: str) -> Exception | None:
    """The error with the way on, if it is one that the user can mend; None if it is any other."""
    if isinstance(error, InputError):
        return InputError(f"{message_of(error)}{resume_hint}")
    if isinstance(error, MissingDependencyError):
        return MissingDependencyError(f"{message_of(error)}{resume_hint}")
    if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
        return OSError(f"{message_of(error)}{resume_hint}")
    if isinstance(error, RuntimeError) and (said := dead_worker(error)):
        return ChildProcessError(f"{said}; --data.num_workers=0 takes least memory{resume_hint}")
    return None


def _trainer(
    run: Run, keeper: checkpoint.CheckpointCallback, average: EMACallback | None, step: int, validate: bool
) -> pl.Trainer:
    training = run.recipe.trainer
    observer = MetricsLogger(run)
    bar = ProgressBar(observer) if sys.stdout.isatty() else ConsoleLogger(observer)
    # The order matters: previews before the average is put back, checkpoints after it was updated.
    callbacks = [observer, *filter(None, [average]), bar, *skipping(run.recipe), *_best(run, validate), keeper]
    return pl.Trainer(
        max_steps=training.steps,
        max_epochs=1,
        accelerator=training.accelerator,
        devices=training.devices,
        strategy=_strategy(run.recipe),
        precision="bf16-mixed" if training.precision == "bf16" else "32-true",
        accumulate_grad_batches=training.accumulate,
        gradient_clip_val=run.recipe.optimizer.clip or None,
        check_val_every_n_epoch=None,
        val_check_interval=training.validate_every * training.accumulate,
        limit_val_batches=(training.validate_batches or 1.0) if validate else 0,
        num_sanity_val_steps=0,
        log_every_n_steps=training.log_every,
        logger=loggers(run, step),
        callbacks=callbacks,
        plugins=[checkpoint_file.AtomicCheckpointIO()],
        enable_progress_bar=isinstance(bar, ProgressBar),
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=run.path,
    )


def _best(run: Run, validate: bool) -> list[Callback]:
    if not (run.recipe.trainer.keep_best and validate):
        return []
    metric, mode = task_of(run.recipe).monitor
    folder = run.last_checkpoint.parent
    return [ModelCheckpoint(folder, "best", monitor=metric, mode=mode, save_top_k=1, enable_version_counter=False)]


def _strategy(recipe: Recipe) -> str:
    devices, accelerator = recipe.trainer.devices, recipe.trainer.accelerator
    count = torch.cuda.device_count() if accelerator in ("auto", "gpu", "cuda") else 1
    if count < 2 if devices in ("auto", "-1", -1) else str(devices) in ("1", "[0]"):
        return "auto"
    # A trunk that ends in global layers leaves one of its two final norms unused.
    layers = recipe.model.layers
    ends_local = layers is None or layers.endswith(")")
    unused = not ends_local or task_of(recipe).find_unused_parameters
    return "ddp_find_unused_parameters_true" if unused else "ddp"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's advertisements and hints that do not apply here off the terminal; real warnings pass."""
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for hint in (
            r".*does not have many workers.*",
            r".*is smaller than the logging interval.*",
            r".*Checkpoint directory .* exists and is not empty.*",
            r".*GPU available but not used.*",
            r".*isinstance\(treespec, LeafSpec\).*",
        ):
            warnings.filterwarnings("ignore", hint)
        try:
            yield
        finally:
            log.setLevel(level)
