"""Features of the patches of many slides, a file for each, going on where it was stopped.

Below the output folder a slide `a/b.svs` of the input folder has

    a/b.h5        features, coordinates and attributes, as TRIDENT writes them
    a/b.failed    in its place, why the slide could not be read, in JSON

A file appears when it is whole. It says what it was made of, in an attribute of its own.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fitformer._support.atomic_files import write_atomically
from fitformer._support.json_text import parse_json
from fitformer.data.datasets.lazy_source import lazy_suffixes
from fitformer.data.masks import Masks, stem_of
from fitformer.data.patches import PatchCut, Patches, patches_of
from fitformer.data.readers import LazyImage
from fitformer.data.readers.feature_writing import attributes_of, feature_file
from fitformer.errors import InputError
from fitformer.execution.prefetch import prefetch
from fitformer.inference.features.encoder import PatchEncoder
from fitformer.inference.find import Slide, same_file
from fitformer.inference.identity import file_state

RECORD = "fitformer"
"""The attribute of a file that says what it was made of, in JSON."""

FEATURES, FAILED = ".h5", ".failed"


def slide_suffixes() -> frozenset[str]:
    """The file name endings, lower case, of what may be a slide: images that are no features."""
    return lazy_suffixes() - {".h5", ".hdf5", ".pt"}


@dataclass
class Extraction:
    """The work on a list of slides: `run` does what is not there yet.

    Attributes:
        encoder: of patches.
        output: the folder to write to.
        cut: how slides are cut into patches.
        masks: of tissue, a file a slide.
        batch_size: patches that the encoder takes at once.
        alone: no other process does a part of the slides; then it is an error if none can be read.
        show: is told how many slides are done, of how many, with the share of the one at work.
        on_broken: is told of every slide that could not be read, and why.
        made, empty, patches: slides that were made now, those of them without tissue, and patches of all of them.
        broken: why slides could not be read, by path.
    """

    encoder: PatchEncoder
    output: Path
    cut: PatchCut
    masks: Masks | None = None
    batch_size: int = 64
    alone: bool = True
    show: Callable[[float, int], None] = lambda done, of: None
    on_broken: Callable[[str, str], None] = lambda file, reason: None
    made: int = field(default=0, init=False)
    empty: int = field(default=0, init=False)
    patches: int = field(default=0, init=False)
    broken: dict[str, str] = field(default_factory=dict, init=False)

    @cached_property
    def width(self) -> int:
        """Numbers of a patch."""
        return self.encoder.width(self.cut.patch_size)

    def run(self, slides: Sequence[Slide]) -> None:
        """Write the features of slides; whole files stay as they are.

        Raises:
            InputError: the encoder does not take such patches, files are there that were made otherwise, two slides
                have one name, or none of the slides can be read.
            OSError: a file cannot be written.
        """
        self._need_own_names(slides)
        # Before the first slide: an encoder that does not take such patches is no fault of the slides.
        _ = self.width
        for k, slide in enumerate(slides):
            self.show(k, len(slides))
            try:
                self._one(slide, lambda share, k=k: self.show(k + share, len(slides)))  # type: ignore[misc]
            except (InputError, PermissionError) as error:
                self._note_broken(slide, str(error))
        self.show(len(slides), len(slides))
        if self.alone and slides and len(self.broken) == len(slides):
            few = "; ".join(list(self.broken.values())[:5])
            more = f"; and {len(self.broken) - 5} more" if len(self.broken) > 5 else ""
            raise InputError(f"none of the {len(slides)} slides can be read: {few}{more}")

    def _one(self, slide: Slide, tell: Callable[[float], None]) -> None:
        path, of = self._path(slide, FEATURES), self._state(slide)
        record = self._record(path)
        if record is not None and record["of"] == of:
            return
        with LazyImage(slide.path, self.encoder.options) as image:
            self.encoder.check(image)
            patches = patches_of(image, self.cut, None if self.masks is None else self.masks.of(slide.path))
            said = self._attributes(slide, patches)
            said["/"] = {RECORD: json.dumps({**self._made_with, "path": os.path.abspath(slide.path), "of": of})}
            with feature_file(path, patches.coords, self.width, said) as features:
                self._fill(features, patches, tell)
        self._path(slide, FAILED).unlink(missing_ok=True)
        self.made += 1
        self.empty += not len(patches)
        self.patches += len(patches)

    def _fill(self, features: Any, patches: Patches, tell: Callable[[float], None]) -> None:
        batches = [slice(k, k + self.batch_size) for k in range(0, len(patches), self.batch_size)]
        if not batches:
            return
        # A thread reads the next batch while the encoder is at work.
        with closing(prefetch(lambda which: (patches.read(which),), batches, torch.device("cpu"))) as read:
            for which, (pixels,) in zip(batches, read, strict=True):
                features[which] = found = self.encoder.features(pixels, self.cut.patch_size)
                _check(found, patches, which)
                tell(min(which.stop, len(patches)) / len(patches))

    def _attributes(self, slide: Slide, patches: Patches) -> dict[str, dict[str, Any]]:
        """The attributes of the arrays as TRIDENT writes them; magnifications are left out where they are not known."""
        rows, columns = patches.image.shape[:2]
        place = {"name": stem_of(slide.path.name), "savetodir": str(self.output)}
        magnifications = {"level0_magnification": patches.scale.own, "target_magnification": patches.scale.target}
        coords = {
            "patch_size": self.cut.patch_size,
            "patch_size_level0": patches.side,
            **{name: _plain(value) for name, value in magnifications.items() if value is not None},
            "overlap": self.cut.overlap,
            "level0_width": columns,
            "level0_height": rows,
        }
        return {"features": place, "coords": {**coords, **place}}

    @cached_property
    def _made_with(self) -> dict[str, Any]:
        """What features depend on beside the slide, as JSON gives it back."""
        encoder = self.encoder
        settings = {
            "encoder": encoder.digest,
            **encoder.settings,
            **asdict(self.cut),
            "masks": None if self.masks is None else str(self.masks.folder),
        }
        return dict(parse_json(json.dumps({"encoder_name": encoder.name, "made_with": settings})))

    def _state(self, slide: Slide) -> dict[str, Any]:
        """The state of the files that the features of a slide depend on."""
        return {**file_state(slide.path), **({} if self.masks is None else self.masks.state(slide.path))}

    def _path(self, slide: Slide, ending: str) -> Path:
        name = Path(slide.name)
        return self.output / name.with_name(stem_of(name.name) + ending)

    def _record(self, path: Path) -> Mapping[str, Any] | None:
        """What the file that is there was made of; None where there is none.

        Raises:
            InputError: it was not made by this command.
        """
        if not path.exists():
            return None
        try:
            found = parse_json(attributes_of(path)[RECORD])
            if {"path", "of", "made_with", "encoder_name"} <= found.keys():
                return dict(found)
        except (LookupError, ValueError, TypeError, AttributeError):
            pass
        raise InputError(
            f"{path} is there and was not written by `fitformer features`; give another output folder, or move it away"
        )

    def _need_own_names(self, slides: Sequence[Slide]) -> None:
        """Refuse to write over files of another slide, encoder or cut.

        Raises:
            InputError: names both.
        """
        taken: dict[Path, Slide] = {}
        for slide in slides:
            path = self._path(slide, FEATURES)
            if (other := taken.setdefault(path, slide)) is not slide:
                raise InputError(f"{other.path} and {slide.path} would both be written as {path}; rename one of them")
            record = self._record(path)
            if record is None:
                continue
            if differing := _differing(record, self._made_with):
                raise InputError(
                    f"{path} was made otherwise: {differing}; give another output folder, or remove what is there"
                )
            earlier = Path(record["path"])
            if earlier.exists() and not same_file(earlier, slide.path):
                raise InputError(
                    f"{path} was made of {earlier}, and {slide.path} would be written over it; give another output "
                    "folder, or the folder above both"
                )

    def _note_broken(self, slide: Slide, reason: str) -> None:
        file = str(slide.path)
        self.broken[file] = reason
        with write_atomically(self._path(slide, FAILED)) as scratch:
            text = json.dumps({"file": file, "reason": reason}, indent=2, ensure_ascii=False)
            scratch.write_text(text + "\n", encoding="utf-8")
        self.on_broken(file, reason)


def _check(features: np.ndarray, patches: Patches, which: slice) -> None:
    """Raise InputError if features (k, D) of some patches are NaN or infinite."""
    whole = np.isfinite(features).all(axis=1)
    if not whole.all():
        x, y = patches.coords[which][~whole][0].tolist()
        raise InputError(
            f"{patches.image.path}: the features of the patch at x {x}, y {y} are NaN or infinite: has it such pixels? "
            "Leave it out by a mask"
        )


def _plain(value: float) -> int | float:
    """A whole number as one."""
    return int(value) if float(value).is_integer() else float(value)


def _differing(was: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """The first setting in which features that are there differ from those that are asked for; empty if none does."""
    before, now = was["made_with"], asked["made_with"]
    for name in now:
        # Said of one slide, it need not be said again with all the others.
        if before.get(name) != now[name] and not (name == "slide_microns_per_pixel" and now[name] is None):
            if name == "encoder":
                return f"the encoder was {was['encoder_name']} and is {asked['encoder_name']}"
            return f"{name} was {before.get(name)} and is {now[name]}"
    return ""
