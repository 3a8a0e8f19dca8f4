"""Generate with an autoregressive run: text or bytes, images, or sound, from nothing or from a beginning.

fitformer generate runs/python-bytes --prompt "def main(" --length 500 --temperature 0.8 --stream
fitformer generate runs/digits-pixels --count 20 --output generated
fitformer generate runs/digits-pixels --image seven.png --count 5
fitformer generate runs/speech --prompt-file hello.wav --seconds 2 --output longer.wav
"""

import argparse
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fitformer._support.atomic_files import write_atomically
from fitformer.cli.options import add_checkpoint, add_device, device_of, natural, open_run, positive, progress
from fitformer.cli.prompts import Printer, Prompt
from fitformer.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from fitformer.models.decoder import FITDecoder
    from fitformer.training.run_dir import Run

NOTHING = Prompt(b"\n", shown=False)
LENGTH, SECONDS, IMAGES = 512, 1.0, 16
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "compile")
# Which of the options that do not go with every run go with which.
TEXT = {"prompts", "length", "window", "stream", "stop"}
SOUND = {"prompts", "length", "seconds", "window"}
PICTURES = {"images", "keep_rows", "classes", "batch_size"}
NAMES = {"prompts": "prompt", "images": "image", "classes": "class"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `fitformer generate`."""
    parser.add_argument("run", help="run directory of a bytes, pixels or audio recipe")
    parser.add_argument("--count", type=positive, help=f"for each prompt or image (default: 1; {IMAGES} new images)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 selects the most likely token (default: 1)")
    parser.add_argument("--top-k", type=int, help="sample from the k most likely tokens")
    parser.add_argument("--top-p", type=float, help="sample from the most likely tokens of total probability p")
    parser.add_argument("--min-p", type=float, help="sample from tokens at least p times as likely as the likeliest")
    penalty = "divide the logits of tokens that were there before by this (default: 1, which changes nothing)"
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help=penalty)
    parser.add_argument("--seed", type=natural, default=0)
    compiled = "on a CPU, compile what a token needs: up to half a minute at the start, then faster"
    parser.add_argument("--compile", action="store_true", help=compiled)
    where = "file for text (default: none) or sound (default: RUN/samples/seed-SEED.wav), numbered if there are several"
    parser.add_argument("--output", type=Path, help=f"{where}; folder for images (default: RUN/samples/seed-SEED)")
    add_checkpoint(parser)
    add_device(parser)
    _add_sequences(parser)
    pixels = parser.add_argument_group("for a pixels run")
    pixels.add_argument("--image", dest="images", action="append", metavar="FILE", help="image to complete; may repeat")
    pixels.add_argument("--keep-rows", type=positive, help="upper rows of --image to keep (default: half of them)")
    classes = "class by name or number, or several with commas between, of a class-conditional run (default: in turn)"
    pixels.add_argument("--class", dest="classes", metavar="CLASS", help=classes)
    pixels.add_argument("--batch-size", type=positive, help="images at once (default: 64); does not change the images")


def _add_sequences(parser: argparse.ArgumentParser) -> None:
    both = parser.add_argument_group("for a bytes or audio run")
    of_file: dict[str, Any] = {"dest": "prompts", "action": "append", "type": Prompt.of_file, "metavar": "FILE"}
    both.add_argument("--prompt-file", **of_file, help="file to continue, a WAV file for an audio run; may repeat")
    both.add_argument("--length", type=positive, help=f"bytes (default: {LENGTH}) or samples to generate at most")
    window = "groups of context at most; without it, prompts must fit the trained length, and what follows goes past it"
    both.add_argument("--window", type=positive, help=window)
    text = parser.add_argument_group("for a bytes run")
    of_text = "text to continue (default: a newline); may repeat"
    text.add_argument("--prompt", dest="prompts", action="append", type=Prompt.of_text, metavar="TEXT", help=of_text)
    text.add_argument("--stream", action="store_const", const=True, help="print each character as soon as it is drawn")
    text.add_argument("--stop", action="append", metavar="TEXT", help="end where this was generated; may repeat")
    sound = parser.add_argument_group("for an audio run")
    sound.add_argument("--seconds", type=float, help=f"in place of --length (default: {SECONDS:g})")


def run(arguments: argparse.Namespace) -> int:
    """Generate, print and write."""
    from fitformer.tasks import task_of

    run, device = open_run(arguments.run, "generate"), device_of(arguments)
    task = task_of(run.recipe)
    if task.generate_bytes is not None:
        generate, applies = _text, TEXT
    elif task.generate_audio is not None:
        generate, applies = _sound, SOUND
    else:
        generate, applies = _pictures, PICTURES
    for name in sorted((TEXT | SOUND | PICTURES) - applies):
        if getattr(arguments, name) is not None:
            option = NAMES.get(name, name).replace("_", "-")
            raise InputError(f"{run.path} is a {run.recipe.task} run, which --{option} does not apply to; leave it out")
    for prompt in arguments.prompts or ():
        prompt.check()
    network = run.model(arguments.checkpoint).to(device)
    return generate(run, network, arguments, {name: getattr(arguments, name) for name in SAMPLING})


# ---- text ----


def _text(run: "Run", network: "FITDecoder", arguments: argparse.Namespace, options: dict[str, Any]) -> int:
    prompts = [prompt for prompt in arguments.prompts or [NOTHING] for _ in range(arguments.count or 1)]
    length, stops = arguments.length or LENGTH, [os.fsencode(stop) for stop in arguments.stop or ()]
    options |= {"stop_strings": stops, "window": arguments.window}
    without = []
    for k, (prompt, generated) in enumerate(_texts(run, network, prompts, length, arguments.stream, options)):
        if arguments.output is not None:
            _write(arguments.output if len(prompts) == 1 else _numbered(arguments.output, k), prompt, generated)
        if not any(generated.endswith(stop) for stop in stops):
            without.append(k)
    if stops and without:
        raise InputError(_not_met(stops, length, without if len(prompts) > 1 else []))
    return 0


def _texts(
    run: "Run",
    network: "FITDecoder",
    prompts: list[Prompt],
    length: int,
    stream: bool | None,
    options: dict[str, Any],
) -> Iterator[tuple[Prompt, bytes]]:
    """Each prompt and the bytes generated after it, which are printed: all together at the end, or one by one."""
    from fitformer.tasks import task_of

    generate = task_of(run.recipe).generate_bytes
    assert generate is not None
    beginnings = [_read(prompt, network, options["window"]) for prompt in prompts]
    if stream:
        for k, (prompt, beginning) in enumerate(zip(prompts, beginnings, strict=True)):
            printer = Printer(prompt, _heading(k, len(prompts)))
            (text,) = generate(network, [beginning], length, first=k, streamer=printer, **options)
            yield prompt, text[len(beginning) :]
        return
    with _counted(max(map(len, beginnings)) + length) as streamer:
        texts = generate(network, beginnings, length, streamer=streamer, **options)
    for k, (prompt, beginning, text) in enumerate(zip(prompts, beginnings, texts, strict=True)):
        printer = Printer(prompt, _heading(k, len(prompts)))
        printer.begin()
        printer.add(text[len(beginning) :])
        printer.end()
        yield prompt, text[len(beginning) :]


def _read(prompt: Prompt, network: "FITDecoder", window: int | None) -> bytes:
    """The bytes of a prompt that the decoder reads: with a window, those of its last groups."""
    from fitformer.generation.steps import check_held, context_start, group_limit

    check_held(network, len(prompt), window)
    limit = None if window is None else group_limit(network, window)
    return b"".join(prompt.blocks(context_start(len(prompt), network.tokens_per_group, limit)))


def _heading(k: int, count: int) -> str:
    """The line before one of several texts."""
    return f"{'' if k == 0 else chr(10)}----- {k} -----{chr(10)}" if count > 1 else ""


def _not_met(stops: list[bytes], length: int, texts: list[int]) -> str:
    names = " or ".join(repr(os.fsdecode(stop)) for stop in stops)
    where = f" of the texts {', '.join(map(str, texts))}" if texts else ""
    return f"the stop string {names} did not come in {length} bytes{where}; ask for more of them with --length"


def _write(path: Path, prompt: Prompt, generated: bytes) -> None:
    with write_atomically(path) as scratch, scratch.open("wb") as file:
        for block in prompt.blocks() if prompt.shown else ():
            file.write(block)
        file.write(generated)


def _numbered(path: Path, k: int) -> Path:
    return path.with_name(f"{path.stem}-{k:05d}{path.suffix}")


# ---- sound ----


def _sound(run: "Run", network: "FITDecoder", arguments: argparse.Namespace, options: dict[str, Any]) -> int:
    import numpy as np

    from fitformer.data.wav import read_sound, write_sound
    from fitformer.tasks import task_of

    generate = task_of(run.recipe).generate_audio
    data: Any = run.recipe.data
    assert generate is not None
    prompts = []
    for prompt in arguments.prompts or []:
        if prompt.path is None:
            raise InputError(f"{run.path} is an audio run, which --prompt does not apply to; give a WAV --prompt-file")
        prompts.append(read_sound(prompt.path, data.sample_rate, data.resample).codes)
    prompts = [codes for codes in prompts or [np.zeros(0, np.uint8)] for _ in range(arguments.count or 1)]
    length = _samples(arguments, data.sample_rate)
    with _counted(max(map(len, prompts)) + length) as streamer:
        sounds = generate(network, prompts, length, window=arguments.window, streamer=streamer, **options)
    output = arguments.output or run.samples / f"seed-{arguments.seed}.wav"
    for k, sound in enumerate(sounds):
        path = output if len(sounds) == 1 else _numbered(output, k)
        write_sound(path, sound, data.sample_rate)
        print(path)
    return 0


def _samples(arguments: argparse.Namespace, sample_rate: int) -> int:
    """How many samples to generate."""
    if arguments.length is not None and arguments.seconds is not None:
        raise InputError("--length and --seconds both say how much to generate; give one of them")
    if arguments.length is not None:
        return int(arguments.length)
    seconds = SECONDS if arguments.seconds is None else arguments.seconds
    if not 0 < seconds < math.inf or round(seconds * sample_rate) < 1:
        raise InputError(f"seconds is {seconds}; it must be finite, and at least the {1 / sample_rate:g} of one sample")
    return round(seconds * sample_rate)


# ---- images ----


def _pictures(run: "Run", network: "FITDecoder", arguments: argparse.Namespace, options: dict[str, Any]) -> int:
    from fitformer.inference.sample import read_images, write_samples
    from fitformer.tasks import task_of

    task, given, batch_size = task_of(run.recipe), arguments.images or [], arguments.batch_size or 64
    data: Any = run.recipe.data
    assert task.generate_images is not None
    assert task.complete_images is not None
    if arguments.keep_rows is not None and not given:
        raise InputError("--keep-rows is of an image to complete; give --image as well")
    count = arguments.count or (1 if given else IMAGES)
    labels, names = _classes(run, network, arguments.classes, count * max(len(given), 1))
    about = {"run": str(run.path), **({"images": given, "keep_rows": arguments.keep_rows} if given else {}), **options}
    tokens = (network.num_groups or 0) * network.tokens_per_group
    with _counted(tokens * -(-count * max(len(given), 1) // batch_size)) as streamer:
        options |= {"classes": labels, "batch_size": batch_size, "streamer": streamer}
        if given:
            images = read_images(given, data, run.describe_data()["channels"])
            options |= {"keep_rows": arguments.keep_rows, "count": count}
            drawn = task.complete_images(network, run.recipe, images, **options)
        else:
            drawn = task.generate_images(network, run.recipe, count, **options)
    folder = arguments.output or run.samples / f"{'completed-' if given else ''}seed-{arguments.seed}"
    print(write_samples(folder, drawn, names, about))
    return 0


def _classes(
    run: "Run", network: "FITDecoder", asked: str | None, count: int
) -> tuple[list[int] | None, list[str] | None]:
    """The class of each of `count` images, by number and by name; None of an unconditional run."""
    from fitformer.inference.sample import class_numbers

    if not network.num_classes:
        if asked is not None:
            raise InputError(f"{run.path} was trained without classes; leave --class out")
        return None, None
    numbers = class_numbers(asked, run.classes)
    labels = [numbers[k % len(numbers)] for k in range(count)]
    return labels, [run.classes[label] for label in labels]


# ---- progress ----


class _Counter:
    """Shows how many tokens there are so far. A `Streamer`."""

    def __init__(self, show: Callable[[int, int], None], total: int) -> None:
        self.show, self.total, self.done = show, total, 0

    def put(self, tokens: "Tensor") -> None:
        self.done += tokens.shape[1] if tokens.ndim == 2 else 1
        self.show(self.done, self.total)

    def end(self) -> None:
        """Nothing: the bar goes when all is done."""


@contextmanager
def _counted(total: int) -> Iterator[_Counter]:
    """A `Streamer` that moves a progress bar; prompts are counted, too."""
    with progress("generate") as show:
        yield _Counter(show, total)
