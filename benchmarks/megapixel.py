"""Megapixel MNIST: baselines, accuracy of a run, its learning curve, attention and relevance maps.

    python benchmarks/megapixel.py --mnist FOLDER [--size 512] [--run RUN] [--pictures docs/pictures]

Prints a Markdown table. Without a run it has the baselines only: always the commonest class, and logistic regression on
the whole canvas, averaged down to 64 x 64 pixels. With a run it has the model too; curve and maps go to `--pictures`.
"""

import argparse
import platform
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from fitformer import data, viz
from fitformer.data.grouping import Grouping
from fitformer.data.settings import ImageData
from fitformer.evaluation.evaluate import evaluate
from fitformer.inference.explain.attribution import attribute
from fitformer.inference.explain.heatmap import HeatMap
from fitformer.inference.explain.overlay import blend
from fitformer.tasks.preview import grid, write_picture
from fitformer.training.run_dir import Run

SMALL = 64


def shrunk(part: object) -> tuple[np.ndarray, np.ndarray]:
    """All canvases of a part averaged down to (k, SMALL * SMALL) in [0, 1], and their labels."""
    rows = [
        F.interpolate(part[index]["image"].permute(2, 0, 1)[None].float() / 255, (SMALL, SMALL), mode="area").flatten()
        for index in range(len(part))
    ]
    return torch.stack(rows).numpy(), part.source.labels


def baselines(settings: ImageData) -> Iterator[tuple[str, float]]:
    """Name and test accuracy of each baseline."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    (x, y), (x_test, y_test) = (shrunk(data.build_dataset(settings, part)) for part in ("train", "test"))
    yield "always the training part's commonest class", float((y_test == np.bincount(y).argmax()).mean())
    for strength in (1e-4, 1e-2, 1.0):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=300)).fit(x, y)
        name = f"logistic regression of {SMALL} x {SMALL} pixels, C={strength:g}"
        yield f"{name} ({model.score(x, y):.1%} in training)", float(model.score(x_test, y_test))


def smoothed(curve: viz.Curve, window: int = 25) -> viz.Curve:
    """Means of so many neighbouring measurements, at the last one's step."""
    steps, values = (np.asarray(side) for side in curve)
    count = len(values) // window
    return steps[window - 1 :: window][:count].tolist(), values[: count * window].reshape(count, -1).mean(1).tolist()


def halved(images: np.ndarray) -> np.ndarray:
    """Pictures (k, H, W, 3) at half their size."""
    k, rows, columns, _ = images.shape
    return images.reshape(k, rows // 2, 2, columns // 2, 2, 3).mean(axis=(2, 4)).round().astype(np.uint8)


def draw(run: Run, folder: Path, count: int = 4) -> None:
    """The learning curve; test canvases above their attention maps and relevance maps."""
    curves = viz.metric_curves(run.metrics(), "train/accuracy", "val/accuracy")
    curves["train/accuracy"] = smoothed(curves["train/accuracy"])
    viz.write_curves(folder / "megapixel-curve.png", curves, y="accuracy")
    dataset, network = run.dataset("test"), run.model()
    canvases, attention, relevance = [], [], []
    for index in range(count):
        image, label = dataset[index]["image"], int(dataset[index]["label"])
        found = attribute(network, Grouping(network.patch_grid, network.glimpses, run.recipe.data)(image))
        print(f"test canvas {index}: {label}, taken for {int(found.logits.argmax())}", file=sys.stderr)
        canvases.append(viz.as_colour(image[None])[0].numpy())
        for maps, values, colours in ((attention, found.attention, "heat"), (relevance, found.relevance, "signed")):
            maps.append(blend(image.numpy(), HeatMap.of(values, found.image).shrunk(*image.shape[:2]), colours))
    sheet = grid(torch.from_numpy(halved(np.stack(canvases + attention + relevance))), columns=count, enlarge=1)
    write_picture(folder / "megapixel-maps.png", sheet)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mnist", help="folder of MNIST's four idx files; that of the run by default")
    parser.add_argument("--size", type=int, default=512, help="side of a canvas in pixels, without a run")
    parser.add_argument("--run", type=Path, help="run directory of `fitformer train megapixel-mnist`")
    parser.add_argument("--pictures", type=Path, help="folder for the run's curve and maps")
    arguments = parser.parse_args()
    run = Run.open(arguments.run) if arguments.run else None
    settings = ImageData(source="megapixel-mnist", path=arguments.mnist, image_size=arguments.size)
    settings = replace(run.recipe.data, augmentation="none") if run else settings
    print(f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| what | of the test canvases |\n|---|---|")
    for name, accuracy in baselines(settings):
        print(f"| {name} | {accuracy:.1%} |", flush=True)
    if run:
        found = dict(evaluate(run))
        print(f"| {run.path.name} | {found['accuracy']:.1%} (cross-entropy {found['loss']:.3f} nats) |")
        if arguments.pictures:
            draw(run, arguments.pictures)


if __name__ == "__main__":
    main()
