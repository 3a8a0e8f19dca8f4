import json
from dataclasses import asdict

import pytest

from fitformer import FITDecoder, FITImageDenoiser, FITImageEncoder
from fitformer.cli import main
from fitformer.cli.info import short
from fitformer.models.config import TrunkConfig
from fitformer.profiling import flops

SIZE = {"dim": 8, "latent_dim": 8, "heads": 1, "latent_heads": 1, "latents_per_group": 2}


def info(capsys, *words):
    assert main(["info", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refusal(capsys, *words):
    assert main(["info", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fitformer: error: ")
    assert err.count("\n") == 1
    return err


def test_a_preset_is_cut_as_asked(capsys):
    words = ["--role", "encoder", "--image-size", "512x256", "--patch-size", "16", "--group-size", "128"]
    found = info(capsys, "small", *words)
    assert found["role"] == "FITImageEncoder"
    assert (found["groups"]["num_groups"], found["groups"]["tokens_per_group"]) == (8, 64)
    assert sum(part["parameters"] for part in found["parts"]) == found["parameters"]


def test_a_denoiser_knows_its_classes_and_a_decoder_its_length(capsys):
    assert (
        info(capsys, "tiny", "--role", "denoiser")["parameters"]
        < (info(capsys, "tiny", "--role", "denoiser", "--num-classes", "10")["parameters"])
    )
    of_bytes = info(capsys, "tiny", "--role", "decoder", "--length", "128", "--tokens-per-group", "32")
    of_pixels = info(capsys, "tiny", "--role", "decoder", "--image-size", "8", "--patch-size", "4", "--channels", "2")
    for found in (of_bytes, of_pixels):
        assert (found["groups"]["num_groups"], found["groups"]["tokens_per_group"]) == (4, 32)
    assert info(capsys, "tiny", "--layers", "(3)2", "--dim", "64")["groups"]["layers"] == "(3)2"


CHANGED = {
    "layers": "(2)1", "dim": 64, "latent_dim": 32, "heads": 4, "latent_heads": 2, "latents_per_group": 8,
    "position": "sin_cos", "latent_position": "sin_cos", "mlp_ratio": 2.0, "drop_path": 0.1, "drop_units": 0.1,
    "drop_att": 0.1, "x_self_attention": False, "xattn_with_mlp": True, "xattn_enc_ln": False, "qk_norm": True,
    "rotary": True, "global_window": 2,
}  # fmt: skip


@pytest.mark.parametrize("option", TrunkConfig.names())
def test_every_option_of_the_trunk_is_taken(capsys, option):
    value = CHANGED[option]
    flag = "--" + ("no-" if value is False else "") + option.replace("_", "-")
    role = ["--role", "decoder"] if option == "global_window" else []
    found = info(capsys, "tiny", *role, flag, *([] if isinstance(value, bool) else [str(value)]))
    if option == "global_window":
        assert found["role"] == "FITDecoder"
        model = FITDecoder.from_preset("tiny", num_groups=1024, tokens_per_group=192, vocab_size=256, global_window=2)
    else:
        model = FITImageEncoder.from_preset("tiny", image_size=256, group_size=64, patch_size=8, **{option: value})
    assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert found["flops"] == asdict(flops(model))


def test_a_saved_denoiser_of_images_is_shown(capsys, tmp_path):
    cut = {"image_size": 8, "group_size": 4, "patch_size": 2}
    model = FITImageDenoiser.from_preset("tiny", **cut)
    assert "sigmoid" in model.diffusion.train_schedule  # A schedule that evaluates its ends when it is built.
    model.save_pretrained(tmp_path)
    assert info(capsys, str(tmp_path))["parameters"] == sum(each.numel() for each in model.parameters())


def test_a_saved_model_and_a_run_are_what_they_are(capsys, tmp_path):
    model = FITImageEncoder.from_config(layers="(1)1", image_size=8, group_size=4, patch_size=2, num_classes=3, **SIZE)
    model.save_pretrained(tmp_path / "run" / "model")
    found = info(capsys, str(tmp_path / "run"))
    assert found == info(capsys, str(tmp_path / "run" / "model"))
    assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())


def test_a_saved_decoder_of_any_length_is_shown_at_a_length(capsys, tmp_path):
    model = FITDecoder.from_preset(
        "tiny",
        num_groups=None,
        tokens_per_group=16,
        vocab_size=8,
        latent_position="index",
        global_window=4,
        rotary=True,
    )
    model.save_pretrained(tmp_path)
    assert "add --length" in refusal(capsys, str(tmp_path))
    short, long = (info(capsys, str(tmp_path), "--length", str(length)) for length in (100, 64_000))
    assert (short["groups"]["num_groups"], long["groups"]["num_groups"]) == (7, 4000)
    assert long["flops"] == asdict(flops(model, num_groups=4000))
    FITDecoder.from_preset("tiny", num_groups=3, tokens_per_group=16, vocab_size=8).save_pretrained(tmp_path / "table")
    assert "--length is for presets" in refusal(capsys, str(tmp_path / "table"), "--length", "64")


def test_a_saved_model_of_any_size_is_shown_at_a_size(capsys, tmp_path):
    cut = {"group_size": 32, "patch_size": 8, "num_classes": 2, "latent_position": "row_column"}
    FITImageEncoder.from_preset("tiny", image_size=None, **cut).save_pretrained(tmp_path)
    assert "add --image-size" in refusal(capsys, str(tmp_path))
    assert info(capsys, str(tmp_path), "--image-size", "96x64")["groups"]["num_groups"] == 6


def test_tables_name_every_part(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["info", "tiny", "--num-classes", "10"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("groups t", "block 1 read", "block 2 global x 2", "head", "FLOPs", "all"))


def test_what_cannot_be_shown_is_refused_in_one_line(capsys, tmp_path):
    assert "is no preset (tiny, slide, small, base, large)" in refusal(capsys, "smal")
    assert "has no config.json" in refusal(capsys, str(tmp_path))
    assert "--length does not apply to this encoder" in refusal(capsys, "tiny", "--length", "5")
    assert info(capsys, "tiny", "--role", "decoder", "--length", "100")["groups"]["num_groups"] == 2
    (tmp_path / "config.json").write_text("{}")
    assert "--dim is for presets" in refusal(capsys, str(tmp_path), "--dim", "8")
    assert "there is no role" in refusal(capsys, str(tmp_path))
    (tmp_path / "config.json").write_text('{"role": "FITDecoder", "colour": 1}')
    assert "FITDecoder has no arguments colour" in refusal(capsys, str(tmp_path))
    (tmp_path / "config.json").write_text('{"role": ')
    assert "is not the configuration of a model" in refusal(capsys, str(tmp_path))


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (999, "999"), (1000, "1k"), (1234567, "1.23M"), (22.3e9, "22.3G")]
)
def test_large_numbers_are_short(count, text):
    assert short(count) == text


@pytest.mark.parametrize(
    "content",
    [b"[1]", b"3", b"{", b"\xff\xfe", b"[" * 10**5, b"", b'{"role": []}', b'{"role": "FITEncoder", "layers": 5}'],
)
def test_a_configuration_that_is_none_is_one_clear_error(content, tmp_path, capsys):
    from fitformer.cli import main

    (tmp_path / "config.json").write_bytes(content)
    assert main(["info", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("fitformer: error: ")
    assert said.count("\n") == 1
