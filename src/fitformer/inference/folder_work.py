"""Work on a folder of images that goes on where it was stopped: records, failures, tables, names.

Below the output folder an image `a/b.svs` of the input folder has outputs `a/b.svs.*`, of which

    a/b.svs.json     is the record: what was found, and what it was made from; written last
    a/b.svs.failed   stands in place of all, and says why the image could not be read, in JSON

A patient `P` of several images has one record `P.json`, or `P.failed`, and outputs `P/b.svs.*` of each image. The
folder has tables that are written from these, one of them `broken.csv` with what failed, by one process at a time, so
that whoever ends last of several leaves all of it there.
"""

import csv
import io
import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from glob import escape
from pathlib import Path
from typing import Any

from filelock import FileLock

from fitformer._support.atomic_files import write_atomically
from fitformer._support.json_text import parse_json
from fitformer._support.listed import listed
from fitformer.errors import EmptyImageError, InputError
from fitformer.inference.find import Item, Patient, Slide, same_file
from fitformer.inference.identity import file_state

Tell = Callable[[float], None]
"""Is told the share of an image that is done."""
Finish = Callable[[Mapping[str, Any]], None]
"""Writes the outputs of an image; told the state of the files that they depend on."""

RECORD, FAILED = ".json", ".failed"
# Held while the tables are written.
TABLES_LOCK = ".tables.lock"
# Rewriting the table of thousands after each of them would take longer than they do.
TABLE_SECONDS = 10.0


class NonFiniteError(InputError):
    """An image whose logits are NaN or infinite, as its pixels are."""


@dataclass(frozen=True)
class Failure:
    """Why an image could not be labelled: `what` is `unreadable`, `blank` or `not finite`, `reason` a sentence."""

    what: str
    reason: str

    @classmethod
    def by(cls, error: Exception) -> "Failure":
        """The failure that an exception stands for."""
        what = (
            "blank"
            if isinstance(error, EmptyImageError)
            else "not finite"
            if isinstance(error, NonFiniteError)
            else "unreadable"
        )
        return cls(what, str(error))


class FolderWork(ABC):
    """The work on a folder of images, or of patients: `run` does what is not there yet.

    Attributes:
        output: the folder to write to.
        made_with: what the outputs depend on beside the image: outputs made with something else are made anew.
        open: an image's file as a source of pixels.
        beside: says of an image's path in which state the other files are that its outputs depend on, as its mask.
        alone: no other process does a part of the images; then it is an error if none can be read.
        show: is told how many images are done, of how many, with the share of the one at work.
        on_broken: is told of every image that could not be read, and why.
        broken: those images.
    """

    output: Path
    made_with: Mapping[str, Any]
    open: Callable[[Path], AbstractContextManager[Any]]
    beside: Callable[[Path], Mapping[str, Any]] | None
    alone: bool
    show: Callable[[float, int], None]
    on_broken: Callable[[str, str], None]
    broken: dict[str, Failure]

    @abstractmethod
    def _look(self, slide: Any, image: Any, tell: Tell) -> Finish:
        """Read an image, or a tuple of those of a patient, and say how its outputs are written, its record last.

        Raises:
            InputError: it cannot be read.
        """

    @property
    @abstractmethod
    def _endings(self) -> Sequence[str]:
        """Of the outputs beside the record."""

    @property
    def _key(self) -> dict[str, Any]:
        """What the outputs depend on beside the image, as JSON gives it back."""
        return dict(self.made_with)

    @abstractmethod
    def _tables(self) -> Iterator[tuple[str, str]]:
        """Names and texts of the tables, from the records that are there."""

    @abstractmethod
    def _check_kind(self, slide: Item, record: Mapping[str, Any]) -> None:
        """Refuse to write over outputs of another kind.

        Raises:
            InputError: names both.
        """

    def run(self, slides: Sequence[Item]) -> int:
        """Make the outputs of the images, or patients; complete ones stay unchanged.

        The tables hold all images of the output folder that were made with the same model and settings. Returns how
        many images were made now.

        Raises:
            InputError: none of the images can be labelled, unless others do a part of the work (names them); or
                outputs are those of other images.
            OSError: an output cannot be written, or the scratch of data tokens failed.
        """
        for slide in slides:
            self._need_own_name(slide)
        self._forget_failures_of_files_that_are_gone(slides)
        made, told, pause = 0, time.monotonic(), TABLE_SECONDS
        try:
            for k, slide in enumerate(slides):
                self.show(k, len(slides))
                # An explained image is not done before its outputs are written.
                made += self._one(slide, lambda share, k=k: self.show(k + 0.99 * share, len(slides)))  # type: ignore[misc]
                if (now := time.monotonic()) - told > pause:
                    self._write_tables()
                    told = time.monotonic()
                    # Tables of a hundred thousand images take a while, and may take a part of the time alone.
                    pause = max(TABLE_SECONDS, 20 * (told - now))
            self.show(len(slides), len(slides))
        finally:
            self._write_tables()
        if self.alone and len(self.broken) == len(slides):
            few = "; ".join(each.reason for each in list(self.broken.values())[:5])
            more = f"; and {len(self.broken) - 5} more" if len(self.broken) > 5 else ""
            kind = "patients" if any(isinstance(slide, Patient) for slide in slides) else "images"
            raise InputError(f"none of the {len(slides)} {kind} can be labelled: {few}{more}")
        return made

    def _forget_failures_of_files_that_are_gone(self, slides: Sequence[Item]) -> None:
        asked = {slide.name for slide in slides}
        for name, record in list(self._recorded(FAILED)):
            if name not in asked and not any(path.exists() for path in _paths(record)):
                (self.output / (name + FAILED)).unlink(missing_ok=True)

    def _one(self, slide: Item, tell: Tell) -> bool:
        """Whether the image was made now."""
        of = self._state(slide)
        if self._is_complete(slide, of):
            self._rename(slide)
            return False
        try:
            with self._opened(slide) as image:
                finish = self._look(slide, image, tell)
        except (InputError, PermissionError) as error:
            self._note_broken(slide, Failure.by(error))
            return False
        (self.output / (slide.name + FAILED)).unlink(missing_ok=True)
        finish(of)
        return True

    def _state(self, slide: Item) -> dict[str, Any]:
        """The state of the files that the outputs of an image, or of a patient's images, depend on."""
        each = [{**file_state(own.path), **(self.beside(own.path) if self.beside else {})} for own in slide.slides]
        return {"slides": each} if isinstance(slide, Patient) else each[0]

    @contextmanager
    def _opened(self, slide: Item) -> Iterator[Any]:
        with ExitStack() as stack:
            images = tuple(stack.enter_context(self.open(own.path)) for own in slide.slides)
            yield images if isinstance(slide, Patient) else images[0]

    def _need_own_name(self, slide: Item) -> None:
        """Refuse to overwrite the outputs of another image or kind; a moved, unchanged image is the same.

        Raises:
            InputError: they are another image's or of another kind; names both.
        """
        record = _read(self.output / (slide.name + RECORD))
        if not isinstance(record, dict) or not (earlier := _paths(record)):
            return
        self._check_kind(slide, record)
        was_moved = not any(path.exists() for path in earlier) and self._is_of(record, slide)
        shared = any(same_file(path, own.path) for path in earlier for own in slide.slides)
        if not (shared or was_moved):
            raise InputError(
                f"{self.output / slide.name}.* was made of {listed(earlier, 3)}, and "
                f"{listed([own.path for own in slide.slides], 3)} would be written over it; give another output "
                "folder, label both by one command on the folder above them, or delete what is there"
            )

    def _is_of(self, record: Mapping[str, Any], slide: Item) -> bool:
        """Whether a record is of files in the state of these."""
        each = record["of"].get("slides", [record["of"]])
        states = [file_state(own.path) for own in slide.slides]
        return len(each) == len(states) and all(
            of.items() >= state.items() for of, state in zip(each, states, strict=True)
        )

    def _rename(self, slide: Item) -> None:
        """Have the outputs that are there name their image as it is called now, if it was moved since."""
        path = self.output / (slide.name + RECORD)
        record = _read(path)
        if isinstance(slide, Slide) and not same_file(_paths(record)[0], slide.path):
            _write_text(path, _as_json({**record, **_names(slide)}))

    def _note_broken(self, slide: Item, broken: Failure) -> None:
        file = slide.title
        self.broken[file] = broken
        (self.output / (slide.name + RECORD)).unlink(missing_ok=True)
        _write_text(self._fresh(slide, FAILED), _as_json({**_names(slide), **asdict(broken), "made_with": self._key}))
        self.on_broken(file, broken.reason)

    def _write_record(self, slide: Item, record: Mapping[str, Any], of: Mapping[str, Any]) -> None:
        whole = {**record, **_names(slide), "of": of, "made_with": self._key}
        _write_text(self._fresh(slide, RECORD), _as_json(whole))

    def _fresh(self, slide: Item, ending: str) -> Path:
        """The path of an output, cleared of what a killed process left beside it."""
        path = self.output / (slide.name + ending)
        for scratch in path.parent.glob(f".{escape(path.name)}.*.tmp"):
            scratch.unlink(missing_ok=True)
        return path

    def _is_complete(self, slide: Item, of: dict[str, Any]) -> bool:
        record = _read(self.output / (slide.name + RECORD))
        return (
            self._is_ours(record)
            and record["of"] == of
            and (isinstance(slide, Slide) or record["paths"] == _names(slide)["paths"])
            and all(path.is_file() for path in self._outputs_of(slide.name, record))
        )

    def _outputs_of(self, name: str, record: Mapping[str, Any]) -> list[Path]:
        """The outputs beside a record: of an image, or of each image of a patient."""
        names = [each["name"] for each in record["slides"]] if "slides" in record else [name]
        return [self.output / (each + ending) for each in names for ending in self._endings]

    def _forget_others(self, patient: Patient, slides: Sequence[Mapping[str, Any]]) -> None:
        """Remove the outputs of images that a patient had before and has no more; `slides` are those of its record."""
        earlier = _read(self.output / (patient.name + RECORD))
        if isinstance(earlier, dict):
            kept = set(self._outputs_of(patient.name, {"slides": slides}))
            for path in self._outputs_of(patient.name, earlier):
                if path not in kept:
                    path.unlink(missing_ok=True)

    def _is_ours(self, record: Any) -> bool:
        return isinstance(record, dict) and record.get("made_with") == self._key

    def _recorded(self, ending: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Names and records of all images in the output folder that were made, or failed, as these do."""
        for path in sorted(self.output.rglob("*" + ending)):
            record = _read(path)
            if self._is_ours(record):
                yield path.relative_to(self.output).as_posix().removesuffix(ending), record

    def _write_tables(self) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        with FileLock(self.output / TABLES_LOCK):
            for name, text in self._tables():
                _write_text(self.output / name, text)
            failed = sorted((each["file"], each["what"], each["reason"]) for _, each in self._recorded(FAILED))
            if failed:
                lines = io.StringIO()
                csv.writer(lines, lineterminator="\n").writerows([("file", "what", "reason"), *failed])
                _write_text(self.output / "broken.csv", lines.getvalue())
            else:
                (self.output / "broken.csv").unlink(missing_ok=True)


def _read(path: Path) -> Any:
    """What a JSON file holds; None where there is none, or one that is not whole."""
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _names(slide: Item) -> dict[str, Any]:
    """Of an image or a patient, for its record: as it was given, and wherever the command is run."""
    paths = [os.path.abspath(own.path) for own in slide.slides]
    return {"file": slide.title, **({"paths": paths} if isinstance(slide, Patient) else {"path": paths[0]})}


def _paths(record: Mapping[str, Any]) -> list[Path]:
    """The files that a record is of; none of one that is no record."""
    return [Path(path) for path in record.get("paths", [record["path"]] if "path" in record else [])]


def _as_json(record: Mapping[str, Any]) -> str:
    return json.dumps(record, indent=2, ensure_ascii=False) + "\n"


def _write_text(path: Path, text: str) -> None:
    with write_atomically(path) as scratch:
        scratch.write_text(text, encoding="utf-8")
