"""Exceptions for problems that the user can solve. Any other exception is a bug of ours."""

import importlib
import re
from types import ModuleType


class InputError(ValueError):
    """Bad input. The message says what is wrong, with both numbers, and how to correct it."""


class EmptyImageError(InputError):
    """An image without foreground: all of it is background or masked."""


class MissingDependencyError(ImportError):
    """An optional package is missing. The message names the extra that installs it."""


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether memory, a graphics card's or the machine's, did not suffice. For the latter torch has no error type."""
    found = isinstance(error, RuntimeError) and re.search(r"out of memory|allocate memory|enough memory", str(error))
    return isinstance(error, MemoryError) or bool(found)


def require(package: str, extra: str) -> ModuleType:
    """Import an optional package.

    Raises:
        MissingDependencyError: `package` is not installed; the message names `extra`.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        # An installed package whose own imports fail is not missing.
        if error.name is None or error.name.split(".")[0] != package.split(".")[0]:
            raise
        name = package.split(".")[0]
        raise MissingDependencyError(f"this needs the package {name!r}: pip install 'fitformer[{extra}]'") from error
