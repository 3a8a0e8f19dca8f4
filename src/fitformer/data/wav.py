"""WAV files as mu-law codes, and back: PCM of 8 to 64 bits and floats, several channels averaged, by SciPy."""

import os
import warnings
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np

from fitformer._support.atomic_files import write_atomically
from fitformer.data import mu_law
from fitformer.data.settings import MOST_SAMPLE_RATE
from fitformer.errors import InputError, require

SUFFIXES = (".wav", ".wave")
# Frames that are mixed and encoded at a time: floats of a whole file would take several times its size.
_BLOCK = 2**20


@dataclass(frozen=True)
class Sound:
    """A sound as one channel of mu-law codes uint8 (L,); `channels` is how many the file had."""

    codes: np.ndarray
    channels: int


def read_sound(path: str | os.PathLike[str], sample_rate: int, resample: bool = False) -> Sound:
    """A WAV file as codes of `sample_rate` samples a second; channels are averaged.

    Raises:
        InputError: it is missing, no WAV file, not whole, or holds numbers that are none; it has another rate and is
            not to be resampled (by a polyphase filter).
        MissingDependencyError: SciPy is not installed.
    """
    rate, frames = _read(Path(path))
    if rate != sample_rate and not resample:
        raise InputError(
            f"{path} has {rate:,} samples a second, and data.sample_rate is {sample_rate:,}: convert the file, or set "
            "data.resample to true"
        )
    channels = frames.shape[1]
    if rate == sample_rate:
        blocks = [_mono(frames[start : start + _BLOCK], path) for start in range(0, len(frames), _BLOCK)]
        return Sound(np.concatenate([mu_law.encode(block) for block in blocks] or [np.zeros(0, np.uint8)]), channels)
    return Sound(mu_law.encode(_resampled(_mono(frames, path), rate, sample_rate)), channels)


def _resampled(signal: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    common = gcd(rate, wanted)
    resample_poly: Any = require("scipy.signal", extra="train").resample_poly
    return np.asarray(resample_poly(signal, wanted // common, rate // common)) if len(signal) else signal


def _read(path: Path) -> tuple[int, np.ndarray]:
    """The rate of a file and its frames (L, channels), numbers as they are stored."""
    wavfile = require("scipy.io.wavfile", extra="train")
    if not path.is_file():
        raise InputError(f"there is no sound file {path}")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            rate, frames = wavfile.read(path)
        except OSError:
            raise
        except Exception as error:
            # Damaged headers end in errors of many kinds: of struct, of numpy, of names without a value.
            said_so = " ".join(str(error).split()) if type(error) is ValueError else "its header is damaged"
            raise InputError(f"{path} is no whole WAV file ({said_so})") from error
    if any("EOF prematurely" in str(each.message) for each in said):
        raise InputError(f"{path} is cut short: it is smaller than its header says; put it back as it was")
    # A damaged header says anything, and filters that resample grow with the rate.
    if not 1 <= rate <= MOST_SAMPLE_RATE:
        raise InputError(f"{path} is no whole WAV file (it has {rate} samples a second)")
    return int(rate), frames if frames.ndim == 2 else frames[:, None]


def _mono(frames: np.ndarray, path: str | os.PathLike[str]) -> np.ndarray:
    """Frames (L, channels) as they are stored to the mean over channels, float32 (L,), between -1 and 1."""
    kind = frames.dtype
    if kind.kind == "f":
        if not np.isfinite(frames).all():
            raise InputError(f"{path} has samples that are no finite numbers; write it anew")
        signal = frames.astype(np.float32)
    elif kind.kind == "u":
        half = 2.0 ** (8 * kind.itemsize - 1)
        signal = ((frames.astype(np.float64) - half) / half).astype(np.float32)
    else:
        # Those of 24 bits come as the upper ones of 32.
        signal = (frames / 2.0 ** (8 * kind.itemsize - 1)).astype(np.float32)
    return signal.mean(axis=1)


def write_sound(path: str | os.PathLike[str], codes: np.ndarray, sample_rate: int) -> None:
    """Write codes (L,) as a WAV file of one channel, 16-bit PCM; atomic.

    Raises:
        MissingDependencyError: SciPy is not installed.
    """
    wavfile = require("scipy.io.wavfile", extra="train")
    with write_atomically(path) as scratch:
        wavfile.write(scratch, sample_rate, np.rint(mu_law.decode(codes) * 32767).astype(np.int16))


def sound_files(root: Path) -> list[Path]:
    """A file, or the WAV files below a folder, hidden ones left out, in sorted order.

    Raises:
        InputError: there are none.
    """
    if root.is_file():
        return [root]
    found = sorted(file for file in root.rglob("*") if file.suffix.lower() in SUFFIXES and _plain(file, root))
    if not found:
        raise InputError(f"there are no WAV files in {root} (names that end in {' or '.join(SUFFIXES)})")
    return found


def _plain(file: Path, root: Path) -> bool:
    return file.is_file() and not any(part.startswith(".") for part in file.relative_to(root).parts)
