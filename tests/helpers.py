"""What several test files share."""

from dataclasses import replace

import h5py
import numpy as np
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


TRIDENT = {"patch_size": 256, "patch_size_level0": 512, "level0_magnification": 40, "target_magnification": 20}


def write_features(path, features, coords, attributes=TRIDENT, **options):
    """A feature file as TRIDENT writes it: HDF5, or a Zarr group."""
    if path.suffix == ".zarr":
        # Imported here: a machine that runs the tests of GPUs may lack it.
        import zarr

        group = zarr.open_group(str(path), mode="w")
        for name, array in (("features", features), ("coords", coords)):
            chunks = options.get("chunks", array.shape) if name == "features" else array.shape
            group.create_array(name, shape=array.shape, dtype=array.dtype, chunks=chunks)[...] = array
        group["coords"].attrs.update(attributes)
        return path
    with h5py.File(path, "w") as file:
        file.create_dataset("features", data=features, **options)
        file.create_dataset("coords", data=coords).attrs.update(attributes)
    return path


def slide_of_features(rows=9, columns=12, width=5, share=0.6, step=512, corner=(1024, 2048), seed=0, dtype="float32"):
    """A picture (rows, columns, width) of features, NaN where there is no patch, and its file's arrays in any order."""
    random = np.random.default_rng(seed)
    there = random.random((rows, columns)) < share
    # So that the picture is as large as the grid.
    there[0, 0] = there[-1, -1] = True
    down, across = random.permutation(np.argwhere(there)).T
    features = random.normal(size=(len(down), width)).astype(dtype)
    picture = np.full((rows, columns, width), np.nan, "float32")
    picture[down, across] = features
    return picture, features, np.stack([corner[0] + across * step, corner[1] + down * step], axis=1)
