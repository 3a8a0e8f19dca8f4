"""The pyramid of maps that timm takes: levels, sizes, ways to run, what is left when it is cut. timm is not needed."""

import pytest
import torch
from torch import nn

import fitformer
from fitformer.errors import InputError
from fitformer.execution import Streamed
from fitformer.interop._pyramid import Pyramid, reductions_of
from fitformer.models.config import TrunkConfig, preset

ANY = {"latent_position": "row_column"}


def pyramid(layers="(1)1(1)1", size=None, group=32, patch=4, seed=0, **options):
    torch.manual_seed(seed)
    trunk = TrunkConfig(layers, **{"dim": 16, "latent_dim": 32, **({} if size else ANY), **options})
    return Pyramid(trunk, size, group, patch, 3)


def images(rows=64, columns=96, batch=2):
    return torch.randn(batch, 3, rows, columns, generator=torch.Generator().manual_seed(1))


def unused(module):
    return [name for name, parameter in module.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize(
    ("group", "patch", "wanted"),
    [(32, 4, [4, 8, 16, 32]), (16, 4, [4, 8, 16]), (24, 4, [4, 8, 24]), (12, 4, [4, 12]), (8, 8, [8])],
)
def test_reductions_double_while_they_divide_a_group(group, patch, wanted):
    assert reductions_of(group, patch) == wanted
    model = pyramid(group=group, patch=patch)
    _, maps = model.maps(images(2 * group, 3 * group), range(len(wanted)))
    assert [level.reduction for level in model.levels] == wanted
    assert [each.shape for each in maps] == [
        (2, level.width, 2 * group // level.reduction, 3 * group // level.reduction) for level in model.levels
    ]


def test_coarser_levels_are_of_later_blocks():
    for blocks, wanted in {1: [0, 0, 0, 0], 2: [0, 1, 1, 1], 3: [0, 1, 2, 2], 4: [1, 2, 3, 3]}.items():
        assert [level.block for level in pyramid("(1)1" * blocks).levels] == wanted


@pytest.mark.parametrize("layers", ["(1)1(1)1", "(1)1(1)"])
@pytest.mark.parametrize("size", [None, (64, 96)])
def test_levels_are_those_of_the_image_encoder(layers, size):
    trunk = TrunkConfig(layers, **({} if size else ANY))
    encoder = fitformer.FITImageEncoder(trunk, size, 32, 4).eval()
    model = Pyramid(trunk, size, 32, 4, 3).eval()
    model.load_state_dict(encoder.state_dict(), strict=False)
    channels_last = images().permute(0, 2, 3, 1)
    last, (finest, *_) = model.maps(images(), [0])
    torch.testing.assert_close(last.mean(dim=(2, 3)), encoder(channels_last))
    wanted = encoder.forward_intermediates(channels_last, [0])[0]
    wanted = wanted if size else torch.stack(wanted)
    torch.testing.assert_close(encoder.encoder.head(finest.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), wanted)


@pytest.mark.parametrize("layers", ["(1)1(1)1", "(1)1(1)"])
def test_every_parameter_has_a_gradient(layers):
    model = pyramid(layers)
    model(images()).sum().backward()
    assert not unused(model)


@pytest.mark.parametrize("way", ["checkpointed", Streamed(slice_groups=2)])
def test_ways_to_run_agree(way):
    results = []
    for execution in ("plain", way):
        model = pyramid().double()
        model.encoder.set_execution(execution)
        last, maps = model.maps(images().double(), [0, 1, 2, 3])
        sum(each.square().sum() for each in (last, *maps)).backward()
        results.append([last, *maps, *(parameter.grad for parameter in model.parameters())])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("layers", ["(1)1(1)1", "(1)1(1)1(1)"])
@pytest.mark.parametrize("level", range(4))
def test_a_pyramid_that_is_cut_has_no_more_than_its_levels_need(layers, level):
    whole, cut = pyramid(layers), pyramid(layers)
    _, (wanted,) = whole.maps(images(), [level])
    cut.cut_to(level, keep_norm=False)
    torch.testing.assert_close(cut(images()), wanted)
    _, (stopped,) = whole.maps(images(), [level], stop=True)
    torch.testing.assert_close(stopped, wanted)
    cut(images()).sum().backward()
    assert not unused(cut)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("size", [None, (64, 96)])
def test_what_torch_script_makes_holds_for_any_batch_and_every_size(size, tmp_path):
    model = nn.Sequential(pyramid(size=size).eval())
    wanted = [(given, model(given)) for given in (images(batch=3), *([] if size else [images(160, 32)]))]
    torch.jit.script(model).save(tmp_path / "model.pt")
    scripted = torch.jit.load(tmp_path / "model.pt")
    for given, answer in wanted:
        torch.testing.assert_close(scripted(given), answer)


@pytest.mark.slow
def test_torch_export_takes_levels_at_any_size():
    class Maps(nn.Module):
        def __init__(self):
            super().__init__()
            self.pyramid = pyramid().eval()

        def forward(self, given):
            return self.pyramid.maps(given, [0, 1, 2, 3])[1]

    rows, columns = (32 * torch.export.Dim(name, min=2, max=64) for name in ("rows", "columns"))
    dims = ({0: torch.export.Dim("batch"), 2: rows, 3: columns},)
    program = torch.export.export(Maps(), (images(64, 96),), dynamic_shapes=dims).module()
    for ours, wanted in zip(program(images(128, 160, 3)), Maps()(images(128, 160, 3)), strict=True):
        torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (images(100, 96), "100.*32.*96 or 128"),
        (torch.zeros(1, 96, 96, 3), r"\(1, 96, 96, 3\).*permute\(0, 3, 1, 2\)"),
        (torch.zeros(1, 1, 96, 96), r"\(1, 1, 96, 96\).*\(b, 3, H, W\)"),
        (torch.zeros(3, 96, 96), r"\(3, 96, 96\)"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "uint8.*float"),
    ],
)
def test_images_that_do_not_fit_are_one_clear_error(given, said):
    with pytest.raises(InputError, match=said):
        pyramid()(given)


def test_a_table_of_positions_is_for_one_size():
    with pytest.raises(InputError, match=r"64 x 64.*64 x 96.*row_column"):
        pyramid(size=(64, 96))(images(64, 64))


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(InputError, match=r"a group of 33.*4.*32 or 36"):
        Pyramid(preset("tiny"), 66, 33, 4, 3)
