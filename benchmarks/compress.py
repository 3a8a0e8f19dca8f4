"""A byte model as a compressor of held-out text, beside gzip -9, xz -9e and zstd -22.

    python benchmarks/compress.py runs/python-bytes [--bytes 1000000] [--segments 64] [--output PAGE.md]
    python benchmarks/compress.py RACE/FIT... --window 32     # a model that bytes_against_dense.py has trained

Takes the held-out part of the run's data (of `python-bytes` Python's own sources), compresses it by the run's model,
decompresses it and compares both. Of a model folder it takes what `bytes_against_dense.py` holds out. Prints a page in
Markdown.
"""

import argparse
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bytes_against_dense import HELD_OUT, read

from fitformer._support.atomic_files import write_atomically
from fitformer._support.device import processor_name, usable_device
from fitformer.data.datasets.text import whole_file
from fitformer.evaluation.compressors import compressed_sizes
from fitformer.evaluation.evaluate import plain_dataset
from fitformer.evaluation.likelihood import Windows, log_likelihood
from fitformer.inference.compression import Report, compress, decompress
from fitformer.models.decoder import FITDecoder
from fitformer.training.run_dir import Run

COMPRESSORS = {"gzip": "`gzip -9`", "xz": "`xz -9e`", "zstd": "`zstd --ultra -22`"}


def measured(decoder: Any, content: bytes, segments: int | None, window: int | None) -> dict[str, Any]:
    """What the model and the compressors make of some bytes, and how long the model takes for it."""
    with tempfile.TemporaryDirectory() as folder:
        original, packed, back = (Path(folder, name) for name in ("original", "packed", "back"))
        original.write_bytes(content)
        begun = time.perf_counter()
        report = compress(decoder, original, packed, segments=segments, window=window)
        compressed = time.perf_counter()
        decompress(decoder, packed, back)
        decompressed = time.perf_counter()
        if back.read_bytes() != content:
            raise AssertionError("what came back is not what was compressed")
        sizes = dict(compressed_sizes(whole_file(original)))
    # As many groups of context at most, and half of them at least, as the compressor has.
    half = None if window is None else max(window // 2, 1) * decoder.tokens_per_group
    bits = -log_likelihood(decoder, content, context=half, stride=half) / torch.log(torch.tensor(2.0)).item()
    seconds = {"compress": compressed - begun, "decompress": decompressed - compressed}
    return {"report": report, "sizes": sizes, "bits": bits, "seconds": seconds, "half": half}


def page(name: str, decoder: Any, found: dict[str, Any], command: str) -> str:
    """The page of results."""
    report: Report = found["report"]
    length, best = report.tokens, min(found["sizes"].values())
    lines = ["# Held-out text, compressed", "", f"`{command}`", "", f"{machine(decoder)}", ""]
    parameters = sum(each.numel() for each in decoder.parameters())
    lines += [f"{name}: {parameters:,} parameters; {length:,} held-out bytes in one file.", ""]
    lines += ["| | bytes | bits per byte | against the best of the others |", "|---|---|---|---|"]
    named = {f"`fitformer compress`, {report.segments} segments, header included": report.compressed}
    named |= {COMPRESSORS[name]: size for name, size in found["sizes"].items()}
    lines += [row(name, size, length, best) for name, size in named.items()]
    windows = Windows.of(decoder, found["half"], found["half"])
    reading = "as one sequence" if windows is None else f"windows of {windows.context} + {windows.stride} bytes"
    lines += [row(f"the model's likelihood, {reading}", found["bits"] / 8, length, best), ""]
    excess = 8 * report.coded / report.model_bits - 1
    speeds = (f"{verb} {length / seconds:,.0f}" for verb, seconds in found["seconds"].items())
    lines += [f"The coder's bits are {excess:.4%} above those of the probabilities that it was given."]
    lines += [f"Bytes a second, {torch.get_num_threads()} threads: {', '.join(speeds)}. The original came back."]
    return "\n".join(lines) + "\n"


def row(name: str, size: float, length: int, best: int) -> str:
    """A line of the table."""
    return f"| {name} | {size:,.0f} | {8 * size / length:.3f} | {size / best - 1:+.1%} |"


def machine(decoder: Any) -> str:
    """What it ran on."""
    device = next(decoder.parameters()).device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    return f"{where}, Python {platform.python_version()}, torch {torch.__version__}"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run directory of a bytes recipe, or model folder")
    parser.add_argument("--bytes", type=int, help="take the first bytes of the held-out part (default: all)")
    parser.add_argument("--segments", type=int, help="see `fitformer compress`")
    parser.add_argument("--window", type=int, help="see `fitformer compress`")
    parser.add_argument("--checkpoint", default="last")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="write the page here too")
    arguments = parser.parse_args()
    if (arguments.run / "config.json").is_file():
        decoder, content = FITDecoder.from_pretrained(arguments.run), read(HELD_OUT)[1].numpy().tobytes()
    else:
        run = Run.open(arguments.run)
        decoder, content = run.model(arguments.checkpoint), plain_dataset(run, "test").contents()
    decoder, content = decoder.to(usable_device(arguments.device)).eval(), content[: arguments.bytes]
    given = {name: getattr(arguments, name) for name in ("bytes", "segments", "window")}
    options = [f" --{name} {value}" for name, value in given.items() if value is not None]
    found = measured(decoder, content, arguments.segments, arguments.window)
    text = page(arguments.run.name, decoder, found, f"python benchmarks/compress.py {arguments.run}{''.join(options)}")
    print(text)
    if arguments.output is not None:
        with write_atomically(arguments.output) as scratch:
            scratch.write_text(text)


if __name__ == "__main__":
    main()
