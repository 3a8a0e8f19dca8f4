"""Training on files of any size, from the command line: streamed, within a budget, and refused where it must be."""

import json
import os
import re
import shutil
import signal
import warnings
from dataclasses import replace

import numpy as np
import pytest
import tifffile
import torch
import yaml
from PIL import Image

pytest.importorskip("lightning", reason="needs the extra train")

from fitformer import data
from fitformer.cli import main
from fitformer.config import load as config
from fitformer.config.schema import ClassifyRecipe, Training
from fitformer.data.datasets import images
from fitformer.data.dihedral import SYMMETRIES, TransformedImage
from fitformer.data.grouping import Grouping
from fitformer.data.readers import open_image
from fitformer.data.symmetry import DIHEDRAL, IDENTITY
from fitformer.errors import EmptyImageError, InputError
from fitformer.models.image_encoder import FITImageEncoder
from fitformer.profiling import StepConfig, memory
from fitformer.tasks import classify, set_execution, task_of
from fitformer.training.memory_check import fit_to_memory
from fitformer.training.run_dir import Run
from helpers import grouped, patch_task

COLOUR = {(): {"photometric": "minisblack"}, (3,): {"photometric": "rgb"}}
SIZES = [(90, 70), (33, 130), (64, 64), (100, 41)]

pytestmark = pytest.mark.usefixtures("one_thread")


def draw(path, size, marked, dtype=np.uint8, shade=0):
    """A white canvas with a grey patch, and in it a mark."""
    top = np.iinfo(dtype).max
    pixels = np.full((*size, 3), top, dtype)
    pixels[4:28, 6:30] = top // 3 + shade
    if marked:
        pixels[10:20, 10:20] = (top, 0, 0)
    tifffile.imwrite(path, pixels, tile=(32, 32), photometric="rgb")


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    root = tmp_path_factory.mktemp("slides")
    for part in ("train", "test"):
        for name in ("plain", "marked"):
            (root / part / name).mkdir(parents=True)
            for k, size in enumerate(SIZES):
                # No image of one part is in the other.
                draw(root / part / name / f"{k}.tif", size, name == "marked", shade=part == "test")
    return root


@pytest.fixture
def recipe(slides, tmp_path):
    given = {
        "task": "classify",
        "model": {"group_size": 32, "patch_size": 8, "latent_position": "row_column", "layers": "(1)1(1)1"},
        "data": {"source": "folder", "path": str(slides), "image_size": None, "background": "white"},
        "optimizer": {"warmup_steps": 5, "lr": 3e-3},
        "trainer": {"steps": 24, "batch_size": 4, "validate_every": 12, "checkpoint_every": 12, "accelerator": "cpu"},
    }
    path = tmp_path / "slides.yaml"
    path.write_text(yaml.safe_dump(given))
    return str(path)


def weights(run_dir):
    return torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def test_training_on_files_of_any_size_learns_and_streams_as_it_runs_plainly(recipe, tmp_path):
    """The way to run may change in the middle of a run; what is learned does not."""
    plainly, streamed = tmp_path / "plain", tmp_path / "streamed"
    assert main(["train", recipe, "--run-dir", str(plainly)]) == 0
    first = ["--trainer.steps=24", "--trainer.execution=streamed", "--trainer.keep=disk", "--memory=1GB"]
    assert main(["train", recipe, *first, "--run-dir", str(streamed)]) == 0
    for name, wanted in weights(plainly).items():
        torch.testing.assert_close(weights(streamed)[name], wanted, rtol=2e-3, atol=2e-4, msg=name)
    for run in (plainly, streamed):
        last = [line for line in Run.open(run).metrics() if "val/accuracy" in line][-1]
        assert last["val/accuracy"] == 1.0


def test_a_step_that_does_not_fit_is_refused_before_anything_is_written(recipe, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", recipe, "--memory=50MB", "--run-dir", str(run)]) == 2
    said = capsys.readouterr().err
    assert "a training step needs" in said
    assert "the budget is 50 MB" in said
    assert len(said.splitlines()) == 1
    assert not run.exists()
    assert main(["train", recipe, "--memory=lots", "--run-dir", str(run)]) == 2
    assert "is not a size of memory" in capsys.readouterr().err


def test_what_is_computed_again_follows_from_the_memory(recipe, monkeypatch):
    def chosen(*words):
        loaded = config.load(recipe, ["--trainer.execution=streamed", *words])
        return fit_to_memory(loaded, fit(recipe), data.build_dataset(loaded.data, "train")).recompute

    assert chosen() == chosen("--trainer.memory=8GB") == "light"
    assert chosen("--trainer.memory=8GB", "--trainer.recompute=local") == "local"
    assert chosen("--trainer.memory=640MB") == "full"
    assert chosen("--trainer.compile=true") == "full"
    # Processes on one machine share its memory.
    monkeypatch.setattr("fitformer.training.memory_check.total_memory", lambda device: 4 * 640 * 10**6)
    monkeypatch.setattr("fitformer.training.memory_check.available_memory", lambda device: 4 * 640 * 10**6)
    assert chosen("--trainer.accelerator=cpu") == "light"
    assert chosen("--trainer.accelerator=cpu", "--trainer.devices=4") == "full"
    with pytest.raises(InputError, match=r"recompute is 'light' with compile"):
        Training(compile=True, recompute="light")


def test_empty_groups_are_found_once_and_skipped(recipe, slides):
    settings = config.load(recipe).data
    network = fit(recipe)
    image = settings_image(settings, slides)
    assert grouped(network, image, settings).num_groups == 1
    assert grouped(network, image).num_groups == 3 * 3
    assert grouped(network, image, settings).num_groups == 1


@pytest.mark.parametrize("overrides", [[], ["--data.background=none"], ["--model.group_size=[32,16]"]])
def test_the_groups_of_a_turned_image_are_those_of_a_turned_file(recipe, slides, tmp_path, overrides):
    masks = tmp_path / "masks"
    masks.mkdir()
    mask = np.zeros((90, 70), np.uint8)
    mask[5:30, :70] = 1
    for name, symmetry in [("0", IDENTITY), *((f"turned{k}", each) for k, each in enumerate(DIHEDRAL))]:
        tifffile.imwrite(masks / f"{name}.tif", symmetry.turn(mask))
    loaded = config.load(recipe, [f"--data.masks={masks}", *overrides])
    network, image = fit(recipe, overrides), settings_image(loaded.data, slides)
    for k, symmetry in enumerate(DIHEDRAL):
        path = tmp_path / f"turned{k}.tif"
        tifffile.imwrite(path, symmetry.turn(image.window(0, 0, 90, 70)), tile=(32, 32), photometric="rgb")
        found, wanted = (
            grouped(network, TransformedImage(image, symmetry), loaded.data),
            grouped(network, open_image(path), loaded.data),
        )
        assert torch.equal(found.coords, wanted.coords)
        for part, other in zip(found.read(slice(None)), wanted.read(slice(None))):
            assert torch.equal(part, other) if part is not None else other is None


def test_a_run_on_turned_images_goes_on_as_if_it_had_not_been_stopped(recipe, tmp_path, monkeypatch, capsys):
    """Training draws a symmetry for each image; validation sees the files as they are."""
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    words = ["--data.augmentation=dihedral", "--model.group_size=[32,16]", "--model.glimpses=1", "--trainer.steps=6"]
    words += ["--trainer.execution=streamed", "--trainer.slice_groups=2", "--trainer.validate_every=3"]
    seen, group, loss = [], Grouping.__call__, classify.loss
    monkeypatch.setattr(Grouping, "__call__", lambda grouping, image: (seen.append(image), group(grouping, image))[1])
    assert main(["train", recipe, *words, "--run-dir", str(straight)]) == 0
    turned = [image for image in seen if isinstance(image, TransformedImage)]
    assert len(turned) == 6 * 4
    assert len({image.symmetry for image in turned}) > 4
    assert len(seen) - len(turned) == 2 * 8
    steps = []

    def interrupted(*given):
        steps.append(given)
        if len(steps) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(*given)

    patch_task(monkeypatch, classify, loss=interrupted)
    assert main(["train", recipe, *words, "--run-dir", str(stopped)]) == 130
    assert "stopped at step 4 of 6" in capsys.readouterr().out
    assert main(["train", recipe, *words, "--run-dir", str(stopped)]) == 0
    ours, theirs = weights(straight), weights(stopped)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def fit(recipe, overrides=()):
    from fitformer import data
    from fitformer.tasks import build_model

    loaded = config.load(recipe, overrides)
    return build_model(loaded, data.build_dataset(loaded.data, "train"))


def settings_image(settings, slides):
    return open_image(slides / "train" / "plain" / "0.tif")


def test_masks_say_what_is_skipped(recipe, slides, tmp_path):
    folder = tmp_path / "masks"
    folder.mkdir()
    mask = np.zeros((90, 70), np.uint8)
    mask[40:80, :10] = 1
    tifffile.imwrite(folder / "0.tif", mask)
    loaded = config.load(recipe, ["--data.background=none", f"--data.masks={folder}"])
    network = fit(recipe)
    image = settings_image(loaded.data, slides)
    assert grouped(network, image, loaded.data).coords.tolist() == [[1, 0], [2, 0]]
    (folder / "0.png").touch()
    with pytest.raises(InputError, match=r"0\.tif needs one mask, and there are 2 .*0\.png, .*0\.tif"):
        grouped(network, image, config.load(recipe, [f"--data.masks={folder}", "--data.tolerance=0.2"]).data)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--model.latent_position=learned", "data.image_size: null is for models of images of any size"),
        ("--data.augmentation=light", "'light' needs the whole image at once, .*: choose none, flip, dihedral"),
        ("--data.source=digits", "which the source 'digits' does not have"),
        ("--data.channels=2", "has 3 channels and 2 are asked for"),
        ("--data.masks=nowhere", "there is no folder nowhere of masks"),
        ("--data.background=[255,0]", "data.background has 2 levels, and .* has 3 channels"),
        ("--data.background=pink", "data.background is 'pink'; expected .*'auto'.*, float, tuple"),
        ("--data.min_foreground=1", "data.min_foreground is 1.0: a share from 0 to below 1"),
        ("--trainer.memory=16", "'16'"),
        ("--trainer.slice_groups=0", "slice_groups is 0; it must be at least 1"),
    ],
)
def test_bad_settings_say_what_to_change(recipe, tmp_path, capsys, override, message):
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        assert main(["train", recipe, override, "--run-dir", str(tmp_path / "run")]) == 2
    *warned, error = capsys.readouterr().err.splitlines()
    assert re.search(message, error)
    assert all(line.startswith("fitformer: warning: data source 'digits' does not read ") for line in warned)
    assert len(warned) == ("digits" in override)


def test_a_file_that_breaks_in_mid_run_is_one_error_and_the_checkpoint_stays(recipe, slides, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(slides, copy)
    run = tmp_path / "run"
    words = ["train", recipe, f"--data.path={copy}", "--trainer.validate_batches=0", "--run-dir", str(run)]
    assert main([*words, "--trainer.steps=24", "--trainer.checkpoint_every=2"]) == 0
    before = (run / "checkpoints" / "last.ckpt").read_bytes()
    again = tmp_path / "again"
    for file in (copy / "train").rglob("*.tif"):
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
    words[-1] = str(again)
    assert main([*words, "--trainer.steps=24"]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert ".tif" in said
    assert "Traceback" not in said
    assert (run / "checkpoints" / "last.ckpt").read_bytes() == before


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_breaks_in_mid_run_and_is_mended_loses_no_step(
    recipe, slides, tmp_path, capsys, monkeypatch, workers
):
    words = [f"--data.num_workers={workers}", "--trainer.batch_size=2", "--trainer.accumulate=3", "--trainer.steps=3"]
    words += ["--trainer.execution=streamed", "--trainer.slice_groups=2", "--trainer.ema=0.9"]
    words += ["--data.augmentation=dihedral", "--trainer.validate_batches=0"]
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert main(["train", recipe, *words, "--run-dir", str(straight)]) == 0
    copy = tmp_path / "copy"
    shutil.copytree(slides, copy)
    loss, steps = classify.loss, []

    def breaking(*given):
        steps.append(given)
        if len(steps) == 5:
            for file in (copy / "train").rglob("*.tif"):
                file.write_bytes(file.read_bytes()[:200])
        return loss(*given)

    words += [f"--data.path={copy}", "--run-dir", str(broken)]
    with monkeypatch.context() as patch:
        patch_task(patch, classify, loss=breaking)
        assert main(["train", recipe, *words]) == 2
    line = said(capsys)
    assert re.match(
        r"fitformer: error: .*(\.tif|no image of .* readable).*; the same command goes on from step [12]$", line
    )
    for file in (slides / "train").rglob("*.tif"):
        shutil.copy(file, copy / file.relative_to(slides))
    assert main(["train", recipe, *words]) == 0
    assert line.rpartition("; the same command ")[2] in capsys.readouterr().out
    ours, theirs = weights(straight), weights(broken)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("task", ["diffuse", "pixels"])
def test_losses_of_tokens_stream_as_they_run_plainly(task):
    overrides = {
        "diffuse": ["--objective.self_cond=half", "--model.drop_units=0.1"],
        "pixels": ["--model.drop_units=0.1"],
    }
    loaded = config.load(f"digits-{task}", overrides[task])
    from fitformer.tasks import build_model

    examples = data.build_dataset(loaded.data, "train")
    torch.manual_seed(0)
    network = build_model(loaded, examples)
    batch = torch.utils.data.default_collate([examples[k] for k in range(4)])
    found = []
    for way in ("plain", "streamed"):
        words = [f"--trainer.execution={way}", "--trainer.slice_groups=1", "--trainer.recompute=light"]
        training = config.load(f"digits-{task}", words).trainer
        set_execution(network, training)
        network.zero_grad()
        torch.manual_seed(1)
        value, _ = task_of(loaded).loss(network, batch, loaded)
        value.backward()
        found.append((value.detach(), {name: p.grad for name, p in network.named_parameters()}))
    torch.testing.assert_close(found[1][0], found[0][0])
    largest = max(g.abs().max().item() for g in found[0][1].values() if g is not None)
    for name, wanted in found[0][1].items():
        if wanted is not None:
            torch.testing.assert_close(found[1][1][name], wanted, rtol=1e-5, atol=1e-5 * largest, msg=name)


def test_the_recipe_of_a_run_says_how_it_is_evaluated(recipe, tmp_path, capsys):
    run = tmp_path / "run"
    words = ["--trainer.steps=2", "--trainer.execution=streamed", "--trainer.slice_groups=2"]
    assert main(["train", recipe, *words, "--run-dir", str(run)]) == 0
    loaded = Run.open(run)
    assert isinstance(loaded.recipe, ClassifyRecipe)
    assert loaded.model().execution.slice_groups == 2
    assert main(["evaluate", str(run)]) == 0
    assert "accuracy" in capsys.readouterr().out


def off_white(folder, suffix="tif", size=(90, 70)):
    """Two classes of images on a noisy background that is not quite white."""
    random = np.random.default_rng(0)
    for k in range(4):
        pixels = (235 + random.normal(0, 2, (*size, 3))).astype(np.uint8)
        pixels[4:28, 6:30] = (180, 90, 60 * (k % 2))
        path = folder / f"{k % 2}" / f"{k}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if suffix == "tif":
            tifffile.imwrite(path, pixels, tile=(32, 32), photometric="rgb")
        else:
            Image.fromarray(pixels).save(path)
    return folder


@pytest.mark.parametrize("background", ["auto", "235", "[235, 235, 235]"])
def test_a_run_says_what_it_skips(recipe, tmp_path, capsys, background):
    words = [
        f"--data.path={off_white(tmp_path / 'images')}",
        f"--data.background={background}",
        "--data.min_foreground=0.01",
    ]
    words += ["--trainer.steps=3", "--trainer.batch_size=4", "--data.holdout=0.5", "--run-dir", str(tmp_path / "run")]
    assert main(["train", recipe, *words]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("background"))
    told = r"background (auto|235|235, 235, 235): 11% of the groups of the first 8 images hold something"
    assert re.fullmatch(told, line)
    kept = Run.open(tmp_path / "run").recipe
    assert config.parse(config.dump(kept)) == kept
    # It changes what is learned.
    assert main(["train", recipe, *words, "--data.min_foreground=0.02"]) == 2
    assert "data.min_foreground is 0.01 there, 0.02 here" in said(capsys)


def test_patches_of_background_are_absent_in_all_that_a_run_does(recipe, slides, tmp_path, capsys):
    run, words = tmp_path / "run", ["--data.background_patches=true", "--model.patch_size=4", "--trainer.steps=3"]
    assert main(["train", recipe, *words, "--run-dir", str(run)]) == 0
    # Of each image 6 x 7 patches, those of 24 x 24 pixels from (4, 6) on.
    assert re.search(r"background white: \d% of the patches of the first 8 images hold", capsys.readouterr().out)
    opened = Run.open(run)
    assert main(["evaluate", str(run)]) == 0
    measured = capsys.readouterr().out
    path = slides / "test" / "marked" / "0.tif"
    assert main(["predict", str(run), str(path), "--explain", "gradient", "--output", str(tmp_path / "seen")]) == 0
    record = json.loads((tmp_path / "seen" / "0.tif.json").read_text())
    for name in ("attention", "relevance"):
        map_ = tifffile.imread(tmp_path / "seen" / f"0.tif.{name}.tif")
        assert np.isfinite(map_).sum() == 42
    image = grouped(opened.model(), open_image(path), opened.recipe.data)
    assert image.count() == 42
    with torch.no_grad():
        probabilities = opened.model().eval()([image]).softmax(-1)[0]
    named = dict(zip(opened.classes, probabilities.tolist(), strict=True))
    assert record["probabilities"] == pytest.approx(named, abs=1e-5)
    assert "accuracy" in measured
    assert main(["train", recipe, *words[1:], "--run-dir", str(run)]) == 2
    assert "data.background_patches is true there, false here" in said(capsys)


@pytest.mark.filterwarnings("default::UserWarning")
def test_a_run_warns_if_its_background_skips_nothing(recipe, tmp_path, capsys):
    words = [f"--data.path={off_white(tmp_path / 'images')}", "--data.tolerance=0.05", "--trainer.validate_batches=0"]
    words += ["--trainer.steps=1", "--trainer.batch_size=2", "--data.holdout=0.5", "--run-dir", str(tmp_path / "run")]
    assert main(["train", recipe, *words]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line.lower()]
    assert line.startswith("fitformer: warning: ")
    assert "background white: 100% of the groups of the first 2 images hold something" in line


def test_a_share_of_nothing_that_is_skipped_is_ignored(recipe):
    loaded = config.load(recipe, ["--data.background=none", "--data.min_foreground=0.1"])
    with pytest.warns(UserWarning, match="data.min_foreground is of groups"):
        data.build_dataset(loaded.data)


@pytest.mark.parametrize("task", ["diffuse", "pixels"])
def test_tasks_that_skip_no_groups_say_so(task, tmp_path, capsys):
    words = [f"digits-{task}", "--data.background=white", "--run-dir", str(tmp_path / "run")]
    assert main(["train", *words]) == 2
    said = capsys.readouterr().err
    assert f"the task {task} skips no groups; remove data.background" in said


def test_a_flip_is_blank_only_if_that_flip_is(recipe, tmp_path):
    """Quarter turns, which are never drawn, may leave no group that holds enough."""
    pixels = np.full((80, 32, 3), 255, np.uint8)
    pixels[32:52] = 0
    tifffile.imwrite(tmp_path / "a.tif", pixels, tile=(16, 16), photometric="rgb")
    image = open_image(tmp_path / "a.tif")
    words = ["--data.min_foreground=0.6", "--model.group_size=32"]
    flipped = config.load(recipe, [*words, "--data.augmentation=flip"])
    turned = SYMMETRIES["flip"][1]
    assert grouped(fit(recipe, words), TransformedImage(image, turned), flipped.data).num_groups == 1
    any_way = config.load(recipe, [*words, "--data.augmentation=dihedral"])
    with pytest.raises(EmptyImageError, match="as it is turned in training, has no group"):
        grouped(fit(recipe, words), TransformedImage(image, turned), any_way.data)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_what_files_decode_at_once_is_planned_for(recipe, tmp_path, suffix):
    folder = off_white(tmp_path / "images", suffix, (2000, 2000))
    loaded = config.load(
        recipe,
        [f"--data.path={folder}", "--data.holdout=0.5", "--trainer.execution=streamed", "--trainer.batch_size=1"],
    )
    examples = data.build_dataset(loaded.data, "train")
    network = fit(recipe)

    def fits(budget):
        training = replace(loaded.trainer, memory=str(budget), slice_groups=1, recompute="full")
        try:
            fit_to_memory(replace(loaded, trainer=training), network, examples)
        except InputError as error:
            return str(error)

    setup = StepConfig(
        num_groups=63 * 63, execution="streamed", slice_groups=1, trainer=True, data_bytes=2 * 12 * 10**6
    )
    min_foreground = memory(network, setup).total
    if suffix == "tif":
        assert fits(min_foreground) is None
    else:
        told = r"6 MB of it is to decode .*\.png, a PNG that is decoded in pieces of 12 MB; store it in small tiles"
        assert re.search(told, fits(min_foreground))
        assert fits(memory(network, replace(setup, decode_bytes=12 * 10**6)).total) is None
    assert "take a smaller model" in fits(10**6)


def test_images_in_memory_skip_their_empty_groups_too():
    loaded = config.load(
        "digits-classify",
        [
            "--model.latent_position=row_column",
            "--data.background=black",
            "--model.group_size=8",
            "--model.patch_size=4",
        ],
    )
    network = FITImageEncoder.from_config(
        layers="(1)1",
        image_size=None,
        group_size=8,
        patch_size=4,
        latents_per_group=2,
        dim=8,
        latent_dim=8,
        heads=2,
        latent_heads=2,
        channels=1,
        latent_position="row_column",
    )
    pixels = torch.zeros(32, 32, 1, dtype=torch.uint8)
    pixels[9, 20] = 255
    assert grouped(network, pixels, loaded.data).coords.tolist() == [[1, 2]]


@pytest.fixture
def odd(slides, tmp_path):
    """Puts one more image into a copy of the slides; gives the copy."""

    def put(pixels, part="train"):
        folder = tmp_path / "odd"
        shutil.copytree(slides, folder)
        tifffile.imwrite(folder / part / "plain" / "odd.tif", pixels, tile=(32, 32), **COLOUR[pixels.shape[2:]])
        return folder

    return put


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros((40, 50), np.uint8), "mixed channel counts: .*odd.tif has 1 and .*0.tif has 3"),
        (np.zeros((40, 50, 3), np.float32), "mixed types of pixels: .*odd.tif has float32 and .*0.tif has uint8"),
    ],
)
def test_images_unlike_the_others_are_refused_before_the_run_starts(
    recipe, odd, tmp_path, capsys, pixels, message, part
):
    run = tmp_path / "run"
    assert main(["train", recipe, f"--data.path={odd(pixels, part)}", "--run-dir", str(run)]) == 2
    assert re.search(message, said(capsys))
    assert not run.exists()


def said(capsys):
    """The one line of an error."""
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_an_image_of_nothing_but_background_is_named(recipe, odd, tmp_path, capsys):
    folder = odd(np.full((40, 50, 3), 255, np.uint8))
    words = [f"--data.path={folder}", "--trainer.batch_size=9", "--trainer.validate_batches=0"]
    assert main(["train", recipe, *words, "--run-dir", str(tmp_path / "run")]) == 2
    assert re.search("odd.tif has no group that holds anything .background white, tolerance 0.1.: ", said(capsys))


@pytest.mark.parametrize("batch_size", [9, 1])
def test_pixels_that_are_no_numbers_do_not_reach_a_checkpoint(recipe, tmp_path, capsys, batch_size):
    root = tmp_path / "floats"
    for k in range(9):
        pixels = np.full((40, 50, 3), k / 100, np.float32)
        pixels[3, 4] = np.nan if k == 5 else 0
        (root / f"{k % 2}").mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(root / f"{k % 2}" / f"{k}.tif", pixels, tile=(32, 32), photometric="rgb")
    words = [
        f"--data.path={root}",
        "--data.background=none",
        "--data.holdout=0.25",
        "--data.split_seed=1",
        "--trainer.validate_batches=0",
    ]
    run = tmp_path / "run"
    more = [f"--trainer.batch_size={batch_size}", "--trainer.checkpoint_every=1"]
    assert main(["train", recipe, *words, *more, "--run-dir", str(run)]) == 2
    assert re.search("1/5.tif: NaN or infinite outputs", said(capsys))
    if batch_size == 1:
        assert all(weight.isfinite().all() for weight in weights(run).values() if weight.is_floating_point())


def test_weights_that_are_no_numbers_do_not_take_the_place_of_a_checkpoint(tmp_path, capsys):
    words = ["train", "digits-classify", "--trainer.steps=4", "--trainer.batch_size=4", "--trainer.validate_batches=0"]
    words += ["--trainer.accelerator=cpu", "--trainer.checkpoint_every=1", "--run-dir", str(tmp_path / "run")]
    with pytest.MonkeyPatch.context() as patch:
        patch_task(patch, classify, loss=lambda network, *rest: (network.head.weight.sum() * np.inf, {}))
        assert main(words) == 2
    assert "training diverged at step 1: " in said(capsys)
    assert not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


def test_scratch_that_is_too_small_is_said_before_the_run_starts(recipe, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    words = ["train", recipe, "--trainer.execution=streamed", "--trainer.keep=disk", "--run-dir", str(run)]
    assert main([*words, f"--trainer.scratch={tmp_path / 'nowhere'}"]) == 2
    assert "trainer.scratch: there is no folder" in said(capsys)
    monkeypatch.setattr(
        "fitformer.training.memory_check.disk_usage", lambda folder: shutil._ntuple_diskusage(9, 8, 1000)
    )
    assert main([*words, "--data.background=none", f"--trainer.scratch={tmp_path}"]) == 2
    assert re.search("needs [0-9.]+ KB of scratch between blocks, and .* has 1 KB free", said(capsys))
    assert not run.exists()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_worker_that_dies_is_one_error_and_the_checkpoint_stays(recipe, tmp_path, capsys, monkeypatch):
    collate = images.collate_any_size

    def fatal(items):
        if items[0]["index"] == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return collate(items)

    monkeypatch.setattr(images, "collate_any_size", fatal)
    run = tmp_path / "run"
    words = ["--data.num_workers=1", "--trainer.batch_size=1", "--trainer.checkpoint_every=1"]
    assert main(["train", recipe, *words, "--trainer.validate_batches=0", "--run-dir", str(run)]) == 2
    line = said(capsys)
    assert re.search(r"a process that reads ahead \(data.num_workers, pid\S* \d+\) ", line)
    reached = re.search(
        r"--data.num_workers=0 takes least memory(?:; the same command goes on from step (\d+))?$", line
    )
    last = run / "checkpoints" / "last.ckpt"
    assert (int(reached[1]) if reached[1] else None) == (
        torch.load(last, weights_only=True)["global_step"] if last.exists() else None
    )


def test_told_twice_to_stop_a_run_stops_at_once(recipe, tmp_path, capsys, monkeypatch):
    """In the middle of a step, with the exit status of an interrupted command."""
    loss = classify.loss

    def interrupted(*given):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        return loss(*given)

    patch_task(monkeypatch, classify, loss=interrupted)
    assert main(["train", recipe, "--trainer.validate_batches=0", "--run-dir", str(tmp_path / "run")]) == 130
    assert said(capsys) == "fitformer: interrupted"
