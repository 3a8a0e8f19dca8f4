"""Predicted and measured peak memory of a training step, over a grid of configurations.

    OMP_NUM_THREADS=1 python benchmarks/peaks.py [--only 800] > benchmarks/results/peaks-MACHINE-DATE.md

Each configuration runs in a process of its own, `fitformer bench step ... --json`. Prints a Markdown table; the exit
status is 1 if a prediction is more than 15% from the measured peak.
"""

import argparse
import platform
import shlex
import sys

import torch

from fitformer.profiling.scaling import in_process

BOUND = 0.15
GRID = [
    "--preset tiny --image-size 800 --execution plain",
    "--preset tiny --image-size 1600 --execution streamed",
    "--preset tiny --image-size 3200 --execution plain",
    "--preset small --image-size 800 --execution plain",
    "--preset small --image-size 800 --execution plain --batch-size 2",
    "--preset small --image-size 800 --execution plain --precision bf16",
    "--preset small --image-size 800 --execution checkpointed",
    "--preset small --image-size 800 --execution streamed --recompute full",
    "--preset small --image-size 800 --execution plain --role denoiser",
    "--preset small --image-size 1600 --execution plain",
    "--preset small --image-size 1600 --execution checkpointed --batch-size 2",
    "--preset small --image-size 1600 --execution streamed --keep memory --recompute light",
    "--preset small --image-size 1600 --execution streamed --keep disk --recompute full --batch-size 2",
    "--preset small --image-size 1600 --execution streamed --keep disk --recompute full --precision bf16",
    "--preset small --image-size 1600 --execution checkpointed --precision bf16",
    "--preset small --image-size 3200 --execution checkpointed",
    "--preset small --image-size 3200 --execution streamed --keep memory --recompute selective",
    "--preset small --image-size 3200 --execution streamed --keep disk --recompute full",
    "--preset tiny --image-size 1600 --execution streamed --keep disk --role segmenter",
    "--preset small --image-size 1600 --execution plain --role segmenter --group-size 400",
    "--preset small --image-size 1600 --execution streamed --keep disk --role segmenter --group-size 400",
    "--preset small --image-size 64 --role decoder --execution plain",
    "--preset small --image-size 64 --role decoder --execution streamed",
]


def row(options: str) -> tuple[str, float]:
    """A line of the table, and predicted over measured."""
    found = in_process(shlex.split(options))
    ratio = found["predicted_bytes"] / found["peak_bytes"]
    predicted, measured = (f"{found[key] / 1e9:.3f}" for key in ("predicted_bytes", "peak_bytes"))
    return f"| `{options}` | {found['group_size']} | {predicted} | {measured} | {ratio:.2f} |", ratio


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="run the configurations that contain this text")
    arguments = parser.parse_args()
    print("# Predicted and measured peak memory of a training step\n")
    print(f"`OMP_NUM_THREADS={torch.get_num_threads()} python benchmarks/peaks.py`\n")
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    print(f"{platform.system()} {platform.machine()}, {versions}, CPU\n")
    print("| options of `fitformer bench step` | group, pixels | predicted, GB | measured, GB | ratio |")
    print("|---|---|---|---|---|")
    ratios = []
    for options in GRID:
        if arguments.only in options:
            line, ratio = row(options)
            ratios.append(ratio)
            print(line, flush=True)
    worst = max(abs(ratio - 1) for ratio in ratios)
    print(f"\nLargest deviation {worst:.0%}; the bound is {BOUND:.0%}.")
    return int(worst > BOUND)


if __name__ == "__main__":
    sys.exit(main())
