"""Images from Hugging Face `datasets`: by name, from a saved folder, an image folder or Parquet files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fitformer._support.listed import listed
from fitformer._support.suggest import suggest
from fitformer.data.datasets.folders import Columns
from fitformer.data.datasets.sources import (
    Source,
    check_range,
    file_source,
    in_order,
    number_labels,
    unlabelled,
)
from fitformer.errors import InputError, require

_LABEL_NAMES = ("label", "labels", "class", "category", "target")


@dataclass(frozen=True)
class HubImages:
    """The image column of a `datasets.Dataset`, undecoded."""

    column: Any

    def __len__(self) -> int:
        return len(self.column)

    def __getitem__(self, index: int) -> str | bytes:
        row = self.column[index]["image"]
        if isinstance(row, dict):
            row = row["bytes"] if row.get("bytes") is not None else row.get("path")
        return b"" if row is None else row


def read_huggingface(
    path: str | None,
    subset: str | None,
    columns: Columns,
    classes: tuple[str, ...],
    channels: int | None,
    pixel_range: tuple[float, float] | None = None,
) -> dict[str, Source]:
    """Every part of a Hub dataset or local folder; image and label columns by name, or found by their types.

    Raises:
        InputError: it cannot be loaded, or a column is missing or ambiguous, or a label out of range.
        MissingDependencyError: `datasets` is not installed.
    """
    if path is None:
        raise InputError("data source 'huggingface' needs data.path: a name on the Hub or a local folder")
    datasets = require("datasets", extra="train")
    loaded = _load(datasets, path, subset)
    parts = loaded if isinstance(loaded, datasets.DatasetDict) else {str(loaded.split or "train"): loaded}
    first = next(iter(parts.values()))
    image = _image_column(datasets, first.features, columns.image, path)
    label = _label_column(datasets, first.features, columns.label, path)
    names = {
        part: None if label is None else _label_names(rows, label, f"{path} {part}") for part, rows in parts.items()
    }
    if label is not None:
        given = tuple(getattr(first.features[label], "names", None) or ())
        classes = classes or given or in_order({name for of_part in names.values() for name in of_part or ()})
    return {
        part: _part(datasets, f"{path} {part}", rows, image, names[part], classes, channels, pixel_range)
        for part, rows in parts.items()
    }


def _load(datasets: Any, path: str, subset: str | None) -> Any:
    local = Path(path).expanduser()
    saved = (local / "dataset_dict.json").exists() or (local / "state.json").exists()
    try:
        if saved:
            return datasets.load_from_disk(str(local))
        if local.is_file():
            return datasets.load_dataset(local.suffix.lstrip(".").lower(), data_files=str(local))
        return datasets.load_dataset(str(local) if local.is_dir() else path, subset)
    except Exception as error:
        # `datasets` raises many kinds, its own and those of the network; all mean that this set cannot be had.
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"the data set {path!r} cannot be loaded by `datasets`: {reason}") from error


def _named(features: Any, asked: str, path: str) -> str:
    if asked not in features:
        raise InputError(
            f"{path} has no column {asked!r}{suggest(asked, list(features))} (it has {listed(list(features))})"
        )
    return asked


def _only(found: list[str], what: str, features: Any, path: str) -> str | None:
    if len(found) > 1:
        raise InputError(
            f"{path} has several columns of {what}, {listed(found)}: set data.{what}_column to one of them"
        )
    return found[0] if found else None


def _image_column(datasets: Any, features: Any, asked: str | None, path: str) -> str:
    if asked is not None:
        return _named(features, asked, path)
    found = _only([name for name in features if isinstance(features[name], datasets.Image)], "image", features, path)
    if found is None:
        raise InputError(f"{path} has no image column; set data.image_column to one of {listed(list(features))}")
    return found


def _label_column(datasets: Any, features: Any, asked: str | None, path: str) -> str | None:
    if asked is not None:
        return _named(features, asked, path)
    typed = [name for name in features if isinstance(features[name], datasets.ClassLabel)]
    return _only(typed or [name for name in features if name in _LABEL_NAMES], "label", features, path)


def _label_names(rows: Any, label: str, title: str) -> list[str]:
    """The labels of a part as class names, from numbers where the column has names for them."""
    values = list(rows[label])
    if None in values:
        raise InputError(f"{title}: image {values.index(None)} has no label in column {label!r}")
    given = getattr(rows.features[label], "names", None)
    if not given:
        return [str(value) for value in values]
    check_range(np.array(values, dtype=np.int64), len(given), title)
    return [given[value] for value in values]


def _part(
    datasets: Any,
    title: str,
    rows: Any,
    image: str,
    names: list[str] | None,
    classes: tuple[str, ...],
    channels: int | None,
    pixel_range: tuple[float, float] | None,
) -> Source:
    labels = unlabelled(len(rows)) if names is None else number_labels(names, classes, title)
    column = rows.select_columns([image])
    if image != "image":
        column = column.rename_column(image, "image")
    if isinstance(column.features["image"], datasets.Image):
        column = column.cast_column("image", datasets.Image(decode=False))
    return file_source(title, HubImages(column), labels, classes if names is not None else (), channels, pixel_range)
