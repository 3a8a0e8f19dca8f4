"""Measuring whole training steps: time, operations and peak memory, of one size or over many."""

from fitformer.bench.scaling import Fit, exponent, in_process, scaling
from fitformer.bench.steps import Bench, Measured, measure

__all__ = ["Bench", "Fit", "Measured", "exponent", "in_process", "measure", "scaling"]
