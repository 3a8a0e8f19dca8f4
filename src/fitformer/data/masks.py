"""Mask files: which mask belongs to which image, and whether every image has one."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fitformer.data.datasets.lazy_source import is_image_folder, lazy_suffixes
from fitformer.data.foreground import check_mask, open_mask
from fitformer.data.readers import LazyImage
from fitformer.data.settings import AudioData, ByteData, ImageData
from fitformer.errors import InputError

OME = (".tif", ".tiff", ".tf8", ".btf", ".zarr")
"""Suffixes that `.ome` may precede."""


def masks_of(settings: ImageData | ByteData | AudioData) -> "Masks | None":
    """The masks of a recipe's data; None if its images have none.

    Raises:
        InputError: there is no such folder.
    """
    return Masks(settings.masks) if isinstance(settings, ImageData) and settings.masks is not None else None


class Masks:
    """A folder of masks, named as their images but for the ending, in the same subfolders as these or in none.

    The mask of `slides/x/1.ome.tif` is `x/1.png` in the folder, or `slides/x/1.png`, or else `1.png`. If no name is the
    same but for the ending, one that continues after a dot (`1.mask.png`), or ends at one, is taken if it is the one.

    Raises:
        InputError: there is no such folder.
    """

    def __init__(self, folder: str | os.PathLike[str], setting: str = "data.masks") -> None:
        self.folder = Path(os.path.abspath(Path(folder).expanduser()))
        if not self.folder.is_dir():
            raise InputError(f"there is no folder {folder} of masks ({setting})")
        self._suffixes = lazy_suffixes()
        self._listed: dict[Path, _Names] = {}
        self._taken: dict[Path, str] = {}

    def of(self, path: str | os.PathLike[str]) -> Path:
        """The mask of an image file.

        Raises:
            InputError: it has none, or more than one (names them).
        """
        image = Path(os.path.abspath(path))
        folders = image.parent.parts[1:]
        for depth in range(len(folders) + 1):
            found = self._names(self.folder.joinpath(*folders[depth:])).of(image)
            if len(found) == 1:
                return found[0]
            if found:
                raise InputError(
                    f"{path} needs one mask, and there are {len(found)} with its name: {', '.join(map(str, found))}"
                )
        raise InputError(
            f"{path} needs a mask, {stem_of(image.name)}.* in {self.folder} or in the image's subfolder of it, and "
            "there is none: add it, or leave the image out"
        )

    def check(self, image: LazyImage) -> tuple[str, int]:
        """Check by its header that the mask of an image exists, belongs to no other image, and has the right size.

        Returns:
            its path, and the bytes of it that are decoded at once.

        Raises:
            InputError: no mask, another image's mask, or another size.
        """
        mask = self.take(image.path)
        with open_mask(mask) as drawn:
            check_mask(drawn, image)
            return str(mask), drawn.decode_bytes

    def check_shared(self, paths: Iterable[str | os.PathLike[str]]) -> None:
        """Check that no two of these images have the same mask; those without one are passed over.

        Raises:
            InputError: two have (names both).
        """
        for path in paths:
            try:
                self.of(path)
            except InputError:
                continue
            self.take(path)

    def state(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        """Which file the mask of an image is, with its size and time of change; these tell a changed mask."""
        try:
            mask = self.of(path)
            about = mask.stat()
        except (InputError, OSError):
            return {"mask": None}
        name = mask.relative_to(self.folder).as_posix()
        return {"mask": name, "mask_bytes": about.st_size, "mask_modified_ns": about.st_mtime_ns}

    def take(self, path: str | os.PathLike[str]) -> Path:
        """The mask of an image, which none that took one before has.

        Raises:
            InputError: no mask, or another image's (names both).
        """
        mask, image = self.of(path), os.path.abspath(path)
        if (other := self._taken.setdefault(mask, image)) != image:
            raise InputError(
                f"{other} and {image} would both have the mask {mask}: put masks into the subfolders of their images, "
                f"such as {self.folder / Path(image).parent.name / mask.name}"
            )
        return mask

    def _names(self, folder: Path) -> "_Names":
        """The image files in a folder, listed once."""
        if folder not in self._listed:
            entries = sorted(folder.iterdir()) if folder.is_dir() else []
            self._listed[folder] = _Names(
                entry
                for entry in entries
                if entry.suffix.lower() in self._suffixes
                and not entry.name.startswith(".")
                and (is_image_folder(entry) or not entry.is_dir())
            )
        return self._listed[folder]


class _Names:
    """Files of one folder by the image that they may be the mask of, so that each lookup takes constant time."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._by_stem: dict[str, list[Path]] = {}
        self._by_beginning: dict[str, list[Path]] = {}
        for file in files:
            self._by_stem.setdefault(stem_of(file.name), []).append(file)
            for beginning in _beginnings(file.name):
                self._by_beginning.setdefault(beginning, []).append(file)

    def of(self, image: Path) -> list[Path]:
        """The files of an image's name but for the ending, else those whose name goes on after it or stops before."""
        stem = stem_of(image.name)
        if exactly := [file for file in self._by_stem.get(stem, ()) if file != image]:
            return exactly
        longer = self._by_beginning.get(stem, [])
        shorter = [file for beginning in _beginnings(stem) for file in self._by_stem.get(beginning, ())]
        return [file for file in dict.fromkeys((*longer, *shorter)) if file != image]


def _beginnings(name: str) -> list[str]:
    """The part of a name before each of its dots."""
    return [name[:place] for place, letter in enumerate(name) if letter == "."]


def stem_of(name: str) -> str:
    """A file's name without its ending, of which `.ome.tif` is one."""
    stem, ending = os.path.splitext(name)
    if ending.lower() in OME and stem.lower().endswith(".ome"):
        return stem[: -len(".ome")]
    return stem
