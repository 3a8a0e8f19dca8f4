"""Encoders of patches by name: a run or saved folder, a file of an exported program, or `timm:NAME`."""

from pathlib import Path

import torch

from fitformer.data.build import open_options
from fitformer.errors import InputError
from fitformer.inference.features.encoder import Normalization, PatchEncoder
from fitformer.inference.features.exported import of_file
from fitformer.inference.features.timm_models import PREFIX, of_timm
from fitformer.inference.identity import identity
from fitformer.models.image_encoder import FITImageEncoder
from fitformer.training.run_dir import open_model

FILES = (".pt2", ".onnx")


def open_encoder(
    name: str,
    device: torch.device,
    *,
    checkpoint: str = "last",
    weights: str | None = None,
    normalization: Normalization | None = None,
    bf16: bool = False,
) -> PatchEncoder:
    """An encoder by name, on a device.

    Args:
        name: `timm:NAME`, a .pt2 or .onnx file, or the folder of a run or a saved model.
        device: where it computes. checkpoint: of a run. weights: of a model of timm, a safetensors file.
        normalization: of the pixels of a program or of timm, from 0 to 1; by default what they say themselves.
        bf16: compute in bfloat16 where that is safe.

    Raises:
        InputError: no such encoder, one that is broken, or an option that is for another kind.
        MissingDependencyError: what runs it is not installed.
    """
    is_timm, is_file = name.startswith(PREFIX), Path(name).suffix.lower() in FILES
    if weights is not None and not is_timm:
        raise InputError(f"weights are for {PREFIX}NAME, and the encoder is {name}; leave them out")
    if checkpoint != "last" and (is_timm or is_file):
        raise InputError(f"checkpoint is for a run, and the encoder is {name}; leave it out")
    if is_timm:
        return of_timm(name.removeprefix(PREFIX), device, weights=weights, normalization=normalization, bf16=bf16)
    if is_file:
        return of_file(name, device, normalization, bf16)
    if normalization is not None:
        raise InputError(f"mean and std are for exported programs and timm, and the encoder is {name}; leave them out")
    if not Path(name).is_dir():
        raise InputError(
            f"there is no encoder {name}: give the folder of a run or a saved model, a .pt2 or .onnx file, or "
            f"{PREFIX}NAME"
        )
    return of_folder(name, device, checkpoint, bf16)


def of_folder(folder: str, device: torch.device, checkpoint: str = "last", bf16: bool = False) -> PatchEncoder:
    """The image encoder of a run or a saved folder; its features are those that its head takes.

    Raises:
        InputError: neither of them, another role, or weights that do not fit.
    """
    model, run = open_model(folder, checkpoint)
    if not isinstance(model, FITImageEncoder):
        raise InputError(f"{folder} holds a {type(model).__name__}, and patches are encoded by a FITImageEncoder")
    digest = identity(model)
    model.reset_classifier(0)
    model.set_execution("plain")
    model.to(device).eval()
    size = model.patch_grid.image_size
    return PatchEncoder(
        name=folder,
        digest=digest,
        run=model,
        channels=model.patch_grid.channels,
        size=size,  # type: ignore[arg-type]
        device=device,
        trained=None if run is None else run.pixels,
        pixel_range=None if run is None else open_options(run.recipe.data).pixel_range,  # type: ignore[arg-type]
        bf16=bf16,
    )
