"""Which axes of an array are rows, columns and channels."""

from collections.abc import Sequence

from fitformer.errors import InputError


def guessed(shape: Sequence[int], path: str) -> tuple[int, int]:
    """The axes of rows and columns of an unnamed array: the shorter of its first and last axis is the channels.

    Two axes are rows and columns; leading axes of length 1 do not count.

    Raises:
        InputError: more or fewer than 2 or 3 axes that count.
    """
    extra = 0
    while len(shape) - extra > 3 and shape[extra] == 1:
        extra += 1
    if len(shape) - extra == 2:
        return extra, extra + 1
    if len(shape) - extra == 3:
        return (extra + 1, extra + 2) if shape[extra] < shape[-1] else (extra, extra + 1)
    raise InputError(f"{path} holds an array of shape {tuple(shape)}; an image has rows, columns and perhaps channels")


def named(axes: Sequence[str], shape: Sequence[int], path: str, channels: str = "csiq") -> tuple[int, int]:
    """The axes of rows (y) and columns (x) by name; the others must be channels or of length 1.

    Raises:
        InputError: no rows or columns, or several planes along another axis.
    """
    names = [axis.lower() for axis in axes]
    if names.count("y") != 1 or names.count("x") != 1:
        raise InputError(f"{path} has axes {', '.join(axes)}, and an image has one y and one x")
    for name, length in zip(names, shape, strict=True):
        if length > 1 and name not in ("y", "x", *channels):
            raise InputError(f"{path} has {length} planes along its axis {name!r}: store the plane to read by itself")
    return names.index("y"), names.index("x")
