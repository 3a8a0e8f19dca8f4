"""Tables that say numbers in place of classes, and which images are of one patient."""

import numpy as np
import pytest
import torch
from PIL import Image

from fitformer import FITImageEncoder
from fitformer.data import build_dataset
from fitformer.data.grouping import Grouping
from fitformer.data.readers import open_image
from fitformer.data.settings import ImageData, MultilabelData, RegressData, SurvivalData
from fitformer.errors import EmptyImageError, InputError
from fitformer.execution import Streamed
from fitformer.inference.explain import HeatMap, explain
from fitformer.patching import PatchGrid
from fitformer.patching.any_size import PixelArray
from fitformer.patching.joined_images import JoinedImages
from helpers import slide_of_features, write_features

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH, GROUP = 5, 4


@pytest.fixture
def pictures(tmp_path):
    random = np.random.default_rng(0)
    for k in range(12):
        Image.fromarray(random.integers(0, 256, (8, 8), dtype=np.uint8)).save(tmp_path / f"{k}.png")
    return tmp_path


def table(folder, head, rows):
    path = folder / "table.csv"
    path.write_text("\n".join([f"path,{head}", *(f"{k}.png,{row}" for k, row in enumerate(rows))]) + "\n")
    return {"path": str(path), "image_size": 8, "holdout": 0.25, "validation": 0.0}


def test_numbers_of_several_columns_reach_the_batch(pictures):
    rows = [f"{k},{-k / 4},x" for k in range(12)]
    settings = RegressData(targets=("age", "bmi"), **table(pictures, "age,bmi,site", rows))
    parts = {split: build_dataset(settings, split) for split in ("train", "test")}
    assert [len(part) for part in parts.values()] == [9, 3]
    for part in parts.values():
        for index in range(len(part)):
            item = part[index]
            k = int(part.source.name(index).rpartition("/")[2].split(".")[0])
            assert item["label"].dtype == torch.float32
            assert item["label"].tolist() == [k, -k / 4]
    assert parts["train"].describe().endswith("12 images, 8 x 8 x 1, age, bmi (to train on)".replace("12", "9"))
    one = RegressData(targets="bmi", **table(pictures, "age,bmi,site", rows))
    assert build_dataset(one, "test").source.labels.shape == (3, 1)


def test_a_held_out_part_has_its_share_of_events_and_of_rare_labels(pictures):
    rows = [f"{k + 1},{int(k < 4)}" for k in range(12)]
    settings = SurvivalData(**table(pictures, "time,event", rows))
    for seed in range(5):
        part = build_dataset(SurvivalData(**{**vars(settings), "split_seed": seed}), "test")
        assert part.source.labels[:, 1].sum() == 1
    rows = [f"{int(k < 4)},{int(k > 1)}" for k in range(12)]
    labels = MultilabelData(targets=("rare", "common"), **table(pictures, "rare,common", rows))
    for seed in range(5):
        part = build_dataset(MultilabelData(**{**vars(labels), "split_seed": seed}), "test")
        assert part.source.labels[:, 0].sum() == 1


def test_parquet_booleans_are_0_and_1(pictures):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {"path": [f"{k}.png" for k in range(12)], "time": np.arange(12.0), "event": np.arange(12) % 2 == 0}
    parquet.write_table(arrow.table(columns), pictures / "t.parquet")
    settings = SurvivalData(path=str(pictures / "t.parquet"), image_size=8, validation=0)
    labels = np.concatenate([build_dataset(settings, split).source.labels for split in ("train", "test")])
    assert sorted(map(tuple, labels)) == [(k, (k + 1) % 2) for k in range(12)]


ELEVEN = ["1,0"] * 11
BAD = {
    "column": ("time,evnt", ["1,1"] * 12, r"no column 'event'.*did you mean 'evnt'.*\(it has path, time, evnt\)"),
    "word": ("time,event", [*ELEVEN, "x,1"], r"row 13: 'time' is 'x', which is no number"),
    "empty": ("time,event", [*ELEVEN, "1,"], r"row 13: 'event' is empty"),
    "nan": ("time,event", ["nan,1", *ELEVEN], r"row 2: 'time' is 'nan', no finite number"),
    "event": ("time,event", [*ELEVEN, "1,2"], r"row 13: 'event' is 2; it must be 0 or 1"),
    "negative": ("time,event", [*ELEVEN, "-3,1"], r"row 13: 'time' is -3; it must be a time of at least 0"),
    "none": ("time,event", [*ELEVEN, "1,0"], r"no event: 'event' is 0 in all 12 rows"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_table_with_a_fault_is_one_error_that_names_the_row(pictures, fault):
    head, rows, message = BAD[fault]
    with pytest.raises(InputError, match=message):
        build_dataset(SurvivalData(**table(pictures, head, rows)), "train")


def test_settings_that_make_no_sense_are_refused(pictures):
    settings = table(pictures, "age", range(12))
    for wrong, message in (
        (RegressData(**settings), "targets is empty"),
        (RegressData(targets=("age", "age"), **settings), "twice: age, age"),
        (RegressData(targets=("age",), sampling="balanced", **settings), "balanced, of classes; age"),
        (RegressData(source="digits", targets=("age",)), "age are columns of a table.*not digits"),
        (ImageData(source="digits", patient="who"), "patient, who, is a column of a table"),
        (MultilabelData(targets=("age",), **settings), "row 4: 'age' is 2; it must be 0 or 1"),
        (RegressData(targets=("age",), patient="age", **settings), "for images of any size"),
    ):
        with pytest.raises(InputError, match=message):
            build_dataset(wrong, "train")
    with pytest.warns(UserWarning, match=r"age are learned, not classes: data\.classes is ignored"):
        build_dataset(RegressData(targets=("age",), classes=("a",), **settings), "train")


# From here on, patients.
@pytest.fixture
def slides(tmp_path):
    for k in range(10):
        _, features, coords = slide_of_features(5 + k % 3, 6 + k % 4, WIDTH, seed=k)
        write_features(tmp_path / f"{k}.h5", features, coords)
    return tmp_path


def patients(folder, rows, head="path,label,patient", **settings):
    (folder / "table.csv").write_text("\n".join([head, *rows]) + "\n")
    path = str(folder / "table.csv")
    return ImageData(
        source="manifest", path=path, patient="patient", image_size=None, validation=0, holdout=0.4, **settings
    )


ROWS = [f"{k}.h5,{'ab'[k // 2 % 2]},P{k // 2}" for k in range(10)]


def test_all_slides_of_a_patient_are_one_example_of_one_part(slides):
    settings, found = patients(slides, ROWS, augmentation="dihedral"), []
    for split in ("train", "test"):
        part = build_dataset(settings, split)
        for index in range(len(part)):
            images = part[index]["image"]
            numbers = {int(each.path.rpartition("/")[2].split(".")[0]) for each in images}
            (patient,) = {k // 2 for k in numbers}
            assert len(numbers) == 2
            assert part.classes[part[index]["label"]] == "ab"[patient % 2]
            found.append(patient)
    assert sorted(found) == [0, 1, 2, 3, 4]
    assert "3 patients, 6 images" in build_dataset(settings, "train").describe()


@pytest.mark.parametrize(
    ("rows", "head", "message"),
    [
        ([*ROWS, "x.h5,b,P0"], "path,label,patient", r"'P0' are labelled a and b"),
        ([f"{row},{'train' if k else 'test'}" for k, row in enumerate(ROWS)], "path,label,patient,split",
         r"'P0' stands in the part 'test' and in 'train'"),
        ([*ROWS[:-1], "9.h5,a,"], "path,label,patient", r"1 of 10 rows have nothing in the column 'patient'"),
        ([*ROWS, "9.h5,a,P4"], "path,label,patient", r"lists .*9\.h5 twice, of the patient 'P4'"),
        ([*ROWS, "9.h5,a,P0"], "path,label,patient", r"9\.h5 of the patients 'P4' and 'P0'"),
        (ROWS, "path,label,who", r"no column 'patient'"),
    ],
)  # fmt: skip
def test_patients_that_contradict_themselves_are_one_error(slides, rows, head, message):
    with pytest.raises(InputError, match=message):
        build_dataset(patients(slides, rows, head), "train")


def test_a_patient_with_an_empty_slide_is_the_patient_without_it(slides):
    _, features, coords = slide_of_features(width=WIDTH)
    write_features(slides / "1.h5", features[:0], coords[:0])
    source = build_dataset(patients(slides, ROWS), "train").source.whole
    assert len(source[0][0]) == 1
    assert len(source[1][0]) == 2


def network(layers="(1)1(1)1", **options):
    torch.manual_seed(0)
    return FITImageEncoder.from_preset(
        "tiny", layers=layers, image_size=None, group_size=GROUP, patch_size=1, channels=WIDTH, num_classes=3,
        latent_position="row_column", **options,
    ).double()  # fmt: skip


class Sparse(PixelArray):
    """An image in memory that has pixels in some places only."""

    def __init__(self, pixels, there):
        super().__init__(pixels)
        self.presence = PixelArray(there[..., None])


def answers(model, image):
    model.zero_grad()
    logits = model([image])
    logits.square().sum().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize(("layers", "execution"), [("(2)", "plain"), ("(1)1(1)1", Streamed(slice_groups=2))])
def test_a_patient_is_its_slides_laid_on_one_grid(slides, layers, execution):
    """The same numbers as of one picture that holds them, absent between, each beginning at a group's border."""
    model = network(layers)
    model.set_execution(execution)
    images = [open_image(slides / f"{k}.h5") for k in range(3)]
    sides = [-(-each.shape[1] // GROUP) * GROUP for each in images]
    picture = np.full((8, sum(sides), WIDTH), np.nan, "float32")
    for k, each in enumerate(images):
        rows, columns, _ = each.shape
        left = sum(sides[:k])
        picture[:rows, left : left + columns] = each.window(0, 0, rows, columns)
    whole = Sparse(np.nan_to_num(picture), np.isfinite(picture[..., 0]))
    # The groups stand in another order, which changes rounding alone.
    for one, other in zip(answers(model, tuple(images)), answers(model, whole), strict=True):
        torch.testing.assert_close(one, other)
    joined = model.grouped(images)
    assert joined.num_groups == sum(model.grouped(each).num_groups for each in images)
    assert joined.count() == np.isfinite(picture[..., 0]).sum()
    values = torch.arange(joined.num_groups * GROUP**2).view(joined.num_groups, -1, 1).double()
    laid, parts = joined.map(values, float("nan")), joined.split(values)
    for k, (each, part) in enumerate(zip(images, parts, strict=True)):
        (rows, columns, _), left = each.shape, sum(sides[:k])
        torch.testing.assert_close(
            laid[:, :rows, left : left + columns], model.grouped(each).map(part, float("nan")), equal_nan=True
        )


def test_a_map_of_each_slide_of_a_patient_lies_over_it(slides):
    model, images = network().eval(), [open_image(slides / f"{k}.h5") for k in range(2)]
    found = explain(model, images, "leave-out")
    with pytest.raises(InputError, match="over one image, and these are 2"):
        HeatMap.of(found.maps["leave-out"], found.image)
    for image, part, values in zip(images, found.image.parts, found.image.split(found.maps["leave-out"]), strict=True):
        there = image.presence.window(0, 0, *image.shape[:2])[..., 0]
        np.testing.assert_array_equal(np.isfinite(HeatMap.of(values, part).cells), there)


def test_a_patient_of_one_slide_is_the_slide(slides):
    model, image = network(glimpses=1), open_image(slides / "0.h5")
    assert torch.equal(model([(image,)]), model([image]))


def test_glimpses_of_all_slides_stand_in_front(slides):
    model, images = network(glimpses=2), [open_image(slides / f"{k}.h5") for k in range(2)]
    joined = model.grouped(images)
    assert joined.glimpses == 4
    assert joined.coords[:4].tolist() == [[-1, 0], [-1, 1]] * 2
    assert (joined.coords[4:] >= 0).all()
    read = joined.read(slice(None))[0]
    for k, part in enumerate(map(model.grouped, images)):
        assert torch.equal(joined.split(read[0])[k], part.read(slice(None))[0][0])
    assert torch.equal(torch.cat([joined.read(slice(k, k + 3))[0] for k in range(0, joined.num_groups, 3)], 1), read)


def test_slides_without_foreground_are_left_out_of_a_patient():
    grouping = Grouping(PatchGrid(None, 4, 2, 1), settings=ImageData(image_size=None, background=0.0))
    blank, one = (PixelArray(np.full((8, 8, 1), value, np.uint8)) for value in (0, 255))
    assert grouping((blank, one)).num_groups == 4
    with pytest.raises(EmptyImageError):
        grouping((blank, blank))


def test_images_that_do_not_go_together_are_refused():
    grid = PatchGrid(None, 4, 2, 1)
    grey, floats = (PixelArray(np.zeros((8, 8, 1), dtype)) for dtype in (np.uint8, np.float32))
    with pytest.raises(InputError, match="hold uint8 and float32"):
        JoinedImages([Grouping(grid)(grey), Grouping(grid)(floats)])
    with pytest.raises(InputError, match="cut as"):
        JoinedImages([Grouping(grid)(grey), Grouping(PatchGrid(None, 8, 2, 1))(grey)])
    with pytest.raises(InputError, match="no images"):
        JoinedImages([])
