"""Image files in folders, and in tables of paths (CSV, Parquet)."""

import csv
import os
import stat
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from fitformer._support.listed import listed
from fitformer._support.suggest import suggest
from fitformer.data.datasets.lazy_source import LazySource, is_image_folder, lazy_source, lazy_suffixes
from fitformer.data.datasets.patients import by_patient, check_patients
from fitformer.data.datasets.sources import (
    Source,
    existing,
    file_source,
    in_order,
    number_labels,
    unlabelled,
)
from fitformer.data.datasets.targets import read_numbers
from fitformer.data.decoding import suffixes
from fitformer.data.settings import NumberColumns
from fitformer.errors import InputError, require

PART_NAMES = ("train", "training", "test", "testing", "val", "valid", "validation", "dev")


@dataclass(frozen=True)
class Reading:
    """What is taken for an image file, by its ending, and the source that files make."""

    suffixes: Callable[[], frozenset[str]]
    source: Callable[..., Source]

    def in_range(self, pixel_range: tuple[float, float] | None) -> "Reading":
        """With the numbers of the files that are black and white."""
        return replace(self, source=partial(self.source, pixel_range=pixel_range))


DECODED = Reading(suffixes, file_source)
LAZY = Reading(lazy_suffixes, lazy_source)


def image_files(folder: Path, reading: Reading = DECODED) -> list[str]:
    """Every image below a folder, by file name ending, sorted; hidden files and folders are left out.

    Links are followed, and each folder is read once, so that a link to a folder above ends. Pipes and devices are
    no images.
    """
    known = reading.suffixes()
    found: list[str] = []
    seen = {os.path.realpath(folder)}
    for where, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        found += [
            path
            for name in [*names, *filter(is_image_folder, folders)]
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in known
            if os.path.isdir(path := os.path.join(where, name)) or _is_file(path)
        ]
        # Folders themselves before links to them, so that files have the names that they are stored under.
        below = sorted(
            (os.path.islink(os.path.join(where, name)), name) for name in folders if not is_image_folder(name)
        )
        folders.clear()
        for _, name in below:
            if (real := os.path.realpath(os.path.join(where, name))) not in seen:
                seen.add(real)
                folders.append(name)
    return sorted(found)


def _is_file(path: str | Path) -> bool:
    """Whether a path is a regular file, or one that cannot be looked at, whose fault its reader names."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return True


def _subfolders(folder: Path) -> list[str]:
    return sorted(
        entry.name
        for entry in folder.iterdir()
        if entry.is_dir() and not entry.name.startswith((".", "__")) and not is_image_folder(entry)
    )


def read_folder(
    path: str | None,
    classes: tuple[str, ...],
    channels: int | None,
    part_names: Sequence[str] = (),
    reading: Reading = DECODED,
    labelled: bool = True,
) -> dict[str, Source]:
    """A folder of images: a class per subfolder, or flat and without classes; either in part folders, train and so on.

    Names of parts are read whatever their case. One class alone gives a warning. With `labelled` off, subfolders are no
    classes.

    Raises:
        InputError: it is missing, empty, has a folder for a class that is not in `classes`, or parts and other folders
            side by side.
    """
    root = existing(path, "folder", "a folder of images")
    if not root.is_dir():
        raise InputError(f"data source 'folder' needs a folder of images: {root} is a file")
    folders = _part_folders(root, classes, part_names)
    list_files = _label_files if labelled else _unlabelled_files
    named = {part: list_files(folder, reading) for part, folder in folders.items()}
    labels = {label for part in named.values() for _, label in part if label is not None}
    if len(labels) == 1 and not classes:
        warnings.warn(
            f"{root} has one class, {labels.pop()!r}, so there is nothing to learn; if its class folders are one level "
            "deeper, give that folder as data.path",
            stacklevel=2,
        )
    return number_parts(str(root), named, classes, channels, reading)


def _part_folders(root: Path, classes: tuple[str, ...], part_names: Sequence[str]) -> dict[str, Path]:
    """The folders of parts by name; the folder itself as `train` if it has class folders, or images alone.

    Raises:
        InputError: folders of parts beside others, or two of one part.
    """
    below = _subfolders(root)
    known = {name: name if name in part_names else name.lower() for name in below}
    parts = {name: part for name, part in known.items() if part in (*PART_NAMES, *part_names)}
    if len(parts) < len(below) and len(set(parts.values())) > 1 and not set(parts) <= set(classes):
        others = [name for name in below if name not in parts]
        raise InputError(
            f"{root} has the parts {listed(list(parts))} and other folders beside them ({listed(others)}): move those "
            "elsewhere, or, if all are classes, name them in data.classes"
        )
    if not parts or len(parts) < len(below):
        return {"train": root}
    if len(set(parts.values())) < len(parts):
        raise InputError(f"{root} has several folders of one part: {listed(list(parts))}; keep one of each")
    return {part: root / name for name, part in parts.items()}


Labelled = list[tuple[str, str | None]]


def _label_files(folder: Path, reading: Reading) -> Labelled:
    """Every image of a part with its class name, None in a flat folder."""
    named: Labelled = []
    for name in _subfolders(folder):
        files = image_files(folder / name, reading)
        named += [(file, name) for file in files]
        if not files:
            warnings.warn(f"the folder {folder / name} has no images and makes no class", stacklevel=2)
    known = reading.suffixes()
    loose = sorted(
        str(entry)
        for entry in folder.iterdir()
        if (entry.is_file() or is_image_folder(entry)) and entry.suffix.lower() in known
    )
    if named and loose:
        beside = f"{folder} has images beside its class folders, which are left out: {listed(loose, 3)}"
        warnings.warn(beside, stacklevel=2)
    named = named or [(file, None) for file in loose]
    if not named:
        raise InputError(_without_images(folder, "in it, or in a subfolder per class"))
    return named


def _unlabelled_files(folder: Path, reading: Reading) -> Labelled:
    """Every image below a part's folder."""
    files = image_files(folder, reading)
    if not files:
        raise InputError(_without_images(folder, "in it or in its subfolders"))
    return [(file, None) for file in files]


def _without_images(folder: Path, where: str) -> str:
    lazily = image_files(folder, LAZY)
    way = f"; {lazily[0]} is read with data.image_size: null" if lazily else ""
    return f"the folder {folder} has no images: expected files such as .png or .jpg {where}{way}"


def number_parts(
    title: str,
    parts: dict[str, Labelled],
    classes: tuple[str, ...],
    channels: int | None,
    reading: Reading = DECODED,
) -> dict[str, Source]:
    """Sources of several parts with one numbering of their classes.

    Raises:
        InputError: a label outside `classes`, or some images with a label and some without.
    """
    names = {name for part in parts.values() for _, name in part if name is not None}
    classes = classes or in_order(names) if names else ()
    sources: dict[str, Source] = {}
    for part, named in parts.items():
        where = _title(title, part, parts)
        known = [name for _, name in named if name is not None]
        if len(known) != len(named) and names:
            lacking = [file for file, name in named if name is None]
            raise InputError(f"{where}: {len(lacking)} of {len(named)} images have no label: {listed(lacking, 3)}")
        labels = number_labels(known, classes, where) if names else unlabelled(len(named))
        sources[part] = reading.source(where, [file for file, _ in named], labels, classes, channels)
    return sources


def _title(title: str, part: str, parts: Collection[str]) -> str:
    return f"{title} {part}" if len(parts) > 1 else title


@dataclass(frozen=True)
class Columns:
    """Which column of a table is what; None finds it by one of the usual names, and takes none for the last two."""

    image: str | None = None
    label: str | None = None
    split: str | None = None
    patient: str | None = None
    numbers: NumberColumns | None = None


_USUAL = {
    "image": ("path", "file", "filename", "file_name", "filepath", "image"),
    "label": ("label", "class", "category", "target", "mask"),
    "split": ("split", "part", "fold"),
}


def read_manifest(
    path: str | None,
    columns: Columns,
    classes: tuple[str, ...],
    channels: int | None,
    most_missing: int = 10,
    reading: Reading = DECODED,
    labelled: bool = True,
) -> dict[str, Source]:
    """A CSV, TSV or Parquet table with a row per image: its path (absolute or from the table's folder), label, split.

    With `labelled` off, the label is not that of a class, and is not read. In place of a label it may have numbers, and
    rows of one patient may be one example.

    Raises:
        InputError: a missing table or column (with the nearest), no rows, an unknown or empty label, more than
            `most_missing` files that do not exist, or what `read_numbers`, `check_patients` and `by_patient` refuse.
        MissingDependencyError: Parquet without pyarrow.
    """
    file = existing(path, "manifest", "a CSV or Parquet table")
    table = _read_table(file)
    found = {what: _column(what, getattr(columns, what), table, file) for what in (*_USUAL, "patient")}
    if found["image"] is None:
        raise InputError(f"{file} has no column for the images; set data.image_column to one of {listed(list(table))}")
    paths = [str(file.parent / row) for row in table[found["image"]]]
    if not paths:
        raise InputError(f"{file} has no rows")
    missing = [row for row in paths if not os.path.exists(row)]
    if len(missing) > min(most_missing, len(paths) - 1):
        raise InputError(
            f"{len(missing)} of the {len(paths)} files in {file} do not exist (at most {most_missing} may be missing): "
            f"{listed(missing, 3)}; relative paths count from {file.parent}"
        )
    split = table[found["split"]] if found["split"] else ["train"] * len(paths)
    if lacking := [paths[k] for k, part in enumerate(split) if not part]:
        raise InputError(
            f"{file}: {len(lacking)} of {len(paths)} rows have nothing in the column {found['split']!r}, which says "
            f"their part: {listed(lacking, 3)}"
        )
    members = {part: [row for row, name in enumerate(split) if name == part] for part in dict.fromkeys(split)}
    if columns.numbers is None:
        names: Sequence[str | None] = [None] * len(paths)
        if found["label"] and labelled:
            names = table[found["label"]]
        parts = {part: [(paths[row], names[row] or None) for row in rows] for part, rows in members.items()}
        sources = number_parts(str(file), parts, classes, channels, reading)
    else:
        numbers = read_numbers(table, columns.numbers, str(file), first_row=1 if _is_parquet(file) else 2)
        sources = {
            part: reading.source(
                _title(str(file), part, members), [paths[row] for row in rows], numbers[rows], (), channels
            )
            for part, rows in members.items()
        }
    if found["patient"] is None:
        return sources
    patients = table[found["patient"]]
    check_patients(patients, paths, split, str(file), found["patient"])
    return {part: _patients(source, [patients[row] for row in members[part]]) for part, source in sources.items()}


def is_table(path: Path) -> bool:
    """Whether a file is a table by its name, which `read_manifest` reads."""
    return path.suffix.lower() in (".csv", ".tsv") or _is_parquet(path)


def read_patients(path: Path, image_column: str | None, patient_column: str) -> dict[str, list[Path]]:
    """The images of each patient of a table, in its order; other columns are not read.

    Raises:
        InputError: a missing table or column, no rows, or what `check_patients` refuses.
    """
    file = existing(path, "manifest", "a CSV or Parquet table")
    table = _read_table(file)
    image, patient = _column("image", image_column, table, file), _column("patient", patient_column, table, file)
    if image is None or patient is None or not table[image]:
        raise InputError(f"{file} has no rows, or no column of images such as path (it has {listed(list(table))})")
    paths = [str(file.parent / row) for row in table[image]]
    check_patients(table[patient], paths, [""] * len(paths), str(file), patient)
    found: dict[str, list[Path]] = {}
    for name, row in zip(table[patient], paths, strict=True):
        found.setdefault(name, []).append(Path(row))
    return found


def _patients(source: Source, patients: Sequence[str]) -> Source:
    if not isinstance(source, LazySource):
        raise InputError(
            "data.patient makes one example of several images, side by side, so it is for images of any size: set "
            "data.image_size to null, and model.latent_position to row_column"
        )
    return by_patient(source, patients)


def read_label_files(path: str | None, columns: Columns) -> dict[str, str]:
    """The label image of each image of a table, both as paths; empty where a row names none.

    Raises:
        InputError: a missing table or column.
    """
    file = existing(path, "manifest", "a CSV or Parquet table")
    table = _read_table(file)
    image, label = (_column(what, getattr(columns, what), table, file) for what in ("image", "label"))
    if image is None or label is None:
        raise InputError(
            f"{file} has no column for the {'masks' if image else 'images'}; set data."
            f"{'label' if image else 'image'}_column to one of {listed(list(table))}, or masks by data.labels, a folder"
        )
    pairs = zip(table[image], table[label], strict=True)
    return {str(file.parent / name): str(file.parent / mask) if mask else "" for name, mask in pairs}


def _column(what: str, asked: str | None, table: dict[str, list[str]], file: Path) -> str | None:
    if asked is None:
        return next((name for name in _USUAL.get(what, ()) if name in table), None)
    if asked not in table:
        raise InputError(f"{file} has no column {asked!r}{suggest(asked, list(table))} (it has {listed(list(table))})")
    return asked


def _is_parquet(file: Path) -> bool:
    return file.suffix.lower() in (".parquet", ".pq")


def _read_table(file: Path) -> dict[str, list[str]]:
    """Columns of a table as text, an empty text where there is nothing."""
    if _is_parquet(file):
        parquet = require("pyarrow.parquet", extra="train")
        arrow = require("pyarrow", extra="train")
        try:
            columns = parquet.read_table(file).to_pydict()
        except (arrow.ArrowInvalid, OSError) as error:
            raise InputError(f"{file} is not a whole Parquet file: {' '.join(str(error).split())}") from error
        return {name: ["" if value is None else str(value) for value in values] for name, values in columns.items()}
    with open(file, newline="", encoding="utf-8-sig") as stream:
        try:
            head, *rows = csv.reader(stream, delimiter="\t" if file.suffix.lower() == ".tsv" else ",", strict=True)
        except ValueError as error:
            raise InputError(f"{file} is empty or not a UTF-8 table: {error}") from error
        except csv.Error as error:
            raise InputError(f"{file} is not a whole CSV table: {error}") from error
    rows = [row for row in rows if row]
    for number, row in enumerate(rows, start=2):
        if len(row) != len(head):
            raise InputError(f"{file} row {number} has {len(row)} fields and the head {len(head)}: is it cut off?")
    return {name.strip(): [row[place].strip() for row in rows] for place, name in enumerate(head)}
