"""Images that do not go with the model or with each other, and their masks: one error, before the first step."""

import csv
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import yaml
from PIL import Image

from fitformer import FITImageEncoder, data
from fitformer.cli import main
from fitformer.config import load as config
from fitformer.data.masks import Masks
from fitformer.errors import InputError
from fitformer.patching.any_size import PixelArray
from fitformer.tasks import build_model
from fitformer.training import run_dir

pytestmark = pytest.mark.usefixtures("one_thread")

COLOUR = {1: "minisblack", 3: "rgb"}


def put(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, pixels, tile=(32, 32), photometric=COLOUR[pixels.shape[2] if pixels.ndim == 3 else 1])


def pixels_of(seed, size=(40, 50)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def fill(folder, change=lambda pixels: pixels, count=3):
    for k in range(2 * count):
        # No image of one part is in another.
        put(folder / "xy"[k % 2] / f"{k // 2}.tif", change(pixels_of(k + 100 * sum(map(ord, folder.name)))))
    return folder


def as_floats(pixels):
    return (pixels / 255).astype(np.float32)


def as_deeper(pixels):
    return pixels.astype(np.uint16) * 257


def recipe_of(folder, **more):
    given = {
        "task": "classify",
        "model": {"group_size": 16, "patch_size": 8, "latent_position": "row_column", "layers": "(1)1"},
        "data": {"source": "folder", "path": str(folder), "image_size": None, "holdout": 0.34, "validation": 0, **more},
        "trainer": {"steps": 2, "batch_size": 2, "validate_every": 1, "checkpoint_every": 1, "accelerator": "cpu"},
    }
    path = folder.parent / f"{folder.name}.yaml"
    path.write_text(yaml.safe_dump(given))
    return str(path)


def run_of(folder, **more):
    """A run on a folder, untrained."""
    recipe = config.load(recipe_of(folder, **more))
    train, test = (data.build_dataset(recipe.data, split, seed=0) for split in ("train", "test"))
    run = run_dir.start_run(folder.parent / f"{folder.name}-run", recipe)
    run_dir.write_data_card(run, train, test)
    torch.manual_seed(0)
    build_model(recipe, train).save_pretrained(run.model_folder)
    return run


def refusal(capsys, *words):
    assert main([str(word) for word in words]) == 2
    return capsys.readouterr().err.splitlines()[-1]


def refused_before_the_run(capsys, folder, **more):
    run = folder.parent / "run"
    said = refusal(capsys, "train", recipe_of(folder, **more), "--run-dir", run)
    assert not run.exists()
    return said


# Parts


@pytest.mark.parametrize("size", [None, 32])
@pytest.mark.parametrize("part", ["test", "val"])
def test_a_part_of_other_channels_is_refused_before_the_run_starts(tmp_path, capsys, part, size):
    fill(tmp_path / "in" / "train")
    fill(tmp_path / "in" / part, lambda pixels: pixels[..., 0])
    said = refused_before_the_run(capsys, tmp_path / "in", image_size=size)
    assert re.search(rf"mixed channel counts: .*{part}.* has 1 and .*train.* has 3", said)


def test_a_part_of_other_numbers_is_refused_before_the_run_starts(tmp_path, capsys):
    fill(tmp_path / "in" / "train", as_floats)
    fill(tmp_path / "in" / "test")
    said = refused_before_the_run(capsys, tmp_path / "in")
    assert re.search("mixed types of pixels: .*test/x/0.tif has uint8 and .*train/x/0.tif has float32", said)


def test_parts_of_other_depths_go_together(tmp_path):
    fill(tmp_path / "in" / "train")
    fill(tmp_path / "in" / "test", as_deeper)
    assert data.build_dataset(config.load(recipe_of(tmp_path / "in")).data, "test").pixels == "uint8"


# The model and later images


@pytest.mark.parametrize("trained", [lambda pixels: pixels, as_floats])
def test_images_of_another_kind_of_number_are_not_answered(tmp_path, capsys, trained):
    run = run_of(fill(tmp_path / "in", trained))
    name = np.dtype(trained(pixels_of(0)).dtype).name
    assert json.loads((run.path / "data.json").read_text())["pixels"] == name
    put(tmp_path / "new" / "whole.tif", pixels_of(9))
    put(tmp_path / "new" / "deep.tif", as_deeper(pixels_of(9)))
    put(tmp_path / "new" / "float.tif", as_floats(pixels_of(9)))
    good = ["float.tif"] if name == "float32" else ["deep.tif", "whole.tif"]
    assert main(["predict", str(run.path), str(tmp_path / "new")]) == 0
    out, err = capsys.readouterr()
    rows = list(csv.DictReader(out.splitlines()))
    assert [os.path.basename(row["file"]) for row in rows] == good
    assert len({row["probability"][:6] for row in rows}) == 1
    assert err.count("skipped") == 3 - len(good)
    assert main(["predict", str(run.path), str(tmp_path / "new"), "--output", str(tmp_path / "seen")]) == 0
    broken = list(csv.DictReader((tmp_path / "seen" / "broken.csv").read_text().splitlines()))
    assert len(broken) == 3 - len(good)
    assert all(f"pixels and the model was trained on {name}" in row["reason"] for row in broken)
    bad = "whole.tif" if name == "float32" else "float.tif"
    said = refusal(capsys, "predict", run.path, tmp_path / "new" / bad)
    assert re.search(rf"{bad} has \w+ pixels and the model was trained on {name}; .*: store it as ", said)


def test_data_that_changed_since_training_are_neither_measured_nor_trained_on(tmp_path, capsys):
    recipe, run = recipe_of(fill(tmp_path / "in")), tmp_path / "run"
    words = ["train", recipe, "--run-dir", run]
    assert main([str(word) for word in words]) == 0
    fill(tmp_path / "in", as_deeper)
    assert main(["evaluate", str(run)]) == 0
    fill(tmp_path / "in", as_floats)
    for again in (["evaluate", run], words):
        assert "has float32 pixels and the model was trained on uint8" in refusal(capsys, *again)


def test_a_run_that_did_not_write_it_down_is_taken_as_it_is(tmp_path, capsys):
    run = run_of(fill(tmp_path / "in"))
    about = json.loads((run.path / "data.json").read_text())
    del about["pixels"]
    (run.path / "data.json").write_text(json.dumps(about))
    fill(tmp_path / "in", as_floats)
    assert main(["evaluate", str(run.path)]) == 0
    assert main(["predict", str(run.path), str(tmp_path / "in")]) == 0


def test_what_is_no_image_is_said_in_a_line():
    encoder = FITImageEncoder.from_preset(
        "tiny", image_size=None, group_size=16, patch_size=8, num_classes=2, latent_position="row_column"
    )
    with pytest.raises(InputError, match="no images"):
        encoder([])
    with pytest.raises(InputError, match=r"given as ndarray: wrap an array as .*PixelArray\(\.\.\.\)"):
        encoder([pixels_of(0)])
    with pytest.raises(InputError, match=r"given as str: .*open_image"):
        encoder(["slide.tif"])
    assert encoder([PixelArray(pixels_of(0))]).shape == (1, 2)


# Masks


def put_mask(path, size=(40, 50), first=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.zeros(size, np.uint8)
    mask[:first] = 255
    Image.fromarray(mask).save(path)


def mask_all(folder):
    for k in range(6):
        put_mask(folder / "xy"[k % 2] / f"{k // 2}.png")
    return folder


@pytest.mark.parametrize(
    ("image", "masks", "wanted"),
    [
        ("x/1.tif", ["x/1.png", "y/1.png", "1.png"], "x/1.png"),
        ("x/1.tif", ["train/x/1.png", "x/1.png"], "train/x/1.png"),
        ("x/1.tif", ["y/1.png", "1.png"], "1.png"),
        ("x/casea.0.png", ["casea.0.png", "casea.1.png", "casea.png"], "casea.0.png"),
        ("x/casea.0.png", ["casea.1.png", "casea.png"], "casea.png"),
        ("x/1.ome.tif", ["1.png", "1.ome.png", "1.0.png"], "1.png"),
        ("x/1.ome.tif", ["1.ome.png"], "1.ome.png"),
        ("x/1.tif", ["1.mask.png", "1.geojson", ".1.png"], "1.mask.png"),
        ("x/1.tif", ["1.ome.tif"], "1.ome.tif"),
        ("x/1.ome.png", ["1.ome.tif"], "1.ome.tif"),
        ("x/a[1].tif", ["a[1].png", "a1.png"], "a[1].png"),
    ],
)
def test_a_mask_is_found_by_its_name_and_subfolder(tmp_path, image, masks, wanted):
    for mask in masks:
        (tmp_path / "masks" / mask).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "masks" / mask).touch()
    found = Masks(tmp_path / "masks").of(tmp_path / "in" / "train" / image)
    assert found.relative_to(tmp_path / "masks").as_posix() == wanted


@pytest.mark.parametrize(
    ("image", "masks", "message"),
    [
        ("1.tif", [], r"1\.tif needs a mask, 1\.\* in .*masks or in the image's subfolder of it, and there is none"),
        ("casea.0.png", ["casea.1.png"], "needs a mask"),
        ("1.tif", ["10.png"], "needs a mask"),
        ("1.tif", ["1.png", "1.tif"], r"needs one mask, and there are 2 with its name: .*1\.png, .*1\.tif"),
        ("1.tif", ["1.a.png", "1.b.png"], "needs one mask, and there are 2"),
    ],
)
def test_no_mask_is_guessed(tmp_path, image, masks, message):
    (tmp_path / "masks").mkdir()
    for mask in masks:
        (tmp_path / "masks" / mask).touch()
    with pytest.raises(InputError, match=message):
        Masks(tmp_path / "masks").of(tmp_path / image)


def test_an_image_is_not_its_own_mask(tmp_path):
    put(tmp_path / "in" / "1.tif", pixels_of(0))
    put_mask(tmp_path / "in" / "1.mask.png")
    assert Masks(tmp_path).of(tmp_path / "in" / "1.tif").name == "1.mask.png"


def test_training_with_masks_in_the_subfolders_of_the_images(tmp_path, capsys):
    folder, masks = fill(tmp_path / "in"), mask_all(tmp_path / "masks")
    put_mask(masks / "y" / "1.png", (20, 25), first=20)
    words = ["train", recipe_of(folder, masks=str(masks)), "--run-dir", str(tmp_path / "run")]
    assert main(words) == 0
    assert main(["evaluate", str(tmp_path / "run"), "--split", "train"]) == 0
    first = data.build_dataset(config.load(words[1]).data, "test").source.name(0)
    (masks / "xy"["/y/" in first] / f"{Path(first).stem}.png").unlink()
    assert f"{first} needs a mask" in refusal(capsys, "evaluate", tmp_path / "run")


def flatten(mask):
    mask.rename(mask.parents[2] / mask.name)
    (mask.parents[1] / "y" / mask.name).unlink()


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda mask: mask.unlink(), "x/1.tif needs a mask"),
        (lambda mask: put_mask(mask, (35, 50)), "the mask .*x/1.png has 35 x 50 pixels and .*x/1.tif 40 x 50"),
        (lambda mask: mask.write_bytes(b"no image"), "x/1.png"),
        (flatten, "in/{part}/x/1.tif and .*in/{part}/y/1.tif would both have the mask .*masks/1.png"),
    ],
)
def test_masks_are_looked_over_before_the_run_starts(tmp_path, capsys, part, spoil, message):
    for each in ("train", "test"):
        fill(tmp_path / "in" / each, count=2)
        mask_all(tmp_path / "masks" / each)
    spoil(tmp_path / "masks" / part / "x" / "1.png")
    said = refused_before_the_run(capsys, tmp_path / "in", masks=str(tmp_path / "masks"))
    assert re.search(message.format(part=part), said)


def test_a_mask_for_images_of_both_parts_is_refused(tmp_path, capsys):
    for part in ("train", "test"):
        fill(tmp_path / "in" / part)
    said = refused_before_the_run(capsys, tmp_path / "in", masks=str(mask_all(tmp_path / "masks")))
    assert re.search("in/test/x/0.tif and .*in/train/x/0.tif would both have the mask .*masks/x/0.png", said)


def test_masks_are_for_images_of_any_size(tmp_path, capsys):
    masks = mask_all(tmp_path / "masks")
    said = refused_before_the_run(capsys, fill(tmp_path / "in"), masks=str(masks), image_size=32)
    assert "data.masks are those of image files of any size" in said


def test_prediction_sees_masks_that_lack_or_are_shared_or_changed(tmp_path, capsys):
    folder, masks = fill(tmp_path / "in"), mask_all(tmp_path / "masks")
    run, seen = run_of(folder, masks=str(masks)).path, tmp_path / "seen"
    words = ["predict", str(run), str(folder), "--output", str(seen)]

    def said():
        assert main(words) == 0
        return capsys.readouterr().out.removeprefix(f"{seen}: ")

    assert said() == "6 of 6 images labelled now\n"
    assert json.loads((seen / "x" / "0.tif.json").read_text())["groups"] == 4
    put_mask(masks / "x" / "0.png", first=40)
    assert said() == "1 of 6 images labelled now, 5 were there already\n"
    assert json.loads((seen / "x" / "0.tif.json").read_text())["groups"] == 12
    assert said() == "0 of 6 images labelled now, 6 were there already\n"
    (masks / "y" / "2.png").unlink()
    assert said() == "0 of 6 images labelled now, 5 were there already, 1 could not be read (broken.csv)\n"
    assert "y/2.tif needs a mask" in (seen / "broken.csv").read_text()
    (masks / "x" / "1.png").rename(masks / "1.png")
    (masks / "y" / "1.png").unlink()
    for more in ([], ["--output", seen]):
        shared = refusal(capsys, "predict", run, folder, *more)
        assert re.search("in/x/1.tif and .*in/y/1.tif would both have the mask", shared)
