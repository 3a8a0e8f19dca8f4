"""Previews of a model: samples as a grid of images, as text, or as sound."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fitformer._support.atomic_files import write_atomically
from fitformer.data import mu_law
from fitformer.data.wav import write_sound


@dataclass(frozen=True)
class Preview:
    """Samples of a model.

    Attributes:
        images: uint8 `(k, H, W, ch)`. text: one string for each sample.
        sound: mu-law codes uint8 `(k, L)`, of `sample_rate` samples a second.
    """

    images: Tensor | None = None
    text: tuple[str, ...] = ()
    sound: Tensor | None = None
    sample_rate: int = 0


def grid(images: Tensor, columns: int = 0, gap: int = 1, enlarge: int = 0) -> Tensor:
    """Arrange images `(k, H, W, ch)` uint8 in rows with a white gap; returns one image `(rows, columns, ch)`.

    `columns` 0 means at most 10. `enlarge` repeats each pixel; 0 makes an image about 48 pixels high.
    """
    k, height, width, channels = images.shape
    columns = columns or min(k, 10)
    rows = -(-k // columns)
    sheet = images.new_full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 255)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + gap) + gap, (i % columns) * (width + gap) + gap
        sheet[top : top + height, left : left + width] = image
    times = enlarge or max(1, 48 // height)
    return sheet.repeat_interleave(times, 0).repeat_interleave(times, 1)


def write_picture(path: Path, image: Tensor) -> None:
    """Write an image, uint8 `(H, W, ch)` of 1, 3 or 4 channels, as PNG; atomic."""
    from PIL import Image

    pixels = image.cpu().to(torch.uint8).numpy()
    with write_atomically(path) as scratch:
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(scratch, format="PNG")


def in_a_row(sound: Tensor, sample_rate: int) -> Tensor:
    """Sounds, codes `(k, L)`, one after the other with a quarter of a second of silence between: codes `(samples,)`."""
    silence = sound.new_full((len(sound), sample_rate // 4), int(mu_law.encode(np.zeros(1))[0]))
    joined = torch.cat([sound, silence], dim=1).flatten()
    return joined[: len(joined) - silence.shape[1]]


def save(preview: Preview, stem: Path) -> Path:
    """Write a preview to `stem` with the ending .png (a grid), .wav (one after the other) or .txt; returns the file."""
    if preview.sound is not None:
        path = stem.with_suffix(".wav")
        write_sound(path, in_a_row(preview.sound, preview.sample_rate).cpu().numpy(), preview.sample_rate)
        return path
    if preview.images is not None:
        path = stem.with_suffix(".png")
        write_picture(path, grid(preview.images))
        return path
    path = stem.with_suffix(".txt")
    with write_atomically(path) as scratch:
        scratch.write_text("\n\n----------\n\n".join(preview.text) + "\n", encoding="utf-8")
    return path
