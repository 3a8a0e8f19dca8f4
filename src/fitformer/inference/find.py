"""Which image files a command is about, by what name each is written, and which of several processes takes it."""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from fitformer.data.datasets.folders import LAZY, image_files
from fitformer.data.datasets.lazy_source import is_image_folder, lazy_suffixes
from fitformer.errors import InputError


@dataclass(frozen=True)
class Slide:
    """An image file and the name, a path below the output folder, that its outputs begin with."""

    path: Path
    name: str

    @property
    def title(self) -> str:
        """What tables and messages call it."""
        return str(self.path)

    @property
    def slides(self) -> tuple["Slide", ...]:
        """Itself."""
        return (self,)


@dataclass(frozen=True)
class Patient:
    """Images that are one example; names as those of a `Slide`.

    Attributes:
        title: the patient's name. name: that of its outputs.
        slides: whose outputs lie in a folder of that name.
    """

    title: str
    name: str
    slides: tuple[Slide, ...]

    @classmethod
    def of(cls, title: str, paths: Sequence[Path]) -> "Patient":
        """A patient by name, and its images, which are called by their paths below the folder that holds them all.

        Raises:
            InputError: two paths of one image.
        """
        name = _NO_NAME.sub(lambda found: f"%{ord(found[0]):02X}", title)
        whole = [Path(os.path.abspath(path)) for path in paths]
        folder = os.path.commonpath([path.parent for path in whole])
        slides = tuple(
            Slide(path, f"{name}/{each.relative_to(folder).as_posix()}")
            for path, each in zip(paths, whole, strict=True)
        )
        if len({slide.name for slide in slides}) < len(slides):
            raise InputError(f"an image of the patient {title!r} is listed twice; list each image once")
        return cls(title, name, slides)


Item = Slide | Patient
"""What has one answer."""

# What no file or folder is called on some system, and what other outputs are called.
_NO_NAME = re.compile(r'[%/\\:*?"<>|\x00-\x1f]|^\.|\.(?=(?:json|failed|csv)$)')

Items = TypeVar("Items", Slide, Patient)


def find(paths: Iterable[str | Path], output: Path | None = None, endings: frozenset[str] | None = None) -> list[Slide]:
    """Images as they are given, and of folders all below them, sorted; what lies below `output` is left out.

    `endings` are those of images' names, lower case; by default all that can be read piece by piece.

    Raises:
        InputError: a folder without an image, or two images whose outputs would have the same name.
    """
    found: dict[str, Slide] = {}
    known = lazy_suffixes() if endings is None else endings
    for path in map(Path, paths):
        is_folder = path.is_dir() and not _is_image(path, known)
        slides = list(_below(path, output, known)) if is_folder else [Slide(path, path.name)]
        if not slides:
            raise InputError(f"the folder {path} holds no images, such as .tif, .svs, .zarr, .npy, .h5 or .png")
        for slide in slides:
            other = found.setdefault(slide.name, slide)
            if not same_file(other.path, slide.path):
                raise InputError(
                    f"{other.path} and {slide.path} would both be written as {slide.name}; give the folder above "
                    "both, or each an output folder of its own"
                )
    return list(found.values())


def same_file(one: Path, other: Path) -> bool:
    """Whether two paths, absolute or not, lead to one file."""
    if os.path.abspath(one) == os.path.abspath(other):
        return True
    return one.exists() and other.exists() and one.samefile(other)


def _is_image(path: Path, known: frozenset[str]) -> bool:
    return path.suffix.lower() in known and (not path.is_dir() or is_image_folder(path))


def _below(folder: Path, output: Path | None, known: frozenset[str]) -> Iterator[Slide]:
    """The images below a folder: those that training reads there, each folder once, whatever links there are."""
    skipped = None if output is None else output.resolve()
    for file in image_files(folder, replace(LAZY, suffixes=lambda: known)):
        path = Path(file)
        if skipped is None or skipped not in path.resolve().parents:
            yield Slide(path, path.relative_to(folder).as_posix())


@dataclass(frozen=True)
class Shard:
    """The images of one process of several that share a folder: part `number` of `count`, from 1.

    To which part an image belongs follows from its name alone, so that none changes its part when others are added;
    the images of a patient follow the patient's.

    Raises:
        InputError: no such part.
    """

    number: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise InputError(f"shard {self.number}/{self.count}: parts are numbered from 1 to their count")

    def of(self, items: Iterable[Items]) -> list[Items]:
        """Those of the images, or patients, that are in this part."""
        return [item for item in items if self._part(item.name) == self.number - 1]

    def _part(self, name: str) -> int:
        digest = hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest()
        return int.from_bytes(digest, "big") % self.count
