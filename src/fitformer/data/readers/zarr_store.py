"""A Zarr folder whose chunks are looked at before they are decoded: a few kilobytes may inflate to gigabytes."""

import bz2
import lzma
import zlib
from typing import Any

from zarr.storage import LocalStore

from fitformer.errors import InputError

# What a chunk may have beyond its pixels: headers, and the checksums of filters.
_SPARE = 2**16
_ZSTD = b"\x28\xb5\x2f\xfd"
# Deflate makes at most so many bytes of one.
_DEFLATE_RATIO = 1032


class BoundedStore(LocalStore):
    """A folder that is read; `bound` it once the array that it holds is known."""

    def __init__(self, path: str):
        super().__init__(path, read_only=True)
        self._bounds: dict[str, tuple[str, int]] = {}

    def bound(self, array: Any) -> None:
        """Refuse chunks of an array that say that they decode to more bytes than its chunks have."""
        codecs = [type(codec).__name__.removesuffix("Codec").lower() for codec in array.compressors]
        if codecs:
            chunk = array.dtype.itemsize
            for length in array.chunks:
                chunk *= length
            self._bounds[f"{array.path}/" if array.path else ""] = codecs[-1], chunk + _SPARE

    async def get(self, key: str, prototype: Any = None, byte_range: Any = None) -> Any:
        """The bytes of a file, or part of them.

        Raises:
            InputError: they are a chunk that would inflate to more than its pixels.
        """
        found = await super().get(key, prototype, byte_range)
        if found is not None and not key.endswith((".json", ".zarray", ".zattrs", ".zgroup", ".zmetadata")):
            for prefix, (codec, most) in self._bounds.items():
                if key.startswith(prefix) and inflates_beyond(found.to_bytes(), codec, most):
                    raise InputError(
                        f"{self.root}/{key} inflates to more than the {most:,} bytes that a chunk of its array can have"
                    )
        return found


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
