"""Starting from saved weights: a new head, other channels and sizes; more steps for a finished run."""

import json

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

import fitformer
from fitformer.cli import main
from fitformer.errors import InputError
from fitformer.models.image_denoiser import FITImageDenoiser
from fitformer.models.image_encoder import FITImageEncoder
from fitformer.models.image_segmenter import FITImageSegmenter

SIZES = {"image_size": (16, 24), "group_size": 8, "patch_size": 4, "channels": 3, "num_classes": 5}


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    encoder = FITImageEncoder.from_preset("tiny", **SIZES)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    encoder.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def states(folder, **options):
    return FITImageEncoder.from_pretrained(folder).state_dict(), FITImageEncoder.from_pretrained(folder, **options)


def test_without_overrides_nothing_changes(folder):
    model = FITImageEncoder.from_pretrained(folder)
    assert str(model.loading_report) == "all weights as they were saved"
    again = FITImageEncoder.from_pretrained(folder, num_classes=5, image_size=(16, 24), drop_path=0.1)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_a_new_head_is_all_that_is_new_and_learns(folder):
    saved, model = states(folder, num_classes=2)
    assert set(model.loading_report.new) == {"head.weight", "head.bias"}
    assert not model.loading_report.resized
    assert model.head.weight.shape == (2, 64)
    assert all(torch.equal(saved[name], t) for name, t in model.state_dict().items() if not name.startswith("head."))
    loss = F.cross_entropy(model(torch.randn(4, 16, 24, 3)), torch.tensor([0, 1, 0, 1]))
    loss.backward()
    assert model.head.weight.grad.abs().sum() > 0
    _, bare = states(folder, num_classes=0)
    assert bare.head is None
    assert set(bare.loading_report.dropped) == {"head.weight", "head.bias"}


def test_other_channels_answer_grey_images_as_before(folder):
    saved = FITImageEncoder.from_pretrained(folder)
    grey = torch.randn(2, 16, 24, 1)
    wanted = saved(grey.expand(-1, -1, -1, 3))
    for channels in (1, 2, 5):
        model = FITImageEncoder.from_pretrained(folder, channels=channels)
        torch.testing.assert_close(model(grey.expand(-1, -1, -1, channels)), wanted, rtol=1e-4, atol=1e-5)
        assert list(model.loading_report.resized) == ["encoder.stem.projection.weight"]
        model.save_pretrained(folder.parent / f"{channels}")
        back = FITImageEncoder.from_pretrained(folder.parent / f"{channels}")
        assert back.config["channels"] == channels


def test_positions_are_interpolated_over_the_grids_of_groups_and_patches(folder):
    saved, model = states(folder, image_size=(32, 32), group_size=16)
    tables = ("encoder.trunk.position.weight", "encoder.trunk.latent_position.weight")
    assert list(model.loading_report.resized) == list(tables)
    for name, before, after in ((tables[0], (2, 2), (4, 4)), (tables[1], (2, 3), (2, 2))):
        cells = rearrange(saved[name], "(r c m) w -> m w r c", r=before[0], c=before[1])
        wanted = F.interpolate(cells, after, mode="bilinear", align_corners=False)
        torch.testing.assert_close(model.state_dict()[name], rearrange(wanted, "m w r c -> (r c m) w"))
    assert all(torch.equal(saved[name], t) for name, t in model.state_dict().items() if name not in tables)
    assert model(torch.randn(1, 32, 32, 3)).shape == (1, 5)


def test_an_image_on_its_side_is_resized_though_the_tables_have_one_shape(folder):
    saved, model = states(folder, image_size=(24, 16))
    name = "encoder.trunk.latent_position.weight"
    assert model.state_dict()[name].shape == saved[name].shape
    assert not torch.equal(model.state_dict()[name], saved[name])


def test_a_decoder_of_more_groups_has_interpolated_latents(tmp_path):
    numbers = {"num_groups": 4, "tokens_per_group": 8, "vocab_size": 7}
    fitformer.FITDecoder.from_preset("tiny", **numbers).save_pretrained(tmp_path)
    model = fitformer.FITDecoder.from_pretrained(tmp_path, num_groups=9)
    assert list(model.loading_report.resized) == ["trunk.latent_position.weight"]
    assert model(torch.zeros(1, 9, 8, dtype=torch.long)).shape == (1, 9, 8, 7)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"heads": 4}, "heads is 2 there and 4 here"),
        ({"dim": 64}, "dim is 32 there and 64 here"),
        ({"patch_size": 2}, "patch_size is 4 there and 2 here"),
        ({"qk_norm": True}, "qk_norm is False there and True here"),
        ({"patch_size": (4, 2)}, r"patch_size is 4 there and \(4, 2\) here"),
        ({"num_clases": 3}, "no arguments num_clases"),
    ],
)
def test_what_weights_cannot_be_adapted_to_is_refused(folder, options, words):
    with pytest.raises(InputError, match=words):
        FITImageEncoder.from_pretrained(folder, **options)


def test_a_default_left_out_of_the_configuration_is_compared_too(folder):
    config = json.loads((folder / "config.json").read_text())
    default = config.pop("qk_norm")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="qk_norm"):
        FITImageEncoder.from_pretrained(folder, qk_norm=not default)
    assert str(FITImageEncoder.from_pretrained(folder, patch_size=(4, 4)).loading_report).startswith("all weights")


def test_a_folder_whose_weights_are_not_those_of_its_config_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "image_size": 24}))
    with pytest.raises(InputError, match=r"latent_position.weight \(24, 64\) instead of \(64, 64\)"):
        FITImageEncoder.from_pretrained(folder, image_size=32)


def test_a_denoiser_keeps_the_meaning_of_its_output(tmp_path):
    options = {"image_size": 16, "group_size": 8, "patch_size": 4, "channels": 1, "num_classes": 3}
    FITImageDenoiser.from_preset("tiny", **options, prediction="v").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="prediction is 'v' there and 'eps' here"):
        FITImageDenoiser.from_pretrained(tmp_path, prediction="eps")
    model = FITImageDenoiser.from_pretrained(tmp_path, num_classes=2, image_size=32, sample_steps=3)
    assert set(model.loading_report.new) == {"denoiser.cond_proj.weight", "denoiser.cond_proj.bias"}
    assert model.sample(2).shape == (2, 32, 32, 1)


def test_reset_classifier_is_saved_with_the_model(folder, tmp_path):
    model = FITImageEncoder.from_pretrained(folder)
    model.reset_classifier(9)
    model.save_pretrained(tmp_path / "nine")
    again = fitformer.from_pretrained(tmp_path / "nine")
    assert isinstance(again, FITImageEncoder)
    assert again.num_classes == 9
    assert torch.equal(again.head.weight, model.head.weight)
    model.reset_classifier(0)
    assert model(torch.zeros(1, 16, 24, 3)).shape == (1, 64)


@pytest.mark.parametrize("num_classes", [5, 0])
def test_a_segmenter_takes_all_but_the_head_of_a_classifier_and_closes_its_trunk(folder, tmp_path, num_classes):
    saved = FITImageEncoder.from_pretrained(folder, num_classes=num_classes).eval()
    saved.save_pretrained(tmp_path / "saved")
    model = FITImageSegmenter.from_pretrained(tmp_path / "saved", num_classes=2, refinement=4)
    assert model.trunk.config.layers == saved.trunk.config.layers + "(1)"
    own, report = model.state_dict(), model.loading_report
    assert all(torch.equal(own[f"backbone.{name}"], t) for name, t in saved.state_dict().items() if "head." not in name)
    new = {name for name in own if name.startswith(("head.", "backbone.encoder.trunk.blocks.2."))}
    assert set(report.new) == new == {name for name in own if name.removeprefix("backbone.") not in saved.state_dict()}
    assert set(report.dropped) == {name for name in saved.state_dict() if name.startswith("head.")}
    assert str(report).startswith("new backbone.encoder.trunk.blocks.2, head.decode.weight")
    # Its data tokens are the classifier's, up to the new block.
    images = torch.randn(2, 16, 24, 3)
    for ours, theirs in zip(
        model.backbone.forward_intermediates(images, [0, 1]), saved.forward_intermediates(images), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    assert model(images).shape == (2, 2, 16, 24)
    model.save_pretrained(tmp_path / "segmenter")
    assert isinstance(fitformer.from_pretrained(tmp_path / "segmenter"), FITImageSegmenter)


def test_a_segmenter_of_other_sizes_and_channels_takes_a_classifiers_weights(folder):
    changes = {"image_size": 32, "group_size": 16, "channels": 1, "layers": "(1)2(1)2(3)"}
    model = FITImageSegmenter.from_pretrained(folder, num_classes=2, **changes)
    assert list(model.loading_report.resized) == [
        f"backbone.encoder.{name}.weight" for name in ("stem.projection", "trunk.position", "trunk.latent_position")
    ]
    assert model(torch.randn(1, 32, 32, 1)).shape == (1, 2, 32, 32)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "needs num_classes"),
        ({"heads": 4}, "heads is 2 there and 4 here"),
        ({"layers": "(1)2(1)"}, r"layers is '\(1\)2\(1\)2' there and '\(1\)2\(1\)' here"),
        ({"layers": "(1)2(1)2(1)2(1)"}, "layers is"),
        ({"patch_size": 2}, "patch_size is 4 there and 2 here"),
    ],
)
def test_what_no_segmenter_can_take_of_a_classifier(folder, options, words):
    with pytest.raises(InputError, match=words):
        FITImageSegmenter.from_pretrained(folder, **options, **({"num_classes": 2} if options else {}))


def test_a_classifier_takes_no_segmenters_weights(folder, tmp_path):
    FITImageSegmenter.from_pretrained(folder, num_classes=2).save_pretrained(tmp_path / "segmenter")
    with pytest.raises(InputError, match="of a FITImageSegmenter, not of a FITImageEncoder"):
        FITImageEncoder.from_pretrained(folder).load_weights(tmp_path / "segmenter")


def test_the_role_is_found_and_named_if_unknown(folder):
    assert isinstance(fitformer.from_pretrained(folder, num_classes=2), FITImageEncoder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "role": "FITNothing"}))
    with pytest.raises(InputError, match="FITNothing"):
        fitformer.from_pretrained(folder)


WORDS = ["--trainer.accelerator=cpu", "--trainer.batch_size=8", "--trainer.validate_batches=0", "--model.layers=(1)1"]


def weights(run):
    return fitformer.from_pretrained(run).state_dict()


def test_a_recipe_starts_from_another_run_and_says_what_is_new(tmp_path, capsys):
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    assert main(["train", "digits-classify", *WORDS, "--trainer.steps=2", "--run-dir", first]) == 0
    words = ["train", "digits-classify", *WORDS, "--data.image_size=16", "--data.resize=stretch", "--trainer.steps=1"]
    words += ["--optimizer.lr=1e-9", "--optimizer.warmup_steps=0", "--run-dir", second]
    capsys.readouterr()
    assert main([*words, "--init-from", first]) == 0
    said = capsys.readouterr().out
    assert "resized encoder.trunk.latent_position.weight" in said
    note = json.loads((tmp_path / "second" / "initial_weights.json").read_text())
    assert note["source"] == first
    assert len(note["sha256"]) == 64
    ours, theirs = weights(second), weights(first)
    torch.testing.assert_close(ours["head.weight"], theirs["head.weight"], rtol=0, atol=1e-6)
    assert main([*words, "--init-from", first]) == 0  # the same command goes on
    (tmp_path / "first").rename(tmp_path / "moved")
    assert main([*words, "--init-from", first]) == 0  # also where its source has gone
    assert main([*words, "--init-from", str(tmp_path / "moved")]) == 0  # or is found elsewhere
    assert main(words) == 0
    (tmp_path / "moved").rename(tmp_path / "first")
    other = str(tmp_path / "other")
    assert main(["train", "digits-classify", *WORDS, "--trainer.steps=1", "--run-dir", other]) == 0
    assert main([*words, "--init-from", other]) == 2
    assert f"began from {first}, not from {other}" in capsys.readouterr().err
    (tmp_path / "second" / "checkpoints" / "last.ckpt").unlink()
    assert main(words) == 2  # nothing is left of the weights that it began from
    assert f"--init-from {first}" in capsys.readouterr().err
    words[-1] = str(tmp_path / "third")
    assert main([*words, "--model.heads=1", "--init-from", first]) == 2
    assert "heads is 4 there and 1 here" in capsys.readouterr().err
    assert not (tmp_path / "third").exists()


def test_a_finished_run_goes_on_with_more_steps_as_if_it_had_never_ended(tmp_path, capsys):
    straight, longer = tmp_path / "straight", tmp_path / "longer"
    harder = ["--trainer.ema=0.9", "--trainer.accumulate=2", "--model.drop_units=0.1", "--model.drop_path=0.1"]
    words = ["train", "digits-classify", *WORDS, *harder, "--optimizer.schedule=constant", "--run-dir"]
    assert main([*words, str(straight), "--trainer.steps=7"]) == 0
    assert main([*words, str(longer), "--trainer.steps=4"]) == 0
    assert main([*words, str(longer), "--trainer.steps=7"]) == 0
    assert "goes on from step 4 of 7" in capsys.readouterr().out
    ours, theirs = weights(longer), weights(straight)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    measured = [json.loads(line)["step"] for line in (longer / "metrics.jsonl").read_text().splitlines()]
    assert measured == [4, 7]  # what the run of 4 steps said at its end stays
    assert main([*words, str(longer), "--trainer.steps=6"]) == 2
    assert "took 7 steps already, and trainer.steps is 6" in capsys.readouterr().err
    assert "steps: 7" in (longer / "recipe.yaml").read_text()


def test_a_stretched_schedule_is_said(tmp_path, capsys):
    words = ["train", "digits-classify", *WORDS, "--optimizer.warmup_steps=0", "--trainer.ema=0"]
    words += ["--run-dir", str(tmp_path / "run")]
    assert main([*words, "--trainer.steps=2"]) == 0
    before = weights(tmp_path / "run")
    assert main([*words, "--trainer.steps=3"]) == 0
    # The first step more has the rate of the longer schedule; the shorter one had come down to nothing.
    assert any(not torch.equal(before[name], tensor) for name, tensor in weights(tmp_path / "run").items())
    assert "cosine schedule runs over 3 steps from here on, instead of 2" in capsys.readouterr().out
