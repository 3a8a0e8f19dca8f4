"""A new task is one file: a module put into the package of tasks trains, is measured, and is named in errors."""

import json
import textwrap

import pytest

import fitformer.tasks
from fitformer.cli import main
from fitformer.config import load
from fitformer.config.tasks import task_names
from fitformer.errors import InputError

# Whether a handwritten digit is even: another label, another head and another metric than `classify` has.
PARITY = '''
"""Parity: whether the class of an image has an even number."""

from dataclasses import dataclass, field
from typing import Literal

import torch.nn.functional as F

from fitformer.config.model_sections import EncoderModel
from fitformer.config.schema import Recipe
from fitformer.data.settings import ImageData
from fitformer.diffusion import pixels_to_signal
from fitformer.models.image_encoder import FITImageEncoder
from fitformer.tasks.batch import arguments
from fitformer.tasks.registry import TaskSpec


@dataclass(frozen=True)
class Objective:
    """Binary cross-entropy."""

    weight: float = 1.0


@dataclass(frozen=True)
class ParityRecipe(Recipe):
    """Learn whether the class of an image is even."""

    task: Literal["parity"] = "parity"
    model: EncoderModel = field(default_factory=EncoderModel)
    data: ImageData = field(default_factory=ImageData)
    objective: Objective = field(default_factory=Objective)


def build(recipe, dataset):
    """An image encoder with one logit."""
    size = {"image_size": recipe.data.image_size, "channels": dataset.channels, "num_classes": 1}
    return FITImageEncoder.from_preset(recipe.model.preset, **size, **arguments(recipe.model))


def loss(network, batch, recipe):
    """Binary cross-entropy in nats."""
    odds = network(pixels_to_signal(batch["image"]))[:, 0]
    even = (batch["label"] % 2 == 0).to(odds.dtype)
    right = ((odds > 0) == even.bool()).float().mean()
    return recipe.objective.weight * F.binary_cross_entropy_with_logits(odds, even), {"right": right}


def measure(network, batch, recipe):
    """Held-out loss, and how often it is right."""
    value, metrics = loss(network, batch, recipe)
    return {"loss": value, **metrics}, len(batch["label"])


TASK = TaskSpec(
    ParityRecipe, FITImageEncoder, build, loss, measure, monitor=("val/right", "max"), find_unused_parameters=True
)
'''


@pytest.fixture
def parity(tmp_path, monkeypatch):
    folder = tmp_path / "more_tasks"
    folder.mkdir()
    (folder / "parity.py").write_text(textwrap.dedent(PARITY))
    monkeypatch.setattr(fitformer.tasks, "__path__", fitformer.tasks.__path__)
    fitformer.tasks.__path__.append(str(folder))
    recipe = tmp_path / "parity.yaml"
    recipe.write_text(
        "task: parity\nmodel: {layers: (1)1, group_size: 4, patch_size: 2}\ndata: {source: digits, image_size: 8}\n"
    )
    yield str(recipe)
    fitformer.tasks.__path__.remove(str(folder))


def test_a_module_in_the_package_is_a_task(parity, tmp_path, capsys):
    assert "parity" in task_names()
    recipe = load.load(parity, ["--objective.weight=0.5"])
    assert recipe.objective.weight == 0.5
    run = tmp_path / "run"
    words = [
        "--trainer.steps=3",
        "--trainer.batch_size=8",
        "--trainer.keep_best=true",
        "--data.validation=0.1",
        "--trainer.accelerator=cpu",
        "--trainer.validate_every=2",
    ]
    assert main(["train", parity, *words, "--run-dir", str(run)]) == 0
    assert (run / "checkpoints" / "best.ckpt").is_file()
    assert "right" in capsys.readouterr().out
    assert main(["evaluate", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["examples"] == 359
    assert 0 <= found["right"] <= 1


def test_errors_name_the_tasks_there_are(parity):
    names = "bytes, classify, diffuse, multilabel, parity, pixels, regress, segment, survival"
    with pytest.raises(InputError, match=rf"{names}.*did you mean 'parity'"):
        load.parse("task: parrity")
