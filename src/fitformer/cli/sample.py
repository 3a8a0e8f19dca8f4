"""Draw images from a diffusion run: a grid, each image by itself, and samples.json which says how they were drawn.

fitformer sample runs/digits-diffuse --classes 3,7 --count 20 --steps 100 --guidance 1 --seed 0 --output drawn
"""

import argparse
import itertools
from pathlib import Path

from fitformer.cli.options import add_device, add_drawing, device_of, open_run, positive, progress
from fitformer.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `fitformer sample`."""
    parser.add_argument("run", help="run directory of a diffuse recipe")
    parser.add_argument("--classes", help="numbers or names with commas, taken in turn (default: all)")
    parser.add_argument("--count", type=positive, help="images in all (default: 10 of each class, or 16)")
    add_drawing(parser)
    parser.add_argument("--batch-size", type=positive, default=64, help="images at once; changes no image")
    parser.add_argument("--output", type=Path, help="folder (default: RUN/samples/seed-SEED)")
    add_device(parser)


def run(arguments: argparse.Namespace) -> int:
    """Draw and write."""
    from fitformer.config.schema import DiffuseRecipe
    from fitformer.inference.sample import class_numbers, write_samples
    from fitformer.models.denoiser import FITDenoiser
    from fitformer.tasks.diffuse import sample_images

    of, device = open_run(arguments.run, "sample"), device_of(arguments)
    network, recipe = of.model().to(device), of.recipe
    assert isinstance(network, FITDenoiser)
    assert isinstance(recipe, DiffuseRecipe)
    classes = of.classes if network.cond_dim is not None else ()
    if arguments.classes is not None and not classes:
        raise InputError(f"{of.path} was trained without classes and cannot draw one; leave --classes out")
    asked = class_numbers(arguments.classes, classes)
    count = arguments.count or (10 * len(asked) if asked else 16)
    labels = [asked[k % len(asked)] for k in range(count)] if asked else None
    drawing = {
        "steps": arguments.steps or recipe.objective.sample_steps,
        "sampler": arguments.sampler or recipe.objective.sampler,
        "guidance": recipe.objective.guidance if arguments.guidance is None else arguments.guidance,
        "seed": arguments.seed,
    }
    done, of_all = itertools.count(1), drawing["steps"] * -(-count // arguments.batch_size)
    with progress("sample") as show:
        images = sample_images(
            network,
            recipe,
            labels,
            count,
            batch_size=arguments.batch_size,
            on_step=lambda step, x0: show(next(done), of_all),
            **drawing,
        )
    folder = arguments.output or of.samples / f"seed-{arguments.seed}"
    names = None if labels is None else [classes[label] for label in labels]
    columns = len(asked) if 1 < len(asked) <= 20 else 0
    print(write_samples(folder, images, names, {"run": str(of.path), **drawing}, columns))
    return 0
