"""The memory check before the first step: whether a step fits, and how streaming uses the memory best."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from shutil import disk_usage
from tempfile import gettempdir
from typing import Any

import torch
from torch import nn

from fitformer._support.bytesize import format_bytes, parse_bytes
from fitformer._support.system_memory import available_memory, total_memory
from fitformer.config.schema import Recipe, Training
from fitformer.data.datasets.lazy_source import opened_examples
from fitformer.data.foreground import foreground_groups_transformed
from fitformer.data.labels import Labels
from fitformer.data.masks import Masks
from fitformer.data.readers import LazyImage
from fitformer.data.readers.levels import RETILE
from fitformer.data.settings import ImageData
from fitformer.data.symmetry import Symmetry
from fitformer.errors import InputError
from fitformer.models.image_encoder import FITImageEncoder
from fitformer.models.image_segmenter import FITImageSegmenter
from fitformer.patching import PatchGrid
from fitformer.profiling import StepConfig, check_fits, memory, streaming_for


@dataclass
class _Headers:
    """What the headers of images and label images say: all bytes to decode, most at once, and whether masks fit.

    What decodes at once is the largest tile of a file, or a whole PNG or JPEG.
    """

    masks: Masks | None
    labels: Labels | None
    largest: str = ""
    decode_bytes: int = 0
    data_bytes: int = 0

    def add(self, image: LazyImage) -> None:
        files = [image, *([self.labels.of(image.path).image] if self.labels else [])]
        self.data_bytes += sum(prod(file.shape) * file.dtype.itemsize for file in files)
        pieces = [(file.path, file.decode_bytes) for file in files]
        for path, size in [*pieces, *([self.masks.check(image)] if self.masks else [])]:
            if size > self.decode_bytes:
                self.largest, self.decode_bytes = path, size


def fit_to_memory(recipe: Recipe, network: nn.Module, examples: Any, masks: Masks | None = None) -> Training:
    """The recipe's training section, with slice size and recomputation chosen where they are left open.

    The headers of all images of any size are read, and those of their label images and `masks`.

    Raises:
        InputError: images or masks do not go together; or a step needs more memory than `trainer.memory`, or than
            there is, or more scratch than its disk has free.
    """
    training = recipe.trainer
    device = _device(training)
    labels = getattr(examples, "labels", None)
    headers = _Headers(masks, labels if isinstance(labels, Labels) else None)
    setup = StepConfig(
        num_groups=_most_groups(network, examples, headers.add),
        decode_bytes=headers.decode_bytes,
        data_bytes=headers.data_bytes,
        execution=training.execution,
        keep=training.keep,
        kept_precision=training.keep_precision,
        batch=training.batch_size,
        accumulate=training.accumulate > 1,
        precision=training.precision,
        trainer=True,
        device=device,
    )
    # Each process has its own GPU; all processes share the memory of a machine.
    sharing = training.devices if device == "cpu" and isinstance(training.devices, int) else 1
    budget = total_memory(device) // max(1, sharing) if training.memory is None else parse_bytes(training.memory)
    model: Any = getattr(network, "denoiser", network)
    if training.execution == "streamed":
        # Without a stated budget, only free memory is used. A compiled layer decides itself what it recomputes.
        available = budget if training.memory is not None else available_memory(device) // max(1, sharing)
        recompute = "full" if training.compile else training.recompute
        setup = streaming_for(model, setup, available, recompute, training.slice_groups)
    _check_decoding(model, setup, budget, headers.largest)
    if training.memory is not None or memory(model, setup).total > budget:
        check_fits(model, setup, budget)
    _check_scratch(recipe, memory(model, setup).scratch)
    return replace(training, slice_groups=setup.slice_groups, recompute=setup.recompute)


def _check_decoding(model: Any, setup: StepConfig, budget: int, largest: str) -> None:
    """Raise InputError if a step fits, but not beside the largest piece that a file decodes at once."""
    needed, without = (memory(model, each).total for each in (setup, replace(setup, decode_bytes=0)))
    if without <= budget < needed:
        kind = Path(largest).suffix.lstrip(".").upper() or "file"
        raise InputError(
            f"a training step needs {format_bytes(needed)} of memory and the budget is {format_bytes(budget)}; "
            f"{format_bytes(needed - without)} of it is to decode {largest}, a {kind} that is decoded in pieces of "
            f"{format_bytes(setup.decode_bytes)}; {RETILE}"
        )


def _check_scratch(recipe: Recipe, needed: int) -> None:
    training, data = recipe.trainer, recipe.data
    if not needed:
        return
    folder = Path(training.scratch or gettempdir())
    if not folder.is_dir():
        raise InputError(f"trainer.scratch: there is no folder {folder}")
    # How much of an image is empty is known only once it is read; each step then checks its own space.
    skips = isinstance(data, ImageData) and (data.background != "none" or data.masks is not None)
    if (free := disk_usage(folder).free) < needed and not skips:
        raise InputError(
            f"the largest image needs {format_bytes(needed)} of scratch between blocks, and {folder} has "
            f"{format_bytes(free)} free; set trainer.scratch to a folder on a larger disk, trainer.keep_precision to "
            "bf16 (half of it), or trainer.keep to memory"
        )


def _device(training: Training) -> Any:
    on_cpu = training.accelerator == "cpu" or not torch.cuda.is_available()
    return "cpu" if on_cpu else "cuda"


def _most_groups(network: nn.Module, examples: Any, on_header: Callable[[LazyImage], None]) -> int | None:
    """Groups of the largest image or patient, skipped only where no pixels are; None where the model knows them."""
    if not isinstance(network, FITImageEncoder | FITImageSegmenter) or not network.patch_grid.any_size:
        return None
    if examples.image_size is not None:
        return network.glimpses + prod(network.patch_grid.cover(*examples.image_size))
    most = 1 + network.glimpses
    for images in opened_examples(examples.source):
        groups = 0
        for image in images:
            on_header(image)
            groups += network.glimpses + _groups_of(image, network.patch_grid, examples.symmetries)
        most = max(most, groups)
    return most


def _groups_of(image: LazyImage, patch_grid: PatchGrid, symmetries: Sequence[Symmetry]) -> int:
    """Groups of an image turned in any of these ways: ones that are not square may be more, laid across."""
    if image.presence is None:
        return max(prod(patch_grid.cover(*symmetry.sides(*image.shape[:2]))) for symmetry in symmetries)
    found = foreground_groups_transformed(image, patch_grid.group_size, symmetries)
    return max(int(groups.sum()) for groups in found.values())
