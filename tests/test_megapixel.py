import struct
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from fitformer.data import build_dataset
from fitformer.data.datasets.megapixel import DIGITS, SIDE, SMALLEST, line_patterns, read_megapixel_mnist
from fitformer.data.pixels import shift
from fitformer.data.settings import ImageData
from fitformer.errors import InputError
from helpers import grouped

# Every image one grey level that says its part and class: training digits 1 .. 10, test digits 101 .. 110.
FIRST_LEVEL = {"train": 1, "test": 101}


def write_idx(file, array):
    file.write_bytes(struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes())


def write_mnist(folder, side=SIDE, classes=10, parts=("train", "t10k")):
    for part, first in zip(parts, FIRST_LEVEL.values(), strict=False):
        labels = np.arange(4 * classes, dtype=np.uint8) % classes
        write_idx(folder / f"{part}-labels-idx1-ubyte", labels)
        images = np.broadcast_to((first + labels)[:, None, None], (len(labels), side, side))
        write_idx(folder / f"{part}-images-idx3-ubyte", images)
    return str(folder)


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    return write_mnist(tmp_path_factory.mktemp("mnist"))


def source(mnist, part="train", size=512, seed=0):
    return read_megapixel_mnist(mnist, size, seed, None)[part]


def boxes(corners, shape):
    """Whether a pixel lies in one of the boxes at `corners`."""
    inside = np.zeros(shape, dtype=bool)
    for top, left in corners:
        inside[top : top + SIDE, left : left + SIDE] = True
    return inside


SIZES = [SMALLEST, 512, (160, 700)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("part", ["train", "test"])
def test_a_canvas_holds_three_digits_of_its_label_and_two_of_others(mnist, part, size):
    canvases = source(mnist, part, size)
    for index in range(60):
        pixels, label = canvases[index]
        layout = canvases.layout(index)
        assert label == layout.label == canvases.labels[index]
        classes = canvases.mnist.labels[layout.digits]
        assert (classes[:3] == label).all()
        assert (classes[3:] != label).all()
        covered = boxes(layout.noise_corners, pixels.shape[:2])
        for kind, (top, left) in zip(classes, layout.corners, strict=True):
            box = slice(top, top + SIDE), slice(left, left + SIDE)
            assert (pixels[box][~covered[box]] == FIRST_LEVEL[part] + kind).all()
        assert not pixels[~(boxes(layout.corners, pixels.shape[:2]) | covered)].any()


@pytest.mark.parametrize("size", SIZES)
def test_digits_lie_on_the_canvas_and_apart(mnist, size):
    canvases = source(mnist, size=size)
    for index in range(200):
        corners = canvases.layout(index).corners
        assert corners.shape == (DIGITS, 2)
        assert (corners >= 0).all()
        assert (corners + SIDE <= canvases.size).all()
        assert all(abs(one - other).max() >= SIDE for one, other in combinations(corners, 2))


def test_digits_reach_every_edge_and_noise_keeps_away_from_it(mnist):
    canvases = source(mnist, size=SMALLEST)
    layouts = [canvases.layout(index) for index in range(2000)]
    corners = np.concatenate([layout.corners for layout in layouts])
    assert corners.min(axis=0).tolist() == [0, 0]
    assert corners.max(axis=0).tolist() == [SMALLEST - SIDE] * 2
    for canvas_size, count in ((SMALLEST, 0), (512, 6), (1500, 50)):
        canvases = source(mnist, size=canvas_size)
        noise = [canvases.layout(index).noise_corners for index in range(20)]
        assert all(each.shape == (count, 2) for each in noise)
        assert all((each >= SIDE).all() and (each < canvas_size - SIDE).all() for each in noise)


def test_canvases_are_functions_of_seed_part_and_index(mnist):
    one, again = source(mnist, size=160), source(mnist, size=160)
    forwards = [one[index][0] for index in range(30)]
    backwards = [again[index][0] for index in reversed(range(30))][::-1]
    assert all(np.array_equal(first, second) for first, second in zip(forwards, backwards, strict=True))
    assert len({pixels.tobytes() for pixels in forwards}) == 30
    assert not np.array_equal(one[0][0], source(mnist, size=160, seed=1)[0][0])
    assert not np.array_equal(one.layout(0).corners, source(mnist, "test", 160).layout(0).corners)


def test_the_parts_have_the_published_sizes_and_balanced_classes(mnist):
    for part, count in (("train", 5000), ("test", 1000)):
        canvases = source(mnist, part)
        assert len(canvases) == count == len(canvases.labels)
        assert (abs(np.bincount(canvases.labels, minlength=10) / count - 0.1) < 0.03).all()


def test_noise_is_two_lines_from_corners():
    patterns = line_patterns(np.random.default_rng(0))[..., 0]
    assert patterns.shape == (50, SIDE, SIDE)
    lit = patterns > 0
    assert (patterns[lit] >= 204).all()
    assert lit[:, 0, 0].all()
    # A line of 72 degrees at most is as long as the box is wide, whichever way it leaves the corner.
    assert (lit.sum(axis=(1, 2)) >= SIDE).all()
    assert (lit.sum(axis=(1, 2)) <= 2 * 2 * SIDE).all()
    assert len(np.unique(lit, axis=0)) == 50


def test_a_recipe_builds_it_with_augmentation_validation_and_colour(mnist):
    settings = ImageData(
        source="megapixel-mnist", path=mnist, image_size=192, augmentation="light", validation=0.1, channels=3
    )
    train, val, test = (build_dataset(settings, split) for split in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (4500, 500, 1000)
    assert test[0]["image"].shape == (192, 192, 3)
    assert test.describe() == ("megapixel MNIST, test: 1,000 images, 192 x 192 x 3, 10 classes (its own test part)")
    assert not np.array_equal(train[0, 3]["image"], train[1, 3]["image"])
    assert train.source.name(0).endswith("of megapixel MNIST, train")
    other = build_dataset(ImageData(source="megapixel-mnist", path=mnist, image_size=192, split_seed=1), "test")
    assert not np.array_equal(other[0]["image"][..., :1], test[0]["image"][..., :1])


def test_bad_input_is_one_clear_error(mnist, tmp_path):
    with pytest.raises(InputError, match=rf"image_size is 512 x 137.* from {SMALLEST} x {SMALLEST} on"):
        read_megapixel_mnist(mnist, (512, 137), 0, None)
    with pytest.raises(InputError, match=r"'megapixel-mnist' needs a path: set data.path to the folder"):
        read_megapixel_mnist(None, 512, 0, None)
    with pytest.raises(InputError, match=r"lacks idx files"):
        read_megapixel_mnist(str(tmp_path), 512, 0, None)
    with pytest.raises(InputError, match=r"has no test images"):
        read_megapixel_mnist(write_mnist(tmp_path, parts=("train",)), 512, 0, None)
    with pytest.raises(InputError, match=r"images 28 x 28 of 9 classes.*28 x 28 and 10"):
        read_megapixel_mnist(write_mnist(tmp_path, classes=9), 512, 0, None)
    with pytest.raises(InputError, match=r"images 20 x 20 of 10 classes"):
        read_megapixel_mnist(write_mnist(tmp_path, side=20), 512, 0, None)


def test_shifted_images_are_the_same_pixels_elsewhere(mnist):
    settings = ImageData(source="megapixel-mnist", path=mnist, image_size=(160, 320), augmentation="shift")
    plain, shifted = build_dataset(replace(settings, augmentation="none")), build_dataset(settings)
    steps = set()
    for index in range(40):
        before, after = plain[0, index]["image"].numpy()[..., 0], shifted[0, index]["image"].numpy()[..., 0]
        found = [
            (down, right)
            for down in range(-10, 11)
            for right in range(-20, 21)
            if np.array_equal(np.pad(before, 20)[20 - down : 180 - down, 20 - right : 340 - right], after)
        ]
        assert found
        steps.update(found)
    assert len(steps) > 30
    assert np.array_equal(shifted[3, 7]["image"], build_dataset(settings)[3, 7]["image"])
    assert not np.array_equal(shifted[3, 7]["image"], shifted[4, 7]["image"])


def test_what_comes_in_at_the_edge_has_the_colour_of_the_rim():
    moved = shift(np.full((32, 64, 3), (9, 8, 7), np.uint8), np.random.default_rng(0), most=0.5)
    assert (moved == (9, 8, 7)).all()
    assert np.array_equal(shift(moved[:3, :3], np.random.default_rng(0)), moved[:3, :3])


def test_the_recipe_trains_on_the_groups_that_hold_something(mnist, tmp_path):
    pytest.importorskip("lightning", reason="needs the extra train")
    from fitformer.config import load as config
    from fitformer.training.fit import train
    from fitformer.training.run_dir import Run

    short = ["--trainer.steps=2", "--trainer.validate_batches=1", "--trainer.accelerator=cpu", f"--data.path={mnist}"]
    recipe = config.load("megapixel-mnist", short)
    assert train(recipe, tmp_path / "run")
    network, test = Run.open(tmp_path / "run").model(), build_dataset(recipe.data, "test")
    image = test[5]["image"]
    side, cells = recipe.model.group_size, 512 // recipe.model.group_size
    touched = (image.numpy()[..., 0] > 0).reshape(cells, side, cells, side).any(axis=(1, 3))
    assert grouped(network, image, recipe.data).coords.tolist() == np.argwhere(touched).tolist()
    assert 5 <= touched.sum() < cells**2
