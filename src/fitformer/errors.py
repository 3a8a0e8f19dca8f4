"""What goes wrong for a reason the user can mend. Anything else that is raised is a bug of ours."""

import importlib
from types import ModuleType


class InputError(ValueError):
    """Bad input: the message says what is wrong, with both numbers, and the way out."""


class EmptyImageError(InputError):
    """An image of which nothing is left to look at: all of it is background, or masked."""


class MissingDependencyError(ImportError):
    """An optional package is not installed; the message says which extra brings it."""


def require(package: str, extra: str) -> ModuleType:
    """Import an optional package, or say which extra installs it.

    Raises:
        MissingDependencyError: `package` is not installed.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        # A broken installation of the package itself must not be mistaken for an absent one.
        if error.name is None or error.name.split(".")[0] != package.split(".")[0]:
            raise
        name = package.split(".")[0]
        raise MissingDependencyError(f"this needs the package {name!r}: pip install 'fitformer[{extra}]'") from error
