"""Decoded tiles that neighbouring windows share, bounded in bytes."""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

import numpy as np

MOST_BYTES = 128 * 2**20
"""Of decoded tiles that a process keeps, over all its images."""


class TileCache:
    """The tiles used last, up to `most_bytes` together; a single tile larger than that is kept until the next one.

    Tiles are evicted before the next one is decoded: two pictures are not held at once.
    """

    def __init__(self, most_bytes: int = MOST_BYTES):
        self.most_bytes = most_bytes
        self.held_bytes = 0
        self._tiles: OrderedDict[Hashable, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, decode: Callable[[], np.ndarray], size: int) -> np.ndarray:
        """The tile of that key, decoded if it is not here; it has about `size` bytes."""
        with self._lock:
            if key in self._tiles:
                self._tiles.move_to_end(key)
                return self._tiles[key]
            self._make_room(size)
        # Outside the lock, so that threads decode side by side; decoding one tile twice is harmless.
        tile = decode()
        with self._lock:
            self._put(key, tile)
        return tile

    def _put(self, key: Hashable, tile: np.ndarray) -> None:
        if key in self._tiles:
            return
        self._make_room(tile.nbytes)
        self._tiles[key] = tile
        self.held_bytes += tile.nbytes

    def _make_room(self, size: int) -> None:
        while self._tiles and self.held_bytes + size > self.most_bytes:
            self.held_bytes -= self._tiles.popitem(last=False)[1].nbytes

    def drop(self, belongs: Callable[[Hashable], bool]) -> None:
        """Drop the tiles whose keys `belongs` accepts."""
        with self._lock:
            for key in [key for key in self._tiles if belongs(key)]:
                self.held_bytes -= self._tiles.pop(key).nbytes


_caches: dict[int, TileCache] = {}


def shared() -> TileCache:
    """The cache of this process. A forked process makes its own: the lock of its parent's may have been held."""
    cache = _caches.get(os.getpid())
    if cache is None:
        _caches.clear()
        cache = _caches.setdefault(os.getpid(), TileCache())
    return cache
