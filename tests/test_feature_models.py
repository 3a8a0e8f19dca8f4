"""Models of slides of features: absent patches count nowhere, and a run is trained, measured and explained."""

import csv
import json

import numpy as np
import pytest
import tifffile
import torch
import yaml
from torch.utils.data import DataLoader

from fitformer import FITImageEncoder
from fitformer.cli import main
from fitformer.config import load as config
from fitformer.data import build_dataset
from fitformer.data.dihedral import TransformedImage
from fitformer.data.foreground import foreground_groups
from fitformer.data.grouping import Grouping
from fitformer.data.readers import LazyImage, open_image
from fitformer.data.readers.features import PatchLevel, Rows
from fitformer.data.settings import ImageData
from fitformer.data.symmetry import DIHEDRAL
from fitformer.errors import EmptyImageError, InputError
from fitformer.execution import Streamed
from fitformer.patching import PatchGrid
from fitformer.patching.any_size import GroupedImage, PixelArray
from fitformer.tasks import build_model
from fitformer.training.memory_check import fit_to_memory
from helpers import slide_of_features, write_features

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH, GROUP = 5, 4


class Sparse(PixelArray):
    """An image in memory that has pixels in some places only."""

    def __init__(self, pixels, there):
        super().__init__(pixels)
        self.presence = PixelArray(there[..., None])


def network(layers="(1)1(1)1", patch_size=1, **options):
    torch.manual_seed(0)
    return FITImageEncoder.from_preset(
        "tiny", layers=layers, image_size=None, group_size=GROUP, patch_size=patch_size, channels=WIDTH, num_classes=3,
        latent_position="row_column", **options,
    ).double()  # fmt: skip


def sparse(seed=0, rows=11, columns=9, share=0.4):
    random = np.random.default_rng(seed)
    there = random.random((rows, columns)) < share
    there[GROUP : 2 * GROUP, :GROUP] = False
    there[0, 0] = True
    return random.normal(size=(rows, columns, WIDTH)), there


def answers(model, image):
    """Logits of an image, and the gradients of a loss."""
    model.zero_grad()
    logits = model([image])
    logits.square().sum().backward()
    return logits.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def equal(one, other):
    return torch.equal(one[0], other[0]) and all(map(torch.equal, one[1], other[1]))


@pytest.mark.parametrize("layers", ["(1)1(1)1", "(2)", "(1)1(1)"])
@pytest.mark.parametrize(("patch_size", "execution"), [(1, None), (2, None), (1, Streamed(slice_groups=2))])
def test_numbers_of_absent_patches_change_nothing(layers, patch_size, execution):
    model = network(layers, patch_size)
    if execution is not None:
        model.set_execution(execution)
    pixels, there = sparse()
    found = answers(model, Sparse(pixels, there))
    for other in (0.0, 1e6, np.nan):
        assert equal(answers(model, Sparse(np.where(there[..., None], pixels, other), there)), found)
    # Those of the others do.
    assert not equal(answers(model, Sparse(np.where(there[..., None], 1.5 * pixels, 0), there)), found)


def test_a_mean_is_over_the_patches_that_are_there():
    model = network("(2)")
    pixels, there = sparse(rows=6, columns=4)
    grouped = GroupedImage(Sparse(pixels, there), model.patch_grid)
    tokens, mask = grouped.read(slice(None))
    assert grouped.count() == int(mask.sum()) == int(there.sum())
    x, _ = model.encoder(tokens, mask=mask, coords=grouped.coords)
    torch.testing.assert_close(model([grouped])[0], model.head(x[mask].mean(0)))


def test_groups_without_patches_are_absent():
    model = network()
    pixels, there = sparse()
    grouped = model.grouped(Sparse(pixels, there))
    assert grouped.grid == (3, 3)
    held = [there[r : r + GROUP, c : c + GROUP].any() for r in range(0, 11, GROUP) for c in range(0, 9, GROUP)]
    assert not all(held)
    assert grouped.num_groups == sum(held)
    with pytest.raises(EmptyImageError, match="none is occupied"):
        model.grouped(Sparse(pixels, np.zeros_like(there)))


@pytest.mark.parametrize("glimpses", [0, 2])
@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", ["a.h5", "a.zarr"])
def test_groups_read_together_are_those_read_one_by_one(name, dtype, patch_size, glimpses, tmp_path):
    _, features, coords = slide_of_features(11, 9, WIDTH, 0.4, dtype=dtype)
    grid = PatchGrid(None, GROUP, patch_size, WIDTH)
    options = {"chunks": (7, WIDTH)} if name == "a.zarr" else {}
    with open_image(write_features(tmp_path / name, features, coords, **options)) as image:
        for symmetry in DIHEDRAL:
            turned = TransformedImage(image, symmetry)
            grouped = GroupedImage(turned, grid, glimpses=glimpses)
            rows, columns, _ = turned.shape
            pixels = turned.window(0, 0, rows, columns)
            apart = Sparse(pixels, np.isfinite(pixels[..., 0]))
            apart.thumbnail, apart.nodata = turned.thumbnail, turned.nodata
            wanted = GroupedImage(apart, grid, glimpses=glimpses)
            for groups in (slice(None), slice(1, 4), slice(3, 99)):
                (tokens, mask), (others, other_mask) = grouped.read(groups), wanted.read(groups)
                whole = torch.ones(tokens.shape[:3], dtype=torch.bool)
                mask, other_mask = (whole if each is None else each for each in (mask, other_mask))
                assert torch.equal(mask, other_mask)
                # Nothing attends to what lies beyond the edge.
                assert torch.equal(tokens[mask], others[mask])


def test_a_slide_is_read_in_the_order_of_its_file(tmp_path, monkeypatch):
    _, features, coords = slide_of_features(40, 40, WIDTH, 0.5)
    read, real = [], Rows.window
    monkeypatch.setattr(Rows, "window", lambda rows, *where: (read.append(where[2]), real(rows, *where))[1])
    with open_image(write_features(tmp_path / "a.h5", features, coords)) as image:
        GroupedImage(image, PatchGrid(None, GROUP, 1, WIDTH)).read(slice(None))
    assert read == [len(features)]


def test_maps_are_of_the_patches_that_are_there():
    model = network()
    pixels, there = sparse()
    (found,) = model.forward_features([Sparse(pixels, there)])
    np.testing.assert_array_equal((found != 0).any(0).numpy(), there)


@pytest.mark.parametrize("size", [(11, 9), (3, 2), (30, 25)])
def test_a_glimpse_shows_where_patches_are(size):
    model = network(glimpses=1)
    pixels, there = sparse(rows=size[0], columns=size[1], share=0.05)
    grouped = model.grouped(Sparse(pixels, there))
    # Cells of the glimpse, and the pixels under each.
    share = [(k * side // GROUP, -(-(k + 1) * side // GROUP)) for side in size for k in range(GROUP)]
    expected = [[there[slice(*r), slice(*c)].any() for c in share[GROUP:]] for r in share[:GROUP]]
    mask = grouped.mask(slice(None))
    np.testing.assert_array_equal(mask[0, 0].reshape(GROUP, GROUP).numpy(), expected)
    assert int(mask[0, 1:].sum()) == int(there.sum())


def test_a_turned_slide_is_the_slide_turned(tmp_path):
    picture, features, coords = slide_of_features()
    model, image = network(), open_image(write_features(tmp_path / "a.h5", features, coords))
    for symmetry in DIHEDRAL:
        turned = np.ascontiguousarray(symmetry.turn(picture))
        there = np.isfinite(turned[..., 0])
        expected = answers(model, Sparse(np.nan_to_num(turned), there))
        assert equal(answers(model, TransformedImage(image, symmetry)), expected)


def test_the_order_of_a_file_changes_nothing(tmp_path):
    _, features, coords = slide_of_features(rows=11, columns=9)
    model = network()
    found = answers(model, open_image(write_features(tmp_path / "a.h5", features, coords)))
    order = np.random.default_rng(1).permutation(len(features))
    again = write_features(tmp_path / "b.zarr", features[order], coords[order], chunks=(7, WIDTH))
    assert equal(answers(model, open_image(again)), found)


def test_where_patches_are_is_known_without_their_features(tmp_path, monkeypatch):
    picture, features, coords = slide_of_features(share=0.2)
    image = open_image(write_features(tmp_path / "a.h5", features, coords))
    monkeypatch.setattr(PatchLevel, "window", None)
    grouped = Grouping(PatchGrid(None, GROUP, 1, WIDTH), settings=ImageData(image_size=None))(image)
    there = np.isfinite(picture[..., 0])
    padded = np.pad(there, ((0, -9 % GROUP), (0, 0)))
    expected = padded.reshape(3, GROUP, 3, GROUP).any(axis=(1, 3))
    assert grouped.num_groups == expected.sum() < 9
    np.testing.assert_array_equal(foreground_groups(image, GROUP), expected)
    assert grouped.count() == len(features)


def test_features_of_another_width_than_the_models_are_refused(tmp_path):
    _, features, coords = slide_of_features(width=7)
    path = write_features(tmp_path / "a.h5", features, coords)
    with pytest.raises(InputError, match=r"a\.h5 has 7 channels, the model was built for 5"):
        network()([open_image(path)])


# From here on through the command line.
ROWS, COLUMNS, STEP, CORNER = 7, 10, 448, (4480, 8960)
TISSUE, MARK = (1, 0, 0, -1, 0), (-1, 2, 0, 0, 1)


def draw(path, seed, marked):
    """A slide of which half is tissue; a marked one has a patch of another kind, whose place is given."""
    random = np.random.default_rng(seed)
    _, features, coords = slide_of_features(ROWS, COLUMNS, WIDTH, 0.5, STEP, CORNER, seed)
    patch = int(random.integers(len(features)))
    features = (np.array(TISSUE) + 0.2 * features).astype("float32")
    if marked:
        features[patch] = MARK
    write_features(path, features, coords, {"patch_size_level0": STEP})
    return coords[patch]


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    root, places = tmp_path_factory.mktemp("slides"), {}
    for part, count in (("train", 8), ("test", 3)):
        for name in ("plain", "marked"):
            (root / part / name).mkdir(parents=True)
            for k in range(count):
                seed = 1000 * (part == "test") + 100 * (name == "marked") + k
                suffix = "zarr" if k == 1 else "h5"
                places[part, name, k] = draw(root / part / name / f"{k}.{suffix}", seed, name == "marked")
    return root, places


def recipe_of(slides):
    return {
        "task": "classify",
        "model": {"group_size": 4, "patch_size": 1, "latent_position": "row_column", "layers": "(1)1", "dim": 16,
                  "latent_dim": 16, "heads": 2, "latent_heads": 2, "latents_per_group": 2},
        "data": {"source": "folder", "path": str(slides), "image_size": None, "validation": 0},
        "optimizer": {"warmup_steps": 5, "lr": 1e-2},
        "trainer": {"steps": 30, "batch_size": 4, "validate_every": 30, "checkpoint_every": 30, "accelerator": "cpu"},
    }  # fmt: skip


@pytest.fixture(scope="module")
def run_folder(slides, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    (folder / "slides.yaml").write_text(yaml.safe_dump(recipe_of(slides[0])))
    assert main(["train", str(folder / "slides.yaml"), "--run-dir", str(folder / "run")]) == 0
    return folder / "run"


def test_a_run_of_slides_is_evaluated_and_predicts(run_folder, slides, capsys):
    assert main(["evaluate", str(run_folder)]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert main(["predict", str(run_folder), str(slides[0] / "test")]) == 0
    lines = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert len(lines) == 6
    assert all(line["label"] in line["file"] for line in lines)


def test_leaving_out_finds_a_planted_patch_in_pixels_of_the_slide(run_folder, slides, tmp_path):
    root, places = slides
    words = [
        "predict",
        str(run_folder),
        str(root / "test" / "marked"),
        "--output",
        str(tmp_path),
        "--explain",
        "leave-out",
    ]
    assert main(words) == 0
    for k, suffix in enumerate(("h5", "zarr", "h5")):
        name, (x, y) = f"{k}.{suffix}", places["test", "marked", k]
        features = json.loads((tmp_path / f"{name}.geojson").read_text())["features"]
        whole, *tiles = ((np.array(each["geometry"]["coordinates"][0]), each) for each in features)
        np.testing.assert_array_equal(whole[0].min(0), CORNER)
        np.testing.assert_array_equal(whole[0].max(0), np.add(CORNER, (COLUMNS * STEP, ROWS * STEP)))
        ring, _ = max(tiles, key=lambda tile: tile[1]["properties"]["measurements"]["leave-out"])
        # The whole patch lies in its group.
        assert (ring.min(0) <= (x, y)).all()
        assert (ring.max(0) >= (x + STEP, y + STEP)).all()
        with tifffile.TiffFile(tmp_path / f"{name}.leave-out.tif") as file:
            scale, tie = (file.pages[0].tags[tag].value for tag in (33550, 33922))
            cells = file.asarray()
        assert (scale[:2], tie[3:5]) == ((STEP, STEP), (CORNER[0], -CORNER[1]))
        assert cells.shape == (ROWS, COLUMNS)
        # Absent patches have no value.
        with open_image(root / "test" / "marked" / name) as image:
            np.testing.assert_array_equal(np.isfinite(cells), image.presence.window(0, 0, ROWS, COLUMNS)[..., 0])
        record = json.loads((tmp_path / f"{name}.json").read_text())
        assert record["placement"] == {"top": CORNER[1], "left": CORNER[0], "step": STEP}


def test_slides_that_cannot_be_read_are_told_apart(run_folder, slides, tmp_path, capsys):
    folder = tmp_path / "slides"
    folder.mkdir()
    draw(folder / "whole.h5", 0, True)
    _, features, coords = slide_of_features(width=WIDTH)
    write_features(folder / "empty.h5", features[:0], coords[:0])
    write_features(folder / "wide.h5", np.repeat(features, 2, axis=1), coords)
    features[3] = np.nan
    write_features(folder / "nan.h5", features, coords)
    write_features(folder / "cut.h5", features, coords)
    (folder / "cut.h5").write_bytes((folder / "cut.h5").read_bytes()[:3000])
    (folder / "tensor.pt").write_bytes(b"")
    assert main(["predict", str(run_folder), str(folder), "--output", str(tmp_path / "seen"), "--explain", "none"]) == 0
    capsys.readouterr()
    with open(tmp_path / "seen" / "broken.csv", newline="") as file:
        found = {line[0].rpartition("/")[2]: line[1:] for line in csv.reader(file)}
    expected = {"empty": ("blank", "no patches"), "wide": ("unreadable", "10 channels, the model was built for 5"),
                "nan": ("unreadable", "patch 3 "), "cut": ("unreadable", "truncated")}  # fmt: skip
    for name, (kind, reason) in expected.items():
        assert found[f"{name}.h5"][0] == kind
        assert reason in found[f"{name}.h5"][1]
    # Beside such files it is no image.
    assert "tensor.pt" not in found


def test_slides_of_two_encoders_are_not_mixed(slides, tmp_path, capsys):
    for name, width in (("plain", 4), ("marked", 6)):
        (tmp_path / "slides" / name).mkdir(parents=True)
        for k in range(4):
            _, features, coords = slide_of_features(width=width, seed=width + k)
            write_features(tmp_path / "slides" / name / f"{k}.h5", features, coords)
    (tmp_path / "slides.yaml").write_text(yaml.safe_dump(recipe_of(tmp_path / "slides")))
    assert main(["train", str(tmp_path / "slides.yaml"), "--run-dir", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "mixed channel counts" in line
    assert line.endswith("extract the features of all slides with one encoder")


def test_a_table_says_the_labels_of_slides(slides, tmp_path):
    table = tmp_path / "slides.csv"
    files = sorted(path for path in (slides[0] / "train").rglob("*") if path.suffix in (".h5", ".zarr"))
    table.write_text("path,label\n" + "".join(f"{file},{file.parent.name}\n" for file in files))
    dataset = build_dataset(ImageData(source="manifest", path=str(table), image_size=None, validation=0), "train")
    assert (dataset.channels, dataset.classes) == (WIDTH, ("marked", "plain"))


def test_only_groups_with_patches_are_counted_as_memory(tmp_path, monkeypatch):
    places = np.array([(0, 0), (0, 1), (1500, 1200), (1501, 1200)])
    features = np.ones((4, WIDTH), dtype="float32")
    for name in ("plain", "marked"):
        (tmp_path / "slides" / name).mkdir(parents=True)
        for k in range(5):
            write_features(tmp_path / "slides" / name / f"{k}.h5", features + k + 10 * len(name), places * STEP)
    (tmp_path / "slides.yaml").write_text(yaml.safe_dump(recipe_of(tmp_path / "slides")))
    loaded = config.load(str(tmp_path / "slides.yaml"), ["--trainer.memory=1GB", "--trainer.accelerator=cpu"])
    dataset = build_dataset(loaded.data, "train")
    assert dataset.source[0][0].shape[:2] == (1201, 1502)
    network = build_model(loaded, dataset)
    assert fit_to_memory(loaded, network, dataset).memory == "1GB"
    # All 113,000 groups of the grid would be too many.
    monkeypatch.setattr(LazyImage, "presence", None)
    with pytest.raises(InputError, match="a training step needs"):
        fit_to_memory(loaded, network, dataset)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_read_the_same_slides(slides):
    settings = ImageData(source="folder", path=str(slides[0]), image_size=None, validation=0)
    dataset = build_dataset(settings, "train")
    dataset.group_for(PatchGrid(None, GROUP, 1, WIDTH), 1, settings)
    batches = []
    for workers in (0, 2):
        loader = DataLoader(dataset, batch_size=4, num_workers=workers, collate_fn=dataset.collate)
        batches.append([image.read(slice(None)) for batch in loader for image in batch["image"]])
    assert all(map(torch.equal, sum(batches[0], ()), sum(batches[1], ())))


def test_a_folder_of_slides_is_told_how_to_be_read(slides):
    with pytest.raises(InputError, match=r"no images.*\.(h5|zarr) is read with data\.image_size: null"):
        build_dataset(ImageData(source="folder", path=str(slides[0] / "train" / "plain")), "train")
