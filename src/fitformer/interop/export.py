"""Models as files that run without fitformer: ONNX, and the programs of `torch.export`.

What a file takes and gives is in it, by name: `fitformer` in the metadata of an ONNX file, `fitformer.json` in a `.pt2`
file, the same JSON. Batches are of any size, and so are the sides of images and the lengths of sequences that the model
takes at any size.
"""

import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fitformer import __version__
from fitformer._support.atomic_files import write_atomically
from fitformer._support.checks import checked
from fitformer.errors import InputError, require
from fitformer.interop._graphs import Graph, graph_of
from fitformer.interop._powers import fold_powers
from fitformer.models.base import FITModel
from fitformer.models.pretrained import difference

Description = dict[str, Any]

# Of the metadata of an ONNX file, and of a file inside a .pt2 file.
DESCRIPTION = "fitformer"
# An ONNX file is one message of at most 2 GB: the weights of larger models stand beside it.
MOST_INSIDE = 1_500_000_000


@checked
def to_exported_program(model: nn.Module) -> torch.export.ExportedProgram:
    """The program of a model's plain forward pass in float32; `program.module()` takes its inputs by name.

    Args:
        model: of any role; `to_pt2` writes what its program takes and gives.

    Raises:
        InputError: none of our models, or one that is compiled, quantised, of another precision or not on the CPU.
    """
    return _traced(model, _graph(model))


@checked
def to_pt2(model: nn.Module, path: str | Path, about: Mapping[str, Any] | None = None) -> Description:
    """Write a model as a file that `torch.export.load` reads.

    Args:
        model: of any role. path: the file.
        about: further facts for the description, such as `classes`: what JSON can hold.

    Returns:
        the description that is in the file: `role`, `version`, `config`, `inputs` and `outputs` by name, and the facts.

    Raises:
        InputError: as `to_exported_program`; a path without a known ending, or facts that JSON cannot hold.
    """
    path, graph = check_path(path, ".pt2"), _graph(model)
    description = _description(model, graph, about)
    text, program = _as_json(description), _traced(model, graph)
    with write_atomically(path) as scratch, scratch.open("wb") as file:
        torch.export.save(program, file, extra_files={f"{DESCRIPTION}.json": text})
    return description


@checked
def to_onnx(model: nn.Module, path: str | Path, about: Mapping[str, Any] | None = None) -> Description:
    """Write a model as an ONNX file; weights of more than 1.5 GB into a second one beside it, `PATH.data`.

    Args:
        model, path, about: as in `to_pt2`.

    Returns:
        the description that is in the file, as of `to_pt2`.

    Raises:
        InputError: as `to_pt2`.
        MissingDependencyError: without the extra `export`.
    """
    path = check_path(path, ".onnx")
    for package in ("onnx", "onnxscript"):
        require(package, extra="export")
    graph = _graph(model)
    description = _description(model, graph, about)
    text, shapes = _as_json(description), {name: port.named() for name, port in graph.inputs.items()}
    program = _traced(model, graph)
    with _quiet(), torch.no_grad():
        made: Any = torch.onnx.export(
            program, dynamo=True, dynamic_shapes=shapes, output_names=list(graph.outputs), verbose=False
        )
    made.model.metadata_props[DESCRIPTION] = text
    _save(made, path, apart=sum(tensor.nbytes for tensor in model.state_dict().values()) > MOST_INSIDE)
    return description


FORMATS = {".onnx": to_onnx, ".pt2": to_pt2}


@checked
def export(model: nn.Module, path: str | Path, about: Mapping[str, Any] | None = None) -> Description:
    """Write a model in the format of the path's ending: `.onnx` as `to_onnx`, `.pt2` as `to_pt2`.

    Args:
        model, path, about: as in `to_pt2`.

    Returns:
        the description that is in the file, as of `to_pt2`.

    Raises:
        InputError: another ending, or what these refuse.
    """
    path = check_path(path)
    return FORMATS[path.suffix](model, path, about)


@checked
def check_path(path: str | Path, *endings: str) -> Path:
    """Check that a path names a file of one of some formats, by default of any.

    Raises:
        InputError: its ending is none of theirs, or it is a folder.
    """
    path, names = Path(path), [f"NAME{ending}" for ending in endings or FORMATS]
    if path.suffix not in (endings or FORMATS):
        raise InputError(f"path is {path}, whose ending {path.suffix!r} names no format; give {' or '.join(names)}")
    if path.is_dir():
        raise InputError(f"path is {path}, a folder; give the name of a file, {' or '.join(names)}")
    return path


def _save(made: Any, path: Path, apart: bool) -> None:
    """Write an ONNX program, its weights apart or inside."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The graph names the file of its weights, so both are written under their own names, then moved: the graph last.
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        made.save(Path(folder, path.name), external_data=apart)
        for written in sorted(Path(folder).iterdir(), reverse=True):
            with write_atomically(path.parent / written.name) as scratch:
                os.replace(written, scratch)


def _graph(model: Any) -> Graph:
    """What is exported of a model, if it can be."""
    graph = graph_of(model)
    if any(module._compiled_call_impl is not None for module in model.modules()):
        raise InputError("model has compiled layers; export it as it is loaded from its folder")
    state = model.state_dict()
    with torch.device("meta"):
        plain = type(model).from_config(model.config).state_dict()
    # What a quantised layer holds is no tensor.
    held, wanted = ({name: tuple(getattr(each, "shape", ())) for name, each in of.items()} for of in (state, plain))
    if differing := difference(held, wanted, most=2):
        raise InputError(
            f"model has other weights than its configuration ({differing}); export it before it is changed"
        )
    if others := {str(tensor.device) for tensor in state.values()} - {"cpu"}:
        raise InputError(f"model is on {', '.join(sorted(others))}; export it from the CPU: model.cpu()")
    if others := {str(tensor.dtype) for tensor in state.values()} - {"torch.float32"}:
        raise InputError(f"model has weights of {', '.join(sorted(others))}; export it in float32: model.float()")
    return graph


def _traced(model: Any, graph: Graph) -> torch.export.ExportedProgram:
    dims: dict[str, Any] = {}
    shapes: dict[str, dict[int, Any]] = {}
    for name, port in graph.inputs.items():
        axes = port.free()
        for axis in axes.values():
            dims.setdefault(axis.name, torch.export.Dim(axis.name, min=axis.least, max=axis.most))
        shapes[name] = {k: dims[axis.name] for k, axis in axes.items()}
    examples = {name: port.example() for name, port in graph.inputs.items()}
    with _plain(model), _quiet(), torch.no_grad():
        program = torch.export.export(
            graph.module.eval(),
            (),
            examples,
            dynamic_shapes=shapes,
            strict=False,
            # What torch cannot prove of sizes that are computed from others, the program asserts.
            prefer_deferred_runtime_asserts_over_guards=True,
        )
        fold_powers(program)
    return program


def _description(model: Any, graph: Graph, about: Mapping[str, Any] | None) -> Description:
    return {
        "role": type(model).__name__,
        "version": __version__,
        "inputs": {name: port.described() for name, port in graph.inputs.items()},
        "outputs": {name: port.described() for name, port in graph.outputs.items()},
        "config": model.config,
        **(about or {}),
    }


def _as_json(description: Description) -> str:
    try:
        return json.dumps(description, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"about holds what JSON cannot ({error}); give numbers, text, lists") from None


@contextmanager
def _plain(model: FITModel) -> Iterator[None]:
    """The model run plainly, without dropout; as it was when the body ends."""
    modes = [(module, module.training) for module in model.modules()]
    ways = [(module, module.execution) for module in model.modules() if isinstance(module, FITModel)]
    model.set_execution("plain")
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for owner, execution in ways:
            owner.execution = execution


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch says of itself while it exports."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
