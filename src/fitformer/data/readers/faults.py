"""One clear error for whatever a library raises at a broken file."""

import errno
import lzma
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import UnidentifiedImageError

from fitformer.errors import InputError

# What libraries raise at files that are not what they seem: for want of checks, all kinds of things.
_BROKEN: tuple[type[Exception], ...] = (
    *(OSError, SyntaxError, ValueError, RuntimeError, EOFError, LookupError, TypeError, AttributeError),
    *(struct.error, zlib.error, lzma.LZMAError),
)
# The machine's trouble, not the file's: calling the file broken would hide it.
_MACHINE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}


@contextmanager
def readable(what: str, *also: type[Exception]) -> Iterator[None]:
    """Raise InputError that `what` cannot be read if what is done inside fails at the file; InputErrors pass.

    `also` are errors of a library that derive from none of the usual ones.
    """
    try:
        yield
    except (*_BROKEN, *also) as error:
        if isinstance(error, (InputError, PermissionError)) or getattr(error, "errno", None) in _MACHINE:
            raise
        raise InputError(f"{what} cannot be read: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it is no image in a format known here"
    return " ".join(str(error).split()) or type(error).__name__
