"""Sampling tokens from an autoregressive decoder."""

from fitformer.generation.decode import *  # noqa: F403
