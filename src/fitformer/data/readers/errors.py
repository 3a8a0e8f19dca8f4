"""One clear error for any exception that a library raises on a broken file."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import UnidentifiedImageError

from fitformer.errors import InputError, MissingDependencyError

# Errors of the machine, not of the file: skipping the file would hide them.
MACHINE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES}
_NOT_THE_FILES = (InputError, MissingDependencyError, MemoryError, Warning)


@contextmanager
def readable(what: str) -> Iterator[None]:
    """Raise InputError that `what` cannot be read if what is done inside fails at the file.

    Any exception counts: at files that are not what they seem, libraries raise all kinds of them.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, _NOT_THE_FILES) or getattr(error, "errno", None) in MACHINE:
            raise
        raise InputError(f"{what} cannot be read: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it is no image in a format known here"
    words = " ".join(str(error).split())
    # Messages of these kinds describe a line of code, not the file.
    if isinstance(error, (TypeError, LookupError, AttributeError, ArithmeticError, AssertionError)) or not words:
        return f"it is damaged, or not what its name says ({type(error).__name__}: {words})"
    return words
