import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fitformer import FITImageEncoder
from fitformer.errors import InputError
from fitformer.inference.predict import as_text, expand, predict
from fitformer.inference.sample import class_numbers, file_safe, write_samples
from fitformer.tasks.answers import ClassAnswers

CLASSES = ("a,b", "bee", "cat")
ANSWERS = ClassAnswers(CLASSES)


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    size = {"dim": 8, "latent_dim": 8, "heads": 1, "latent_heads": 1, "latents_per_group": 2}
    return FITImageEncoder.from_config(
        layers="(1)1", image_size=(8, 12), group_size=4, patch_size=2, channels=1, num_classes=3, **size
    ).eval()


@pytest.fixture
def folder(tmp_path):
    random = np.random.default_rng(0)
    (tmp_path / "deep").mkdir()
    for k, name in enumerate(["b.png", "a.PNG", "deep/c.jpg", "d.bmp"]):
        shape = (9 + k, 7, 3) if k % 2 else (8, 12)
        Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def test_folders_are_searched_for_images_in_order(folder):
    assert [path.name for path in expand([folder / "d.bmp", folder])] == ["d.bmp", "a.PNG", "b.png", "d.bmp", "c.jpg"]
    (folder / "empty").mkdir()
    with pytest.raises(InputError, match="empty holds no image files"):
        expand([folder / "empty"])


def test_files_are_labelled_alike_at_any_batch_size(classifier, folder):
    files = expand([folder])
    one, all_ = (list(predict(classifier, files, ANSWERS, batch_size=size)) for size in (1, 64))
    assert [each.file for each in one] == [str(file) for file in files]
    for left, right in zip(one, all_, strict=True):
        assert left.probabilities == pytest.approx(right.probabilities, abs=1e-6)
        assert sum(left.probabilities.values()) == pytest.approx(1, abs=1e-5)
        assert left.probability == max(left.probabilities.values()) == left.probabilities[left.label]


def test_an_image_of_the_right_size_is_seen_as_it_is(classifier, folder):
    pixels = torch.from_numpy(np.array(Image.open(folder / "b.png")))[None, ..., None]
    with torch.no_grad():
        wanted = classifier(pixels.float() / 127.5 - 1).softmax(-1)[0]
    (found,) = predict(classifier, [folder / "b.png"], ANSWERS)
    assert list(found.probabilities.values()) == pytest.approx(wanted.tolist(), abs=1e-5)


def test_unreadable_files_are_named_and_left_out(classifier, folder):
    (folder / "cut.png").write_bytes((folder / "d.bmp").read_bytes()[:60])
    files, faults = [folder / "cut.png", folder / "gone.png", folder / "b.png"], []
    found = list(predict(classifier, files, ANSWERS, on_unreadable=lambda fault: faults.append(fault.name)))
    assert [each.file for each in found] == [str(folder / "b.png")]
    assert faults == [str(folder / "cut.png"), str(folder / "gone.png")]
    with pytest.raises(InputError, match=r"none of the 2 files can be read: .*cut\.png.*gone\.png"):
        list(predict(classifier, files[:2], ANSWERS))


def test_names_must_be_as_many_as_classes(classifier, folder):
    with pytest.raises(InputError, match="2 names given to a model of 3 outputs"):
        list(predict(classifier, expand([folder]), ClassAnswers(CLASSES[:2])))


def test_both_formats_say_the_same(classifier, folder):
    found = list(predict(classifier, expand([folder]), ANSWERS))
    rows = list(csv.DictReader(as_text(found, ANSWERS.columns, "csv").splitlines()))
    records = json.loads(as_text(found, ANSWERS.columns, "json"))
    for row, record in zip(rows, records, strict=True):
        assert (row["file"], row["label"]) == (record["file"], record["label"])
        for name in CLASSES:
            assert float(row[name]) == pytest.approx(record["probabilities"][name], abs=1e-6)
    with pytest.raises(InputError, match="no format 'xml'"):
        as_text(found, ANSWERS.columns, "xml")


def test_classes_are_asked_for_by_number_or_name():
    assert class_numbers(None, CLASSES) == [0, 1, 2]
    assert class_numbers("2, bee,0", CLASSES) == [2, 1, 0]
    assert class_numbers("1", ("1", "0")) == [0]
    with pytest.raises(InputError, match="class 3 is out of range: there are 3 classes, 0 to 2"):
        class_numbers("3", CLASSES)
    with pytest.raises(InputError, match="'bea'; did you mean 'bee'"):
        class_numbers("bea", CLASSES)
    with pytest.raises(InputError, match="names no class"):
        class_numbers(" , ", CLASSES)


def test_samples_on_disk_say_what_they_are(tmp_path):
    images = torch.randint(0, 256, (3, 8, 6, 1), dtype=torch.uint8)
    sheet = write_samples(tmp_path / "new", images, ["cat", "a/b", "cat"], {"seed": 5}, columns=2)
    about = json.loads((tmp_path / "new/samples.json").read_text())
    assert about["seed"] == 5
    assert [entry["class"] for entry in about["samples"]] == ["cat", "a/b", "cat"]
    for entry, image in zip(about["samples"], images, strict=True):
        with Image.open(tmp_path / "new" / entry["file"]) as file:
            assert np.array_equal(np.array(file), image[..., 0].numpy())
    assert {file.name for file in (tmp_path / "new").iterdir()} == {
        *(entry["file"] for entry in about["samples"]), "grid.png", "samples.json",
    }  # fmt: skip
    assert sheet.name == "grid.png"


@pytest.mark.parametrize("name", ["a/b", "..", "", "x" * 300, "café 1", "\x00"])
def test_any_class_name_makes_a_file_name(name, tmp_path):
    (tmp_path / f"0-{file_safe(name)}.png").touch()
    assert len(list(tmp_path.iterdir())) == 1


def test_an_image_of_no_numbers_gets_no_label(tmp_path):
    network = FITImageEncoder.from_preset(
        "tiny", image_size=None, group_size=8, patch_size=4, channels=1, num_classes=2, latent_position="row_column"
    ).eval()
    pixels = np.zeros((9, 12, 1), dtype=np.float32)
    np.save(tmp_path / "whole.npy", pixels)
    pixels[3, 3] = np.nan
    np.save(tmp_path / "broken.npy", pixels)
    faults: list = []
    files = [tmp_path / "whole.npy", tmp_path / "broken.npy"]
    found = list(predict(network, files, ClassAnswers(("a", "b")), on_unreadable=faults.append))
    assert [Path(each.file).name for each in found] == ["whole.npy"]
    assert "NaN or infinite" in str(faults[0])


def test_samples_of_an_earlier_call_do_not_stay(tmp_path):
    images = torch.zeros(5, 4, 4, 1, dtype=torch.uint8)
    write_samples(tmp_path, images, None, {})
    (tmp_path / "mine.png").write_bytes(b"not a sample")
    write_samples(tmp_path, images[:2], ["a", "b"], {})
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"00000-a.png", "00001-b.png", "grid.png", "samples.json", "mine.png"}


def test_a_folder_is_read_as_training_reads_it(tmp_path):
    for name in ("a.png", "deep/b.png", ".hidden/c.png", ".d.png", "__cache__/e.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (3, 3)).save(tmp_path / name)
    assert [file.name for file in expand([tmp_path])] == ["a.png", "b.png"]
