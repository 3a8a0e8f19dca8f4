"""Checkpoint files: written whole or not at all, compared with their checksums, read as tensors and plain values."""

import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fitformer._support.atomic_files import write_atomically
from fitformer.errors import InputError
from fitformer.models.pretrained import difference


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints written beside their place and renamed into it, and read back as tensors and plain values only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint; the one before stays at `path` if there is no space.

        Raises:
            OSError: it could not be written; the message says how much was needed and how much is free.
        """
        with (
            check_disk_space(path, tensor_bytes(checkpoint)),
            write_atomically(path, durable=True) as scratch,
        ):
            torch.save(checkpoint, scratch)
            # Read back before it takes the place of the one before.
            check_whole(scratch)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        """Read a checkpoint, never anything but tensors and plain values."""
        return load(path)


def load(path: str | Path, lazily: bool = False) -> dict[str, Any]:
    """Read a checkpoint's tensors and plain values; `lazily`, each tensor on its first use.

    Raises:
        InputError: the file is not a whole checkpoint, or its checksums do not fit its content.
    """
    try:
        check_whole(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=lazily)
    except OSError:
        raise
    except Exception as error:
        raise InputError(
            f"{path} is not a whole checkpoint ({first_line(error)}); remove it to start afresh"
        ) from error


def check_whole(path: str | Path) -> None:
    """Compare the checksums of a checkpoint's records, which torch writes and does not read, with their content.

    Raises:
        ValueError: a record has changed since it was written. zipfile.BadZipFile: the file is not whole.
    """
    with zipfile.ZipFile(path) as records:
        if damaged := records.testzip():
            raise ValueError(f"its record {damaged} has changed since it was written")


def tensor_bytes(checkpoint: Any) -> int:
    """Bytes of all tensors in nested containers: nearly the size of a checkpoint on disk."""
    leaves = tree_leaves(checkpoint)
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, Tensor))


@contextmanager
def check_disk_space(path: str | Path, needed: int) -> Iterator[None]:
    """Run a write of about `needed` bytes to `path`; if it fails, the error has both numbers.

    Raises:
        OSError: there is too little space, or writing failed.
    """
    folder = Path(path).absolute().parent
    folder.mkdir(parents=True, exist_ok=True)
    if needed > (free := shutil.disk_usage(folder).free):
        raise OSError(_disk_error(path, needed, free, "no space on the disk"))
    try:
        yield
    # torch and safetensors turn a failed write into errors of their own kinds.
    except Exception as error:
        free = shutil.disk_usage(folder).free
        raise OSError(_disk_error(path, needed, free, first_line(error))) from error


def _disk_error(path: str | Path, needed: int, free: int, why: str) -> str:
    return (
        f"could not write {path}: {why}; about {needed / 1e6:,.1f} MB are needed, {free / 1e6:,.1f} MB are free; "
        "free some space; earlier checkpoints are unharmed"
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def load_network(network: nn.Module, path: Path) -> None:
    """Give a network the weights of a checkpoint, the averaged ones where there are such.

    Raises:
        InputError: the file is not a whole checkpoint, or one of another architecture.
    """
    checkpoint = load(path, lazily=True)
    check_fits(checkpoint, network, path)
    state = {name.removeprefix("network."): value for name, value in checkpoint["state_dict"].items()}
    network.load_state_dict(state)


def check_fits(checkpoint: dict[str, Any], network: nn.Module, path: Path) -> None:
    """Refuse a file of something else, or a checkpoint of another architecture, before anything is loaded.

    Raises:
        InputError: names what is missing, unknown or misshapen.
    """
    parts = ("state_dict", "global_step", "loops", "callbacks")
    if absent := [part for part in parts if not isinstance(checkpoint, dict) or part not in checkpoint]:
        raise InputError(f"{path} is not a checkpoint of a run: it has no {absent[0]}; remove it to start afresh")
    given = {name.removeprefix("network."): tuple(value.shape) for name, value in checkpoint["state_dict"].items()}
    faults = difference(given, {name: tuple(value.shape) for name, value in network.state_dict().items()})
    if faults:
        raise InputError(f"{path} is a checkpoint of another architecture: {faults}")
