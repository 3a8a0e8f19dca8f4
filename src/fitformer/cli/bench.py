"""Measure whole training steps on a generated file, or generation at several positions beside a dense transformer.

fitformer bench step --preset small --image-size 1600 --execution streamed --keep disk
fitformer bench step --preset small --role decoder --length 1000000 --execution streamed
fitformer bench scaling --preset small --sizes 1600,3200,6400 --execution streamed --output scaling.png
fitformer bench generate --positions 1000,65536 --output generation.png
fitformer bench generate --products --positions 1000
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
    words = "a training step of one size, of several and how the cost grows, or generation"
    parser.add_argument("what", choices=("step", "scaling", "generate"), help=words)
    add_geometry(parser)
    parser.add_argument("--steps", type=positive, default=1, help="training steps that are timed (default: 1)")
    parser.add_argument("--warmup", type=natural, default=0, help="training steps before them (default: 0)")
    parser.add_argument("--image", metavar="FILE", help="read this image instead of a generated one")
    parser.add_argument("--sizes", type=sizes, metavar="PIXELS", help="of scaling: sides such as 1600,3200,6400")
    words = "of scaling and generate: a plot, .png or .svg, and a .json beside it"
    parser.add_argument("--output", metavar="FILE", help=words)
    generating = parser.add_argument_group("of generate")
    words = "tokens of context (default: 1000,4096,16384,65536,262144)"
    generating.add_argument("--positions", type=sizes, metavar="TOKENS", help=words)
    generating.add_argument("--repeats", type=positive, help="turns that medians are taken of (default: 3)")
    words = "compare a token's time with that of its matrix products alone, at the first position"
    generating.add_argument("--products", action="store_true", help=words)
    generating.add_argument("--compile", action="store_true", help="compile what a token of FIT needs with its cache")
    generating.add_argument("--threads", type=positive, help="of torch (default: its own choice)")
    add_run_options(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of words")


def run(arguments: argparse.Namespace) -> int:
    """Measure, and print what was measured."""
    if arguments.what == "generate":
        return _generate(arguments)
    given = [name for name in _OF_GENERATE if getattr(arguments, name)]
    if given:
        raise InputError(f"--{given[0].replace('_', '-')} is for `fitformer bench generate`")
    return _scaling(arguments) if arguments.what == "scaling" else _step(arguments)


_OF_GENERATE = ("positions", "repeats", "products", "compile", "threads")
_OF_IMAGES = ("sizes", "image", "image_size", "patch_size", "group_size", "channels", "length")
_OF_STEPS = (*_OF_IMAGES, "keep", "kept_precision", "slice", "recompute", "memory")


def sizes(text: str) -> list[int]:
    """Read `1600,3200`."""
    try:
        return [int(size) for size in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} are no sizes; write 1600,3200,6400") from None


def _step(arguments: argparse.Namespace) -> int:
    if arguments.sizes or arguments.output:
        raise InputError("--sizes and --output are for `fitformer bench scaling`")
    for name in ("image_size", "length"):
        if arguments.image is not None and getattr(arguments, name) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{flag} is of a generated image, and {arguments.image} has its own size: leave one out")
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
_OWN = {"what", "sizes", "output", "json", "image_size", "image", *_OF_GENERATE}


def _scaling(arguments: argparse.Namespace) -> int:
    if not arguments.sizes or arguments.image or arguments.image_size is not None:
        raise InputError("scaling takes generated images of several --sizes, such as --sizes 1600,3200,6400")
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
        _write_json(arguments.output, found)
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        print("exponents against tokens: " + ", ".join(f"{k} {v:.3f}" for k, v in found["exponents"].items()))
    return 0


def _write_json(plot: str, found: dict[str, Any]) -> None:
    """What a plot shows, beside it."""
    from fitformer._support.atomic_files import write_atomically

    with write_atomically(Path(plot).with_suffix(".json")) as scratch:
        scratch.write_text(json.dumps(found, indent=2))


def _generate(arguments: argparse.Namespace) -> int:
    given = [name for name in _OF_STEPS if getattr(arguments, name) is not None]
    if given:
        raise InputError(f"--{given[0].replace('_', '-')} is for training steps; `bench generate` takes --positions")
    import torch

    from fitformer.profiling.generation_benchmark import measure_generation, measure_products, write_generation_plot

    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    bench = _generation_bench(arguments)
    if arguments.products:
        found, lines = (products := measure_products(bench)), _product_lines(products)
    else:
        found = measure_generation(bench, lambda row: None if arguments.json else print(_row_line(row), flush=True))
        lines = _ratio_lines(found)
    if arguments.output and not arguments.products:
        write_generation_plot(arguments.output, found)
    if arguments.output:
        _write_json(arguments.output, found)
    print(json.dumps(found, indent=2) if arguments.json else "\n".join(lines))
    return 0


def _generation_bench(arguments: argparse.Namespace) -> Any:
    """What is measured: the preset's trunk or the benchmark's own, with the options given."""
    from dataclasses import replace

    from fitformer.cli.options import trunk_of
    from fitformer.models.config import preset
    from fitformer.profiling.generation_benchmark import GenerationBench

    asked = {name: getattr(arguments, name) for name in ("tokens_per_group", "positions", "repeats")}
    bench = GenerationBench(
        batch=arguments.batch_size,
        device=arguments.device,
        compile=arguments.compile,
        **{name: value for name, value in asked.items() if value is not None},
    )
    trunk = bench.trunk if arguments.preset is None else preset(arguments.preset, ends_local=True)
    return replace(bench, trunk=replace(trunk, **trunk_of(arguments)))


def _row_line(row: dict[str, Any]) -> str:
    from fitformer._support.bytesize import format_bytes as amount
    from fitformer.profiling.generation_benchmark import WAYS

    said = [
        f"{label} {found['tokens_per_second']:,.3g} tokens/s, {amount(found['cache_bytes'])}"
        if (found := row[name])
        else f"{label} not measured"
        for name, label in WAYS.items()
    ]
    return f"{row['position']:,}: " + "; ".join(said)


def _ratio_lines(found: dict[str, Any]) -> list[str]:
    from fitformer.profiling.generation_benchmark import ratios

    lines = [
        f"{each['position']:,}: FIT generates {each['speed']:.1f}x as fast as the dense transformer, with a cache "
        f"{each['cache']:.1f}x smaller"
        for each in ratios(found)
    ]
    first, last = found["rows"][0]["position"], found["rows"][-1]["position"]
    return [*lines, f"from position {first:,} to {last:,} FIT's speed falls by {found['slowdown']:.1%}, in turns"]


def _product_lines(found: dict[str, Any]) -> list[str]:
    return [
        f"{label}: {found[name]['seconds'] * 1e3:.3f} ms a token, its {found[name]['products']:.1f} matrix products "
        f"alone {found[name]['product_seconds'] * 1e3:.3f} ms: {found[name]['ratio']:.2f}x"
        for name, label in (("fit", "FIT"), ("dense", "dense"))
    ]


def _options(arguments: argparse.Namespace) -> list[str]:
    """The options given, as words for `fitformer bench step`."""
    given = {name: value for name, value in vars(arguments).items() if name not in _OWN and value is not None}
    return [f"--{name.replace('_', '-')}={_word(value)}" for name, value in given.items()]


def _word(value: Any) -> str:
    return "x".join(str(side) for side in value) if isinstance(value, tuple) else str(value)
