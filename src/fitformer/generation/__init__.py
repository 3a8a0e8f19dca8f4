"""Generating tokens with an autoregressive decoder: a cache, options as in transformers, streaming."""

from fitformer.generation.cached_decoder import CachedDecoder, DecodingState
from fitformer.generation.config import GenerationConfig
from fitformer.generation.decode import LogitsProcessor, StoppingCriterion, Streamer, generate, stream
from fitformer.generation.logits import draw, filter_logits, likeliest, penalize_repetition
from fitformer.generation.steps import Cached, Decoder, Step, Uncached, context_start
from fitformer.generation.text_streamer import TextStreamer

__all__ = [
    "Cached",
    "CachedDecoder",
    "Decoder",
    "DecodingState",
    "GenerationConfig",
    "LogitsProcessor",
    "Step",
    "StoppingCriterion",
    "Streamer",
    "TextStreamer",
    "Uncached",
    "context_start",
    "draw",
    "filter_logits",
    "generate",
    "likeliest",
    "penalize_repetition",
    "stream",
]
