"""Compress a file without loss by the probabilities of a `bytes` run, or an image by those of a `pixels` run.

`decompress` gets it back, bit for bit, of an image its pixels, by the same weights, build of torch and kind of
processor. It is refused elsewhere.

fitformer compress runs/python-bytes notes.txt              # writes notes.txt.fit
fitformer compress runs/python-bytes notes.txt --segments 1 --output notes.fit
"""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from fitformer.cli.options import add_checkpoint, add_device, device_of, open_run, positive, progress
from fitformer.errors import InputError

if TYPE_CHECKING:
    from fitformer.models.decoder import FITDecoder
    from fitformer.tasks import TaskSpec
    from fitformer.training.run_dir import Run

SUFFIX = ".fit"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `fitformer compress`."""
    parser.add_argument("run", help="run directory of a bytes or pixels recipe")
    parser.add_argument("file", type=Path, help="file to compress")
    parser.add_argument("-o", "--output", type=Path, help=f"the compressed file (default: FILE{SUFFIX})")
    parser.add_argument(
        "--segments",
        type=positive,
        metavar="S",
        help="parts that are coded side by side; more are faster and take more bits (default: one for every 16,384 "
        "bytes, at most 64)",
    )
    parser.add_argument(
        "--window", type=positive, metavar="GROUPS", help="most groups of context (default: all that the model takes)"
    )
    add_checkpoint(parser)
    add_device(parser)


def run(arguments: argparse.Namespace) -> int:
    """Compress and print what came of it."""
    from fitformer.inference.compression import compress

    run, task, decoder = opened(arguments)
    file, target = arguments.file, arguments.output or Path(f"{arguments.file}{SUFFIX}")
    assert task.exact_tokens is not None
    tokens, begun = task.exact_tokens(decoder, run.recipe, file), time.perf_counter()
    options = {"segments": arguments.segments, "window": arguments.window}
    with progress("compress") as show:
        report = compress(decoder, tokens, target, **options, on_step=show)
    seconds, unit = time.perf_counter() - begun, task.unit.replace("_", " ")
    print(
        f"{target}: {report.compressed:,} bytes of {file.stat().st_size:,}; {report.bits_per_token:.3f} {unit}, the "
        f"model's own {report.model_bits / max(report.tokens, 1):.3f}; {report.segments} segments, "
        f"{report.tokens / seconds:,.0f} tokens a second"
    )
    return 0


def opened(arguments: argparse.Namespace) -> "tuple[Run, TaskSpec, FITDecoder]":
    """The run, its task and its model, of a task by which files are compressed.

    Raises:
        InputError: a run of another task.
    """
    from fitformer.tasks import task_of

    run = open_run(arguments.run)
    task = task_of(run.recipe)
    if task.exact_tokens is None:
        raise InputError(
            f"{run.path} is a run of the task {run.recipe.task}; files are compressed by a bytes run, images by a "
            "pixels run"
        )
    return run, task, run.model(arguments.checkpoint).to(device_of(arguments))
