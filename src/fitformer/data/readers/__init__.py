"""Images that need not fit in memory: `open_image` reads windows of whatever file holds the pixels."""

from fitformer.data.readers.lazy import LazyImage, check_channels, open_image

__all__ = ["LazyImage", "check_channels", "open_image"]
