"""Generated slides of features, of which the class is known: by how tissues lie to each other, or by how much there is.

A slide is a square grid with tissue on some of its cells: ragged, with holes, or in pieces, as a random smooth height
above a threshold has it, so that rows differ in length as those of scanned tissue do. Each patch has a type: common
tissue, or A, B, C. Its features are the type's vector plus noise. In the tasks of layout both classes have as many
patches of each type on average: nothing but where they lie tells them apart.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

SIDE, PATCHES, WIDTH = 32, 600, 32
ABSENT, COMMON, A, B, C = range(-1, 4)
TYPES, STRENGTH, LACKING, ROUGH = 4, 5.0, 10, 4
STEPS = np.array([(0, 1), (1, 0), (0, -1), (-1, 0)])


@dataclass(frozen=True)
class Slides:
    """Slides of one task: where their patches are, rows and columns (k, PATCHES, 2) in the order of rows, features
    (k, PATCHES, WIDTH) float32, and classes (k,), 0 or 1."""

    places: np.ndarray
    features: np.ndarray
    labels: np.ndarray

    def pictures(self) -> tuple[np.ndarray, np.ndarray]:
        """Features on the grid (k, SIDE, SIDE, WIDTH), 0 where no patch is, and where there is one (k, SIDE, SIDE)."""
        slide, rows, columns = np.arange(len(self.labels))[:, None], *np.moveaxis(self.places, -1, 0)
        features = np.zeros((len(self.labels), SIDE, SIDE, WIDTH), np.float32)
        there = np.zeros(features.shape[:3], bool)
        features[slide, rows, columns], there[slide, rows, columns] = self.features, True
        return features, there


class Slide:
    """The types of one slide's patches while it is made, and the draws that make it."""

    def __init__(self, random: np.random.Generator) -> None:
        self.random = random
        # Tissue lies where smooth noise, which falls off to the edges, is greatest: ragged, with holes, or in pieces.
        waves = np.fft.rfft2(random.normal(size=(SIDE, SIDE)))
        rows, columns = np.fft.fftfreq(SIDE)[:, None], np.fft.rfftfreq(SIDE)[None]
        noise = np.fft.irfft2(waves * np.exp(-((ROUGH * np.pi) ** 2) * (rows**2 + columns**2)), (SIDE, SIDE))
        middle = (np.arange(SIDE) - (SIDE - 1) / 2) / (SIDE / 2)
        height = noise / noise.std() - 2 * (middle[:, None] ** 2 + middle[None] ** 2)
        self.types = np.full((SIDE, SIDE), ABSENT)
        self.types.flat[np.argsort(-height, axis=None)[:PATCHES]] = COMMON

    def free(self, distance: int = 0) -> np.ndarray:
        """Cells of common tissue with none but common tissue, or none at all, within so many steps."""
        taken = self.types > COMMON
        for _ in range(distance):
            taken = spread(taken)
        return (self.types == COMMON) & ~taken

    def pick(self, cells: np.ndarray) -> np.ndarray:
        """One of some cells (SIDE, SIDE).

        Raises:
            Full: there are none.
        """
        found = np.argwhere(cells)
        if not len(found):
            raise Full
        return found[self.random.integers(len(found))]

    def blob(self, size: int, kind: int, among: np.ndarray, start: np.ndarray | None = None) -> np.ndarray:
        """A compact blob of cells among some, from a drawn one of them on; where it is (SIDE, SIDE)."""
        blob = np.zeros_like(among)
        blob[tuple(self.pick(among) if start is None else start)] = True
        for _ in range(size - 1):
            edge = spread(blob) & ~blob & among
            # Cells with most neighbours in the blob come first, which keeps it round.
            beside = sum(np.roll(blob, step, (0, 1)) for step in STEPS)
            blob[tuple(self.pick(edge & (beside == beside[edge].max(initial=0))))] = True
        self.types[blob] = kind
        return blob

    def scatter(self, count: int, kind: int, distance: int = 1) -> None:
        """Single patches of a type, none beside another that is not common."""
        for _ in range(count):
            self.types[tuple(self.pick(self.free(distance)))] = kind


class Full(Exception):
    """There is no room left for what was to be drawn: draw the slide anew."""


def spread(cells: np.ndarray) -> np.ndarray:
    """Cells and those beside them, corners too."""
    padded = np.pad(cells, 1)
    rows = padded[:-2] | padded[1:-1] | padded[2:]
    return rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]


def neighbours(slide: Slide, label: int) -> None:
    """Blobs of A, B and C, two of which touch: A and B in class 1, C and one of them in class 0."""
    pair = [A, B] if label else [C, slide.random.choice([A, B])]
    slide.random.shuffle(pair)
    (alone,) = {A, B, C} - set(pair)
    one = slide.blob(9, pair[0], slide.free())
    beside = spread(one) & slide.free()
    slide.blob(9, pair[1], slide.free(), slide.pick(beside))
    slide.blob(9, alone, slide.free(3))


def ring(slide: Slide, label: int) -> None:
    """A nest of B in a ring of A two patches thick, as of a tumour in its capsule, that lacks ten patches of it.

    In class 1 they lack on the outside, so that the ring is thin there but closed; in class 0 they are a gap.
    """
    high, wide = slide.random.integers(9, 14, 2)
    layer = np.full((high, wide), 2)
    layer[1:-1, 1:-1], layer[2:-2, 2:-2] = 1, 0
    corners = np.lib.stride_tricks.sliding_window_view(slide.types == COMMON, (high, wide))
    top, left = slide.pick((corners | (layer == 0)).all(axis=(2, 3)))
    inside = slide.types[top : top + high, left : left + wide]
    inside[(inside == COMMON) & (layer == 0)] = B
    inside[layer > 0] = A
    cells = np.argwhere(layer == 2 if label else layer > 0)
    down, across = (cells - ((high - 1) / 2, (wide - 1) / 2)).T
    along = cells[np.argsort(np.arctan2(down, across))]
    lacking = along[(slide.random.integers(len(along)) + np.arange(LACKING)) % len(along)]
    inside[tuple(lacking.T)] = COMMON


def clusters(slide: Slide, label: int) -> None:
    """36 patches of A in 2 or 3 clusters in class 0, in 4 or 6 in class 1."""
    count = slide.random.choice([4, 6] if label else [2, 3])
    for _ in range(count):
        slide.blob(36 // count, A, slide.free(2))


def share(slide: Slide, label: int) -> None:
    """More than a tenth of the patches are A in class 1, less in class 0."""
    threshold = PATCHES // 10
    _mix(slide, threshold + (1 if label else -1) * slide.random.integers(4, 17))


def rare(slide: Slide, label: int) -> None:
    """One to three patches of B in class 1, none in class 0."""
    slide.scatter(slide.random.integers(1, 4) * label, B)
    _mix(slide, slide.random.integers(24, 57))


def _mix(slide: Slide, count: int) -> None:
    """So many patches of A, anywhere."""
    found = slide.random.permutation(np.argwhere(slide.free()))[:count]
    slide.types[tuple(found.T)] = A


TASKS: dict[str, Callable[[Slide, int], None]] = {
    "neighbours": neighbours,
    "ring": ring,
    "clusters": clusters,
    "share": share,
    "rare": rare,
}
LAYOUT = ("neighbours", "ring", "clusters")


def draw(task: str, count: int, *seed: int) -> Slides:
    """Slides of a task, half of each class, a function of the seed; its first number alone makes the types' vectors."""
    vectors = np.random.default_rng(seed[0]).normal(size=(TYPES, WIDTH))
    vectors *= STRENGTH / np.linalg.norm(vectors, axis=1, keepdims=True)
    random = np.random.default_rng([*seed, sorted(TASKS).index(task)])
    labels = random.permutation(np.arange(count) % 2)
    types = np.stack([draw_types(task, random, int(label)) for label in labels])
    places = np.stack([np.argwhere(each != ABSENT) for each in types])
    features = vectors[types[types != ABSENT].reshape(count, -1)]
    features = features + random.normal(size=features.shape)
    return Slides(places, features.astype(np.float32), labels)


def draw_types(task: str, random: np.random.Generator, label: int) -> np.ndarray:
    """Types (SIDE, SIDE) of the patches of a slide of a class."""
    while True:
        slide = Slide(random)
        try:
            TASKS[task](slide, label)
        except Full:
            continue
        return slide.types
