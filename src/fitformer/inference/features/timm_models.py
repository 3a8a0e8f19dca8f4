"""Encoders of timm by name, pretrained or with weights of one's own."""

from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from fitformer._support.suggest import suggest
from fitformer.errors import InputError, require
from fitformer.inference.features.encoder import Normalization, PatchEncoder
from fitformer.inference.identity import identity
from fitformer.models.pretrained import load_strictly

PREFIX = "timm:"


def of_timm(
    name: str,
    device: torch.device,
    *,
    weights: str | None = None,
    normalization: Normalization | None = None,
    bf16: bool = False,
) -> PatchEncoder:
    """A model of timm without its head, which gives pooled features.

    Args:
        name: as `timm.create_model` takes it. device: where it computes.
        weights: a safetensors file, loaded strictly but for the head; by default the pretrained weights, which timm
            fetches from the Hub. normalization: of pixels from 0 to 1; by default the model's own.
        bf16: in bfloat16 where that is safe.

    Raises:
        InputError: no such model, no weights for it, or weights that do not fit.
        MissingDependencyError: timm is not installed.
    """
    timm = _timm()
    if ":" not in name and not timm.is_model(name):
        raise InputError(f"timm has no model {name!r}{suggest(name, timm.list_models())}")
    try:
        model = timm.create_model(name, pretrained=weights is None, num_classes=0)
    except (RuntimeError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"timm cannot make {name} ({reason}); where it cannot fetch pretrained weights, give a file of "
            "them (weights)"
        ) from error
    if weights is not None:
        _load(model, weights)
    config = timm.data.resolve_model_data_config(model)
    channels, *size = config["input_size"]
    return PatchEncoder(
        f"{PREFIX}{name}",
        identity(model),
        model.to(device).eval(),
        channels,
        # Vision transformers have a table of positions for one size; others take patches as they are.
        (size[0], size[1]) if model.pretrained_cfg.get("fixed_input_size") else None,
        device,
        normalization or Normalization(tuple(config["mean"]), tuple(config["std"])),
        channels_first=True,
        bf16=bf16,
    )


def _timm() -> Any:
    try:
        return require("timm", extra="timm")
    except RuntimeError as error:
        # Of torchvision, which timm imports, beside a torch that it was not built for.
        reason = " ".join(str(error).split())
        raise InputError(
            f"timm cannot be imported ({reason}): install the torchvision that was built for torch {torch.__version__}"
        ) from error


def _load(model: Any, path: str) -> None:
    """Load a safetensors file into a model without a head.

    Raises:
        InputError: no such file, one that is not whole, or another model's.
    """
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a whole safetensors file ({error}); give the weights of the model") from error
    heads = model.pretrained_cfg.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    own = model.state_dict()
    kept = {key: each for key, each in state.items() if key in own or not key.startswith(tuple(f"{h}." for h in heads))}
    load_strictly(model, kept, path)
