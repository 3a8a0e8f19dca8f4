import copy
import logging
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from fitformer.data.datasets.arrays import array_source
from fitformer.data.datasets.folders import read_folder
from fitformer.data.datasets.images import ImageDataset, dequantize, quantize
from fitformer.data.order import EvaluationBatches, StepBatches
from fitformer.data.pixels import fit, jitter, random_crop
from fitformer.errors import InputError

random = np.random.default_rng(0)


def noise_source(count=6, shape=(9, 7), channels=3):
    images = random.integers(0, 256, (count, *shape, channels), dtype=np.uint8)
    return array_source("noise", images, np.arange(count) % 3, (), None)


@settings(deadline=None, max_examples=30)
@given(
    height=st.integers(1, 30),
    width=st.integers(1, 30),
    size=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    channels=st.sampled_from([1, 3, 4]),
    resize=st.sampled_from(["crop", "stretch", "pad"]),
)
def test_every_way_gives_the_size_asked_for_and_keeps_a_flat_colour(height, width, size, channels, resize):
    pixels = np.full((height, width, channels), 137, np.uint8)
    for made in (
        fit(pixels, size, resize),
        random_crop(pixels, size, np.random.default_rng(height)),
        jitter(fit(pixels, size, resize), np.random.default_rng(width)),
    ):
        assert made.shape == (*size, channels)
        assert np.all(abs(made.astype(int) - 137) <= (channels == 4))  # alpha is multiplied in and out again


def test_an_image_of_the_right_size_is_untouched():
    source = noise_source()
    dataset = ImageDataset(source, (9, 7))
    for index in range(len(dataset)):
        item = dataset[index]
        assert item["image"].dtype == torch.uint8
        assert np.array_equal(item["image"], source.images[index])
        assert item["label"].dtype == torch.int64
        assert (int(item["label"]), item["index"]) == (index % 3, index)


def test_crop_keeps_the_centre_and_pad_keeps_everything():
    pixels = np.zeros((4, 8, 1), np.uint8)
    pixels[:, 2:6] = 200
    assert np.all(fit(pixels, (4, 4), "crop") == 200)
    padded = fit(pixels, (8, 8), "pad")
    assert np.array_equal(padded[2:6], pixels)
    assert not padded[:2].any()


def test_a_shift_moves_right_and_down_and_turns_about_the_centre():
    pixels = np.zeros((21, 21, 1), np.uint8)
    pixels[10, 10] = 255

    class Fixed:
        def uniform(self, low, high, size=None):
            return high if size is None else np.full(size, high)

    moved = jitter(pixels, Fixed(), turn=0, scale=0, shift=2 / 21)
    assert np.unravel_index(moved[..., 0].argmax(), (21, 21)) == (12, 12)
    turned = jitter(pixels, Fixed(), turn=90, scale=0.2, shift=0)
    assert np.unravel_index(turned[..., 0].argmax(), (21, 21)) == (10, 10)


def test_light_augmentation_stays_close_to_the_image():
    rows, columns = np.mgrid[:32, :32]
    blob = (255 * np.exp(-((rows - 15.5) ** 2 + (columns - 15.5) ** 2) / 60)).astype(np.uint8)[None]
    source = array_source("blob", np.repeat(blob, 20, axis=0), None, (), None)
    plain, light = ImageDataset(source, 32), ImageDataset(source, 32, augmentation="light")
    for index in range(20):
        a, b = plain[index]["image"].flatten().float(), light[index]["image"].flatten().float()
        assert 0.8 < torch.corrcoef(torch.stack([a, b]))[0, 1] < 0.9999


@pytest.mark.parametrize("augmentation", ["light", "crop", "crop-flip"])
def test_augmentation_is_a_function_of_seed_epoch_and_index(augmentation):
    source = noise_source()
    make = lambda seed: ImageDataset(source, 8, augmentation=augmentation, seed=seed)  # noqa: E731
    first, again, other = make(1), make(1), make(2)
    order = [(epoch, index) for epoch in range(2) for index in range(6)]
    images = {where: first[where]["image"] for where in order}
    assert all(torch.equal(again[where]["image"], images[where]) for where in reversed(order))
    assert not torch.equal(images[0, 0], images[1, 0])
    assert not torch.equal(other[0, 0]["image"], images[0, 0])


@given(levels=st.integers(2, 256))
def test_levels_round_trip_and_stay_in_range(levels):
    values = np.arange(levels, dtype=np.uint8)
    assert np.array_equal(quantize(dequantize(values, levels), levels), values)
    everything = quantize(np.arange(256, dtype=np.uint8), levels)
    assert (everything.min(), everything.max()) == (0, levels - 1)


def test_workers_hand_out_what_the_main_process_does():
    dataset = ImageDataset(noise_source(), 8, augmentation="crop-flip", seed=3)
    batches = StepBatches(len(dataset), 4, seed=5, total_steps=4)
    alone = list(DataLoader(dataset, batch_sampler=batches))
    helped = list(DataLoader(dataset, batch_sampler=batches, num_workers=2))
    assert alone[0]["image"].shape == (4, 8, 8, 3)
    assert alone[0]["label"].dtype == alone[0]["index"].dtype == torch.int64
    for a, b in zip(alone, helped):
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_datasets_can_be_pickled_and_copied():
    dataset = ImageDataset(noise_source(), 8, augmentation="light")
    for twin in (pickle.loads(pickle.dumps(dataset)), copy.deepcopy(dataset)):
        assert torch.equal(twin[1, 2]["image"], dataset[1, 2]["image"])
    assert len(list(dataset)) == len(dataset)


@pytest.fixture
def broken_folder(tmp_path):
    """Ten images in two classes, of which 3 and 4 are broken."""
    for number in range(10):
        file = tmp_path / "ab"[number // 5] / f"{number}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file)
    (tmp_path / "a" / "3.png").write_bytes((tmp_path / "a" / "3.png").read_bytes()[:100])
    (tmp_path / "a" / "4.png").write_text("not an image")
    return str(tmp_path)


def test_unreadable_images_are_named_once_and_replaced(broken_folder, caplog):
    dataset = ImageDataset(read_folder(broken_folder, (), None)["train"], 8, max_unreadable=2)
    for _ in range(2):
        items = list(dataset)
    assert [item["index"] for item in items] == [0, 1, 2, 5, 5, 5, 6, 7, 8, 9]
    assert [int(item["label"]) for item in items] == [0] * 3 + [1] * 7
    assert torch.equal(items[3]["image"], items[5]["image"])
    assert len(caplog.records) == 2
    assert "3.png" in caplog.records[0].getMessage()
    assert "4.png (it is no image in a format known here)" in caplog.records[1].getMessage()
    assert [name[-5:] for name in dataset.unreadable] == ["3.png", "4.png"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many_unreadable_images_are_one_error_that_names_them(broken_folder, num_workers):
    dataset = ImageDataset(read_folder(broken_folder, (), None)["train"], 8, max_unreadable=1)
    loader = DataLoader(dataset, batch_sampler=EvaluationBatches(10, 4), num_workers=num_workers)
    with pytest.raises(InputError, match=r"2 images .* max_unreadable, 1: .*3\.png, .*4\.png"):
        list(loader)


def test_workers_count_together(broken_folder):
    logging.disable(logging.WARNING)
    try:
        dataset = ImageDataset(read_folder(broken_folder, (), None)["train"], 8)
        list(DataLoader(dataset, batch_sampler=EvaluationBatches(10, 2), num_workers=2))
    finally:
        logging.disable(logging.NOTSET)
    assert len(dataset.unreadable) == 2


@pytest.mark.slow
def test_nothing_readable_is_an_error(broken_folder, tmp_path):
    source = read_folder(broken_folder, (), None)["train"]
    for file in source.files:
        with open(file, "w"):
            pass
    with pytest.raises(InputError, match=r"no image of .* is readable"):
        ImageDataset(source, 8, max_unreadable=100)[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"augmentation": "heavy"}, "augmentation is 'heavy': choose none, light, crop, crop-flip"),
        ({"levels": 1}, "levels is 1"),
        ({"levels": 300}, "levels is 300"),
        ({"image_size": (0, 8)}, r"image_size is \(0, 8\)"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(InputError, match=message):
        ImageDataset(noise_source(), **({"image_size": 8} | arguments))


def test_an_unknown_resize():
    with pytest.raises(InputError, match="resize is 'squash': choose crop, stretch or pad"):
        ImageDataset(noise_source(), 8, resize="squash")[0]
