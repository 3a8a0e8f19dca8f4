"""Images that need not fit in memory: `open_image` reads windows of whatever file holds the pixels."""

from fitformer.data.readers.lazy import LazyImage, check_channels, open_image
from fitformer.data.readers.writing import to_tiled_tiff, write_tiled_tiff

__all__ = ["LazyImage", "check_channels", "open_image", "to_tiled_tiff", "write_tiled_tiff"]
