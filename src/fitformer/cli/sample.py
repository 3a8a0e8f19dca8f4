"""Draw images from a diffusion model: a grid, each image by itself, and samples.json which says how they were drawn.

fitformer sample runs/digits-diffuse --classes 3,7 --count 20 --steps 100 --guidance 1 --seed 0 --output drawn
fitformer sample runs/digits-diffuse/model
"""

import argparse
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fitformer.cli.options import add_checkpoint, add_device, add_drawing, device_of, open_run, positive, progress
from fitformer.errors import InputError

if TYPE_CHECKING:
    from fitformer.models.image_denoiser import FITImageDenoiser


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `fitformer sample`."""
    parser.add_argument("model", help="run directory of a diffuse recipe, or folder of a saved FITImageDenoiser")
    parser.add_argument("--classes", help="numbers or names with commas, taken in turn (default: all)")
    parser.add_argument("--count", type=positive, help="images in all (default: 10 of each class, or 16)")
    add_drawing(parser)
    parser.add_argument("--batch-size", type=positive, default=64, help="images at once; changes no image")
    parser.add_argument("--output", type=Path, help="folder (default: samples/seed-SEED in the run or model)")
    add_checkpoint(parser)
    add_device(parser)


def load(folder: Path, checkpoint: str = "last") -> "tuple[FITImageDenoiser, tuple[str, ...]]":
    """The model of a run or of a model folder, and the names of its classes; numbers where there is no run.

    Raises:
        InputError: neither a run of the task diffuse nor a saved `FITImageDenoiser`; a checkpoint that is not there.
    """
    from fitformer.models.image_denoiser import FITImageDenoiser

    if (folder / "config.json").is_file():
        if checkpoint != "last":
            raise InputError(f"--checkpoint is for a run, and {folder} is a saved model; leave it out")
        model = FITImageDenoiser.from_pretrained(folder)
        return model, tuple(map(str, range(model.num_classes)))
    run = open_run(str(folder), "sample")
    loaded = run.model(checkpoint)
    assert isinstance(loaded, FITImageDenoiser)
    return loaded, run.classes if loaded.num_classes else ()


def run(arguments: argparse.Namespace) -> int:
    """Draw and write."""
    from fitformer.inference.sample import class_numbers, write_samples

    folder, device = Path(arguments.model), device_of(arguments)
    model, classes = load(folder, arguments.checkpoint)
    if arguments.classes is not None and not classes:
        raise InputError(f"{folder} was trained without classes; leave --classes out")
    asked = class_numbers(arguments.classes, classes)
    count = arguments.count or (10 * len(asked) if asked else 16)
    model.check_room(count, arguments.batch_size)
    labels = [asked[k % len(asked)] for k in range(count)] if asked else None
    drawing = settings(arguments, model)
    done, steps = itertools.count(1), drawing["steps"] * -(-count // arguments.batch_size)
    with progress("sample") as show:
        images = model.to(device).sample(
            count,
            labels,
            batch_size=arguments.batch_size,
            on_step=lambda step, x0: show(next(done), steps),
            **drawing,
        )
    output = arguments.output or folder / "samples" / f"seed-{arguments.seed}"
    names = None if labels is None else [classes[label] for label in labels]
    columns = len(asked) if 1 < len(asked) <= 20 else 0
    print(write_samples(output, images, names, {"run": str(folder), **drawing}, columns))
    return 0


def settings(arguments: argparse.Namespace, model: "FITImageDenoiser") -> dict[str, Any]:
    """Options of `FITImageDenoiser.sample`: those of the command line, else the model's own."""
    own = model.diffusion
    return {
        "steps": arguments.steps or own.sample_steps,
        "sampler": arguments.sampler or own.sampler,
        "guidance": own.guidance if arguments.guidance is None else arguments.guidance,
        "seed": arguments.seed,
    }
