"""Files that are either complete or absent: written beside their destination, then renamed."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def write_atomically(path: str | os.PathLike[str], durable: bool = False) -> Iterator[Path]:
    """Yield a scratch path beside `path`, and rename it to `path` if the block raises nothing.

    A failure (a full disk, an interrupt) leaves `path` unchanged and removes the scratch file. A `durable` file is on
    the disk when this returns, so that a power cut leaves it or the one before. That waits for the disk: it is for what
    cannot be made again soon, not for pictures.

    Raises:
        OSError: the file cannot be written; the error names `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Machines that share a disk may have processes of one number.
    scratch = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(3)}.tmp")
    try:
        scratch.touch()
        mode = scratch.stat().st_mode
        yield scratch
        # safetensors creates private files; the umask decides.
        scratch.chmod(mode)
        # The content before the name, and the name before this returns.
        if durable:
            _sync(scratch)
        os.replace(scratch, path)
        if durable:
            _sync(path.parent)
    except OSError as error:
        # An error of writing to an open file names no file, and the scratch file's name helps nobody.
        if error.errno is None or error.filename not in (None, str(scratch)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        scratch.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Have a file, or the names in a folder, written to the disk now."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
