"""Encoders that were exported to a file: programs of torch.export (.pt2), and ONNX (.onnx) by onnxruntime.

A file that `fitformer export` wrote says itself what it takes. Any other takes normalised pixels, and gives features
(b, D) as its first output.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export.passes import move_to_device_pass

from fitformer._support.json_text import parse_json
from fitformer.data.pixels import MODES
from fitformer.data.readers.errors import readable
from fitformer.errors import InputError, require
from fitformer.inference.features.encoder import Normalization, PatchEncoder, Size
from fitformer.interop.export import DESCRIPTION


@dataclass(frozen=True)
class Program:
    """What a file holds.

    Attributes:
        run: its first output, of its input in its own layout.
        shape: of the input; None for an axis of any length.
        about: the description of a file that `fitformer export` wrote.
    """

    run: Callable[[Tensor], Any]
    shape: tuple[int | None, ...]
    about: dict[str, Any] | None


def of_file(
    path: str, device: torch.device, normalization: Normalization | None = None, bf16: bool = False
) -> PatchEncoder:
    """The encoder in a file, whose pixels are normalised as is given, as a JSON file beside it says, or as its own.

    Args:
        path: ends in .pt2 or .onnx; beside `encoder.onnx`, `encoder.json` may hold `mean` and `std`.
        device: where it computes. normalization: of pixels from 0 to 1. bf16: in bfloat16 where that is safe.

    Raises:
        InputError: no such file, one that is broken or takes something else than images, or no normalisation known.
        MissingDependencyError: onnxruntime is not installed.
    """
    if not Path(path).is_file():
        raise InputError(f"there is no file {path}: give an encoder's .pt2 or .onnx file")
    is_onnx = Path(path).suffix.lower() == ".onnx"
    if is_onnx and bf16:
        raise InputError(f"{path} computes as it was exported, and precision is bf16; leave it at 32")
    with readable(path):
        program = _onnx(path, device) if is_onnx else _pt2(path, device)
    channels, size, first = _layout(path, program.shape)
    if program.about is not None:
        _check_description(path, program.about)
        if normalization is not None:
            raise InputError(f"{path} was exported by fitformer and knows its pixels; leave mean and std out")
    else:
        normalization = normalization or _beside(Path(path))
    return PatchEncoder(
        path,
        _digest(path),
        _in_batches(program.run, program.shape[0]),
        channels,
        size,
        device,
        normalization,
        channels_first=first,
        bf16=bf16,
    )


def _digest(path: str) -> str:
    """Of a program, and of the file of its weights that may stand beside it."""
    found = []
    for each in (path, f"{path}.data"):
        if os.path.isfile(each):
            with open(each, "rb") as file:
                found.append(hashlib.file_digest(file, "sha256").hexdigest())
    return " ".join(found)


def _pt2(path: str, device: torch.device) -> Program:
    files = {f"{DESCRIPTION}.json": ""}
    program = torch.export.load(path, extra_files=files)
    names = program.graph_signature.user_inputs
    if len(names) != 1 or program.example_inputs is None:
        raise InputError(f"{path} takes {len(names)} inputs, and an encoder of patches takes one")
    value = next(node.meta["val"] for node in program.graph.nodes if node.name == names[0])
    keywords = list(program.example_inputs[1])
    if device.type != "cpu":
        # Tensors that the program makes are on the device that it was traced on.
        program = move_to_device_pass(program, device)
    module = program.module()

    def run(pixels: Tensor) -> Any:
        found = module(**{keywords[0]: pixels}) if keywords else module(pixels)
        return found[0] if isinstance(found, tuple | list) else found

    shape = tuple(side if isinstance(side, int) else None for side in value.shape)
    said = files[f"{DESCRIPTION}.json"]
    return Program(run, shape, parse_json(said) if said else None)


def _onnx(path: str, device: torch.device) -> Program:
    # Else it writes under the home folder.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    onnxruntime = require("onnxruntime", extra="export")
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"][device.type != "cuda" :]
    if missing := set(providers) - set(onnxruntime.get_available_providers()):
        raise InputError(
            f"onnxruntime has no {missing.pop()} here, and the device is {device}; take the device cpu, or install "
            "onnxruntime-gpu"
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=providers)
    inputs = session.get_inputs()
    kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    if len(inputs) != 1 or inputs[0].type not in kinds:
        takes = ", ".join(f"{each.name} {each.type}" for each in inputs)
        raise InputError(f"{path} takes {takes}, and an encoder of patches takes one input of floats")
    name, kind, output = inputs[0].name, kinds[inputs[0].type], session.get_outputs()[0].name

    def run(pixels: Tensor) -> Tensor:
        (found,) = session.run([output], {name: pixels.cpu().numpy().astype(kind, copy=False)})
        return torch.from_numpy(found)

    shape = tuple(side if isinstance(side, int) else None for side in inputs[0].shape)
    said = session.get_modelmeta().custom_metadata_map.get(DESCRIPTION)
    return Program(run, shape, parse_json(said) if said else None)


def _layout(path: str, shape: Sequence[int | None]) -> tuple[int, Size | None, bool]:
    """Channels, rows and columns if they are fixed, and whether channels come first."""
    if len(shape) != 4:
        raise InputError(f"{path} takes an input of {len(shape)} axes, and pixels are (b, channels, rows, columns)")
    first = shape[1] is not None and not (shape[1] not in MODES and shape[3] in MODES)
    channels, sides = (shape[1], shape[2:]) if first else (shape[3], shape[1:3])
    if channels is None:
        raise InputError(f"{path} takes any number of channels; export it with the number that it is for")
    rows, columns = sides
    return channels, None if rows is None or columns is None else (rows, columns), first


def _check_description(path: str, about: Any) -> None:
    outputs = about.get("outputs", {}) if isinstance(about, dict) else {}
    if "features" not in outputs:
        raise InputError(
            f"{path} is an exported {about.get('role') if isinstance(about, dict) else 'file'} that gives "
            f"{', '.join(outputs) or 'nothing'}, not features: give the run or the saved folder that it was made from"
        )


def _beside(path: Path) -> Normalization:
    """The normalisation in the JSON file of a program's name."""
    beside = path.with_suffix(".json")
    if not beside.is_file():
        raise InputError(
            f"{path} does not say how its pixels are normalised: give mean and std, of pixels from 0 to 1, or write "
            f'them into {beside} as {{"mean": [...], "std": [...]}}'
        )
    try:
        said = parse_json(beside.read_text(encoding="utf-8"))
        mean, std = (tuple(float(each) for each in said[name]) for name in ("mean", "std"))
    except (ValueError, TypeError, LookupError) as error:
        example = json.dumps({"mean": [0.5] * 3, "std": [0.5] * 3})
        raise InputError(f"{beside} does not hold a mean and a std a channel, such as {example}") from error
    return Normalization(mean, std)


def _in_batches(run: Callable[[Tensor], Any], size: int | None) -> Callable[[Tensor], Any]:
    """A program that takes batches of one size, given batches of any: the last is filled up."""
    if size is None:
        return run

    def whole(pixels: Tensor) -> Tensor:
        short = -len(pixels) % size
        filled = torch.cat([pixels, pixels[-1:].expand(short, -1, -1, -1)]) if short else pixels
        return torch.cat([run(part) for part in filled.split(size)])[: len(pixels)]

    return whole
