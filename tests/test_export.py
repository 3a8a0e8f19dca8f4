"""Exported models give what the models give: in onnxruntime, and as loaded programs of torch.export."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from tests.helpers import untrained_run
from torch import nn

import fitformer
from fitformer.cli import main
from fitformer.diffusion import DiffusionConfig
from fitformer.errors import InputError, MissingDependencyError
from fitformer.interop import export
from fitformer.models.config import TrunkConfig

# Else it writes under the home folder.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Torch's own, while it compiles.
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method. is deprecated:DeprecationWarning"),
]

SMALL = {"layers": "(1)1", "dim": 8, "latent_dim": 16, "heads": 2, "latent_heads": 2, "latents_per_group": 2}
LARGER = {"layers": "(1)1(1)1", "dim": 16, "latent_dim": 32, "heads": 4, "latent_heads": 2, "latents_per_group": 3}
ANY_SIZE = {"image_size": None, "group_size": (6, 4), "patch_size": 2, "latent_position": "row_column"}
ANY_LENGTH = {"num_groups": None, "tokens_per_group": 4, "vocab_size": 11, "rotary": True}
CLASSES = {"num_classes": 3}


def closed(sizes):
    return {**sizes, "layers": "(1)1(1)" if sizes is SMALL else "(1)1(1)2(1)"}


def image_encoder(sizes=SMALL, **options):
    geometry = {"image_size": 8, "group_size": 4, "patch_size": 2, **CLASSES, **options}
    return fitformer.FITImageEncoder.from_config(**{**sizes, **geometry})


def segmenter(sizes=SMALL, **options):
    geometry = {"image_size": (8, 16), "group_size": 4, "patch_size": 2, **CLASSES, **options}
    return fitformer.FITImageSegmenter.from_config(**{**closed(sizes), "refinement": 4, **geometry})


def image_denoiser(sizes=SMALL, **options):
    return fitformer.FITImageDenoiser(TrunkConfig(**closed(sizes)), DiffusionConfig(), 8, 4, 2, **options)


def decoder(sizes=SMALL, **options):
    geometry = {"num_groups": 5, "tokens_per_group": 4, "vocab_size": 11}
    return fitformer.FITDecoder.from_config(**{**closed(sizes), **geometry, **options})


def encoder(sizes=SMALL, **options):
    return fitformer.FITEncoder.from_config(**{**sizes, "tokens_per_group": 4, "in_channels": 5, **options})


def denoiser(sizes=SMALL, **options):
    geometry = {"num_groups": 3, "tokens_per_group": 4, "out_dim": 5}
    return fitformer.FITDenoiser.from_config(**{**closed(sizes), **geometry, **options})


MODELS = {
    "image encoder": lambda: image_encoder(),
    "image encoder, larger, features": lambda: image_encoder(LARGER, image_size=(8, 16), num_classes=0, qk_norm=True),
    "image encoder that ends in tokens": lambda: image_encoder(closed(LARGER), mask="causal"),
    "images of any size": lambda: image_encoder(**ANY_SIZE),
    "images of any size, glimpses": lambda: image_encoder(closed(LARGER), **ANY_SIZE, glimpses=2),
    "segmenter": lambda: segmenter(),
    "segmenter, larger, no refinement": lambda: segmenter(LARGER, refinement=0, image_size=8),
    "segmenter of any size": lambda: segmenter(**ANY_SIZE),
    "segmenter of any size, larger, glimpses": lambda: segmenter(LARGER, **ANY_SIZE, glimpses=2),
    "image denoiser": lambda: image_denoiser(),
    "image denoiser, larger, classes": lambda: image_denoiser(LARGER, **CLASSES, self_cond="latent"),
    "decoder": lambda: decoder(),
    "decoder, larger, classes": lambda: decoder(LARGER, **CLASSES, shared_embedding=False),
    "decoder of one group": lambda: decoder(num_groups=1),
    "decoder of any length": lambda: decoder(**ANY_LENGTH, latent_position="index"),
    "decoder of any length, window": lambda: decoder(
        LARGER, **ANY_LENGTH, latent_position="shared", global_window=2, **CLASSES
    ),
    "encoder": lambda: encoder(num_groups=3),
    "encoder, larger, any groups": lambda: encoder(
        LARGER, num_groups=None, latent_position="row_column", y_channels=3, mask="causal"
    ),
    "denoiser": lambda: denoiser(),
    "denoiser, larger, condition": lambda: denoiser(LARGER, cond_dim=3, extra_time=1, self_cond="latent"),
}
# Lengths of the axes that are free; none of them is that of the tracing.
LENGTHS = [
    {"batch": 3, "rows": 7, "columns": 30, "length": 20, "groups": 7, "extra": 3},
    {"batch": 1, "rows": 12, "columns": 5, "length": 1, "groups": 2, "extra": 1},
]
ONE_GROUP = {"length": 4}
# Images smaller than a group, which programs of torch.export are not traced for.
TINY = {"batch": 2, "rows": 3, "columns": 4, "length": 2, "groups": 3, "extra": 2}


def drawn(model):
    """The model with weights unlike those that it begins with, in eval mode."""
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return model.eval()


def feeds(description, lengths):
    """Random inputs of an exported file, by what it says of them."""
    found = {}
    for name, port in description["inputs"].items():
        shape = [lengths.get(axis, axis) for axis in port["shape"]]
        if port["dtype"] == "int64":
            found[name] = torch.randint(3, shape)
        else:
            found[name] = torch.rand(shape) if name == "time" else torch.randn(shape)
    return found


def answers(model, inputs):
    """What the plain Python model gives."""
    call = model.logits if isinstance(model, fitformer.FITDecoder) else model
    with torch.no_grad():
        if isinstance(model, fitformer.FITImageSegmenter) and model.patch_grid.any_size:
            return (torch.stack(model(list(inputs["images"]))),)
        return as_tuple(call(*inputs.values()) if len(inputs) == 1 else call(**inputs))


def as_tuple(found):
    return found if isinstance(found, tuple) else (found,)


def assert_near(found, wanted):
    """To 1e-5 of the largest number."""
    assert len(found) == len(wanted)
    for each, right in zip(found, wanted):
        torch.testing.assert_close(each, right, rtol=0, atol=1e-5 * max(1.0, right.abs().max().item()))


def opened_onnx(path):
    """A function of inputs by name, and the description in the file."""
    session = pytest.importorskip("onnxruntime").InferenceSession(path)
    description = json.loads(session.get_modelmeta().custom_metadata_map["fitformer"])
    for ports, kind in ((session.get_inputs(), "inputs"), (session.get_outputs(), "outputs")):
        assert {port.name: port.shape for port in ports} == {
            name: port["shape"] for name, port in description[kind].items()
        }

    def call(inputs):
        return tuple(map(torch.from_numpy, session.run(None, {name: x.numpy() for name, x in inputs.items()})))

    return call, description


def opened_pt2(path):
    files = {"fitformer.json": ""}
    module = torch.export.load(path, extra_files=files).module()
    return lambda inputs: as_tuple(module(**inputs)), json.loads(files["fitformer.json"])


OPENED = {".onnx": opened_onnx, ".pt2": opened_pt2}


def assert_equal(model, path, about=None):
    """Export a model, and compare the file's answers with the model's."""
    said = export.export(model, path, about)
    call, description = OPENED[path.suffix](path)
    assert description == json.loads(json.dumps(said))
    for lengths in LENGTHS + [TINY] * (path.suffix == ".onnx"):
        most = getattr(model, "most_groups", None)
        lengths = {**lengths, **(ONE_GROUP if most == 1 and lengths["length"] > 4 else {})}
        inputs = feeds(description, lengths)
        assert_near(call(inputs), answers(model, inputs))
    return description


@pytest.mark.parametrize("ending", [".onnx", pytest.param(".pt2", marks=pytest.mark.slow)])
def test_a_file_gives_what_the_model_gives_and_says_what_it_takes(ending, tmp_path):
    if ending == ".onnx":
        pytest.importorskip("onnxscript")
    model = drawn(image_encoder())
    description = assert_equal(model, tmp_path / f"model{ending}", {"classes": ["a", "b", "c"]})
    assert description["role"] == "FITImageEncoder"
    assert description["version"] == fitformer.__version__
    assert description["classes"] == ["a", "b", "c"]
    assert description["inputs"]["images"]["shape"] == ["batch", 8, 8, 3]
    assert description["outputs"]["logits"]["shape"] == ["batch", 3]
    # The configuration builds the model again.
    assert fitformer.FITImageEncoder.from_config(description["config"]).config == model.config
    assert [path.name for path in tmp_path.iterdir()] == [f"model{ending}"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ending", "name"),
    # An ONNX file is made of the program that a .pt2 file holds.
    [(".onnx", name) for name in MODELS] + [(".pt2", name) for name in MODELS if "larger" in name or "any" in name],
)
def test_every_role_at_two_sizes(ending, name, tmp_path):
    if ending == ".onnx":
        pytest.importorskip("onnxscript")
    assert_equal(drawn(MODELS[name]()), tmp_path / f"model{ending}")


@pytest.mark.slow
def test_powers_are_torchs_own(tmp_path):
    """A noise level is multiplied by 1000 of them; another library's differ in the last digit."""
    pytest.importorskip("onnxscript")
    wide = {**SMALL, "latent_dim": 384}
    model = drawn(image_denoiser(wide))
    call, description = opened_onnx_of(model, tmp_path / "model.onnx")
    inputs = feeds(description, {"batch": 32})
    inputs["time"] = torch.linspace(0.5, 1, 32)
    wanted = answers(model, inputs)
    torch.testing.assert_close(call(inputs)[0], wanted[0], rtol=0, atol=1e-5)


def opened_onnx_of(model, path):
    export.to_onnx(model, path)
    return opened_onnx(path)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["streamed", "checkpointed"])
def test_the_plain_pass_without_dropout_is_exported_and_the_model_left_as_it_was(way):
    model = drawn(image_encoder(drop_units=0.5))
    images = torch.randn(3, 8, 8, 3)
    wanted = answers(model, {"images": images})
    model.encoder.trunk.train()
    model.set_execution(way)
    before = model.execution, model.encoder.execution
    program = export.to_exported_program(model)
    assert_near(as_tuple(program.module()(images=images)), wanted)
    assert (model.execution, model.encoder.execution) == before
    assert model.trunk.training
    assert not model.training
    assert not model.head.training


@pytest.mark.slow
def test_large_weights_stand_beside_the_graph(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(export, "MOST_INSIDE", 0)
    model = drawn(image_encoder())
    # A second time over the first.
    for _ in range(2):
        assert_equal(model, tmp_path / "model.onnx")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    held = sum(weight.nbytes for weight in model.parameters())
    assert (tmp_path / "model.onnx.data").stat().st_size > held / 2


def with_compiled_layers():
    model = image_encoder()
    model.trunk.blocks[0].compile()
    return model


def with_another_head():
    model = image_encoder()
    model.head = nn.Sequential(model.head)
    return model


def without_weights():
    with torch.device("meta"):
        return image_encoder()


BROKEN = {
    "OptimizedModule": lambda: torch.compile(image_encoder()),
    "compiled layers": with_compiled_layers,
    "bfloat16": lambda: image_encoder().bfloat16(),
    "head": with_another_head,
    "meta": without_weights,
    "Linear": lambda: nn.Linear(2, 2),
}


@pytest.mark.parametrize("word", BROKEN)
def test_what_is_not_exported_is_one_clear_error(word, tmp_path):
    model = BROKEN[word]()
    for ending in export.FORMATS:
        with pytest.raises(InputError, match=word) as error:
            export.export(model, tmp_path / f"model{ending}")
        assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning", "ignore:.*deprecated:UserWarning")
def test_a_quantised_model_is_refused(tmp_path):
    model = torch.ao.quantization.quantize_dynamic(image_encoder().eval(), {nn.Linear})
    with pytest.raises(InputError, match="other weights"):
        export.export(model, tmp_path / "model.pt2")


@pytest.mark.parametrize("path", ["model", "model.pt", "model.onnx.gz", ".onnx", "folder.onnx"])
def test_a_path_that_names_no_file_of_a_format(path, tmp_path):
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(InputError, match=r"(?s)NAME.onnx or NAME.pt2"):
        export.export(image_encoder(), tmp_path / path)


def test_the_other_formats_ending_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"NAME\.pt2"):
        export.to_pt2(image_encoder(), tmp_path / "model.onnx")


def test_facts_that_json_cannot_hold(tmp_path):
    with pytest.raises(InputError, match="about"):
        export.to_pt2(image_encoder(), tmp_path / "model.pt2", {"classes": {"a", "b"}})


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_is_named_with_its_extra(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=rf"{package}.*fitformer\[export\]"):
        export.to_onnx(image_encoder(), tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere", "--output", "m.onnx"], "nowhere"),
        (["nowhere", "--output", "m.bin"], "NAME.onnx or NAME.pt2"),
        (["nowhere"], "--output"),
        (["model", "--output", "m.pt2", "--checkpoint", "best"], "--checkpoint"),
        (["empty", "--output", "m.pt2"], "recipe.yaml"),
    ],
)
def test_bad_input_of_the_command_is_one_line(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    image_encoder().save_pretrained("model")
    assert main(["export", *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert said in lines[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "model"]


def test_the_command_exports_a_model_folder(tmp_path, capsys):
    model = drawn(decoder(num_groups=2))
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "new" / "decoder.pt2"
    assert main(["export", str(tmp_path / "model"), "--output", str(path)]) == 0
    line = capsys.readouterr().out
    assert "FITDecoder, tokens int64 (batch, length) -> logits float32 (batch, length, 11)" in line
    call, description = opened_pt2(path)
    inputs = feeds(description, {"batch": 3, "length": 7})
    assert_near(call(inputs), answers(model, inputs))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "role"),
    [("digits-classify", "FITImageEncoder"), ("digits-diffuse", "FITImageDenoiser"), ("digits-pixels", "FITDecoder")],
)
def test_the_command_exports_a_run_with_its_classes(recipe, role, tmp_path, capsys):
    pytest.importorskip("onnxscript")
    run = untrained_run(tmp_path / "run", recipe)
    path = tmp_path / "model.onnx"
    assert main(["export", run, "--output", str(path)]) == 0
    assert capsys.readouterr().out.startswith(f"{path}: {role}, ")
    call, description = opened_onnx(path)
    assert description["role"] == role
    assert description["data"]["image_size"] is not None
    if recipe == "digits-classify":
        assert description["classes"] == [str(k) for k in range(10)]
    model = fitformer.from_pretrained(run)
    inputs = feeds(description, LENGTHS[0])
    assert_near(call(inputs), answers(model, inputs))
