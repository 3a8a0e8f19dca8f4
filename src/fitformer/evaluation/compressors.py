"""What general compressors at their strongest make of the same bytes: the marks beside a model's likelihood."""

import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from fitformer.data.datasets.text import ByteBuffer
from fitformer.errors import require

# Bytes that are read at a time.
PIECE = 2**20
_GZIP = zlib.MAX_WBITS | 16


def compressed_sizes(source: ByteBuffer) -> Iterator[tuple[str, int]]:
    """Bytes that `gzip -9`, `xz -9e` and `zstd --ultra -22` need, under the names `gzip`, `xz` and `zstd`.

    Read piece by piece, once for each.

    Raises:
        MissingDependencyError: zstandard is not installed.
        InputError: a file has become shorter.
    """
    zstandard = require("zstandard", "compress")
    made: dict[str, Callable[[], Any]] = {
        "gzip": lambda: zlib.compressobj(9, zlib.DEFLATED, _GZIP),
        "xz": lambda: lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME),
        "zstd": lambda: zstandard.ZstdCompressor(level=22).compressobj(size=len(source)),
    }
    for name, make in made.items():
        compressor = make()
        pieces = (source.window(start, start + PIECE).tobytes() for start in range(0, len(source), PIECE))
        size = sum(len(compressor.compress(piece)) for piece in pieces)
        yield name, size + len(compressor.flush())
