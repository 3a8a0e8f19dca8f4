"""Sampling tokens from an autoregressive decoder."""

from fitformer.generation.decode import Decoder, Step, context_start, generate, uncached
from fitformer.generation.logits import draw, filter_logits

__all__ = ["Decoder", "Step", "context_start", "draw", "filter_logits", "generate", "uncached"]
