import pytest
import torch
from PIL import Image

from fitformer import FITImageEncoder
from fitformer.errors import InputError
from fitformer.models.layers import CrossLayer
from fitformer.viz import as_colour, heat, latent_attention, metric_curves, overlay, write_curves

SIZE = {"dim": 8, "latent_dim": 12, "heads": 2, "latent_heads": 2, "latents_per_group": 3}


def encoder(layers="(1)1(1)1"):
    torch.manual_seed(0)
    return FITImageEncoder.from_config(
        layers=layers, image_size=(8, 16), group_size=(8, 4), patch_size=(2, 1), channels=1, **SIZE
    ).eval()


@pytest.mark.parametrize("context_norm", [True, False])
def test_weights_reproduce_the_output_of_the_layer(context_norm):
    torch.manual_seed(0)
    layer = CrossLayer(6, 10, 4, 2, context_norm=context_norm)
    x, context = torch.randn(2, 3, 6), torch.randn(2, 5, 10)
    normed = layer.context_norm(context) if context_norm else context
    value = layer.attention.value(normed).unflatten(-1, (2, 2)).transpose(1, 2)
    attention = (layer.weights(x, context) @ value).transpose(1, 2).flatten(2)
    torch.testing.assert_close(x + layer.attention.output(attention), layer(x, context))


def test_maps_have_the_image_size_and_average_one_in_every_group():
    maps = latent_attention(encoder(), torch.rand(2, 8, 16, 1))
    assert maps.shape == (2, 2, 8, 16)
    in_groups = maps.unflatten(-1, (4, 4)).mean(dim=(-3, -1))
    torch.testing.assert_close(in_groups, torch.ones_like(in_groups))
    assert maps.std() > 0


def test_map_is_highest_at_the_odd_patch():
    model = encoder("(0)1")
    read = model.trunk.blocks[0].read
    images = torch.zeros(1, 8, 16, 1)
    images[0, 2:4, 5] = 5.0
    with torch.no_grad():
        model.trunk.position.weight.zero_()
        # All queries are the same vector, along the odd patch's key: only keys decide.
        read.attention.query.weight.zero_()
        x = model.encoder.embed(model.patch_grid.group(images)).flatten(0, 1)
        kinds, counts = torch.unique(x.flatten(0, 1), dim=0, return_counts=True)
        odd = kinds[counts.argmin()]
        read.attention.query.bias.copy_(10 * read.attention.key(read.context_norm(odd)))
    found = latent_attention(model, images)[0, 0, :, 4:8] > 1
    assert found[2:4, 1].all()
    assert found.sum() == 2


def test_hooks_are_removed_after_an_error():
    model = encoder()
    with pytest.raises(InputError, match=r"\(1, 8, 8, 1\)"):
        latent_attention(model, torch.rand(1, 8, 8, 1))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_encoder_without_global_layers_is_an_error():
    with pytest.raises(InputError, match="global layers"):
        latent_attention(encoder("(2)"), torch.rand(1, 8, 16, 1))


def test_heat_rises_in_brightness_and_is_clamped():
    colours = heat(torch.linspace(-1, 2, 50)).float().sum(-1)
    assert (colours.diff() >= 0).all()
    assert torch.equal(heat(torch.tensor([-1.0, 2.0])), heat(torch.tensor([0.0, 1.0])))


def test_overlay_is_brightest_where_the_map_is_highest():
    maps = torch.rand(3, 4, 5)
    pictures = overlay(torch.full((3, 4, 5, 1), 100, dtype=torch.uint8), maps)
    assert pictures.shape == (3, 4, 5, 3)
    assert torch.equal(pictures.float().sum(-1).flatten(1).argmax(1), maps.flatten(1).argmax(1))
    with pytest.raises(InputError, match=r"\(3, 4, 5\).*\(3, 4, 6, 1\)"):
        overlay(torch.zeros(3, 4, 6, 1, dtype=torch.uint8), maps)


def test_as_colour():
    grey = torch.randint(0, 256, (2, 3, 4, 1), dtype=torch.uint8)
    assert torch.equal(as_colour(grey)[..., 2], grey[..., 0])
    assert as_colour(torch.zeros(1, 2, 2, 4)).shape == (1, 2, 2, 3)


def test_curves_are_complete_files_or_none(tmp_path):
    path = tmp_path / "curves.png"
    lines = [{"step": 1, "a": 2.0}, {"step": 2, "a": 1.0, "b": 3.0}, {"step": 3, "b": 2.0}]
    curves = metric_curves(lines, "a", "b", "never")
    assert curves == {"a": ([1, 2], [2.0, 1.0]), "b": ([2, 3], [3.0, 2.0])}
    write_curves(path, curves, y="loss", log=True)
    with Image.open(path) as drawn:
        assert drawn.size == (720, 420)
    with pytest.raises(InputError, match=r"'a' has 1 .* 2 "):
        write_curves(tmp_path / "no.png", {"a": ([1], [1, 2])})
    with pytest.raises(InputError, match="no curves"):
        write_curves(tmp_path / "no.png", {})
    assert [file.name for file in tmp_path.iterdir()] == ["curves.png"]
