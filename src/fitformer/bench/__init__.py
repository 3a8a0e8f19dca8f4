"""Measuring whole training steps: time, operations and peak memory, of one size or over many."""

from fitformer.bench.scaling import Fit, exponent, scaling
from fitformer.bench.steps import Bench, Measured, measure

__all__ = ["Bench", "Fit", "Measured", "exponent", "measure", "scaling"]
