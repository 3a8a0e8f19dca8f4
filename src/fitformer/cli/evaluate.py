"""Measure a run on held-out data: accuracy and confusion, denoising error, or bits per pixel or byte beside baselines.

fitformer evaluate runs/digits-classify
fitformer evaluate runs/digits-diffuse --classifier runs/digits-classify --count 500
"""

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fitformer.cli.options import add_device, add_drawing, device_of, open_run, positive, progress
from fitformer.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

TASKS = ("classify", "diffuse", "autoregress")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `fitformer evaluate`."""
    parser.add_argument("run", help="run directory")
    parser.add_argument("--split", choices=("test", "val", "train"), default="test", help="part of the data")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--batch-size", type=positive, default=64)
    parser.add_argument("--no-baselines", action="store_true", help="leave out what an autoregressive run must beat")
    add_device(parser)
    drawn = parser.add_argument_group("of a diffuse run, how often samples are recognised as their class")
    drawn.add_argument("--classifier", metavar="RUN", help="run directory of a classify recipe on the same classes")
    drawn.add_argument("--count", type=positive, help="samples to draw (default: 500)")
    add_drawing(drawn)  # type: ignore[arg-type]


def run(arguments: argparse.Namespace) -> int:
    """Measure and print."""
    from fitformer.evaluation.evaluate import evaluate, recognition

    of, device = open_run(arguments.run, *TASKS), device_of(arguments)
    judge = None if arguments.classifier is None else open_run(arguments.classifier, "classify")
    drawing = {name: getattr(arguments, name) for name in ("steps", "sampler", "guidance")}
    unused = [name for name in ("count", *drawing) if getattr(arguments, name) is not None]
    if judge is None and unused:
        raise InputError(f"--{unused[0]} is for samples that a classifier looks at; give --classifier RUN as well")
    more = {"device": device, "batch_size": arguments.batch_size}
    with progress("evaluate") as show:
        found = list(evaluate(of, arguments.split, baselines=not arguments.no_baselines, on_batch=show, **more))
    if judge is not None:
        found += recognition(of, judge, arguments.count or 500, seed=arguments.seed, **drawing, **more)
    if arguments.json:
        print(json.dumps({"run": str(of.path), "split": arguments.split, **dict(found)}, ensure_ascii=False))
        return 0
    from rich.console import Console

    console = Console()
    for table in tables(found, of.classes, f"{of.path}, {arguments.split}"):
        console.print(table)
    return 0


def tables(found: Sequence[tuple[str, Any]], classes: Sequence[str], title: str) -> "list[Table]":
    """Single values in one table, values by class in another, the confusion in a third."""
    from rich import box
    from rich.table import Table

    look = {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0), "title_justify": "left"}
    single = Table("measure", title=title, min_width=30, **look)  # type: ignore[arg-type]
    single.add_column("value", justify="right")
    further = []
    for name, value in found:
        if isinstance(value, dict):
            of_class = Table("class", title=name.replace("_", " "), min_width=30, **look)  # type: ignore[arg-type]
            of_class.add_column("value", justify="right")
            for key, share in value.items():
                of_class.add_row(key, f"{share:.4f}")
            further.append(of_class)
        elif isinstance(value, list):
            further += [_confusion(value, classes, look)] if len(classes) <= 20 else []
        else:
            single.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else f"{value:.4f}")
    return [single, *further]


def _confusion(counts: list[list[int]], classes: Sequence[str], look: dict[str, Any]) -> "Table":
    from rich.table import Table

    table = Table("true, then taken for", title="confusion", **look)
    for name in classes:
        table.add_column(name, justify="right")
    for name, row in zip(classes, counts, strict=True):
        table.add_row(name, *(str(count) if count else "" for count in row))
    return table
