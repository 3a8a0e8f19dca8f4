"""Continue text with a byte run, as it is drawn; or draw images pixel by pixel with a pixel run.

fitformer generate runs/python-bytes --prompt "def main(" --length 500 --temperature 0.8
fitformer generate runs/digits-autoregress --count 20 --output drawn
"""

import argparse
import codecs
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fitformer._support.atomic_files import write_atomically
from fitformer.cli.options import add_device, device_of, natural, open_run, positive
from fitformer.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from fitformer.models.decoder import FITDecoder
    from fitformer.training.run_dir import Run

PROMPT = b"\n"
LENGTH = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `fitformer generate`."""
    parser.add_argument("run", help="run directory of an autoregress recipe")
    parser.add_argument("--count", type=positive, help="texts (default: 1) or images (default: 16)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token (default: 1)")
    parser.add_argument("--top-k", type=int, help="draw among the k likeliest tokens")
    parser.add_argument("--top-p", type=float, help="draw among the likeliest tokens that make up the share p")
    parser.add_argument("--seed", type=natural, default=0)
    where = "file for text (default: none), folder for images (default: RUN/samples/seed-SEED)"
    parser.add_argument("--output", type=Path, help=where)
    add_device(parser)
    text = parser.add_argument_group("of a byte run")
    prompt = text.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", help="text to continue (default: a line's end)")
    prompt.add_argument("--prompt-file", type=Path, help="file to continue")
    text.add_argument(
        "--length", type=positive, help=f"bytes to draw (default: {LENGTH}); may exceed the trained length"
    )
    pixels = parser.add_argument_group("of a pixel run")
    pixels.add_argument("--batch-size", type=positive, help="images at once (default: 64); changes no image")


def run(arguments: argparse.Namespace) -> int:
    """Draw, print and write."""
    from fitformer.config.schema import ByteRecipe
    from fitformer.models.decoder import FITDecoder

    of, device = open_run(arguments.run, "autoregress"), device_of(arguments)
    of_bytes = isinstance(of.recipe, ByteRecipe)
    foreign = ("batch_size",) if of_bytes else ("prompt", "prompt_file", "length")
    for name in foreign:
        if getattr(arguments, name) is not None:
            kinds = ("bytes", "pixels") if of_bytes else ("pixels", "bytes")
            option = name.replace("_", "-")
            raise InputError(f"--{option} is for a run over {kinds[1]}; {of.path} is one over {kinds[0]}, leave it out")
    network = of.model().to(device)
    assert isinstance(network, FITDecoder)
    drawing = {name: getattr(arguments, name) for name in ("temperature", "top_k", "top_p", "seed")}
    return (_text if of_bytes else _images)(of, network, arguments, drawing)


def _images(of: "Run", network: "FITDecoder", arguments: argparse.Namespace, drawing: dict[str, Any]) -> int:
    from fitformer.config.schema import PixelRecipe
    from fitformer.inference.sample import write_samples
    from fitformer.tasks.autoregress import generate_images

    assert isinstance(of.recipe, PixelRecipe)
    images = generate_images(
        network, of.recipe, arguments.count or 16, batch_size=arguments.batch_size or 64, **drawing
    )
    folder = arguments.output or of.samples / f"seed-{arguments.seed}"
    print(write_samples(folder, images, None, {"run": str(of.path), **drawing}))
    return 0


def _text(of: "Run", network: "FITDecoder", arguments: argparse.Namespace, drawing: dict[str, Any]) -> int:
    from fitformer.tasks.autoregress import generate_bytes

    prompt, count = _prompt(arguments), arguments.count or 1
    asked = prompt or PROMPT
    alone = count == 1
    whole = generate_bytes(
        network, [asked] * count, arguments.length or LENGTH, on_token=streamed(prompt) if alone else None, **drawing
    )
    for k, data in enumerate(whole):
        if not alone:
            print(f"{'' if k == 0 else chr(10)}----- {k} -----")
            _show(data)
        if arguments.output is not None:
            _write(
                arguments.output if alone else _numbered(arguments.output, k), data if prompt else data[len(asked) :]
            )
    print()
    return 0


def streamed(prompt: bytes = b"") -> Callable[[int, "Tensor"], None]:
    """What prints the prompt and then each drawn byte at once, holding back only those of an unfinished character."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    begun = bytearray(prompt)

    def show(position: int, column: "Tensor") -> None:
        print(decoder.decode(begun + bytes([int(column[0])])), end="", flush=True)
        begun.clear()

    return show


def _prompt(arguments: argparse.Namespace) -> bytes:
    """The prompt asked for, empty if none is."""
    if arguments.prompt is None and arguments.prompt_file is None:
        return b""
    if arguments.prompt is None and not arguments.prompt_file.is_file():
        raise InputError(f"there is no prompt file {arguments.prompt_file}")
    given = arguments.prompt_file.read_bytes() if arguments.prompt is None else arguments.prompt.encode()
    if not given:
        raise InputError("the prompt is empty; leave it out to begin anew")
    return given


def _show(data: bytes) -> None:
    print(data.decode("utf-8", errors="replace"), end="", flush=True, file=sys.stdout)


def _numbered(path: Path, k: int) -> Path:
    return path.with_name(f"{path.stem}-{k:05d}{path.suffix}")


def _write(path: Path, data: bytes) -> None:
    with write_atomically(path) as scratch:
        scratch.write_bytes(data)
