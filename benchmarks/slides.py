"""FIT beside torchmil's models of slides: a step on 100,000 patches, and generated tasks whose answer is known.

    pip install torchmil
    OMP_NUM_THREADS=1 python benchmarks/slides.py --output FOLDER

Prints a page in Markdown. Results are kept in FOLDER as JSON, a file each; what is there is not done again, so the
command goes on where it was stopped, and `--page` prints what there is. FIT is the preset `slide`, ABMIL and TransMIL
are those of torchmil. Neither takes positions: TransMIL lays the patches it is given, in the order of rows, onto a
square; `TransMIL, grid` is given the slide's own square, with zeros where no patch is.

The step: features in HDF5, forward, cross-entropy, backward, AdamW; each model in a process of its own.
The tasks are those of `slide_tasks.py`. Every model sees the same slides in the same order, turned alike, for as many
steps of AdamW; its learning rate is the best of `RATES` for the first seed, by the AUC on slides that are held out for
that.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import slide_tasks
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_auroc

from fitformer import FITImageEncoder
from fitformer._support.atomic_files import write_atomically
from fitformer._support.device import processor_name
from fitformer._support.system_memory import peak_bytes
from fitformer.data.dihedral import drawn
from fitformer.data.readers import open_image
from fitformer.patching.any_size import PixelArray, PixelSource
from fitformer.profiling.flops import count_parameters

RATES = (5e-4, 2e-3)
GROUP = 8


class Fit(nn.Module):
    """The preset `slide` with the options that docs/features.md gives it: logits (b,) of slides."""

    def __init__(self, width: int) -> None:
        super().__init__()
        options = {"position": "sin_cos2d", "latent_position": "row_column"}
        self.encoder = FITImageEncoder.from_preset(
            "slide", image_size=None, group_size=GROUP, patch_size=1, channels=width, num_classes=1, **options
        )

    def forward(self, slides: list[PixelSource]) -> Tensor:
        return self.encoder(slides)[:, 0]


def abmil(width: int, inner: int) -> nn.Module:
    """ABMIL with gated attention on an embedding of each patch, as its authors' and most others' is."""
    from torchmil.models import ABMIL

    return ABMIL((width,), gated=True, feat_ext=nn.Sequential(nn.Linear(width, inner), nn.ReLU()))


def transmil(width: int, inner: int) -> nn.Module:
    """TransMIL as its authors' is, but for its width."""
    from torchmil.models import TransMIL

    return TransMIL((width,), att_dim=inner, n_heads=8 if inner == 512 else 4)


@dataclass(frozen=True)
class Slide(PixelArray):
    """A slide in memory, features (rows, columns, D), with patches where `there` (rows, columns) says so."""

    pixels: np.ndarray
    there: np.ndarray

    @property
    def presence(self) -> PixelArray:
        return PixelArray(self.there[..., None])


@dataclass(frozen=True)
class Model:
    """A model, made for features of a width, and what it is given of pictures (k, rows, columns, D) with patches where
    booleans (k, rows, columns) say so."""

    make: Callable[[int], nn.Module]
    given: Callable[[np.ndarray, np.ndarray], Any]


def slides(pictures: np.ndarray, there: np.ndarray) -> list[Slide]:
    return [Slide(*each) for each in zip(pictures, there, strict=True)]


def bags(pictures: np.ndarray, there: np.ndarray) -> Tensor:
    return torch.from_numpy(pictures[there].reshape(len(pictures), -1, pictures.shape[-1]))


def grids(pictures: np.ndarray, there: np.ndarray) -> Tensor:
    return torch.from_numpy(pictures.reshape(len(pictures), -1, pictures.shape[-1]))


MODELS = {
    "FIT": Model(Fit, slides),
    "ABMIL": Model(lambda width: abmil(width, 512), bags),
    "TransMIL": Model(lambda width: transmil(width, 128), bags),
    "TransMIL, grid": Model(lambda width: transmil(width, 128), grids),
}
"""Of the tasks; TransMIL's own width, 512, would take four fifths of the time."""

STEPS: dict[str, Callable[[int], nn.Module]] = {
    "FIT": Fit,
    "FIT, features in memory": Fit,
    "ABMIL": lambda width: abmil(width, 512),
    "TransMIL": lambda width: transmil(width, 512),
}


# A training step ------------------------------------------------------------------------------------------------------


def write_slide(path: Path, patches: int, width: int) -> None:
    """A slide of so many patches as TRIDENT writes it, round, patch after patch in rows."""
    import h5py

    side = int(patches**0.5 * 1.2) + 3
    middle = np.arange(side) - (side - 1) / 2
    nearest = np.argsort(np.hypot(middle[:, None], middle[None]), axis=None)[:patches]
    places = np.stack(np.divmod(np.sort(nearest), side), axis=1)
    random = np.random.default_rng(0)
    with write_atomically(path) as scratch, h5py.File(scratch, "w") as file:
        features = file.create_dataset("features", (patches, width), np.float32)
        for start in range(0, patches, 4096):
            stop = min(start + 4096, patches)
            features[start:stop] = random.normal(size=(stop - start, width))
        file.create_dataset("coords", data=places[:, ::-1] * 512).attrs["patch_size_level0"] = 512


def step(name: str, path: Path, repeats: int) -> dict[str, Any]:
    """Seconds, seconds of the processor and peak memory of a training step of a model on a slide in a file."""
    import h5py

    with h5py.File(path) as file:
        width = file["features"].shape[1]
        bag = None if name.startswith("FIT") else torch.from_numpy(file["features"][:])[None]
    torch.manual_seed(0)
    network, image = STEPS[name](width), open_image(path)
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    if name == "FIT, features in memory":
        image = network.encoder.grouped(image)
        image.read_ahead()
    times = []
    for _ in range(repeats):
        start, busy = time.perf_counter(), time.process_time()
        logit = network([image] if bag is None else bag)
        F.binary_cross_entropy_with_logits(logit, torch.ones(1)).backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append((time.perf_counter() - start, time.process_time() - busy))
    seconds, busy = min(times[1:] or times)
    return {
        "name": name,
        "seconds": seconds,
        "busy": busy,
        "peak": peak_bytes(torch.device("cpu")),
        "parameters": count_parameters(network),
    }


# Tasks ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """What a model may learn from: steps of so many slides, out of so many for training; slides to choose the learning
    rate by; held-out ones, which the results are of."""

    steps: int = 400
    batch: int = 8
    train: int = 1000
    choose: int = 200
    test: int = 500


Parts = dict[str, tuple[np.ndarray, np.ndarray, Tensor]]


def parts(task: str, seed: int, budget: Budget) -> Parts:
    """Pictures, where they have patches, and classes of each part, for a seed."""
    found = {}
    for k, part in enumerate(("train", "choose", "test")):
        made = slide_tasks.draw(task, getattr(budget, part), seed, k)
        found[part] = (*made.pictures(), torch.from_numpy(made.labels).float())
    return found


def auc(network: nn.Module, model: Model, part: tuple[np.ndarray, np.ndarray, Tensor]) -> float:
    """Area under the curve of a part of the slides."""
    pictures, there, labels = part
    network.eval()
    with torch.inference_mode():
        logits = [
            network(model.given(*each))
            for each in zip(np.array_split(pictures, 10), np.array_split(there, 10), strict=True)
        ]
    network.train()
    return float(binary_auroc(torch.cat(logits), labels.int()))


def train(model: Model, data: Parts, rate: float, seed: int, budget: Budget) -> dict[str, Any]:
    """Train a model and measure it; the learning rate rises for a tenth of the steps, then falls to 0."""
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    pictures, there, labels = data["train"]
    network = model.make(pictures.shape[-1]).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, budget.steps + 1, pct_start=0.1, anneal_strategy="linear", cycle_momentum=False
    )
    start, losses = time.process_time(), []
    for _ in range(budget.steps):
        chosen, symmetry = random.integers(len(labels), size=budget.batch), drawn("dihedral", random)
        turned = (np.stack([symmetry.turn(each) for each in array[chosen]]) for array in (pictures, there))
        loss = F.binary_cross_entropy_with_logits(network(model.given(*turned)), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return {
        "busy": time.process_time() - start,
        "loss": statistics.mean(losses[-len(losses) // 10 :]),
        **{part: auc(network, model, data[part]) for part in ("choose", "test")},
        "parameters": count_parameters(network),
    }


# Results --------------------------------------------------------------------------------------------------------------


class Results:
    """Results in a folder, a file in JSON each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def file(self, *name: object) -> Path:
        return self.folder / f"{' '.join(map(str, name))}.json"

    def get(self, *name: object) -> dict[str, Any] | None:
        file = self.file(*name)
        return json.loads(file.read_text()) if file.exists() else None

    def of(self, name: tuple[object, ...], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A result, made if it is not there."""
        if (known := self.get(*name)) is not None:
            return known
        made = make()
        with write_atomically(self.file(*name)) as scratch:
            scratch.write_text(json.dumps(made, indent=2))
        print(" ".join(map(str, name)), json.dumps(made), file=sys.stderr, flush=True)
        return made

    def best_rate(self, task: str, model: str) -> float | None:
        """The learning rate whose model of the first seed did best on the slides that are held out for the choice."""
        found = [(each["choose"], rate) for rate in RATES if (each := self.get(task, model, rate, 0))]
        return max(found)[1] if len(found) == len(RATES) else None


def measure_steps(results: Results, arguments: argparse.Namespace) -> None:
    """The step of each model, in a process of its own."""
    path = results.folder / f"{arguments.patches}-{arguments.width}.h5"
    for name in STEPS:
        words = [sys.executable, __file__, "--output", str(results.folder), "--step", name, "--slide", str(path)]
        words += ["--threads", str(arguments.threads), "--repeats", str(arguments.repeats)]

        results.of(("step", arguments.patches, arguments.width, name), partial(_step, words, path, arguments))
    path.unlink(missing_ok=True)


def _step(words: list[str], path: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    if not path.exists():
        write_slide(path, arguments.patches, arguments.width)
    return json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout)


def learn(results: Results, tasks: list[str], models: list[str], seeds: int, budget: Budget) -> None:
    """Train what is not yet trained, one seed after the other."""
    for seed, task in product(range(seeds), tasks):
        # Drawn once, and only if something is to be trained.
        data = cache(partial(parts, task, seed, budget))
        for name in models:
            for rate in RATES if seed == 0 else (results.best_rate(task, name),):
                one = partial(_train, MODELS[name], data, rate, seed, budget)
                results.of((task, name, rate, seed), one)


def _train(model: Model, data: Callable[[], Parts], *arguments: Any) -> dict[str, Any]:
    return train(model, data(), *arguments)


def step_table(results: Results, arguments: argparse.Namespace) -> Iterator[str]:
    """The lines of the table of the training step."""
    size = f"{arguments.patches:,} patches of {arguments.width:,} numbers"
    yield f"One training step on {size}, {arguments.threads} threads:\n"
    yield "| model | parameters | seconds | seconds of the processors | peak memory, GB |"
    yield "|---|---|---|---|---|"
    for name in STEPS:
        if (found := results.get("step", arguments.patches, arguments.width, name)) is not None:
            yield (
                f"| {name} | {found['parameters']:,} | {found['seconds']:.2f} | {found['busy']:.2f} | "
                f"{found['peak'] / 1e9:.2f} |"
            )


def page(results: Results, arguments: argparse.Namespace, budget: Budget) -> Iterator[str]:
    """The lines of a page of all that is there."""
    yield f"{processor_name()}, torch {torch.__version__}\n"
    if arguments.patches:
        yield from step_table(results, arguments)
    yield f"\nAUC on {budget.test} held-out slides after {budget.steps} steps of {budget.batch} slides:\n"
    yield "| task | model | seeds | AUC, mean | least | greatest | learning rate | seconds of the processor |"
    yield "|---|---|---|---|---|---|---|---|"
    for task in slide_tasks.TASKS:
        for model in MODELS:
            rate = results.best_rate(task, model)
            found = [each for seed in range(arguments.seeds) if rate and (each := results.get(task, model, rate, seed))]
            if found:
                values = [each["test"] for each in found]
                busy = statistics.median(each["busy"] for each in found)
                yield (
                    f"| {task} | {model} | {len(found)} | {statistics.mean(values):.3f} | {min(values):.3f} | "
                    f"{max(values):.3f} | {rate:g} | {busy:.0f} |"
                )


def main() -> None:
    """Measure what is not there, and print the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of results")
    parser.add_argument("--page", action="store_true", help="print what there is, and measure nothing")
    parser.add_argument("--tasks", default=",".join(slide_tasks.TASKS), help="some of them; none for the step alone")
    parser.add_argument("--models", default="", help="some of them, separated by semicolons; all by default")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=Budget.steps)
    parser.add_argument(
        "--slides", default=f"{Budget.train},{Budget.choose},{Budget.test}", help="to train, choose, test"
    )
    parser.add_argument("--patches", type=int, default=100_000, help="of the training step's slide; 0 for no step")
    parser.add_argument("--width", type=int, default=1024, help="numbers of each of them")
    parser.add_argument("--threads", type=int, default=1, help="of the training step; tasks run on torch's number")
    parser.add_argument("--repeats", type=int, default=5, help="of the step; the fastest but the first counts")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--slide", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        torch.set_num_threads(arguments.threads)
        print(json.dumps(step(arguments.step, arguments.slide, arguments.repeats)))
        return
    counts = dict(zip(("train", "choose", "test"), map(int, arguments.slides.split(",")), strict=True))
    budget, results = Budget(steps=arguments.steps, **counts), Results(arguments.output)
    tasks = [each for each in arguments.tasks.split(",") if each]
    if not arguments.page:
        if arguments.patches:
            measure_steps(results, arguments)
        learn(
            results, tasks, arguments.models.split(";") if arguments.models else list(MODELS), arguments.seeds, budget
        )
    print("\n".join(page(results, arguments, budget)))


if __name__ == "__main__":
    main()
