"""A trained model of slides as a slide encoder of TRIDENT (https://github.com/mahmoodlab/TRIDENT).

Its pipeline calls an encoder with a batch of one slide, features (1, N, D), coordinates (1, N, 2) and the attributes of
the coordinates, and a device, and writes the embedding that it gives.
"""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fitformer._support.checks import checked
from fitformer.data.readers.area_resize import average
from fitformer.data.readers.features import COORDS, FEATURES, open_features
from fitformer.data.readers.levels import OpenOptions
from fitformer.errors import InputError
from fitformer.models.image_encoder import FITImageEncoder
from fitformer.training.run_dir import open_model


@checked
def slide_encoder(
    source: str | Path, name: str = "fitformer", *, patch_encoder: str | None = None, checkpoint: str = "last"
) -> nn.Module:
    """A slide encoder of TRIDENT: a subclass of its `BaseSlideEncoder` where TRIDENT is installed, else alike.

    Its embedding of a slide is what the model's head takes, (1, `embedding_dim`).

    Args:
        source: the folder of a run on features of patches, or of its saved model.
        name: `enc_name`, under which TRIDENT writes its embeddings.
        patch_encoder: TRIDENT's name of the encoder of the patches, whose features its pipeline gives to this one.
        checkpoint: of a run, as `Run.model`.

    Raises:
        InputError: neither of them, another role, or a model of images of one size.
    """
    installed = _installed()
    if installed is not None and patch_encoder is not None:
        installed.slide_to_patch_encoder_name[name] = patch_encoder
    base = _Base if installed is None else installed.BaseSlideEncoder
    kind = type("FITSlideEncoder", (_Embedding, base), {})
    return kind(source=source, name=name, checkpoint=checkpoint)


def _installed() -> Any:
    """TRIDENT's module of slide encoders; None without TRIDENT."""
    try:
        return importlib.import_module("trident.slide_encoder_models.load")
    except ModuleNotFoundError as error:
        # Another package has its name, too. An installed TRIDENT whose own imports fail is not missing.
        if error.name is None or error.name.split(".")[0] != "trident":
            raise
        return None


class _Base(nn.Module):
    """What TRIDENT's `BaseSlideEncoder` does when it is made."""

    def __init__(self, **build: Any) -> None:
        super().__init__()
        self.enc_name: str | None = None
        self.model, self.precision, self.embedding_dim = self._build(**build)  # type: ignore[operator]
        self.model.requires_grad_(False).eval()


class _Embedding:
    """How a slide encoder is built and called, whatever its base."""

    def _build(self, source: str | Path, name: str, checkpoint: str) -> tuple[nn.Module, torch.dtype, int]:
        model, _ = open_model(source, checkpoint)
        if not isinstance(model, FITImageEncoder) or not model.patch_grid.any_size:
            raise InputError(
                f"{source} holds a {type(model).__name__}, and slides are encoded by a FITImageEncoder of images of "
                "any size (image_size null)"
            )
        model.reset_classifier(0)
        self.enc_name = name
        return model, torch.float32, model.num_features

    def forward(self, batch: Mapping[str, Any], device: str | torch.device = "cuda") -> Tensor:
        """The embedding (1, `embedding_dim`) of a slide.

        Args:
            batch: `features` (1, N, D) and `coords` (1, N, 2), tensors, and `attributes` of the coordinates.
            device: where the model is put.

        Raises:
            InputError: more than one slide, or what `open_image` refuses of a file with these arrays.
            EmptyImageError: no patches.
        """
        model: FITImageEncoder = self.model  # type: ignore[attr-defined]
        arrays = {
            FEATURES: _Array(batch["features"].float().cpu().numpy(), {}),
            COORDS: _Array(_one(batch["coords"]).cpu().numpy(), batch.get("attributes", {})),
        }
        return model.to(device)([_Slide(arrays)])


def _one(coords: Tensor) -> Tensor:
    """The coordinates (N, 2) of a batch of one slide, of which features (1, N, D) are read as they are."""
    return coords[0] if coords.ndim == 3 and len(coords) == 1 else coords


class _Array:
    """An array in memory as one of a file."""

    chunks = None

    def __init__(self, values: np.ndarray, attributes: Mapping[str, Any]) -> None:
        self.values, self.attrs = values, attributes
        self.shape, self.dtype = values.shape, values.dtype

    def __getitem__(self, where: Any) -> np.ndarray:
        return self.values[where]


class _Slide:
    """The patches of a slide in memory as an image, as `open_image` makes one of a file."""

    path = "the batch"

    def __init__(self, arrays: Mapping[str, _Array]) -> None:
        opened = open_features(self.path, arrays, OpenOptions())
        self.level, self.presence, self.nodata = opened.levels[0], opened.presence, opened.nodata

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.level.shape

    @property
    def dtype(self) -> np.dtype:
        return self.level.dtype

    def window(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        return self.level.window(top, left, height, width)

    def thumbnail(self, rows: int, columns: int) -> np.ndarray:
        return average(self.level, rows, columns)
