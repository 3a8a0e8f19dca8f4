"""What several test files share."""

from dataclasses import replace

import torch

from fitformer import data
from fitformer.config import load as config
from fitformer.data.dihedral import SYMMETRIES
from fitformer.data.grouping import Grouping
from fitformer.data.symmetry import IDENTITY
from fitformer.tasks import build_model
from fitformer.training import run_dir


def patch_task(monkeypatch, module, **functions):
    """Put other functions in the place of a task's own, such as `loss` or `measure`."""
    monkeypatch.setattr(module, "TASK", replace(module.TASK, **functions))


def grouped(network, image, settings=None):
    """An image as a dataset hands it out for a model of any size."""
    symmetries = (IDENTITY,) if settings is None else SYMMETRIES.get(settings.augmentation, (IDENTITY,))
    return Grouping(network.patch_grid, network.glimpses, settings, symmetries)(image)


def untrained_run(folder, recipe, *overrides, seed=0):
    """A run directory with an exported model of random weights."""
    loaded = config.load(recipe, overrides)
    train, test = (data.build_dataset(loaded.data, split, seed=0) for split in ("train", "test"))
    run = run_dir.start_run(folder, loaded)
    run_dir.write_data_card(run, train, test)
    torch.manual_seed(seed)
    build_model(loaded, train).save_pretrained(run.model_folder)
    return str(run.path)
