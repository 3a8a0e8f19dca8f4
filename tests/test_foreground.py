"""Groups that hold something: none is missed, empty ones are found, and masks agree with thresholds."""

from math import ceil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fitformer.data.background import band_of
from fitformer.data.foreground import foreground_groups, foreground_groups_transformed
from fitformer.data.readers import open_image, write_tiled_tiff
from fitformer.data.symmetry import DIHEDRAL, IDENTITY, Symmetry
from fitformer.errors import InputError


def saved(path, array, **options):
    write_tiled_tiff(path, array.shape, array.dtype, lambda *place: cut(array, *place), tile=64, **options)
    return open_image(path)


def cut(array, top, left, height, width):
    return array[top : top + height, left : left + width]


def by_hand(something, rows, columns, min_foreground=0.0):
    """Group by group."""
    height, width = something.shape
    return np.array(
        [
            [cut(something, top, left, rows, columns).mean() > min_foreground for left in range(0, width, columns)]
            for top in range(0, height, rows)
        ]
    )


@given(seed=st.integers(0, 2**31), min_foreground=st.sampled_from([0.0, 0.01, 0.3]))
@settings(max_examples=30, deadline=None)
def test_every_single_pixel_counts(seed, min_foreground, tmp_path_factory):
    random = np.random.default_rng(seed)
    height, width, rows, columns = (int(side) for side in random.integers((4, 4, 1, 1), (200, 200, 70, 70)))
    something = random.random((height, width)) < random.choice([0.0005, 0.3])
    array = np.where(something[..., None], np.uint8(0), np.uint8(255)).repeat(3, 2)
    path = tmp_path_factory.mktemp("image") / "image.npy"
    np.save(path, array)
    with open_image(path) as image:
        found = foreground_groups(image, (rows, columns), background="white", min_foreground=min_foreground)
    assert found.dtype == bool
    assert np.array_equal(found, by_hand(something, rows, columns, min_foreground))


def test_a_single_pixel_of_a_large_image_is_not_missed(tmp_path):
    array = np.full((1500, 1700, 3), 250, np.uint8)
    array[1499, 1699, 1] = 200
    with saved(tmp_path / "image.tif", array, pyramid=True) as image:
        found = foreground_groups(image, 300, background="white")
        assert np.argwhere(found).tolist() == [[4, 5]]
        assert not foreground_groups(image, 300, background="white", min_foreground=0.001).any()
        # A coarse look does not see it, but it sees what is larger than the pixels of the reduction.
        assert not foreground_groups(image, 300, background="white", exact=False).any()
    array[700:740, 100:140] = 100
    with saved(tmp_path / "image.tif", array, pyramid=True) as image:
        assert np.argwhere(foreground_groups(image, 300, background="white", exact=False)).tolist() == [[2, 0]]
    with saved(tmp_path / "image.tif", array) as image:
        # Without a reduction in the file, the coarse look is the exact one.
        assert foreground_groups(image, 300, background="white", exact=False)[4, 5]


@pytest.mark.parametrize(
    ("dtype", "background", "level", "other"),
    [
        ("uint8", "white", 230, 229),
        ("uint8", "black", 25, 26),
        ("uint8", 100, 125, 126),
        ("uint8", (255, 0), (230, 25), (230, 26)),
        ("uint16", "white", 58982, 58981),
        ("uint16", "black", 6553, 6554),
        ("float32", "black", 0.09, 0.11),
        ("float32", -3.0, -2.91, -2.89),
        ("float32", "black", np.nan, 1.0),
    ],
)
def test_the_threshold_is_a_share_of_the_range(dtype, background, level, other, tmp_path):
    array = np.zeros((8, 8, 2), dtype)
    array[:] = level
    array[5, 2] = other
    np.save(tmp_path / "image.npy", array)
    with open_image(tmp_path / "image.npy") as image:
        assert foreground_groups(image, 4, background=background).tolist() == [[False, False], [True, False]]


def off_white(dtype="uint8", size=(512, 640), noise=3.0):
    """A canvas of noise around a pale colour, with something in the group of 64 pixels at row 2, column 3."""
    random = np.random.default_rng(0)
    top = np.iinfo(dtype).max if np.dtype(dtype).kind == "u" else 8000.0
    array = np.array([235, 240, 228]) / 255 + random.normal(0, noise / 255, (*size, 3))
    array[140:170, 200:240] = (0.8, 0.7, 0.75)
    return (array.clip(0, 1) * top).astype(dtype)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("noise", [0.0, 2.0, 4.0])
def test_auto_is_the_commonest_colour_and_its_noise(dtype, noise, tmp_path):
    np.save(tmp_path / "image.npy", off_white(dtype, noise=noise))
    with open_image(tmp_path / "image.npy") as image:
        found = foreground_groups(image, 64, background="auto")
        assert np.argwhere(found).tolist() == [[2, 3]]
        assert np.array_equal(found, foreground_groups(image, 64, background="auto"))
        # Nothing of it is white.
        assert foreground_groups(image, 64, background="white", tolerance=0.02).all()


def test_auto_reaches_as_far_as_noise_and_no_further(tmp_path):
    """What `tolerance` would take for background is something to it, if the background is clean."""
    array = np.full((512, 512, 1), 240, np.uint8)
    array[100, 100] = 230
    np.save(tmp_path / "image.npy", array)
    with open_image(tmp_path / "image.npy") as image:
        assert not foreground_groups(image, 64, background=240).any()
        assert np.argwhere(foreground_groups(image, 64, background="auto")).tolist() == [[1, 1]]
        assert np.argwhere(foreground_groups(image, 64, background="auto", tolerance=0)).tolist() == [[1, 1]]


@given(seed=st.integers(0, 2**31), channels=st.integers(1, 9), dtype=st.sampled_from(["uint8", "uint16", "float32"]))
@settings(max_examples=30, deadline=None)
def test_auto_looks_at_any_image(seed, channels, dtype, tmp_path_factory):
    """Of any size, of pure noise, of NaN: what is background is at the most `tolerance` away from one colour."""
    random = np.random.default_rng(seed)
    rows, columns = (int(side) for side in random.integers(1, 90, 2))
    array = random.random((rows, columns, channels)) * (255 if dtype != "uint16" else 65535)
    array = array.astype(dtype)
    if dtype == "float32":
        array[random.random((rows, columns)) < random.choice([0, 0.5, 1])] = np.nan
    path = tmp_path_factory.mktemp("image") / "image.npy"
    np.save(path, array)
    with open_image(path) as image:
        lowest, highest = band_of(image, "auto", 0.1, "it")
    widest = 0.2 * (65535 if dtype == "uint16" else 255)
    assert (highest - lowest.astype(float) <= widest + 1e-3).all()


def test_without_background_or_mask_all_groups_count(tmp_path):
    np.save(tmp_path / "image.npy", np.zeros((9, 5, 3), np.uint8))
    with open_image(tmp_path / "image.npy") as image:
        assert foreground_groups(image, 4).tolist() == [[True] * 2] * 3
        assert not foreground_groups(image, 4, background="black").any()


@given(seed=st.integers(0, 2**31), factor=st.integers(1, 9), up=st.booleans())
@settings(max_examples=40, deadline=None)
def test_masks_of_the_same_size_or_reduced(seed, factor, up, tmp_path_factory):
    """A group counts if any pixel of the mask overlaps it, however little."""
    random = np.random.default_rng(seed)
    height, width, rows, columns = (int(side) for side in random.integers((20, 20, 1, 1), (120, 120, 60, 60)))
    of_rows, of_columns = (ceil(side / factor) if up else side // factor for side in (height, width))
    mask = random.random((of_rows, of_columns)) < 0.1
    folder = tmp_path_factory.mktemp("image")
    np.save(folder / "image.npy", np.zeros((height, width, 3), np.uint8))
    Image.fromarray(mask).save(folder / "mask.png")
    # Repeated until both sizes divide, a mask is a picture of what it covers.
    covered = mask.repeat(height, 0).repeat(width, 1)
    with open_image(folder / "image.npy") as image:
        found = foreground_groups(image, (rows, columns), mask=folder / "mask.png")
    assert np.array_equal(found, by_hand(covered, rows * of_rows, columns * of_columns))


def test_mask_and_background_must_agree(tmp_path):
    array = np.full((40, 40, 3), 255, np.uint8)
    array[:20] = 0
    mask = np.zeros((20, 20, 4), np.uint8)
    # The alpha of a mask says nothing.
    mask[..., 3] = 255
    mask[:, :10, 0] = 1
    Image.fromarray(mask).save(tmp_path / "mask.png")
    with saved(tmp_path / "image.tif", array) as image:
        found = foreground_groups(image, 20, background="white", mask=tmp_path / "mask.png")
        assert found.tolist() == [[True, False], [False, False]]
        assert foreground_groups(image, 20, mask=tmp_path / "mask.png").tolist() == [[True, False], [True, False]]


@given(seed=st.integers(0, 2**31), min_foreground=st.sampled_from([0.0, 0.05]), factor=st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_a_turned_image_has_the_groups_of_the_turned_array(seed, min_foreground, factor, tmp_path_factory):
    """Sizes that are no multiple of the group, groups that are not square, background and mask together."""
    random = np.random.default_rng(seed)
    height, width, rows, columns = (int(side) for side in random.integers((4, 4, 1, 1), (150, 150, 60, 60)))
    array = np.where(random.random((height, width, 1)) < random.choice([0.001, 0.1]), np.uint8(0), np.uint8(255))
    mask = (random.random((ceil(height / factor), ceil(width / factor), 1)) < 0.1).astype(np.uint8)
    folder, asked = tmp_path_factory.mktemp("image"), {"background": "white", "min_foreground": min_foreground}
    np.save(folder / "image.npy", array)
    np.save(folder / "mask.npy", mask)
    with open_image(folder / "image.npy") as image:
        found = foreground_groups_transformed(image, (rows, columns), mask=folder / "mask.npy", **asked)
    assert found.keys() == set(DIHEDRAL)
    for symmetry, groups in found.items():
        np.save(folder / "turned.npy", symmetry.turn(array))
        np.save(folder / "turned_mask.npy", symmetry.turn(mask))
        with open_image(folder / "turned.npy") as turned:
            wanted = foreground_groups(turned, (rows, columns), mask=folder / "turned_mask.npy", **asked)
        assert np.array_equal(groups, wanted)


def test_groups_at_the_edges_are_other_ones_after_a_flip(tmp_path):
    array = np.full((10, 10, 1), 255, np.uint8)
    array[2, 8] = 0
    np.save(tmp_path / "image.npy", array)
    with open_image(tmp_path / "image.npy") as image:
        found = foreground_groups_transformed(image, 4, background="white")
    upside_down = found[Symmetry(backwards=(True, False))]
    assert np.argwhere(found[IDENTITY]).tolist() == [[0, 2]]
    assert np.argwhere(np.flipud(found[IDENTITY])).tolist() == [[2, 2]]
    assert np.argwhere(upside_down).tolist() == [[1, 2]]


def test_one_look_serves_all_eight(tmp_path, monkeypatch):
    array = np.full((300, 200, 3), 255, np.uint8)
    read = []
    with saved(tmp_path / "image.tif", array) as image:
        (level,) = image._levels()
        window = level.window
        monkeypatch.setattr(level, "window", lambda *place: (read.append(place), window(*place))[1])
        foreground_groups_transformed(image, (70, 30), background="white")
        assert sum(height * width for _, _, height, width in read) == 300 * 200


@pytest.mark.parametrize("size", [(40, 60), (41, 40), (20, 25), (80, 80), (13, 15)])
def test_a_mask_of_another_size(size, tmp_path):
    np.save(tmp_path / "image.npy", np.zeros((40, 40, 3), np.uint8))
    np.save(tmp_path / "mask.npy", np.zeros(size, np.uint8))
    message = rf"the mask .*mask\.npy has {size[0]} x {size[1]} pixels and .*image\.npy 40 x 40: a mask has the size"
    with open_image(tmp_path / "image.npy") as image, pytest.raises(InputError, match=message):
        foreground_groups(image, 20, mask=tmp_path / "mask.npy")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"background": "pink"}, "background is 'pink': choose white, black, auto, a number, or a number for each"),
        ({"background": (1, 2)}, r"background has 2 levels, and .*image\.npy has 3 channels"),
        ({"min_foreground": 1.0}, "min_foreground is 1.0"),
        ({"tolerance": -0.1}, "tolerance is -0.1"),
        ({"mask": "nowhere.png"}, r"there is no .*nowhere\.png"),
        ({"group_size": 0}, "a size is 0; it must be one positive whole number"),
    ],
)
def test_bad_settings(arguments, message, tmp_path):
    np.save(tmp_path / "image.npy", np.zeros((40, 40, 3), np.uint8))
    with open_image(tmp_path / "image.npy") as image, pytest.raises(InputError, match=message):
        foreground_groups(image, **({"group_size": 20} | arguments))
