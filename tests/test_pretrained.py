"""Saved models: whole, strict and offline; the Hub is played by a double, no network is touched."""

import json
import logging

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

import fitformer
from fitformer import FITDecoder, FITDenoiser, FITEncoder, FITImageEncoder
from fitformer.errors import InputError
from fitformer.models import pretrained
from fitformer.models.pretrained import difference, load_strictly

GROUPED = {"num_groups": 2, "tokens_per_group": 4}


def build(role, **options):
    torch.manual_seed(0)
    arguments = {
        FITEncoder: {**GROUPED, "in_channels": 3, "mask": "causal"},
        FITDenoiser: {**GROUPED, "out_dim": 3, "cond_dim": 5, "self_cond": "latent"},
        FITDecoder: {**GROUPED, "vocab_size": 9},
        FITImageEncoder: {"image_size": (8, 16), "group_size": 8, "patch_size": 4, "num_classes": 3},
    }[role]
    return role.from_preset("tiny", **{**arguments, **options})


@pytest.fixture
def folder(tmp_path):
    build(FITDecoder).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("role", [FITEncoder, FITDenoiser, FITDecoder, FITImageEncoder])
def test_what_is_saved_comes_back(role, tmp_path, capsys, caplog):
    model = build(role, position="sin_cos", drop_path=0.1)
    model.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        again = role.from_pretrained(tmp_path)
    assert not again.training
    assert again.config == json.loads(json.dumps(model.config))
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    assert capsys.readouterr() == ("", "")
    assert not caplog.records


def test_a_saved_model_is_found_by_its_role(folder):
    role = json.loads((folder / "config.json").read_text())["role"]
    assert isinstance(getattr(fitformer, role).from_pretrained(str(folder)), FITDecoder)


def test_the_trainable_and_the_given_survive(folder):
    model = FITDecoder.from_pretrained(folder, drop_path=0.5)
    assert model.config["drop_path"] == 0.5
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert FITDecoder.from_pretrained(folder, map_location="meta").embedding.weight.device.type == "meta"


def test_saving_again_keeps_the_readers_words_and_leaves_no_scraps(folder):
    (folder / "README.md").write_text("my own words")
    build(FITDecoder, vocab_size=12).save_pretrained(folder)
    assert (folder / "README.md").read_text() == "my own words"
    assert FITDecoder.from_pretrained(folder).vocab_size == 12
    assert len(list(folder.iterdir())) == 3


def test_a_failed_save_leaves_the_last_good_one(folder, monkeypatch):
    def full(state, path, **options):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(pretrained, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        build(FITDecoder, vocab_size=12).save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_model_card(folder):
    card = (folder / "README.md").read_text()
    head, body = card.split("---\n")[1:3]
    for words in ("library_name: fitformer", "license: apache-2.0", "arxiv:2305.12689"):
        assert words in head
    count = sum(parameter.numel() for parameter in build(FITDecoder).parameters())
    for words in ("fitformer.FITDecoder.from_pretrained(", f"{count:,} parameters", "Chen and Li"):
        assert words in body
    assert "{{" not in card


# What does not fit ----------------------------------------------------------------------------------------------------


def refuses(folder, *words, role=FITDecoder, error=InputError, **options):
    with pytest.raises(error) as caught:
        role.from_pretrained(folder, **options)
    for word in words:
        assert word in str(caught.value)


def edit_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_another_role(folder):
    refuses(folder, "holds a FITDecoder, not a FITEncoder: load it with fitformer.FITDecoder", role=FITEncoder)


def test_a_config_with_an_unknown_key(folder):
    edit_config(folder, lambda config: config.update(relative=True))
    refuses(folder, "FITDecoder has no arguments relative", str(folder))


def test_a_config_that_lacks_a_key(folder):
    edit_config(folder, lambda config: config.pop("vocab_size"))
    refuses(folder, "FITDecoder needs vocab_size", str(folder))


@pytest.mark.parametrize("text", ['{"role": "FITDec', "", "[1, 2]", "\x00"])
def test_a_config_that_is_none(folder, text):
    (folder / "config.json").write_text(text)
    refuses(folder, "config.json")


def test_a_misspelt_option(folder):
    refuses(folder, "FITDecoder has no arguments map_locaton", map_locaton="cpu")
    refuses(folder, "FITDecoder has no arguments strict", strict=False)


@pytest.mark.parametrize("size", [0, 4, 1000, -1])
def test_truncated_weights(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refuses(folder, "is not a whole safetensors file", str(path))


def test_weights_of_another_architecture(folder):
    path = folder / "model.safetensors"
    state = load_file(path)
    del state["norm.bias"]
    state["stranger"] = torch.zeros(1)
    state["output_bias"] = torch.zeros(4)
    save_file(state, path)
    refuses(
        folder,
        "1 missing: norm.bias; 1 unknown: stranger; 1 misshapen: output_bias (4,) instead of (9,)",
        "does not fit this FITDecoder",
    )


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_without_the_file(folder, name):
    (folder / name).unlink()
    refuses(folder, f"is not a saved model: it has no {name}", error=FileNotFoundError)


def test_a_refused_state_leaves_the_model_as_it_was():
    model = build(FITDecoder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = {name: tensor + 1 for name, tensor in before.items()}
    state.pop("norm.weight")
    with pytest.raises(InputError, match=r"x.ckpt does not fit this FITDecoder: 1 missing: norm.weight"):
        load_strictly(model, state, "x.ckpt")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_difference_names_only_some_of_many():
    wanted = {f"w{i}": (2,) for i in range(9)}
    assert difference({}, wanted, most=2) == "9 missing: w0, w1 and 7 more"
    assert difference(wanted, wanted) == ""


def test_an_argument_that_json_cannot_hold(tmp_path):
    model = build(FITDecoder, vocab_size=np.int64(9))
    with pytest.raises(InputError, match="arguments that JSON cannot hold: vocab_size"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


# The Hub, played ------------------------------------------------------------------------------------------------------


class PlayedHub:
    """What a push uploads, kept in a folder."""

    def __init__(self, root):
        self.root, self.calls = root, []

    def __call__(self, token=None):
        self.token = token
        return self

    def create_repo(self, repo_id, **options):
        self.calls.append(("create", repo_id, options))
        return type("Url", (), {"repo_id": repo_id})

    def upload_folder(self, *, repo_id, folder_path, **options):
        self.calls.append(("upload", repo_id, options))
        for path in folder_path.iterdir():
            target = self.root / repo_id / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
        return f"hub:{repo_id}"

    def download(self, repo_id, filename, **options):
        self.calls.append(("download", filename, options))
        path = self.root / repo_id / filename
        if not path.is_file():
            raise EntryNotFoundError(filename) if (self.root / repo_id).is_dir() else LocalEntryNotFoundError(filename)
        return str(path)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    played = PlayedHub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", played)
    monkeypatch.setattr("fitformer.models.pretrained.hf_hub_download", played.download)
    return played


def test_pushed_and_fetched(hub):
    model = build(FITDenoiser)
    assert model.push_to_hub("me/fit", private=True, token="t", commit_message="First") == "hub:me/fit"
    assert hub.token == "t"
    assert hub.calls[0][:2] == ("create", "me/fit")
    assert hub.calls[0][2]["private"] is True
    assert hub.calls[1][2]["commit_message"] == "First"
    assert 'from_pretrained("me/fit")' in (hub.root / "me/fit" / "README.md").read_text()

    again = FITDenoiser.from_pretrained("me/fit", revision="abc", local_files_only=True)
    assert hub.calls[-1] == ("download", "model.safetensors", {"revision": "abc", "local_files_only": True})
    for ours, value in zip(again.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(ours, value)


def test_saved_and_pushed_at_once(hub, tmp_path):
    model = build(FITEncoder)
    assert model.save_pretrained(tmp_path / "fit") is None
    assert model.save_pretrained(tmp_path / "fit", push_to_hub=True) == "hub:fit"
    assert model.save_pretrained(tmp_path / "fit", push_to_hub=True, repo_id="me/x", token="t") == "hub:me/x"
    assert {path.name for path in (hub.root / "me/x").iterdir()} == {"config.json", "model.safetensors", "README.md"}


def test_a_repository_without_the_file(hub):
    build(FITDecoder).push_to_hub("me/fit")
    (hub.root / "me/fit" / constants.SAFETENSORS_SINGLE_FILE).unlink()
    refuses("me/fit", "me/fit on the Hub is not a saved model: it has no model.safetensors", error=FileNotFoundError)


def test_offline_and_not_in_the_cache(hub):
    refuses("me/absent", "me/absent", error=FileNotFoundError)


def test_a_model_that_is_neither_here_nor_within_reach():
    with pytest.raises(FileNotFoundError, match="there is no folder nobody/nothing, and no copy"):
        FITEncoder.from_pretrained("nobody/nothing", local_files_only=True)
    with pytest.raises(FileNotFoundError, match="there is no folder runs/digits/model, and it cannot be a name"):
        FITEncoder.from_pretrained("runs/digits/model")


def test_an_option_of_the_trunk_is_saved_and_is_a_default_where_a_folder_lacks_it(tmp_path):
    numbers = {"num_groups": 2, "tokens_per_group": 4, "vocab_size": 5}
    FITDecoder.from_preset("tiny", **numbers, qk_norm=True).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["qk_norm"] is True
    again = FITDecoder.from_pretrained(tmp_path)
    assert again.trunk.config.qk_norm
    assert any("query_norm" in name for name in again.state_dict())
    FITDecoder.from_preset("tiny", **numbers).save_pretrained(tmp_path)
    edit_config(tmp_path, lambda config: config.pop("qk_norm"))
    assert not FITDecoder.from_pretrained(tmp_path).trunk.config.qk_norm
