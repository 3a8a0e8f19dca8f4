"""Arrays of any size: in memory, or, where they are large, in a file without a name."""

from math import prod
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np

IN_MEMORY = 2**28
_ROWS_AT_ONCE = 2**24


def scratch_array(shape: tuple[int, ...], fill: int, folder: str | Path | None = None) -> np.ndarray:
    """Bytes of a shape, all of them `fill`; above 256 MiB in a file, whose pages the system takes back as it needs.

    Args:
        shape: of the array. fill: a byte.
        folder: of the file; the system's folder for temporary files by default.

    Raises:
        OSError: the folder has no room.
    """
    if prod(shape) <= IN_MEMORY:
        return np.full(shape, fill, dtype=np.uint8)
    with TemporaryFile(dir=folder) as file:
        rest = prod(shape)
        while rest:
            # Written, not only reserved: that the disk is full shows here, and not as a bus error later.
            rest -= file.write(bytes([fill]) * min(rest, _ROWS_AT_ONCE))
        file.flush()
        return np.memmap(file, dtype=np.uint8, mode="r+", shape=shape)
