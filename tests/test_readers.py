"""The same pixels from every backend, window by window; broken files are one clear error."""

import multiprocessing
import os
import pickle
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor

import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fitformer.data.readers import LazyImage, check_channels, open_image, to_tiled_tiff, write_tiled_tiff
from fitformer.data.readers.area_resize import average
from fitformer.data.readers.cache import TileCache
from fitformer.data.readers.levels import OpenOptions, Tiles, blocks
from fitformer.errors import InputError, MissingDependencyError


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


def zarr_array(path, array, **options):
    import zarr

    stored = zarr.create_array(path, shape=array.shape, dtype=array.dtype, **({"chunks": array.shape} | options))
    stored[...] = array


ZARRS = {
    "v2": {"zarr_format": 2},
    "v3": {"zarr_format": 3},
    "sharded": {"zarr_format": 3, "shards": (128, 96, 3)},
}


@pytest.mark.parametrize("kind", ZARRS)
def test_zarr(kind, tmp_path):
    array = pixels(dtype="uint16")
    zarr_array(tmp_path / "image.zarr", array, chunks=(64, 48, 3), **ZARRS[kind])
    check_windows(tmp_path / "image.zarr", array)


@pytest.mark.parametrize(
    ("names", "axes"), [("yxc", (0, 1, 2)), ("cyx", (2, 0, 1)), ("tcyx", (2, 0, 1)), ("xyc", (1, 0, 2))]
)
def test_zarr_with_named_axes(names, axes, tmp_path):
    array = pixels(9, 11, 10)
    stored = array.transpose(axes)[(None,) * (len(names) - 3)]
    zarr_array(tmp_path / "image.zarr", stored, chunks=(1,) + (5,) * (len(names) - 1), dimension_names=list(names))
    check_windows(tmp_path / "image.zarr", array, [(0, 0, 9, 11), (3, 4, 5, 6)])


def xarray_like(path, zarr_format, names, stored):
    """A group as xarray writes it: an array with names for its axes, beside it the coordinates along them."""
    import zarr

    group = zarr.open_group(path, mode="w", zarr_format=zarr_format)

    def create(name, array, names):
        named = {"dimension_names": names} if zarr_format == 3 else {"attributes": {"_ARRAY_DIMENSIONS": names}}
        group.create_array(name, shape=array.shape, dtype=array.dtype, chunks=(5,) * array.ndim, **named)[...] = array

    create("reflectance", stored, names)
    for name, length in zip(names, stored.shape):
        create(name, np.arange(length, dtype="float64"), [name])
    group.create_array("spatial_ref", shape=(), dtype="int64")


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("name", ["band", "bands", "Channel", "b", "wavelength", "sample", "polarisation"])
def test_zarr_of_named_channels(name, zarr_format, tmp_path):
    array = pixels(9, 11, 4, "uint16")
    xarray_like(tmp_path / "image.zarr", zarr_format, [name, "y", "x"], array.transpose(2, 0, 1))
    for path in (tmp_path / "image.zarr", tmp_path / "image.zarr/reflectance"):
        check_windows(path, array, [(0, 0, 9, 11), (3, 4, 5, 6)])
    xarray_like(tmp_path / "turned.zarr", zarr_format, ["x", "y", name], array.transpose(1, 0, 2))
    check_windows(tmp_path / "turned.zarr", array, [(0, 0, 9, 11), (3, 4, 5, 6)])


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize(
    ("names", "refused"),
    [
        (["time", "y", "x"], "time"),
        (["z", "y", "x"], "z"),
        (["time", "band", "y", "x"], "time"),
        (["u", "v2", "y", "x"], "u"),
    ],
)
def test_zarr_of_several_planes_is_refused(names, refused, zarr_format, tmp_path):
    stored = np.zeros((3, 4, 9, 11)[4 - len(names) :], np.uint8)
    xarray_like(tmp_path / "image.zarr", zarr_format, names, stored)
    with pytest.raises(InputError, match=f"planes along its axis '{refused}': store the plane to read by itself"):
        open_image(tmp_path / "image.zarr")


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_chunk_that_is_missing_is_the_fill_value(zarr_format, tmp_path):
    import zarr

    stored = zarr.create_array(
        tmp_path / "image.zarr", shape=(10, 10), chunks=(5, 5), dtype="uint8", zarr_format=zarr_format, fill_value=7
    )
    stored[:5, :5] = 1
    with open_image(tmp_path / "image.zarr") as image:
        assert image.window(4, 4, 2, 2).tolist() == [[[1], [7]], [[7], [7]]]


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_ome_zarr_without_its_full_size_is_named(version, tmp_path):
    import zarr

    scales = [{"axes": [{"name": name} for name in "yx"], "datasets": [{"path": "0"}, {"path": "1"}]}]
    group = zarr.open_group(tmp_path / "image.zarr", mode="w", zarr_format=2 if version == "0.4" else 3)
    group.attrs.update({"multiscales": scales} if version == "0.4" else {"ome": {"multiscales": scales}})
    group.create_array("1", shape=(4, 5), dtype="uint8")
    with pytest.raises(InputError, match=r"image\.zarr says that '0' is its level 0, .* there is no '0' in it"):
        open_image(tmp_path / "image.zarr")
    group.attrs.update({"bioformats2raw.layout": 3} if version == "0.4" else {"ome": {"bioformats2raw.layout": 3}})
    with pytest.raises(InputError, match=r"image\.zarr says that '0' is its first image"):
        open_image(tmp_path / "image.zarr")


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("collected", [False, True])
def test_ome_zarr(version, collected, tmp_path):
    import zarr

    array = pixels(channels=2, dtype="uint16")
    small = array[::2, ::2]
    root = zarr.open_group(tmp_path / "image.zarr", mode="w", zarr_format=2 if version == "0.4" else 3)
    group = root
    if collected:
        said = {"bioformats2raw.layout": 3}
        root.attrs.update(said if version == "0.4" else {"ome": said})
        group = root.create_group("0")
    scales = [
        {"axes": [{"name": name} for name in "tczyx"], "datasets": [{"path": "a"}, {"path": "b"}, {"path": "gone"}]}
    ]
    group.attrs.update({"multiscales": scales} if version == "0.4" else {"ome": {"multiscales": scales}})
    for name, level in (("a", array), ("b", small)):
        stored = np.moveaxis(level, 2, 0)[None, :, None]
        group.create_array(name, shape=stored.shape, dtype=stored.dtype, chunks=(1, 1, 1, 64, 64))[...] = stored
    check_windows(tmp_path / "image.zarr", array)
    with open_image(tmp_path / "image.zarr") as image:
        assert image.level_shapes == ((203, 171), (102, 86))
        assert np.array_equal(image.thumbnail(102, 86), small)


def test_slides(tmp_path):
    array = pixels()
    tiff(tmp_path / "image.svs", array, tile=(64, 48), compression="zlib")
    check_windows(tmp_path / "image.svs", array)


def test_slides_show_white_behind_what_is_transparent(tmp_path):
    array = pixels(channels=4)
    tiff(tmp_path / "image.svs", array, tile=(64, 64), extrasamples=["unassalpha"])
    with open_image(tmp_path / "image.svs") as image:
        seen = image.window(0, 0, 203, 171)
    share = array[..., 3:] / 255
    expected = array[..., :3] * share + 255 * (1 - share)
    # OpenSlide multiplies colours by alpha and divides again, which costs digits where alpha is small.
    assert np.abs(seen - expected).max() <= 2
    assert seen.shape == (203, 171, 3)


def ome(path, array, reductions=(), **options):
    """An OME-TIFF with a page per channel, and its reductions as SubIFDs."""
    with tifffile.TiffWriter(path, ome=True) as writer:
        options = {"metadata": {"axes": "CYX"}, "photometric": "minisblack", "tile": (64, 64), **options}
        writer.write(np.moveaxis(array, 2, 0), subifds=len(reductions), **options)
        for small in reductions:
            writer.write(np.moveaxis(small, 2, 0), subfiletype=1, **options | {"metadata": None})


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_channels_of_ome_tiff(compression, tmp_path):
    array = pixels(channels=5, dtype="uint16")
    small = array[::2, ::2]
    ome(tmp_path / "image.ome.tif", array, [small], compression=compression)
    check_windows(tmp_path / "image.ome.tif", array)
    with open_image(tmp_path / "image.ome.tif") as image:
        assert image.level_shapes == ((203, 171), (102, 86))
        assert np.array_equal(image.thumbnail(102, 86), small)


def test_pages_of_channels(tmp_path):
    array = pixels(channels=5)
    tifffile.imwrite(tmp_path / "image.tif", np.moveaxis(array, 2, 0), photometric="minisblack", compression="zlib")
    check_windows(tmp_path / "image.tif", array)


def pages(path, *images, **options):
    with tifffile.TiffWriter(path) as writer:
        for number, image in enumerate(images):
            kind = {"subfiletype": 1} if number else {}
            writer.write(image, photometric="rgb", metadata=None, tile=(64, 64), compression="zlib", **kind, **options)


def test_pyramids_of_pages(tmp_path):
    array = pixels()
    small, label = array[::2, ::2], pixels(50, 60)
    pages(tmp_path / "image.tif", array, small, label)
    with open_image(tmp_path / "image.tif") as image:
        assert image.level_shapes == ((203, 171), (102, 86))
        assert np.array_equal(image.thumbnail(102, 86), small)


def test_a_slide_and_a_geotiff_in_one(tmp_path):
    array = pixels()
    scale = (33550, "d", 3, (0.5, 0.5, 0.0), True)
    tie = (33922, "d", 6, (0.0, 0.0, 0.0, 1.0, 2.0, 0.0), True)
    keys = (34735, "H", 8, (1, 1, 0, 1, 1024, 0, 1, 1), True)
    tiff(tmp_path / "image.tif", array, tile=(64, 64), extratags=[scale, tie, keys])
    with tifffile.TiffFile(tmp_path / "image.tif") as file:
        assert file.pages[0].is_geotiff
    check_windows(tmp_path / "image.tif", array)


def test_one_image_in_every_format_is_the_same_pixels(tmp_path):
    array = pixels()
    tiff(tmp_path / "a.tif", array, tile=(64, 48), compression="zlib")
    tiff(tmp_path / "b.svs", array, tile=(64, 48))
    tiff(tmp_path / "c.tif", array)
    ome(tmp_path / "d.ome.tif", array)
    zarr_array(tmp_path / "e.zarr", array)
    np.save(tmp_path / "f.npy", array)
    Image.fromarray(array).save(tmp_path / "g.png")
    to_tiled_tiff(tmp_path / "g.png", tmp_path / "h.tif", tile=64)
    for path in sorted(tmp_path.iterdir()):
        check_windows(path, array)
        with open_image(path) as image:
            assert np.array_equal(image.thumbnail(40, 30), average(Whole(array), 40, 30)), path


class Whole:
    """An array as a level."""

    def __init__(self, array):
        self.array, self.shape, self.dtype, self.tile = array, array.shape, array.dtype, array.shape[:2]

    def window(self, top, left, height, width):
        return self.array[top : top + height, left : left + width]


@given(seed=st.integers(0, 2**31), dtype=st.sampled_from(["uint8", "uint16", "float32"]))
@settings(max_examples=40, deadline=None)
def test_thumbnails_are_averages_over_equal_areas(seed, dtype):
    random = np.random.default_rng(seed)
    rows, columns, to_rows, to_columns, height, width = (int(side) for side in random.integers(1, 24, 6))
    array = pixels(rows, columns, 2, dtype, seed)
    level = Whole(array)
    level.tile = (min(rows, height), min(columns, width))
    # The obvious way: repeat every pixel until both cuts divide.
    big = array.astype(float).repeat(to_rows, 0).repeat(to_columns, 1)
    expected = big.reshape(to_rows, rows, to_columns, columns, 2).mean((1, 3))
    got = average(level, to_rows, to_columns)
    assert got.dtype == array.dtype
    assert np.abs(got - expected).max() <= (0.5 + 1e-6 if dtype != "float32" else 1e-5)


def test_blocks_cover_every_pixel_once(tmp_path):
    array = pixels()
    tiff(tmp_path / "image.tif", array, tile=(64, 48))
    counts = np.zeros(array.shape[:2], int)
    with open_image(tmp_path / "image.tif") as image:
        for top, left, height, width in blocks(image, pixels=6000):
            assert top % 64 == left % 48 == 0
            counts[top : top + height, left : left + width] += 1
    assert (counts == 1).all()


CONVERSIONS = {
    "bool": lambda array: array.astype(np.uint8) * 255,
    "int8": np.float32,
    "int16": np.float32,
    "float16": np.float32,
    "float64": np.float32,
}


@pytest.mark.parametrize("dtype", CONVERSIONS)
@pytest.mark.parametrize("suffix", ["tif", "npy", "zarr"])
def test_other_numbers_are_converted(dtype, suffix, tmp_path):
    array = (np.random.default_rng(0).normal(size=(20, 30, 1)) * 100).astype(dtype)
    path = tmp_path / f"image.{suffix}"
    save = {"tif": tiff, "npy": np.save, "zarr": zarr_array}[suffix]
    save(path, array)
    convert = CONVERSIONS[dtype]
    check_windows(path, convert(array) if dtype == "bool" else array.astype(convert), [(0, 0, 20, 30), (3, 5, 7, 9)])


@pytest.mark.parametrize("dtype", ["uint32", "int32", "int64", "complex64"])
def test_numbers_that_do_not_fit_are_refused(dtype, tmp_path):
    np.save(tmp_path / "image.npy", np.zeros((4, 5), dtype))
    with pytest.raises(InputError, match=rf"image\.npy has pixels of type {dtype}, whose range the file does not tell"):
        open_image(tmp_path / "image.npy")


def test_grey_from_white_and_palettes_are_read_as_seen(tmp_path):
    array = pixels(channels=1)
    tifffile.imwrite(tmp_path / "white.tif", array[..., 0], photometric="miniswhite", tile=(64, 64))
    check_windows(tmp_path / "white.tif", 255 - array)
    table = np.random.default_rng(1).integers(0, 256, (3, 256)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "palette.tif", array[..., 0], photometric="palette", colormap=table * 257)
    check_windows(tmp_path / "palette.tif", table.T.astype(np.uint8)[array[..., 0]])


@pytest.mark.parametrize("channels", [2, 3, 4])
@pytest.mark.parametrize("kind", ["png", "jp2"])
def test_colours_keep_sixteen_bits(kind, channels, tmp_path):
    array = pixels(20, 30, channels, dtype="uint16")
    encoded = imagecodecs.png_encode(array) if kind == "png" else imagecodecs.jpeg2k_encode(array, level=0)
    if kind == "jp2" and channels == 2:
        pytest.skip("written as two colours, not as grey and alpha")
    (tmp_path / f"image.{kind}").write_bytes(encoded)
    seen = array if channels > 2 else array[..., [0, 0, 0, 1]]
    check_windows(tmp_path / f"image.{kind}", seen, [(0, 0, 20, 30), (3, 4, 5, 6)])


def test_colours_that_lose_bits_are_warned_of(tmp_path, monkeypatch):
    array = pixels(20, 30, dtype="uint16")
    (tmp_path / "image.ppm").write_bytes(b"P6 30 20 65535\n" + array.astype(">u2").tobytes())
    with pytest.warns(UserWarning, match=r"image\.ppm has 16 bits a channel, of which Pillow keeps 8"):
        image = open_image(tmp_path / "image.ppm")
    with image:
        assert np.array_equal(image.window(0, 0, 20, 30), np.rint(array / 257))
    (tmp_path / "image.png").write_bytes(imagecodecs.png_encode(array))
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    with pytest.warns(UserWarning, match=r"image\.png has 16 bits a channel, of which Pillow keeps 8"):
        image = open_image(tmp_path / "image.png")
    with image:
        assert np.array_equal(image.window(0, 0, 20, 30), array >> 8)


def test_cameras_pictures_are_set_upright(tmp_path):
    array = pixels(20, 30)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(array).save(tmp_path / "image.png", exif=exif)
    check_windows(tmp_path / "image.png", np.rot90(array, -1), [(0, 0, 30, 20), (5, 3, 8, 9)])


def test_windows_stay_inside(tmp_path):
    tiff(tmp_path / "image.tif", pixels(20, 30), tile=(16, 16))
    with open_image(tmp_path / "image.tif") as image:
        for window in [(-1, 0, 2, 2), (0, 29, 1, 2), (0, 0, 21, 1), (3, 3, 0, 1)]:
            with pytest.raises(InputError, match=r"image\.tif: the window of rows .* of 20 x 30 pixels"):
                image.window(*window)
        with pytest.raises(InputError, match="thumbnail of 0 x 3"):
            image.thumbnail(0, 3)


def writers(folder, array):
    """One file a backend, and the array."""
    tiff(folder / "a.tif", array, tile=(64, 48), compression="zlib")
    tiff(folder / "b.svs", array, tile=(64, 48))
    zarr_array(folder / "c.zarr", array, chunks=(64, 48, 3))
    np.save(folder / "d.npy", array)
    Image.fromarray(array).save(folder / "e.png")
    return sorted(folder.iterdir())


def test_images_are_pickled_as_their_path_and_opened_anew(tmp_path):
    array = pixels()
    for path in writers(tmp_path, array):
        with open_image(path) as image:
            packed = pickle.dumps(image)
        assert len(packed) < 300
        with pickle.loads(packed) as twin:
            assert np.array_equal(twin.window(3, 4, 50, 60), array[3:53, 4:64])
        # A closed image opens again.
        assert np.array_equal(twin.window(0, 0, 1, 1), array[:1, :1])
        twin.close()


def test_threads_read_side_by_side(tmp_path):
    array = pixels(300, 310)
    random = np.random.default_rng(0)
    corners = random.integers(0, 200, (60, 2)).tolist()
    for path in writers(tmp_path, array):
        with open_image(path) as image, ThreadPoolExecutor(6) as pool:
            windows = list(pool.map(lambda corner, image=image: image.window(*corner, 100, 110), corners))
        for (top, left), window in zip(corners, windows):
            assert np.array_equal(window, array[top : top + 100, left : left + 110])


def read_in_child(image, connection):
    connection.send(image.window(3, 4, 50, 60))
    connection.close()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_worker_processes_open_their_own(start, tmp_path):
    array = pixels()
    context = multiprocessing.get_context(start)
    for path in writers(tmp_path, array):
        with open_image(path) as image:
            image.window(0, 0, 10, 10)
            ours, theirs = context.Pipe()
            child = context.Process(target=read_in_child, args=(image, theirs))
            child.start()
            assert np.array_equal(ours.recv(), array[3:53, 4:64]), path
            child.join()
            assert np.array_equal(image.window(100, 100, 50, 50), array[100:150, 100:150])


def test_neighbouring_windows_decode_a_tile_once():
    decoded = []

    def decode(row, column):
        decoded.append((row, column))
        return np.zeros((16, 16, 1), np.uint8)

    level = Tiles((64, 64, 1), np.uint8, (16, 16), decode)
    for top in range(0, 64, 8):
        for left in range(0, 64, 8):
            level.window(top, left, 8, 8)
    assert sorted(decoded) == [(row, column) for row in range(4) for column in range(4)]
    level.forget()
    level.window(0, 0, 1, 1)
    assert decoded[16:] == [(0, 0)]


def test_the_cache_is_bounded_and_keeps_what_was_used_last():
    cache = TileCache(most_bytes=300)
    for number in range(10):
        cache.get(number, lambda: np.zeros(100, np.uint8), 100)
        cache.get(0, lambda: np.zeros(100, np.uint8), 100)
        assert cache.held_bytes <= 300
    made = []
    for key in (0, 9, 8, 1):
        cache.get(key, lambda key=key: made.append(key) or np.zeros(100, np.uint8), 100)
    assert made == [1]
    # What is larger than the cache stays until the next comes, or an image in one strip would be decoded every time.
    cache.get("large", lambda: np.zeros(1000, np.uint8), 1000)
    cache.get("large", lambda: pytest.fail("decoded twice"), 1000)
    assert cache.held_bytes == 1000
    cache.get("small", lambda: np.full(100, cache.held_bytes, np.uint8), 100)
    # The large one made room before the small one was decoded.
    assert cache.get("small", lambda: pytest.fail("decoded twice"), 100)[0] == 0
    assert cache.held_bytes == 100


def test_only_the_tiles_touched_are_read(tmp_path):
    """What lies elsewhere may be broken: nothing of it is looked at."""
    array = pixels(256, 256)
    for name, options in {"tiles": {"tile": (64, 64)}, "strips": {"rowsperstrip": 64}}.items():
        path = tmp_path / f"{name}.tif"
        tiff(path, array, compression="zlib", **options)
        with tifffile.TiffFile(path) as file:
            page = file.pages[0]
            offset, count = page.dataoffsets[-1], page.databytecounts[-1]
        overwrite(path, offset, b"\xff" * count)
        with open_image(path) as image:
            assert np.array_equal(image.window(0, 0, 192, 256), array[:192])
            with pytest.raises(InputError, match=rf"{name}\.tif: the tile at row 192, column .* cannot be read: "):
                image.window(200, 200, 10, 10)


def overwrite(path, offset, data):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


PEAK = """
import resource, sys
import numpy as np
from fitformer.data.readers import LazyImage, check_channels, open_image, to_tiled_tiff, write_tiled_tiff

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

side, path, compression = 12000, sys.argv[1], sys.argv[2]
row = np.arange(side, dtype=np.uint16).astype(np.uint8)

def window(top, left, height, width):
    line = row[left : left + width]
    return np.broadcast_to((line + row[top : top + height, None])[..., None], (height, width, 3))

before = peak()
if path.endswith("npy"):
    array = np.lib.format.open_memmap(path, "w+", np.uint8, (side, side, 3))
    del array
else:
    write_tiled_tiff(path, (side, side, 3), "uint8", window, compression=None if compression == "none" else compression)
with open_image(path) as image:
    for top in range(0, side, 400):
        for left in range(0, side, 400):
            part = image.window(top, left, 400, 400)
            assert path.endswith("npy") or np.array_equal(part, window(top, left, 400, 400))
    image.thumbnail(100, 100)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("suffix", "compression"), [("tif", "none"), ("tif", "deflate"), ("npy", "none")])
def test_memory_stays_far_below_the_image(suffix, compression, tmp_path):
    command = [sys.executable, "-c", PEAK, str(tmp_path / f"image.{suffix}"), compression]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    # The image has 412 MiB, and 128 MiB of tiles are kept.
    assert float(done.stdout) < 260


def truncate(path, share=0.6):
    os.truncate(path, int(os.path.getsize(path) * share))


@pytest.mark.parametrize(
    "options",
    [{"tile": (64, 64)}, {"tile": (64, 64), "compression": "zlib"}, {}, {"rowsperstrip": 8, "compression": "zlib"}],
)
def test_truncated_tiff(options, tmp_path):
    tiff(tmp_path / "image.tif", pixels(), **options)
    truncate(tmp_path / "image.tif")
    with pytest.raises(InputError, match=r"image\.tif is truncated: its pixels end at byte [\d,]+ and the file at"):
        open_image(tmp_path / "image.tif")


def test_a_tiff_cut_off_in_its_directory(tmp_path):
    with tifffile.TiffWriter(tmp_path / "image.tif") as writer:
        writer.write(pixels(), photometric="rgb", metadata=None)
    os.truncate(tmp_path / "image.tif", 40)
    with pytest.raises(InputError, match=r"image\.tif "):
        open_image(tmp_path / "image.tif")


@pytest.mark.parametrize("suffix", ["npy", "png", "jpg", "svs"])
def test_truncated_others(suffix, tmp_path):
    array, path = pixels(), tmp_path / f"image.{suffix}"
    if suffix == "npy":
        np.save(path, array)
    elif suffix == "svs":
        tiff(path, array, tile=(64, 64), compression="jpeg")
    else:
        Image.fromarray(array).save(path)
    truncate(path)
    with pytest.raises(InputError, match=rf"image\.{suffix}.*(truncated|cannot be read)"):
        open_image(path).window(0, 0, 203, 171)


def test_damaged_zarr(tmp_path):
    array = pixels()
    zarr_array(tmp_path / "image.zarr", array, chunks=(64, 48, 3))
    (tmp_path / "image.zarr/c/1/1/0").write_bytes(b"nothing of the kind")
    with open_image(tmp_path / "image.zarr") as image:
        assert np.array_equal(image.window(0, 0, 64, 171), array[:64])
        with pytest.raises(InputError, match=r"image\.zarr: the chunk at row 64, column 48 cannot be read: "):
            image.window(60, 60, 10, 10)


@pytest.mark.parametrize("suffix", ["tif", "svs", "npy", "png", "jpg", "txt"])
@pytest.mark.parametrize("content", [b"", b"this is no image at all", b"II*\0"])
def test_no_image_at_all(suffix, content, tmp_path):
    path = tmp_path / f"image.{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"image\.{suffix} "):
        open_image(path)


def test_folders_that_are_no_zarr(tmp_path):
    with pytest.raises(InputError, match=r" is a folder and no Zarr \(it has no zarr\.json, \.zarray or \.zgroup\)"):
        open_image(tmp_path)
    import zarr

    group = zarr.open_group(tmp_path / "two.zarr", mode="w")
    with pytest.raises(InputError, match=r"two\.zarr is a Zarr group of 0 arrays \(none\)"):
        open_image(tmp_path / "two.zarr")
    for name in "ab":
        group.create_array(name, shape=(4, 5), dtype="uint8")
    with pytest.raises(InputError, match=r"two\.zarr is a Zarr group of 2 arrays \(a, b\); give the path"):
        open_image(tmp_path / "two.zarr")
    with open_image(tmp_path / "two.zarr/a") as image:
        assert image.shape == (4, 5, 1)


def test_a_missing_file_and_its_nearest_name(tmp_path):
    (tmp_path / "slide-17.tif").touch()
    with pytest.raises(InputError, match=r"there is no .*slide-l7\.tif; did you mean 'slide-17\.tif'\?"):
        open_image(tmp_path / "slide-l7.tif")
    with pytest.raises(InputError, match=r"there is no .*/no/folder\.tif"):
        open_image(tmp_path / "no/folder.tif")


def test_compression_that_nobody_knows(tmp_path):
    tiff(tmp_path / "image.tif", pixels(), tile=(64, 64), compression="zlib")
    with tifffile.TiffFile(tmp_path / "image.tif", mode="r+") as file:
        file.pages[0].tags["Compression"].overwrite(34677)
    with pytest.raises(
        InputError, match=r"image\.tif is compressed with SGILOG24, which imagecodecs [\d.]+ cannot decode"
    ):
        open_image(tmp_path / "image.tif")


def test_colours_that_are_not_rgb(tmp_path):
    inks = pixels(channels=4)
    tifffile.imwrite(tmp_path / "inks.tif", inks, photometric="separated", tile=(64, 64))
    check_windows(tmp_path / "inks.tif", np.asarray(Image.fromarray(inks, "CMYK").convert("RGB")))
    tifffile.imwrite(tmp_path / "image.tif", pixels(), photometric="cielab", tile=(64, 64))
    with pytest.raises(InputError, match=r"image\.tif stores its colours as CIELab"):
        open_image(tmp_path / "image.tif")


def test_stacks_of_planes(tmp_path):
    stack = np.zeros((7, 20, 30), np.uint8)
    tifffile.imwrite(tmp_path / "image.ome.tif", stack, metadata={"axes": "ZYX"}, photometric="minisblack")
    with pytest.raises(InputError, match=r"image\.ome\.tif has 7 planes along its axis 'z'"):
        open_image(tmp_path / "image.ome.tif")
    np.save(tmp_path / "line.npy", np.zeros(7, np.uint8))
    with pytest.raises(InputError, match=r"line\.npy holds an array of shape \(7,\)"):
        open_image(tmp_path / "line.npy")
    np.save(tmp_path / "none.npy", np.zeros((0, 4, 3), np.uint8))
    with pytest.raises(InputError, match=r"none\.npy is empty"):
        open_image(tmp_path / "none.npy")
    np.save(tmp_path / "words.npy", np.array([["a", None]], dtype=object))
    with pytest.raises(InputError, match=r"words\.npy holds object and not numbers"):
        open_image(tmp_path / "words.npy")


def test_a_broken_reduction_is_passed_over(tmp_path):
    array = pixels()
    pages(tmp_path / "image.tif", array, array[::2, ::2])
    with tifffile.TiffFile(tmp_path / "image.tif") as file:
        offset, count = file.pages[1].dataoffsets[0], file.pages[1].databytecounts[0]
    overwrite(tmp_path / "image.tif", offset, b"\xff" * count)
    with open_image(tmp_path / "image.tif") as image:
        assert len(image.level_shapes) == 2
        assert np.array_equal(image.thumbnail(40, 30), average(Whole(array), 40, 30))


def test_a_reduction_that_is_cut_off_is_passed_over(tmp_path):
    array = pixels()
    pages(tmp_path / "image.tif", array, array[::2, ::2])
    with tifffile.TiffFile(tmp_path / "image.tif") as file:
        offsets = file.pages[1].tags["TileOffsets"]
        where, count = offsets.valueoffset, offsets.count
    overwrite(tmp_path / "image.tif", where, np.full(count, 10**7, "<u4").tobytes())
    with open_image(tmp_path / "image.tif") as image:
        assert image.level_shapes == ((203, 171),)
        assert np.array_equal(image.thumbnail(40, 30), average(Whole(array), 40, 30))


def test_channels_of_a_model(tmp_path):
    np.save(tmp_path / "image.npy", pixels())
    with open_image(tmp_path / "image.npy") as image:
        check_channels(image, 3)
        with pytest.raises(
            InputError, match=r"image\.npy has 3 channels and the model 1: convert the file, or train with"
        ):
            check_channels(image, 1)


def test_what_a_large_picture_costs(tmp_path):
    """Headers of 40,000 x 40,000 pixels are enough to refuse; nothing of that size is made."""
    with Image.open(png_of(tmp_path / "small.png", 8, 8)) as image:
        assert image.size == (8, 8)
    large = png_of(tmp_path / "large.png", 40_000, 40_000)
    message = r"large\.png, 40,000 x 40,000 pixels, .* only as a whole, 4\.5 GiB, and 1\.0 GiB is the most; convert it"
    with pytest.raises(InputError, match=message):
        open_image(large)
    with pytest.warns(UserWarning, match=r"large\.png.* 4\.5 GiB in every process that reads it; convert it once"):
        assert open_image(large, most_bytes=2**33).shape == (40_000, 40_000, 3)


def png_of(path, rows, columns):
    """A PNG whose header says that size and which has no pixels."""
    header = struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def test_what_a_large_strip_costs(tmp_path):
    array = pixels()
    tiff(tmp_path / "image.tif", array, rowsperstrip=203, compression="zlib")
    with pytest.raises(InputError, match=r"image\.tif is stored in compressed strips of 203 rows, each .* is the most"):
        open_image(tmp_path / "image.tif", most_bytes=1000)
    # The limit travels with the image to other processes.
    twin = pickle.loads(pickle.dumps(LazyImage(tmp_path / "image.tif", OpenOptions(most_bytes=1000))))
    with pytest.raises(InputError, match="is the most"):
        twin.window(0, 0, 1, 1)
    zarr_array(tmp_path / "image.zarr", array)
    with pytest.raises(InputError, match=r"image\.zarr is stored in chunks of 203 x 171 pixels"):
        open_image(tmp_path / "image.zarr", most_bytes=1000)
    # Strips that are not compressed cost nothing.
    tiff(tmp_path / "plain.tif", array)
    check_windows(tmp_path / "plain.tif", array)
    with open_image(tmp_path / "plain.tif", most_bytes=1000) as image:
        assert image.shape == array.shape


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "P", "LA", "CMYK", "I;16"])
@pytest.mark.parametrize("turn", [1, 6])
def test_pictures_are_decoded_band_by_band(mode, turn, tmp_path, monkeypatch):
    from fitformer.data.readers import pictures

    image = Image.fromarray(pixels()[..., 0] if mode in ("1", "L", "I;16") else pixels())
    image = image.quantize(9) if mode == "P" else image.convert(mode)
    tag = Image.Exif()
    tag[0x112] = turn
    path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    image.save(path, exif=tag)
    found = []
    for rows in (7, 10**6):
        monkeypatch.setattr(pictures, "_BAND", rows)
        with open_image(path) as opened:
            found.append(opened.window(0, 0, *opened.shape[:2]))
    assert found[0].shape[:2] == ((171, 203) if turn == 6 else (203, 171))
    assert found[0].any()
    assert np.array_equal(*found)


@pytest.mark.parametrize("kind", ["tiles", "strip", "npy", "png", "zarr"])
def test_what_is_decoded_for_one_pixel(kind, tmp_path):
    array, whole = pixels(), 203 * 171 * 3
    path = tmp_path / f"image.{ {'tiles': 'tif', 'strip': 'tif'}.get(kind, kind) }"
    if kind == "npy":
        np.save(path, array)
    elif kind == "png":
        Image.fromarray(array).save(path)
    elif kind == "zarr":
        zarr_array(path, array, chunks=(64, 48, 3))
    else:
        tiff(path, array, compression="zlib", **({"tile": (64, 48)} if kind == "tiles" else {"rowsperstrip": 203}))
    wanted = {"png": whole, "strip": whole, "npy": 171 * 3}.get(kind, 64 * 48 * 3)
    with open_image(path) as image:
        assert image.decode_bytes == wanted


def test_strips_that_fill_the_cache_are_warned_of(tmp_path, monkeypatch):
    tiff(tmp_path / "image.tif", pixels(), rowsperstrip=203, compression="zlib")
    monkeypatch.setattr("fitformer.data.readers.cache.MOST_BYTES", 1000)
    with pytest.warns(UserWarning, match=r"any window needs at least one; store it in small tiles: .*to_tiled_tiff"):
        open_image(tmp_path / "image.tif")


def test_without_the_packages(tmp_path, monkeypatch):
    paths = writers(tmp_path, pixels())
    packages = {"a.tif": "tifffile", "b.svs": "openslide", "c.zarr": "zarr"}
    for name in packages.values():
        monkeypatch.setitem(sys.modules, name, None)
    for path in paths:
        if path.name in packages:
            with pytest.raises(MissingDependencyError, match=rf"{packages[path.name]}.*fitformer\[gigapixel\]"):
                open_image(path)
        else:
            open_image(path).close()


def cut(array):
    return lambda top, left, height, width: array[top : top + height, left : left + width]


WRITTEN = [
    (1, "uint8", None),
    (3, "uint8", "deflate"),
    (4, "uint8", "lzw"),
    (2, "uint16", "zstd"),
    (3, "uint16", "deflate"),
    (6, "float32", "deflate"),
]


@pytest.mark.parametrize(("channels", "dtype", "compression"), WRITTEN)
@pytest.mark.parametrize("pyramid", [False, True])
@pytest.mark.parametrize("given", ["windows", "tiles"])
def test_written_tiles_are_read_again(channels, dtype, compression, pyramid, given, tmp_path):
    array = pixels(1100, 530, channels, dtype)
    tiles = (array[top : top + 128, left : left + 128] for top in range(0, 1100, 128) for left in range(0, 530, 128))
    source = tiles if given == "tiles" else cut(array)
    path = tmp_path / "image.tif"
    write_tiled_tiff(path, array.shape, dtype, source, tile=128, compression=compression, pyramid=pyramid)
    check_windows(path, array, [(0, 0, 1100, 530), (120, 100, 300, 40), (1099, 529, 1, 1)])
    assert list(tmp_path.iterdir()) == [path]
    with open_image(path) as image, tifffile.TiffFile(path) as file:
        assert file.pages[0].tile == (128, 128)
        assert image.level_shapes == ((1100, 530), (550, 265), (275, 133))[: 3 if pyramid else 1]
        if pyramid:
            # Twice rounded, at most twice half a step off; the odd last column counts twice.
            got, expected = image.thumbnail(275, 132), average(Whole(array[:, :528]), 275, 132)
            series = file.pages[2].asarray().reshape(275, 133, channels)[:, :132]
            assert np.abs(series - expected.astype(float)).max() <= (1.01 if dtype != "float32" else 1e-5)
            assert got.shape == expected.shape


def test_jpeg_tiles(tmp_path):
    slope = np.linspace(0, 255, 300).astype(np.uint8)
    array = np.broadcast_to(slope[:, None, None], (300, 200, 3))
    write_tiled_tiff(tmp_path / "image.tif", array.shape, "uint8", cut(array), compression="jpeg")
    with open_image(tmp_path / "image.tif") as image:
        assert np.abs(image.window(0, 0, 300, 200).astype(int) - array).max() < 8


def test_written_slides_open_in_openslide(tmp_path):
    array = pixels(600, 700)
    write_tiled_tiff(tmp_path / "image.svs", array.shape, "uint8", cut(array), tile=256, pyramid=True)
    check_windows(tmp_path / "image.svs", array)
    with open_image(tmp_path / "image.svs") as image, tifffile.TiffFile(tmp_path / "image.svs") as file:
        assert image.level_shapes == ((600, 700), (300, 350))
        assert np.array_equal(image.thumbnail(300, 350), file.pages[1].asarray())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int32"}, "pixels of type int32 cannot be written"),
        ({"tile": 100}, "tiles of 100 pixels"),
        ({"compression": "rar"}, "no compression 'rar' here: choose None, deflate, zstd, lzw, jpeg"),
        ({"dtype": "float32", "compression": "jpeg"}, "JPEG holds uint8"),
        ({"shape": (40, 50)}, r"not the shape \(40, 50\)"),
        ({"source": [np.zeros((16, 16, 3), np.uint8)]}, "1 tiles were given for an image of 12 tiles of 16 pixels"),
        ({"source": [np.zeros((16, 15, 3), np.uint8)]}, r"row 0, column 0 has the shape \(16, 15, 3\) and not"),
    ],
)
def test_what_cannot_be_written(arguments, message, tmp_path):
    given = {"shape": (40, 50, 3), "dtype": "uint8", "source": [], "tile": 16} | arguments
    shape, dtype, source = given.pop("shape"), given.pop("dtype"), given.pop("source")
    with pytest.raises(InputError, match=message):
        write_tiled_tiff(tmp_path / "image.tif", shape, dtype, source, **given)
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_fails_leaves_nothing_behind(tmp_path):
    def broken(top, left, height, width):
        if top:
            raise OSError(28, "No space left on device")
        return np.zeros((height, width, 3), np.uint8)

    with pytest.raises(OSError, match="No space left"):
        write_tiled_tiff(tmp_path / "image.tif", (1500, 1500, 3), "uint8", broken, pyramid=True)
    assert list(tmp_path.iterdir()) == []


def test_large_strips_and_pictures_are_converted_whatever_their_size(tmp_path, monkeypatch):
    array = pixels(600, 700)
    tiff(tmp_path / "strip.tif", array, rowsperstrip=600, compression="zlib")
    to_tiled_tiff(tmp_path / "strip.tif", tmp_path / "tiles.tif", tile=256)
    check_windows(tmp_path / "tiles.tif", array)
    with open_image(tmp_path / "tiles.tif", most_bytes=256 * 256 * 3) as image:
        assert image.level_shapes == ((600, 700), (300, 350))


def test_large_images_are_written_as_bigtiff(tmp_path, monkeypatch):
    monkeypatch.setattr("fitformer.data.readers.writing._CLASSIC_BYTES", 1000)
    array = pixels(100, 100)
    write_tiled_tiff(tmp_path / "image.tif", array.shape, "uint8", cut(array), tile=32)
    with tifffile.TiffFile(tmp_path / "image.tif") as file:
        assert file.is_bigtiff
    check_windows(tmp_path / "image.tif", array, [(0, 0, 100, 100)])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["a.tif", "b.svs", "d.npy", "e.png", "f.tif", "g.jpg"])
def test_damaged_bytes_are_one_clear_error_or_pixels(name, tmp_path):
    array, random = pixels(), np.random.default_rng(0)
    writers(tmp_path, array)
    tiff(tmp_path / "f.tif", array, compression="jpeg", rowsperstrip=16)
    Image.fromarray(array).save(tmp_path / "g.jpg")
    path = tmp_path / name
    whole = path.read_bytes()
    said = []
    for trial in range(60):
        data = bytearray(whole)
        for place in random.integers(0, 600 if trial % 2 else len(data), 3):
            data[place] = random.integers(0, 256)
        path.write_bytes(data[: random.integers(1, len(data))] if trial % 5 == 0 else data)
        try:
            with open_image(path) as image:
                image.window(0, 0, min(300, image.shape[0]), min(300, image.shape[1]))
        except InputError as error:
            said.append(str(error))
    assert len(said) >= 12
    assert all(name in message and "\n" not in message for message in said)


def test_files_that_change_after_they_were_opened(tmp_path):
    for path in writers(tmp_path, pixels()):
        if path.suffix in (".tif", ".npy", ".png"):
            image = open_image(path)
            truncate(path, 0.3)
            with pytest.raises(InputError, match=rf"{path.name}.* (cannot be read|was cut off)"):
                image.window(150, 0, 53, 171)
            path.unlink()
            with pytest.raises(InputError, match=rf"{path.name}.* cannot be read"):
                image.window(0, 0, 203, 171)
