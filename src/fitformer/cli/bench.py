"""Measure whole training steps on a generated image on disk: seconds, operations, peak memory.

fitformer bench step --preset small --image-size 1600 --execution streamed --keep disk
fitformer bench scaling --preset small --sizes 1600,3200,6400 --execution streamed --output scaling.png
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fitformer.cli.options import natural, positive
from fitformer.cli.plan import add_geometry, add_run_options, geometry_of, request_of
from fitformer.errors import InputError

if TYPE_CHECKING:
    from fitformer.profiling.benchmark import Measured


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `fitformer bench`."""
    parser.add_argument("what", choices=("step", "scaling"), help="one size, or several and how the cost grows")
    add_geometry(parser)
    parser.add_argument("--steps", type=positive, default=1, help="training steps that are timed (default: 1)")
    parser.add_argument("--warmup", type=natural, default=0, help="training steps before them (default: 0)")
    parser.add_argument("--image", metavar="FILE", help="read this image instead of a generated one")
    parser.add_argument("--sizes", type=sizes, metavar="PIXELS", help="of scaling: sides such as 1600,3200,6400")
    parser.add_argument("--output", metavar="FILE", help="of scaling: a plot, .png or .svg, and a .json beside it")
    add_run_options(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of words")


def run(arguments: argparse.Namespace) -> int:
    """Measure, and print what was measured."""
    return _scaling(arguments) if arguments.what == "scaling" else _step(arguments)


def sizes(text: str) -> list[int]:
    """Read `1600,3200`."""
    try:
        return [int(size) for size in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} are no sizes; write 1600,3200,6400") from None


def _step(arguments: argparse.Namespace) -> int:
    if arguments.sizes or arguments.output:
        raise InputError("--sizes and --output are for `fitformer bench scaling`")
    if arguments.image is not None and arguments.image_size is not None:
        raise InputError(f"--image-size is of a generated image, and {arguments.image} has its own size: leave one out")
    from fitformer.profiling.benchmark import Bench, as_plain, measure

    geometry = geometry_of(arguments, None if arguments.image is None else 1)
    bench = Bench(geometry, request_of(arguments), arguments.steps, arguments.warmup, arguments.image)
    found = measure(bench)
    print(json.dumps(as_plain(found), indent=2) if arguments.json else format_bytes(found))
    return 0


def format_bytes(found: "Measured") -> str:
    """What a step took, for people."""
    from fitformer._support.bytesize import format_bytes as amount
    from fitformer.cli.info import short
    from fitformer.profiling.benchmark import as_plain

    plain = as_plain(found)
    kept = f", kept {plain['keep']}, {plain['slice_groups']} groups a slice" if plain["keep"] else ""
    kept += f", {plain['recompute']} recomputation" if plain["recompute"] else ""
    of = f"{plain['image_size']} pixels, groups of {plain['group_size']}, patches of {plain['patch_size']}"
    lines = [
        f"{plain['role']} {plain['layers']}, {short(found.plan.parameters)} parameters, {of}",
        f"{plain['execution']} execution{kept}",
        f"{plain['tokens']} tokens, {plain['groups']} groups, {plain['latents']} latents",
        f"{found.second:.2f} s a step, {plain['tflop']:.3g} TFLOP, {plain['tflops_per_second']:.3g} TFLOP/s "
        f"({found.device}, {found.threads} threads)",
        f"peak memory {amount(found.peak)}, predicted {amount(found.plan.memory.total)} "
        f"({found.plan.memory.total / found.peak - 1:+.0%})",
    ]
    return "\n".join(lines)


# What a step of scaling is told anew, or not at all.
_OWN = {"what", "sizes", "output", "json", "image_size", "image"}


def _scaling(arguments: argparse.Namespace) -> int:
    if not arguments.sizes or arguments.image or arguments.image_size is not None:
        raise InputError("scaling takes generated images of several --sizes, such as --sizes 1600,3200,6400")
    from fitformer._support.atomic_files import write_atomically
    from fitformer.profiling.scaling import scaling, write_plot

    def tell(step: dict[str, Any]) -> None:
        if not arguments.json:
            amounts = f"{step['seconds']:.2f} s, {step['peak_bytes'] / 1e9:.2f} GB"
            print(
                f"{step['image_size']}: {step['tokens']} tokens, groups of {step['group_size']}, {amounts}", flush=True
            )

    found = scaling(arguments.sizes, _options(arguments), tell)
    if arguments.output:
        write_plot(arguments.output, found)
        with write_atomically(Path(arguments.output).with_suffix(".json")) as scratch:
            scratch.write_text(json.dumps(found, indent=2))
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        print("exponents against tokens: " + ", ".join(f"{k} {v:.3f}" for k, v in found["exponents"].items()))
    return 0


def _options(arguments: argparse.Namespace) -> list[str]:
    """The options given, as words for `fitformer bench step`."""
    given = {name: value for name, value in vars(arguments).items() if name not in _OWN and value is not None}
    return [f"--{name.replace('_', '-')}={_word(value)}" for name, value in given.items()]


def _word(value: Any) -> str:
    return "x".join(str(side) for side in value) if isinstance(value, tuple) else str(value)
