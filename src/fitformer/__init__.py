"""FIT, Far-reaching Interleaved Transformers (Chen and Li, arXiv 2305.12689), in PyTorch.

"Spec section N" in a docstring is a section of docs/spec/fit.md.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fitformer.inference.predictor import Predictor
    from fitformer.models.auto import from_pretrained
    from fitformer.models.decoder import FITDecoder
    from fitformer.models.denoiser import FITDenoiser
    from fitformer.models.encoder import FITEncoder
    from fitformer.models.image_denoiser import FITImageDenoiser
    from fitformer.models.image_encoder import FITImageEncoder
    from fitformer.models.image_segmenter import FITImageSegmenter

__version__ = "0.1.0"
__all__ = [
    "FITDecoder",
    "FITDenoiser",
    "FITEncoder",
    "FITImageDenoiser",
    "FITImageEncoder",
    "FITImageSegmenter",
    "Predictor",
    "from_pretrained",
    "generate",
]

_HOMES = {
    "FITDecoder": "fitformer.models.decoder",
    "FITDenoiser": "fitformer.models.denoiser",
    "FITEncoder": "fitformer.models.encoder",
    "FITImageDenoiser": "fitformer.models.image_denoiser",
    "FITImageEncoder": "fitformer.models.image_encoder",
    "FITImageSegmenter": "fitformer.models.image_segmenter",
    "Predictor": "fitformer.inference.predictor",
    "from_pretrained": "fitformer.models.auto",
    "generate": "fitformer.models.auto",
}
_ROOMS = {"diffusion", "execution", "generation", "models", "patching"}


def __getattr__(name: str) -> Any:
    # torch takes seconds to import; the command line's --help must not wait for it.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"fitformer.{name}")
    if name == "official":
        return importlib.import_module("fitformer.interop.official")
    raise AttributeError(f"module 'fitformer' has no attribute {name!r}")
