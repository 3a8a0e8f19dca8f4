"""Train a model from a recipe. The same command again continues where the run stopped; with a larger --trainer.steps it
continues a finished run. --init-from starts from the weights of another run or of a saved model.

Any key of a recipe can be overridden: `fitformer train digits-classify --trainer.steps=200 --optimizer.lr 3e-4`.
"""

import argparse
from pathlib import Path

from fitformer.config import load as config
from fitformer.errors import InputError, require

OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `fitformer train`."""
    parser.add_argument("recipe", nargs="?", help="name of a packaged recipe (see --list), or path of a YAML file")
    parser.add_argument("--run-dir", type=Path, help="folder of the run (default: runs/<recipe>)")
    parser.add_argument("--list", action="store_true", help="show the packaged recipes")
    parser.add_argument(
        "--init-from", metavar="RUN_OR_MODEL", help="start from these weights, with a head of the recipe's"
    )
    parser.add_argument("--memory", help="memory that a step may use, such as 8GB; the same as --trainer.memory")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved recipe and stop")
    parser.epilog = "--SECTION.KEY=VALUE overrides a key of the recipe; --dry-run prints all keys."


def run(arguments: argparse.Namespace) -> int:
    """Train, or list the recipes, or print one."""
    if arguments.list:
        return _list()
    if arguments.recipe is None:
        raise InputError("name a recipe; `fitformer train --list` shows the packaged ones")
    budget = [] if arguments.memory is None else [f"--trainer.memory={arguments.memory}"]
    recipe = config.load(arguments.recipe, [*arguments.overrides, *budget])
    if arguments.dry_run:
        print(config.dump(recipe), end="")
        return 0
    # Importing torch and Lightning takes seconds; nothing above needs them.
    for package in ("lightning", "tensorboard"):
        require(package, extra="train")
    from fitformer.training.fit import train

    run_dir = arguments.run_dir or Path("runs") / Path(arguments.recipe).stem
    return 0 if train(recipe, run_dir, arguments.init_from) else 130


def _list() -> int:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_edge=False)
    table.add_column("recipe", no_wrap=True)
    table.add_column("task", no_wrap=True)
    table.add_column("description")
    for row in config.listing():
        table.add_row(*row)
    Console().print(table)
    return 0
