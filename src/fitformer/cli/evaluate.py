"""Evaluate a run on held-out data: accuracy and confusion, errors of numbers, concordance, or bits and baselines.

With --file, the bits that an autoregressive run's model needs for files of your own, beside gzip, xz and zstd.

fitformer evaluate runs/digits-classify
fitformer evaluate runs/python-bytes --file notes.txt --context 512
fitformer evaluate runs/digits-diffuse --classifier runs/digits-classify --count 500
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any

from fitformer.cli.options import (
    add_checkpoint,
    add_device,
    add_drawing,
    device_of,
    natural,
    open_run,
    positive,
    progress,
)
from fitformer.errors import InputError

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from fitformer.training.run_dir import Run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `fitformer evaluate`."""
    parser.add_argument("run", help="run directory")
    parser.add_argument("--split", choices=("test", "val", "train"), default="test", help="part of the data")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--batch-size", type=positive, default=64)
    baselines = "leave out the baselines of the task, or the compressors of files"
    parser.add_argument("--no-baselines", action="store_true", help=baselines)
    add_checkpoint(parser)
    add_device(parser)
    files = parser.add_argument_group("for an autoregressive run: files of your own, in place of a part of the data")
    files.add_argument("--file", nargs="+", metavar="FILE", help="files, each measured as one sequence")
    files.add_argument(
        "--context", type=natural, help="least tokens of context, but at the beginning (default: half of the model's)"
    )
    files.add_argument(
        "--stride", type=positive, help="tokens that a window of context scores (default: what the model has room for)"
    )
    drawn = parser.add_argument_group(
        "for a diffusion run: the share of samples that a classifier assigns to their class"
    )
    drawn.add_argument("--classifier", metavar="RUN", help="run directory of a classifier of the same classes")
    drawn.add_argument("--count", type=positive, help="samples to draw (default: 500)")
    add_drawing(drawn)  # type: ignore[arg-type]


def run(arguments: argparse.Namespace) -> int:
    """Evaluate and print."""
    from fitformer.evaluation.evaluate import evaluate, recognition

    run, device = open_run(arguments.run), device_of(arguments)
    if arguments.file is not None:
        return _files(run, device, arguments)
    for name in ("context", "stride"):
        if getattr(arguments, name) is not None:
            raise InputError(f"--{name} is for files of your own; give --file FILE as well")
    classifier = None if arguments.classifier is None else open_run(arguments.classifier, "predict")
    sampling = {name: getattr(arguments, name) for name in ("steps", "sampler", "guidance")}
    unused = [name for name in ("count", *sampling) if getattr(arguments, name) is not None]
    if classifier is None and unused:
        raise InputError(f"--{unused[0]} is for samples that are classified; give --classifier RUN as well")
    hardware = {"device": device, "batch_size": arguments.batch_size, "checkpoint": arguments.checkpoint}
    with progress("evaluate") as show:
        metrics = list(evaluate(run, arguments.split, baselines=not arguments.no_baselines, on_batch=show, **hardware))
    if classifier is not None:
        count = arguments.count or 500
        metrics += recognition(run, classifier, count, seed=arguments.seed, **sampling, **hardware)
    if arguments.json:
        found = {"run": str(run.path), "split": arguments.split, **dict(metrics)}
        print(json.dumps(_defined(found), ensure_ascii=False, allow_nan=False))
    else:
        _print(metrics, run.classes, f"{run.path}, {arguments.split}")
    return 0


def _defined(value: Any) -> Any:
    """What JSON can hold: null for a metric that is not defined."""
    if isinstance(value, dict):
        return {name: _defined(each) for name, each in value.items()}
    return None if isinstance(value, float) and not isfinite(value) else value


def _files(run: "Run", device: "torch.device", arguments: argparse.Namespace) -> int:
    """Measure files and print a row for each."""
    from rich.console import Console

    from fitformer.evaluation.files import evaluate_files

    for name in ("classifier", "count", "steps", "sampler", "guidance"):
        if getattr(arguments, name) is not None:
            raise InputError(f"--{name} is for the samples of a diffusion run, --file for files; leave one of them out")
    options = {name: getattr(arguments, name) for name in ("context", "stride", "checkpoint", "batch_size")}
    with progress("evaluate") as show:
        measured = evaluate_files(
            run, arguments.file, device=device, baselines=not arguments.no_baselines, on_tokens=show, **options
        )
        found = [{"file": name, **measures} for name, measures in measured]
    if arguments.json:
        print(json.dumps({"run": str(run.path), "files": found}, ensure_ascii=False))
    else:
        Console().print(files_table(found, str(run.path)))
    return 0


def files_table(found: Sequence[Mapping[str, Any]], title: str) -> "Table":
    """A row for each file, a column for each measure."""
    from rich.table import Table

    table = Table(title=title, **_style())
    for name in found[0]:
        table.add_column(name.replace("_", " "), justify="left" if name == "file" else "right", overflow="fold")
    for file, *measures in (row.values() for row in found):
        table.add_row(file, *(f"{each:,}" if isinstance(each, int) else f"{each:.4f}" for each in measures))
    return table


def _style() -> dict[str, Any]:
    from rich import box

    return {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0), "title_justify": "left"}


def _print(metrics: Sequence[tuple[str, Any]], classes: Sequence[str], title: str) -> None:
    from rich.console import Console

    console = Console()
    for table in tables(metrics, classes, title):
        console.print(table)


def tables(metrics: Sequence[tuple[str, Any]], classes: Sequence[str], title: str) -> "list[Table]":
    """Tables of the metrics: one of single values, one of those by class, label or target, one of the confusion."""
    from rich.table import Table

    style = _style()
    single = Table("measure", title=title, min_width=30, **style)
    single.add_column("value", justify="right")
    several: dict[str, dict[str, dict[str, float]]] = {}
    others = []
    for name, value in metrics:
        if isinstance(value, dict):
            measure, _, kind = name.rpartition("_by_")
            several.setdefault(kind, {})[measure] = value
        elif isinstance(value, list):
            others += [_confusion(value, classes, style)] if len(classes) <= 20 else []
        else:
            single.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else f"{value:.4f}")
    return [single, *(_by(kind, measures, style) for kind, measures in several.items()), *others]


def _by(kind: str, metrics: Mapping[str, Mapping[str, float]], style: dict[str, Any]) -> "Table":
    """A row for each class, label or target, a column for each metric, empty where one has no value."""
    from rich.table import Table

    table = Table(kind, title=f"by {kind}", min_width=30, **style)
    for name in metrics:
        table.add_column(name.replace("_", " "), justify="right")
    for key in dict.fromkeys(key for shares in metrics.values() for key in shares):
        table.add_row(key, *(f"{shares[key]:.4f}" if key in shares else "" for shares in metrics.values()))
    return table


def _confusion(counts: list[list[int]], classes: Sequence[str], style: dict[str, Any]) -> "Table":
    from rich.table import Table

    table = Table("true class, then predicted", title="confusion", **style)
    for name in classes:
        table.add_column(name, justify="right")
    for name, row in zip(classes, counts, strict=True):
        table.add_row(name, *(str(count) if count else "" for count in row))
    return table
