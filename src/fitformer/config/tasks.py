"""The tasks there are, and the recipe class of each; nothing is imported until a task's own recipe is asked for."""

import pkgutil
from importlib import import_module
from importlib.util import find_spec

from fitformer._support.suggest import suggest
from fitformer.config.schema import PACKAGED_RECIPES, Recipe
from fitformer.errors import InputError

# Modules of fitformer.tasks that are no tasks; so are those whose name begins with an underscore.
_HELPERS = frozenset({"answers", "batch", "concordance", "image_outputs", "optimizers", "preview", "registry"})


def task_names() -> tuple[str, ...]:
    """Names of all tasks, sorted: the modules of `fitformer.tasks` other than helpers. Imports none of them."""
    package = find_spec("fitformer.tasks")
    assert package is not None
    names = [module.name for module in pkgutil.iter_modules(package.submodule_search_locations)]
    return tuple(sorted(name for name in names if not name.startswith("_") and name not in _HELPERS))


def recipe_class(task: str) -> type[Recipe]:
    """The recipe class of a task, without torch for the packaged tasks.

    Raises:
        InputError: there is no such task; the message lists those there are.
    """
    if task in PACKAGED_RECIPES:
        return PACKAGED_RECIPES[task]
    names = task_names()
    if task not in names:
        raise InputError(f"task is {task!r}; it must be one of {', '.join(names)}{suggest(str(task), names)}")
    # By name: this room comes before the tasks, and a task's module may import torch.
    return import_module(f"fitformer.tasks.{task}").TASK.recipe
