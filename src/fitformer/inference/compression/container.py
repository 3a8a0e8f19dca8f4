"""The compressed file: a header that says what is needed to read it, the range coder's words, a checksum of it all.

In order: `MAGIC`, the version (1 byte), the length of the header (4 bytes), the header (JSON, deflated), the words (4
bytes each), and a checksum of everything before it (16 bytes). Numbers are little-endian.
"""

import json
import struct
import zlib
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fitformer._support.checks import check_fields
from fitformer._support.json_text import parse_json
from fitformer.data.datasets.text import whole_file
from fitformer.errors import InputError

# The first byte is no text, and the ends of lines show a transfer that changed them.
MAGIC = b"\x89FITZ\r\n\n"
VERSION = 1
CHECKSUM_BYTES = 16
MOST_SEGMENTS, MOST_THREADS = 2**16, 2**12
_START = struct.Struct("<8sBI")
_MOST_HEADER = 2**20


@dataclass(frozen=True)
class Header:
    """What decompression must know and check.

    Attributes:
        length: tokens of the original. segments: rows that it was cut into.
        window: most groups of context, None for as many as the decoder has.
        threads: of torch, which decide the order of its sums.
        content: checksum of the original. model: of the decoder's weights and configuration.
        numbers: checksum of the first probabilities, which another machine may compute otherwise.
        environment: what else decides the bits of a probability, by name.
    """

    length: int
    segments: int
    window: int | None
    threads: int
    content: str
    model: str
    numbers: str
    environment: dict

    def __post_init__(self) -> None:
        check_fields(self)


def checksum(*parts: bytes) -> bytes:
    """The checksum of some bytes, `CHECKSUM_BYTES` long."""
    digest = blake2b(digest_size=CHECKSUM_BYTES)
    for part in parts:
        digest.update(part)
    return digest.digest()


def write(file: BinaryIO, header: Header, words: np.ndarray) -> int:
    """Write a compressed file of words, uint32; returns its size in bytes."""
    packed = zlib.compress(json.dumps(asdict(header), separators=(",", ":")).encode(), 9)
    parts = [_START.pack(MAGIC, VERSION, len(packed)), packed, words.astype("<u4").tobytes()]
    return sum(file.write(part) for part in [*parts, checksum(*parts)])


def read(path: Path) -> tuple[Header, np.ndarray]:
    """The header and the words, uint32, of a compressed file.

    Raises:
        InputError: it is no compressed file, damaged, cut off, or of another version.
    """
    file = whole_file(path)
    content = file.window(0, len(file)).tobytes()
    if not content.startswith(MAGIC[: len(content)]) or not content:
        raise InputError(f"{path} is no file that `fitformer compress` wrote: it does not begin as they do")
    body, found = content[:-CHECKSUM_BYTES], content[-CHECKSUM_BYTES:]
    if len(body) < _START.size or checksum(body) != found:
        raise InputError(
            f"{path} is damaged or cut off: its checksum is not that of its {len(content)} bytes; get it again"
        )
    _, version, size = _START.unpack_from(body)
    if version != VERSION:
        raise InputError(f"{path} has version {version} of the format, and this fitformer reads version {VERSION}")
    words = body[_START.size + size :]
    return _header(path, body[_START.size : _START.size + size]), np.frombuffer(words, "<u4").astype(np.uint32)


def _header(path: Path, packed: bytes) -> Header:
    try:
        text = zlib.decompressobj().decompress(packed, _MOST_HEADER)
        header = Header(**parse_json(text))
        _check(header.length >= 0 and 1 <= header.threads <= MOST_THREADS)
        _check(1 <= header.segments <= min(max(header.length, 1), MOST_SEGMENTS))
        _check(header.window is None or header.window >= 1)
    except (ValueError, TypeError, zlib.error) as error:
        raise InputError(f"{path} has a header that means nothing here ({_first_line(error)})") from error
    return header


def _check(holds: bool) -> None:
    if not holds:
        raise ValueError("numbers out of range")


def _first_line(error: Any) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
