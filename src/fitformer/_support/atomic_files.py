"""Files that are either whole or not there: written beside their place and renamed into it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def write_atomically(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path beside `path` to write to; it takes the place of `path` only if nothing was raised.

    A failure (a full disk, an interrupt) leaves whatever stood at `path` as it was and no scratch file behind.

    Raises:
        OSError: it could not be written; the error names `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        scratch.touch()
        mode = scratch.stat().st_mode
        yield scratch
        # safetensors makes its files private, whatever the umask says.
        scratch.chmod(mode)
        os.replace(scratch, path)
    except OSError as error:
        # Writing to an open file fails without a name, and the scratch file's would not help anybody.
        if error.errno is None or error.filename not in (None, str(scratch)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        scratch.unlink(missing_ok=True)
