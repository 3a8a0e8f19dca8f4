"""Features of the patches of slides, by a frozen encoder: an HDF5 file a slide, as TRIDENT writes them.

fitformer features slides/ --encoder encoder.onnx --output features/ --patch-size 256 --magnification 20

The encoder is the folder of a run or a saved model of an image encoder, a program exported to .pt2 or .onnx, or a model
of timm by name. Slides are any images that can be read piece by piece; the patches that hold nothing but background
are left out. The same command again goes on where it was stopped.

fitformer features slides/ --encoder runs/patches --output features/
fitformer features slides/ --encoder timm:resnet50 --weights resnet50.safetensors --output features/ --shard 2/8
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fitformer.cli.options import add_checkpoint, add_device, device_of, natural, positive, progress, shard
from fitformer.errors import InputError

if TYPE_CHECKING:
    from fitformer.data.background import Background
    from fitformer.data.patches import PatchCut
    from fitformer.inference.features.encoder import PatchEncoder
    from fitformer.inference.features.extract import Extraction


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `fitformer features`."""
    parser.add_argument("slides", nargs="+", help="slides and other images, and folders of them")
    parser.add_argument(
        "--encoder", required=True, help="folder of a run or a saved model, a .pt2 or .onnx file, or timm:NAME"
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FOLDER", help="where the files are written"
    )
    parser.add_argument(
        "--shard", type=shard, metavar="I/N",
        help="do part I of N of the slides, beside other processes or machines that do the other parts",
    )  # fmt: skip
    _add_cut(parser)
    _add_tissue(parser)
    encoding = parser.add_argument_group("encoder")
    encoding.add_argument("--weights", metavar="FILE", help="of timm:NAME, safetensors (default: its pretrained ones)")
    words = "of a program, or in place of timm's: of each channel, of pixels from 0 to 1 (default: NAME.json beside it)"
    encoding.add_argument("--mean", type=float, nargs="+", help=words)
    encoding.add_argument("--std", type=float, nargs="+", help="the deviations that go with --mean")
    words = "the numbers that are black and white, of pixels without a range of their own (default: a run's, else none)"
    encoding.add_argument("--pixel-range", type=float, nargs=2, metavar=("BLACK", "WHITE"), help=words)
    encoding.add_argument("--precision", choices=("32", "bf16"), default="32", help="default: 32")
    encoding.add_argument("--batch-size", type=positive, default=64, help="patches at once (default: 64)")
    add_checkpoint(parser)
    add_device(parser)


def _add_cut(parser: argparse.ArgumentParser) -> None:
    cut = parser.add_argument_group("patches")
    cut.add_argument(
        "--patch-size", type=positive, metavar="PIXELS",
        help="side of a patch, at the magnification below, else in pixels of level 0 (default: the encoder's or 256)",
    )  # fmt: skip
    cut.add_argument("--overlap", type=natural, default=0, metavar="PIXELS", help="of neighbours (default: 0)")
    scale = cut.add_mutually_exclusive_group()
    scale.add_argument("--magnification", type=float, help="such as 20, of slides that say their own")
    scale.add_argument("--microns-per-pixel", type=float, metavar="MICRONS", help="instead, such as 0.5")
    words = "of level 0, of slides that do not say it or say it wrong"
    cut.add_argument("--slide-microns-per-pixel", type=float, metavar="MICRONS", help=words)


def _add_tissue(parser: argparse.ArgumentParser) -> None:
    tissue = parser.add_argument_group("which patches hold tissue")
    tissue.add_argument(
        "--background", type=_background, default="auto",
        help="auto (default: each slide's commonest colour), white, black, a level, one for each channel as in "
        "235,240,228, or none to keep all patches",
    )  # fmt: skip
    words = "how far from the background a pixel may be, as a share of the range (default: 0.1)"
    tissue.add_argument("--tolerance", type=float, default=0.1, help=words)
    words = "leave out patches of which no larger share is something else (default: 0)"
    tissue.add_argument("--min-foreground", type=float, default=0.0, metavar="SHARE", help=words)
    words = "folder of masks, named as the slides but for the ending; patches where they are 0 are left out"
    tissue.add_argument("--masks", metavar="FOLDER", help=words)


def _background(text: str) -> "Background | None":
    if text in ("auto", "white", "black", "none"):
        return None if text == "none" else text
    try:
        levels = tuple(float(level) for level in text.split(","))
    except ValueError:
        words = f"{text!r} is no background; write auto, white, black, none, 235 or 235,240,228"
        raise argparse.ArgumentTypeError(words) from None
    return levels[0] if len(levels) == 1 else levels


def run(arguments: argparse.Namespace) -> int:
    """Write the files, and say how many."""
    if arguments.output.is_file():
        raise InputError(f"{arguments.output} is a file; features need a folder")
    if (arguments.mean is None) != (arguments.std is None):
        given, missing = ("--mean", "--std") if arguments.std is None else ("--std", "--mean")
        raise InputError(f"{given} is given without {missing}; give both")
    from fitformer.data.masks import Masks
    from fitformer.inference.features.extract import Extraction, slide_suffixes
    from fitformer.inference.find import Shard, find

    slides = find(arguments.slides, arguments.output, slide_suffixes())
    masks = None if arguments.masks is None else Masks(arguments.masks)
    if masks is not None:
        masks.check_shared(slide.path for slide in slides)
    if arguments.shard is not None:
        slides = Shard(*arguments.shard).of(slides)
    encoder = _encoder(arguments)
    with progress("features") as show:
        work = Extraction(
            encoder,
            arguments.output,
            _cut(arguments, encoder),
            masks,
            arguments.batch_size,
            alone=arguments.shard is None,
            show=lambda done, total: show(round(1000 * done), 1000 * total),
            on_broken=lambda file, reason: print(f"fitformer: skipped {file} ({reason})", file=sys.stderr),
        )
        work.run(slides)
    part = "" if arguments.shard is None else " of part {}/{}".format(*arguments.shard)
    print(f"{arguments.output}: {work.made} of {len(slides)} slides{part} done now{_counted(work, len(slides))}")
    return 0


def _encoder(arguments: argparse.Namespace) -> "PatchEncoder":
    from fitformer.inference.features.encoder import Normalization
    from fitformer.inference.features.encoders import open_encoder

    normalization = None if arguments.mean is None else Normalization(tuple(arguments.mean), tuple(arguments.std))
    encoder = open_encoder(
        arguments.encoder,
        device_of(arguments),
        checkpoint=arguments.checkpoint,
        weights=arguments.weights,
        normalization=normalization,
        bf16=arguments.precision == "bf16",
    )
    if arguments.pixel_range is None:
        return encoder
    low, high = arguments.pixel_range
    return replace(encoder, pixel_range=(low, high))


def _cut(arguments: argparse.Namespace, encoder: "PatchEncoder") -> "PatchCut":
    from fitformer.data.patches import PatchCut

    return PatchCut(
        arguments.patch_size or (encoder.size[0] if encoder.size else 256),
        arguments.overlap,
        arguments.magnification,
        arguments.microns_per_pixel,
        arguments.slide_microns_per_pixel,
        arguments.background,
        arguments.tolerance,
        arguments.min_foreground,
    )


def _counted(work: "Extraction", slides: int) -> str:
    kept = slides - work.made - len(work.broken)
    parts = [f", {work.patches:,} patches of {work.width} features"] if work.made else []
    parts += [f", {work.empty} without tissue"] if work.empty else []
    parts += [f", {kept} were there already"] if kept else []
    parts += [f", {len(work.broken)} could not be read (*.failed)"] if work.broken else []
    return "".join(parts)
