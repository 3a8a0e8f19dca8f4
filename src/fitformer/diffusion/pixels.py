"""Pixels 0..255 as the signal that is diffused, and back (arXiv 2301.10972, section 2.2)."""

import torch
from torch import Tensor

from fitformer._support.checks import checked


@checked
def pixels_to_signal(images: Tensor, b_scale: float = 1.0) -> Tensor:
    """Pixels 0..255, any shape, as floats in `[-1, 1] * b_scale`."""
    return (images.float() / 127.5 - 1.0) * b_scale


@checked
def signal_to_pixels(signal: Tensor, b_scale: float = 1.0) -> Tensor:
    """The nearest uint8 pixels of a signal in `[-1, 1] * b_scale`; values outside are clipped."""
    return ((signal.float() / b_scale + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
