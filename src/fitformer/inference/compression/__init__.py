"""Lossless compression of files by an autoregressive decoder and a range coder."""

from fitformer.inference.compression.codec import Report, compress, decompress

__all__ = ["Report", "compress", "decompress"]
