"""Measure a run: by its task, on a part of its data."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fitformer import data
from fitformer.config.schema import ByteRecipe, PixelRecipe
from fitformer.data.build import Split
from fitformer.data.datasets.lazy_source import sizes_of
from fitformer.data.masks import masks_of
from fitformer.data.settings import ImageData
from fitformer.errors import InputError
from fitformer.evaluation.baselines import independent_bits
from fitformer.evaluation.batches import batches, measured
from fitformer.evaluation.classification import classification
from fitformer.evaluation.sample_accuracy import sample_accuracy
from fitformer.models.image_denoiser import FITImageDenoiser
from fitformer.models.image_encoder import FITImageEncoder
from fitformer.tasks import autoregress
from fitformer.tasks.classify import logits
from fitformer.training.run_dir import Run

COMPRESSORS = ("gzip", "xz")


def evaluate(
    run: Run,
    split: Split = "test",
    *,
    device: str | torch.device = "cpu",
    batch_size: int = 64,
    baselines: bool = True,
    on_batch: Callable[[int, int], None] = lambda done, of: None,
) -> Iterator[tuple[str, Any]]:
    """Measure the exported model of a run on a part of its data.

    Args:
        run: the run. split: `test`, `val` or `train`; the last without augmentation.
        device: where to run. batch_size: examples at once; the values do not depend on it.
        baselines: for an autoregressive run, also what it must beat.
        on_batch: told after every batch how many are done, and of how many.

    Yields:
        classify: see `classification`. diffuse: `examples`, `loss`. autoregress: `tokens`, `loss` in nats, and
        `bits_per_dim` beside `independent_bits_per_dim`, or `bits_per_byte` beside `gzip_...` and `xz_...`.

    Raises:
        InputError: no model exported yet, no such part, data that are no longer there or no longer what they were.
    """
    network, recipe = run.model().to(device), run.recipe
    dataset = plain_dataset(run, split)
    if getattr(dataset, "reference_image", None) is not None:
        # Headers alone: what would stop it half way is found now.
        run.check_pixels(dataset)
        masks = masks_of(recipe.data)
        sizes_of(dataset.source, masks.check if masks else None)
    whole = -(-len(dataset) // batch_size)
    found = _counted(batches(dataset, batch_size, device, recipe.data.num_workers), whole, on_batch)
    if recipe.task == "classify":
        yield from classification(_scored(network, found, recipe.data), dataset.classes)
    elif recipe.task == "diffuse":
        yield from measured(network, found, recipe)
    else:
        yield from measured(network, found, recipe, count="tokens")
        if baselines:
            yield from autoregressive_baselines(run, dataset, batch_size)


def plain_dataset(run: Run, split: Split) -> Any:
    """A part of a run's data as it is, without the augmentation of training."""
    settings = run.recipe.data
    if isinstance(settings, ImageData):
        settings = replace(settings, augmentation="none")
    return data.build_dataset(settings, split, seed=run.recipe.trainer.seed)


def _counted(found: Iterable[Any], of: int, on_batch: Callable[[int, int], None]) -> Iterator[Any]:
    for done, batch in enumerate(found, start=1):
        yield batch
        on_batch(done, of)


@torch.inference_mode()
def _scored(network: nn.Module, found: Iterable[Any], settings: ImageData) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in found:
        yield logits(network, batch["image"], settings), batch["label"]  # type: ignore[arg-type]


def autoregressive_baselines(run: Run, dataset: Any, batch_size: int = 64) -> Iterator[tuple[str, float]]:
    """What the model of an autoregressive run must beat on a dataset, in bits per pixel value or byte.

    Pixels: independent given their position, fitted on the run's training part. Bytes: `gzip -9` and `xz -9` of the
    same bytes in one piece (they see more context than a model that starts anew in every example).
    """
    recipe = run.recipe
    assert isinstance(recipe, PixelRecipe | ByteRecipe)
    if isinstance(recipe, ByteRecipe):
        from fitformer.data.datasets.text import compressed_bits_per_byte

        content = torch.cat([batch["tokens"][batch["mask"]] for batch in batches(dataset, batch_size)])
        whole = content.to(torch.uint8).numpy().tobytes()
        for compressor in COMPRESSORS:
            yield f"{compressor}_bits_per_byte", compressed_bits_per_byte(whole, compressor)
        return
    train, test = (
        (autoregress.targets(batch, recipe)[0] for batch in batches(part, batch_size, workers=recipe.data.num_workers))
        for part in (plain_dataset(run, "train"), dataset)
    )
    yield "independent_bits_per_dim", independent_bits(train, test, recipe.data.levels or autoregress.BYTES)


def recognition(
    run: Run,
    classifier: Run,
    count: int = 500,
    *,
    device: str | torch.device = "cpu",
    batch_size: int = 64,
    **drawing: Any,
) -> Iterator[tuple[str, Any]]:
    """Draw `count` samples of a class-conditional diffusion run, classes in turn, and have a classifier's run look.

    `drawing` are the options of `FITImageDenoiser.sample` (steps, sampler, guidance, seed).

    Raises:
        InputError: a run of another task, or one that knows no classes, or other ones than the classifier.
    """
    if run.recipe.task != "diffuse" or classifier.recipe.task != "classify":
        raise InputError(
            f"samples of a diffuse run are shown to a classify run; {run.path} is a {run.recipe.task} run and "
            f"{classifier.path} a {classifier.recipe.task} run"
        )
    network, judge = run.model().to(device), classifier.model().to(device)
    assert isinstance(network, FITImageDenoiser)
    assert isinstance(judge, FITImageEncoder)
    if not network.num_classes:
        raise InputError(f"{run.path} was trained without classes, so its samples cannot be recognised as one")
    if run.classes != classifier.classes:
        raise InputError(f"{run.path} knows the classes {run.classes}, {classifier.path} {classifier.classes}")
    labels = [k % len(run.classes) for k in range(count)]
    images = network.sample(count, labels, batch_size=batch_size, **drawing)
    yield from sample_accuracy(judge, images, labels, run.classes)
