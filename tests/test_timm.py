"""FIT among timm's models: timm's own tests, options, weights, and as the encoder of segmentation_models_pytorch.

timm is not in the environment of the other tests (docs/timm.md says why): `make test-timm` makes one for this file.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import fitformer
from fitformer.errors import InputError
from source_distribution import ROOT, source_of_tests

timm = pytest.importorskip("timm", reason="timm is not in this environment; make test-timm makes one that has it")
smp = pytest.importorskip("segmentation_models_pytorch")

from fitformer.interop import timm as ours  # noqa: E402

NAMES = ("fit_tiny", "fit_small", "fit_base", "fit_large")


def environment():
    """Of processes that import fitformer, and torchvision wherever that is."""
    path = filter(None, (str(ROOT / "src"), str(ROOT / "tests"), os.environ.get("PYTHONPATH")))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


def images(rows=64, columns=96, channels=3):
    return torch.randn(2, channels, rows, columns, generator=torch.Generator().manual_seed(0))


def seeded(name="fit_tiny", seed=0, **options):
    torch.manual_seed(seed)
    return timm.create_model(name, **options).eval()


def test_training_is_not_imported():
    code = "import torchvision_operators, sys, fitformer.interop.timm; print('lightning' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_all_sizes_are_registered():
    assert timm.list_models("fit_*", exclude_filters="*.*") == sorted(NAMES)
    assert not timm.list_pretrained("fit_*")


@pytest.mark.slow
def test_timms_own_tests_pass(tmp_path_factory, tmp_path):
    sources = source_of_tests("timm", tmp_path_factory.mktemp("sdist"))
    shutil.copy(Path(__file__).with_name("timm_levels.py"), sources / "tests" / "test_fit.py")
    report = tmp_path / "report.xml"
    plugins = ["-p", "no:cacheprovider", "-p", "torchvision_operators", "-p", "fitformer.interop.timm"]
    options = ["-q", "-c", os.devnull, "--rootdir", str(sources), f"--junitxml={report}", "-k", "fit"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *plugins, *options, "tests/test_models.py", "tests/test_fit.py"],
        cwd=sources,
        env={**environment(), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    assert not [case.get("name") for case in cases if case.find("skipped") is not None]
    assert len([case for case in cases if "test_models" in case.get("classname")]) == 8 * len(NAMES)


def test_levels_and_formats():
    model = seeded(features_only=True, img_size=96, in_chans=4, out_indices=(0, 2, 3))
    assert model.feature_info.reduction() == [4, 16, 32]
    assert model.feature_info.channels() == [32, 32, 64]
    assert [each.shape for each in model(images(channels=4))] == [(2, 32, 16, 24), (2, 32, 4, 6), (2, 64, 2, 3)]
    model = seeded()
    last, (only,) = model.forward_intermediates(images(), indices=1, norm=True, output_fmt="NHWC")
    torch.testing.assert_close(only.permute(0, 3, 1, 2), last)
    assert len(model.forward_intermediates(images(), intermediates_only=True)) == 4
    for wrong in ({"indices": [4]}, {"indices": 5}, {"indices": 0}, {"indices": []}, {"output_fmt": "NLC"}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            model.forward_intermediates(images(), **wrong)


def test_heads():
    model, given = seeded(num_classes=7), images()
    assert model(given).shape == (2, 7)
    pooled = model.forward_head(model.forward_features(given), pre_logits=True)
    torch.testing.assert_close(model.get_classifier()(pooled), model(given))
    model.reset_classifier(0)
    torch.testing.assert_close(model(given), pooled)
    model.reset_classifier(3, "catavgmax")
    assert model(given).shape == (2, 3)
    assert model.head_hidden_size == 2 * model.num_features
    with pytest.raises(InputError, match="num_classes is -1"):
        model.reset_classifier(-1)


@pytest.mark.parametrize("layers", ["(1)1(1)1", "(1)1(1)"])
@pytest.mark.parametrize("size", [None, (64, 96)])
def test_an_image_encoder_answers_as_before(layers, size, tmp_path):
    options = {"layers": layers, "group_size": 32, "patch_size": 8, "channels": 1, "num_classes": 5}
    position = "learned" if size else "row_column"
    encoder = fitformer.FITImageEncoder.from_preset("tiny", image_size=size, latent_position=position, **options).eval()
    encoder.save_pretrained(tmp_path / "fit")
    model, given = ours.from_fit(tmp_path / "fit").eval(), images(channels=1)
    torch.testing.assert_close(model(given), encoder(given.permute(0, 2, 3, 1)))
    # timm's own folders, with another head, and as a pyramid.
    timm.models.save_for_hf(model, tmp_path / "timm", safe_serialization=True)
    folder = f"local-dir:{tmp_path / 'timm'}"
    torch.testing.assert_close(timm.create_model(folder, pretrained=True).eval()(given), model(given))
    other = timm.create_model(folder, pretrained=True, num_classes=3, in_chans=3).eval()
    wanted = encoder(given.permute(0, 2, 3, 1))
    assert other(images()).shape == (2, 3)
    other.reset_classifier(5)
    other.head.fc.load_state_dict(encoder.head.state_dict())
    torch.testing.assert_close(other(given.expand(-1, 3, -1, -1)), wanted)
    maps = timm.create_model(folder, pretrained=True, features_only=True).eval()(given)
    expected = model.forward_intermediates(given, intermediates_only=True)
    for one, same in zip(maps, expected, strict=True):
        torch.testing.assert_close(one, same)


def test_a_table_of_positions_is_resized_to_another_size():
    encoder = fitformer.FITImageEncoder.from_preset("tiny", image_size=64, group_size=32, patch_size=8).eval()
    same = {"latent_position": "learned", "patch_size": 8, "num_classes": 0, "pretrained": True}
    weights = {"state_dict": encoder.state_dict(), "num_classes": 0}
    model = timm.create_model("fit_tiny", img_size=(96, 128), pretrained_cfg_overlay=weights, **same)
    assert model(images(96, 128)).shape == (2, 64)
    with pytest.raises(InputError, match="96 x 128"):
        model(images())


@pytest.mark.parametrize(
    "options",
    [
        {"image_size": (64, 128), "group_size": (32, 64)},
        {"image_size": None, "group_size": 32, "latent_position": "row_column", "glimpses": 1},
        {"image_size": 64, "group_size": 32, "mask": "causal"},
    ],
)
def test_encoders_that_timm_has_no_place_for_are_refused(options):
    encoder = fitformer.FITImageEncoder.from_preset("tiny", patch_size=8, **options)
    with pytest.raises(InputError, match="square"):
        ours.from_fit(encoder)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"img_size": 100}, "100.*32.*96 or 128"),
        ({"group_size": 33}, "33.*4.*32 or 36"),
        ({"latent_position": "learned"}, "learned.*img_size.*row_column"),
        ({"layers": "9"}, "9"),
        ({"dim": "wide"}, "dim is 'wide'"),
        ({"in_chans": 0}, "channels is 0"),
        ({"num_classes": -1}, "num_classes is -1"),
        ({"drop_path_rate": 2}, "drop_path is 2"),
        ({"features_only": True, "out_indices": (0, 9)}, r"\(0, 9\).*4"),
    ],
)
def test_bad_options_are_one_clear_error(options, said):
    with pytest.raises(InputError, match=said) as error:
        timm.create_model("fit_tiny", **options)
    assert "\n" not in str(error.value)


def test_layers_decay_by_depth():
    import timm.optim

    model = seeded(drop_path_rate=0.1)
    assert model.body.encoder.trunk.config.drop_path == 0.1
    groups = timm.optim.create_optimizer_v2(model, "adamw", layer_decay=0.5, weight_decay=0.1).param_groups
    # Two blocks of 1 local layer, read and 2 global layers, the second with write; stem and head.
    assert len({group["lr_scale"] for group in groups}) == 4 + 5 + 2
    names = {name for name, parameter in model.named_parameters() if "position" in name}
    assert model.no_weight_decay() == names
    decayed = {id(each) for group in groups if group["weight_decay"] for each in group["params"]}
    assert not decayed & {id(model.get_parameter(name)) for name in names}


def test_checkpointing_is_a_way_to_run():
    gradients = []
    for enable in (False, True):
        model = seeded(drop_path_rate=0.2).train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(1)
        model(images()).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_scripted_model_leaves_the_model_as_it_is():
    model = seeded()
    scripted = torch.jit.script(model)
    model.set_grad_checkpointing()
    for given in (images(), images(32, 160)[:1]):
        torch.testing.assert_close(scripted(given), model(given))


@pytest.mark.parametrize("name", ["fit_tiny", pytest.param("fit_small", marks=pytest.mark.slow)])
def test_unet_takes_a_step(name):
    torch.manual_seed(0)
    net = smp.Unet(f"tu-{name}", encoder_weights=None, in_channels=4, classes=3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    given, wanted = images(channels=4), torch.randint(3, (2, 64, 96))
    losses = []
    for _ in range(2):
        logits = net(given)
        assert logits.shape == (2, 3, 64, 96)
        losses.append(torch.nn.functional.cross_entropy(logits, wanted))
        optimizer.zero_grad()
        losses[-1].backward()
        assert not [name for name, parameter in net.named_parameters() if parameter.grad is None]
        optimizer.step()
    assert losses[1] < losses[0]
    assert net.eval()(images(160, 32, 4)).shape == (2, 3, 160, 32)


@pytest.mark.parametrize("net", ["FPN", "Linknet", "MAnet", "PSPNet", "Segformer", "UPerNet", "UnetPlusPlus"])
def test_networks_of_segmentation_models(net):
    model = getattr(smp, net)("tu-fit_tiny", encoder_weights=None, classes=2).eval()
    assert model(images()).shape == (2, 2, 64, 96)


def test_weights_of_a_run_are_an_encoder_of_unet(tmp_path):
    encoder = fitformer.FITImageEncoder.from_preset("tiny", image_size=96, group_size=32, patch_size=4, num_classes=5)
    encoder.save_pretrained(tmp_path)
    weights = {"file": str(Path(tmp_path) / "model.safetensors"), "num_classes": 5}
    more = {"latent_position": "learned", "img_size": 96, "pretrained_cfg_overlay": weights}
    net = smp.Unet("tu-fit_tiny", encoder_weights=True, classes=2, **more)
    stem = net.encoder.model.model.body.encoder.stem.projection.weight
    torch.testing.assert_close(stem, encoder.encoder.stem.projection.weight)
