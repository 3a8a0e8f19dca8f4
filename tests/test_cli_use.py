"""The verbs that use a run: on untrained ones, whose weights need no Lightning to be there."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fitformer import data
from fitformer.cli import main
from fitformer.config import load as config
from fitformer.tasks import build_model
from fitformer.training import run_dir

TINY = ["model.dim=16", "model.latent_dim=16", "model.heads=2", "model.latent_heads=2", "model.latents_per_group=2"]
RECIPES = {
    "classify": ("digits-classify", ["data.image_size=8", "model.group_size=4", "model.patch_size=2"]),
    "diffuse": ("digits-diffuse", ["data.image_size=8", "model.group_size=4", "model.patch_size=2"]),
    "pixels": ("digits-pixels", []),
    "bytes": ("python-bytes-demo", ["data.length=32", "model.tokens_per_group=8"]),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Run directories by kind, each made when it is first asked for."""
    there = {}

    def make(kind):
        if kind not in there:
            folder = tmp_path_factory.mktemp("runs") / kind
            name, overrides = RECIPES[kind]
            text = []
            if kind == "bytes":
                source = folder.parent / "text.txt"
                source.write_bytes(bytes(range(65, 91)) * 40)
                text = ["data.source=files", f"data.path={source}"]
            recipe = config.load(name, [*TINY, *overrides, *text])
            train, test = (data.build_dataset(recipe.data, split, seed=0) for split in ("train", "test"))
            run = run_dir.start_run(folder, recipe)
            run_dir.write_data_card(run, train, test)
            torch.manual_seed(0)
            build_model(recipe, train).save_pretrained(run.model_folder)
            there[kind] = folder
        return str(there[kind])

    return make


def use(capsys, *words):
    assert main(list(words)) == 0
    return capsys.readouterr().out


def refusal(capsys, *words):
    assert main(list(words)) == 2
    err = capsys.readouterr().err
    last = err.splitlines()[-1]
    assert last.startswith("fitformer: error: ")
    return last


def images_in(folder):
    found = {}
    for path in folder.glob("0*.png"):
        with Image.open(path) as image:
            found[path.name] = np.array(image)
    return found


def test_evaluation_of_a_classifier_does_not_depend_on_the_batches(made, capsys):
    found = [
        json.loads(use(capsys, "evaluate", made("classify"), "--json", "--batch-size", size)) for size in ("7", "400")
    ]
    assert found[0]["examples"] == found[1]["examples"] == 359
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-5)
    assert np.sum(found[0]["confusion"]) == 359
    shown = use(capsys, "evaluate", made("classify"))
    assert all(word in shown for word in ("accuracy", "top5 accuracy", "confusion"))


def test_evaluation_on_the_training_part_has_no_augmentation(made, capsys):
    words = ("evaluate", made("classify"), "--json", "--split", "train")
    found = [json.loads(use(capsys, *words)) for _ in range(2)]
    assert found[0] == found[1]
    assert found[0]["examples"] > 1000


def test_evaluation_of_a_denoiser_with_a_classifier_looking(made, capsys):
    words = ["--classifier", made("classify"), "--count", "20", "--steps", "2", "--json"]
    found = json.loads(use(capsys, "evaluate", made("diffuse"), *words))
    assert found["samples"] == 20
    assert 0 <= found["recognised"] <= 1
    assert found["loss"] > 0
    assert "give --classifier" in refusal(capsys, "evaluate", made("diffuse"), "--count", "5")


def test_evaluation_of_pixels_stands_beside_independent_ones(made, capsys):
    found = json.loads(use(capsys, "evaluate", made("pixels"), "--json"))
    assert found["tokens"] == 359 * 64
    # What the pixels of the digits are known to take, give or take the split.
    assert found["independent_bits_per_dim"] == pytest.approx(2.43, abs=0.05)
    found = json.loads(use(capsys, "evaluate", made("pixels"), "--json", "--no-baselines"))
    assert "independent_bits_per_dim" not in found


def test_evaluation_of_bytes_stands_beside_compressors(made, capsys):
    found = json.loads(use(capsys, "evaluate", made("bytes"), "--json"))
    assert found["tokens"] == 104
    assert 0 < found["gzip_bits_per_byte"] < 8
    assert found["xz_bits_per_byte"] > 0


def test_prediction_labels_what_it_can_and_names_the_rest(made, capsys, tmp_path):
    for k in range(3):
        Image.fromarray(np.full((9, 8 + k), 80 * k, dtype=np.uint8)).save(tmp_path / f"{k}.png")
    (tmp_path / "3.png").write_bytes(b"no picture")
    assert main(["predict", made("classify"), str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["file"] for row in rows] == [str(tmp_path / f"{k}.png") for k in range(3)]
    assert f"skipped {tmp_path / '3.png'}" in err
    use(capsys, "predict", made("classify"), str(tmp_path / "0.png"), "--output", str(tmp_path / "labels.json"))
    (record,) = json.loads((tmp_path / "labels.json").read_text())
    assert record["label"] == rows[0]["label"]
    assert "none of the 1 files" in refusal(capsys, "predict", made("classify"), str(tmp_path / "3.png"))


def test_samples_are_the_same_at_any_count_and_batch_size(made, capsys, tmp_path):
    words = ["sample", made("diffuse"), "--steps", "2", "--seed", "3", "--classes", "3,7"]
    use(capsys, *words, "--count", "5", "--output", str(tmp_path / "all"))
    use(capsys, *words, "--count", "3", "--batch-size", "2", "--output", str(tmp_path / "few"))
    all_, few = images_in(tmp_path / "all"), images_in(tmp_path / "few")
    assert sorted(all_) == ["00000-3.png", "00001-7.png", "00002-3.png", "00003-7.png", "00004-3.png"]
    for name, image in few.items():
        assert np.abs(all_[name].astype(int) - image).max() <= 1
    about = json.loads((tmp_path / "all" / "samples.json").read_text())
    assert (about["seed"], about["steps"], len(about["samples"])) == (3, 2, 5)


def test_a_model_folder_samples_as_its_run_does(made, capsys, tmp_path):
    run, model = made("diffuse"), tmp_path / "model"
    shutil.copytree(Path(run) / "model", model)
    words = ["--steps", "2", "--classes", "3,7", "--count", "4"]
    use(capsys, "sample", run, *words, "--output", str(tmp_path / "of-run"))
    assert str(model / "samples" / "seed-0") in use(capsys, "sample", str(model), *words)
    expected, found = images_in(tmp_path / "of-run"), images_in(model / "samples" / "seed-0")
    assert sorted(found) == ["00000-3.png", "00001-7.png", "00002-3.png", "00003-7.png"]
    assert all(np.array_equal(found[name], image) for name, image in expected.items())
    assert "FITImageEncoder" in refusal(capsys, "sample", str(Path(made("classify")) / "model"))


def test_sampling_refuses_what_is_not_there(made, capsys):
    assert "class 10 is out of range" in refusal(capsys, "sample", made("diffuse"), "--classes", "10")
    assert "no sampler 'dim'" in refusal(capsys, "sample", made("diffuse"), "--sampler", "dim", "--count", "1")
    wrong = refusal(capsys, "sample", made("classify"))
    assert "task classify" in wrong
    assert "fitformer predict" in wrong
    assert "no run directory" in refusal(capsys, "sample", "nowhere")


def test_text_goes_on_from_its_prompt_past_the_trained_length(made, capsys, tmp_path):
    words = ["generate", made("bytes"), "--prompt", "AB\u00e9", "--length", "60", "--temperature", "1", "--seed", "4"]
    out = use(capsys, *words, "--output", str(tmp_path / "text"))
    whole = (tmp_path / "text").read_bytes()
    assert len(whole) == 4 + 60
    assert whole.startswith("AB\u00e9".encode())
    assert out.startswith("AB\u00e9")
    assert out.rstrip("\n").startswith(whole.decode(errors="replace").rstrip("\n\ufffd")[:20])
    (tmp_path / "prompt").write_bytes("AB\u00e9".encode())
    words[2:4] = ["--prompt-file", str(tmp_path / "prompt")]
    use(capsys, *words, "--output", str(tmp_path / "again"))
    assert (tmp_path / "again").read_bytes() == whole


def test_a_prompt_of_any_bytes_and_a_terminal_without_the_letters_do(made, capsys, tmp_path):
    # As Python hands over what a shell gave that is no UTF-8.
    use(capsys, "generate", made("bytes"), "--prompt", "A\udcff", "--length", "5", "--output", str(tmp_path / "text"))
    assert (tmp_path / "text").read_bytes().startswith(b"A\xff")
    code = "import sys; from fitformer.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "generate", made("bytes"), "--prompt", "\u00e9", "--length", "5"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=environment, capture_output=True, check=True)
    assert done.stdout.startswith(b"\\xe9")
    assert done.stderr == b""


@pytest.mark.parametrize("option", ["--temperature", "--top-p"])
@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
def test_strengths_of_sampling_that_mean_nothing_are_refused(made, capsys, option, value):
    assert option[2:].replace("-", "_") in refusal(capsys, "generate", made("bytes"), option, value)


@pytest.mark.parametrize("value", ["nan", "inf", "-5", "1e30"])
def test_a_strength_of_guidance_that_means_nothing_is_refused(made, capsys, value):
    assert "guidance is" in refusal(capsys, "sample", made("diffuse"), "--count", "1", f"--guidance={value}")


def test_text_without_a_prompt_several_times(made, capsys, tmp_path):
    use(capsys, "generate", made("bytes"), "--count", "2", "--length", "9", "--output", str(tmp_path / "t.txt"))
    texts = [(tmp_path / f"t-0000{k}.txt").read_bytes() for k in range(2)]
    assert [len(text) for text in texts] == [9, 9]
    assert texts[0] != texts[1]


def test_images_are_drawn_pixel_by_pixel(made, capsys, tmp_path):
    words = ["generate", made("pixels"), "--seed", "1"]
    use(capsys, *words, "--count", "3", "--output", str(tmp_path / "all"))
    use(capsys, *words, "--count", "2", "--batch-size", "1", "--output", str(tmp_path / "few"))
    all_, few = images_in(tmp_path / "all"), images_in(tmp_path / "few")
    assert len(all_) == 3
    assert all(np.array_equal(all_[name], image) for name, image in few.items())
    assert {int(level) for image in all_.values() for level in image.flat} <= {round(k * 255 / 16) for k in range(17)}


def test_generating_refuses_what_does_not_fit_the_run(made, capsys):
    assert "--prompt" in refusal(capsys, "generate", made("pixels"), "--prompt", "x")
    assert "--batch-size" in refusal(capsys, "generate", made("bytes"), "--batch-size", "2")
    assert "prompt is empty" in refusal(capsys, "generate", made("bytes"), "--prompt", "")
    assert "no prompt file" in refusal(capsys, "generate", made("bytes"), "--prompt-file", "nowhere")
    assert "temperature is -1" in refusal(capsys, "generate", made("bytes"), "--temperature", "-1")
    assert main(["generate", made("bytes"), "--prompt", "AB", "--temperature", "-1"]) == 2
    assert capsys.readouterr().out == "", "nothing is shown of what cannot be drawn"


def test_a_number_out_of_range_is_said_by_the_parser(made, capsys):
    assert "must be at least 1" in refusal(capsys, "sample", made("diffuse"), "--count", "0")


def test_a_device_that_is_not_there_is_one_error(made, capsys):
    assert "cannot be used" in refusal(capsys, "evaluate", made("classify"), "--device", "nonsense")
    assert "'meta'" in refusal(capsys, "evaluate", made("classify"), "--device", "meta")
