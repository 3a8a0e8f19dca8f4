"""Flips and quarter turns of images that stay in their files: what is read is what numpy makes of the whole array."""

import pickle
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fitformer.data.datasets.arrays import array_source
from fitformer.data.datasets.images import ImageDataset
from fitformer.data.datasets.lazy_source import lazy_source
from fitformer.data.dihedral import SYMMETRIES, TransformedImage
from fitformer.data.order import StepBatches
from fitformer.data.readers import LazyImage, open_image, write_tiled_tiff
from fitformer.data.symmetry import DIHEDRAL, IDENTITY, Symmetry
from fitformer.errors import InputError
from fitformer.models.image_encoder import FITImageEncoder
from fitformer.patching import PatchGrid
from fitformer.patching.any_size import GroupedImage, PixelArray, PixelSource

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
    turned = {symmetry.turn(square).tobytes() for symmetry in DIHEDRAL}
    assert len(turned) == 8
    assert turned == {np.rot90(side, k).tobytes() for k in range(4) for side in (square, np.fliplr(square))}
    assert np.array_equal(IDENTITY.turn(ARRAY), ARRAY)
    assert [by_numpy(ARRAY, each).tobytes() for each in SYMMETRIES["flip"]] == [
        ARRAY.tobytes(),
        np.fliplr(ARRAY).tobytes(),
    ]


@given(symmetry=st.sampled_from(DIHEDRAL), data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_window_of_the_turned_image_is_that_of_the_turned_array(image, symmetry, data):
    turned, wanted = TransformedImage(image, symmetry), by_numpy(ARRAY, symmetry)
    assert isinstance(turned, PixelSource)
    assert (turned.shape, turned.dtype, turned.path) == (wanted.shape, wanted.dtype, image.path)
    top, left = (data.draw(st.integers(0, side - 1)) for side in wanted.shape[:2])
    height, width = (data.draw(st.integers(1, side - at)) for side, at in zip(wanted.shape, (top, left)))
    found = turned.window(top, left, height, width)
    assert np.array_equal(found, wanted[top : top + height, left : left + width])
    torch.from_numpy(found)


@given(symmetry=st.sampled_from(DIHEDRAL), rows=st.integers(1, 38), columns=st.integers(1, 38))
@settings(max_examples=60, deadline=None)
def test_a_thumbnail_of_the_turned_image_is_the_turned_thumbnail(image, symmetry, rows, columns):
    whole = TransformedImage(PixelArray(ARRAY), symmetry).thumbnail(rows, columns)
    assert whole.shape == (rows, columns, 3)
    assert np.array_equal(whole, PixelArray(by_numpy(ARRAY, symmetry)).thumbnail(rows, columns))
    lazily = TransformedImage(image, symmetry).thumbnail(rows, columns)
    assert np.array_equal(lazily, by_numpy(image.thumbnail(*symmetry.sides(rows, columns)), symmetry))


def test_each_is_undone_by_one_of_them(image):
    for symmetry in DIHEDRAL:
        (inverse,) = [other for other in DIHEDRAL if np.array_equal(other.turn(symmetry.turn(ARRAY)), ARRAY)]
        again = TransformedImage(TransformedImage(image, symmetry), inverse)
        assert again.shape == image.shape
        assert np.array_equal(again.window(3, 5, 20, 31), image.window(3, 5, 20, 31))
        assert np.array_equal(again.thumbnail(7, 9), image.thumbnail(7, 9))


@pytest.mark.parametrize("symmetry", DIHEDRAL)
def test_groups_of_a_turned_image_are_those_of_the_turned_array(image, symmetry):
    """Groups at the edges, their masks, groups that are not square, and glimpses."""
    patch_grid = PatchGrid(None, (16, 24), 8)
    found = GroupedImage(TransformedImage(image, symmetry), patch_grid, glimpses=1)
    wanted = GroupedImage(PixelArray(by_numpy(ARRAY, symmetry)), patch_grid, glimpses=1)
    assert torch.equal(found.coords, wanted.coords)
    tokens, mask = found.read(slice(1, None))
    same, inside = wanted.read(slice(1, None))
    assert torch.equal(tokens, same)
    assert torch.equal(mask, inside)
    small = by_numpy(image.thumbnail(*symmetry.sides(16, 24)), symmetry)
    assert torch.equal(found.read(slice(0, 1))[0], GroupedImage(PixelArray(small), patch_grid).read(slice(None))[0])


def test_only_what_is_asked_for_is_read_and_no_pixel_travels(image):
    asked = []

    class Watched(PixelArray):
        def window(self, *place):
            asked.append(place)
            return super().window(*place)

    turned = TransformedImage(Watched(ARRAY), Symmetry(transposed=True, backwards=(True, False)))
    turned.window(2, 3, 5, 7)
    assert asked == [(3, 38 - 2 - 5, 7, 5)]
    assert not hasattr(turned, "path")
    twin = pickle.loads(pickle.dumps(TransformedImage(image, turned.symmetry)))
    assert len(pickle.dumps(twin)) < 1000
    assert np.array_equal(twin.window(0, 0, 9, 9), TransformedImage(image, turned.symmetry).window(0, 0, 9, 9))


def lazy(image, augmentation, count=6, **more):
    source = lazy_source("images", [image.path] * count, np.zeros(count, np.int64), (), None)
    return ImageDataset(source, None, augmentation=augmentation, **more)


def test_which_is_drawn_is_a_function_of_seed_epoch_and_index(image):
    first, again, other = (lazy(image, "dihedral", seed=seed) for seed in (1, 1, 2))
    order = [(epoch, index) for epoch in range(40) for index in range(6)]
    symmetries = {where: first[where]["image"].symmetry for where in order}
    assert all(again[where]["image"].symmetry == symmetries[where] for where in reversed(order))
    assert any(other[where]["image"].symmetry != symmetries[where] for where in order)
    counts = [list(symmetries.values()).count(symmetry) for symmetry in DIHEDRAL]
    assert sum(counts) == 240
    assert min(counts) > 15
    # A run that is taken up again draws what it would have drawn.
    whole, rest = (StepBatches(6, 4, 0, start_step=step, total_steps=20) for step in (0, 13))
    assert [[first[where]["image"].symmetry for where in batch] for batch in whole][13:] == [
        [again[where]["image"].symmetry for where in batch] for batch in rest
    ]


def test_without_augmentation_the_image_is_handed_out_as_it_is(image):
    dataset = lazy(image, "none")
    assert isinstance(dataset[3, 1]["image"], LazyImage)
    assert dataset.symmetries == (IDENTITY,)


def test_a_flip_leaves_rows_where_they_are(image):
    dataset = lazy(image, "flip")
    assert {dataset[epoch, 0]["image"].symmetry for epoch in range(20)} == set(SYMMETRIES["flip"])
    assert all(dataset[epoch, 0]["image"].shape == image.shape for epoch in range(20))


@pytest.mark.parametrize("augmentation", SYMMETRIES)
def test_images_of_one_size_are_turned_alike(image, augmentation):
    """By the same draws; a quarter turn of a long image is then cut to size as any tall one is."""
    source = array_source("squares", np.stack([ARRAY[:38]] * 6), None, (), None)
    decoded, lazily = ImageDataset(source, 38, augmentation=augmentation, seed=5), lazy(image, augmentation, seed=5)
    for where in product(range(8), range(6)):
        found = decoded[where]["image"]
        assert np.array_equal(found, by_numpy(ARRAY[:38], lazily[where]["image"].symmetry))
    cut = ImageDataset(source, (20, 30), augmentation=augmentation)
    assert {cut[epoch, 0]["image"].shape for epoch in range(8)} == {(20, 30, 3)}


@pytest.mark.parametrize("augmentation", ["light", "crop", "crop-flip", "shift"])
def test_what_needs_the_whole_image_is_refused(image, augmentation):
    message = rf"data.augmentation '{augmentation}' needs the whole image at once, .*: choose none, flip, dihedral"
    with pytest.raises(InputError, match=message):
        lazy(image, augmentation)
    with pytest.raises(InputError, match=r"images of any size are read as they are: remove data\.levels"):
        lazy(image, "dihedral", levels=17)


@pytest.mark.parametrize(("augmentation", "most"), [("none", 2 * 5), ("flip", 2 * 5), ("dihedral", 4 * 3)])
def test_the_largest_image_is_counted_in_the_turns_it_may_take(tmp_path, augmentation, most):
    pytest.importorskip("lightning", reason="needs the extra train")
    from fitformer.training.memory_check import _Headers, _most_groups

    np.save(tmp_path / "image.npy", np.zeros((40, 70, 3), np.uint8))
    network = FITImageEncoder.from_config(
        layers="(1)1",
        image_size=None,
        group_size=(20, 16),
        patch_size=4,
        latents_per_group=2,
        dim=8,
        latent_dim=8,
        heads=2,
        latent_heads=2,
        glimpses=1,
        latent_position="row_column",
    )
    dataset = lazy(open_image(tmp_path / "image.npy"), augmentation)
    assert _most_groups(network, dataset, _Headers(None, None).add) == 1 + most
