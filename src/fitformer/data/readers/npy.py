"""Arrays that numpy saved (.npy), read window by window from where they lie in the file."""

import os

import numpy as np

from fitformer.data.readers.axes import guessed
from fitformer.data.readers.errors import readable
from fitformer.data.readers.levels import MemmapLevel, OpenImage, OpenOptions
from fitformer.errors import InputError


def open_npy(path: str, options: OpenOptions) -> OpenImage:
    """Open an array (H, W), (H, W, ch) or (ch, H, W); the shorter end axis is the channels.

    Only windows are ever held, whatever `most_bytes` of the options is.

    Raises:
        InputError: not an array file, a truncated one, or one that is no image.
    """
    with readable(path), open(path, "rb") as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, by_columns, dtype = read(stream)
        offset = stream.tell()
    if dtype.hasobject or dtype.names:
        raise InputError(f"{path} holds {dtype} and not numbers: save an array of uint8, uint16 or float32")
    order = guessed(shape, path)
    there, needed = os.path.getsize(path), offset + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if there < needed:
        raise InputError(f"{path} is truncated: its array ends at byte {needed:,} and the file at byte {there:,}")
    return OpenImage([MemmapLevel(path, dtype, offset, shape, order, "F" if by_columns else "C")])
