"""Fashion-MNIST pixel by pixel: held-out bits per dimension of FIT and of a dense transformer at equal compute.

    python benchmarks/fashion_pixels.py --data FOLDER --budget 600s --threads 2 [--output FOLDER]

Both read the 784 values of an image in the same order, row by row, each a token of 256 values; FIT's groups are whole
rows. The loss is that of the 10,000 images of the test part."""

import argparse
import math
from functools import partial
from pathlib import Path

import torch
from budgeted_training import Budget
from next_token import TokenRun, dense_decoder, fit_of, rows, settings_of
from race import Entry, Race, add_options
from torch import Tensor

from fitformer.data.datasets.arrays import read_idx

PIXELS, VALUES = 28 * 28, 256
# Images that a curve is measured on.
FEW = 200


def read(path: Path) -> tuple[Tensor, Tensor]:
    """Values `(images, 784)` of the training and of the test part."""
    parts = read_idx(str(path), (), 1)
    return tuple(torch.tensor(parts[name].images).reshape(-1, PIXELS) for name in ("train", "test"))


def bits(run: TokenRun, images: Tensor) -> float:
    """Bits per dimension of images."""
    return float(run.held_out(images).mean()) / math.log(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the four idx files")
    parser.add_argument("--budget", type=Budget.of, default=Budget(seconds=600), help="600s, 8h or 1e14 (FLOPs)")
    parser.add_argument("--test-images", type=int, default=10_000, help="images of the test part that are measured")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--dense-lr", type=float, default=3e-3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rows", type=int, default=4, help="rows of a group")
    sizes = {"layers": "(1)1(3)", "dim": 128, "latent_dim": 128, "heads": 4, "latent_heads": 4}
    add_options(parser, **sizes, latents_per_group=8)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    arguments.tokens_per_group = 28 * arguments.rows
    kept, held = read(arguments.data)
    held = held[: arguments.test_images]
    fit = fit_of(arguments, VALUES)

    def entry(name: str, seed: int) -> Entry:
        lr, make = (arguments.lr, fit) if name == "FIT" else (arguments.dense_lr, lambda: dense_decoder(fit))
        settings = settings_of(arguments, lr, PIXELS, arguments.batch, seed)
        return Entry(name, make, settings, partial(TokenRun, tokens_per_group=arguments.tokens_per_group))

    race = Race(
        arguments.budget,
        batch=lambda settings, step: rows(kept, settings, step),
        evaluate=lambda run: bits(run, held[:FEW]),
        measure=lambda run: {"value": bits(run, held), "images": len(held)},
        folder=arguments.output,
        points=arguments.points,
    )
    found = [race.enter(entry(name, seed)) for seed in range(arguments.seeds) for name in ("FIT", "dense")]
    print("| network | parameters | seconds | FLOPs | bits per dimension |\n|---|---|---|---|---|")
    for each in found:
        print(f"| {each['name']} | {each['parameters']:,} | {each['seconds']:.0f} | {each['flops']:.3g} ", end="")
        print(f"| {each['value']:.4f} |")


if __name__ == "__main__":
    main()
