"""Segmentation: exact in slices, images and masks moved together, metrics that others agree with, clear errors."""

import json
from dataclasses import replace
from math import prod
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
import torch.nn.functional as F
from PIL import Image

pytest.importorskip("lightning", reason="needs the extra train")

from sklearn.metrics import confusion_matrix, jaccard_score

import fitformer
from fitformer import data
from fitformer.cli import main
from fitformer.config import load as config
from fitformer.config.objectives import SegmentObjective
from fitformer.data.datasets.images import AUGMENTATIONS
from fitformer.data.labels import UNLABELLED, Coding, LabelImage
from fitformer.data.settings import SegmentData
from fitformer.errors import InputError
from fitformer.execution import Streamed, checkpointed, plain
from fitformer.models.image_encoder import FITImageEncoder
from fitformer.models.image_segmenter import FITImageSegmenter
from fitformer.patching.any_size import GroupedImage, PixelArray
from fitformer.profiling import StepConfig, flops, memory, parts
from fitformer.tasks import segment
from fitformer.tasks._boundaries import TOLERANCE, boundary_counts
from fitformer.tasks._pixel_sums import confusions, loss_sums, losses, measures
from small_models import DROPS, check_equal

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"latents_per_group": 2, "dim": 8, "latent_dim": 12, "heads": 2, "latent_heads": 3, "layers": "(1)2(1)"}
CUT = {"group_size": (16, 8), "patch_size": (4, 2), "num_classes": 3}
COLOURS = ((10, 20, 30), (200, 100, 0), (0, 0, 255))


def model(image_size=None, **options):
    torch.manual_seed(0)
    latent_position = "row_column" if image_size is None else "learned"
    return FITImageSegmenter.from_config(
        {**SIZES, **CUT, "image_size": image_size, "latent_position": latent_position, **options}
    )


def scene(seed, rows=37, columns=29):
    """An image whose colours tell the class of each pixel, and the classes."""
    classes = np.random.default_rng(seed).integers(0, 3, (-(-rows // 6), -(-columns // 6))).astype(np.uint8)
    classes = classes.repeat(6, 0).repeat(6, 1)[:rows, :columns]
    return np.array(COLOURS, np.uint8)[classes], classes


# The model.


def summed(network, images, labels, way):
    """Sums of the loss of each of some images with as many groups, and gradients, in a way to run."""
    network.set_execution(way)
    network.zero_grad()
    torch.manual_seed(3)

    def score(groups, logits, mask):
        read = [image.beside(true, groups, UNLABELLED) for image, true in zip(images, labels, strict=True)]
        return loss_sums(logits, torch.from_numpy(np.stack(read)))

    sums = network.score(images, score)
    cross, dice, _ = losses(sums)
    (cross + dice).backward()
    return [sums.detach()], gradients(network)


def gradients(network):
    return {name: None if p.grad is None else p.grad.clone() for name, p in network.named_parameters()}


def lost(network, images, labels, way, weights="none"):
    """The task's loss of a batch of images of any size with what it logs, and gradients, in a way to run."""
    network.set_execution(way)
    network.zero_grad()
    torch.manual_seed(3)
    settings = SimpleNamespace(objective=SegmentObjective(class_weights=weights))
    value, logged = segment.loss(network, {"image": images, "labels": labels}, settings)
    value.backward()
    return [value.detach(), *logged.values()], gradients(network)


def scenes_of(network, *scenes):
    """Images as a network cuts them, and their labels."""
    images = [network.grouped(PixelArray(image)) for image, _ in scenes]
    return images, [PixelArray(classes[..., None]) for _, classes in scenes]


WAYS = [(checkpointed, 4), (Streamed(2), 0), (Streamed(1), 4), (Streamed(4, keep="disk", recompute="selective"), 4)]


@pytest.mark.parametrize(("way", "refinement"), WAYS, ids=str)
def test_the_loss_of_slices_is_that_of_the_plain_run_and_so_are_gradients(way, refinement):
    network = model(refinement=refinement, glimpses=1, **DROPS)
    for ragged in (scene(2, 20, 50), scene(2)):
        images, labels = scenes_of(network, scene(0), scene(1), ragged)
        check_equal(lost(network, images, labels, way), lost(network, images, labels, plain))


@pytest.mark.parametrize(("way", "refinement"), [(plain, 4), (plain, 0), *WAYS[1:]], ids=str)
def test_images_of_several_sizes_in_one_row_are_those_one_by_one(way, refinement, monkeypatch):
    network, random = model(refinement=refinement, glimpses=1).double(), np.random.default_rng(0)
    images, labels = scenes_of(network, scene(0), scene(1, 90, 20), scene(2, 5, 7), scene(3, 20, 50))
    # Some groups of the second are skipped, and some pixels of the last have no label.
    kept = random.random(images[1].grid) < 0.5
    images[1] = GroupedImage(images[1].source, network.patch_grid, kept, glimpses=1)
    labels[3].pixels[:9] = UNLABELLED
    weights = (0.5, 1.0, 2.0)
    alone = [lost(network, [image], [true], plain, weights) for image, true in zip(images, labels, strict=True)]
    passes = []
    monkeypatch.setattr(network, "score", lambda *of: passes.append(len(of[0])) or type(network).score(network, *of))
    for first in (None, 1):
        if first:
            monkeypatch.setattr("fitformer.models.image_segmenter._PIECE", first)
        (value, cross, dice, right), found = lost(network, images, labels, way, weights)
        assert passes.pop() == 4
        assert not passes
        for k, mean in enumerate((value, cross, dice)):
            torch.testing.assert_close(mean, torch.stack([one[0][k] for one in alone]).mean())
        known = torch.tensor([int((true.pixels != UNLABELLED).sum()) for true in labels])
        # Of groups that are skipped, nothing is known.
        known[1] = int((images[1].beside(labels[1], slice(None), UNLABELLED) != UNLABELLED).sum())
        torch.testing.assert_close(right, (torch.stack([one[0][3] for one in alone]) * known).sum() / known.sum())
        largest = max(each.abs().max() for each in found.values() if each is not None)
        for name, each in found.items():
            parts = [one[1][name] for one in alone]
            if each is not None:
                torch.testing.assert_close(each, torch.stack(parts).mean(0), rtol=1e-5, atol=1e-6 * largest, msg=name)
    whole, _ = segment.measure(network, {"image": images, "labels": labels}, None)
    each = [segment.measure(network, {"image": [one], "labels": [true]}, None)[0]
            for one, true in zip(images, labels, strict=True)]  # fmt: skip
    for name, value in whole.items():
        torch.testing.assert_close(value, torch.stack([one[name] for one in each]).mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", [plain, Streamed(4)], ids=str)
def test_pixels_are_decoded_in_pieces_which_change_no_loss_and_no_gradient(way, monkeypatch):
    network = model(glimpses=1)
    images, labels = scenes_of(network, scene(0), scene(1))
    assert network.groups_at_once(2) > images[0].num_groups
    whole = summed(network, images, labels, way)
    monkeypatch.setattr("fitformer.models.image_segmenter._PIECE", 3 * 2 * network.head.numbers)
    assert network.groups_at_once(2) == 3
    check_equal(summed(network, images, labels, way), whole)


def test_the_sums_of_slices_are_the_losses_of_whole_logits():
    network = model()
    image, classes = scene(0)
    classes[:5] = UNLABELLED
    (logits,) = network([PixelArray(image)])
    assert logits.shape == (3, 37, 29)
    (sums,), _ = summed(network, [network.grouped(PixelArray(image))], [PixelArray(classes[..., None])], Streamed(2))
    cross, dice, right = losses(sums)
    true = torch.from_numpy(classes).long()
    assert cross.item() == pytest.approx(F.cross_entropy(logits[None], true[None], ignore_index=255).item(), rel=1e-5)
    known = true != 255
    assert right.item() == pytest.approx((logits.argmax(0) == true)[known].double().mean().item())
    shares, own = logits.softmax(0)[:, known], F.one_hot(true[known], 3).T
    by_class = 2 * (shares * own).sum(1) / (shares + own).sum(1)
    assert dice.item() == pytest.approx(1 - by_class.mean().item(), rel=1e-5)


def test_a_group_answers_for_itself_whatever_its_neighbours_pixels_once_latents_are_given():
    """Neither the decoding nor its convolutions reach over the border of a group, so no slice has a seam."""
    head = model().head
    x, patches = torch.randn(1, 3, 16, 8), torch.randn(1, 3, 16, 24)
    whole = head(x, patches)
    assert torch.allclose(whole[:, 1:2], head(x[:, 1:2], patches[:, 1:2]), atol=1e-6)
    # Across the borders of patches they do.
    patches[0, 1, 0] += 1
    changed = (head(x, patches)[0, 1] - whole[0, 1]).abs().sum(0) > 1e-6
    assert changed[:6, :4].all()
    assert not changed[6:].any()


def test_images_of_one_size_are_answered_alike_as_a_batch_and_one_by_one():
    network = model(image_size=(32, 24)).eval()
    pixels = torch.stack([torch.from_numpy(scene(k, 32, 24)[0]) for k in range(3)])
    together = network(pixels.float() / 127.5 - 1)
    assert together.shape == (3, 3, 32, 24)
    for one, alone in zip(together, network(list(pixels)), strict=True):
        assert torch.allclose(one, alone, atol=1e-5)


def test_skipped_groups_have_no_logits_and_do_not_count():
    network = model()
    image, _ = scene(0)
    occupied = np.ones((3, 4), bool)
    occupied[1, 2] = False
    (logits,) = network([GroupedImage(PixelArray(image), network.patch_grid, occupied)])
    assert not logits[:, 16:32, 16:24].any()
    assert logits[:, :16].all()


def test_a_segmenter_is_saved_and_takes_other_classes_and_sizes(tmp_path):
    network = model(image_size=(32, 24)).eval()
    network.save_pretrained(tmp_path)
    again = fitformer.from_pretrained(tmp_path)
    pixels = torch.rand(1, 32, 24, 3)
    assert torch.equal(again(pixels), network(pixels))
    other = FITImageSegmenter.from_pretrained(tmp_path, num_classes=7, image_size=(64, 24))
    assert other(torch.rand(1, 64, 24, 3)).shape == (1, 7, 64, 24)
    assert "head.decode.weight" in other.loading_report.new


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layers": "(1)2"}, "reach no pixel"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"refinement": -1}, "refinement is -1"),
        ({"refinement": "x"}, "refinement is 'x'"),
    ],
)
def test_what_no_segmenter_can_be(options, said):
    with pytest.raises(InputError, match=said):
        model(**options)


def test_the_head_is_in_the_plan():
    network = model(image_size=(32, 24))
    assert flops(network).total == sum(part.flops.total for part in parts(network)) > flops(network.backbone).total
    assert sum(part.parameters for part in parts(network)) == sum(p.numel() for p in network.parameters())
    plain_run, streamed = (memory(network, StepConfig(execution=way)) for way in ("plain", "streamed"))
    assert plain_run.working > memory(network.backbone, StepConfig()).working
    # Logits of a slice, not of all groups.
    sliced = memory(network, StepConfig(execution="streamed", slice_groups=1))
    assert sliced.working < streamed.working


# Metrics.


def test_measures_are_those_of_other_libraries():
    random = np.random.default_rng(0)
    true, guess = random.integers(0, 4, (2, 3, 20, 20))
    true[:, :4] = 255
    known = true != 255
    counts = confusions(torch.from_numpy(guess), torch.from_numpy(true), 4).sum(0)
    assert np.array_equal(counts.numpy(), confusion_matrix(true[known], guess[known]))
    found = dict(measures(counts, torch.zeros(4, 4), "abcd"))
    by_class = jaccard_score(true[known], guess[known], average=None)
    assert list(found["IoU_by_class"].values()) == pytest.approx(by_class)
    assert found["mIoU"] == pytest.approx(by_class.mean())
    assert found["accuracy"] == pytest.approx((true == guess)[known].mean())
    from torchmetrics.functional.segmentation import dice_score

    few = [torch.from_numpy(each[known])[None] for each in (guess, true)]
    dice = dice_score(*few, num_classes=4, average=None, input_format="index")[0]
    assert list(found["dice_by_class"].values()) == pytest.approx(dice.tolist())


def slowly(guess, true, number):
    """Boundary counts of a class, pixel by pixel."""

    def on_boundary(labels):
        places = set()
        for (row, column), label in np.ndenumerate(labels):
            near = [(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)]
            inside = [labels[r, c] for r, c in near if 0 <= r < labels.shape[0] and 0 <= c < labels.shape[1]]
            if label == number and any(other not in (number, 255) for other in inside):
                places.add((row, column))
        return places

    unknown = (guess == 255) | (true == 255)
    drawn, wanted = (on_boundary(np.where(unknown, 255, each)) for each in (guess, true))

    def met(some, others):
        return sum(any(max(abs(r - y), abs(c - x)) <= TOLERANCE for y, x in others) for r, c in some)

    return [met(drawn, wanted), len(drawn), met(wanted, drawn), len(wanted)]


def test_boundaries_are_those_counted_slowly_whatever_the_squares(monkeypatch):
    _, true = scene(0, 41, 33)
    guess = np.roll(scene(0, 41, 33)[1], (5, 2), (0, 1))
    true[3, 4:20] = guess[30, 2:9] = 255

    def windows(labels):
        return lambda top, left, height, width: labels[top : top + height, left : left + width]

    expected = [slowly(guess, true, number) for number in range(3)]
    for side in (1024, 16):
        monkeypatch.setattr("fitformer.tasks._boundaries._SIDE", side)
        assert boundary_counts(windows(guess), windows(true), true.shape, 3).tolist() == expected


# Data.


def write(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(pixels, Image.Image):
        pixels.save(path, **options)
    elif path.suffix == ".tif":
        tifffile.imwrite(path, pixels, **options)
    else:
        Image.fromarray(pixels).save(path, **options)


def folder(root, sizes=((37, 29), (20, 50)), ending=".png", parts=("train", "val", "test")):
    """Images and masks in folders of parts; no image is in two."""
    for number, part in enumerate(parts):
        for k, size in enumerate(sizes):
            image, classes = scene(10 * number + k, *size)
            write(root / "images" / part / f"{k}.png", image)
            write(root / "labels" / part / f"{k}{ending}", classes)
    return SegmentData(path=str(root / "images"), labels=str(root / "labels"), classes=("a", "b", "c"), image_size=None)


def palette(classes):
    found = Image.new("P", classes.shape[::-1])
    found.putdata(classes.ravel().tolist())
    found.putpalette([level for colour in COLOURS for level in colour])
    return found


def test_class_numbers_palettes_and_colours_are_read_alike(tmp_path):
    image, classes = scene(0)
    as_numbers, as_colours = Coding(("a", "b", "c")), Coding(("a", "b", "c"), COLOURS)
    write(tmp_path / "grey.png", classes)
    write(tmp_path / "grey.tif", classes, tile=(16, 16))
    write(tmp_path / "deep.tif", classes.astype(np.int16))
    write(tmp_path / "palette.png", palette(classes))
    write(tmp_path / "few.png", palette(classes), bits=2)
    write(tmp_path / "colours.png", image)
    write(tmp_path / "alpha.png", np.dstack([image, np.full(classes.shape, 255, np.uint8)]))
    cases = [(name, as_numbers) for name in ("grey.png", "grey.tif", "deep.tif", "palette.png", "few.png")]
    for name, coding in [*cases, ("palette.png", as_colours), ("colours.png", as_colours), ("alpha.png", as_colours)]:
        labels = LabelImage(str(tmp_path / name), coding)
        assert labels.shape == (37, 29, 1), name
        assert np.array_equal(labels.window(4, 3, 30, 20)[..., 0], classes[4:34, 3:23]), name


def test_what_is_ignored_has_no_label(tmp_path):
    classes = np.array([[0, 1], [2, 9]], np.uint8)
    write(tmp_path / "numbers.png", classes)
    write(tmp_path / "colours.png", np.array([COLOURS[:2], (COLOURS[2], (1, 1, 1))], np.uint8))
    for name, coding in (
        ("numbers.png", Coding(("a", "b", "c"), ignore_index=9)),
        ("colours.png", Coding(("a", "b", "c"), COLOURS, ignore_colour=(1, 1, 1))),
    ):
        assert LabelImage(str(tmp_path / name), coding).window(0, 0, 2, 2)[..., 0].tolist() == [[0, 1], [2, 255]]
    # A number below the number of classes that means no label, too.
    labels = LabelImage(str(tmp_path / "numbers.png"), Coding(tuple("abcdefghij"), ignore_index=0))
    assert labels.window(0, 0, 2, 2).ravel().tolist() == [255, 1, 2, 9]


def test_grey_of_few_bits_is_taken_as_it_is_stored(tmp_path):
    bits = np.array([[0, 1, 1, 0]] * 2, np.uint8)
    Image.fromarray(bits * 255).convert("1").save(tmp_path / "bits.png")
    tifffile.imwrite(tmp_path / "bits.tif", bits.astype(bool), photometric="minisblack")
    for name in ("bits.png", "bits.tif"):
        assert np.array_equal(LabelImage(str(tmp_path / name), Coding(("a", "b"))).window(0, 0, 2, 4)[..., 0], bits)


MOVES = [*((name, "crop") for name in AUGMENTATIONS), *(("none", way) for way in ("crop", "stretch", "pad"))]


@pytest.mark.parametrize(("augmentation", "resize"), MOVES)
def test_a_mask_moves_as_its_image_does_and_is_never_mixed(tmp_path, augmentation, resize):
    settings = replace(folder(tmp_path), image_size=(24, 40), augmentation=augmentation, resize=resize)
    dataset = data.build_dataset(settings, "train")
    for epoch in range(4):
        item = dataset[(epoch, 1)]
        image, labels = item["image"].numpy(), item["labels"].numpy()
        assert labels.shape == (24, 40)
        assert set(np.unique(labels)) <= {0, 1, 2, UNLABELLED}
        known = labels != UNLABELLED
        assert known.any()
        distance = np.abs(image[:, :, None].astype(int) - np.array(COLOURS)).sum(-1)
        # The edges of the picture are mixed; all else has the colour of its class.
        assert (distance.argmin(-1) == labels)[known].mean() > 0.8
        assert (labels[known] == data.build_dataset(settings, "train")[(epoch, 1)]["labels"].numpy()[known]).all()


@pytest.mark.parametrize("augmentation", ["none", "flip", "dihedral"])
def test_of_any_size_too(tmp_path, augmentation):
    dataset = data.build_dataset(replace(folder(tmp_path), augmentation=augmentation), "train")
    for epoch in range(4):
        item = dataset[(epoch, 0)]
        image, labels = item["image"], item["labels"]
        rows, columns, _ = image.shape
        assert labels.shape == (rows, columns, 1)
        classes = labels.window(0, 0, rows, columns)[..., 0]
        assert np.array_equal(np.array(COLOURS, np.uint8)[classes], image.window(0, 0, rows, columns))


def test_a_manifest_names_masks(tmp_path):
    folder(tmp_path)
    rows = [f"images/{part}/{k}.png,labels/{part}/{k}.png,{part}" for part in ("train", "test") for k in (0, 1)]
    (tmp_path / "table.csv").write_text("\n".join(["image,mask,split", *rows]))
    settings = SegmentData(source="manifest", path=str(tmp_path / "table.csv"), classes=("a", "b", "c"), image_size=24)
    assert len(data.build_dataset(settings, "train")) == 2
    assert data.build_dataset(settings, "test")[0]["labels"].shape == (24, 24)


def test_subfolders_are_no_classes(tmp_path):
    settings = folder(tmp_path)
    for kind in ("images", "labels"):
        for number, city in enumerate(("one", "two")):
            (tmp_path / kind / "train" / city).mkdir()
            (tmp_path / kind / "train" / f"{number}.png").rename(tmp_path / kind / "train" / city / "0.png")
    found = data.build_dataset(settings, "train")
    assert [image.shape[:2] for image in found.label_images()] == [(37, 29), (20, 50)]
    assert found.classes == ("a", "b", "c")


def spoil(root, what):
    """Break a mask of the training part, or what is said of all; returns the settings."""
    settings, mask = folder(root), root / "labels" / "train" / "1.png"
    if what == "size":
        write(mask, np.zeros((20, 49), np.uint8))
    elif what == "class":
        write(mask, np.full((20, 50), 7, np.uint8))
    elif what == "absent":
        mask.unlink()
    elif what == "broken":
        mask.write_bytes(mask.read_bytes()[:40])
    elif what == "channels":
        write(mask, scene(1, 20, 50)[0])
    return settings


def read_all(settings):
    for item in data.build_dataset(settings, "train"):
        labels = item["labels"]
        if settings.image_size is None:
            labels.window(0, 0, *labels.shape[:2])


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("size", r"train/1.png has 20 x 49 pixels and .*train/1.png 20 x 50"),
        ("class", r"train/1.png has the class 7, and there are 3 classes, 0 .. 2"),
        ("absent", r"images/train/1.png needs a mask"),
        ("broken", r"the mask of .*train/1.png cannot be read"),
        ("channels", r"train/1.png has 3 channels, and class numbers have 1.*data.colours"),
    ],
)
@pytest.mark.parametrize("image_size", [None, 32])
def test_a_mask_that_does_not_go_with_its_image_is_one_clear_error(tmp_path, what, said, image_size):
    settings = replace(spoil(tmp_path, what), image_size=image_size)
    with pytest.raises(InputError, match=said) as error:
        read_all(settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"classes": ()}, "data.classes is empty"),
        ({"colours": COLOURS[:2]}, "2 colours and data.classes 3 names"),
        ({"labels": None}, "data.labels is null"),
        ({"labels": "nowhere"}, r"there is no folder nowhere of masks \(data.labels\)"),
        ({"source": "arrays"}, "a folder or a manifest"),
        ({"patient": "name"}, "remove data.patient"),
    ],
)
def test_settings_that_do_not_tell_the_classes(tmp_path, change, said):
    with pytest.raises(InputError, match=said):
        data.build_dataset(replace(folder(tmp_path), **change), "train")


@pytest.mark.parametrize(
    "change",
    [
        {"colours": ((1, 2, 3), (1, 2, 3))},
        {"colours": ((1, 2, 300),)},
        {"colours": ((1, 2, 3),), "ignore_index": 2},
        {"ignore_colour": (1, 2, 3)},
        {"levels": 8},
        {"sampling": "balanced"},
        {"classes": tuple(map(str, range(256)))},
    ],
)
def test_settings_that_contradict_each_other(change):
    with pytest.raises(InputError):
        SegmentData(**change)


# Runs.


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    folder(root, sizes=((37, 29), (20, 50), (33, 33), (16, 16)))
    return root


def recipe(root, *overrides, image_size="[32, 24]"):
    sizes = ", ".join(
        f"{name}: {value}" for name, value in {**SIZES, "group_size": "[16, 8]", "patch_size": "[4, 2]"}.items()
    )
    position = "" if image_size != "null" else ", latent_position: row_column"
    text = f"""
task: segment
model: {{{sizes}{position}}}
data: {{path: {root}/images, labels: {root}/labels, image_size: {image_size}, classes: [a, b, c]}}
optimizer: {{lr: 1.0e-2, warmup_steps: 2}}
trainer: {{steps: 4, batch_size: 2, validate_every: 2, checkpoint_every: 2, keep_best: true, log_every: 1}}
"""
    return config.parse(text, overrides)


@pytest.mark.parametrize("image_size", ["[32, 24]", "null"])
def test_a_run_is_trained_and_measured(scenes, tmp_path, capsys, image_size):
    from fitformer.training.fit import train

    ways = ["--trainer.execution=streamed", "--objective.class_weights=balanced"] if image_size == "null" else []
    assert train(recipe(scenes, *ways, image_size=image_size), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    held_out = [line for line in lines if "val/mIoU" in line]
    assert [line["step"] for line in held_out] == [2, 4]
    assert (tmp_path / "run" / "checkpoints" / "best.ckpt").is_file()
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), "--split", "val", "--json", "--batch-size", "3"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["mIoU"] == pytest.approx(held_out[-1]["val/mIoU"], abs=1e-5)
    assert found["examples"] == 4
    assert set(found["IoU_by_class"]) == {"a", "b", "c"}
    assert 0 < found["most_frequent_class_mIoU"] < found["most_frequent_class_accuracy"] < 1
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert "boundary f1" in capsys.readouterr().out


def test_a_run_starts_from_a_classifiers_weights(scenes, tmp_path, capsys):
    sizes = {**SIZES, **CUT, "layers": "(1)2", "image_size": 48, "num_classes": 7}
    torch.manual_seed(0)
    FITImageEncoder.from_config(sizes).save_pretrained(tmp_path / "classifier")
    path = tmp_path / "segment.yaml"
    path.write_text(
        config.dump(recipe(scenes, "--optimizer.lr=1e-9", "--trainer.steps=1", "--trainer.validate_every=1"))
    )
    words = ["train", str(path), "--run-dir", str(tmp_path / "run"), "--init-from", str(tmp_path / "classifier")]
    assert main(words) == 0
    said = "resized backbone.encoder.trunk.latent_position.weight"
    assert said in capsys.readouterr().out
    assert said in json.loads((tmp_path / "run" / "initial_weights.json").read_text())["weights"]
    ours, theirs = (fitformer.from_pretrained(tmp_path / name) for name in ("run", "classifier"))
    torch.testing.assert_close(
        ours.trunk.blocks[0].state_dict(), theirs.trunk.blocks[0].state_dict(), rtol=0, atol=1e-6
    )


def test_what_label_images_decode_at_once_is_planned_for(tmp_path):
    from fitformer.training.memory_check import fit_to_memory

    for part in ("train", "test"):
        image, _ = scene(len(part), 1000, 1000)
        write(tmp_path / "images" / part / f"{part}.tif", image, tile=(16, 16))
        write(tmp_path / "labels" / part / f"{part}.png", image)
    colours = f"--data.colours={[list(colour) for colour in COLOURS]}"
    loaded = recipe(tmp_path, colours, "--trainer.execution=streamed", "--trainer.batch_size=1", image_size="null")
    examples, network = data.build_dataset(loaded.data, "train"), model()
    grid = network.patch_grid
    setup = StepConfig(prod(grid.cover(1000, 1000)), "streamed", slice_groups=1, trainer=True, data_bytes=6 * 10**6)
    needed, tiled = (memory(network, replace(setup, decode_bytes=size)).total for size in (3 * 10**6, 0))
    assert needed > tiled

    def fitted(budget):
        training = replace(loaded.trainer, memory=str(budget), slice_groups=1, recompute="full")
        return fit_to_memory(replace(loaded, trainer=training), network, examples)

    assert fitted(needed).slice_groups == 1
    with pytest.raises(InputError, match=r"labels/train/train\.png, a PNG that is decoded in pieces of 3 MB"):
        fitted(tiled)


def test_measures_do_not_depend_on_batches_and_name_what_is_not_seen(scenes):
    loaded = recipe(scenes, image_size="null")
    dataset = data.build_dataset(loaded.data, "test")
    network = model().eval()
    network.set_execution(Streamed(2))
    items = [dataset[k] for k in range(4)]
    # The groups of one image that are skipped are not seen.
    items[0]["image"] = GroupedImage(items[0]["image"], network.patch_grid, np.eye(3, 4, dtype=bool))
    together, _ = segment.measure(network, dataset.collate(items), loaded)
    alone = [segment.measure(network, dataset.collate([item]), loaded)[0] for item in items]
    for name, value in together.items():
        assert torch.allclose(value.double(), torch.stack([each[name] for each in alone]).mean(0).double(), rtol=1e-5)
    found = dict(segment.conclude(together, dataset.classes))
    assert 0 < found["unseen"] < 1


def test_class_weights_have_a_mean_of_one_over_pixels(scenes):
    loaded = recipe(scenes, "--objective.class_weights=balanced")
    dataset = data.build_dataset(loaded.data, "train")
    weights = np.array(segment.prepare(loaded, dataset).objective.class_weights)
    whole = np.concatenate([each.window(0, 0, *each.shape[:2]).ravel() for each in dataset.label_images()])
    counts = np.bincount(whole)
    assert (weights * counts).sum() == pytest.approx(counts.sum())
    assert np.ptp(weights * counts) == pytest.approx(0, abs=1e-6)
    with pytest.raises(InputError, match="2 numbers, and there are 3 classes"):
        segment.prepare(replace(loaded, objective=replace(loaded.objective, class_weights=(1.0, 2.0))), dataset)


def test_pixels_without_end_are_named(scenes, tmp_path):
    network = model(channels=1).eval()
    image = PixelArray(np.full((20, 20, 1), np.nan, np.float32))
    batch = {"image": [image], "labels": [PixelArray(np.zeros((20, 20, 1), np.uint8))]}
    with pytest.raises(InputError, match="NaN or infinite"):
        segment.loss(network, batch, recipe(scenes, image_size="null"))
    # In a row with others, the broken one alone is named.
    sound = PixelArray(np.zeros((40, 20, 1), np.float32))
    image.path, sound.path = "broken.tif", "sound.tif"
    batch = {"image": [sound, image], "labels": [PixelArray(np.zeros((rows, 20, 1), np.uint8)) for rows in (40, 20)]}
    with pytest.raises(InputError, match=r"^broken\.tif: NaN or infinite"):
        segment.loss(network, batch, recipe(scenes, image_size="null"))
