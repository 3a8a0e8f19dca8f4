"""What a run of patients with several slides is used for: a label for each patient, maps over each of its slides."""

import csv
import json
import os
import shutil

import numpy as np
import pytest
import tifffile
import torch
import yaml

pytest.importorskip("lightning", reason="needs the extra train")

import fitformer
from fitformer.cli import main
from fitformer.data.readers import open_image
from fitformer.errors import InputError
from fitformer.inference.explain import HeatMap, explain
from fitformer.inference.find import Patient
from fitformer.patching.any_size import GroupedImage
from fitformer.patching.joined_images import JoinedImages
from fitformer.tasks.answers import log_odds
from fitformer.training.run_dir import Run
from helpers import slide_of_features, untrained_run, write_features

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH, GROUP, STEP = 5, 4, 512
# Two slides of one name in two folders; two in one; one alone; one of two without patches.
PATIENTS = {"P0": ["x/a.h5", "y/a.h5"], "P1": ["x/b.h5", "x/c.h5"], "P 2": ["d.h5"], "3/ä": ["y/e.h5", "y/blank.h5"]}
FILES = [file for files in PATIENTS.values() for file in files]


def corner_of(file):
    """Where the grid of a slide begins, x and y."""
    return 1000 + 300 * FILES.index(file), 5000 - 200 * FILES.index(file)


def write_table(path, patients):
    rows = [f"{file},{name}" for name, files in patients.items() for file in files]
    path.write_text("path,patient\n" + "\n".join(rows) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """A folder of slides, and a table of them and their patients."""
    folder = tmp_path_factory.mktemp("slides")
    for k, file in enumerate(FILES):
        (folder / file).parent.mkdir(exist_ok=True)
        _, features, coords = slide_of_features(5 + k % 3, 6 + k % 4, WIDTH, corner=corner_of(file), seed=k)
        some = 0 if "blank" in file else len(features)
        write_features(folder / file, features[:some], coords[:some])
    write_table(folder / "table.csv", PATIENTS)
    return folder


def recipe(folder, **data):
    size = {"dim": 16, "latent_dim": 16, "heads": 2, "latent_heads": 2, "latents_per_group": 2, "layers": "(1)1(1)1"}
    return {
        "task": "classify",
        "model": {**size, "group_size": GROUP, "patch_size": 1, "latent_position": "row_column", "glimpses": 1},
        "data": {"source": "manifest", "path": str(folder / "labels.csv"), "image_size": None, "validation": 0,
                 "holdout": 0.5, **data},
    }  # fmt: skip


@pytest.fixture(scope="module")
def runs(slides, tmp_path_factory):
    """A run of patients, and one of single slides."""
    root = tmp_path_factory.mktemp("runs")
    rows = [f"{file},{'ab'[k % 2]},{name}" for k, (name, files) in enumerate(PATIENTS.items()) for file in files]
    (slides / "labels.csv").write_text("path,label,patient\n" + "\n".join(rows) + "\n")
    made = {}
    for name, data in {"patients": {"patient": "patient"}, "slides": {}}.items():
        (root / f"{name}.yaml").write_text(yaml.safe_dump(recipe(slides, **data)))
        made[name] = untrained_run(root / name, str(root / f"{name}.yaml"))
    return made


def predict(capsys, *words):
    """The exit status, what was printed, and the errors."""
    capsys.readouterr()
    status = main(["predict", *map(str, words)])
    said = capsys.readouterr()
    return status, said.out, said.err


def model_of(run):
    network = Run.open(run).model()
    network.set_execution("plain")
    return network


def features_of(path):
    """The annotation, and tiles by the corner of their rectangle (x, y), of a GeoJSON file."""
    whole, *others = json.loads(path.read_text())["features"]
    rings = [each["geometry"]["coordinates"][0] for each in others]
    tiles = {tuple(ring[0]): each for ring, each in zip(rings, others, strict=True)
             if each["properties"]["objectType"] == "tile"}  # fmt: skip
    return whole, tiles


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def outputs(folder):
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith("."))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@torch.inference_mode()
def test_leave_out_maps_lie_over_each_slide_with_what_its_groups_add_to_the_patient(runs, slides, tmp_path, capsys):
    output = tmp_path / "seen"
    status, said, _ = predict(
        capsys, runs["patients"], slides / "table.csv", "--output", output, "--explain", "leave-out"
    )
    assert (status, said) == (0, f"{output}: 4 of 4 patients labelled now\n")
    model, rows = model_of(runs["patients"]), {row["file"]: row for row in rows_of(output / "results.csv")}
    assert list(rows) == sorted(PATIENTS)
    images = [open_image(slides / file) for file in PATIENTS["P0"]]
    logits = model([tuple(images)])[0]
    best = int(logits.argmax())
    assert rows["P0"]["label"] == "ab"[best]
    assert float(rows["P0"]["probability"]) == pytest.approx(float(logits.softmax(-1)[best]), abs=1e-6)
    signs = set()
    for k, file in enumerate(PATIENTS["P0"]):
        # Of slides of one name, the folder is told.
        whole, tiles = features_of(output / "P0" / f"{file}.geojson")
        assert whole["properties"]["classification"]["name"] == "ab"[best]
        left, top = corner_of(file)
        rows_, columns, _ = images[k].shape
        right, bottom = left + columns * STEP, top + rows_ * STEP
        assert whole["geometry"]["coordinates"][0] == [
            [left, top], [right, top], [right, bottom], [left, bottom], [left, top]
        ]  # fmt: skip
        there = model.grouped(images[k]).coords[1:].tolist()
        assert len(tiles) == len(there)
        for row, column in there:
            without = np.ones(model.grouped(images[k]).grid, bool)
            without[row, column] = False
            # The glimpse of the slide stays, and so does all of the other slide.
            parts = [GroupedImage(image, model.patch_grid, without if k == n else None, glimpses=1)
                     for n, image in enumerate(images)]  # fmt: skip
            adds = log_odds(logits, best) - log_odds(model([JoinedImages(parts)])[0], best)
            tile = tiles[left + column * GROUP * STEP, top + row * GROUP * STEP]["properties"]
            assert tile["measurements"]["leave-out"] == pytest.approx(float(adds), abs=2e-5)
            assert tile["classification"]["name"] == f"{'for' if adds > 0 else 'against'} {'ab'[best]}"
            signs.add(float(adds) > 0)
    assert signs == {True, False}
    record = json.loads((output / "P0.json").read_text())
    assert [each["name"] for each in record["slides"]] == ["P0/x/a.h5", "P0/y/a.h5"]
    assert record["log_odds"] == pytest.approx(float(log_odds(logits, best)), abs=1e-5)
    # A file name for each patient, and none for a slide without patches.
    assert (output / "3%2Fä.json").exists()
    assert sorted(path.name for path in output.rglob("*.geojson")) == sorted(
        f"{os.path.basename(file)}.geojson" for file in FILES if "blank" not in file
    )
    blank = json.loads((output / "3%2Fä.json").read_text())
    assert blank["blank"] == [str(slides / "y/blank.h5")]


@pytest.mark.parametrize("method", ["attention", "gradient"])
def test_maps_of_patches_are_those_of_the_patient_cut_apart(runs, slides, tmp_path, capsys, method):
    words = ["--output", tmp_path, "--explain", method, "--keep", "host", "--y", "up"]
    status, _, said = predict(capsys, runs["patients"], slides / "table.csv", *words)
    assert status == 0
    assert f"fitformer: {method} against leave-out, largest groups of 4 patients: rank correlation" in said
    images = [open_image(slides / file) for file in PATIENTS["P1"]]
    found = explain(model_of(runs["patients"]), images, method)
    name = {"attention": "attention", "gradient": "relevance"}[method]
    for k, file in enumerate(PATIENTS["P1"]):
        map_ = HeatMap.of(found.image.split(found.maps[name])[k], found.image.parts[k]).cells
        left, top = corner_of(file)
        base = tmp_path / "P1" / os.path.basename(file)
        with tifffile.TiffFile(f"{base}.{name}.tif") as written:
            np.testing.assert_allclose(written.pages[0].asarray(), map_, rtol=1e-4, atol=1e-6)
            assert written.pages[0].tags["ModelTiepointTag"].value == (0, 0, 0, left, -top, 0)
            assert written.pages[0].tags["ModelPixelScaleTag"].value == (STEP, STEP, 0)
        assert (base.parent / f"{base.name}.{name}.png").exists()
        features = json.loads((base.parent / f"{base.name}.geojson").read_text())["features"]
        patches = [each for each in features if each["properties"]["objectType"] == "detection"]
        assert len(patches) == np.isfinite(map_).sum()
        for each in patches:
            (x, y), value = each["geometry"]["coordinates"][0][0], each["properties"]["measurements"][name]
            cell = map_[round((-y - top) / STEP), round((x - left) / STEP)]
            assert value == pytest.approx(float(cell), rel=1e-4, abs=1e-6)
    # Groups that were left out are told by their slide.
    groups = json.loads((tmp_path / "P1.json").read_text())["agreement"]["groups"]
    assert {each["slide"] for each in groups} == {"P1/b.h5", "P1/c.h5"}
    for each in groups:
        image = images[["P1/b.h5", "P1/c.h5"].index(each["slide"])]
        assert [each["row"] // GROUP, each["column"] // GROUP] in model_of(runs["patients"]).grouped(
            image
        ).coords.tolist()


@pytest.mark.parametrize("explain", ["none", "leave-out"])
def test_shards_of_patients_are_the_whole(runs, slides, tmp_path, capsys, explain):
    words = [runs["patients"], slides / "table.csv", "--explain", explain, "--output"]
    assert predict(capsys, *words, tmp_path / "whole")[0] == 0
    before, made = {}, []
    for part in (2, 1, 3):
        status, said, _ = predict(capsys, *words, tmp_path / "parts", "--shard", f"{part}/3")
        assert status == 0
        assert f" patients of part {part}/3 labelled now" in said
        now = {name: content for name, content in outputs(tmp_path / "parts").items() if name != "results.csv"}
        assert before.items() <= now.items()
        new = now.keys() - before.keys()
        # A patient's record, and the maps of all its slides, come together.
        records = {name.removesuffix(".json") for name in new if "/" not in name}
        assert {name.split("/")[0] for name in new if "/" in name} == (records if explain == "leave-out" else set())
        made += records
        before = now
    assert sorted(made) == ["3%2Fä", "P 2", "P0", "P1"]
    assert outputs(tmp_path / "parts") == outputs(tmp_path / "whole")
    with pytest.raises(InputError, match="twice"):
        Patient.of("P", [slides / "d.h5", slides / "x" / ".." / "d.h5"])


def test_the_same_command_goes_on(runs, slides, tmp_path, capsys):
    shutil.copytree(slides, tmp_path / "in")
    words = [runs["patients"], tmp_path / "in" / "table.csv", "--explain", "attention", "--output", tmp_path / "out"]
    assert predict(capsys, *words)[0] == 0
    before = outputs(tmp_path / "out")
    assert "0 of 4 patients labelled now, 4 were there already" in predict(capsys, *words)[1]
    assert outputs(tmp_path / "out") == before
    (tmp_path / "out" / "P1" / "b.h5.geojson").unlink()
    assert "1 of 4 patients labelled now" in predict(capsys, *words)[1]
    assert outputs(tmp_path / "out") == before
    # A slide that changed makes its patient anew; one that left the table takes its maps along.
    _, features, coords = slide_of_features(6, 6, WIDTH, seed=9)
    write_features(tmp_path / "in" / "x" / "c.h5", features, coords)
    assert "1 of 4 patients labelled now" in predict(capsys, *words)[1]
    write_table(tmp_path / "in" / "table.csv", {**PATIENTS, "P1": ["x/b.h5"]})
    assert "1 of 4 patients labelled now" in predict(capsys, *words)[1]
    assert sorted(name for name in outputs(tmp_path / "out") if name.startswith("P1")) == [
        "P1.json", "P1/b.h5.attention.png", "P1/b.h5.attention.tif", "P1/b.h5.geojson"
    ]  # fmt: skip
    # One whose slides are all others is another one.
    write_table(tmp_path / "in" / "table.csv", {"P1": ["d.h5"]})
    status, _, error = predict(capsys, *words)
    assert status == 2
    assert "P1.* was made of " in error
    assert "another output folder" in error


def test_patients_that_cannot_be_labelled_are_told(runs, slides, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    shutil.copy(slides / "d.h5", tmp_path / "in")
    shutil.copy(slides / "y/blank.h5", tmp_path / "in")
    table = write_table(tmp_path / "in" / "table.csv", {"A": ["d.h5"], "B": ["gone.h5"], "C": ["blank.h5"]})
    status, said, error = predict(capsys, runs["patients"], table, "--output", tmp_path / "out")
    assert status == 0
    assert "1 of 3 patients labelled now, 1 could not be read, 1 blank (broken.csv)" in said
    assert [row["file"] for row in rows_of(tmp_path / "out" / "results.csv")] == ["A"]
    broken = {row["file"]: row for row in rows_of(tmp_path / "out" / "broken.csv")}
    assert [(name, row["what"]) for name, row in broken.items()] == [("B", "unreadable"), ("C", "blank")]
    assert "gone.h5" in broken["B"]["reason"]
    assert "fitformer: skipped B (" in error
    # What is missing is done when it comes.
    shutil.copy(slides / "x/b.h5", tmp_path / "in" / "gone.h5")
    assert (
        "1 of 3 patients labelled now, 1 were there"
        in predict(capsys, runs["patients"], table, "--output", tmp_path / "out")[1]
    )
    assert not (tmp_path / "out" / "B.failed").exists()
    table = write_table(tmp_path / "in" / "table.csv", {"C": ["blank.h5"]})
    status, _, error = predict(capsys, runs["patients"], table, "--output", tmp_path / "none")
    assert status == 2
    assert error.splitlines()[-1].startswith("fitformer: error: none of the 1 patients can be labelled: ")


@pytest.mark.parametrize(
    "words", [["--output", "seen"], ["--output", "seen", "--explain", "none", "--shard", "1/2"], []]
)
def test_a_table_is_for_a_run_of_patients(runs, slides, tmp_path, capsys, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    status, _, error = predict(capsys, runs["slides"], slides / "table.csv", *words)
    assert status == 2
    assert "table.csv is a table, which says what images are of one patient" in error
    assert len(error.splitlines()) == 1
    assert predict(capsys, runs["patients"], slides / "table.csv", slides / "d.h5", *words)[0] == 2


def test_a_predictor_answers_on_patients_as_predict_does(runs, slides, capsys):
    table = slides / "table.csv"
    _, said, _ = predict(capsys, runs["patients"], table)
    wanted = {row["file"]: row for row in csv.DictReader(said.splitlines())}
    predictor = fitformer.Predictor(runs["patients"], device="cpu")
    cells = [[str(slides / file) for file in files] for files in PATIENTS.values()]
    for column in (cells, [np.array(each) for each in cells], [tuple(each) for each in cells]):
        found = predictor({"path": column, "patient": list(PATIENTS)})
        assert found["error"].tolist() == [""] * 4
        for k, name in enumerate(PATIENTS):
            assert found["label"][k] == wanted[name]["label"]
            assert found["p_a"][k] == pytest.approx(float(wanted[name]["a"]), abs=1e-6)
    # As a table is grouped: a list a row.
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        [(name, str(slides / file)) for name, files in PATIENTS.items() for file in files], columns=["patient", "path"]
    )
    grouped = predictor(frame.groupby("patient")["path"].apply(list).reset_index())
    assert {name: f"{p:.6f}" for name, p in zip(grouped["patient"], grouped["p_a"], strict=True)} == {
        name: row["a"] for name, row in wanted.items()
    }
    # One file is a patient of one, as a list of it is; what cannot be read is told.
    odd = predictor({"path": [cells[2][0], cells[2], [cells[0][0], "gone.h5"], [cells[0][0], None], []]})
    assert odd["p_a"][0] == odd["p_a"][1] == found["p_a"][2]
    for error, words in zip(
        odd["error"][2:], ["gone.h5", "no path and no pixels: NoneType", "empty list"], strict=True
    ):
        assert words in error
    alone = fitformer.Predictor(runs["slides"], device="cpu")({"path": [cells[0]]})
    assert "no data.patient" in alone["error"][0]
