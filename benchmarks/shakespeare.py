"""Tiny Shakespeare by characters: what a FIT decoder learns in a few minutes, and a dense transformer beside it.

    python benchmarks/shakespeare.py --data input.txt --threads 2 [--dense] [--output FOLDER]

The usual split, first 90% and last 10%, and the usual unit, nats a character. The loss is that of the whole validation
part: in windows side by side, as it is usually given, and in windows that overlap by half. The clock runs while the
network is trained, and stands still while it is measured. The dense transformer gets the FLOPs that FIT spent."""

import argparse
from functools import partial
from pathlib import Path

import torch
from budgeted_training import Budget, Result
from next_token import TokenRun, by_place, dense_decoder, fit_of, settings_of, windows
from race import Entry, Race, add_options
from torch import Tensor

# Characters of the validation part that a curve is measured on.
FEW = 2**15


def read(path: Path) -> tuple[Tensor, Tensor, int]:
    """Characters of the training and of the validation part, as numbers, and how many different ones there are."""
    text = path.read_text()
    numbers = {letter: number for number, letter in enumerate(sorted(set(text)))}
    tokens = torch.tensor([numbers[letter] for letter in text], dtype=torch.uint8)
    cut = int(0.9 * len(tokens))
    return tokens[:cut], tokens[cut:], len(numbers)


def measure(run: TokenRun, held: Tensor) -> Result:
    """The loss on all of the validation part."""
    beside, overlapping = run.held_out(held), run.held_out(held, 0.5)
    return {
        "value": float(beside.mean()),
        "overlapping": float(overlapping.mean()),
        "characters": len(beside),
        "by_place": by_place(overlapping, run.tokens_per_group),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the text")
    parser.add_argument("--budget", type=Budget.of, default=Budget(seconds=180), help="180s or 1e13 (FLOPs)")
    parser.add_argument("--dense", action="store_true", help="a dense transformer beside it")
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--dense-lr", type=float, default=6e-3)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens-per-group", type=int, default=64)
    parser.add_argument("--average", type=float, default=0.0, help="decay of an average of the weights, 0 for none")
    sizes = {"layers": "(1)1(3)", "dim": 128, "latent_dim": 128, "heads": 4, "latent_heads": 4}
    add_options(parser, **sizes, latents_per_group=8, drop_path=0.0, drop_units=0.0, drop_att=0.0)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    kept, held, vocabulary = read(arguments.data)
    fit = fit_of(arguments, vocabulary)

    def entry(name: str, seed: int) -> Entry:
        lr, make = (arguments.lr, fit) if name == "FIT" else (arguments.dense_lr, lambda: dense_decoder(fit))
        settings = settings_of(arguments, lr, arguments.length, arguments.batch, seed, average=arguments.average)
        return Entry(name, make, settings, partial(TokenRun, tokens_per_group=arguments.tokens_per_group))

    race = Race(
        arguments.budget,
        batch=lambda settings, step: windows(kept, settings, step),
        evaluate=lambda run: float(run.held_out(held[:FEW]).mean()),
        measure=lambda run: measure(run, held),
        folder=arguments.output,
        points=arguments.points,
    )
    names = ["FIT", *(["dense"] if arguments.dense else [])]
    print("| network | parameters | seconds | FLOPs | nats | with overlap |\n|---|---|---|---|---|---|")
    found = [race.enter(entry(name, seed)) for seed in range(arguments.seeds) for name in names]
    for each in found:
        print(f"| {each['name']} | {each['parameters']:,} | {each['seconds']:.0f} | {each['flops']:.3g} ", end="")
        print(f"| {each['value']:.4f} | {each['overlapping']:.4f} |")


if __name__ == "__main__":
    main()
