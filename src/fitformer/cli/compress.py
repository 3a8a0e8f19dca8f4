"""Compress a file without loss by the probabilities of a `bytes` run; `decompress` gets it back, bit for bit.

It is decompressed by the same weights, build of torch and kind of processor, and refused elsewhere.

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

SUFFIX = ".fit"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `fitformer compress`."""
    parser.add_argument("run", help="run directory of a bytes recipe")
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

    decoder, file = decoder_of(arguments), arguments.file
    target, begun = arguments.output or file.with_name(file.name + SUFFIX), time.perf_counter()
    options = {"segments": arguments.segments, "window": arguments.window}
    with progress("compress") as show:
        report = compress(decoder, file, target, **options, on_step=show)
    seconds = time.perf_counter() - begun
    print(
        f"{target}: {report.compressed:,} bytes of {report.original:,} ({report.bits_per_byte:.3f} bits per byte; the "
        f"model's own {report.model_bits / max(report.original, 1):.3f}), {report.segments} segments, "
        f"{report.original / seconds:,.0f} bytes a second"
    )
    return 0


def decoder_of(arguments: argparse.Namespace) -> "FITDecoder":
    """The model of the run of a task whose tokens are the bytes of a file.

    Raises:
        InputError: a run of another task.
    """
    from fitformer.tasks import task_of

    run = open_run(arguments.run)
    if task_of(run.recipe).generate_bytes is None:
        raise InputError(f"{run.path} is a {run.recipe.task} run; files are compressed by a bytes run")
    return run.model(arguments.checkpoint).to(device_of(arguments))
