"""What a segmenter's run is used for: label maps in their place, polygons, pictures; one error where it cannot."""

import csv
import json
import pickle

import numpy as np
import pytest
import rasterio
import rasterio.features
import tifffile
import torch
from PIL import Image

pytest.importorskip("lightning", reason="needs the extra train")

import fitformer
from fitformer._support.scratch_array import scratch_array
from fitformer.cli import main
from fitformer.data.datasets.images import CLASSES
from fitformer.data.labels import UNLABELLED
from fitformer.data.pixels import fit, unfit
from fitformer.data.readers import open_image
from fitformer.data.readers.levels import Placement
from fitformer.data.readers.writing import write_tiled_tiff
from fitformer.errors import InputError
from fitformer.inference.segmentation import polygons
from fitformer.training.run_dir import Run
from helpers import untrained_run
from test_segment import folder, recipe

pytestmark = pytest.mark.usefixtures("one_thread")

TAGS = [(33550, 12, 3, (0.5, 0.5, 0.0), True), (33922, 12, 6, (0, 0, 0, 1000.0, 2000.0, 0), True)]
TAGS += [(34735, 3, 8, (1, 1, 0, 1, 1025, 0, 1, 1), True)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Untrained runs of images of any size, and of one, and a folder of images for them."""
    root = tmp_path_factory.mktemp("segmenters")
    folder(root / "data")
    from fitformer.config import load as config

    made = {}
    for name, size in (("any", "null"), ("one", "[32, 24]")):
        (root / f"{name}.yaml").write_text(config.dump(recipe(root / "data", image_size=size)))
        made[name] = untrained_run(root / name, str(root / f"{name}.yaml"))
    images = root / "images"
    (images / "below").mkdir(parents=True)
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (70, 45, 3)).astype(np.uint8)
    tifffile.imwrite(images / "placed.tif", pixels, photometric="rgb", extratags=TAGS)
    Image.fromarray(pixels[:50, :60]).save(images / "below" / "plain.png")
    return root, made, images


def predict(capsys, *words):
    """The exit status, what was printed, and the errors."""
    capsys.readouterr()
    status = main(["predict", *map(str, words)])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_maps_of_any_size_are_the_classes_of_the_logits_in_their_place(runs, tmp_path, capsys):
    _, made, images = runs
    status, said, _ = predict(capsys, made["any"], images, "--output", tmp_path / "seen", "--probabilities")
    assert (status, "2 of 2 images labelled now" in said) == (0, True)
    network = Run.open(made["any"]).model()
    network.set_execution("plain")
    with torch.inference_mode(), open_image(images / "placed.tif") as image:
        (logits,) = network([image])
    with rasterio.open(tmp_path / "seen" / "placed.tif.labels.tif") as map_:
        assert np.array_equal(map_.read(1), logits.argmax(0).numpy())
        assert map_.nodata == UNLABELLED
        assert (map_.transform.a, map_.transform.e, map_.transform.c, map_.transform.f) == (0.5, -0.5, 1000, 2000)
        assert len({map_.colormap(1)[k] for k in (0, 1, 2)}) == 3
    with open_image(tmp_path / "seen" / "placed.tif.probabilities.tif") as shares:
        found = shares.window(0, 0, 70, 45)
    assert np.abs(found / 255 - logits.softmax(0).movedim(0, -1).numpy()).max() < 1 / 255
    with Image.open(tmp_path / "seen" / "placed.tif.png") as picture:
        assert picture.size == (45, 70)
    record = json.loads((tmp_path / "seen" / "below" / "plain.png.json").read_text())
    assert sum(record["shares"].values()) == pytest.approx(1)
    table = list(csv.reader((tmp_path / "seen" / "results.csv").read_text().splitlines()))
    assert table[0] == ["file", "rows", "columns", "a", "b", "c"]
    assert len(table) == 3
    # The same command does nothing again; another setting does all anew.
    assert (
        "2 were there already"
        in predict(capsys, made["any"], images, "--output", tmp_path / "seen", "--probabilities")[1]
    )
    assert "2 of 2" in predict(capsys, made["any"], images, "--output", tmp_path / "seen", "--y", "up")[1]


def test_of_one_size_they_lie_over_the_image_as_it_is(runs, tmp_path, capsys):
    _, made, images = runs
    assert predict(capsys, made["one"], images, "--output", tmp_path, "--no-polygons")[0] == 0
    assert not list(tmp_path.rglob("*.geojson"))
    network = Run.open(made["one"]).model()
    with open_image(images / "placed.tif") as image:
        pixels = image.window(0, 0, 70, 45)
    seen = torch.from_numpy(np.array(fit(pixels, (32, 24), "crop")))
    with torch.inference_mode():
        classes = network([seen])[0].argmax(0).numpy().astype(np.uint8)
    with rasterio.open(tmp_path / "placed.tif.labels.tif") as map_:
        found, place = map_.read(1), map_.transform
    assert np.array_equal(found, unfit(classes, (70, 45), "crop", UNLABELLED))
    # The crop leaves rows out, which no class is said of.
    assert (found == UNLABELLED).any(1).sum() == 10
    assert (place.c, place.f) == (1000, 2000)


@pytest.mark.parametrize("resize", ["crop", "stretch", "pad"])
@pytest.mark.parametrize("size", [(20, 30), (33, 20), (64, 64)])
def test_what_was_fitted_goes_back_where_it_came_from(resize, size):
    rows, columns = size
    # Every pixel of a class of its own square of the image.
    before = (np.arange(rows)[:, None] * 4 // rows * 4 + np.arange(columns) * 4 // columns).astype(np.uint8)
    there = fit(before[..., None], (60, 80), resize, CLASSES)[..., 0]
    back = unfit(there, size, resize, UNLABELLED)
    assert back.shape == size
    known = back != UNLABELLED
    assert (back == before)[known].mean() > 0.9
    assert known.all() or resize == "crop"


def test_polygons_are_the_map_again_with_holes(tmp_path):
    labels = np.zeros((40, 60), np.uint8)
    labels[10:30, 10:40] = 1
    labels[15:25, 20:30] = 2
    labels[18:20, 22:26] = UNLABELLED
    for y, sign in (("down", 1), ("up", -1)):
        assert polygons.write_polygons(tmp_path / "a.geojson", labels, "abc", [(0, 0, 0)] * 3, y) == 1
        features = json.loads((tmp_path / "a.geojson").read_text())["features"]
        assert len(features) == 3
        names = [feature["properties"]["classification"]["name"] for feature in features]
        shapes = [(feature["geometry"], "abc".index(name)) for feature, name in zip(features, names, strict=True)]
        where = rasterio.Affine(1, 0, 0, 0, sign, 0)
        assert np.array_equal(
            rasterio.features.rasterize(shapes, labels.shape, fill=UNLABELLED, transform=where), labels
        )
    assert sorted(len(feature["geometry"]["coordinates"]) for feature in features) == [2, 2, 2]


def test_large_maps_are_traced_in_steps_and_stay_inside(tmp_path, monkeypatch):
    monkeypatch.setattr(polygons, "MOST_SIDE", 16)
    labels = np.zeros((30, 50), np.uint8)
    place = Placement(top=100, left=200, step=4)
    assert polygons.write_polygons(tmp_path / "a.geojson", labels, "a", [(0, 0, 0)], "down", place) == 4
    (feature,) = json.loads((tmp_path / "a.geojson").read_text())["features"]
    points = np.array(feature["geometry"]["coordinates"][0])
    assert points.min(0).tolist() == [200, 100]
    assert points.max(0).tolist() == [400, 220]


def test_large_maps_are_files_without_a_name(tmp_path, monkeypatch):
    monkeypatch.setattr("fitformer._support.scratch_array.IN_MEMORY", 10)
    large = scratch_array((5, 7, 2), UNLABELLED, tmp_path)
    assert isinstance(large, np.memmap)
    assert (large == UNLABELLED).all()
    large[2] = 1
    assert np.count_nonzero(large == 1) == 14
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="nowhere"):
        scratch_array((5, 7), 0, tmp_path / "nowhere")


def test_a_palette_is_written_with_reductions_that_mix_no_numbers(tmp_path):
    labels = np.random.default_rng(0).choice([3, 9], (1200, 700)).astype(np.uint8)
    write_tiled_tiff(
        tmp_path / "a.tif", (1200, 700, 1), np.uint8, lambda t, left, h, w: labels[t : t + h, left : left + w, None],
        pyramid=True, palette=[(k, 0, 255 - k) for k in range(256)],
    )  # fmt: skip
    with open_image(tmp_path / "a.tif", palette_indices=True) as image:
        assert image.level_shapes == ((1200, 700), (600, 350), (300, 175))
        assert np.array_equal(image.window(0, 0, 1200, 700)[..., 0], labels)
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        assert np.array_equal(file.pages[1].asarray(), labels[::2, ::2])
    with open_image(tmp_path / "a.tif") as image:
        assert set(map(tuple, image.window(0, 0, 5, 5).reshape(-1, 3))) <= {(3, 0, 252), (9, 0, 246)}
    with pytest.raises(InputError, match="palette"):
        write_tiled_tiff(tmp_path / "b.tif", (4, 4, 3), np.uint8, lambda *_: None, palette=[(0, 0, 0)])


def test_shards_and_broken_files(runs, tmp_path, capsys):
    _, made, _ = runs
    broken = tmp_path / "images"
    broken.mkdir()
    for k in range(3):
        Image.fromarray(np.full((20, 20, 3), 80 * k, np.uint8)).save(broken / f"{k}.png")
    (broken / "3.png").write_bytes(b"no picture")
    for part in ("1/2", "2/2"):
        assert predict(capsys, made["any"], broken, "--output", tmp_path / "seen", "--shard", part)[0] == 0
    assert len((tmp_path / "seen" / "results.csv").read_text().splitlines()) == 4
    assert "3.png" in (tmp_path / "seen" / "broken.csv").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "label maps need a folder"),
        (["--output", "x.csv"], "label maps need a folder"),
        (["--output", "seen", "--explain", "none"], "--explain is for a run that labels images"),
        (["--output", "seen", "--format", "csv"], "--format is for a run that labels images"),
        (["--output", "seen", "--scratch", "nowhere"], "nowhere"),
    ],
)
def test_what_does_not_go_with_label_maps(runs, tmp_path, capsys, monkeypatch, words, said):
    _, made, images = runs
    monkeypatch.chdir(tmp_path)
    status, _, error = predict(capsys, made["any"], images, *words)
    assert status == 2
    assert said in error
    assert len(error.splitlines()) == 1


def test_label_maps_are_not_written_over_by_a_classifier(runs, tmp_path, capsys):
    _, made, images = runs
    assert predict(capsys, made["one"], images, "--output", tmp_path / "seen", "--no-polygons")[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "seen").rglob("*") if path.is_file()}
    classifier = untrained_run(tmp_path / "classifier", "digits-classify")
    status, _, error = predict(capsys, classifier, images, "--output", tmp_path / "seen")
    assert status == 2
    assert "task segment" in error
    assert "another output folder" in error
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("name", ["any", "one"])
def test_a_predictor_gives_what_predict_writes(runs, tmp_path, capsys, name):
    _, made, images = runs
    words = ["--output", tmp_path / "seen", "--probabilities", "--no-polygons"]
    assert predict(capsys, made[name], images, *words)[0] == 0
    names = ["placed.tif", "below/plain.png"]
    with open_image(images / names[0]) as image:
        pixels = image.window(0, 0, 70, 45)
    (tmp_path / "no.png").write_bytes(b"no image")
    cells = [
        str(images / names[0]),
        images / names[1],
        pixels,
        str(tmp_path / "no.png"),
        None,
        [str(images / names[0])],
    ]
    predictor = fitformer.Predictor(made[name], device="cpu", probabilities=True)
    batch = predictor({"path": cells, "patient": list("abcdef")})
    assert list(batch) == ["path", "patient", "labels", "probabilities", "share_a", "share_b", "share_c", "error"]
    shares = {row["file"]: row for row in csv.DictReader((tmp_path / "seen" / "results.csv").read_text().splitlines())}
    for k, image in enumerate([*names, names[0]]):
        written = tmp_path / "seen" / image
        with tifffile.TiffFile(f"{written}.labels.tif") as file:
            assert np.array_equal(file.pages[0].asarray(), batch["labels"][k])
        with open_image(f"{written}.probabilities.tif") as file:
            assert np.array_equal(file.window(0, 0, *file.shape[:2]), batch["probabilities"][k])
        assert f"{batch['share_b'][k]:.6f}" == shares[str(images / image)]["b"]
    assert batch["error"][:3].tolist() == [""] * 3
    assert batch["labels"][3:].tolist() == [None] * 3
    assert np.isnan(batch["share_a"][3:]).all()
    for error, said in zip(
        batch["error"][3:], ["no.png", "no path and no pixels", "each has a label map"], strict=True
    ):
        assert said in error
    # Of one shape, each is a cell of its own; without probabilities there is no column of them.
    frame = pytest.importorskip("pandas").DataFrame({"path": [pixels, pixels[:, ::-1]]})
    found = pickle.loads(pickle.dumps(fitformer.Predictor(made[name], device="cpu")))(frame)
    assert list(found) == ["path", "labels", "share_a", "share_b", "share_c", "error"]
    assert np.array_equal(found["labels"][0], batch["labels"][0])
    assert found["labels"][1].shape == (70, 45)


def test_arrays_are_read_as_files_of_the_same_pixels(runs, tmp_path):
    _, made, _ = runs
    random = np.random.default_rng(1)
    grey, deep = random.integers(0, 256, (40, 30), np.uint8), random.integers(0, 2**16, (40, 30, 3), np.uint16)
    for name in ("any", "one"):
        predictor, read = fitformer.Predictor(made[name], device="cpu"), 0
        for k, pixels in enumerate((grey, deep, np.dstack([deep, deep[..., 0]]), deep.astype(np.float32))):
            np.save(tmp_path / f"{k}.npy", pixels)
            found = predictor({"path": [pixels, tmp_path / f"{k}.npy"]})
            assert [bool(error) for error in found["error"]] == [bool(found["error"][0])] * 2
            if not found["error"][0]:
                assert np.array_equal(*found["labels"])
                read += 1
        # One size: with other channels, too, but without floats; any size: of three channels, without floats.
        assert read == {"any": 1, "one": 3}[name]
    found = predictor({"path": [np.zeros((2, 3, 4, 5), np.uint8), np.zeros((3, 4), object), np.zeros(3)]})
    assert "an image is an array (rows, columns) or (rows, columns, channels), not (2, 3, 4, 5)" in found["error"][0]
    assert all(error.startswith("no path and no pixels: ndarray") for error in found["error"][1:])


def test_probabilities_of_pixels_are_those_of_a_segmenter(runs, tmp_path):
    classifier = untrained_run(tmp_path / "classifier", "digits-classify")
    with pytest.raises(InputError, match=r"probabilities are of pixels, and .* of the task classify, labels images"):
        fitformer.Predictor(classifier, probabilities=True)
    denoiser = untrained_run(tmp_path / "denoiser", "digits-diffuse")
    with pytest.raises(InputError, match="a run of the task diffuse"):
        fitformer.Predictor(denoiser)


@pytest.mark.parametrize(
    ("name", "sizes"), [pytest.param("any", (3, 45, 33), marks=pytest.mark.slow), ("one", (2, 32, 24))]
)
def test_an_exported_run_gives_the_logits_of_every_pixel(runs, tmp_path, name, sizes):
    _, made, _ = runs
    assert main(["export", made[name], "--output", str(tmp_path / "model.pt2")]) == 0
    files = {"fitformer.json": ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=files).module()
    about = json.loads(files["fitformer.json"])
    assert about["task"] == "segment"
    assert about["outputs"]["logits"]["shape"][:2] == ["batch", len(about["classes"])]
    images = torch.randn(*sizes, about["inputs"]["images"]["shape"][-1])
    with torch.no_grad():
        found, model = program(images=images), fitformer.from_pretrained(made[name])
        wanted = torch.stack([*model(images if name == "one" else list(images))])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
