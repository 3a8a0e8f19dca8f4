"""Several images of one patient as one example."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from fitformer._support.listed import listed
from fitformer.data.datasets.lazy_source import LazySource
from fitformer.data.datasets.sources import Subset
from fitformer.data.decoding import UnreadableImageError
from fitformer.data.readers import LazyImage
from fitformer.errors import EmptyImageError, InputError


@dataclass(frozen=True, eq=False)
class PatientSource:
    """Patients, each a tuple of the lazily read images of it.

    Attributes:
        images: of all patients. patients: their names.
        members: numbers of each patient's images, int64 arrays.
        labels: of each patient, as those of `sources.Source`.
    """

    images: LazySource
    patients: tuple[str, ...]
    members: tuple[np.ndarray, ...]
    labels: np.ndarray

    @property
    def title(self) -> str:
        """That of the images."""
        return self.images.title

    @property
    def classes(self) -> tuple[str, ...]:
        """Those of the images."""
        return self.images.classes

    @property
    def channels(self) -> int:
        """Of every image."""
        return self.images.channels

    @property
    def reference_image(self) -> LazyImage:
        """Whose kind of pixels all images have."""
        return self.images.reference_image

    def __len__(self) -> int:
        return len(self.patients)

    def __getitem__(self, index: int) -> tuple[tuple[LazyImage, ...], Any]:
        """The images of a patient, without those that say themselves that they are empty, and its label."""
        members = self.members[index].tolist()
        return _without_empty([partial(self._image, k) for k in members]), self.labels[index]

    def _image(self, k: int) -> LazyImage:
        image: LazyImage = self.images[k][0]
        return image

    def name(self, index: int) -> str:
        """The patient and the files."""
        return f"patient {self.patients[index]} ({listed([self.images.name(int(k)) for k in self.members[index]], 3)})"

    def alike(self, other: "PatientSource") -> "PatientSource":
        """These patients, whose images' pixels must be as another source's.

        Raises:
            InputError: those of the first image are not.
        """
        return replace(self, images=self.images.alike(other.images))


def members(source: Any) -> list[int] | None:
    """How many images each patient of a source has; None of a source of images."""
    if isinstance(source, Subset):
        counts = members(source.whole)
        return None if counts is None else [counts[int(k)] for k in source.indices]
    return [len(each) for each in source.members] if isinstance(source, PatientSource) else None


def _without_empty(opens: Sequence[Callable[[], LazyImage]]) -> tuple[LazyImage, ...]:
    images, empty = [], []
    for each in opens:
        try:
            images.append(each())
        except UnreadableImageError as broken:
            if not isinstance(broken.__cause__, EmptyImageError):
                raise
            empty.append(broken)
    if not images:
        raise empty[0]
    return tuple(images)


def check_patients(
    patients: Sequence[str], paths: Sequence[str], parts: Sequence[str], title: str, column: str
) -> None:
    """Check the column of patients of a table, each with its image's path and part.

    Raises:
        InputError: a row without a patient, a patient in two parts, or an image that is listed twice.
    """
    if lacking := [path for name, path in zip(patients, paths, strict=True) if not name]:
        raise InputError(
            f"{title}: {len(lacking)} of {len(paths)} rows have nothing in the column {column!r}, which names their "
            f"patient: {listed(lacking, 3)}"
        )
    part_of, patient_of = dict[str, str](), dict[str, str]()
    for name, path, part in zip(patients, paths, parts, strict=True):
        if part_of.setdefault(name, part) != part:
            raise InputError(
                f"{title}: the patient {name!r} stands in the part {part_of[name]!r} and in {part!r}; all images of a "
                "patient belong to one part"
            )
        if path in patient_of:
            other = patient_of[path]
            twice = f"twice, of the patient {name!r}" if other == name else f"of the patients {other!r} and {name!r}"
            raise InputError(f"{title} lists {path} {twice}; list each image once")
        patient_of[path] = name


def by_patient(images: LazySource, patients: Sequence[str]) -> PatientSource:
    """Images of one label a patient as patients, in the order of their first images.

    Raises:
        InputError: two images of a patient differ in their label.
    """
    names, first, which = np.unique(np.array(patients), return_index=True, return_inverse=True)
    order = np.argsort(first)
    members = tuple(np.flatnonzero(which == k) for k in order)
    for name, rows in zip(names[order], members):
        labels = images.labels[rows]
        if (labels != labels[0]).any():
            other = labels[(labels != labels[0]).reshape(len(labels), -1).any(axis=1)][0]
            one, another = (_in_words(label, images.classes) for label in (labels[0], other))
            raise InputError(
                f"{images.title}: the images of the patient {str(name)!r} are labelled {one} and {another}; a patient "
                "has one label"
            )
    return PatientSource(images, tuple(map(str, names[order])), members, images.labels[[rows[0] for rows in members]])


def _in_words(label: Any, classes: Sequence[str]) -> str:
    return classes[label] if len(classes) else ", ".join(f"{value:g}" for value in np.atleast_1d(label))
