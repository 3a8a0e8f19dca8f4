"""Foreground grids on disk: an image is scanned once, whatever the run, until its file or the settings change."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fitformer._support.atomic_files import write_atomically

Grids = list[np.ndarray]

# To be raised when a scan finds something else than before: older grids are then not found.
_VERSION = 2


def cache_folder() -> Path:
    """Where scans are kept: `$FITFORMER_CACHE`, or `fitformer` in the user's folder for caches."""
    if own := os.environ.get("FITFORMER_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fitformer"


def file_identity(path: str | os.PathLike[str]) -> list[Any]:
    """What tells one state of a file from another: its place, size and time of change; of a folder, of all in it."""
    path = os.path.abspath(path)
    files = [path]
    if os.path.isdir(path):
        files = sorted(os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names)
    states = [os.stat(file) for file in files]
    return [path, len(files), sum(state.st_size for state in states), max((s.st_mtime_ns for s in states), default=0)]


def cached(identity: Any, scan: Callable[[], Grids]) -> Grids:
    """The grids of a scan, from the cache if it has them; `identity` is all that they depend on, as JSON.

    A broken file is scanned over. A folder that cannot be written costs a scan each time, and nothing else.
    """
    digest = hashlib.sha256(json.dumps([_VERSION, identity], sort_keys=True).encode()).hexdigest()
    path = cache_folder() / "foreground" / digest[:2] / f"{digest}.npz"
    if (found := _read(path)) is not None:
        return found
    grids = scan()
    try:
        with write_atomically(path) as scratch, open(scratch, "wb") as file:
            np.savez(file, *grids)
    except OSError:
        pass
    return grids


def _read(path: Path) -> Grids | None:
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as grids:
            return [grids[f"arr_{k}"] for k in range(len(grids.files))]
    except Exception:
        # Absent, torn, or no such file at all: whatever is wrong, a scan mends it.
        return None
