"""A model of slides as TRIDENT's slide encoder: the embedding that the library gives of the same file."""

import sys
import types

import h5py
import numpy as np
import pytest
import torch
from torch import nn

from fitformer import FITImageEncoder
from fitformer.data.readers import open_image
from fitformer.errors import EmptyImageError, InputError
from fitformer.inference.trident import slide_encoder
from helpers import TRIDENT, slide_of_features, write_features

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH = 5


class BaseSlideEncoder(nn.Module):
    """As TRIDENT makes it: what is built comes from `_build`, and is frozen."""

    def __init__(self, freeze=True, **build_kwargs):
        super().__init__()
        self.enc_name = None
        self.model, self.precision, self.embedding_dim = self._build(**build_kwargs)
        if freeze and self.model is not None:
            for parameter in self.model.parameters():
                parameter.requires_grad = False
            self.model.eval()

    def forward(self, batch):
        return self.model(batch)


@pytest.fixture(params=["installed", "not installed"])
def trident(request, monkeypatch):
    """A stand-in for TRIDENT's module of slide encoders, or nothing."""
    if request.param == "not installed":
        # A name that leads nowhere.
        monkeypatch.setitem(sys.modules, "trident", None)
        return None
    load = types.ModuleType("trident.slide_encoder_models.load")
    load.BaseSlideEncoder, load.slide_to_patch_encoder_name = BaseSlideEncoder, {"titan": "conch_v15"}
    package, models = types.ModuleType("trident"), types.ModuleType("trident.slide_encoder_models")
    package.slide_encoder_models, models.load = models, load
    for module in (package, models, load):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return load


@pytest.fixture
def saved(tmp_path):
    return str(save(tmp_path / "model"))


def save(folder, **options):
    torch.manual_seed(0)
    geometry = {"image_size": None, "group_size": 4, "patch_size": 1, "channels": WIDTH, "num_classes": 3, **options}
    FITImageEncoder.from_preset("tiny", latent_position="row_column", **geometry).save_pretrained(folder)
    return folder


def pipeline(encoder, path):
    """What TRIDENT's pipeline does with a file of patch features and a slide encoder."""
    encoder.to("cpu")
    encoder.eval()
    with h5py.File(path) as file:
        coords, features, attributes = file["coords"][:], file["features"][:], dict(file["coords"].attrs)
    batch = {
        "features": torch.from_numpy(features).float().unsqueeze(0),
        "coords": torch.from_numpy(coords).unsqueeze(0),
        "attributes": attributes,
    }
    with torch.inference_mode():
        return encoder(batch, "cpu")


@pytest.mark.parametrize("options", [{}, {"glimpses": 1}, {"layers": "(2)"}], ids=str)
@pytest.mark.parametrize("overlap", [0, 128])
def test_the_embedding_is_that_of_the_file(trident, options, overlap, tmp_path):
    _, features, coords = slide_of_features(step=512 - 2 * overlap)
    path = write_features(tmp_path / "a.h5", features, coords, {**TRIDENT, "overlap": overlap})
    encoder = slide_encoder(save(tmp_path / "model", **options), "mine", patch_encoder="uni_v2")
    found = pipeline(encoder, path)
    model = FITImageEncoder.from_pretrained(tmp_path / "model")
    with torch.inference_mode(), open_image(path) as image:
        logits, head = model([image]), model.head
        model.reset_classifier(0)
        expected = model([image])
        torch.testing.assert_close(head(found), logits)
    assert torch.equal(found, expected)
    assert found.shape == (1, encoder.embedding_dim)


def test_it_has_what_the_pipeline_asks_for(trident, saved):
    encoder = slide_encoder(saved, "mine", patch_encoder="uni_v2")
    assert (encoder.enc_name, encoder.precision) == ("mine", torch.float32)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    if trident is not None:
        assert isinstance(encoder, BaseSlideEncoder)
        assert trident.slide_to_patch_encoder_name == {"titan": "conch_v15", "mine": "uni_v2"}


def test_what_is_no_slide_is_one_clear_error(trident, saved, tmp_path):
    encoder = slide_encoder(saved)
    coords = torch.tensor([[[0, 0], [512, 0]]])

    def given(features, coords=coords):
        with torch.inference_mode():
            encoder({"features": features, "coords": coords, "attributes": TRIDENT}, "cpu")

    with pytest.raises(EmptyImageError, match="the batch has no patches"):
        given(torch.zeros(1, 0, WIDTH), torch.zeros(1, 0, 2))
    with pytest.raises(InputError, match=r"the batch has features of shape \(2, 2, 5\)"):
        given(torch.zeros(2, 2, WIDTH), torch.zeros(2, 2, 2))
    with pytest.raises(InputError, match=r"has 7 channels, the model was built for 5"):
        given(torch.zeros(1, 2, 7))
    with pytest.raises(InputError, match=r"patch 1 .* are NaN"):
        given(torch.tensor([0.0, np.nan])[None, :, None].expand(1, 2, WIDTH))
    geometry = {"image_size": 8, "group_size": 4, "patch_size": 1}
    FITImageEncoder.from_preset("tiny", **geometry).save_pretrained(tmp_path / "one-size")
    with pytest.raises(InputError, match="images of any size"):
        slide_encoder(tmp_path / "one-size")
    with pytest.raises(InputError, match="no run directory"):
        slide_encoder(tmp_path / "none")
