"""Random TIFF, PNG and Zarr files of one picture are the same numbers, and those that reference libraries read.

The files are written here, bit by bit, so that no library decides both what is written and what is read. tifffile,
Pillow and GDAL say what is stored in them; the expected pixels follow from that by the table in docs/reading.md.
"""

import gzip
import pickle
import struct
import warnings
import zlib

import imagecodecs
import numpy as np
import pytest
import rasterio
import tifffile
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fitformer.data.decoding import UnreadableImageError, decode
from fitformer.data.foreground import foreground_groups
from fitformer.data.grouping import Grouping
from fitformer.data.readers import open_image
from fitformer.data.settings import ImageData
from fitformer.data.symmetry import Symmetry
from fitformer.errors import InputError
from fitformer.patching import PatchGrid

WHITE, BLACK, RGB, PALETTE = 0, 1, 2, 3
UNSIGNED, SIGNED, FLOAT = 1, 2, 3
CODES = {"H": 3, "I": 4}


def packed(samples, bits, byteorder):
    """Rows of samples (rows, k) as they lie in a file: below 8 bits and between, from the highest bit on."""
    if bits in (8, 16, 32, 64):
        return samples.astype(samples.dtype.newbyteorder(byteorder)).tobytes()
    places = np.arange(bits - 1, -1, -1, dtype=np.uint64)
    spread = (samples.astype(np.uint64)[..., None] >> places) & np.uint64(1)
    return np.packbits(spread.reshape(len(samples), -1).astype(np.uint8), axis=1).tobytes()


def write_tiff(path, stored, bits, photometric, *, kind=UNSIGNED, order="<", planar=False, orientation=1, side=0,
               palette=None, extra=(), deflate=False, nodata=None):  # fmt: skip
    """A TIFF of samples (rows, columns, k), in tiles of `side` or in strips of so many rows below 16."""
    rows, columns, samples = stored.shape
    tiled = side >= 16
    high, wide = (side, side) if tiled else (side or rows, columns)
    planes = [stored[..., k : k + 1] for k in range(samples)] if planar else [stored]
    parts = []
    for plane in planes:
        for top in range(0, rows, high):
            for left in range(0, columns, wide):
                part = plane[top : top + high, left : left + wide]
                if tiled:
                    part = np.pad(part, ((0, high - len(part)), (0, wide - part.shape[1]), (0, 0)))
                data = packed(part.reshape(len(part), -1), bits, order)
                parts.append(zlib.compress(data) if deflate else data)
    tags = {
        256: ("I", [columns]), 257: ("I", [rows]), 258: ("H", [bits] * samples), 259: ("H", [8 if deflate else 1]),
        262: ("H", [photometric]), 274: ("H", [orientation]), 277: ("H", [samples]), 284: ("H", [2 if planar else 1]),
        339: ("H", [kind] * samples),
    }  # fmt: skip
    where, counts = (324, 325) if tiled else (273, 279)
    tags |= {322: ("I", [wide]), 323: ("I", [high])} if tiled else {278: ("I", [high])}
    if extra:
        tags[338] = ("H", list(extra))
    if palette is not None:
        tags[320] = ("H", palette.T.ravel().tolist())
    offsets = 8 + np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(int)
    tags |= {where: ("I", offsets[:-1].tolist()), counts: ("I", [len(part) for part in parts])}
    body = b"".join(parts) + b"\0" * (offsets[-1] % 2)
    at = 8 + len(body)
    if nodata is not None:
        tags[42113] = ("s", nodata.encode() + b"\0")
    beyond, entries = at + 2 + 12 * len(tags) + 4, b""
    values = b""
    for tag, (letter, numbers) in sorted(tags.items()):
        code, count = (2, len(numbers)) if letter == "s" else (CODES[letter], len(numbers))
        value = numbers if letter == "s" else struct.pack(f"{order}{count}{letter}", *numbers)
        entries += struct.pack(f"{order}HHI", tag, code, count)
        if len(value) <= 4:
            entries += value.ljust(4, b"\0")
        else:
            entries += struct.pack(f"{order}I", beyond + len(values))
            values += value + b"\0" * (len(value) % 2)
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, at)
    path.write_bytes(head + body + struct.pack(f"{order}H", len(tags)) + entries + struct.pack(f"{order}I", 0) + values)


def write_png(path, stored, bits, colour, palette=None):
    """A PNG of samples (rows, columns, k); `colour` is its type: 0 grey, 2 RGB, 3 palette, 4 with alpha, 6 both."""
    rows, columns, _ = stored.shape
    order = packed(stored.reshape(rows, -1), bits, ">")
    lines = b"".join(b"\0" + order[k * (len(order) // rows) : (k + 1) * (len(order) // rows)] for k in range(rows))

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", columns, rows, bits, colour, 0, 0, 0))]
    if palette is not None:
        parts.append(chunk(b"PLTE", palette.astype(np.uint8).tobytes()))
    parts += [chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def seen(path):
    with open_image(path) as image:
        rows, columns, _ = image.shape
        whole = image.window(0, 0, rows, columns)
        assert (whole.shape, whole.dtype) == (image.shape, image.dtype)
        # A window is that part of the whole.
        top, left = rows // 3, columns // 2
        assert np.array_equal(image.window(top, left, rows - top, columns - left), whole[top:, left:])
        return whole


def by_gdal(path, look):
    """What GDAL finds in a file, which need not lie on the earth."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(path) as file:
            return look(file)


def eight_bits(pixels):
    return pixels if pixels.dtype == np.uint8 else np.rint(pixels / 257).astype(np.uint8)


UPRIGHT = {
    1: Symmetry(), 2: Symmetry(backwards=(False, True)), 3: Symmetry(backwards=(True, True)),
    4: Symmetry(backwards=(True, False)), 5: Symmetry(True), 6: Symmetry(True, (False, True)),
    7: Symmetry(True, (True, True)), 8: Symmetry(True, (True, False)),
}  # fmt: skip
files = st.fixed_dictionaries(
    {
        "order": st.sampled_from("<>"),
        "planar": st.booleans(),
        "orientation": st.integers(1, 8),
        "side": st.sampled_from([0, 1, 5, 16, 32]),
        "deflate": st.booleans(),
    }
)
SIDES = st.tuples(st.integers(1, 40), st.integers(1, 40))
many = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)


def random_samples(seed, shape, bits):
    random = np.random.default_rng(seed)
    dtype = np.uint8 if bits <= 8 else np.uint16 if bits <= 16 else np.uint32
    return random.integers(0, 2**bits, shape, dtype=np.uint64).astype(dtype)


def spread(stored, bits):
    """Whole numbers of some bits over the range of 8 or 16."""
    most, dtype = (255, np.uint8) if bits <= 8 else (65535, np.uint16)
    return ((stored.astype(np.int64) * most + (2**bits - 1) // 2) // (2**bits - 1)).astype(dtype)


@many
@given(seed=st.integers(0, 2**31), sides=SIDES, bits=st.integers(1, 16), file=files, white=st.booleans())
def test_grey(seed, sides, bits, file, white, tmp_path):
    stored = random_samples(seed, (*sides, 1), bits)
    file["planar"] = False
    write_tiff(tmp_path / "a.tif", stored, bits, WHITE if white else BLACK, **file)
    assert np.array_equal(tifffile.imread(tmp_path / "a.tif").reshape(*sides), stored[..., 0])
    turned = UPRIGHT[file["orientation"]].turn(spread(2**bits - 1 - stored.astype(int) if white else stored, bits))
    assert np.array_equal(seen(tmp_path / "a.tif"), turned)
    assert np.array_equal(decode(tmp_path / "a.tif", "a"), eight_bits(turned))
    # Whatever it is called, and from memory.
    (tmp_path / "a.tif").rename(tmp_path / "a.picture")
    assert np.array_equal(seen(tmp_path / "a.picture"), turned)
    assert np.array_equal(decode((tmp_path / "a.picture").read_bytes(), "a"), eight_bits(turned))
    if bits in (1, 2, 4, 8, 16):
        write_png(
            tmp_path / "a.png", np.ascontiguousarray(turned // (255 // (2**bits - 1)) if bits < 8 else turned), bits, 0
        )
        assert np.array_equal(seen(tmp_path / "a.png"), turned)
        assert np.array_equal(decode(tmp_path / "a.png", "a"), eight_bits(turned))
        # Pillow does not turn what it maps into memory, nor invert sixteen bits.
        if (file["orientation"] == 1 or file["deflate"]) and not (white and bits == 16):
            with Image.open(tmp_path / "a.picture") as image:
                assert np.array_equal(np.asarray(image.convert("L") if bits < 16 else image), turned[..., 0])


@many
@given(
    seed=st.integers(0, 2**31), sides=SIDES, bits=st.sampled_from([8, 16]), file=files, alpha=st.booleans(),
    colours=st.sampled_from([1, 3]),
)  # fmt: skip
def test_colour_and_alpha(seed, sides, bits, file, alpha, colours, tmp_path):
    stored = random_samples(seed, (*sides, colours + alpha), bits)
    write_tiff(tmp_path / "a.tif", stored, bits, RGB if colours == 3 else BLACK, extra=(2,) * alpha, **file)
    turned = UPRIGHT[file["orientation"]].turn(stored[..., [0, 0, 0, 1]] if stored.shape[2] == 2 else stored)
    assert np.array_equal(seen(tmp_path / "a.tif"), turned)
    assert np.array_equal(decode(tmp_path / "a.tif", "a"), eight_bits(turned))
    write_png(tmp_path / "a.png", stored, bits, {1: 0, 2: 4, 3: 2, 4: 6}[colours + alpha])
    back = UPRIGHT[file["orientation"]].turn(seen(tmp_path / "a.png"))
    assert np.array_equal(back, turned)
    assert np.array_equal(by_gdal(tmp_path / "a.tif", lambda file: np.moveaxis(file.read(), 0, 2)), stored)


@many
@given(seed=st.integers(0, 2**31), sides=SIDES, bits=st.sampled_from([1, 2, 4, 8]), file=files, alpha=st.booleans())
def test_palettes(seed, sides, bits, file, alpha, tmp_path):
    stored = random_samples(seed, (*sides, 1 + alpha), bits)
    table = random_samples(seed + 1, (2**bits, 3), 8)
    file["planar"] = file["planar"] and alpha
    palette = table.astype(np.uint16) * 257
    write_tiff(tmp_path / "a.tif", stored, bits, PALETTE, palette=palette, extra=(2,) * alpha, **file)
    colours = table[stored[..., 0]]
    if alpha:
        colours = np.concatenate([colours, spread(stored[..., 1:], bits)], axis=2)
    turned = UPRIGHT[file["orientation"]].turn(colours)
    assert np.array_equal(seen(tmp_path / "a.tif"), turned)
    assert np.array_equal(decode(tmp_path / "a.tif", "a"), turned)
    write_png(tmp_path / "a.png", stored[..., :1], bits, 3, palette=table)
    assert np.array_equal(UPRIGHT[file["orientation"]].turn(seen(tmp_path / "a.png")), turned[..., :3])
    # A mask is drawn in numbers of the palette, whatever their colours.
    for name in ("a.tif", "a.png"):
        with open_image(tmp_path / name, palette_indices=True) as image:
            numbers = image.window(0, 0, *image.shape[:2])
            turn = UPRIGHT[file["orientation"]] if name == "a.tif" else Symmetry()
            assert np.array_equal(numbers, turn.turn(stored[..., :1]))


@many
@given(
    seed=st.integers(0, 2**31), sides=SIDES, file=files, channels=st.integers(1, 5),
    dtype=st.sampled_from(["i1", "i2", "f2", "f4", "f8", "u4", "i4", "u8", "i8"]),
)  # fmt: skip
def test_numbers_without_a_range(seed, sides, file, channels, dtype, tmp_path):
    random, dtype = np.random.default_rng(seed), np.dtype(dtype)
    stored = random.normal(0, 50, (*sides, channels)).astype(dtype)
    kind = {"i": SIGNED, "u": UNSIGNED, "f": FLOAT}[dtype.kind]
    extra = (0,) * (channels - 1)
    write_tiff(tmp_path / "a.tif", stored, dtype.itemsize * 8, BLACK, kind=kind, extra=extra, **file)
    turned = UPRIGHT[file["orientation"]].turn(stored)
    if dtype.str[1:] in ("i1", "i2", "f2", "f4", "f8"):
        assert np.array_equal(seen(tmp_path / "a.tif"), turned.astype(np.float32))
        array = zarr.create_array(str(tmp_path / f"{seed}.zarr"), shape=turned.shape, dtype=dtype, overwrite=True)
        array[:] = turned
        if channels < min(turned.shape[:2]) or channels == 1:
            assert np.array_equal(seen(tmp_path / f"{seed}.zarr"), turned.astype(np.float32))
    else:
        with pytest.raises(InputError, match="whose range the file does not tell"):
            open_image(tmp_path / "a.tif")
    if channels in (1, 3, 4):
        with pytest.raises(UnreadableImageError, match="whose range the file does not tell"):
            decode(tmp_path / "a.tif", "a")
        # With a range, both paths scale by it alone.
        share = np.clip((turned.astype(np.float64) + 20) / 60, 0, 1)
        assert np.array_equal(
            decode(tmp_path / "a.tif", "a", pixel_range=(-20, 40)), eight_bits(np.rint(share * 65535))
        )
    with open_image(tmp_path / "a.tif", pixel_range=(-20, 40)) as image:
        assert image.dtype == np.uint16
        share = np.clip((turned.astype(np.float64) + 20) / 60, 0, 1)
        assert np.array_equal(image.window(0, 0, *image.shape[:2]), np.rint(share * 65535))


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("channels", [2, 4])
def test_colours_that_alpha_was_multiplied_into_are_as_they_were(bits, channels, tmp_path):
    stored = random_samples(0, (20, 30, channels), bits)
    stored[..., -1] |= 2 ** (bits - 1)
    stored[..., :-1] = np.minimum(stored[..., :-1], stored[..., -1:])
    write_tiff(tmp_path / "a.tif", stored, bits, RGB if channels == 4 else BLACK, extra=(1,))
    if (bits, channels) == (8, 4):
        with Image.open(tmp_path / "a.tif") as image:
            wanted = np.asarray(image)
    else:
        colours = np.minimum(stored[..., :-1].astype(np.int64) * (2**bits - 1) // stored[..., -1:], 2**bits - 1)
        wanted = np.concatenate([colours, stored[..., -1:]], axis=2)[
            ..., [0, 0, 0, 1] if channels == 2 else slice(None)
        ]
    assert np.array_equal(seen(tmp_path / "a.tif"), wanted)


def test_samples_that_are_no_alpha_stay(tmp_path):
    stored = random_samples(0, (20, 30, 2), 8)
    write_tiff(tmp_path / "a.tif", stored, 8, BLACK, extra=(0,))
    assert np.array_equal(seen(tmp_path / "a.tif"), stored)
    with pytest.raises(UnreadableImageError, match="it has 2 channels, and images of one size have 1, 3 or 4"):
        decode(tmp_path / "a.tif", "a")


def test_a_palette_of_eight_bits_and_one_that_is_too_short(tmp_path):
    stored, table = random_samples(0, (20, 30, 1), 8), random_samples(1, (256, 3), 8)
    write_tiff(tmp_path / "a.tif", stored, 8, PALETTE, palette=table.astype(np.uint16))
    assert np.array_equal(seen(tmp_path / "a.tif"), table[stored[..., 0]])
    write_tiff(tmp_path / "b.tif", stored, 8, PALETTE, palette=table[:100].astype(np.uint16) * 257)
    with (
        open_image(tmp_path / "b.tif") as image,
        pytest.raises(InputError, match=r"its palette has 100: it is damaged"),
    ):
        image.window(0, 0, 20, 30)


# --- no data


def checkered(value, dtype):
    """An image of four groups of 8 x 8, in one of which all, and in one some pixels have no data."""
    pixels = np.random.default_rng(0).integers(10, 60, (16, 16, 1)).astype(dtype)
    pixels[:8, :8] = value
    pixels[8:, 8:12] = value
    return pixels


NODATA = [
    ("u1", 1, UNSIGNED, "0"),
    ("u1", 1, UNSIGNED, "255"),
    ("u2", 2, UNSIGNED, "65535"),
    ("i2", 2, SIGNED, "-9999"),
    ("f4", 4, FLOAT, "-3.4028234663852886e+38"),
    ("f4", 4, FLOAT, "nan"),
    ("f8", 8, FLOAT, "-9999"),
]


@pytest.mark.parametrize(("dtype", "size", "kind", "nodata"), NODATA)
@pytest.mark.parametrize("background", [None, "auto", "white"])
def test_what_a_geotiff_says_has_no_data_is_background(dtype, size, kind, nodata, background, tmp_path):
    value = float(nodata)
    write_tiff(tmp_path / "a.tif", checkered(value, dtype), size * 8, BLACK, kind=kind, nodata=nodata, side=16)
    valid = by_gdal(tmp_path / "a.tif", lambda file: file.dataset_mask() > 0)
    with open_image(tmp_path / "a.tif") as image:
        assert image.nodata is not None
        found = foreground_groups(image, 8, background=background, tolerance=1e-4)
        assert found.tolist() == [[False, True], [True, True]]
        assert valid.reshape(2, 8, 2, 8).any(axis=(1, 3)).tolist() == found.tolist()
        grid = PatchGrid(None, group_size=8, patch_size=4, channels=1)
        group = Grouping(
            grid, glimpses=1, settings=ImageData(image_size=None, background=background or "none", tolerance=1e-4)
        )
        grouped = group(image)
        assert grouped.coords.tolist() == [[-1, 0], [0, 1], [1, 0], [1, 1]]
        tokens, _ = grouped.read(slice(None))
        assert bool(tokens.isfinite().all())
        if image.dtype.kind == "f":
            # A glimpse is an average of what there is, and what is not there is the middle of the range.
            wanted = checkered(value, dtype)[valid].astype(np.float64)
            assert 10 <= float(tokens[0, 0].max()) <= 60
            assert float(tokens[0, 3].min()) == 0
            assert wanted.min() >= 10


def test_no_data_in_a_range(tmp_path):
    write_tiff(tmp_path / "a.tif", checkered(-9999, "i2"), 16, BLACK, kind=SIGNED, nodata="-9999")
    with open_image(tmp_path / "a.tif", pixel_range=(30, 50)) as image:
        pixels = image.window(0, 0, 16, 16)
        assert not pixels[:8, :8].any()
        # What lies below the range is black, and still there.
        assert pixels[:8, 8:].min() == 1
        assert foreground_groups(image, 8).tolist() == [[False, True], [True, True]]


def test_a_level_that_the_type_does_not_hold_means_nothing(tmp_path):
    write_tiff(tmp_path / "a.tif", checkered(0, "u1"), 8, BLACK, nodata="-9999")
    with open_image(tmp_path / "a.tif") as image:
        assert image.nodata is None
        assert foreground_groups(image, 8).all()


# --- masks


@pytest.mark.parametrize("kind", ["palette tif", "palette png", "float", "geotiff"])
def test_masks_count_by_their_numbers(kind, tmp_path):
    drawn = np.zeros((16, 16, 1), np.uint8)
    drawn[:8, 8:] = 1
    colours = np.full((256, 3), 200)
    name = "mask.png" if kind == "palette png" else "mask.tif"
    if kind == "palette png":
        write_png(tmp_path / name, drawn, 8, 3, palette=colours)
    elif kind == "palette tif":
        write_tiff(tmp_path / name, drawn, 8, PALETTE, palette=colours.astype(np.uint16) * 257)
    elif kind == "float":
        floats = np.where(drawn > 0, 1, np.where(np.arange(16)[:, None, None] < 4, np.nan, 0)).astype(np.float32)
        write_tiff(tmp_path / name, floats, 32, BLACK, kind=FLOAT)
    else:
        write_tiff(tmp_path / name, np.where(drawn > 0, 3, 255).astype(np.uint8), 8, BLACK, nodata="255")
    np.save(tmp_path / "image.npy", np.zeros((16, 16, 3), np.uint8))
    with open_image(tmp_path / "image.npy") as image:
        assert foreground_groups(image, 8, mask=tmp_path / name).tolist() == [[False, True], [False, False]]


# --- reductions


def pages(path, *arrays, **marks):
    with tifffile.TiffWriter(path, ome=marks.pop("ome", False)) as file:
        for step, array in enumerate(arrays):
            file.write(array, photometric="minisblack", tile=(64, 64), **(marks if step else {"metadata": None}))


@pytest.mark.parametrize("sides", [256, 171, 128])
@pytest.mark.parametrize("ome", [False, True])
def test_a_smaller_page_is_no_reduction_unless_it_says_so(sides, ome, tmp_path):
    large, small = np.full((512, 512), 200, np.uint8), np.zeros((sides, sides), np.uint8)
    pages(tmp_path / "a.tif", large, small, ome=ome)
    with open_image(tmp_path / "a.tif") as image:
        assert image.level_shapes == ((512, 512),)
        assert image.thumbnail(64, 64).min() == 200
    pages(tmp_path / "b.tif", large, np.full_like(small, 100), subfiletype=1)
    with open_image(tmp_path / "b.tif") as image:
        assert image.level_shapes == ((512, 512), (sides, sides))
        assert image.thumbnail(64, 64).max() == 100


def test_reductions_below_the_image_and_of_gdal(tmp_path):
    large = np.random.default_rng(0).integers(0, 256, (512, 384), dtype=np.uint8)
    with tifffile.TiffWriter(tmp_path / "a.ome.tif", ome=True) as file:
        file.write(large, subifds=1, tile=(64, 64))
        file.write(large[::2, ::2], subfiletype=1, tile=(64, 64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(
            tmp_path / "b.tif", "w", driver="GTiff", height=512, width=384, count=1, dtype="uint8", tiled=True,
            blockxsize=64, blockysize=64,
        ) as file:  # fmt: skip
            file.write(large, 1)
            file.build_overviews([2, 4], rasterio.enums.Resampling.average)
    for name, wanted in (("a.ome.tif", 2), ("b.tif", 3)):
        with open_image(tmp_path / name) as image:
            assert len(image.level_shapes) == wanted
            assert np.array_equal(image.window(0, 0, 512, 384)[..., 0], large)


# --- slides, old kinds, and files that others read


def test_a_slide_of_other_pixels_than_bytes_of_rgb_is_read_as_it_is(tmp_path):
    stored = np.random.default_rng(0).integers(0, 4096, (200, 170), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "a.svs", stored, tile=(64, 64), photometric="minisblack")
    assert np.array_equal(seen(tmp_path / "a.svs")[..., 0], stored)


def broken_slide(path, page=0):
    """A tiled pyramid, of which the first tile of one level is damaged."""
    large = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    with tifffile.TiffWriter(path) as file:
        for step in (1, 2, 4):
            file.write(
                large[::step, ::step], photometric="rgb", tile=(64, 64), compression="jpeg", metadata=None,
                compressionargs={"level": 90}, subfiletype=int(step > 1),
            )  # fmt: skip
    with tifffile.TiffFile(path) as file:
        where, count = file.pages[page].dataoffsets[0], file.pages[page].databytecounts[0]
    with open(path, "r+b") as file:
        file.seek(where)
        file.write(b"\xff\xd8" + b"\x00" * (count - 2))


@pytest.mark.parametrize("suffix", ["svs", "tif"])
def test_one_broken_tile_is_all_that_is_lost(suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    broken_slide(path)
    with open_image(path) as image:
        with pytest.raises(InputError, match=rf"a\.{suffix}: the (window|tile) at row 0, column 0"):
            image.window(0, 0, 64, 64)
        assert image.shape == (512, 512, 3)
        assert image.window(128, 128, 64, 64).std() > 10
        with pytest.raises(InputError, match="row 0, column 0"):
            image.window(0, 0, 64, 64)


@pytest.mark.parametrize("suffix", ["svs", "tif"])
def test_a_broken_level_of_a_slide_is_passed_over(suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    broken_slide(path, page=2)
    with open_image(path) as image:
        assert image.thumbnail(100, 100).shape == (100, 100, 3)
        assert image.window(0, 0, 512, 512).std() > 10


def test_jpeg_as_tiff_once_had_it(tmp_path):
    picture = Image.effect_mandelbrot((64, 48), (-2, -1, 1, 1), 50).convert("RGB")
    picture.save(tmp_path / "a.jpg", quality=95)
    jpeg = (tmp_path / "a.jpg").read_bytes()
    tags = [(256, 4, 64), (257, 4, 48), (258, 3, 8), (259, 3, 6), (262, 3, 6), (273, 4, 8), (277, 3, 3), (278, 4, 48),
            (279, 4, len(jpeg)), (513, 4, 8), (514, 4, len(jpeg))]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, code, 1, value) for tag, code, value in tags)
    head = struct.pack("<2sHI", b"II", 42, 8 + len(jpeg))
    (tmp_path / "a.tif").write_bytes(head + jpeg + struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0))
    with Image.open(tmp_path / "a.tif") as image:
        wanted = np.asarray(image.convert("RGB"))
    assert np.abs(seen(tmp_path / "a.tif").astype(int) - wanted).max() == 0
    assert wanted.std() > 10
    (tmp_path / "a.tif").write_bytes(head + b"\0" * len(jpeg) + struct.pack("<H", len(tags)) + entries + b"\0" * 4)
    with pytest.raises(InputError, match=r"a\.tif cannot be read"):
        open_image(tmp_path / "a.tif")


def test_a_table_of_strips_that_goes_on_beyond_the_file(tmp_path):
    stored = random_samples(0, (20, 30, 1), 8)
    write_tiff(tmp_path / "a.tif", stored, 8, BLACK, side=8)
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+") as file:
        counts = list(file.pages[0].databytecounts)
        # As if the last strip, of 4 rows, had 8, far beyond the end.
        file.pages[0].tags["StripByteCounts"].overwrite([*counts[:-1], 10**6])
    assert np.array_equal(seen(tmp_path / "a.tif"), stored)
    write_tiff(tmp_path / "b.tif", stored, 8, BLACK, side=8)
    with tifffile.TiffFile(tmp_path / "b.tif", mode="r+") as file:
        tags = file.pages[0].tags
        tags["StripByteCounts"].overwrite([*file.pages[0].databytecounts, 240])
        tags["StripOffsets"].overwrite([*file.pages[0].dataoffsets, 10**6])
    assert np.array_equal(seen(tmp_path / "b.tif"), stored)


def test_a_picture_under_the_name_of_another_kind(tmp_path):
    stored = random_samples(0, (20, 30, 3), 8)
    Image.fromarray(stored).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.tif")
    assert np.array_equal(seen(tmp_path / "a.tif"), stored)


def test_a_relative_path_stays_where_it_was(tmp_path, monkeypatch):
    stored = random_samples(0, (20, 30, 3), 8)
    Image.fromarray(stored).save(tmp_path / "a.png")
    np.save(tmp_path / "b.npy", stored)
    write_tiff(tmp_path / "c.tif", stored, 8, RGB, side=16, deflate=True)
    monkeypatch.chdir(tmp_path)
    images = [open_image(name) for name in ("a.png", "b.npy", "c.tif")]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for image in images:
        with image:
            assert np.array_equal(image.window(0, 0, 20, 30), stored)
            assert pickle.loads(pickle.dumps(image)).shape == (20, 30, 3)


def test_channels_are_converted_alike_in_both_paths(tmp_path):
    stored = random_samples(0, (20, 30, 4), 8)
    Image.fromarray(stored).save(tmp_path / "a.png")
    deep = stored.astype(np.uint16) * 257
    write_tiff(tmp_path / "a.tif", deep, 16, RGB, extra=(2,))
    for channels in (1, 3, 4):
        wanted = decode(tmp_path / "a.png", "a", channels)
        with open_image(tmp_path / "a.png", channels=channels) as image:
            assert np.array_equal(image.window(0, 0, 20, 30), wanted)
        with open_image(tmp_path / "a.tif", channels=channels) as image:
            assert np.abs(image.window(0, 0, 20, 30).astype(float) / 257 - wanted).max() <= 1
    np.save(tmp_path / "a.npy", np.zeros((9, 9, 5), np.uint8))
    with pytest.raises(InputError, match="has 5 channels and 3 are asked for"):
        open_image(tmp_path / "a.npy", channels=3)


@pytest.mark.parametrize("suffix", ["npy", "tif"])
def test_a_file_that_is_cut_off_while_it_is_open_is_an_error(suffix, tmp_path):
    stored = random_samples(0, (400, 300, 3), 8)
    path = tmp_path / f"a.{suffix}"
    if suffix == "npy":
        np.save(path, stored)
    else:
        write_tiff(path, stored, 8, RGB)
    with open_image(path) as image:
        assert np.array_equal(image.window(390, 0, 10, 300), stored[390:])
        with open(path, "r+b") as file:
            file.truncate(1000)
        with pytest.raises(InputError, match=rf"a\.{suffix} was cut off: its pixels end at byte 360,.* byte 1,000"):
            image.window(390, 0, 10, 300)


# --- chunks that inflate


@pytest.mark.parametrize(("zarr_format", "codec"), [(2, "gzip"), (2, "zstd"), (2, "blosc"), (3, "gzip"), (3, "zstd")])
def test_a_chunk_that_inflates_beyond_its_pixels_is_refused_before_it_does(zarr_format, codec, tmp_path):
    import numcodecs

    kinds = {2: {"gzip": numcodecs.GZip, "zstd": numcodecs.Zstd, "blosc": numcodecs.Blosc},
             3: {"gzip": zarr.codecs.GzipCodec, "zstd": zarr.codecs.ZstdCodec}}  # fmt: skip
    stored = random_samples(0, (64, 48), 8)
    array = zarr.create_array(
        str(tmp_path / "a.zarr"), shape=stored.shape, chunks=(32, 48), dtype="u1", zarr_format=zarr_format,
        compressors=kinds[zarr_format][codec](),
    )  # fmt: skip
    array[:] = stored
    assert np.array_equal(seen(tmp_path / "a.zarr")[..., 0], stored)
    much = np.zeros(2**24, np.uint8)
    bomb = {"gzip": lambda: gzip.compress(much.tobytes()), "zstd": lambda: imagecodecs.zstd_encode(much),
            "blosc": lambda: numcodecs.Blosc().encode(much)}[codec]()  # fmt: skip
    (tmp_path / "a.zarr" / ("0.0" if zarr_format == 2 else "c/0/0")).write_bytes(bomb)
    with open_image(tmp_path / "a.zarr") as image:
        with pytest.raises(
            InputError, match=r"inflates to more than the 67,072 bytes that a chunk of its array can have"
        ):
            image.window(0, 0, 8, 8)
        assert np.array_equal(image.window(40, 0, 8, 8)[..., 0], stored[40:48, :8])


def test_an_icon_is_no_larger_than_icons_are(tmp_path):
    for sides in ((600, 500), (3000, 3000)):
        write_png(tmp_path / "a.png", np.ones((*sides, 1), np.uint8), 8, 0)
        png = (tmp_path / "a.png").read_bytes()
        head = struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 8, len(png), 22)
        (tmp_path / "a.ico").write_bytes(head + png)
        if sides[0] == 600:
            assert decode(tmp_path / "a.ico", "a.ico").shape == (600, 500, 1)
        else:
            with pytest.raises(UnreadableImageError, match="decompression bomb"):
                decode(tmp_path / "a.ico", "a.ico")
