"""Classes by name or number, images to complete, and drawn ones on disk: a grid, single files, samples.json."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fitformer._support.atomic_files import write_atomically
from fitformer._support.json_text import parse_json
from fitformer._support.suggest import suggest
from fitformer.data.decoding import UnreadableImageError, decode
from fitformer.data.settings import ImageData
from fitformer.errors import InputError
from fitformer.patching.sizes import format_size, to_sides
from fitformer.tasks.preview import grid, write_picture


def class_numbers(asked: str | None, classes: Sequence[str]) -> list[int]:
    """Numbers of classes given by number or name, separated by commas; all classes for None.

    Names take precedence over numbers: of classes named "1" and "0", `1` is the first.

    Raises:
        InputError: an unknown class, or none given.
    """
    if asked is None:
        return list(range(len(classes)))
    words = [word.strip() for word in asked.split(",") if word.strip()]
    if not words:
        raise InputError(f"{asked!r} names no class; write numbers or names separated by commas, such as 0,1,2")
    return [_class_number(word, classes) for word in words]


def _class_number(word: str, classes: Sequence[str]) -> int:
    if word in classes:
        return list(classes).index(word)
    if re.fullmatch(r"-?\d+", word):
        if 0 <= int(word) < len(classes):
            return int(word)
        raise InputError(f"class {word} is out of range: there are {len(classes)} classes, 0 to {len(classes) - 1}")
    hint = suggest(word, classes, f"; known classes are {', '.join(classes[:20])}")
    raise InputError(f"unknown class {word!r}{hint}")


def read_images(files: Sequence[str | Path], settings: ImageData, channels: int) -> Tensor:
    """Image files of a model's own size as uint8 `(k, H, W, channels)`, decoded as the data it was trained on.

    Raises:
        InputError: a file that is missing or no image, or an image of another size than `settings.image_size`.
    """
    size, images = to_sides(settings.image_size or 1, "hw", "data.image_size"), []
    for file in files:
        try:
            pixels = decode(file, str(file), channels, settings.pixel_range)
        except UnreadableImageError as fault:
            raise InputError(str(fault)) from fault
        if pixels.shape[:2] != size:
            raise InputError(
                f"{file} is {format_size(pixels.shape[:2])} pixels, and the model's images are {format_size(size)} "
                "(rows x columns); cut or scale it to that size"
            )
        # A copy: Pillow's own pixels cannot be written to, of which torch warns.
        images.append(torch.from_numpy(pixels.copy()))
    return torch.stack(images)


def write_samples(
    folder: str | Path, images: Tensor, classes: Sequence[str] | None, settings: Mapping[str, Any], columns: int = 0
) -> Path:
    """Write images uint8 `(k, H, W, ch)` into a folder: grid.png, one PNG each, and samples.json; returns the grid.

    Images that an earlier samples.json of the folder lists, and this one does not, are removed.

    Args:
        folder: created if it does not exist. images: the samples, numbered from 0.
        classes: name of the class of each image, part of its file name, or None.
        settings: sampling options, for samples.json. columns: of the grid, 0 for at most ten.
    """
    folder = Path(folder)
    entries = []
    for k, image in enumerate(images):
        name = None if classes is None else classes[k]
        path = folder / (f"{k:05d}.png" if name is None else f"{k:05d}-{file_safe(name)}.png")
        write_picture(path, image)
        entries.append({"file": path.name, "index": k, **({} if name is None else {"class": name})})
    stale = _listed(folder) - {entry["file"] for entry in entries}
    with write_atomically(folder / "samples.json") as scratch:
        scratch.write_text(json.dumps({**settings, "samples": entries}, indent=1, ensure_ascii=False) + "\n", "utf-8")
    write_picture(folder / "grid.png", grid(images, columns))
    for name in stale:
        (folder / name).unlink(missing_ok=True)
    return folder / "grid.png"


def _listed(folder: Path) -> set[str]:
    """The images of a folder that its samples.json lists; none if there is no such list."""
    try:
        entries = parse_json((folder / "samples.json").read_text("utf-8"))["samples"]
        return {Path(entry["file"]).name for entry in entries}
    except (OSError, ValueError, TypeError, KeyError):
        return set()


def file_safe(name: str) -> str:
    """A name with every character that file systems may refuse replaced by `_`."""
    return re.sub(r"[^\w.-]+", "_", name).strip(".")[:60] or "_"
