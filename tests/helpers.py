"""What several test files share."""

from dataclasses import replace

from fitformer.data.dihedral import SYMMETRIES
from fitformer.data.grouping import Grouping
from fitformer.data.symmetry import IDENTITY


def patch_task(monkeypatch, module, **functions):
    """Put other functions in the place of a task's own, such as `loss` or `measure`."""
    monkeypatch.setattr(module, "TASK", replace(module.TASK, **functions))


def grouped(network, image, settings=None):
    """An image as a dataset hands it out for a model of any size."""
    symmetries = (IDENTITY,) if settings is None else SYMMETRIES.get(settings.augmentation, (IDENTITY,))
    return Grouping(network.patch_grid, network.glimpses, settings, symmetries)(image)
