"""A comparison of networks: who takes part, trainings to one budget, results in a folder, options."""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from budgeted_training import Budget, Result, Run, Settings, train
from torch import nn

from fitformer._support.atomic_files import write_atomically
from fitformer._support.device import processor_name
from fitformer.models.base import FITModel
from fitformer.profiling.flops import count_parameters
from fitformer.viz import write_curves


@dataclass(frozen=True)
class Entry:
    """One training of a comparison: a name, the network's maker, how it is trained, and the run that does it."""

    name: str
    make: Callable[[], nn.Module]
    settings: Settings
    start: Callable[[nn.Module, Any], Run]

    def run(self) -> Run:
        """The training, not begun."""
        torch.manual_seed(self.settings.seed)
        return self.start(self.make(), self.settings)


@dataclass
class Race:
    """Trainings to one budget, whose results are kept in a folder; those that are there already are not run again.

    Several processes may fill one folder, each with entries of its own.

    Attributes:
        budget: of each; in seconds, it is what the first one gets, and the others get the FLOPs that it spent.
        batch: what a step is given, from settings and its number.
        evaluate: of the curve. measure: of a finished run, plain data with `value`.
        folder: for a checkpoint and a result in JSON of each, models of the FITs that `from_pretrained` reads, and
            `curves.png`; None keeps nothing.
        points: of a curve.
    """

    budget: Budget
    batch: Callable[[Any, int], Any]
    evaluate: Callable[[Any], float]
    measure: Callable[[Any], Result]
    folder: Path | None = None
    points: int = 10
    results: list[Result] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.results = [json.loads(known.read_text()) for known in sorted(self.folder.glob("*.json"))]

    def enter(self, entry: Entry) -> Result:
        """The result of a training, run to its end if it is not there."""
        name = f"{entry.name}, seed {entry.settings.seed}"
        for result in self.results:
            if result["name"] == name:
                return result
        print(name, flush=True)
        run = entry.run()
        file = None if self.folder is None else self.folder / "".join(c if c.isalnum() else "-" for c in name)
        checkpoint = None if file is None else file.with_suffix(".pt")
        own = Budget(flops=self.results[0]["flops"]) if self.results and self.budget.flops is None else self.budget
        train(run, self.batch, own, self.evaluate, points=self.points, checkpoint=checkpoint)
        result = {
            "name": name,
            "entry": entry.name,
            "parameters": count_parameters(run.network),
            "settings": asdict(entry.settings),
            "machine": machine(entry.settings.device),
            **{key: getattr(run, key) for key in ("steps", "seconds", "flops", "curve")},
            **self.measure(run),
        }
        self.results.append(result)
        print(f"  {result['parameters']:,} parameters, {result['value']:.4f}", flush=True)
        if file is not None:
            if isinstance(run.network, FITModel):
                run.measured().save_pretrained(file)
            with write_atomically(file.with_suffix(".json")) as scratch:
                scratch.write_text(json.dumps(result, indent=2))
            self.draw()
        return result

    def best(self, entries: Sequence[Entry]) -> Entry:
        """Of several entries the one with the lowest value, all of them run."""
        return min(entries, key=lambda entry: self.enter(entry)["value"])

    def draw(self) -> None:
        """The curves of all results, as a picture in the folder."""
        if self.folder is None:
            return
        curves = {
            result["name"]: ([point[0] for point in result["curve"]], [point[2] for point in result["curve"]])
            for result in self.results
        }
        write_curves(self.folder / "curves.png", curves, x="FLOPs of training", y="held-out loss")


def machine(device: str) -> Result:
    """Where this runs."""
    name = torch.cuda.get_device_name() if device == "cuda" else processor_name()
    return {"processor": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def add_options(parser: argparse.ArgumentParser, **trunk: Any) -> None:
    """Options of all comparisons; `trunk` has the defaults of FIT's sizes."""
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="results and checkpoints; run again to continue")
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each with different seeds")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--points", type=int, default=10, help="of each curve")
    parser.add_argument("--float32", action="store_true", help="no bf16")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    for name, value in trunk.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.set_defaults(trunk=tuple(trunk))


def numbers(kind: Callable[[str], float]) -> Callable[[str], list[float]]:
    """A reader of `1e-3,2e-3`."""
    return lambda text: [kind(each) for each in text.split(",")]


def part_of(text: str) -> tuple[int, int]:
    """Read `K/N`."""
    try:
        number, count = map(int, text.split("/"))
        if 1 <= number <= count:
            return number, count
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no share; write 1/3 for the first of three")
