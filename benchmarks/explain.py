"""Explaining a decision: the time of the three methods in forward passes, and how far two of them agree with the third.

    python benchmarks/explain.py [--groups 400] [--sample 2] > benchmarks/results/explain-<machine>-<date>.md

Time: untrained models on an image of square groups of 64 x 64 pixels. `leave-out` is measured whole where that takes
minutes at most, elsewhere on a sample of groups; the unit is passes before and after it, or in between. Agreement:
models trained here in a minute each, on images that they have not seen.
"""

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from datetime import date
from io import StringIO
from pathlib import Path

import numpy as np
import torch

from fitformer import FITImageEncoder
from fitformer.cli import main as fitformer
from fitformer.config.load import load
from fitformer.data import build_dataset
from fitformer.execution import Streamed
from fitformer.inference.explain import attribute, leave_out
from fitformer.inference.explain.agreement import TOP_GROUPS, group_values, rank_correlation
from fitformer.inference.explain.attribution import attend
from fitformer.inference.explain.leave_out import after_first_phase
from fitformer.models.config import PRESETS, SIZES
from fitformer.patching.any_size import PixelArray
from fitformer.profiling.flops import parts
from fitformer.tasks.answers import log_odds

GOAL = 30
RED_BLUE = (210, 40, 40), (40, 40, 210)
ONE_BLOCK = {"dim": 48, "latent_dim": 96, "heads": 4, "latent_heads": 4, "latents_per_group": 2}
MODELS = {
    "recipe megapixel-mnist": {"layers": "(3)1", **ONE_BLOCK},
    "the same, more local layers": {"layers": "(6)1", **ONE_BLOCK},
    "the same, no global layers": {"layers": "(3)", **ONE_BLOCK},
    **{name: {each: getattr(trunk, each) for each in SIZES} for name, trunk in PRESETS.items()},
}
WHOLE = ("recipe megapixel-mnist", "the same, more local layers", "the same, no global layers", "tiny")
ALL_METHODS = ("recipe megapixel-mnist", "the same, more local layers", "tiny", "small")
COUNTED = ("large",)


def seconds(work: Callable[[], object]) -> float:
    """Of one run."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def model_of(options: dict[str, object]) -> FITImageEncoder:
    """An untrained classifier of images of any size."""
    torch.manual_seed(0)
    model = FITImageEncoder.from_config(
        image_size=None, group_size=64, patch_size=8, channels=3, num_classes=2, latent_position="row_column", **options
    )
    model.set_execution(Streamed())
    return model.eval()


def by_flops(model: FITImageEncoder, groups: int) -> tuple[float, float]:
    """Of a pass the share that every left-out group repeats, and the passes of a whole map, by FLOPs."""
    counted = {part.name: float(part.flops.total) for part in parts(model, num_groups=groups)}
    once = sum(flops for name, flops in counted.items() if not name.startswith("block"))
    once += sum(flops for name, flops in counted.items() if name.startswith("block 1 ") and "global" not in name)
    later = 1 - once / sum(counted.values())
    return later, 1 - later + later * (1 + (groups - 1))


def cost(name: str, groups: int, sample: int) -> str:
    """A row: one model's times in passes."""
    model, side = model_of(MODELS[name]), round(groups**0.5)
    layers, (later, counted) = MODELS[name]["layers"], by_flops(model, groups)
    if name in COUNTED:
        return f"| {name} | {layers} | | {later:.2f} | {counted:.0f} | | | |"
    image = PixelArray(np.random.default_rng(0).integers(0, 256, (64 * side, 64 * side, 3), dtype=np.uint8))
    grouped = model.grouped(image)

    @torch.no_grad()
    def one_pass() -> object:
        return model([grouped])

    one_pass()
    if name in WHOLE:
        units = [seconds(one_pass) for _ in range(5)]
        whole, how = seconds(lambda: leave_out(model, grouped)), ""
        units += [seconds(one_pass) for _ in range(5)]
    else:
        units, each, begun = [], [], time.perf_counter()
        with after_first_phase(model, grouped) as rest:
            first = time.perf_counter() - begun
            logits = rest.logits([None])[0]
            for k in range(sample):
                units.append(seconds(one_pass))
                each.append(seconds(lambda k=k: rest.added(logits, [k])))
        whole, how = first + statistics.mean(each) * (groups + 1), f", from {sample} groups"
    unit = statistics.mean(units)
    measured = (attribute, attend) if name in ALL_METHODS else ()
    others = [f"{seconds(lambda method=method: method(model, grouped)) / unit:.1f}" for method in measured]
    return (
        f"| {name} | {layers} | {unit:.2f} ({min(units):.2f} to {max(units):.2f}) | {later:.2f} | {counted:.0f} | "
        f"**{whole / unit:.0f}**{how} | {' | '.join(others or ['', ''])} |"
    )


@dataclass
class Case:
    """A trained model, images that it has not seen, and what a red and a blue blob say of class 1, if drawn."""

    name: str
    model: FITImageEncoder
    images: list[PixelArray]
    says: tuple[int, int] | None = None

    def signs(self, image: PixelArray, label: int) -> torch.Tensor:
        """Whether each group supports a label, opposes it, or neither: 1, -1, 0."""
        if self.says is None:
            return torch.zeros(0)
        signs = np.zeros(image.shape[:2])
        for colour, said in zip(RED_BLUE, self.says, strict=True):
            signs[(image.pixels == colour).all(-1)] = said if label else -said
        grid = signs.reshape(signs.shape[0] // 16, 16, -1, 16)
        return torch.from_numpy(grid.max((1, 3)) + grid.min((1, 3))).flatten()


def blobs(random: np.random.Generator, red: int, blue: int, side: int = 64) -> PixelArray:
    """Noise with red and blue blobs, each in a group of 16 x 16 pixels of its own."""
    pixels = random.integers(90, 160, (side, side, 3), dtype=np.uint8)
    for k, cell in enumerate(random.permutation((side // 16) ** 2)[: red + blue]):
        top, left = (16 * int(place) + 4 for place in divmod(cell, side // 16))
        pixels[top : top + 8, left : left + 8] = RED_BLUE[k >= red]
    return PixelArray(pixels)


def any_red(random: np.random.Generator, label: int) -> PixelArray:
    """Class 1: one to three of six blobs are red."""
    red = label * int(random.integers(1, 4))
    return blobs(random, red, 6 - red)


def more_red(random: np.random.Generator, label: int) -> PixelArray:
    """Class 1: of nine blobs more are red."""
    few = int(random.integers(2, 5))
    return blobs(random, 9 - few if label else few, few if label else 9 - few)


Draw = Callable[[np.random.Generator, int], PixelArray]


def trained(draw: Draw, layers: str, steps: int) -> tuple[FITImageEncoder, list[PixelArray]]:
    """A small model of two classes of drawn images."""
    random = np.random.default_rng(2)
    torch.manual_seed(2)
    model = FITImageEncoder.from_config(
        layers=layers, dim=16, latent_dim=16, heads=2, latent_heads=2, latents_per_group=2, image_size=None,
        group_size=16, patch_size=4, channels=3, num_classes=2, latent_position="row_column",
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    labels = torch.arange(16) % 2
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(model([draw(random, label) for label in labels.tolist()]), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), [draw(np.random.default_rng(1000 + k), k % 2) for k in range(20)]


def digits(folder: Path) -> tuple[FITImageEncoder, list[PixelArray]]:
    """The recipe digits-classify with 16 groups and 200 steps, and held-out digits."""
    options = ["model.group_size=8", "trainer.steps=200"]
    words = ["train", "digits-classify", "--run-dir", str(folder / "run"), *(f"--{each}" for each in options)]
    with redirect_stdout(StringIO()):
        assert fitformer(words) == 0
    held_out = build_dataset(load("digits-classify", options).data, "test", seed=0)
    images = [PixelArray(held_out[k]["image"].numpy()) for k in range(20)]
    return FITImageEncoder.from_pretrained(str(folder / "run" / "model")).eval(), images


def cases(folder: Path) -> Iterator[Case]:
    """Models, one after the other."""
    yield Case("any red blob decides, `(1)1(1)1`", *trained(any_red, "(1)1(1)1", 150), (1, 0))
    yield Case("more red than blue, `(1)1(1)1`", *trained(more_red, "(1)1(1)1", 300), (1, -1))
    yield Case("more red than blue, `(1)1(1)`", *trained(more_red, "(1)1(1)", 300), (1, -1))
    yield Case("more red than blue, `(2)2`", *trained(more_red, "(2)2", 300), (1, -1))
    yield Case("digits, `(1)2(1)2`, of one size", *digits(folder))


def agreement(case: Case) -> Iterator[str]:
    """Rows: a model's maps against leave-out and against what was drawn, means over images."""
    found: dict[str, list[Row]] = {"leave-out": [], "relevance": [], "attention": []}
    odds, most = [], []
    for image in case.images:
        truth, seen = leave_out(case.model, image), attribute(case.model, image)
        label = int(truth.logits.argmax())
        odds.append(float(log_odds(truth.logits, label)))
        most.append(float(truth.added.abs().max()))
        signs = case.signs(image, label)
        found["leave-out"].append((None, None, None, _right(truth.added, signs)))
        relevance = group_values(seen.relevance, truth.image, signed=True)
        found["relevance"].append((*_compare(relevance, truth.added, signed=True), _right(relevance, signs)))
        attention = group_values(seen.attention, truth.image, signed=False)
        found["attention"].append((*_compare(attention, truth.added, signed=False), None))
    for name, rows in found.items():
        means = " | ".join(_mean([row[k] for row in rows]) for k in range(4))
        yield f"| {case.name} | {statistics.mean(odds):.1f} | {statistics.mean(most):.2f} | {name} | {means} |"


Row = tuple[float | None, float | None, float | None, float | None]


def _right(values: torch.Tensor, signs: torch.Tensor) -> float | None:
    """Share of the groups with a drawn sign in which a map has it."""
    drawn = signs.nonzero().flatten()
    return float((values[drawn].sign() == signs[drawn]).float().mean()) if len(drawn) else None


def _compare(
    claimed: torch.Tensor, added: torch.Tensor, *, signed: bool
) -> tuple[float | None, float | None, float | None]:
    """Of group values: rank correlation with what leaving out adds, on all groups and on the top; equal signs there."""
    truth = added if signed else added.abs()
    top = claimed.abs().topk(min(TOP_GROUPS, len(claimed))).indices
    same = float((claimed[top].sign() == added[top].sign()).float().mean()) if signed else None
    return rank_correlation(claimed, truth), rank_correlation(claimed[top], truth[top]), same


def _mean(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.mean(known):.2f}" if known else ""


def main() -> None:
    """Measure and print a Markdown page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", type=int, default=400, help="of the image, a square number")
    parser.add_argument("--sample", type=int, default=2, help="groups left out where a whole map takes long")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(
        f"# Explaining a decision, {date.today()}\n\n"
        f"    python benchmarks/explain.py --groups {arguments.groups} --sample {arguments.sample} "
        f"--threads {arguments.threads}\n\n"
        f"{platform.machine()}, {arguments.threads} threads, torch {torch.__version__}, float32.\n\n"
        f"## Time of a map of {arguments.groups} groups, in forward passes\n\n"
        f"{arguments.groups} groups of 64 patches, streamed in memory. A pass in seconds: mean (range).\n"
        f"Left out in a whole pass each, a map takes {arguments.groups + 1} passes; the goal is {GOAL}. Repeated:\n"
        "the share of a pass's FLOPs behind the first group phase, which every left-out group runs again.\n\n"
        "| model | layers | a pass, s | repeated | leave-out by FLOPs | leave-out | gradient | attention |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    for name in MODELS:
        print(cost(name, arguments.groups, arguments.sample), flush=True)
    print(
        "\n## Agreement with leave-out\n\n"
        "Means over 20 images. Largest: log-odds that the group adds which adds or takes most. Rank correlation\n"
        f"over all groups and over the {TOP_GROUPS} where the map is largest, on which also the share of equal signs.\n"
        "Right sign: share of the drawn blobs that have in the map the sign which the task gives them. Attention has\n"
        "no sign and is compared with the size of what is added.\n\n"
        "| model | log-odds | largest | map | all groups | top groups | same sign | right sign |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(Path(folder)):
            for row in agreement(case):
                print(row, flush=True)


if __name__ == "__main__":
    main()
