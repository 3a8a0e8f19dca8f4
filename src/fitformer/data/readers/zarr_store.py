"""A Zarr folder whose chunks are looked at before they are decoded: a few kilobytes may inflate to gigabytes."""

import bz2
import lzma
import zlib
from math import prod
from typing import Any

from fitformer.errors import InputError, require

# What a chunk may have beyond its pixels: headers, and the checksums of filters.
_SPARE = 2**16
_METADATA = (".json", ".zarray", ".zattrs", ".zgroup", ".zmetadata")
_ZSTD = b"\x28\xb5\x2f\xfd"
# Deflate makes at most so many bytes of one.
_DEFLATE_RATIO = 1032


def open_store(path: str) -> Any:
    """A store of Zarr's for a folder that is read; `bound` it for each array that is read from it.

    A chunk of such an array that would inflate to more than its pixels is an InputError.
    """
    storage = require("zarr.storage", extra="gigapixel")

    # Zarr need not be installed to import this module.
    class BoundedStore(storage.LocalStore):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__(path, read_only=True)
            self.bounds: dict[str, tuple[str, int]] = {}

        def bound(self, array: Any) -> None:
            codecs = [type(codec).__name__.removesuffix("Codec").lower() for codec in array.compressors]
            if codecs:
                most = prod(array.chunks) * array.dtype.itemsize + _SPARE
                self.bounds[f"{array.path}/" if array.path else ""] = codecs[-1], most

        async def get(self, key: str, prototype: Any = None, byte_range: Any = None) -> Any:
            found = await super().get(key, prototype, byte_range)
            if found is not None and not key.endswith(_METADATA):
                for prefix, (codec, most) in self.bounds.items():
                    if key.startswith(prefix) and inflates_beyond(found.to_bytes(), codec, most):
                        raise InputError(
                            f"{path}/{key} inflates to more than the {most:,} bytes that a chunk of its array can have"
                        )
            return found

    return BoundedStore()


def inflates_beyond(data: bytes, codec: str, most: int) -> bool:
    """Whether compressed bytes decode to more than `most`, by what their header says or by decoding so many.

    Codecs that are not known here do not.
    """
    if codec == "blosc":
        return len(data) >= 16 and int.from_bytes(data[4:8], "little") > most
    if codec == "lz4":
        return len(data) >= 4 and int.from_bytes(data[:4], "little") > most
    if codec == "zstd":
        return _zstd_size(data) > most
    if codec in ("gzip", "zlib"):
        return len(data) * _DEFLATE_RATIO > most and _decodes_beyond(lambda: zlib.decompressobj(47), data, most)
    if codec in ("bz2", "lzma"):
        return _decodes_beyond({"bz2": bz2.BZ2Decompressor, "lzma": lzma.LZMADecompressor}[codec], data, most)
    return False


def _zstd_size(data: bytes) -> int:
    """The size that the header of the first frame says; 0 if it says none."""
    if len(data) < 18 or data[:4] != _ZSTD:
        return 0
    flags = data[4]
    single = flags >> 5 & 1
    start = 5 + (1 - single) + (0, 1, 2, 4)[flags & 3]
    length = (single, 2, 4, 8)[flags >> 6]
    return int.from_bytes(data[start : start + length], "little") + (256 if length == 2 else 0)


def _decodes_beyond(decoder: Any, data: bytes, most: int) -> bool:
    made = 0
    while data and made <= most:
        stream = decoder()
        try:
            made += len(stream.decompress(data, most + 1 - made))
        except (zlib.error, OSError, lzma.LZMAError):
            # Broken: its decoder says how.
            return False
        data = stream.unused_data if stream.eof else b""
    return made > most
