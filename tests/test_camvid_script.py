"""The comparison on CamVid at toy sizes: how images are moved, what is counted, and that it runs."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fitformer.data.labels import UNLABELLED
from fitformer.diffusion import pixels_to_signal
from fitformer.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")

FOLDER = Path(__file__).parents[1] / "benchmarks"
SIZE, COUNTS = (24, 32), {"train": 5, "val": 2, "test": 3}
WORDS = ["--layers=(1)1(1)", "--dim=16", "--latent-dim=16", "--heads=2", "--latent-heads=2", "--latents-per-group=2"]
WORDS += ["--image-size=24,32", "--group-size=8", "--patch-size=4", "--refinement=4"]
WORDS += ["--batch=2", "--points=2", "--threads=1"]


@pytest.fixture
def camvid(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("camvid")


@pytest.fixture
def folders(tmp_path):
    """Images and masks of the parts, as options of the script."""
    random = np.random.default_rng(0)
    for part, count in COUNTS.items():
        for kind, shape in (("images", (*SIZE, 3)), ("labels", SIZE)):
            (tmp_path / kind / part).mkdir(parents=True)
            for k in range(count):
                pixels = random.integers(0, 256 if kind == "images" else 12, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / kind / part / f"{part}{k}.png")
    return ["--images", str(tmp_path / "images"), "--labels", str(tmp_path / "labels")]


@pytest.fixture
def pictures():
    images = torch.randint(256, (2, *SIZE, 3), dtype=torch.uint8)
    return images, torch.randint(11, (2, *SIZE), dtype=torch.uint8)


def test_a_batch_is_a_pure_function_of_seed_and_step(camvid, pictures):
    settings = importlib.import_module("budgeted_training").Settings(1.0, 4, seed=1)
    first, again, other = (camvid.batch_of(pictures, (0.5, 2.0), settings, step) for step in (3, 3, 4))
    assert first[0].shape == (4, *SIZE, 3)
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert first[0].min() >= -1
    assert first[0].max() <= 1


def test_images_and_classes_are_moved_alike(camvid, pictures):
    images, labels = pictures
    one, corner = torch.ones(2), torch.full((2, 2), -1.0)
    kept = camvid.moved_pictures(pictures, one, corner, torch.tensor([False, True]))
    torch.testing.assert_close(kept[0][0], pixels_to_signal(images[0]), atol=1e-4, rtol=0)
    torch.testing.assert_close(kept[0][1], pixels_to_signal(images[1]).flip(1), atol=1e-4, rtol=0)
    assert torch.equal(kept[1], torch.stack([labels[0], labels[1].flip(1)]))
    # Twice as large from the first corner: each of the first pixels is four.
    large = camvid.moved_pictures(pictures, 2 * one, corner, one < 0)[1]
    quarter = labels[:, : SIZE[0] // 2, : SIZE[1] // 2]
    assert torch.equal(large, quarter.repeat_interleave(2, 1).repeat_interleave(2, 2))


def test_what_lies_beyond_an_image_has_no_class(camvid, pictures):
    half = torch.full((2,), 0.5)
    signal, classes = camvid.moved_pictures(pictures, half, torch.zeros(2, 2), half < 0)
    there = torch.zeros(SIZE, dtype=torch.bool)
    there[6:18, 8:24] = True
    assert ((classes != UNLABELLED) == there).all()
    assert not signal[:, ~there].any()


def test_factors_of_one_change_no_colour(camvid, pictures):
    signal, one = pixels_to_signal(pictures[0]), torch.ones(2)
    torch.testing.assert_close(camvid.coloured(signal, one, one, one), signal)
    grey = camvid.coloured(signal, one, one, 0 * one)
    torch.testing.assert_close(grey[..., 0], grey[..., 2])


def test_miou_is_of_the_classes_that_occur(camvid):
    confusion = torch.tensor([[6.0, 2, 0], [1, 3, 0], [0, 0, 0]])
    mean, each = camvid.intersections(confusion, ("road", "sky", "car"))
    assert each == pytest.approx({"road": 100 * 6 / 9, "sky": 50})
    assert mean == pytest.approx((100 * 6 / 9 + 50) / 2)


def test_rare_classes_weigh_more_and_pixels_1_on_average(camvid):
    labels = torch.tensor([0] * 90 + [1] * 10 + [UNLABELLED] * 50, dtype=torch.uint8)
    weights = camvid.log_weights(labels, 2)
    assert weights[1] > 5 * weights[0]
    assert 0.9 * weights[0] + 0.1 * weights[1] == pytest.approx(1)


def test_fit_trains_and_is_measured_on_the_test_part(camvid, monkeypatch, folders, tmp_path, capsys):
    words = [*folders, *WORDS, "--networks=FIT", "--budget=1e8", f"--output={tmp_path / 'out'}", "--class-weights=log"]
    monkeypatch.setattr(sys, "argv", ["camvid", *words])
    camvid.main()
    (found,) = (json.loads(file.read_text()) for file in (tmp_path / "out").glob("*.json"))
    assert found["flops"] >= 1e8
    assert found["test_images"] == COUNTS["test"]
    assert len(found["curve"]) == 2
    mean = sum(found["test_iou_by_class"].values()) / len(found["test_iou_by_class"])
    assert found["test_miou"] == pytest.approx(mean)
    assert "| IoU of the test part | sky |" in capsys.readouterr().out


def test_the_unet_takes_sizes_that_it_must_pad(camvid):
    pytest.importorskip("segmentation_models_pytorch")
    network = camvid.UNet(11).eval()
    assert network(torch.zeros(1, 40, 72, 3)).shape == (1, 11, 40, 72)
    assert camvid.step_flops(network, (40, 72)) == camvid.step_flops(network, (64, 96))


def test_a_network_that_is_not_there_is_one_clear_error(camvid, monkeypatch, folders, capsys):
    monkeypatch.setattr(sys, "argv", ["camvid", *folders, *WORDS, "--networks=SegNet"])
    with pytest.raises(SystemExit):
        camvid.main()
    assert "'SegNet'; choose among FIT, U-Net" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    with pytest.raises(InputError, match="--networks FIT"):
        camvid.UNet(11)
