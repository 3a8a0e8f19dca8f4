"""Files that are either complete or absent: written beside their destination, then renamed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def write_atomically(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a scratch path beside `path`, and rename it to `path` if the block raises nothing.

    A failure (a full disk, an interrupt) leaves `path` unchanged and removes the scratch file.

    Raises:
        OSError: the file cannot be written; the error names `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        scratch.touch()
        mode = scratch.stat().st_mode
        yield scratch
        # safetensors creates private files; the umask decides.
        scratch.chmod(mode)
        os.replace(scratch, path)
    except OSError as error:
        # An error of writing to an open file names no file, and the scratch file's name helps nobody.
        if error.errno is None or error.filename not in (None, str(scratch)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        scratch.unlink(missing_ok=True)
