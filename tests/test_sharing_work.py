"""Many images: processes that share a folder, and a predictor for the engines that spread work themselves."""

import importlib.util
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

import fitformer
from fitformer.cli import main
from fitformer.errors import InputError
from fitformer.execution.token_store import ScratchError
from fitformer.inference.find import Shard, Slide, find
from helpers import untrained_run

TINY = ["dim=16", "latent_dim=16", "heads=2", "latent_heads=2", "latents_per_group=2", "group_size=4", "patch_size=2"]
ANY_SIZE = ["latent_position=row_column", "glimpses=1"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of one size and one of any size."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        name: untrained_run(folder / name, "digits-classify", *(f"model.{key}" for key in keys), "data.image_size=8")
        for name, keys in {"one": TINY, "any": [*TINY, *ANY_SIZE]}.items()
    }


@pytest.fixture
def images(tmp_path):
    """Twelve images in three folders, and two broken ones."""
    random = np.random.default_rng(0)
    for k in range(12):
        path = tmp_path / "images" / "abc"[k % 3] / f"{k}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(path, random.integers(0, 256, (8 + k, 30 - k), dtype=np.uint8), tile=(16, 16))
    for name in ("a/broken.tif", "c/broken.png"):
        (tmp_path / "images" / name).write_bytes(b"no image")
    return tmp_path / "images"


def outputs(folder):
    """What stands in an output folder by name, without what tells one folder from another."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


@pytest.mark.parametrize("run", ["one", "any"])
@pytest.mark.parametrize("explain", ["none", "attention"])
def test_parts_together_are_the_whole(run, explain, runs, images, tmp_path, capsys):
    words = ["predict", runs[run], str(images), "--explain", explain, "--output"]
    assert main([*words, str(tmp_path / "whole")]) == 0
    capsys.readouterr()
    counts = []
    for part in (2, 3, 1):
        assert main([*words, str(tmp_path / "parts"), "--shard", f"{part}/3"]) == 0
        said = capsys.readouterr().out
        assert f" images of part {part}/3 labelled now" in said
        counts.append(int(said.split(": ")[1].split(" of ")[0]))
    assert sum(counts) == 12
    assert min(counts) > 0
    assert outputs(tmp_path / "parts") == outputs(tmp_path / "whole")
    assert [len((tmp_path / "parts" / name).read_text().splitlines()) for name in ("results.csv", "broken.csv")] == [
        13,
        3,
    ]
    # Again: nothing is left to do, and nothing changes.
    assert main([*words, str(tmp_path / "parts"), "--shard", "1/3"]) == 0
    assert " 0 of " in capsys.readouterr().out
    assert outputs(tmp_path / "parts") == outputs(tmp_path / "whole")


def test_labels_alone_are_those_of_a_table(runs, images, tmp_path, capsys):
    assert main(["predict", runs["any"], str(images), "--output", str(tmp_path / "labels.csv")]) == 0
    assert main(["predict", runs["any"], str(images), "--output", str(tmp_path / "out"), "--explain", "none"]) == 0
    assert (tmp_path / "out" / "results.csv").read_text() == (tmp_path / "labels.csv").read_text()
    assert not list((tmp_path / "out").rglob("*.png"))


@pytest.mark.slow
def test_processes_side_by_side_one_of_which_is_killed(runs, images, tmp_path):
    words = ["predict", runs["any"], str(images), "--explain", "attention", "--output"]
    assert main([*words, str(tmp_path / "whole")]) == 0
    command = [sys.executable, "-m", "fitformer", *words, str(tmp_path / "parts"), "--shard"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first, second = (subprocess.Popen([*command, f"{part}/2"], env=environment) for part in (1, 2))
    while first.poll() is None and not list((tmp_path / "parts").rglob("*.json")):
        time.sleep(0.005)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert second.wait() == 0
    assert main([*words, str(tmp_path / "parts"), "--shard", "1/2"]) == 0
    assert outputs(tmp_path / "parts") == outputs(tmp_path / "whole")


def test_an_image_stays_in_its_part_when_others_are_added():
    slides = [Slide(Path(f"{k}.tif"), f"{k}.tif") for k in range(1000)]
    parts = [{slide.name for slide in Shard(part, 8).of(slides)} for part in range(1, 9)]
    assert sum(map(len, parts)) == 1000
    assert len(set.union(*parts)) == 1000
    assert all(90 < len(part) < 160 for part in parts)
    for part, before in enumerate(parts, start=1):
        assert before <= {slide.name for slide in Shard(part, 8).of([Slide(Path("new"), "new.tif"), *slides])}
    with pytest.raises(InputError, match="shard 9/8"):
        Shard(9, 8)


def test_a_part_of_broken_images_alone_is_no_error(runs, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for k in range(3):
        (tmp_path / "images" / f"{k}.png").write_bytes(b"no image")
    words = ["predict", runs["one"], str(tmp_path / "images"), "--explain", "none", "--output", str(tmp_path / "out")]
    for part in (1, 2):
        assert main([*words, "--shard", f"{part}/2"]) == 0
    assert len((tmp_path / "out" / "broken.csv").read_text().splitlines()) == 4
    assert main(words) == 2
    assert "none of the 3 images can be labelled" in capsys.readouterr().err


def test_each_folder_is_read_once_whatever_links_there_are(images, tmp_path):
    before = [slide.name for slide in find([images])]
    (images / "a" / "loop").symlink_to("..")
    (images / "a" / ".hidden").mkdir()
    (images / "a" / ".hidden" / "x.tif").write_bytes(b"")
    assert [slide.name for slide in find([images])] == before
    (images / "out" / "deep").mkdir(parents=True)
    (images / "out" / "deep" / "map.tif").write_bytes(b"")
    assert [slide.name for slide in find([images], images / "out")] == before


@pytest.mark.parametrize("shard", ["0/4", "5/4", "1/0", "a/b", "1", "1/2/3", "-1/2"])
def test_what_is_no_part(shard, runs, images, tmp_path, capsys):
    assert main(["predict", runs["one"], str(images), "--output", str(tmp_path / "out"), f"--shard={shard}"]) == 2
    assert "is no part of a whole; write 1/8 to 8/8" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_parts_need_a_folder(runs, images, tmp_path, capsys):
    assert main(["predict", runs["one"], str(images), "--shard", "1/2", "--output", str(tmp_path / "a.csv")]) == 2
    assert "--shard is for a folder, and --output is" in capsys.readouterr().err


def test_outputs_of_another_checkpoint_are_made_anew(runs, images, tmp_path, capsys):
    words = ["predict", runs["one"], str(images), "--output", str(tmp_path / "out"), "--explain", "none"]
    assert main(words) == 0
    other = untrained_run(
        tmp_path / "other", "digits-classify", *(f"model.{k}" for k in TINY), "data.image_size=8", seed=1
    )
    capsys.readouterr()
    assert main(["predict", other, *words[2:]]) == 0
    assert ": 12 of 14 images labelled now" in capsys.readouterr().out


# --- a predictor


def table(images):
    return [str(path) for path in sorted(images.rglob("*.*"))]


@pytest.mark.parametrize("run", ["one", "any"])
def test_a_predictor_says_what_predict_says(run, runs, images, tmp_path, capsys):
    assert main(["predict", runs[run], str(images), "--format", "json"]) == 0
    wanted = {row["file"]: row for row in json.loads(capsys.readouterr().out)}
    predictor = fitformer.Predictor(runs[run], device="cpu", batch_size=5)
    paths = table(images)
    batch = {"path": np.array(paths + paths[:1]), "patient": np.arange(15)}
    found = predictor(batch)
    assert list(found)[:5] == ["path", "patient", "label", "probability", "p_0"]
    assert found["patient"].tolist() == list(range(15))
    assert len(predictor(batch)["label"]) == 15
    for k, path in enumerate(batch["path"].tolist()):
        if path in wanted:
            assert found["label"][k] == wanted[path]["label"]
            assert found["probability"][k] == pytest.approx(wanted[path]["probability"], abs=1e-6)
            assert found["p_3"][k] == pytest.approx(wanted[path]["probabilities"]["3"], abs=1e-6)
            assert found["error"][k] == ""
        else:
            assert "broken" in path
            assert found["label"][k] == ""
            assert np.isnan(found["probability"][k])
            assert found["error"][k]
    pandas = pytest.importorskip("pandas")
    framed = predictor(pandas.DataFrame({"path": paths}))
    assert framed["label"].tolist() == found["label"].tolist()[:14]


@pytest.mark.parametrize("run", ["one", "any"])
def test_a_predictor_takes_pixels_for_files_of_them(run, runs, images):
    predictor = fitformer.Predictor(runs[run], device="cpu")
    paths = [path for path in table(images) if "broken" not in path]
    of_files = predictor({"path": paths})
    of_pixels = predictor({"path": [tifffile.imread(path) for path in paths]})
    assert of_files["error"].tolist() == of_pixels["error"].tolist() == [""] * 12
    for name in predictor.columns[:-1]:
        assert of_files[name].tolist() == of_pixels[name].tolist()
    # A column that is one array holds an image a row.
    same = np.stack([tifffile.imread(paths[0])] * 2)
    assert predictor({"path": same})["p_3"].tolist() == [of_files["p_3"][0]] * 2
    odd = predictor({"path": [[paths[0], paths[1]], [], np.zeros((4, 4, 7), np.uint8), np.zeros((4, 4), np.int64)]})
    for error, said in zip(
        odd["error"], ["no data.patient", "an empty list", "7 channels", "int64|signed"], strict=True
    ):
        assert re.search(said, error)


def test_a_predictor_is_pickled_as_its_arguments(runs, images):
    predictor = fitformer.Predictor(runs["any"], device="cpu")
    before = predictor({"path": table(images)})
    assert len(pickle.dumps(predictor)) < 1000
    after = pickle.loads(pickle.dumps(predictor))({"path": table(images)})
    assert np.array_equal(before["probability"], after["probability"], equal_nan=True)


def test_a_batch_of_broken_images_alone(runs, images):
    found = fitformer.Predictor(runs["one"], device="cpu")({"path": [str(images / "a" / "broken.tif")]})
    assert found["error"].tolist() != [""]
    assert np.isnan(found["p_9"]).all()


def test_what_a_predictor_does_not_take(runs, tmp_path):
    with pytest.raises(InputError, match="a batch needs a column 'path' of image paths; it has file"):
        fitformer.Predictor(runs["one"])({"file": ["a.png"]})
    with pytest.raises(InputError, match="has a column 'label' already"):
        fitformer.Predictor(runs["one"])({"path": ["a.png"], "label": ["x"]})
    with pytest.raises(InputError, match="a batch is a dict of columns or a pandas DataFrame, and this is list"):
        fitformer.Predictor(runs["one"])(["a.png"])
    with pytest.raises(InputError, match="device 'meta' holds no numbers"):
        fitformer.Predictor(runs["one"], device="meta")({"path": ["a.png"]})
    with pytest.raises(InputError):
        fitformer.Predictor(tmp_path / "nowhere")


ODD = [None, "", "x", b"x", -1, 0, 1.5, float("nan"), 10**18, [], {}, object(), True, np.array([1, 2])]


@pytest.mark.parametrize("name", ["run", "checkpoint", "device", "batch_size", "column", "keep", "scratch"])
def test_an_odd_argument_of_a_predictor_is_one_clear_error_or_means_something(name, runs, images):
    for odd in ODD:
        arguments = {"run": runs["any"], "device": "cpu", name: odd}
        try:
            found = fitformer.Predictor(**arguments)({str(arguments.get("column", "path")): table(images)[:1]})
        except (InputError, ScratchError) as error:
            assert "\n" not in str(error)  # noqa: PT017
        else:
            assert found["label"][0]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray: make slow installs it")
def test_the_example_for_ray(runs, images, tmp_path):
    import pyarrow.parquet

    example = Path(__file__).parents[1] / "examples" / "ray_predict.py"
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    done = subprocess.run(
        [sys.executable, str(example), runs["any"], str(images), str(tmp_path / "labels"), "--workers", "2"],
        capture_output=True, text=True, timeout=280, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "14 images" in done.stdout
    rows = pyarrow.parquet.read_table(tmp_path / "labels").to_pylist()
    found = {row["path"]: row for row in rows}
    wanted = fitformer.Predictor(runs["any"], device="cpu")({"path": table(images)})
    assert sorted(found) == table(images)
    for path, label, probability in zip(wanted["path"], wanted["label"], wanted["probability"], strict=True):
        assert found[path]["label"] == label
        assert found[path]["probability"] == pytest.approx(probability, abs=1e-6, nan_ok=True)


def test_pictures_are_read_by_a_predictor_too(runs, tmp_path):
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "a.png")
    assert fitformer.Predictor(runs["one"], device="cpu")({"path": [tmp_path / "a.png"]})["error"].tolist() == [""]
