"""Images that stay in their files: opened by header, read window by window."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fitformer._support.suggest import suggest
from fitformer.data.readers.area_resize import average
from fitformer.data.readers.channels import with_channels
from fitformer.data.readers.features import open_hdf5, open_without_coordinates
from fitformer.data.readers.levels import (
    WHOLE_BYTES,
    ArrayLevel,
    Level,
    OpenImage,
    OpenOptions,
    Pixels,
    Placement,
    as_pixels,
    tile_bytes,
)
from fitformer.data.readers.npy import open_npy
from fitformer.data.readers.pictures import is_picture, open_picture
from fitformer.data.readers.slides import open_slide
from fitformer.data.readers.tiff import is_tiff, open_tiff
from fitformer.data.readers.zarr_arrays import open_zarr
from fitformer.errors import InputError
from fitformer.patching.any_size import PixelsAt

Backend = Callable[[str, OpenOptions], OpenImage]

BACKENDS: dict[str, Backend] = {
    **dict.fromkeys((".tif", ".tiff", ".gtif", ".gtiff", ".btf", ".tf8", ".lsm", ".qptiff"), open_tiff),
    **dict.fromkeys((".svs", ".svslide", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif", ".czi", ".dcm"), open_slide),
    ".npy": open_npy,
    **dict.fromkeys((".h5", ".hdf5"), open_hdf5),
    ".pt": open_without_coordinates,
}
"""The backend of each file name suffix; folders are Zarr, and Pillow opens every other file but TIFFs."""


def _backend(path: str) -> Backend:
    if os.path.isdir(path):
        return open_zarr
    named = BACKENDS.get(Path(path).suffix.lower(), open_picture)
    if named is open_picture and is_tiff(path):
        return open_tiff
    # A picture under the name of a TIFF; what is neither is called a broken TIFF.
    return open_picture if named is open_tiff and not is_tiff(path) and is_picture(path) else named


class LazyImage:
    """An image file whose pixels are read on demand; `open_image` makes it.

    It reads the header at first use, once in each process, and may be used from several threads. Pickling keeps the
    path, which is absolute, and the options alone. `close` gives up the file and the decoded tiles; the next use opens
    it again.
    """

    def __init__(self, path: str | os.PathLike[str], options: OpenOptions | None = None):
        self.path = os.path.abspath(os.path.expanduser(os.fspath(path)))
        self.options = options or OpenOptions()
        self._opened: tuple[int, OpenImage] | None = None
        self._locks: dict[int, threading.Lock] = {}

    def __getstate__(self) -> tuple[str, OpenOptions]:
        return self.path, self.options

    def __setstate__(self, state: tuple[str, OpenOptions]) -> None:
        LazyImage.__init__(self, *state)

    def __repr__(self) -> str:
        return f"LazyImage({self.path!r})"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows, columns, channels."""
        return self._levels()[0].shape

    @property
    def dtype(self) -> np.dtype:
        """uint8, uint16 or float32."""
        return self._levels()[0].dtype

    @property
    def nodata(self) -> np.ndarray | None:
        """The level of each channel (channels,) that means that there is no data; None if the file names none.

        It is what a GeoTIFF says (GDAL's tag), in the numbers of the pixels handed out; NaN of floats.
        """
        return self._opened_here().nodata

    @property
    def presence(self) -> Pixels | None:
        """Where there are pixels, (rows, columns, 1) booleans, of features of patches; None of other images."""
        return self._opened_here().presence

    @property
    def pixels_at(self) -> PixelsAt | None:
        """A function that reads the pixels of many places at once, of images with a `presence`; see `PixelSource`."""
        return None if self.presence is None else self._levels()[0].pixels_at  # type: ignore[attr-defined]

    @property
    def placement(self) -> Placement | None:
        """Where the pixels lie in a slide, of features of its patches; None of other images."""
        return self._opened_here().placement

    @property
    def microns_per_pixel(self) -> float | None:
        """The side of a pixel, of slides and microscope images that say it; None of others."""
        return self._opened_here().microns_per_pixel

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns that are read and decoded at once, at the least."""
        return self._levels()[0].tile

    @property
    def decode_bytes(self) -> int:
        """Bytes that are decoded for one pixel: of a tile, or of the whole of a PNG or JPEG."""
        return tile_bytes(self._levels()[0])

    @property
    def level_shapes(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of the image and of the reductions of it that its file holds, largest first."""
        return tuple(level.shape[:2] for level in self._levels())

    def window(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """Pixels (height, width, channels) of a window that lies inside; a new array.

        Raises:
            InputError: it reaches out of the image, or the file is broken there.
        """
        level = self._levels()[0]
        rows, columns, _ = level.shape
        if min(top, left) < 0 or min(height, width) < 1 or top + height > rows or left + width > columns:
            raise InputError(
                f"{self.path}: the window of rows {top} .. {top + height} and columns {left} .. {left + width} "
                f"is empty or reaches out of the image of {rows} x {columns} pixels"
            )
        return level.window(top, left, height, width)

    def thumbnail(self, rows: int, columns: int) -> np.ndarray:
        """The whole as (rows, columns, channels) averages over equal areas, in the image's own type.

        They are taken from the smallest stored reduction that is at least as large, else from all pixels.

        Raises:
            InputError: a size below 1, or the file is broken.
        """
        if min(rows, columns) < 1:
            raise InputError(f"a thumbnail of {rows} x {columns} pixels: its sides must be at least 1")
        for level in self.reductions(rows, columns):
            try:
                return average(level, rows, columns)
            except InputError:
                # A broken reduction: a larger one, or the image itself, serves as well.
                continue
        return average(self._levels()[0], rows, columns)

    def reductions(self, rows: int, columns: int) -> list[Level]:
        """The stored reductions of the image that are at least so large, the smallest first."""
        return [level for level in self._levels()[:0:-1] if level.shape[0] >= rows and level.shape[1] >= columns]

    def close(self) -> None:
        """Close the file and drop its decoded tiles."""
        with self._lock():
            opened, self._opened = self._opened, None
            if opened is not None and opened[0] == os.getpid():
                opened[1].close()

    def __enter__(self) -> "LazyImage":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _lock(self) -> threading.Lock:
        # One for each process: a fork may have copied one that some thread of the parent held.
        return self._locks.setdefault(os.getpid(), threading.Lock())

    def _levels(self) -> list[Level]:
        return list(self._opened_here().levels)

    def _opened_here(self) -> OpenImage:
        opened = self._opened
        if opened is None or opened[0] != os.getpid():
            with self._lock():
                opened = self._opened
                if opened is None or opened[0] != os.getpid():
                    self._opened = opened = (os.getpid(), open_levels(self.path, self.options))
        return opened[1]


def open_levels(path: str, options: OpenOptions, content: bytes | np.ndarray | None = None) -> OpenImage:
    """Open a file, or `content` that has the path for a name, a picture or pixels; whoever opens it closes it.

    Raises:
        InputError: it is missing (with the nearest name), broken, or of a kind that cannot be read.
        MissingDependencyError: the package that reads such files is not installed.
    """
    if content is not None:
        if isinstance(content, np.ndarray):
            opened = OpenImage([ArrayLevel(content)])
        else:
            opened = open_picture(path, options, content)
        return _in_pixels(opened, path, options)
    if not os.path.exists(path):
        beside = Path(path).parent
        # Not itself: a link that leads nowhere.
        names = [entry.name for entry in beside.iterdir() if entry.name != Path(path).name] if beside.is_dir() else []
        raise InputError(f"there is no {path}{suggest(Path(path).name, names)}")
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise InputError(f"{path} is a pipe or a device, which might never end: give a file")
    return _in_pixels(_backend(path)(path, options), path, options)


def _in_pixels(opened: OpenImage, path: str, options: OpenOptions) -> OpenImage:
    try:
        image = as_pixels(opened, path, options.pixel_range, 1 if options.palette_indices else 255)
        if options.channels is not None:
            image = with_channels(image, options.channels, path)
        if not all(image.levels[0].shape):
            raise InputError(f"{path} is empty: {' x '.join(map(str, image.levels[0].shape))} pixels and channels")
    except InputError:
        opened.close()
        raise
    return image


def open_image(
    path: str | os.PathLike[str],
    most_bytes: float = WHOLE_BYTES,
    *,
    pixel_range: tuple[float, float] | None = None,
    channels: int | None = None,
    palette_indices: bool = False,
) -> LazyImage:
    """Open an image file by its header; pixels are read when asked for.

    `most_bytes` is the most that may have to be decoded for one pixel: a tile, or the whole of a PNG or JPEG. The
    numbers of a `pixel_range` become black and white, in uint16: for floats and whole numbers of 32 bits, which have no
    range of their own, and 12 bits stored as 16. Grey, colour, and colour with alpha are converted to `channels`.
    `palette_indices` gives the numbers of a palette, not its colours, and grey of less than 8 bits as it is stored.

    Raises:
        InputError: it is missing (with the nearest name), broken, of a kind that cannot be read, or the range is empty.
        MissingDependencyError: the package that reads such files is not installed.
    """
    image = LazyImage(path, OpenOptions(most_bytes, pixel_range, channels, palette_indices))
    image._levels()
    return image


def check_channels(image: LazyImage, channels: int) -> None:
    """Check that an image has as many channels as a model.

    Raises:
        InputError: it has not.
    """
    found = image.shape[2]
    if found != channels:
        raise InputError(
            f"{image.path} has {found} channels and the model {channels}: convert the file, or "
            f"train with channels={found}"
        )
