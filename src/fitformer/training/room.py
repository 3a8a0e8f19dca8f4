"""Whether a training step will fit the memory, asked before the first one; and how large its slices may be."""

from dataclasses import replace
from pathlib import Path
from shutil import disk_usage
from tempfile import gettempdir
from typing import Any

import psutil
import torch
from torch import nn

from fitformer.amounts import bytes_of, in_words
from fitformer.data.pixels import Unreadable
from fitformer.data.settings import ImageData
from fitformer.encoder import FITImageEncoder
from fitformer.errors import InputError
from fitformer.planning import Setup, memory, need_room, slice_for
from fitformer.settings import Recipe, Training

# What the kernel lets the processes of a container have, in its second and its first version of control groups.
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def with_room(recipe: Recipe, network: nn.Module, examples: Any) -> Training:
    """The recipe's training, with the size of slices chosen where it is left open.

    Raises:
        InputError: a step needs more memory than `trainer.memory`, or than there is, or more scratch than its disk has
            free; says what to change.
    """
    training = recipe.trainer
    device = _device(training)
    setup = Setup(
        groups=_most_groups(network, examples),
        execution=training.execution,
        slice_groups=training.slice_groups,
        keep=training.keep,
        kept_precision=training.keep_precision,
        batch=training.batch_size,
        accumulate=training.accumulate > 1,
        precision=training.precision,
        device=device,
    )
    budget = machine_memory(device) if training.memory is None else bytes_of(training.memory)
    model: Any = network
    if training.execution == "streamed" and training.slice_groups is None:
        setup = replace(setup, slice_groups=slice_for(model, setup, budget))
    if training.memory is not None or memory(model, setup).total > budget:
        need_room(model, setup, budget)
    _need_scratch(recipe, memory(model, setup).scratch)
    return replace(training, slice_groups=setup.slice_groups)


def _need_scratch(recipe: Recipe, needed: int) -> None:
    training, data = recipe.trainer, recipe.data
    if not needed:
        return
    folder = Path(training.scratch or gettempdir())
    if not folder.is_dir():
        raise InputError(f"trainer.scratch: there is no folder {folder}")
    # How much of an image is empty shows only when it is read; then a step asks for its own room.
    skips = isinstance(data, ImageData) and (data.background != "none" or data.masks is not None)
    if (free := disk_usage(folder).free) < needed and not skips:
        raise InputError(
            f"the largest image needs {in_words(needed)} of scratch between blocks, and {folder} has {in_words(free)} "
            "free; set trainer.scratch to a folder on a larger disk, trainer.keep_precision to bf16 (half of it), or "
            "trainer.keep to memory"
        )


def machine_memory(device: str = "cpu") -> int:
    """Bytes of memory that this process may have: the device's, or on a CPU the machine's or its container's."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[1]
    limits = [text for path in _LIMITS if path.is_file() and (text := path.read_text().strip()).isdigit()]
    return min([psutil.virtual_memory().total, *map(int, limits)])


def _device(training: Training) -> Any:
    on_cpu = training.accelerator == "cpu" or not torch.cuda.is_available()
    return "cpu" if on_cpu else "cuda"


def _most_groups(network: nn.Module, examples: Any) -> int | None:
    """Groups of the largest image, none of them skipped; None where the model knows them."""
    if not isinstance(network, FITImageEncoder) or network.groups is not None:
        return None
    sizes = [examples.image_size] if examples.image_size is not None else sizes_of(examples.source)
    counts = (rows * columns for rows, columns in (network.tiling.grid(*size) for size in sizes))
    return network.glimpses + max(counts)


def sizes_of(source: Any) -> list[tuple[int, int]]:
    """Rows and columns of all images of a source that can be opened, by their headers.

    Raises:
        InputError: their channels or types differ.
    """
    sizes = []
    for index in range(len(source)):
        try:
            image, _ = source[index]
        except Unreadable:
            continue
        sizes.append(image.shape[:2])
    return sizes or [(1, 1)]
