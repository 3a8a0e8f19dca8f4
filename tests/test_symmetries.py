"""Flips and quarter turns of images that stay in their files: what is read is what numpy makes of the whole array."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fitformer.data.readers import open_image, write_tiled_tiff
from fitformer.data.symmetries import EIGHT, SAME, SYMMETRIES, Symmetry, Turned
from fitformer.tiling import GroupedImage, PixelArray, PixelSource, Tiling

SIZE = (53, 38)
ARRAY = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)


def cut(top, left, height, width):
    return ARRAY[top : top + height, left : left + width]


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("image") / "image.tif"
    write_tiled_tiff(path, ARRAY.shape, ARRAY.dtype, cut, tile=16)
    return open_image(path)


def by_numpy(pixels, symmetry):
    """The turned array, step by step."""
    if symmetry.transposed:
        pixels = np.moveaxis(pixels, 1, 0)
    if symmetry.backwards[0]:
        pixels = np.flipud(pixels)
    return np.fliplr(pixels) if symmetry.backwards[1] else pixels


def test_the_eight_are_the_quarter_turns_and_their_mirror_images():
    square = ARRAY[:38]
    turned = {symmetry.turn(square).tobytes() for symmetry in EIGHT}
    assert len(turned) == 8
    assert turned == {np.rot90(side, k).tobytes() for k in range(4) for side in (square, np.fliplr(square))}
    assert np.array_equal(SAME.turn(ARRAY), ARRAY)
    assert [by_numpy(ARRAY, each).tobytes() for each in SYMMETRIES["flip"]] == [
        ARRAY.tobytes(),
        np.fliplr(ARRAY).tobytes(),
    ]


@given(symmetry=st.sampled_from(EIGHT), data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_window_of_the_turned_image_is_that_of_the_turned_array(image, symmetry, data):
    turned, wanted = Turned(image, symmetry), by_numpy(ARRAY, symmetry)
    assert isinstance(turned, PixelSource)
    assert (turned.shape, turned.dtype, turned.path) == (wanted.shape, wanted.dtype, image.path)
    top, left = (data.draw(st.integers(0, side - 1)) for side in wanted.shape[:2])
    height, width = (data.draw(st.integers(1, side - at)) for side, at in zip(wanted.shape, (top, left)))
    found = turned.window(top, left, height, width)
    assert np.array_equal(found, wanted[top : top + height, left : left + width])
    torch.from_numpy(found)


@given(symmetry=st.sampled_from(EIGHT), rows=st.integers(1, 38), columns=st.integers(1, 38))
@settings(max_examples=60, deadline=None)
def test_a_thumbnail_of_the_turned_image_is_the_turned_thumbnail(image, symmetry, rows, columns):
    whole = Turned(PixelArray(ARRAY), symmetry).thumbnail(rows, columns)
    assert whole.shape == (rows, columns, 3)
    assert np.array_equal(whole, PixelArray(by_numpy(ARRAY, symmetry)).thumbnail(rows, columns))
    lazily = Turned(image, symmetry).thumbnail(rows, columns)
    assert np.array_equal(lazily, by_numpy(image.thumbnail(*symmetry.sides(rows, columns)), symmetry))


def test_each_is_undone_by_one_of_them(image):
    for symmetry in EIGHT:
        (inverse,) = [other for other in EIGHT if np.array_equal(other.turn(symmetry.turn(ARRAY)), ARRAY)]
        again = Turned(Turned(image, symmetry), inverse)
        assert again.shape == image.shape
        assert np.array_equal(again.window(3, 5, 20, 31), image.window(3, 5, 20, 31))
        assert np.array_equal(again.thumbnail(7, 9), image.thumbnail(7, 9))


@pytest.mark.parametrize("symmetry", EIGHT)
def test_groups_of_a_turned_image_are_those_of_the_turned_array(image, symmetry):
    """Groups at the edges, their masks, groups that are not square, and glimpses."""
    tiling = Tiling((16, 24), 8)
    found = GroupedImage(Turned(image, symmetry), tiling, glimpses=1)
    wanted = GroupedImage(PixelArray(by_numpy(ARRAY, symmetry)), tiling, glimpses=1)
    assert torch.equal(found.places, wanted.places)
    tokens, mask = found.read(slice(1, None))
    same, inside = wanted.read(slice(1, None))
    assert torch.equal(tokens, same)
    assert torch.equal(mask, inside)
    small = by_numpy(image.thumbnail(*symmetry.sides(16, 24)), symmetry)
    assert torch.equal(found.read(slice(0, 1))[0], GroupedImage(PixelArray(small), tiling).read(slice(None))[0])


def test_only_what_is_asked_for_is_read_and_no_pixel_travels(image):
    asked = []

    class Watched(PixelArray):
        def window(self, *place):
            asked.append(place)
            return super().window(*place)

    turned = Turned(Watched(ARRAY), Symmetry(transposed=True, backwards=(True, False)))
    turned.window(2, 3, 5, 7)
    assert asked == [(3, 38 - 2 - 5, 7, 5)]
    assert not hasattr(turned, "path")
    twin = pickle.loads(pickle.dumps(Turned(image, turned.symmetry)))
    assert len(pickle.dumps(twin)) < 1000
    assert np.array_equal(twin.window(0, 0, 9, 9), Turned(image, turned.symmetry).window(0, 0, 9, 9))
