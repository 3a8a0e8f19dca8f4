"""Answer on images with a run: the likeliest class and the probability of each, the numbers that it learned, or the
class of every pixel.

fitformer predict runs/digits-classify photos/ one.png --format json --output labels.json

With a folder as --output, it also writes maps of what each label rests on, as pictures, GeoJSON and TIFF, and the same
command again goes on where it was stopped. --explain leave-out measures what each group of patches adds to the label by
leaving it out; gradient, the default, and attention are quicker, and tell how far they agree with that.
A run that takes images of any size reads them piece by piece, however large.

fitformer predict RUN slides/ --output seen/ --explain leave-out

A table of images and their patients, of a run with data.patient, gives a label for each patient and maps of each image.

fitformer predict RUN table.csv --output seen/ --explain leave-out

Several processes or machines share the work, each with its part.

fitformer predict RUN slides/ --output seen/ --explain none --shard 2/8

A run of a segment recipe writes the class of every pixel into a folder: TIFF, GeoJSON, and a picture.

fitformer predict SEGMENTER slides/ --output seen/
"""

import argparse
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fitformer._support.atomic_files import write_atomically
from fitformer.cli.options import add_checkpoint, add_device, device_of, open_run, positive, progress, shard
from fitformer.errors import InputError

if TYPE_CHECKING:
    from fitformer.inference.explain.explanation import Method
    from fitformer.inference.folder_work import Failure, FolderWork
    from fitformer.inference.image_run import ImageRun
    from fitformer.inference.labelling import Labeller
    from fitformer.inference.segmentation.segmenting import Segmenter


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `fitformer predict`."""
    parser.add_argument("run", help="run directory of a classify, regress, multilabel, survival or segment recipe")
    tables = "or a table (CSV, Parquet) of images and their patients, for a run with data.patient"
    parser.add_argument("files", nargs="+", help=f"image files, and folders of them; {tables}")
    parser.add_argument("--format", choices=("csv", "json"), help="default: by the ending of --output, else csv")
    parser.add_argument(
        "--output", type=Path, help=".csv or .json to write labels to (default: standard output), or a folder for maps"
    )
    parser.add_argument(
        "--explain", choices=("leave-out", "gradient", "attention", "none"),
        help="what the maps in the folder of --output show (default: gradient); none writes labels alone into it",
    )  # fmt: skip
    parser.add_argument(
        "--target", metavar="NAME", help="the class, number or label that the maps explain (default: the answer itself)"
    )
    parser.add_argument(
        "--shard", type=shard, metavar="I/N",
        help="label part I of N of the images, or patients, into the folder of --output, beside other processes or "
        "machines that do the other parts; the tables are whole when all have ended",
    )  # fmt: skip
    parser.add_argument(
        "--y", choices=("down", "up"), default="down",
        help="how rows count in GeoJSON: down from 0 as in QuPath (default), or up from below 0 as in GIS viewers",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=positive, default=64, help="of images of one size")
    add_checkpoint(parser)
    add_device(parser)
    pixels = parser.add_argument_group("of a run of a segment recipe")
    pixels.add_argument("--probabilities", action="store_true", help="also write those of all classes, as TIFF")
    pixels.add_argument("--no-polygons", action="store_true", help="write no GeoJSON, which needs rasterio")
    large = parser.add_argument_group("of a run that takes images of any size")
    large.add_argument(
        "--keep", choices=("memory", "host", "disk"),
        help="where data tokens are kept between blocks (default: the recipe's trainer.keep)",
    )  # fmt: skip
    large.add_argument("--scratch", help="folder for data tokens on disk (default: the recipe's trainer.scratch)")


def run(arguments: argparse.Namespace) -> int:
    """Label and print, or write maps into a folder."""
    from fitformer.inference.labelling import Labeller
    from fitformer.inference.segmentation.segmenting import Segmenter
    from fitformer.tasks import task_of

    run = open_run(arguments.run, "predict")
    network = run.model(arguments.checkpoint).to(device_of(arguments))
    if task_of(run.recipe).answers is None:
        if arguments.target is not None:
            raise InputError(f"--target is for maps of an image's answer; {arguments.run} labels pixels")
        segmenter = Segmenter(run, network)
        return _streamed(arguments, segmenter, lambda: _segment(arguments, segmenter))
    for name in ("probabilities", "no_polygons"):
        if getattr(arguments, name):
            raise InputError(
                f"--{name.replace('_', '-')} is for a run that labels pixels; {arguments.run} labels images"
            )
    labeller = Labeller(run, network)
    if labeller.recipe.data.patient is not None and _table(arguments) is None:
        print(
            "fitformer: this run learned patients of several images, and each image here is taken for a patient of its "
            "own; a table of images and patients in place of images joins them",
            file=sys.stderr,
        )
    labels_only = _labels_only(arguments, labeller)
    _check_maps(arguments, labels_only)
    return _streamed(arguments, labeller, lambda: (_label if labels_only else _explain)(arguments, labeller))


def _check_maps(arguments: argparse.Namespace, labels_only: bool) -> None:
    """Refuse options of maps where there are none."""
    given = {
        f"--explain {arguments.explain}": arguments.explain,
        "--shard": arguments.shard,
        "--target": arguments.target,
        "--y up": arguments.y != "down",
    }
    if labels_only and (asked := [option for option, value in given.items() if value]):
        where = "there is no --output" if arguments.output is None else f"--output is {arguments.output}"
        raise InputError(f"{asked[0]} is for a folder, and {where}; give --output FOLDER")
    if arguments.target is not None and arguments.explain == "none":
        raise InputError(f"--target {arguments.target} is for maps, and --explain is none; leave one of them out")


def _streamed(arguments: argparse.Namespace, used: "ImageRun", work: Callable[[], int]) -> int:
    """Do some work with a run that reads images piece by piece, if it takes those of any size."""
    from fitformer.execution.token_store import ScratchError

    if used.takes_any_size:
        used.stream(arguments.keep, arguments.scratch)
    elif arguments.keep or arguments.scratch:
        raise InputError(
            f"--keep and --scratch are for a run that takes images of any size; {arguments.run} takes one size"
        )
    try:
        return work()
    except ScratchError as error:
        raise InputError(f"{error}; here: --scratch FOLDER, or --keep memory") from error


def _labels_only(arguments: argparse.Namespace, labeller: "Labeller") -> bool:
    """Whether `--output` is not a folder for maps."""
    if arguments.output is None or arguments.output.suffix.lower() in (".csv", ".json"):
        return True
    # Labels of images of one size go into a file of any name, as they did before there were maps of them.
    named = arguments.format is not None or arguments.output.suffix != ""
    return named and not labeller.takes_any_size and arguments.explain is None


def _table(arguments: argparse.Namespace) -> Path | None:
    """The table among the files, if they are one.

    Raises:
        InputError: a table beside other files.
    """
    from fitformer.data.datasets.folders import is_table

    files = [Path(file) for file in arguments.files]
    tables = [file for file in files if is_table(file)]
    if tables and len(files) > 1:
        raise InputError(f"{tables[0]} is a table, and there are {len(files)} files; give it alone")
    return tables[0] if tables else None


def _label(arguments: argparse.Namespace, labeller: "Labeller") -> int:
    from fitformer.inference.predict import as_text

    def skipped(fault: Exception) -> None:
        print(f"fitformer: skipped {fault}", file=sys.stderr)

    table = _table(arguments)
    if table is None:
        found = labeller.label(arguments.files, arguments.batch_size, skipped)
    else:
        found = labeller.label_patients(table, skipped)
    by_ending = "json" if arguments.output is not None and arguments.output.suffix == ".json" else "csv"
    text = as_text(found, labeller.answers.columns, arguments.format or by_ending)
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
    from fitformer.inference.find import Shard

    method: Method | None = None if arguments.explain == "none" else arguments.explain or "gradient"
    table = _table(arguments)
    explain = partial(labeller.explain, arguments.files) if table is None else partial(labeller.explain_patients, table)
    with progress("label" if method is None else "explain") as show:
        work, count, made = explain(
            arguments.output,
            method,
            None if arguments.shard is None else Shard(*arguments.shard),
            target=arguments.target,
            y=arguments.y,
            show=lambda done, total: show(round(1000 * done), 1000 * total),
            on_broken=_skipped,
        )
    kind = "images" if table is None else "patients"
    print(_summary(arguments, work, count, made, kind))
    if method is not None and (said := _agreement(*work.agreement(), method, kind)):
        print(said, file=sys.stderr)
    return 0


def _segment(arguments: argparse.Namespace, segmenter: "Segmenter") -> int:
    from fitformer.inference.find import Shard

    for name in ("format", "explain"):
        if getattr(arguments, name) is not None:
            raise InputError(f"--{name} is for a run that labels images; {arguments.run} labels pixels")
    output = arguments.output
    if output is None or output.is_file() or output.suffix.lower() in (".csv", ".json"):
        raise InputError(f"label maps need a folder, and --output is {output or 'not given'}; give --output FOLDER")
    with progress("segment") as show:
        work, count, made = segmenter.segment(
            arguments.files,
            output,
            None if arguments.shard is None else Shard(*arguments.shard),
            probabilities=arguments.probabilities,
            polygons=not arguments.no_polygons,
            scratch=arguments.scratch,
            y=arguments.y,
            show=lambda done, total: show(round(1000 * done), 1000 * total),
            on_broken=_skipped,
        )
    print(_summary(arguments, work, count, made))
    return 0


def _skipped(file: str, reason: str) -> None:
    print(f"fitformer: skipped {file} ({reason})", file=sys.stderr)


def _summary(arguments: argparse.Namespace, work: "FolderWork", count: int, made: int, kind: str = "images") -> str:
    """How many images, or patients, were done, were there, and failed."""
    kept = count - made - len(work.broken)
    there = f", {kept} were there already" if kept else ""
    part = "" if arguments.shard is None else " of part {}/{}".format(*arguments.shard)
    return f"{arguments.output}: {made} of {count} {kind}{part} labelled now{there}{_counted(work.broken)}"


def _agreement(count: int, means: Mapping[str, float], method: str, kind: str) -> str:
    """How far the maps agree with leaving their largest groups out; nothing where it was not measured."""
    words = {"rank_correlation": "rank correlation {:.2f}", "same_sign": "the same sign on {:.0%}"}
    said = [text.format(means[key]) for key, text in words.items() if key in means]
    if not said:
        return ""
    return f"fitformer: {method} against leave-out, largest groups of {count} {kind}: {', '.join(said)}"


def _counted(broken: "Mapping[str, Failure]") -> str:
    """How many images could not be labelled, for each of the reasons there are."""
    said = {"unreadable": "could not be read", "blank": "blank", "not finite": "with NaN or infinite pixels"}
    found = [each.what for each in broken.values()]
    parts = [f", {found.count(what)} {words}" for what, words in said.items() if what in found]
    return "".join(parts) + (" (broken.csv)" if parts else "")
