"""A folder of images, each labelled and its heat maps written, going on where it was stopped.

Below the output folder an image `a/b.svs` of the input folder has, for each map of the method (`explanation.MAPS`),

    a/b.svs.relevance.png    a small picture of the map over the image
    a/b.svs.relevance.tif    the map, a value a patch, placed at full scale

and beside them

    a/b.svs.geojson          groups and patches with the values of all maps, in pixels of the image
    a/b.svs.json             label, probabilities, agreement and what they were made from; written last
    a/b.svs.failed           in place of all these, why the image could not be labelled, in JSON

and the folder `results.csv`, a line an image, and `broken.csv`, the images that could not be labelled. Both are written
from what stands in the folder, by one process at a time, so that whoever ends last of several leaves all of it there.
"""

import csv
import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, fields
from glob import escape
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from fitformer._support.atomic_files import write_atomically
from fitformer._support.json_text import parse_json
from fitformer.data.readers import open_image
from fitformer.data.readers.levels import ITSELF, Placement
from fitformer.errors import EmptyImageError, InputError
from fitformer.inference.explain.agreement import Agreement
from fitformer.inference.explain.explanation import MAPS, SIGNED, Explanation, Method, explain
from fitformer.inference.explain.geojson import write_geojson
from fitformer.inference.explain.geotiff import write_tiff
from fitformer.inference.explain.heatmap import HeatMap
from fitformer.inference.explain.leave_out import Tell
from fitformer.inference.explain.overlay import thumbnail_of, write_overlay
from fitformer.inference.find import Slide, same_file
from fitformer.inference.predict import Group, as_text
from fitformer.models.image_encoder import FITImageEncoder
from fitformer.patching.any_size import GroupedImage
from fitformer.tasks.answers import Answer, Answers, Prediction

RECORD, FAILED = ".json", ".failed"
# Held while the tables are written.
TABLES_LOCK = ".tables.lock"
# Rewriting the table of thousands after each of them would take longer than they do.
TABLE_SECONDS = 10.0
# Version of the outputs: those of an earlier version are made again.
VERSIONS = {"relevance": "log-odds, against the average patch, faded", "leave-out": "log-odds"}


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


def identity(network: FITImageEncoder) -> str:
    """A digest of a model, its numbers and its weights."""
    digest = hashlib.sha256(json.dumps(network.config, sort_keys=True, default=str).encode())
    for name, value in network.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@dataclass
class Slides:
    """The work on a folder of images: `run` does what is not there yet.

    Attributes:
        classifier: in eval mode.
        answers: what its outputs mean.
        output: the folder to write to.
        made_with: what the outputs depend on beside the image: outputs made with something else are made anew.
        method: how decisions are explained; None labels only.
        target: the name of what maps explain; None for the default of `answers`.
        open: an image's file as a source of pixels, which has a `path` if it is the file pixel by pixel.
        group: cuts an image into groups, without those to be skipped; by default none is.
        beside: says of an image's path in which state the other files are that its outputs depend on, as its mask.
        y: see `write_geojson`.
        alone: no other process labels a part of the images; then it is an error if none can be labelled.
        show: is told how many images are done, of how many, with the share of the one at work.
        on_broken: is told of every image that could not be labelled, and why.

    Raises:
        InputError: answers of another number of outputs.
    """

    classifier: FITImageEncoder
    answers: Answers
    output: Path
    made_with: Mapping[str, Any]
    method: Method | None = "gradient"
    target: str | None = None
    open: Callable[[Path], AbstractContextManager[Any]] = open_image
    group: Group | None = None
    beside: Callable[[Path], Mapping[str, Any]] | None = None
    y: Literal["down", "up"] = "down"
    alone: bool = True
    show: Callable[[float, int], None] = lambda done, of: None
    on_broken: Callable[[str, str], None] = lambda file, reason: None
    found: dict[str, Answer] = field(default_factory=dict, init=False)
    broken: dict[str, Failure] = field(default_factory=dict, init=False)
    agreements: dict[str, dict[str, Any]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.answers.check_outputs(self.classifier.num_classes)

    def run(self, slides: Sequence[Slide]) -> int:
        """Label the images and write their heat maps; complete outputs stay unchanged.

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
            raise InputError(f"none of the {len(slides)} images can be labelled: {few}{more}")
        return made

    def _forget_failures_of_files_that_are_gone(self, slides: Sequence[Slide]) -> None:
        asked = {slide.name for slide in slides}
        for name, record in list(self._recorded(FAILED)):
            if name not in asked and not Path(record["path"]).exists():
                (self.output / (name + FAILED)).unlink(missing_ok=True)

    def _one(self, slide: Slide, tell: Tell) -> bool:
        """Whether the image was made now."""
        of = {**_state_of(slide.path), **(self.beside(slide.path) if self.beside else {})}
        if self._is_complete(slide, of):
            self._rename(slide)
            return False
        try:
            with self.open(slide.path) as image:
                seen = self._seen(image, tell)
                if not bool(seen.logits.isfinite().all()):
                    logits = seen.logits.tolist()
                    raise NonFiniteError(f"{slide.path} is answered with {logits}: it has NaN or infinite pixels")
                small = thumbnail_of(image) if seen.maps else None
                own, placement = getattr(image, "path", None), getattr(image, "placement", None)
        except (InputError, PermissionError) as error:
            self._note_broken(slide, Failure.by(error))
            return False
        self._write(slide, seen, small, own, of, placement)
        return True

    def _seen(self, image: Any, tell: Tell) -> Explanation:
        grouped = self._grouped(image)
        if self.method is not None:
            return explain(self.classifier, grouped, self.method, tell, self.answers.decide(self.target))
        with torch.inference_mode():
            return Explanation(self.classifier([grouped])[0].float().cpu(), {}, grouped)

    def _grouped(self, image: Any) -> GroupedImage:
        return self.classifier.grouped(image) if self.group is None else self.group(image)

    def _need_own_name(self, slide: Slide) -> None:
        """Refuse to overwrite the outputs of another image or method; a moved, unchanged image is the same.

        Raises:
            InputError: they are another image's or method's; names both.
        """
        record = _read(self.output / (slide.name + RECORD))
        if not isinstance(record, dict) or "path" not in record:
            return
        method = record.get("made_with", {}).get("explain", "gradient")
        if method != self.method:
            was, asked = method or "none", self.method or "none"
            raise InputError(
                f"{self.output / slide.name}.* was made with --explain {was}, and {asked} would be written over it; "
                "give another output folder, or delete what is there"
            )
        earlier = Path(record["path"])
        was_moved = not earlier.exists() and record["of"].items() >= _state_of(slide.path).items()
        if not (same_file(earlier, slide.path) or was_moved):
            raise InputError(
                f"{self.output / slide.name}.* was made of {earlier}, and {slide.path} would be written over it; give "
                "another output folder, label both by one command on the folder above them, or delete what is there"
            )

    def _rename(self, slide: Slide) -> None:
        """Have the outputs that are there name their image as it is called now, if it was moved since."""
        path = self.output / (slide.name + RECORD)
        record = _read(path)
        if not same_file(Path(record["path"]), slide.path):
            _write_text(path, _as_json({**record, **_names(slide)}))

    def _note_broken(self, slide: Slide, broken: Failure) -> None:
        file = str(slide.path)
        self.broken[file] = broken
        (self.output / (slide.name + RECORD)).unlink(missing_ok=True)
        _write_text(self._fresh(slide, FAILED), _as_json({**_names(slide), **asdict(broken), "made_with": self._key}))
        self.on_broken(file, broken.reason)

    def _write(
        self,
        slide: Slide,
        seen: Explanation,
        thumbnail: np.ndarray | None,
        own: str | None,
        of: dict[str, Any],
        placement: Placement | None,
    ) -> None:
        """Write all outputs of an image.

        Args:
            slide, seen, thumbnail: the image.
            own: its file if that may have coordinates of its own.
            of: the state of the files that the outputs depend on.
            placement: where it lies in a slide, of an image of patches.
        """
        (self.output / (slide.name + FAILED)).unlink(missing_ok=True)
        said = self.answers.said(seen.logits, self.target)
        maps = {name: HeatMap.of(values, seen.image) for name, values in seen.maps.items()}
        for name, heatmap in maps.items():
            assert thumbnail is not None
            write_overlay(
                self._fresh(slide, f".{name}.png"), thumbnail, heatmap, "signed" if name in SIGNED else "heat"
            )
            write_tiff(self._fresh(slide, f".{name}.tif"), heatmap, name, own, placement or ITSELF)
        if maps:
            shapes = self._fresh(slide, ".geojson")
            write_geojson(shapes, maps, said, self.y, placement or ITSELF)
        agreement = None if seen.agreement is None else _agreement(seen.agreement, seen.image, self._maps[-1])
        rows, columns = seen.image.shape[:2]
        record = {
            **asdict(self.answers.answer(str(slide.path), seen.logits)),
            **self._explained(seen.logits),
            **_names(slide),
            "rows": rows,
            "columns": columns,
            "groups": seen.image.num_groups - seen.image.glimpses,
            "groups_in_all": seen.image.groups_in_all,
            **({} if agreement is None else {"agreement": agreement}),
            **({} if placement is None else {"placement": asdict(placement)}),
            "of": of,
            "made_with": self._key,
        }
        _write_text(self._fresh(slide, RECORD), _as_json(record))

    def _explained(self, outputs: Tensor) -> dict[str, Any]:
        """What maps are of: of classes their log-odds, of other answers a name."""
        if self.answers.kind is Prediction:
            return {"log_odds": float(self.answers.decide(self.target)(outputs.double(), outputs))}
        return {"explained": self.answers.said(outputs, self.target).name} if self.method else {}

    def agreement(self) -> tuple[int, dict[str, float]]:
        """How many images have a measured agreement, and the mean over them of each of its numbers that there is."""
        means = {}
        for key in ("rank_correlation", "same_sign"):
            known = [each[key] for each in self.agreements.values() if each[key] is not None]
            if known:
                means[key] = sum(known) / len(known)
        return len(self.agreements), means

    def _fresh(self, slide: Slide, ending: str) -> Path:
        """The path of an output, cleared of what a killed process left beside it."""
        path = self.output / (slide.name + ending)
        for scratch in path.parent.glob(f".{escape(path.name)}.*.tmp"):
            scratch.unlink(missing_ok=True)
        return path

    @property
    def _key(self) -> dict[str, Any]:
        versions = {name: VERSIONS[name] for name in self._maps if name in VERSIONS}
        target = {} if self.target is None else {"target": self.target}
        return {**self.made_with, "explain": self.method, **target, **versions, "y": self.y}

    @property
    def _maps(self) -> tuple[str, ...]:
        return () if self.method is None else MAPS[self.method]

    @property
    def _endings(self) -> list[str]:
        """Of the outputs beside the record."""
        return [f".{name}.{kind}" for name in self._maps for kind in ("png", "tif")] + [".geojson"] * bool(self._maps)

    def _is_complete(self, slide: Slide, of: dict[str, Any]) -> bool:
        record = _read(self.output / (slide.name + RECORD))
        return (
            self._is_ours(record)
            and record["of"] == of
            and all((self.output / (slide.name + ending)).is_file() for ending in self._endings)
        )

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
            self._read_records()
            if self.found:
                ordered = sorted(self.found.values(), key=lambda answer: answer.file)
                _write_text(self.output / "results.csv", as_text(ordered, self.answers.columns))
            failed = sorted((each["file"], each["what"], each["reason"]) for _, each in self._recorded(FAILED))
            if failed:
                text = io.StringIO()
                csv.writer(text, lineterminator="\n").writerows([("file", "what", "reason"), *failed])
                _write_text(self.output / "broken.csv", text.getvalue())
            else:
                (self.output / "broken.csv").unlink(missing_ok=True)

    def _read_records(self) -> None:
        """Take what this process and others labelled from the folder."""
        self.found.clear()
        self.agreements.clear()
        for name, record in self._recorded(RECORD):
            kind = self.answers.kind
            self.found[name] = kind(**{item.name: record[item.name] for item in fields(kind)})
            if record.get("agreement") is not None:
                self.agreements[name] = record["agreement"]


def _agreement(found: Agreement, image: GroupedImage, name: str) -> dict[str, Any]:
    """An agreement of a map as it is written: groups by the corner of their first pixel."""
    high, wide = image.patch_grid.group_size  # type: ignore[misc]
    places = image.coords[found.groups].tolist()
    return {
        "of": name,
        "with": "leave-out",
        "rank_correlation": found.rank_correlation,
        "same_sign": found.same_sign,
        "groups": [
            {"row": row * high, "column": column * wide, name: claimed, "leave-out": added}
            for (row, column), claimed, added in zip(places, found.claimed.tolist(), found.added.tolist(), strict=True)
        ],
    }


def _read(path: Path) -> Any:
    """What a JSON file holds; None where there is none, or one that is not whole."""
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _names(slide: Slide) -> dict[str, str]:
    """Of an image, for its record: as it was given, and wherever the command is run."""
    return {"file": str(slide.path), "path": os.path.abspath(slide.path)}


def _as_json(record: Mapping[str, Any]) -> str:
    return json.dumps(record, indent=2, ensure_ascii=False) + "\n"


def _write_text(path: Path, text: str) -> None:
    with write_atomically(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def _state_of(path: Path) -> dict[str, int]:
    """Size and time of the last change, which tell one state of a file from another; nothing of an absent one."""
    if not path.exists():
        return {}
    about = path.stat()
    return {"bytes": about.st_size, "modified_ns": about.st_mtime_ns}
