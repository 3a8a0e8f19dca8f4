"""Label image files with a classifier's run: the likeliest class, and the probability of each.

fitformer predict runs/digits-classify photos/ one.png --format json --output labels.json
"""

import argparse
import sys
from pathlib import Path

from fitformer.cli.options import add_device, device_of, open_run, positive
from fitformer.files import write_atomically


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `fitformer predict`."""
    parser.add_argument("run", help="run directory of a classify recipe")
    parser.add_argument("files", nargs="+", help="image files, and folders of them")
    parser.add_argument("--format", choices=("csv", "json"), help="default: by the ending of --output, else csv")
    parser.add_argument("--output", type=Path, help="file to write (default: standard output)")
    parser.add_argument("--batch-size", type=positive, default=64)
    add_device(parser)


def run(arguments: argparse.Namespace) -> int:
    """Label and print."""
    from fitformer.encoder import FITImageEncoder
    from fitformer.prediction import as_text, expand, predict
    from fitformer.settings import ClassifyRecipe

    of = open_run(arguments.run, "classify")
    files, device = expand(arguments.files), device_of(arguments)
    network = of.model().to(device)
    assert isinstance(network, FITImageEncoder)
    assert isinstance(of.recipe, ClassifyRecipe)
    found = predict(
        network,
        files,
        of.classes,
        resize=of.recipe.data.resize,
        batch_size=arguments.batch_size,
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
