"""Get a file back that `fitformer compress` wrote, bit for bit, by the run that compressed it; an image as PNG.

A damaged file, another model, and a machine that computes otherwise are refused; the output appears when it is whole.

fitformer decompress runs/python-bytes notes.txt.fit        # writes notes.txt
"""

import argparse
from functools import partial
from pathlib import Path

from fitformer.cli.compress import SUFFIX, opened
from fitformer.cli.options import add_checkpoint, add_device, progress
from fitformer.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `fitformer decompress`."""
    parser.add_argument("run", help="run directory that compressed the file")
    parser.add_argument("file", type=Path, help="the compressed file")
    parser.add_argument("-o", "--output", type=Path, help=f"the original (default: FILE without {SUFFIX})")
    add_checkpoint(parser)
    add_device(parser)


def run(arguments: argparse.Namespace) -> int:
    """Decompress and say where to."""
    from fitformer.inference.compression import decompress

    file, (run, task, decoder) = arguments.file, opened(arguments)
    if arguments.output is None and file.suffix != SUFFIX:
        raise InputError(f"{file} does not end in {SUFFIX}; say with --output where the original goes")
    target = arguments.output or file.with_suffix("")
    restore = None if task.restored is None else partial(task.restored, decoder, run.recipe)
    with progress("decompress") as show:
        decompress(decoder, file, target, restore=restore, on_step=show)
    print(f"{target}: {target.stat().st_size:,} bytes")
    return 0
