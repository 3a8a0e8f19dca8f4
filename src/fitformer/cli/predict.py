"""Label images with a classifier's run: the likeliest class, and the probability of each.

fitformer predict runs/digits-classify photos/ one.png --format json --output labels.json

A run that takes images of any size reads them piece by piece, however large, and writes into a folder for each what it
saw: where the latents looked and what moved the decision, as pictures, GeoJSON and TIFF. The same command again goes on
where it was stopped. With no --output, or a file, it labels only.

fitformer predict RUN slides/ --output seen/
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fitformer._support.atomic_files import write_atomically
from fitformer.cli.options import add_device, device_of, open_run, positive, progress
from fitformer.errors import InputError

if TYPE_CHECKING:
    from fitformer.config.schema import ClassifyRecipe, Training
    from fitformer.data.grouping import Grouping
    from fitformer.data.masks import Masks
    from fitformer.data.settings import ImageData
    from fitformer.execution.token_store import Keep
    from fitformer.inference.explain.batch import Failure
    from fitformer.models.image_encoder import FITImageEncoder
    from fitformer.training.run_dir import Run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `fitformer predict`."""
    parser.add_argument("run", help="run directory of a classify recipe")
    parser.add_argument("files", nargs="+", help="image files, and folders of them")
    parser.add_argument("--format", choices=("csv", "json"), help="default: by the ending of --output, else csv")
    parser.add_argument(
        "--output", type=Path, help="file to write (default: standard output); any size: a folder, or a .csv or .json"
    )
    parser.add_argument("--batch-size", type=positive, default=64, help="of images of one size")
    add_device(parser)
    large = parser.add_argument_group("of a run that takes images of any size")
    large.add_argument(
        "--keep", choices=("memory", "host", "disk"),
        help="where data tokens wait between blocks (default: the recipe's trainer.keep)",
    )  # fmt: skip
    large.add_argument("--scratch", help="folder they wait in on disk (default: the recipe's trainer.scratch)")
    large.add_argument(
        "--y", choices=("down", "up"), default="down",
        help="how rows count in GeoJSON: down from 0 as in QuPath (default), or up from below 0 as in GIS viewers",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Label and print, or write into a folder what was seen."""
    from fitformer.config.schema import ClassifyRecipe
    from fitformer.models.image_encoder import FITImageEncoder

    of = open_run(arguments.run, "predict")
    network = of.model().to(device_of(arguments))
    assert isinstance(network, FITImageEncoder)
    assert isinstance(of.recipe, ClassifyRecipe)
    if network.groups is None:
        return _of_any_size(arguments, of, network, of.recipe)
    if arguments.keep or arguments.scratch or arguments.y != "down":
        raise InputError(
            f"--keep, --scratch and --y are for a run that takes images of any size; {arguments.run} takes one size"
        )
    return _label(arguments, of, network, of.recipe.data)


def _of_any_size(arguments: argparse.Namespace, of: "Run", network: "FITImageEncoder", recipe: "ClassifyRecipe") -> int:
    from fitformer.execution.token_store import ScratchError

    _stream(network, recipe.trainer, arguments.keep, arguments.scratch)
    labels_only = arguments.output is None or arguments.output.suffix.lower() in (".csv", ".json")
    try:
        return (_label if labels_only else _see)(arguments, of, network, recipe.data)
    except ScratchError as error:
        raise InputError(f"{error}; here: --scratch FOLDER, or --keep memory") from error


def _stream(network: "FITImageEncoder", training: "Training", keep: "Keep | None", scratch: str | None) -> None:
    """Have images read piece by piece, also by a run that was trained on small ones."""
    from fitformer.execution import Streamed

    keep = keep or ("disk" if scratch else training.keep)
    if scratch and keep != "disk":
        raise InputError(f"--scratch is where data tokens wait on disk; --keep {keep} keeps them elsewhere")
    network.set_execution(Streamed(training.slice_groups, keep, training.keep_precision, scratch or training.scratch))


def _masks(data: "ImageData", files: Sequence[Path]) -> "Masks | None":
    """The masks of the run's data, if there are, none of which two of these images share."""
    from fitformer.data.masks import masks_of

    masks = masks_of(data)
    if masks is not None:
        masks.check_shared(files)
    return masks


def grouping(of: "Run", network: "FITImageEncoder", data: "ImageData") -> "Grouping":
    """How images are cut for the network of a run, without the groups that its data call empty."""
    from fitformer.data.grouping import Grouping

    return Grouping(network.tiling, network.glimpses, data, trained=of.pixels)


def _label(arguments: argparse.Namespace, of: "Run", network: "FITImageEncoder", data: "ImageData") -> int:
    from fitformer.inference.explain.batch import find
    from fitformer.inference.predict import as_text, expand, predict

    files = expand(arguments.files) if network.groups else [slide.path for slide in find(arguments.files)]
    _masks(data, files)
    found = predict(
        network,
        files,
        of.classes,
        resize=data.resize,
        batch_size=arguments.batch_size,
        group=grouping(of, network, data),
        on_unreadable=lambda fault: print(f"fitformer: skipped {fault}", file=sys.stderr),
    )
    by_ending = "json" if arguments.output is not None and arguments.output.suffix == ".json" else "csv"
    text = as_text(list(found), arguments.format or by_ending)
    if arguments.output is None:
        print(text, end="")
        return 0
    with write_atomically(arguments.output) as scratch:
        scratch.write_text(text, encoding="utf-8")
    return 0


def _see(arguments: argparse.Namespace, of: "Run", network: "FITImageEncoder", data: "ImageData") -> int:
    from fitformer.inference.explain.batch import Slides, find, identity

    if arguments.format is not None:
        raise InputError(
            f"--format is for labels alone, and {arguments.output} is a folder for heat maps; give --output a name "
            "that ends in .csv or .json"
        )
    if arguments.output.is_file():
        raise InputError(f"{arguments.output} is a file; heat maps need a folder, labels alone a .csv or .json")
    slides = find(arguments.files, arguments.output)
    masks = _masks(data, [slide.path for slide in slides])
    # As JSON gives it back.
    background = list(data.background) if isinstance(data.background, tuple) else data.background
    skipped = {
        "background": background,
        "tolerance": data.tolerance,
        "min_foreground": data.min_foreground,
        "masks": data.masks,
    }
    with progress("looking") as show:
        work = Slides(
            network,
            of.classes,
            arguments.output,
            {"model": identity(of.model_folder), **skipped},
            group=grouping(of, network, data),
            beside=None if masks is None else masks.state,
            y=arguments.y,
            show=lambda done, of: show(round(1000 * done), 1000 * of),
            on_broken=lambda file, reason: print(f"fitformer: skipped {file} ({reason})", file=sys.stderr),
        )
        made = work.run(slides)
    kept = len(slides) - made - len(work.broken)
    there = f", {kept} were there already" if kept else ""
    print(f"{arguments.output}: {made} of {len(slides)} images labelled now{there}{_counted(work.broken)}")
    return 0


def _counted(broken: "Mapping[str, Failure]") -> str:
    """How many images could not be labelled, for each of the reasons there are."""
    said = {"unreadable": "could not be read", "blank": "blank", "not finite": "with NaN or infinite pixels"}
    found = [each.what for each in broken.values()]
    parts = [f", {found.count(what)} {words}" for what, words in said.items() if what in found]
    return "".join(parts) + (" (broken.csv)" if parts else "")
