import subprocess
import sys
import warnings

import numpy as np
import pytest
from PIL import Image

from fitformer.data import build_dataset
from fitformer.data.build import choose_part, read_parts
from fitformer.data.settings import ByteData, ImageData
from fitformer.errors import InputError


@pytest.fixture(scope="module", autouse=True)
def sklearn():
    pytest.importorskip("sklearn.datasets")


@pytest.fixture
def folder(tmp_path):
    random = np.random.default_rng(0)

    def write(*wheres):
        for where in wheres:
            file = tmp_path / where
            file.parent.mkdir(parents=True, exist_ok=True)
            # No two alike: copies are kept on one side of a split.
            Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8)).save(file)
        return str(tmp_path)

    return write


def indices(dataset):
    return set(dataset.source.indices.tolist())


def test_digits_split_by_their_own_seed_into_stratified_parts():
    train, test = (build_dataset(ImageData(), split) for split in ("train", "test"))
    assert (len(train), len(test)) == (1438, 359)
    assert indices(train) | indices(test) == set(range(1797))
    shares = np.bincount(test.source.labels) / np.bincount(train.source.labels)
    assert np.all(abs(shares - 0.25) < 0.01)
    assert indices(build_dataset(ImageData(), "test", seed=7)) == indices(test)
    assert indices(build_dataset(ImageData(split_seed=1), "test")) != indices(test)
    assert indices(build_dataset(ImageData(), "val")) == indices(test)
    assert train.classes == tuple("0123456789")


def test_validation_is_taken_from_the_training_part_alone():
    settings = ImageData(validation=0.1)
    train, val, test = (indices(build_dataset(settings, split)) for split in ("train", "val", "test"))
    assert test == indices(build_dataset(ImageData(), "test"))
    assert len(val) == 144
    assert train | val | test == set(range(1797))
    assert len(train) + len(val) + len(test) == 1797


def test_only_training_images_are_augmented():
    settings = ImageData(image_size=16, augmentation="light")
    train, test = build_dataset(settings, "train", seed=3), build_dataset(settings, "test", seed=3)
    assert not np.array_equal(train[0, 0]["image"], train[1, 0]["image"])
    assert np.array_equal(test[0, 0]["image"], test[1, 0]["image"])
    assert not np.array_equal(train[0, 0]["image"], build_dataset(settings, "train", seed=4)[0, 0]["image"])


def test_seventeen_levels_are_the_raw_digits():
    from sklearn.datasets import load_digits

    raw = load_digits().images
    dataset = build_dataset(ImageData(image_size=8, levels=17), "test")
    for index in range(0, len(dataset), 10):
        assert np.array_equal(dataset[index]["image"][..., 0], raw[dataset.source.indices[index]])


def test_descriptions_are_one_line():
    assert build_dataset(ImageData(image_size=(8, 16), levels=17)).describe() == (
        "digits: 1,438 images, 8 x 16 x 1, 17 levels, 10 classes (to train on)"
    )
    assert "20% held out by seed 0" in build_dataset(ImageData(), "test").describe()
    for split in ("train", "test"):
        assert "windows of 64" in build_dataset(ByteData(source="python-docs", length=64), split).describe()


def test_own_parts_are_used_before_any_is_held_out(folder):
    path = folder("train/a/0.png", "train/a/1.png", "train/b/0.png", "valid/a/0.png", "test/b/0.png")
    settings = ImageData(source="folder", path=path, image_size=4)
    assert [len(build_dataset(settings, split)) for split in ("train", "val", "test")] == [3, 1, 1]
    assert build_dataset(settings, "test")[0]["label"] == 1
    assert "its own validation part" in build_dataset(settings, "val").describe()
    swapped = ImageData(source="folder", path=path, image_size=4, val_part="test", test_part="valid")
    assert build_dataset(swapped, "test")[0]["label"] == 0
    with pytest.raises(InputError, match=r"no part 'tset'; did you mean 'test'\?"):
        build_dataset(ImageData(source="folder", path=path, test_part="tset"), "test")


def test_a_validation_part_stands_in_for_a_test_part(folder):
    path = folder("train/a/0.png", "train/b/1.png", "val/a/0.png")
    settings = ImageData(source="folder", path=path)
    assert [len(build_dataset(settings, split)) for split in ("train", "val", "test")] == [2, 1, 1]


def test_a_folder_without_parts_is_split(folder):
    path = folder(*[f"{name}/{number}.png" for name in "ab" for number in range(10)])
    parts = read_parts(ImageData(source="folder", path=path))
    train = choose_part(parts, ImageData(source="folder", path=path, validation=0), "train").source
    assert np.bincount(train.labels).tolist() == [8, 8]


def test_bytes_are_split_by_whole_files():
    settings = ByteData(source="python-docs", length=256, holdout=0.2)
    train, val, test = (build_dataset(settings, split) for split in ("train", "val", "test"))
    names = [{piece.name for piece in part.buffer.pieces} for part in (train, test)]
    assert not names[0] & names[1]
    assert val.contents() == test.contents()
    assert 0.15 < len(test.buffer) / (len(test.buffer) + len(train.buffer)) <= 0.2
    assert build_dataset(settings, "train", seed=1)[0]["tokens"].tolist() != train[0]["tokens"].tolist()


def test_an_option_that_a_source_does_not_read_warns():
    with pytest.warns(UserWarning, match="'digits' does not read path, classes: ignored"):
        build_dataset(ImageData(path="somewhere", classes=("a",)))
    with pytest.warns(UserWarning, match="'python-docs' does not read glob: ignored"):
        build_dataset(ByteData(source="python-docs", glob="*.txt"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_dataset(ImageData(channels=3, levels=4, holdout=0.3, num_workers=2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (ImageData(source="digit"), "no image source 'digit'; did you mean 'digits'"),
        (ByteData(source="python-doc"), "no byte source 'python-doc'; did you mean 'python-docs'"),
        (ImageData(channels=2), "channels is 2"),
        (ImageData(holdout=1.0), "holding out 1 of 1797 examples"),
        (ImageData(source="idx"), "set data.path to the folder"),
        (ByteData(source="files"), "needs a path"),
        (ByteData(length=10**9), "too short"),
    ],
)
def test_bad_settings_are_one_clear_error(settings, message):
    with pytest.raises(InputError, match=message):
        build_dataset(settings)


def test_an_unknown_split():
    with pytest.raises(InputError, match="split is 'dev': choose train, val or test"):
        build_dataset(ImageData(), "dev")


def test_settings_and_order_do_not_wait_for_torch():
    code = "import sys, fitformer.data.settings, fitformer.data.order; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
