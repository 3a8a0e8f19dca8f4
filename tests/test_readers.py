"""The same pixels from every backend, window by window; broken files are one clear error."""

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fitformer.data.readers import open_image
from fitformer.data.readers.levels import Tiles


def pixels(rows=203, columns=171, channels=3, dtype="uint8", seed=0):
    """Noise over a slope, so that no two windows are alike."""
    random = np.random.default_rng(seed)
    if dtype == "float32":
        return random.normal(size=(rows, columns, channels)).astype(dtype)
    return random.integers(0, np.iinfo(dtype).max + 1, (rows, columns, channels), dtype=dtype)


def squeezed(array):
    return array[..., 0] if array.shape[2] == 1 else array


def tiff(path, array, **options):
    kind = "rgb" if array.shape[2] in (3, 4) and array.dtype != np.float32 else "minisblack"
    data = squeezed(array)
    if options.get("planarconfig") == "separate":
        data = np.moveaxis(array, 2, 0)
    elif kind == "minisblack" and data.ndim == 3:
        options = {"planarconfig": "contig"} | options
    tifffile.imwrite(path, data, **({"photometric": kind, "metadata": None} | options))


TIFFS = {
    "tiled": {"tile": (64, 48)},
    "tiled-deflate": {"tile": (64, 48), "compression": "zlib", "predictor": True},
    "tiled-lzw": {"tile": (32, 32), "compression": "lzw"},
    "tiled-zstd": {"tile": (256, 256), "compression": "zstd"},
    "one-strip": {},
    "strips": {"rowsperstrip": 7},
    "strips-deflate": {"rowsperstrip": 16, "compression": "zlib"},
    "one-strip-deflate": {"rowsperstrip": 203, "compression": "zlib"},
    "big": {"tile": (64, 48), "bigtiff": True},
    "motorola": {"tile": (64, 48), "byteorder": ">"},
    "motorola-strips": {"byteorder": ">"},
    "planar": {"planarconfig": "separate"},
    "planar-tiled": {"planarconfig": "separate", "tile": (64, 48), "compression": "zlib"},
    "shaped": {"tile": (64, 48), "metadata": {}},
}
WINDOWS = [(0, 0, 203, 171), (0, 0, 1, 1), (202, 170, 1, 1), (60, 40, 70, 61), (64, 48, 64, 48), (199, 3, 4, 168)]


def check_windows(path, array, windows=WINDOWS):
    with open_image(path) as image:
        assert (image.shape, image.dtype, image.path) == (array.shape, array.dtype, str(path))
        for top, left, height, width in windows:
            window = image.window(top, left, height, width)
            assert window.dtype == array.dtype
            assert np.array_equal(window, array[top : top + height, left : left + width])


@pytest.mark.parametrize("kind", TIFFS)
@pytest.mark.parametrize(("channels", "dtype"), [(3, "uint8"), (1, "uint16"), (5, "float32"), (4, "uint8")])
def test_tiff(kind, channels, dtype, tmp_path):
    if channels == 1 and "planar" in kind:
        pytest.skip("one channel has one plane")
    array = pixels(channels=channels, dtype=dtype)
    options = TIFFS[kind]
    if dtype == "float32" and "predictor" in options:
        options = options | {"predictor": 3}
    tiff(tmp_path / "image.tif", array, **options)
    check_windows(tmp_path / "image.tif", array)


@pytest.mark.parametrize("layout", ["rows first", "columns first", "channels first", "wide", "motorola"])
def test_npy(layout, tmp_path):
    array = pixels(channels=3, dtype="uint16")
    stored = {
        "rows first": array,
        "columns first": np.asfortranarray(array),
        "channels first": np.moveaxis(array, 2, 0),
        "wide": array[None, None],
        "motorola": array.astype(">u2"),
    }[layout]
    np.save(tmp_path / "image.npy", stored)
    check_windows(tmp_path / "image.npy", array)


@pytest.mark.parametrize(("suffix", "channels"), [("png", 1), ("png", 3), ("png", 4), ("bmp", 3), ("webp", 3)])
def test_pictures(suffix, channels, tmp_path):
    array = pixels(channels=channels)
    Image.fromarray(squeezed(array)).save(
        tmp_path / f"image.{suffix}", **({"lossless": True} if suffix == "webp" else {})
    )
    check_windows(tmp_path / f"image.{suffix}", array)


def test_grey_pictures_keep_sixteen_bits(tmp_path):
    array = pixels(channels=1, dtype="uint16")
    Image.fromarray(squeezed(array)).save(tmp_path / "image.png")
    check_windows(tmp_path / "image.png", array)


@given(seed=st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_random_windows_of_tiles(seed):
    random = np.random.default_rng(seed)
    rows, columns, height, width = random.integers(1, 60, 4)
    array = pixels(rows, columns, 2, seed=seed)
    padded = np.pad(array, ((0, height), (0, width), (0, 0)))
    level = Tiles(
        array.shape,
        array.dtype,
        (height, width),
        lambda row, column: padded[row * height :, column * width :][:height, :width],
    )
    top, bottom = np.sort(random.choice(rows + 1, 2, replace=False))
    left, right = np.sort(random.choice(columns + 1, 2, replace=False))
    assert np.array_equal(level.window(top, left, bottom - top, right - left), array[top:bottom, left:right])
