"""A folder of images and the class of each of their pixels, going on where it was stopped.

Below the output folder an image `a/b.svs` of the input folder has

    a/b.svs.labels.tif           class numbers, tiled, with a palette and reductions; 255 where there is none
    a/b.svs.probabilities.tif    if asked for: a channel a class, 255 for 1
    a/b.svs.png                  a small picture of the classes over the image
    a/b.svs.geojson              areas of one class as polygons with holes, in pixels of the image
    a/b.svs.json                 the share of each class, and what they were made from; written last

and the folder `results.csv`, a line an image, see `folder_work`.
"""

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fitformer.data.labels import UNLABELLED
from fitformer.data.readers.levels import ITSELF
from fitformer.data.readers.writing import write_tiled_tiff
from fitformer.data.settings import Colour
from fitformer.errors import InputError
from fitformer.inference.explain.geotiff import georeference, no_data
from fitformer.inference.explain.overlay import thumbnail_of
from fitformer.inference.find import Item, Slide
from fitformer.inference.folder_work import RECORD, Failure, Finish, FolderWork, Tell
from fitformer.inference.segmentation.colours import write_overlay
from fitformer.inference.segmentation.label_map import LabelMap, class_shares
from fitformer.inference.segmentation.polygons import write_polygons
from fitformer.patching.any_size import PixelArray

KIND = "segment"


@dataclass
class Segmentations(FolderWork):
    """The label maps of a folder of images.

    Attributes:
        segment: the label map of an image that is open.
        classes, colours: names and colours by number.
        output, made_with, open, beside, alone, show, on_broken: as in `FolderWork`.
        polygons: write GeoJSON. y: how its rows count, see `write_polygons`.
        probabilities: write those, which `segment` gives then.
    """

    segment: Callable[[Any, Tell], LabelMap]
    classes: Sequence[str]
    colours: Sequence[Colour]
    output: Path
    made_with: Mapping[str, Any]
    open: Callable[[Path], AbstractContextManager[Any]]
    beside: Callable[[Path], Mapping[str, Any]] | None = None
    polygons: bool = True
    y: Literal["down", "up"] = "down"
    probabilities: bool = False
    alone: bool = True
    show: Callable[[float, int], None] = lambda done, of: None
    on_broken: Callable[[str, str], None] = lambda file, reason: None
    broken: dict[str, Failure] = field(default_factory=dict, init=False)

    def _look(self, slide: Slide, image: Any, tell: Tell) -> Finish:
        found = self.segment(image, tell)
        small = thumbnail_of(image)
        place = getattr(image, "path", None), getattr(image, "placement", None)
        return lambda of: self._write(slide, found, small, *place, of)

    def _write(
        self,
        slide: Slide,
        found: LabelMap,
        thumbnail: np.ndarray,
        own: str | None,
        placement: Any,
        of: Mapping[str, Any],
    ) -> None:
        """Write all outputs of an image; arguments as in `explain.batch.Slides`."""
        labels, tags = found.labels, georeference(own, (1, 1), placement or ITSELF)
        shape, marked = (*labels.shape, 1), [*tags, no_data(str(UNLABELLED))]
        # The number of no label is one of the palette, too.
        palette = [*self.colours, *[(0, 0, 0)] * (UNLABELLED - len(self.colours)), (255, 255, 255)]
        path = self._fresh(slide, ".labels.tif")
        write_tiled_tiff(
            path, shape, np.uint8, PixelArray(labels[..., None]).window, pyramid=True, palette=palette, tags=marked
        )
        if found.probabilities is not None:
            shares = PixelArray(found.probabilities)
            path = self._fresh(slide, ".probabilities.tif")
            write_tiled_tiff(path, shares.shape, np.uint8, shares.window, pyramid=True, tags=tags)
        write_overlay(self._fresh(slide, ".png"), thumbnail, labels, self.colours)
        traced = {}
        if self.polygons:
            path, where = self._fresh(slide, ".geojson"), placement or ITSELF
            traced["polygons_step"] = write_polygons(path, labels, self.classes, self.colours, self.y, where)
        rows, columns = labels.shape
        record = {
            "rows": rows,
            "columns": columns,
            "shares": class_shares(labels, self.classes),
            "groups": found.groups,
            "groups_in_all": found.groups_in_all,
            **traced,
            **({} if placement is None else {"placement": asdict(placement)}),
        }
        self._write_record(slide, record, of)

    @property
    def _endings(self) -> Sequence[str]:
        more = [".geojson"] * self.polygons + [".probabilities.tif"] * self.probabilities
        return [".labels.tif", ".png", *more]

    @property
    def _key(self) -> dict[str, Any]:
        asked = {"polygons": self.polygons, "y": self.y, "probabilities": self.probabilities}
        return {**self.made_with, "kind": KIND, **asked}

    def _check_kind(self, slide: Item, record: Mapping[str, Any]) -> None:
        if record.get("made_with", {}).get("kind") != KIND:
            raise InputError(
                f"{self.output / slide.name}.* was made by a classifier, and label maps would be written over it; give "
                "another output folder, or delete what is there"
            )

    def _tables(self) -> Iterator[tuple[str, str]]:
        records = sorted((record for _, record in self._recorded(RECORD)), key=lambda record: record["file"])
        if not records:
            return
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["file", "rows", "columns", *self.classes])
        for record in records:
            shares = [f"{record['shares'][name]:.6f}" for name in self.classes]
            table.writerow([record["file"], record["rows"], record["columns"], *shares])
        yield "results.csv", text.getvalue()
