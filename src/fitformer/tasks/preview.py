"""Previews of a model: samples as a grid of images, or as text."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fitformer._support.atomic_files import write_atomically


@dataclass(frozen=True)
class Preview:
    """Samples of a model: `images` uint8 `(k, H, W, ch)`, or `text`, one string for each sample."""

    images: Tensor | None = None
    text: tuple[str, ...] = ()


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


def save(preview: Preview, stem: Path) -> Path:
    """Write a preview to `stem` with the ending .png (a grid) or .txt; returns the file."""
    if preview.images is not None:
        path = stem.with_suffix(".png")
        write_picture(path, grid(preview.images))
        return path
    path = stem.with_suffix(".txt")
    with write_atomically(path) as scratch:
        scratch.write_text("\n\n----------\n\n".join(preview.text) + "\n", encoding="utf-8")
    return path
