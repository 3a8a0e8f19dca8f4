"""Streamed against plain execution of a training step: time and peak memory, by what is computed again.

    python benchmarks/streaming.py [--sizes 1600,3200] [--repeats 3] [OPTIONS of `fitformer bench step`]

Each way runs in a fresh process, in turn, so that what else the machine does meets all of them alike. Prints a
Markdown table of medians over all steps of all processes, and of each round's own ratios.
"""

import argparse
import platform
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

from fitformer.profiling.scaling import in_process

WAYS = {
    "plain": ["--execution", "plain"],
    **{
        f"streamed, {recompute}": ["--execution", "streamed", "--recompute", recompute]
        for recompute in ("full", "local", "selective", "light")
    },
}


def rounds(size: int, repeats: int, options: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """What each way took in each round."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in WAYS}
    for _ in range(repeats):
        for name, way in WAYS.items():
            found[name].append(in_process(["--image-size", str(size), *way, *options]))
    return found


def rows(size: int, found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Lines of the table for one size."""
    lines = []
    for name, results in found.items():
        pairs = zip(results, found["plain"], strict=True)
        ratios = ", ".join(f"{each['seconds'] / plain['seconds']:.2f}" for each, plain in pairs)
        seconds = median(second for each in results for second in each["all_seconds"])
        plain = median(second for each in found["plain"] for second in each["all_seconds"])
        busy = median(each["cpu_seconds"] for each in results) / median(each["cpu_seconds"] for each in found["plain"])
        peak = max(each["peak_bytes"] for each in results) / 1e9
        predicted = results[0]["predicted_bytes"] / 1e9
        lines.append(
            f"| {size} x {size} | {name} | {seconds:.2f} | {seconds / plain:.2f} | {ratios} | {busy:.2f} "
            f"| {peak:.2f} | {predicted:.2f} |"
        )
    return lines


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="1600,3200", help="sides of the images in pixels")
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    arguments, options = parser.parse_known_args()
    options = options or ["--preset", "small", "--warmup", "1", "--steps", "3"]
    print(f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads, {' '.join(options)}\n")
    print("| size | way | seconds | ratio | ratio in each round | ratio of processor time | peak, GB | predicted, GB |")
    print("|---|---|---|---|---|---|---|---|")
    for size in map(int, arguments.sizes.split(",")):
        print("\n".join(rows(size, rounds(size, arguments.repeats, options))), flush=True)


if __name__ == "__main__":
    main()
