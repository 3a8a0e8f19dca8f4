"""Arguments that several verbs share, and their evaluation."""

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any, get_args

from fitformer.errors import InputError
from fitformer.models.config import TrunkConfig

if TYPE_CHECKING:
    import torch

    from fitformer.training.run_dir import Run


def positive(text: str) -> int:
    """A whole number above 0."""
    return at_least(1, text)


def natural(text: str) -> int:
    """A whole number, 0 or more."""
    return at_least(0, text)


def at_least(lowest: int, text: str) -> int:
    """A whole number not below `lowest`."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if number < lowest:
        raise argparse.ArgumentTypeError(f"{number} is too small; it must be at least {lowest}")
    return number


def size(text: str) -> int | tuple[int, int]:
    """Read `64` or `64x128` (rows, columns)."""
    try:
        sides = [int(side) for side in text.lower().split("x")]
        return sides[0] if len(sides) == 1 else (sides[0], *sides[1:])  # type: ignore[return-value]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 64, or 64x128 for rows x columns") from None


def shard(text: str) -> tuple[int, int]:
    """Read `2/8`: part 2 of 8."""
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is no part of a whole; write 1/8 to 8/8 for the eight parts of 8")
    return int(found[1]), int(found[2])


def add_trunk(parser: argparse.ArgumentParser) -> None:
    """Every option of `TrunkConfig`, to replace the preset's."""
    trunk = parser.add_argument_group("trunk, in place of the preset's options")
    for field in fields(TrunkConfig):
        flag, kind = f"--{field.name.replace('_', '-')}", field.type
        if kind is bool:
            trunk.add_argument(flag, action=argparse.BooleanOptionalAction, default=None)
        elif int in (kind, *get_args(kind)):
            trunk.add_argument(flag, type=positive)
        elif choices := get_args(kind):
            trunk.add_argument(flag, choices=choices)
        else:
            trunk.add_argument(flag, type=kind)


def trunk_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of the trunk that were given."""
    options = {name: getattr(arguments, name) for name in TrunkConfig.names()}
    return {name: value for name, value in options.items() if value is not None}


def add_device(parser: argparse.ArgumentParser) -> None:
    """`--device`."""
    parser.add_argument("--device", help="device, such as cpu or cuda:0 (default: a GPU if there is one)")


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """`--checkpoint`."""
    words = "last, best (of a run with trainer.keep_best), or the path of a checkpoint (default: last)"
    parser.add_argument("--checkpoint", default="last", metavar="WHICH", help=words)


def add_drawing(parser: argparse.ArgumentParser) -> None:
    """Options of sampling from a diffusion run."""
    parser.add_argument("--steps", type=positive, help="steps of sampling (default: the recipe's sample_steps)")
    parser.add_argument("--sampler", help="ddim, ddpm, ddpm@small or ddpm@large (default: the model's)")
    parser.add_argument("--guidance", type=float, help="strength of classifier-free guidance (default: the model's)")
    parser.add_argument("--seed", type=natural, default=0, help="seed of the noise (default: 0)")


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on standard error, if it is a terminal, while the body runs; yields `show(done, total)`."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def device_of(arguments: argparse.Namespace) -> "torch.device":
    """The device of `--device`, by default the GPU if there is one.

    Raises:
        InputError: the device cannot be used.
    """
    from fitformer._support.device import usable_device

    return usable_device(arguments.device)


def open_run(path: str, verb: str | None = None) -> "Run":
    """Open a run, of a task that `verb` serves if one is given.

    Raises:
        InputError: no run at `path`, or a run that another verb serves; the message names that verb.
    """
    from fitformer.tasks import task_of
    from fitformer.training.run_dir import Run

    run = Run.open(path)
    served_by = task_of(run.recipe).verb
    if verb is not None and served_by != verb:
        hint = f"use `fitformer {served_by} {path}`" if served_by else f"use `fitformer evaluate {path}`"
        raise InputError(f"{path} is a run of the task {run.recipe.task}, which `{verb}` does not serve; {hint}")
    return run
