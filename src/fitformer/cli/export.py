"""Write a model as a file that runs without fitformer: ONNX by the ending .onnx, a torch.export program by .pt2.

The file says what it takes and gives, by name and shape, and how its inputs are prepared.

fitformer export runs/digits-classify --output digits.onnx
fitformer export runs/digits-diffuse/model --output denoiser.pt2
"""

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fitformer.cli.options import add_checkpoint

if TYPE_CHECKING:
    from fitformer.models.base import FITModel
    from fitformer.training.run_dir import Run

# What a recipe says of how its data are prepared for the model.
PREPARED = (
    *("image_size", "resize", "channels", "pixel_range", "levels", "sample_rate"),
    *("background", "background_patches", "min_foreground"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `fitformer export`."""
    parser.add_argument("model", help="run directory, or folder of a saved model of any role")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="NAME.onnx or NAME.pt2")
    add_checkpoint(parser)


def run(arguments: argparse.Namespace) -> int:
    """Export, and print what the file takes and gives."""
    from fitformer.interop.export import check_path, export

    path = check_path(arguments.output)
    model, about = load(Path(arguments.model), arguments.checkpoint)
    said = export(model, path, about)
    print(f"{path}: {said['role']}, {_ports(said['inputs'])} -> {_ports(said['outputs'])}")
    return 0


def load(folder: Path, checkpoint: str = "last") -> "tuple[FITModel, dict[str, Any]]":
    """The model of a run or of a model folder, and what the run says of its data.

    Raises:
        InputError: as `open_model`.
    """
    from fitformer.training.run_dir import open_model

    model, run = open_model(folder, checkpoint)
    return model, {} if run is None else _about(run, model)


def _about(run: "Run", model: Any) -> dict[str, Any]:
    data = {name: value for name, value in asdict(run.recipe.data).items() if name in PREPARED}
    names: dict[str, Any] = {}
    if getattr(model, "num_classes", 0) and run.classes:
        names["classes"] = list(run.classes)
    if columns := getattr(run.recipe.data, "number_columns", None):
        names["targets"] = list(columns.names)
    # Where the intervals end of whose hazards the outputs are.
    if (cuts := getattr(getattr(model, "head", None), "cuts", None)) is not None:
        names["cuts"] = cuts.tolist()
    return {"task": run.recipe.task, **names, "data": data, "objective": asdict(run.recipe.objective)}


def _ports(ports: Mapping[str, Mapping[str, Any]]) -> str:
    """Names, types and shapes in a line."""
    return ", ".join(
        f"{name} {port['dtype']} ({', '.join(map(str, port['shape']))}{',' * (len(port['shape']) == 1)})"
        for name, port in ports.items()
    )
