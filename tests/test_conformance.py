"""The published architecture, to floating-point accuracy: numbers that the authors' implementation computed.

`conformance/*.npz` are facts measured on the reference (github.com/google-research/pix2seq), tiny models with random
weights; see docs/architecture.md. Diffusion and grouping have theirs in test_diffusion.py and test_grouping.py.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fitformer import official
from fitformer.execution import checkpointed, plain

FILES = sorted((Path(__file__).parent / "conformance").glob("[ade]*_*.npz"))


def load(path):
    archive = np.load(path)
    meta = json.loads(str(archive["meta"]))
    part = {prefix: {} for prefix in ("input", "variable", "gradient", "output")}
    for key in archive.files:
        prefix, _, name = key.partition("/")
        if prefix in part:
            part[prefix][name] = archive[key]
    return meta, part


def call(model, inputs):
    tensors = {name: torch.as_tensor(array) for name, array in inputs.items()}
    if "tokens" in tensors:
        return (model(tensors["tokens"].long()),)
    return model(**tensors)


def test_the_files_are_there():
    assert len(FILES) == 4


@pytest.mark.parametrize("run", [plain, checkpointed], ids=str)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_reference(path, run):
    meta, part = load(path)
    model = official.build(meta["kind"], meta["kwargs"], part["variable"])
    model.set_execution(run)
    assert not model.training
    outputs = call(model, part["input"])
    loss = outputs[0].sin().sum() + (0.5 * outputs[1].sin().sum() if len(outputs) > 1 else 0)
    loss.backward()

    expected = [value for name, value in part["output"].items() if name != "loss"]
    for output, value in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(output.detach().numpy(), value, rtol=0, atol=1e-4)
    np.testing.assert_allclose(loss.item(), part["output"]["loss"], rtol=1e-5, atol=1e-4)
    gradients = official.gradients(model)
    assert gradients.keys() == part["gradient"].keys()
    # A key's bias moves every score of a query alike, so its true gradient is 0: both sides hold rounding alone there.
    rounding = 1e-7 * max(np.abs(value).max() for value in part["gradient"].values())
    for name, value in part["gradient"].items():
        error = np.abs(gradients[name] - value).max()
        assert error <= (20 * rounding if name.endswith("key/bias:0") else 1e-3 * np.abs(value).max()), name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_variables_round_trip(path):
    meta, part = load(path)
    back = official.variables(official.build(meta["kind"], meta["kwargs"], part["variable"]))
    assert back.keys() == part["variable"].keys()
    for name, array in part["variable"].items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)
