"""Sound to model: WAV files as mu-law codes in memory, a byte a sample."""

from collections.abc import Sequence
from typing import Any

from fitformer._support.system_memory import check_room
from fitformer.data.datasets.sources import existing
from fitformer.data.datasets.text import ByteBuffer, BytesDataset, Piece
from fitformer.data.wav import read_sound, sound_files
from fitformer.errors import InputError


def sound_pieces(path: str | None, sample_rate: int, resample: bool = False) -> tuple[list[Piece], str]:
    """The codes of a WAV file, or of those below a folder, in sorted order; and what was done to them, in words.

    Raises:
        InputError: there are none, they hold no samples, or what `read_sound` refuses.
        MissingDependencyError: SciPy is not installed.
    """
    files = sound_files(existing(path, "wav", "a WAV file, or a folder of WAV files"))
    # Numbers of 4 bytes each; files hold one byte a sample at least, and codes take one.
    check_room(f"the sound in {path}", sum(file.stat().st_size for file in files) // 4)
    pieces, mixed = [], 0
    for file in files:
        sound = read_sound(file, sample_rate, resample)
        mixed += sound.channels > 1
        pieces.append(Piece(str(file), 0, len(sound.codes), sound.codes.tobytes()))
    if not any(map(len, pieces)):
        raise InputError(f"{path} has no samples: its {len(pieces)} WAV files are empty")
    return pieces, f"{mixed} of {len(files)} files mixed down to one channel" if mixed else ""


class AudioDataset(BytesDataset):
    """Windows of `length` samples, as `BytesDataset` makes them; `note` is told by `describe`."""

    unit = "samples"

    def __init__(self, pieces: Sequence[Piece], length: int, sample_rate: int, *, note: str = "", **rest: Any) -> None:
        super().__init__(ByteBuffer(pieces), length, **rest)
        self.sample_rate, self.note = sample_rate, note

    def describe(self) -> str:
        """One line: what, how much, and what was done to it."""
        seconds = len(self.buffer) / self.sample_rate
        note = f"; {self.note}" if self.note else ""
        return f"{super().describe()} ({seconds:,.1f} s at {self.sample_rate:,} a second){note}"
