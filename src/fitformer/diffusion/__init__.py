"""Continuous-time diffusion as free functions on tensors.

`process`: noise levels as scales (alpha, sigma), predictions; `schedules`: gamma(t); `objectives`: training;
`samplers`: sampling; `pixels`: images as signals.

Time `t` runs in [0, 1]; `gamma(t)` falls from 1 (data) to 0 (noise), and `x_t = sqrt(gamma) x0 + sqrt(1 - gamma) eps`.
The denoiser's time input is gamma, not t. Tensors are `(b, ...)` with any further axes; gammas are `(b,)`, or of a
shape that broadcasts.
"""

from fitformer._support.rng import seeded_noise
from fitformer.diffusion.objectives import (
    drop_condition,
    loss,
    normalize,
    self_condition_half,
    self_condition_masked,
)
from fitformer.diffusion.pixels import pixels_to_signal, signal_to_pixels
from fitformer.diffusion.process import (
    PREDICTIONS,
    Clip,
    Denoise,
    DiffusionConfig,
    Level,
    Prediction,
    Process,
    VariancePreserving,
    add_noise,
    predict,
    target,
)
from fitformer.diffusion.samplers import SAMPLERS, Noise, Sampler, guided, sample, times, transition
from fitformer.diffusion.schedules import SCHEDULES, gamma

__all__ = [
    "PREDICTIONS",
    "SAMPLERS",
    "SCHEDULES",
    "Clip",
    "Denoise",
    "DiffusionConfig",
    "Level",
    "Noise",
    "Prediction",
    "Process",
    "Sampler",
    "VariancePreserving",
    "add_noise",
    "drop_condition",
    "gamma",
    "guided",
    "loss",
    "normalize",
    "pixels_to_signal",
    "predict",
    "sample",
    "seeded_noise",
    "self_condition_half",
    "self_condition_masked",
    "signal_to_pixels",
    "target",
    "times",
    "transition",
]
