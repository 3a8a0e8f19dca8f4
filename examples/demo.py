"""`make demo`: FIT's three roles trained on embedded real data, one after the other, and a report with pictures.

python examples/demo.py [--output demo]

Every step is a command that a user would type; it is printed before it runs. A demo that was interrupted goes on
where it stopped. The report ends with the three marks that the demo must reach; missing one is exit status 1.
"""

import argparse
import json
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fitformer import viz
from fitformer.tasks.preview import grid, write_picture
from fitformer.training.run_dir import Run

SAMPLES = 500


def fitformer(*words: object) -> str:
    """Run one command of the command line, showing it and its progress; returns what it printed to standard output.

    Raises:
        SystemExit: with its status, if it failed.
    """
    command = [str(word) for word in words]
    print(f"\n$ fitformer {shlex.join(command)}", flush=True)
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "fitformer", *command], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    print(f"{done.stdout.rstrip()}\n({time.perf_counter() - start:.0f} s)", flush=True)
    return done.stdout


def classify(runs: Path) -> dict[str, Any]:
    """Train the encoder; accuracy on the held-out digits."""
    fitformer("train", "digits-classify", "--run-dir", runs / "classify")
    return json.loads(fitformer("evaluate", runs / "classify", "--json"))


def diffuse(runs: Path) -> dict[str, Any]:
    """Train the denoiser; share of samples that the classifier recognises."""
    run = runs / "diffuse"
    fitformer("train", "digits-diffuse", "--run-dir", run)
    fitformer("sample", run, "--count", 100, "--seed", 1, "--output", run / "samples" / "demo")
    options = ("--classifier", runs / "classify", "--count", SAMPLES, "--json")
    return json.loads(fitformer("evaluate", run, *options))


def pixels(runs: Path) -> dict[str, Any]:
    """Train the decoder of pixels; held-out bits beside those of independent pixels."""
    run = runs / "pixels"
    fitformer("train", "digits-pixels", "--run-dir", run)
    fitformer("generate", run, "--count", 40, "--seed", 1, "--output", run / "samples" / "demo")
    return json.loads(fitformer("evaluate", run, "--json"))


def continuation(runs: Path) -> str:
    """Train the decoder of bytes for a minute; what it makes of the beginning of a function."""
    run = runs / "bytes"
    fitformer("train", "python-bytes-demo", "--run-dir", run)
    return fitformer("generate", run, "--prompt", "def __init__(self, ", "--length", 400, "--seed", 1)


def draw(runs: Path, folder: Path) -> None:
    """Learning curves, and attention maps of the encoder on held-out digits."""
    curves = {
        "classify": ("val/accuracy", "held-out accuracy"),
        "diffuse": ("train/loss", "denoising loss"),
        "pixels": ("val/bits_per_dim", "held-out bits per pixel"),
        "bytes": ("train/bits_per_byte", "bits per byte"),
    }
    for name, (key, label) in curves.items():
        lines = Run.open(runs / name).metrics()
        viz.write_curves(folder / f"{name}-curve.png", viz.metric_curves(lines, key), y=label)
    run = Run.open(runs / "classify")
    dataset = run.dataset("test")
    images = torch.stack([dataset[i]["image"] for i in range(8)])
    maps = viz.latent_attention(run.model(), images.float() / 255)
    rows = [viz.as_colour(images), *(viz.overlay(images, attention) for attention in maps)]
    write_picture(folder / "attention.png", grid(torch.cat(rows), columns=len(images), enlarge=3))


def report(folder: Path, figures: dict[str, Any], text: str, seconds: float) -> bool:
    """Write report.md; returns whether every mark was reached."""
    accuracy = figures["classify"]["accuracy"]
    recognised = figures["diffuse"]["recognised"]
    bits, independent = figures["pixels"]["bits_per_dim"], figures["pixels"]["independent_bits_per_dim"]
    below = 1 - bits / independent
    marks = [
        ("held-out digits classified", f"{accuracy:.1%}", "at least 96%", accuracy >= 0.96),
        (f"of {SAMPLES} samples recognised as their class", f"{recognised:.1%}", "at least 90%", recognised >= 0.90),
        (
            "held-out bits per pixel",
            f"{bits:.3f}, {below:.1%} under independent pixels' {independent:.3f}",
            "at least 20% under",
            below >= 0.20,
        ),
    ]
    table = "\n".join(f"| {what} | {got} | {mark} | {'yes' if ok else 'NO'} |" for what, got, mark, ok in marks)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    (folder / "report.md").write_text(
        f"""# What `make demo` did

{seconds / 60:.1f} minutes on {machine}.

| what | measured | mark | reached |
|---|---|---|---|
{table}

## Encoder: which digit is it?

![accuracy](classify-curve.png)

Attention of the latents: held-out digits, then for each block how much its latents attended to each patch.

![attention of the latents](attention.png)

## Diffusion decoder: draw a digit of a given class

![loss](diffuse-curve.png)

A column per class; guidance and sampler as in the recipe.

![samples](runs/diffuse/samples/demo/grid.png)

## Autoregressive decoder: pixels

![bits per pixel](pixels-curve.png)

![generated digits](runs/pixels/samples/demo/grid.png)

## Autoregressive decoder: bytes of Python, for a minute

![bits per byte](bytes-curve.png)

```
{text}
```
"""
    )
    for what, got, mark, ok in marks:
        print(f"{'reached' if ok else 'MISSED '}  {what}: {got} ({mark})")
    return all(ok for *_, ok in marks)


def main() -> int:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder of the runs and the report")
    folder: Path = parser.parse_args().output
    runs = folder / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    figures = {"classify": classify(runs), "diffuse": diffuse(runs), "pixels": pixels(runs)}
    text = continuation(runs)
    draw(runs, folder)
    reached = report(folder, figures, text, time.perf_counter() - start)
    print(f"\nThe report is {folder / 'report.md'}")
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
