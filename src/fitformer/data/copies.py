"""Copies of one image: the same content, so that none lands on both sides of a split."""

import hashlib
import os
from collections import Counter
from collections.abc import Hashable, Sequence
from functools import lru_cache

import numpy as np

from fitformer.data.datasets.lazy_source import LazySource
from fitformer.data.datasets.patients import PatientSource
from fitformer.data.datasets.sources import ArraySource, FileSource, Source, Subset

# Of a file, from its start and from its end, which tell nearly all files of one size apart.
_EDGE = 4096
# Larger files are compared by pieces of so many bytes, spread evenly, instead of as a whole.
_WHOLE, _PIECES, _PIECE = 2**26, 16, 2**20


def contents(sources: Sequence[Source]) -> list[np.ndarray]:
    """A number for the content of each example of some sources, int64 (len,) each: equal numbers are equal contents.

    Files are compared by their bytes, whatever their names; those above 64 MiB by 16 pieces of 1 MiB. Sources that make
    their images have no copies.
    """
    places = [(source, index) for source in sources for index in range(len(source))]
    keys: list[Hashable] = [_look(*where, level=0) or place for place, where in enumerate(places)]
    # A closer look only at what is still alike.
    for level in (1, 2):
        counts = Counter(keys)
        for place, key in enumerate(keys):
            if counts[key] > 1 and (closer := _look(*places[place], level)) is not None:
                keys[place] = (key, closer)
    numbers: dict[Hashable, int] = {}
    found = np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)
    return np.split(found, np.cumsum([len(source) for source in sources])[:-1])


def _look(source: Source, index: int, level: int) -> Hashable | None:
    """A look at the content of an example, closer with each `level` from 0 to 2; None if there is no closer one.

    Of an example that is made when it is asked for there is none at all.
    """
    if isinstance(source, Subset):
        return _look(source.whole, int(source.indices[index]), level)
    if isinstance(source, ArraySource):
        return hashlib.blake2b(source.images[index].tobytes()).digest() if level == 0 else None
    if isinstance(source, PatientSource):
        looks = [_look(source.images, int(k), level) for k in source.members[index]]
        return None if None in looks else tuple(sorted(looks, key=repr))
    if not isinstance(source, FileSource | LazySource):
        return None
    file = source.files[index]
    if isinstance(file, bytes):
        return hashlib.blake2b(file).digest() if level == 0 else None
    try:
        about = os.stat(file)
    except OSError:
        return None
    if not os.path.isfile(file):
        return os.path.realpath(file) if level == 0 else None
    if level == 0:
        return "file", about.st_size
    return (_edges if level == 1 else _whole)(file, about.st_size, about.st_mtime_ns)


def _read(file: str, places: Sequence[int], length: int) -> bytes:
    """A digest of pieces of a file; its name, which no other has, if it cannot be read."""
    digest = hashlib.blake2b()
    try:
        with open(file, "rb", buffering=0) as stream:
            for place in places:
                stream.seek(place)
                digest.update(stream.read(length))
    except OSError:
        return file.encode(errors="surrogateescape")
    return digest.digest()


@lru_cache(maxsize=2**17)
def _edges(file: str, size: int, modified: int) -> bytes:
    return _read(file, (0, max(0, size - _EDGE)), _EDGE)


@lru_cache(maxsize=2**17)
def _whole(file: str, size: int, modified: int) -> bytes:
    if size <= _WHOLE:
        return _read(file, range(0, max(size, 1), _PIECE), _PIECE)
    return _read(file, [k * (size - _PIECE) // (_PIECES - 1) for k in range(_PIECES)], _PIECE)
