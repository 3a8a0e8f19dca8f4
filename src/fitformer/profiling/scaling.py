"""How time and memory grow with the number of tokens: one size after another, each in a process of its own."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fitformer._support.atomic_files import write_atomically
from fitformer.errors import InputError, require

Result = dict[str, Any]


@dataclass(frozen=True)
class Fit:
    """A power law through measurements: `factor * L ** exponent`."""

    exponent: float
    factor: float

    def at(self, length: float) -> float:
        """Its value at a length."""
        return float(self.factor * length**self.exponent)


def exponent(lengths: Sequence[float], values: Sequence[float]) -> Fit:
    """The power law that fits values best, by least squares on logarithms.

    Raises:
        InputError: fewer than two different lengths, or a number that is not above 0.
    """
    if len(set(lengths)) < 2 or min(*lengths, *values) <= 0:
        raise InputError(f"an exponent needs two different lengths and numbers above 0, not {list(lengths)}")
    across, up = ([math.log(number) for number in numbers] for numbers in (lengths, values))
    mean_across, mean_up = sum(across) / len(across), sum(up) / len(up)
    slope = sum((a - mean_across) * (u - mean_up) for a, u in zip(across, up, strict=True))
    slope /= sum((a - mean_across) ** 2 for a in across)
    return Fit(slope, math.exp(mean_up - slope * mean_across))


def scaling(sizes: Sequence[int], options: Sequence[str], on_result: Callable[[Result], None]) -> dict[str, Any]:
    """Measure a step at each size in a fresh process and fit the growth.

    Args:
        sizes: sides of the images in pixels.
        options: of `fitformer bench step`, but for the size.
        on_result: called with each result.

    Returns:
        `steps`, the results as `fitformer bench step --json` gives them, and `exponents` of time, CPU time, memory,
        attention and all operations against the number of tokens.

    Raises:
        InputError: fewer than two sizes, or a step that failed; quotes its message.
    """
    if len(set(sizes)) < 2:
        raise InputError(f"scaling needs at least two different sizes, not {list(sizes)}")
    steps = []
    for size in sizes:
        steps.append(in_process(["--image-size", str(size), *options]))
        on_result(steps[-1])
    return {"steps": steps, "exponents": exponents(steps)}


def exponents(steps: Sequence[Result]) -> dict[str, float]:
    """Exponents against the number of tokens."""
    lengths = [step["tokens"] for step in steps]
    columns = {
        "time": "seconds",
        "cpu_time": "cpu_seconds",
        "memory": "peak_bytes",
        "attention": "attention_tflop",
        "operations": "tflop",
    }
    return {name: exponent(lengths, [step[key] for step in steps]).exponent for name, key in columns.items()}


def in_process(options: Sequence[str]) -> Result:
    """The result of `fitformer bench step --json` with these options, run in a process of its own.

    Raises:
        InputError: it failed; quotes its message.
    """
    command = [sys.executable, "-m", "fitformer", "bench", "step", *options, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended with status {done.returncode}; was it out of memory?"]
        raise InputError(f"`{' '.join(['fitformer', *command[3:]])}`: {lines[-1].removeprefix('fitformer: error: ')}")
    return dict(json.loads(done.stdout))


def write_plot(path: str | Path, found: dict[str, Any]) -> None:
    """Draw time and peak memory against tokens, with the fitted exponents, into a PNG or SVG.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require("matplotlib", extra="train")
    from matplotlib.figure import Figure

    steps = found["steps"]
    lengths = [step["tokens"] for step in steps]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for place, (key, unit, what) in enumerate(
        (("seconds", 1, "seconds a step"), ("peak_bytes", 1e9, "peak memory, GB"))
    ):
        values = [step[key] / unit for step in steps]
        fit = exponent(lengths, values)
        axes = figure.add_subplot(1, 2, place + 1, xlabel="data tokens L", ylabel=what, xscale="log")
        axes.plot(lengths, values, "o", label="measured")
        axes.plot(lengths, [fit.at(length) for length in lengths], label=f"L^{fit.exponent:.2f}")
        if key == "seconds":
            axes.set_yscale("log")
        else:
            axes.plot(lengths, [step["predicted_bytes"] / unit for step in steps], "x", label="predicted")
            axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    path = Path(path)
    with write_atomically(path) as scratch:
        figure.savefig(scratch, format=path.suffix.lstrip(".") or "png", dpi=120)
