"""What is held out is measured and nothing else, shares no image with training, and a rare class is not forgotten."""

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fitformer.cli import main
from fitformer.config import load as config
from fitformer.data.build import build_dataset, choose_part, read_parts
from fitformer.data.datasets.arrays import array_source
from fitformer.data.order import StepBatches, balanced_order, spread_part
from fitformer.data.settings import ByteData, ImageData
from fitformer.errors import InputError
from fitformer.tasks import build_model, classify
from fitformer.tasks.classify import TASK
from fitformer.tasks.image_outputs import outputs_of


def pictures(root, counts, seed=0, sides=(16, 16)):
    """Folders of noise, `counts` by name; each class of another mean."""
    random = np.random.default_rng(seed)
    for number, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for k in range(count):
            noise = random.integers(0, 100, (*sides, 3)) + 70 * (number % 3)
            Image.fromarray(noise.astype(np.uint8)).save(root / name / f"{k:03}.png")
    return root


def recipe_of(tmp_path, folder, trainer=(), objective=(), **more):
    given = {
        "task": "classify",
        "model": {"group_size": 8, "patch_size": 4, "layers": "(1)1", "dim": 32, "latents_per_group": 4},
        "data": {"source": "folder", "path": str(folder), "image_size": 16, **more},
        "trainer": {"steps": 4, "batch_size": 4, "validate_every": 2, "checkpoint_every": 4, "accelerator": "cpu",
                    **dict(trainer)},
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(given | ({"objective": dict(objective)} if objective else {})))
    return str(path)


def files_of(dataset):
    return [dataset.source.name(index) for index in range(len(dataset))]


def contents_of(dataset):
    return {Path(name).read_bytes() for name in files_of(dataset)}


# --- no copies on both sides


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), length=st.integers(4, 60), kinds=st.integers(2, 30), validation=st.booleans())
def test_no_content_is_on_two_sides_of_a_split(seed, length, kinds, validation):
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (kinds, 3, 3), dtype=np.uint8)[random.integers(0, kinds, length)]
    if len(np.unique(images, axis=0)) < 4:
        return
    whole = {"train": array_source("arrays", images, random.integers(0, 2, length), ("a", "b"), None)}
    setting = ImageData(source="arrays", split_seed=seed, holdout=0.3, validation=0.3 if validation else 0.0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parts = [choose_part(whole, setting, split).source for split in ("train", "val", "test")]
    except InputError:
        # Too few contents for both sides.
        return
    train, val, test = ({part[k][0].tobytes() for k in range(len(part))} for part in parts)
    assert not train & test
    assert not train & val
    assert not val & test if validation else val == test
    assert sum(map(len, parts)) - (0 if validation else len(parts[1])) == length


@pytest.mark.parametrize("size", [16, None])
def test_copies_in_a_folder_of_parts_are_left_out_of_training_and_counted(size, tmp_path):
    pictures(tmp_path / "train", {"a": 12, "b": 12})
    pictures(tmp_path / "test", {"a": 5, "b": 5}, seed=1)
    for k in range(3):
        shutil.copy(tmp_path / "test" / "a" / f"{k:03}.png", tmp_path / "train" / "a" / f"copy-{k}.png")
    (tmp_path / "train" / "b" / "link.png").symlink_to(tmp_path / "test" / "b" / "000.png")
    train, test = (
        build_dataset(ImageData(source="folder", path=str(tmp_path), image_size=size), split)
        for split in ("train", "test")
    )
    assert not contents_of(train) & contents_of(test)
    assert len(test) == 10
    assert "4 copies of held-out images left out" in train.describe()


def test_a_file_that_is_listed_several_times_stays_on_one_side(tmp_path):
    pictures(tmp_path, {"a": 10, "b": 10})
    rows = [f"{name}/{k:03}.png,{name}" for name in "ab" for k in range(10)] * 3
    (tmp_path / "table.csv").write_text("path,label\n" + "\n".join(rows) + "\n")
    setting = ImageData(source="manifest", path=str(tmp_path / "table.csv"), image_size=16)
    train, val, test = (build_dataset(setting, split) for split in ("train", "val", "test"))
    assert len(train) + len(val) + len(test) == 60
    assert not set(files_of(train)) & set(files_of(test))
    assert not set(files_of(train)) & set(files_of(val))
    assert not set(files_of(val)) & set(files_of(test))


def test_a_training_part_that_is_the_test_part_is_refused(tmp_path):
    pictures(tmp_path / "train", {"a": 3, "b": 3})
    shutil.copytree(tmp_path / "train", tmp_path / "test")
    with pytest.raises(InputError, match="all of its 6 images are in the held-out part, too"):
        build_dataset(ImageData(source="folder", path=str(tmp_path), image_size=16))


def test_large_files_are_compared_by_pieces(tmp_path, monkeypatch):
    from fitformer.data import copies

    monkeypatch.setattr(copies, "_WHOLE", 1000)
    monkeypatch.setattr(copies, "_PIECE", 64)
    random = np.random.default_rng(0)
    one = random.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    other = one.copy()
    other[20:40] = 0
    for folder, name, array in (("a", "one", one), ("a", "other", other), ("b", "again", one)):
        (tmp_path / folder).mkdir(exist_ok=True)
        np.save(tmp_path / folder / f"{name}.npy", array)
    setting = ImageData(source="folder", path=str(tmp_path), image_size=None)
    (numbers,) = copies.contents([read_parts(setting)["train"]])
    assert numbers.tolist() == [0, 1, 0]


# --- validation


def test_validation_of_ones_own_data_is_apart_from_the_test_part(tmp_path, capsys):
    pictures(tmp_path / "data", {"a": 40, "b": 40})
    setting = ImageData(source="folder", path=str(tmp_path / "data"), image_size=16)
    train, val, test = (set(files_of(build_dataset(setting, split))) for split in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (58, 6, 16)
    assert train | val | test == set(files_of(build_dataset(setting, "train"))) | val | test
    assert not train & val
    assert not val & test
    assert main(["train", recipe_of(tmp_path, tmp_path / "data"), "--run-dir", str(tmp_path / "run")]) == 0
    assert "held out: " in (out := capsys.readouterr().out)
    assert "10% of the training part, by seed 0" in out


@pytest.mark.parametrize("source", ["digits", "folder"])
@pytest.mark.filterwarnings("ignore:data source 'digits' does not read path")
def test_the_best_checkpoint_is_not_chosen_by_the_test_part(source, tmp_path, capsys):
    pictures(tmp_path / "data", {"a": 12, "b": 12})
    arguments = ["--trainer.keep_best=true", f"--data.source={source}"]
    arguments += ["--data.validation=0"] if source == "folder" else []
    assert main(["train", recipe_of(tmp_path, tmp_path / "data"), "--run-dir", str(tmp_path / "run"), *arguments]) == 2
    error = capsys.readouterr().err
    assert "would choose a checkpoint by the test part" in error
    assert "data.validation=0.1" in error
    assert not (tmp_path / "run").exists()


def test_bytes_are_validated_on_others_than_they_are_evaluated_on(tmp_path):
    for k in range(40):
        (tmp_path / f"{k:02}.txt").write_text(f"{k:02}" * 100)
    parts = [
        build_dataset(ByteData(source="files", path=str(tmp_path), length=20), split)
        for split in ("train", "val", "test")
    ]
    names = [{piece.name for piece in part.buffer.pieces} for part in parts]
    assert [len(part) for part in names] == [33, 3, 4]
    assert len(set.union(*names)) == 40
    plain = ByteData(length=20)
    assert len(build_dataset(plain, "val")) == len(build_dataset(plain, "test"))


def test_a_part_of_the_validation_is_spread_over_all_of_it(tmp_path, monkeypatch):
    pictures(tmp_path / "train", dict.fromkeys("abc", 4))
    pictures(tmp_path / "val", dict.fromkeys("abc", 12), seed=1)
    pictures(tmp_path / "test", dict.fromkeys("abc", 1), seed=2)
    seen = []

    def measure(network, batch, recipe):
        seen.append(batch["label"].tolist())
        return classify.measure(network, batch, recipe)

    from helpers import patch_task

    patch_task(monkeypatch, classify, measure=measure)
    recipe = recipe_of(tmp_path, tmp_path, trainer={"validate_batches": 3})
    assert main(["train", recipe, "--run-dir", str(tmp_path / "run")]) == 0
    first, second = seen[:3], seen[3:]
    assert first == second
    assert sum(map(len, first)) == 12
    assert {label for batch in first for label in batch} == {0, 1, 2}


@given(length=st.integers(1, 50), count=st.integers(1, 60), seed=st.integers(0, 99))
def test_a_spread_part_is_of_different_places_in_order(length, count, seed):
    places = spread_part(length, count, seed)
    assert len(places) == min(length, count)
    assert np.all(np.diff(places) > 0)
    assert np.array_equal(places, spread_part(length, count, seed))


# --- what cannot be read


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_cannot_be_read_are_no_part_of_a_measure(workers, tmp_path, capsys):
    pictures(tmp_path / "data" / "train", {"a": 8, "b": 8})
    pictures(tmp_path / "data" / "test", {"a": 45, "b": 47}, seed=1)
    for name in ("a/000", "b/046"):
        (tmp_path / "data" / "test" / f"{name}.png").write_bytes(b"broken")
    run = str(tmp_path / "run")
    assert main(["train", recipe_of(tmp_path, tmp_path / "data", num_workers=workers), "--run-dir", run]) == 0
    capsys.readouterr()
    assert main(["evaluate", run, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["examples"], found["left_out"]) == (90, 2)
    assert [sum(row) for row in found["confusion"]] == [44, 46]
    assert main(["evaluate", run, "--batch-size", "1"]) == 0
    table = capsys.readouterr().out
    assert "90" in table
    assert "left out" in table


# --- classes


def test_rows_without_a_part_are_named(tmp_path):
    pictures(tmp_path, {"a": 3})
    (tmp_path / "t.csv").write_text("path,label,split\na/000.png,a,train\na/001.png,a,\na/002.png,a,test\n")
    with pytest.raises(InputError, match=r"1 of 3 rows have nothing in the column 'split'.*a/001\.png"):
        build_dataset(ImageData(source="manifest", path=str(tmp_path / "t.csv"), image_size=16))


def test_numbers_are_in_their_order_however_they_are_written(tmp_path):
    pictures(tmp_path, dict.fromkeys(("1.0", "10.0", "2.0", "-1.5"), 2))
    assert read_parts(ImageData(source="folder", path=str(tmp_path)))["train"].classes == ("-1.5", "1.0", "2.0", "10.0")


def test_a_rare_class_of_which_nothing_is_held_out_is_warned_of(tmp_path):
    pictures(tmp_path, {"common": 40, "rare": 1})
    with pytest.warns(UserWarning, match=r"takes none of 1 rare classes, which are not measured: rare \(1\)"):
        build_dataset(ImageData(source="folder", path=str(tmp_path), image_size=16, validation=0))


def test_colour_photos_are_colour_whatever_the_recipe_was_made_for(tmp_path, capsys):
    pictures(tmp_path / "data", {"a": 20, "b": 20}, sides=(32, 32))
    arguments = [
        f"--data.path={tmp_path / 'data'}",
        "--data.source=folder",
        "--trainer.steps=1",
        "--trainer.batch_size=2",
    ]
    run = str(tmp_path / "run")
    assert main(["train", "mnist-classify", "--run-dir", run, *arguments, "--trainer.validate_batches=0"]) == 0
    assert "32 x 32 x 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array(["a", "b", "c"]), "has labels of text, such as 'a'"),
        (np.array([0, 1.5, 1]), r"has the label 1\.5"),
        (np.array([0, np.nan, 1]), "has the label nan"),
        (np.array([0, 1, 10**9]), r"has the label 1,000,000,000 and 3 images"),
        (np.array([0, 1j, 1]), "has labels of type complex128"),
    ],
)
def test_labels_of_arrays_that_are_no_class_numbers(labels, message, tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((3, 4, 4), np.uint8), labels=labels)
    with pytest.raises(InputError, match=message):
        read_parts(ImageData(source="arrays", path=str(tmp_path / "a.npz")))


def test_labels_of_arrays_by_name_and_whole_floats(tmp_path):
    images = np.zeros((3, 4, 4), np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.array(["b", "a", "b"]), categories=np.array(["a", "b"]))
    source = read_parts(ImageData(source="arrays", path=str(tmp_path / "a.npz")))["train"]
    assert (source.labels.tolist(), source.classes) == ([1, 0, 1], ("a", "b"))
    np.savez(tmp_path / "a.npz", images=images, labels=np.array([2.0, 0.0, 1.0]))
    assert read_parts(ImageData(source="arrays", path=str(tmp_path / "a.npz")))["train"].labels.tolist() == [2, 0, 1]


# --- classes that are not equally many


@settings(deadline=None, max_examples=40)
@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=5), seed=st.integers(0, 2**63), epoch=st.integers(0, 50)
)
def test_a_balanced_order_has_each_class_equally_often_and_its_examples_in_turn(counts, seed, epoch):
    labels = np.repeat(np.arange(len(counts)), counts)
    orders = [balanced_order(labels, seed, epoch + k) for k in range(4)]
    for order in orders:
        often = np.bincount(labels[order], minlength=len(counts))
        assert often.max() - often.min() <= 1
    if epoch == 0:
        # From the start on, no example of a class comes a second time before each has come once.
        together = np.bincount(np.concatenate(orders), minlength=len(labels))
        for label in range(len(counts)):
            own = together[labels == label]
            assert own.max() - own.min() <= 1
    assert np.array_equal(orders[0], balanced_order(labels, seed, epoch))


def test_a_balanced_run_taken_up_at_a_step_sees_exactly_the_tail():
    labels = np.array([0] * 30 + [1] * 3)
    whole = list(StepBatches(33, 4, 5, total_steps=40, labels=labels))
    assert list(StepBatches(33, 4, 5, start_step=17, total_steps=40, labels=labels)) == whole[17:]
    share = np.mean([labels[index] for batch in whole for _, index in batch])
    assert share == pytest.approx(0.5, abs=0.02)


def test_training_on_a_balanced_order(tmp_path, monkeypatch):
    pictures(tmp_path / "train", {"a": 30, "b": 2})
    pictures(tmp_path / "test", {"a": 2, "b": 2}, seed=1)
    seen = []

    def loss(network, batch, recipe):
        seen.extend(batch["label"].tolist())
        return classify.loss(network, batch, recipe)

    from helpers import patch_task

    patch_task(monkeypatch, classify, loss=loss)
    recipe = recipe_of(tmp_path, tmp_path, trainer={"steps": 8, "validate_every": 8}, sampling="balanced", validation=0)
    assert main(["train", recipe, "--run-dir", str(tmp_path / "run")]) == 0
    assert np.bincount(seen).tolist() == [16, 16]


def weighted_recipe(tmp_path, weights, counts):
    pictures(tmp_path / "train", counts)
    pictures(tmp_path / "test", dict.fromkeys(counts, 1), seed=1)
    recipe = config.load(recipe_of(tmp_path, tmp_path, objective={"class_weights": weights}, validation=0))
    return recipe, build_dataset(recipe.data, "train")


def test_class_weights_weigh_the_loss(tmp_path):
    recipe, dataset = weighted_recipe(tmp_path, "balanced", {"a": 6, "b": 2})
    prepared = TASK.prepare(recipe, dataset)
    assert prepared.objective.class_weights == pytest.approx((8 / 12, 8 / 4))
    torch.manual_seed(0)
    network = build_model(recipe, dataset)
    torch.nn.init.normal_(network.head.weight)
    batch = {"image": torch.stack([dataset[k]["image"] for k in range(8)]), "label": torch.tensor([0] * 6 + [1] * 2)}
    found, _ = classify.loss(network, batch, prepared)
    each = F.cross_entropy(outputs_of(network, batch["image"]), batch["label"], reduction="none")
    # Every class weighs the same.
    assert found.item() == pytest.approx((each[:6].mean() + each[6:].mean()).item() / 2, rel=1e-5)
    plain, _ = classify.loss(network, batch, replace(recipe, objective=type(recipe.objective)()))
    assert plain.item() == pytest.approx(each.mean().item(), rel=1e-5)


def test_class_weights_in_numbers(tmp_path):
    recipe, dataset = weighted_recipe(tmp_path, [1, 3], {"a": 6, "b": 2})
    assert TASK.prepare(recipe, dataset).objective.class_weights == pytest.approx((2 / 3, 2))
    with pytest.raises(InputError, match="class_weights has 3 numbers, and there are 2 classes"):
        TASK.prepare(config.load(recipe_of(tmp_path, tmp_path, objective={"class_weights": [1, 2, 3]})), dataset)
    for bad in ([-1, 1], [0, 0], [float("nan"), 1]):
        with pytest.raises(InputError, match="class_weights"):
            config.load(recipe_of(tmp_path, tmp_path, objective={"class_weights": bad}))


def test_training_with_class_weights_says_so_in_no_other_measure(tmp_path):
    pictures(tmp_path / "data", {"a": 20, "b": 10})
    recipe = recipe_of(tmp_path, tmp_path / "data", objective={"class_weights": "balanced"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(["train", recipe, "--run-dir", str(tmp_path / "run")]) == 0
    stored = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert stored["objective"]["class_weights"] == "balanced"


# --- settings


@pytest.mark.parametrize("text", ["48x64", "48X64", "[48, 64]"])
def test_sizes_are_written_as_everywhere(text, tmp_path):
    pictures(tmp_path / "data", {"a": 2})
    assert config.load(recipe_of(tmp_path, tmp_path / "data"), [f"--data.image_size={text}"]).data.image_size == (
        48,
        64,
    )
    assert config.load(
        recipe_of(tmp_path, tmp_path / "data", image_size=text if "x" in text else [48, 64])
    ).data.image_size == (48, 64)
    assert config.load(recipe_of(tmp_path, tmp_path / "data"), [f"--model.group_size={text}"]).model.group_size == (
        48,
        64,
    )
    with pytest.raises(InputError, match="image_size is '48x64x3'; expected"):
        config.load(recipe_of(tmp_path, tmp_path / "data"), ["--data.image_size=48x64x3"])


def test_mixed_channels_of_any_size_are_converted(tmp_path):
    random = np.random.default_rng(0)
    for name in ("train/a", "train/b"):
        (tmp_path / name).mkdir(parents=True)
        for k, channels in enumerate((1, 3, 4)):
            pixels = random.integers(0, 256, (20, 30, channels), dtype=np.uint8)
            Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(tmp_path / name / f"{k}.png")
    pictures(tmp_path / "test", {"a": 1, "b": 1}, seed=1)
    setting = ImageData(source="folder", path=str(tmp_path), image_size=None, validation=0)
    with pytest.raises(InputError, match=r"mixed channel counts.*set data\.channels"):
        list(build_dataset(setting, "train"))
    train = build_dataset(replace(setting, channels=3), "train")
    assert [item["image"].shape for item in train] == [(20, 30, 3)] * 6
