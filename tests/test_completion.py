"""Images whose upper rows are given: which rows can be, what is drawn below them, and classes at the command line."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from fitformer import patching
from fitformer.cli import main
from fitformer.config import load as config
from fitformer.errors import InputError
from fitformer.tasks.pixels import complete_images, generate_images, kept_rows
from fitformer.training.run_dir import Run
from helpers import untrained_run

TINY = ["model.dim=16", "model.latent_dim=16", "model.heads=2", "model.latent_heads=2", "model.latents_per_group=2"]
SMALL = [*TINY, "model.layers=(1)1(1)"]


def recipe_of(*overrides):
    return config.load("digits-pixels", [f"--{each}" for each in [*SMALL, *overrides]])


# ---- which rows can be kept ----

SIZES = [("8x8", 2), ("8x8", "1x8"), ("8x8", "4x8"), ("8x8", 8), ("8x8", "2x4"), ("6x4", "3x2"), ("6x4", "6x4")]


@pytest.mark.parametrize("order", ["raster", "snake"])
@pytest.mark.parametrize(("size", "patch"), [*SIZES, ("8x8", "8x2"), ("1x4", 1)])
def test_rows_that_can_be_kept_are_those_that_come_first_in_the_order(size, patch, order):
    recipe = recipe_of(f"data.image_size={size}", f"model.patch_size={patch}", f"objective.order={order}")
    height, width = (int(side) for side in size.split("x"))
    rows = torch.arange(height, dtype=torch.uint8)[None, :, None, None].expand(1, height, width, 2).contiguous()
    sequence = patching.image_to_pixels(rows, recipe.model.patch_size, order).flatten()
    possible = [k for k in range(1, height) if int(sequence[: k * width * 2].max()) < k]
    for asked in range(-1, height + 2):
        if asked in possible:
            assert kept_rows(recipe, asked) == asked
            continue
        with pytest.raises(InputError) as refused:
            kept_rows(recipe, asked)
        if possible and 0 < asked < height:
            below, above = [k for k in possible if k < asked][-1:], [k for k in possible if k > asked][:1]
            assert str(refused.value).endswith(f"keep {' or '.join(map(str, below + above))} rows")
    if possible:
        assert kept_rows(recipe, None) == max(k for k in possible if k <= height // 2)


# ---- from Python ----


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of handwritten digits, plain and class-conditional, whose weights are large enough that classes show."""
    made = {}
    for name, more in (("plain", []), ("classes", ["objective.class_conditional=true"])):
        path = untrained_run(tmp_path_factory.mktemp("runs") / name, "digits-pixels", *SMALL, *more)
        network = Run.open(path).model()
        with torch.no_grad():
            for weight in network.parameters():
                weight.add_(0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())))
        network.save_pretrained(Run.open(path).model_folder)
        made[name] = path
    return made


def digits(count=2):
    """Digits as files have them, 0 .. 255."""
    values = torch.randint(17, (count, 8, 8, 1), generator=torch.Generator().manual_seed(0))
    return (values.float() * (255 / 16)).round().to(torch.uint8)


def test_the_upper_rows_stay_and_the_rest_is_drawn_anew_each_time(runs):
    run, images = Run.open(runs["plain"]), digits()
    network = run.model()
    drawn = complete_images(network, run.recipe, images, count=3, seed=5)
    assert drawn.shape == (6, 8, 8, 1)
    assert torch.equal(drawn[:, :4], images.repeat_interleave(3, 0)[:, :4])
    assert len({image.numpy().tobytes() for image in drawn[:, 4:]}) == 6
    # Completion k depends on its image, the seed and k alone.
    assert torch.equal(complete_images(network, run.recipe, images, count=3, seed=5, batch_size=4), drawn)
    assert torch.equal(complete_images(network, run.recipe, images[1:], count=2, seed=5, first=3), drawn[3:5])
    # All but one row given, the last row is drawn as the whole sequence has it.
    greedy = complete_images(network, run.recipe, images, keep_rows=7, temperature=0)
    values = (greedy.float() * (16 / 255)).round().to(torch.uint8)
    targets = patching.image_to_pixels(values, run.recipe.model.patch_size, run.recipe.objective.order)
    assert torch.equal(network(patching.shift_right(targets)).argmax(-1)[:, 7], targets[:, 7])


def test_a_patch_order_that_turns_back_keeps_its_rows_too(tmp_path):
    overrides = ["model.patch_size=2", "objective.order=snake", "data.levels=null", "data.image_size=8"]
    run = Run.open(untrained_run(tmp_path / "run", "digits-pixels", *SMALL, *overrides))
    images = torch.randint(256, (2, 8, 8, 1), dtype=torch.uint8)
    for rows in (2, 6):
        drawn = complete_images(run.model(), run.recipe, images, keep_rows=rows)
        assert torch.equal(drawn[:, :rows], images[:, :rows])
        assert not torch.equal(drawn[:, rows:], images[:, rows:])
    with pytest.raises(InputError, match=r"keep_rows is 3; .* 2 rows high: keep 2 or 4 rows"):
        complete_images(run.model(), run.recipe, images, keep_rows=3)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 8, 9, 1, dtype=torch.uint8), r"torch.uint8 of 8 x 9 x 1.* 8 x 8 x 1 \(rows"),
        (torch.zeros(1, 8, 8, 3, dtype=torch.uint8), "8 x 8 x 3"),
        (torch.zeros(1, 8, 8, 1), "torch.float32"),
        (torch.zeros(8, 8, 1, dtype=torch.uint8), "of 8 x 1,"),
    ],
)
def test_images_that_the_model_does_not_draw_are_refused(runs, images, message):
    run = Run.open(runs["plain"])
    with pytest.raises(InputError, match=message):
        complete_images(run.model(), run.recipe, images)


def test_a_class_conditional_model_draws_all_classes_in_turn_or_those_asked_for(runs):
    run = Run.open(runs["classes"])
    network, recipe = run.model(), run.recipe
    assert network.num_classes == 10
    drawn = generate_images(network, recipe, 12, seed=2)
    assert torch.equal(generate_images(network, recipe, 12, seed=2, classes=[*range(10), 0, 1], batch_size=5), drawn)
    assert torch.equal(generate_images(network, recipe, 2, seed=2, first=9), drawn[9:11])
    other = generate_images(network, recipe, 12, seed=2, classes=[3] * 12)
    same = [k for k in range(12) if torch.equal(other[k], drawn[k])]
    assert same == [3]
    in_turn = complete_images(network, recipe, digits(1), count=4, seed=2)
    assert torch.equal(complete_images(network, recipe, digits(1), count=4, seed=2, classes=[0, 1, 2, 3]), in_turn)
    assert not torch.equal(complete_images(network, recipe, digits(1), count=4, seed=2, classes=[4] * 4), in_turn)
    with pytest.raises(InputError, match="class 10 is out of range"):
        generate_images(network, recipe, 1, classes=[10])
    with pytest.raises(InputError, match=r"labels \(1,\).* 2 examples"):
        generate_images(network, recipe, 2, classes=[1])
    plain = Run.open(runs["plain"])
    with pytest.raises(InputError, match="num_classes=0"):
        generate_images(plain.model(), plain.recipe, 1, classes=[1])


# ---- at the command line ----


def use(capsys, *words):
    assert main([str(word) for word in words]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def refusal(capsys, *words):
    assert main([str(word) for word in words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    return line


def images_in(folder):
    return {path.name: np.array(Image.open(path)) for path in sorted(folder.glob("0*.png"))}


@pytest.fixture
def pictures(tmp_path):
    """Two files that the model can complete, one of them in colour though it is grey."""
    one, two = digits(2)[..., 0].numpy()
    Image.fromarray(one).save(tmp_path / "one.png")
    Image.fromarray(np.stack([two] * 3, axis=-1)).save(tmp_path / "two.png")
    return {tmp_path / "one.png": one, tmp_path / "two.png": two}


def test_files_are_completed_several_times(runs, capsys, tmp_path, pictures):
    files = [word for file in pictures for word in ("--image", file)]
    words = ["generate", runs["plain"], *files, "--count", 3, "--seed", 7]
    grid = use(capsys, *words).strip()
    assert grid == str(Run.open(runs["plain"]).samples / "completed-seed-7" / "grid.png")
    use(capsys, *words, "--keep-rows", 5, "--output", tmp_path / "five")
    for rows, folder in ((4, Run.open(runs["plain"]).samples / "completed-seed-7"), (5, tmp_path / "five")):
        found = images_in(folder)
        assert len(found) == 6
        for image, wanted in zip(found.values(), [each for each in pictures.values() for _ in range(3)], strict=True):
            assert np.array_equal(image[:rows], wanted[:rows])
            assert not np.array_equal(image[rows:], wanted[rows:])
    about = json.loads((tmp_path / "five" / "samples.json").read_text())
    assert (about["keep_rows"], about["images"], about["seed"]) == (5, [str(file) for file in pictures], 7)
    assert len(images_in(tmp_path / "five")) == len(about["samples"])


def test_classes_are_asked_for_by_name_or_number(runs, capsys, tmp_path, pictures):
    words = ["generate", runs["classes"], "--count", 4, "--output", tmp_path / "out"]
    use(capsys, *words)
    in_turn = images_in(tmp_path / "out")
    assert sorted(in_turn) == ["00000-0.png", "00001-1.png", "00002-2.png", "00003-3.png"]
    use(capsys, *words, "--class", "3")
    threes = images_in(tmp_path / "out")
    assert sorted(threes) == [f"0000{k}-3.png" for k in range(4)]
    assert np.array_equal(threes["00003-3.png"], in_turn["00003-3.png"])
    use(capsys, *words, "--class", "3,7", "--image", next(iter(pictures)))
    assert sorted(images_in(tmp_path / "out")) == ["00000-3.png", "00001-7.png", "00002-3.png", "00003-7.png"]
    assert "class 10 is out of range" in refusal(capsys, *words, "--class", "10")
    assert "leave --class out" in refusal(capsys, "generate", runs["plain"], "--class", "1")


@pytest.mark.parametrize("shape", [(9, 8), (8, 16), (3, 5)])
def test_an_image_of_another_size_is_refused_with_both_sizes(runs, capsys, tmp_path, shape):
    Image.fromarray(np.zeros(shape, np.uint8)).save(tmp_path / "odd.png")
    line = refusal(capsys, "generate", runs["plain"], "--image", tmp_path / "odd.png")
    assert f"odd.png is {shape[0]} x {shape[1]} pixels, and the model's images are 8 x 8" in line


def test_what_cannot_be_completed_is_refused_in_one_line(runs, capsys, tmp_path, pictures):
    (tmp_path / "no.png").write_bytes(b"no image")
    file = next(iter(pictures))
    for words, message in (
        (["--image", tmp_path / "no.png"], "no.png"),
        (["--image", tmp_path / "missing.png"], "there is no such file"),
        (["--image", file, "--keep-rows", "8"], "keep_rows is 8; of the 8 rows of an image, 1 to 7 can be kept"),
        (["--image", file, "--keep-rows", "0"], "0 is too small"),
        (["--keep-rows", "3"], "give --image as well"),
        (["--image", file, "--top-p", "0"], "top_p is 0"),
        (["--prompt", "x"], "--prompt does not apply"),
        (["--length", "3"], "--length does not apply"),
        (["--window", "3"], "--window does not apply"),
        (["--stream"], "--stream does not apply"),
        (["--stop", "x"], "--stop does not apply"),
    ):
        assert message in refusal(capsys, "generate", runs["plain"], *words)
