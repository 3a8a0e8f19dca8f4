"""Which axes of an array are rows, columns and channels."""

from collections.abc import Sequence

from fitformer.errors import InputError

# Axes of channels, by the letters and words that TIFF, OME, xarray and others have for them.
CHANNELS = frozenset("csiqeb") | {
    *("channel", "channels", "band", "bands", "sample", "samples", "wavelength", "wavelengths", "spectral", "spectrum")
}
# Axes of images, of which one would have to be chosen: time, depth, and letters of microscopes (angle, phase, ...).
STACKS = frozenset("tzmpahvlr") | {
    *("time", "times", "date", "frame", "frames", "step", "depth", "height", "altitude", "level", "lev", "plev"),
    *("pressure", "plane", "slice", "member", "ensemble", "realization", "angle", "phase", "position", "scene", "view"),
}


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


def named(axes: Sequence[str], shape: Sequence[int], path: str) -> tuple[int, int]:
    """The axes of rows (y) and columns (x) by name; the others must be channels or of length 1.

    A name that is known neither as channels nor as a stack of images is channels if it is the only other axis.

    Raises:
        InputError: no rows or columns, or several planes along an axis that is no channels.
    """
    names = [axis.lower() for axis in axes]
    if names.count("y") != 1 or names.count("x") != 1:
        raise InputError(f"{path} has axes {', '.join(axes)}, and an image has one y and one x")
    several = {name: length for name, length in zip(names, shape, strict=True) if length > 1 and name not in ("y", "x")}
    for name, length in several.items():
        if name not in CHANNELS and (name in STACKS or len(several) > 1):
            raise InputError(f"{path} has {length} planes along its axis {name!r}: store the plane to read by itself")
    return names.index("y"), names.index("x")
