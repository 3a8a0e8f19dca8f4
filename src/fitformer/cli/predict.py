"""Label images with a classifier's run: the likeliest class, and the probability of each.

fitformer predict runs/digits-classify photos/ one.png --format json --output labels.json

A run that takes images of any size reads them piece by piece, however large, and writes maps of attention and relevance
into a folder for each image, as pictures, GeoJSON and TIFF. The same command again goes on where it was stopped.
Without --output, or with a file, it labels only.

fitformer predict RUN slides/ --output seen/
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fitformer._support.atomic_files import write_atomically
from fitformer.cli.options import add_checkpoint, add_device, device_of, open_run, positive, progress
from fitformer.errors import InputError

if TYPE_CHECKING:
    from fitformer.inference.explain.batch import Failure
    from fitformer.inference.labelling import Labeller


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `fitformer predict`."""
    parser.add_argument("run", help="run directory of a classify recipe")
    parser.add_argument("files", nargs="+", help="image files, and folders of them")
    parser.add_argument("--format", choices=("csv", "json"), help="default: by the ending of --output, else csv")
    parser.add_argument(
        "--output", type=Path, help="file to write (default: standard output); any size: a folder, or a .csv or .json"
    )
    parser.add_argument("--batch-size", type=positive, default=64, help="of images of one size")
    add_checkpoint(parser)
    add_device(parser)
    large = parser.add_argument_group("of a run that takes images of any size")
    large.add_argument(
        "--keep", choices=("memory", "host", "disk"),
        help="where data tokens are kept between blocks (default: the recipe's trainer.keep)",
    )  # fmt: skip
    large.add_argument("--scratch", help="folder for data tokens on disk (default: the recipe's trainer.scratch)")
    large.add_argument(
        "--y", choices=("down", "up"), default="down",
        help="how rows count in GeoJSON: down from 0 as in QuPath (default), or up from below 0 as in GIS viewers",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Label and print, or write maps into a folder."""
    from fitformer.execution.token_store import ScratchError
    from fitformer.inference.labelling import Labeller

    run = open_run(arguments.run, "predict")
    labeller = Labeller(run, run.model(arguments.checkpoint).to(device_of(arguments)))
    if not labeller.takes_any_size:
        if arguments.keep or arguments.scratch or arguments.y != "down":
            raise InputError(
                f"--keep, --scratch and --y are for a run that takes images of any size; {arguments.run} takes one size"
            )
        return _label(arguments, labeller)
    labeller.stream(arguments.keep, arguments.scratch)
    labels_only = arguments.output is None or arguments.output.suffix.lower() in (".csv", ".json")
    try:
        return (_label if labels_only else _explain)(arguments, labeller)
    except ScratchError as error:
        raise InputError(f"{error}; here: --scratch FOLDER, or --keep memory") from error


def _label(arguments: argparse.Namespace, labeller: "Labeller") -> int:
    from fitformer.inference.predict import as_text

    found = labeller.label(
        arguments.files, arguments.batch_size, lambda fault: print(f"fitformer: skipped {fault}", file=sys.stderr)
    )
    by_ending = "json" if arguments.output is not None and arguments.output.suffix == ".json" else "csv"
    text = as_text(found, arguments.format or by_ending)
    if arguments.output is None:
        print(text, end="")
        return 0
    with write_atomically(arguments.output) as scratch:
        scratch.write_text(text, encoding="utf-8")
    return 0


def _explain(arguments: argparse.Namespace, labeller: "Labeller") -> int:
    if arguments.format is not None:
        raise InputError(
            f"--format is for labels alone, and {arguments.output} is a folder for heat maps; give --output a name "
            "that ends in .csv or .json"
        )
    if arguments.output.is_file():
        raise InputError(f"{arguments.output} is a file; heat maps need a folder, labels alone a .csv or .json")
    with progress("explain") as show:
        work, count, made = labeller.explain(
            arguments.files,
            arguments.output,
            y=arguments.y,
            show=lambda done, total: show(round(1000 * done), 1000 * total),
            on_broken=lambda file, reason: print(f"fitformer: skipped {file} ({reason})", file=sys.stderr),
        )
    kept = count - made - len(work.broken)
    there = f", {kept} were there already" if kept else ""
    print(f"{arguments.output}: {made} of {count} images labelled now{there}{_counted(work.broken)}")
    return 0


def _counted(broken: "Mapping[str, Failure]") -> str:
    """How many images could not be labelled, for each of the reasons there are."""
    said = {"unreadable": "could not be read", "blank": "blank", "not finite": "with NaN or infinite pixels"}
    found = [each.what for each in broken.values()]
    parts = [f", {found.count(what)} {words}" for what, words in said.items() if what in found]
    return "".join(parts) + (" (broken.csv)" if parts else "")
