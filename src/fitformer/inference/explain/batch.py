"""A folder of images, each labelled and its heat maps written, going on where it was stopped.

Below the output folder an image `a/b.svs` of the input folder has, for each map of the method (`explanation.MAPS`),

    a/b.svs.relevance.png    a small picture of the map over the image
    a/b.svs.relevance.tif    the map, a value a patch, placed at full scale

and beside them

    a/b.svs.geojson          groups and patches with the values of all maps, in pixels of the image
    a/b.svs.json             label, probabilities, agreement and what they were made from; written last
    a/b.svs.failed           in place of all these, why the image could not be labelled, in JSON

A patient `P` of several images has its label in `P.json`, and maps of each image, `P/b.svs.*`, in that image's pixels.
The folder has `results.csv`, a line an image or a patient, see `folder_work`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fitformer.data.readers import open_image
from fitformer.data.readers.levels import ITSELF, Placement
from fitformer.errors import InputError
from fitformer.inference.explain.agreement import Agreement
from fitformer.inference.explain.explanation import MAPS, SIGNED, Explanation, Method, explain
from fitformer.inference.explain.geojson import write_geojson
from fitformer.inference.explain.geotiff import write_tiff
from fitformer.inference.explain.heatmap import HeatMap
from fitformer.inference.explain.overlay import Colours, thumbnail_of, write_overlay
from fitformer.inference.find import Item, Slide
from fitformer.inference.folder_work import RECORD, Failure, Finish, FolderWork, NonFiniteError, Tell
from fitformer.inference.predict import Group, as_text
from fitformer.models.image_encoder import FITImageEncoder
from fitformer.patching.any_size import GroupedImage
from fitformer.patching.joined_images import JoinedImages
from fitformer.tasks.answers import Answer, Answers, Prediction, Said

# Version of the outputs: those of an earlier version are made again.
VERSIONS = {"relevance": "log-odds, against the average patch, faded", "leave-out": "log-odds"}


@dataclass
class Slides(FolderWork):
    """The labels and maps of a folder of images, or of patients.

    Attributes:
        classifier: in eval mode.
        answers: what its outputs mean.
        output: the folder to write to.
        made_with: what the outputs depend on beside the image: outputs made with something else are made anew.
        method: how decisions are explained; None labels only.
        target: the name of what maps explain; None for the default of `answers`.
        open: an image's file as a source of pixels, which has a `path` if it is the file pixel by pixel.
        group: cuts an image, or those of a patient, into groups, without those to be skipped; by default none is.
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

    def _look(self, slide: Item, image: Any, tell: Tell) -> Finish:
        seen = self._seen(image, tell)
        if not bool(seen.logits.isfinite().all()):
            logits = seen.logits.tolist()
            raise NonFiniteError(f"{slide.title} is answered with {logits}: it has NaN or infinite pixels")
        opened = image if isinstance(image, tuple) else (image,)
        parts = [_Part.of(slide.slides, opened, seen, k) for k in range(seen.image.images)]
        return lambda of: self._write(slide, seen, parts, of)

    def _seen(self, image: Any, tell: Tell) -> Explanation:
        grouped = self._grouped(image)
        if self.method is not None:
            return explain(self.classifier, grouped, self.method, tell, self.answers.decide(self.target))
        with torch.inference_mode():
            return Explanation(self.classifier([grouped])[0].float().cpu(), {}, grouped)

    def _grouped(self, image: Any) -> GroupedImage:
        return self.classifier.grouped(image) if self.group is None else self.group(image)

    def _write(self, slide: Item, seen: Explanation, parts: "Sequence[_Part]", of: Mapping[str, Any]) -> None:
        """Write all outputs of an image or a patient, of whose files `of` is the state."""
        for part in parts if seen.maps else ():
            self._write_maps(part, self.answers.said(seen.logits, self.target))
        record = {
            **asdict(self.answers.answer(slide.title, seen.logits)),
            **self._explained(seen.logits),
            **({} if seen.agreement is None else {"agreement": self._agreement(seen.agreement, parts, seen.image)}),
        }
        if isinstance(slide, Slide):
            self._write_record(slide, {**record, **parts[0].record}, of)
            return
        named = [{"file": part.slide.title, "name": part.slide.name, **part.record} for part in parts]
        seen_names = {part.slide.name for part in parts}
        blank = [own.title for own in slide.slides if own.name not in seen_names]
        self._forget_others(slide, named)
        self._write_record(slide, {**record, "slides": named, "blank": blank}, of)

    def _write_maps(self, part: "_Part", said: Said) -> None:
        maps = {name: HeatMap.of(values, part.grouped) for name, values in part.maps.items()}
        placement = part.placement or ITSELF
        for name, heatmap in maps.items():
            assert part.thumbnail is not None
            colours: Colours = "signed" if name in SIGNED else "heat"
            write_overlay(self._fresh(part.slide, f".{name}.png"), part.thumbnail, heatmap, colours)
            write_tiff(self._fresh(part.slide, f".{name}.tif"), heatmap, name, part.own, placement)
        write_geojson(self._fresh(part.slide, ".geojson"), maps, said, self.y, placement)

    def _agreement(self, found: Agreement, parts: "Sequence[_Part]", image: GroupedImage) -> dict[str, Any]:
        """An agreement of a map as it is written: groups by the corner of their first pixel in their image."""
        high, wide = image.patch_grid.group_size  # type: ignore[misc]
        name, groups = self._maps[-1], []
        for group, claimed, added in zip(found.groups, found.claimed.tolist(), found.added.tolist(), strict=True):
            which, own = image.origin(group)
            row, column = parts[which].grouped.coords[own].tolist()
            of = {"slide": parts[which].slide.name} if isinstance(image, JoinedImages) else {}
            groups.append({**of, "row": row * high, "column": column * wide, name: claimed, "leave-out": added})
        return {
            "of": name,
            "with": "leave-out",
            "rank_correlation": found.rank_correlation,
            "same_sign": found.same_sign,
            "groups": groups,
        }

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

    def _check_kind(self, slide: Item, record: Mapping[str, Any]) -> None:
        made_with = record.get("made_with", {})
        if "kind" in made_with:
            raise InputError(
                f"{self.output / slide.name}.* was made by a run of the task {made_with['kind']}, and answers on whole "
                "images would be written over it; give another output folder, or delete what is there"
            )
        method = made_with.get("explain", "gradient")
        if method != self.method:
            was, asked = method or "none", self.method or "none"
            raise InputError(
                f"{self.output / slide.name}.* was made with --explain {was}, and {asked} would be written over it; "
                "give another output folder, or delete what is there"
            )

    def _tables(self) -> Iterator[tuple[str, str]]:
        self._read_records()
        if self.found:
            ordered = sorted(self.found.values(), key=lambda answer: answer.file)
            yield "results.csv", as_text(ordered, self.answers.columns)

    def _read_records(self) -> None:
        """Take what this process and others labelled from the folder."""
        self.found.clear()
        self.agreements.clear()
        for name, record in self._recorded(RECORD):
            kind = self.answers.kind
            self.found[name] = kind(**{item.name: record[item.name] for item in fields(kind)})
            if record.get("agreement") is not None:
                self.agreements[name] = record["agreement"]


@dataclass(frozen=True, eq=False)
class _Part:
    """An image of what was answered on, or all of it, as far as its outputs take it.

    Attributes:
        slide: its name. grouped: its own groups.
        maps: `(t, n)` by name.
        thumbnail: for pictures, where there are maps.
        own: its file if that may have coordinates of its own.
        placement: where it lies in a slide, of an image of patches.
    """

    slide: Slide
    grouped: GroupedImage
    maps: Mapping[str, Tensor]
    thumbnail: np.ndarray | None
    own: str | None
    placement: Placement | None

    @classmethod
    def of(cls, slides: Sequence[Slide], opened: Sequence[Any], seen: Explanation, number: int) -> "_Part":
        """Part `number` of what was seen of images, of which those that hold nothing are no part."""
        grouped = seen.image.parts[number]
        place = 0 if len(opened) == 1 else [image is grouped.source for image in opened].index(True)
        image, maps = opened[place], {name: seen.image.split(values)[number] for name, values in seen.maps.items()}
        small = thumbnail_of(image) if maps else None
        own, placement = getattr(image, "path", None), getattr(image, "placement", None)
        return cls(slides[place], grouped, maps, small, own, placement)

    @property
    def record(self) -> dict[str, Any]:
        """Its size, and where it lies."""
        rows, columns = self.grouped.shape[:2]
        return {
            "rows": rows,
            "columns": columns,
            "groups": self.grouped.num_groups - self.grouped.glimpses,
            "groups_in_all": self.grouped.groups_in_all,
            **({} if self.placement is None else {"placement": asdict(self.placement)}),
        }
