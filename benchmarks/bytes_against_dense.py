"""Python sources and documentation byte by byte: held-out bits per byte of FIT and of a dense transformer at equal
training compute.

    python benchmarks/bytes_against_dense.py --budget 600s --threads 2 --output FOLDER
    python benchmarks/bytes_against_dense.py --budget 3e15 --contexts 512,1024 --dense-lrs 1e-3,2e-3 --output FOLDER
    for part in 1/3 2/3 3/3; do python benchmarks/bytes_against_dense.py --part $part ... & done; wait     # beside
    python benchmarks/bytes_against_dense.py ...       # each other, then the other seeds of the best and the table

The data are those that come with the running Python; whole files and topics are held out. Compute is FLOPs of forward
and backward passes. A budget in seconds is what the first FIT gets; all others get the FLOPs that it spent. FIT reads
contexts of `--length`; of the dense transformers of every context length and learning rate the best on the held-out
bytes is taken, and trained with the other seeds, and so is FIT of its learning rates. All are measured in windows that
overlap by half, so that nearly every byte has at least half a context before it."""

import argparse
import math
import statistics
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from budgeted_training import Budget, Result
from next_token import TokenRun, by_place, dense_decoder, fit_of, settings_of, windows
from race import Entry, Race, add_options, numbers, part_of
from torch import Tensor

from fitformer.data.datasets.text import ByteBuffer, python_docs, python_sources, split_pieces

BYTE_VALUES = 256
# Of the held-out bytes, those that a curve is measured on.
FEW = 2**16
# The share of the bytes that is held out.
HELD_OUT = 0.1


def read(share: float) -> tuple[Tensor, Tensor]:
    """Bytes of the training part and of the held-out part."""
    parts = split_pieces([*python_sources(), *python_docs()], share, seed=0)
    buffers = [ByteBuffer(pieces) for pieces in parts]
    return tuple(torch.from_numpy(np.array(buffer.window(0, len(buffer)))) for buffer in buffers)


def measure(run: TokenRun, held: Tensor) -> Result:
    """Bits per byte of the held-out bytes, and where in its group a byte costs how much."""
    each = run.held_out(held, overlap=0.5, batch=4) / math.log(2)
    return {"value": float(each.mean()), "bytes": len(each), "by_place": by_place(each, run.tokens_per_group)}


def mean_of(found: Sequence[Result]) -> str:
    """Mean and, of several, their spread."""
    values = [each["value"] for each in found]
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=Budget.of, default=Budget(seconds=600), help="600s, 8h or 1e14 (FLOPs)")
    parser.add_argument("--length", type=int, default=8192, help="context of FIT")
    parser.add_argument("--contexts", type=numbers(int), default=[512, 1024, 2048], help="of the dense transformer")
    parser.add_argument("--lrs", type=numbers(float), default=[3e-3], help="learning rates of FIT")
    parser.add_argument("--dense-lrs", type=numbers(float), default=[3e-3], help="of the dense transformer")
    parser.add_argument("--short", type=int, default=0, help="context of the first part of a training, of both kinds")
    parser.add_argument("--short-share", type=float, default=0.0, help="that part, as a share of the budget")
    parser.add_argument("--tokens-per-step", type=int, default=16384)
    parser.add_argument("--tokens-per-group", type=int, default=256)
    parser.add_argument("--hold-out", type=float, default=HELD_OUT, help="share of the bytes")
    parser.add_argument("--part", type=part_of, help="K/N: train the K-th of N shares of the first trainings only")
    parser.add_argument("--most-held-out", type=int, help="measure on the first so many held-out bytes")
    sizes = {"layers": "(1)1(1)1(3)", "dim": 192, "latent_dim": 192, "heads": 6, "latent_heads": 6}
    add_options(parser, **sizes, latents_per_group=16)
    arguments = parser.parse_args()
    if arguments.part and arguments.budget.flops is None:
        parser.error("--part takes a --budget in FLOPs: what a training spends must not hang on the others")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    kept, held = read(arguments.hold_out)
    held = held[: arguments.most_held_out]
    print(f"{len(kept):,} bytes to train on, {len(held):,} held out", flush=True)
    fit = fit_of(arguments, BYTE_VALUES)

    def entry(lr: float, context: int | None, seed: int) -> Entry:
        length = context or arguments.length
        batch = max(1, arguments.tokens_per_step // length)
        short = {"short": arguments.short, "short_share": arguments.short_share}
        settings = settings_of(arguments, lr, length, batch, seed, **short)
        # A dense transformer knows no groups, but windows begin at their starts: two of them overlap by half.
        n = arguments.tokens_per_group if context is None else min(context // 2, arguments.tokens_per_group)
        name = f"FIT, context {length}, rate {lr:g}" if context is None else f"dense, context {length}, rate {lr:g}"
        make = fit if context is None else (lambda: dense_decoder(fit))
        return Entry(name, make, settings, partial(TokenRun, tokens_per_group=n))

    race = Race(
        arguments.budget,
        batch=lambda settings, step: windows(kept, settings, step),
        evaluate=lambda run: float(run.held_out(held[:FEW], 0.5, batch=4).mean()) / math.log(2),
        measure=lambda run: measure(run, held),
        folder=arguments.output,
        points=arguments.points,
    )
    kinds = [
        [entry(lr, None, 0) for lr in arguments.lrs],
        [entry(lr, context, 0) for context in arguments.contexts for lr in arguments.dense_lrs],
    ]
    if arguments.part:
        number, count = arguments.part
        for each in [*kinds[0], *kinds[1]][number - 1 :: count]:
            race.enter(each)
        return
    best = [race.best(entries) for entries in kinds]
    found = []
    for each in best:
        context = None if each.name.startswith("FIT") else each.settings.length
        entries = [entry(each.settings.lr, context, seed) for seed in range(arguments.seeds)]
        found.append([race.enter(one) for one in entries])
    print("| network | parameters | steps | seconds | FLOPs | bits per byte |\n|---|---|---|---|---|---|")
    for each in race.results:
        print(f"| {each['name']} | {each['parameters']:,} | {each['steps']} | {each['seconds']:.0f} ", end="")
        print(f"| {each['flops']:.3g} | {each['value']:.4f} |")
    fits, denses = ([each["value"] for each in some] for some in found)
    ratio = statistics.mean(fits) / statistics.mean(denses)
    print(f"\nFIT {mean_of(found[0])}, the best dense {mean_of(found[1])}: {ratio:.4f} of its bits per byte")


if __name__ == "__main__":
    main()
