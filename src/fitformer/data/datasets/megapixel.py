"""Megapixel MNIST (Katharopoulos and Fleuret 2019, arXiv 1905.03711): a few digits on a large, almost black canvas.

Five digits, three of one class and two of others, and patterns of two lines as noise; the class of the three is the
label. 5,000 canvases to train on, of MNIST's training digits, and 1,000 to test, of its test digits. A canvas is a
function of (seed, part, index) and is drawn when it is asked for: only MNIST itself is in memory.
"""

from dataclasses import dataclass

import numpy as np

from fitformer.data.datasets.arrays import read_idx
from fitformer.data.datasets.sources import ArraySource, Source, existing
from fitformer.data.pixels import convert
from fitformer.errors import InputError

COUNTS = {"train": 5000, "test": 1000}
SIDE = 28
DIGITS, OF_ONE_CLASS, CLASSES = 5, 3, 10
PATTERNS = 50
PUBLISHED_SIZE = (1500, 1500)
# Each of four digits denies the fifth at most (2 * SIDE - 1)^2 corners; from here on some corner is always left.
SMALLEST = 138
_STEEPEST = np.pi / 2.5
_PARTS = {"train": 0, "test": 1}
_LAYOUT, _NOISE = 0, 1


@dataclass(frozen=True)
class Layout:
    """What lies where on a canvas; corners are (row, column) of the top left pixel of a 28 x 28 box.

    Attributes:
        label: class of the three digits.
        digits: numbers of the MNIST images int64 (5,), the three first. corners: theirs (5, 2).
        patterns: numbers of the noise patterns int64 (k,). noise_corners: theirs (k, 2).
    """

    label: int
    digits: np.ndarray
    corners: np.ndarray
    patterns: np.ndarray
    noise_corners: np.ndarray


def read_megapixel_mnist(
    path: str | None, size: int | tuple[int, int], seed: int, channels: int | None
) -> dict[str, Source]:
    """Training and test canvases of `size` pixels, a side or (rows, columns), made of the MNIST files in folder `path`.

    Raises:
        InputError: files are missing or broken, or not MNIST's; a canvas too small for five digits.
    """
    size = (size, size) if isinstance(size, int) else size
    if min(size) < SMALLEST:
        raise InputError(
            f"image_size is {size[0]} x {size[1]}: a canvas of megapixel-mnist holds {DIGITS} digits anywhere, without "
            f"overlap, from {SMALLEST} x {SMALLEST} on; the benchmark has {' x '.join(map(str, PUBLISHED_SIZE))}"
        )
    folder = existing(path, "megapixel-mnist", "the folder with MNIST's four idx files")
    found = read_idx(str(folder), (), 1)
    if missing := [part for part in COUNTS if part not in found]:
        raise InputError(
            f"{folder} has no {missing[0]} images, and megapixel-mnist makes its {missing[0]} part of them"
        )
    parts: dict[str, Source] = {}
    for part, mnist in found.items():
        assert isinstance(mnist, ArraySource)
        parts[part] = MegapixelSource(mnist, part, size, seed, channels or 1)
    return parts


class MegapixelSource:
    """The canvases of one part, a `fitformer.data.datasets.sources.Source`.

    Args:
        mnist: the digits to take. part: `train` or `test`, which says how many canvases and which random numbers.
        size: rows and columns of a canvas; the number of noise patterns is that of the benchmark by area.
        seed: of all canvases together. channels: to hand out.

    Raises:
        InputError: images that are not MNIST's.
    """

    classes = tuple(str(digit) for digit in range(CLASSES))

    def __init__(self, mnist: ArraySource, part: str, size: tuple[int, int], seed: int, channels: int = 1) -> None:
        counts = np.bincount(mnist.labels, minlength=CLASSES)
        if mnist.images.shape[1:] != (SIDE, SIDE, 1) or len(counts) > CLASSES or not counts.all():
            rows, columns = mnist.images.shape[1:3]
            raise InputError(
                f"{mnist.title} has images {rows} x {columns} of {np.count_nonzero(counts)} classes: "
                f"megapixel-mnist needs MNIST's digits, {SIDE} x {SIDE} and {CLASSES}"
            )
        self.mnist, self.part, self.size, self.seed, self.channels = mnist, part, size, seed, channels
        self.title = f"megapixel MNIST, {part}"
        self.of_class = [np.flatnonzero(mnist.labels == digit) for digit in range(CLASSES)]
        self.noise_count = round(PATTERNS * size[0] * size[1] / (PUBLISHED_SIZE[0] * PUBLISHED_SIZE[1]))
        self.noise = line_patterns(self._random(_NOISE, 0))
        self.labels = np.array([self._class(self._random(_LAYOUT, index)) for index in range(COUNTS[part])])

    def __len__(self) -> int:
        return COUNTS[self.part]

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        layout = self.layout(index)
        canvas = np.zeros((*self.size, 1), dtype=np.uint8)
        # Noise comes last and covers what is under its box, as in the benchmark.
        pieces = [*self.mnist.images[layout.digits], *self.noise[layout.patterns]]
        for piece, (top, left) in zip(pieces, [*layout.corners, *layout.noise_corners], strict=True):
            canvas[top : top + SIDE, left : left + SIDE] = piece
        return convert(canvas, self.channels), layout.label

    def name(self, index: int) -> str:
        """`canvas <index> of <title>`."""
        return f"canvas {index} of {self.title}"

    def layout(self, index: int) -> Layout:
        """What lies where on canvas `index`."""
        random = self._random(_LAYOUT, index)
        label = self._class(random)
        same = random.choice(self.of_class[label], OF_ONE_CLASS)
        others = random.choice(np.flatnonzero(self.mnist.labels != label), DIGITS - OF_ONE_CLASS)
        corners = self._apart(random)
        patterns = random.integers(PATTERNS, size=self.noise_count)
        noise_corners = random.integers(SIDE, np.array(self.size) - SIDE, (self.noise_count, 2))
        return Layout(label, np.concatenate([same, others]), corners, patterns, noise_corners)

    def _apart(self, random: np.random.Generator) -> np.ndarray:
        """Corners (5, 2) of boxes that lie on the canvas and do not overlap; one that would is drawn again."""
        corners = np.empty((0, 2), dtype=np.int64)
        while len(corners) < DIGITS:
            corner = random.integers(np.array(self.size) - SIDE, endpoint=True)
            if (abs(corners - corner).max(axis=1) >= SIDE).all():
                corners = np.vstack([corners, corner])
        return corners

    def _class(self, random: np.random.Generator) -> int:
        return int(random.integers(CLASSES))

    def _random(self, purpose: int, index: int) -> np.random.Generator:
        key = np.array([self.seed % 2**64, _PARTS[self.part]], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, purpose, index]))


def line_patterns(random: np.random.Generator) -> np.ndarray:
    """The noise, (50, 28, 28, 1) uint8: each pattern two straight lines, with levels from 204 to 255.

    Both lines leave a corner at up to 72 degrees, the first always the same corner, the second often another one.
    """
    first, second = (np.stack([_line(angle) for angle in random.uniform(0, _STEEPEST, PATTERNS)]) for _ in range(2))
    for axis in (1, 2):
        turned = random.random(PATTERNS) < 1 / 3
        second[turned] = np.flip(second[turned], axis)
    levels = random.uniform(0.8, 1, first.shape)
    return np.rint(255 * levels * (first | second)).astype(np.uint8)[..., None]


def _line(angle: float) -> np.ndarray:
    """Booleans (28, 28), true on the line from the top left pixel at `angle` from the downward side, in radians."""
    far = SIDE - 1
    down, right = np.cos(angle), np.sin(angle)
    along = np.linspace(0, far / max(down, right), 2 * SIDE)
    line = np.zeros((SIDE, SIDE), dtype=bool)
    line[np.rint(down * along).astype(int), np.rint(right * along).astype(int)] = True
    return line
