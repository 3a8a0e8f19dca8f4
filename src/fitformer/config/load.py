"""Recipes: read from YAML with dotted overrides, written back, compared. `config.schema` says what they hold.

Nothing slow is imported here: the command line checks a recipe before it waits for torch.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from fitformer.config.schema import TASKS, ByteRecipe, ClassifyRecipe, DiffuseRecipe, PixelRecipe, Recipe
from fitformer.errors import InputError

HARMLESS = frozenset(
    {
        "data.num_workers",
        "trainer.devices",
        "trainer.accelerator",
        "trainer.checkpoint_every",
        "trainer.validate_every",
        "trainer.validate_batches",
        "trainer.log_every",
        "trainer.previews",
        "trainer.keep_best",
        "trainer.compile",
        "trainer.execution",
        "trainer.keep",
        "trainer.slice_groups",
        "trainer.recompute",
        "trainer.scratch",
        "trainer.memory",
    }
)
"""Keys that may change when a run is taken up again: they do not change what is learned, save for rounding."""


def load(recipe: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by name (see `names`) or by the path of a YAML file, then apply overrides.

    Args:
        recipe: e.g. `digits-classify` or `my/recipe.yaml`.
        overrides: `--trainer.steps=100`, `--trainer.steps 100` (two items) or `trainer.steps=100`.

    Raises:
        InputError: no such recipe, an unknown key (the nearest is named), a value of another type or out of range.
    """
    return parse(read_text(recipe), overrides, where=recipe)


def parse(text: str, overrides: Sequence[str] = (), where: str = "the recipe") -> Recipe:
    """The same as `load` from the YAML text itself; `where` names it in errors."""
    given = _read_yaml(text, where)
    kind = _kind(given, where)
    pairs = split_overrides(overrides)
    leaves = _leaves(kind)
    for key, _ in flatten(given):
        _check_key(key, leaves, where)
    for key, _ in pairs:
        _check_key(key, leaves, "the command line")
    values = _typed(kind, given, pairs)
    try:
        return _build(kind, values)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def dump(recipe: Recipe) -> str:
    """A recipe as YAML, every key spelt out; `parse(dump(recipe)) == recipe`."""
    return yaml.safe_dump(_plain(asdict(recipe)), sort_keys=False, allow_unicode=True, width=120)


def differences(old: Recipe, new: Recipe) -> dict[str, tuple[Any, Any]]:
    """Keys, other than `HARMLESS` ones, on which two recipes differ, each with both values."""
    left, right = dict(flatten(_plain(asdict(old)))), dict(flatten(_plain(asdict(new))))
    keys = [key for key in left | right if key not in HARMLESS]
    return {key: (left.get(key), right.get(key)) for key in keys if left.get(key) != right.get(key)}


def names() -> tuple[str, ...]:
    """Names of the recipes packaged with the library, sorted."""
    folder = files("fitformer.config").joinpath("recipes")
    return tuple(sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".yaml")))


def listing() -> Iterator[tuple[str, str, str]]:
    """Name, task and first line of the head comment of every packaged recipe."""
    for name in names():
        text = read_text(name)
        comment = next((line.lstrip("# ") for line in text.splitlines() if line.startswith("#")), "")
        yield name, yaml.safe_load(text)["task"], comment


def read_text(recipe: str) -> str:
    """The YAML of a recipe given by name or by path.

    Raises:
        InputError: neither a packaged recipe nor a file of text; the nearest name is given.
    """
    if recipe in names():
        return files("fitformer.config").joinpath("recipes", f"{recipe}.yaml").read_text(encoding="utf-8")
    path = Path(recipe)
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{recipe} is no recipe: it is not text in UTF-8 ({error})") from None
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise InputError(f"no recipe file {recipe!r}")
    raise InputError(f"no recipe {recipe!r}{_nearest(recipe, names())}; `fitformer train --list` shows them all")


def split_overrides(overrides: Sequence[str]) -> list[tuple[str, str]]:
    """Overrides in any of their three spellings as pairs of key and text.

    Raises:
        InputError: an item that is none of them.
    """
    pairs, rest = [], list(overrides)
    while rest:
        item = rest.pop(0)
        key, equals, value = item.removeprefix("--").partition("=")
        if not equals and item.startswith("--") and rest:
            equals, value = "=", rest.pop(0)
        if not (key and equals):
            raise InputError(f"override {item!r}: write --section.key=value, for example --trainer.steps=100")
        pairs.append((key, value))
    return pairs


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings under dotted keys."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read_yaml(text: str, where: str) -> dict[str, Any]:
    try:
        given = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{where} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(given, dict):
        raise InputError(f"{where} holds no keys; a recipe is a mapping that starts with task: {'|'.join(TASKS)}")
    # A section's heading with nothing under it is a section of defaults.
    return {key: value for key, value in given.items() if value is not None}


def _kind(given: Mapping[str, Any], where: str) -> type[Recipe]:
    # One parser a task: in a union of dataclasses jsonargparse takes the first that has the overridden key.
    task = given.get("task")
    if task not in TASKS:
        raise InputError(f"{where}: task is {task!r}; it is one of {', '.join(TASKS)}{_nearest(str(task), TASKS)}")
    if task != "autoregress":
        return ClassifyRecipe if task == "classify" else DiffuseRecipe
    objective = given.get("objective")
    kind = objective.get("kind", "pixels") if isinstance(objective, Mapping) else "pixels"
    if kind not in ("pixels", "bytes"):
        raise InputError(f"{where}: objective.kind is {kind!r}; it is pixels or bytes{_nearest(str(kind), ('bytes',))}")
    return PixelRecipe if kind == "pixels" else ByteRecipe


def _leaves(kind: type) -> Mapping[str, Any]:
    """Dotted keys of a recipe's leaves, and their types."""
    leaves: dict[str, Any] = {}
    hints = get_type_hints(kind)
    for item in fields(kind):
        hint = hints[item.name]
        if is_dataclass(hint):
            leaves |= {f"{item.name}.{key}": leaf for key, leaf in _leaves(hint).items()}  # type: ignore[arg-type]
        else:
            leaves[item.name] = hint
    return leaves


def _check_key(key: str, leaves: Mapping[str, Any], where: str) -> None:
    if key in leaves:
        return
    sections = {leaf.split(".")[0] for leaf in leaves if "." in leaf}
    if key in sections:
        raise InputError(f"{where}: {key} is a section; set one of its keys, such as {_keys_of(key, leaves)}")
    # The last part alone also counts: somebody who writes `steps` means `trainer.steps`.
    by_name = {leaf.split(".")[-1]: leaf for leaf in leaves}
    near = get_close_matches(key, leaves, 1, 0.75) or [
        by_name[name] for name in get_close_matches(key.split(".")[-1], by_name, 1)
    ]
    hint = f"; did you mean {near[0]!r}?" if near else f"; there are the sections {', '.join(sorted(sections))}"
    raise InputError(f"{where}: unknown key {key!r}{hint}")


def _keys_of(section: str, leaves: Mapping[str, Any]) -> str:
    return ", ".join([leaf for leaf in leaves if leaf.startswith(section + ".")][:3])


def _typed(kind: type, given: dict[str, Any], pairs: list[tuple[str, str]]) -> Any:
    """Values of the right types, by jsonargparse: defaults, then the file, then the overrides."""
    # Only here: reading the list of recipes must not wait for it.
    from argparse import ArgumentError

    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, as_group=False)
    try:
        values = parser.parse_object(given)
        for key, text in pairs:
            values = parser.parse_args([f"--{key}={text}"], namespace=values)
    except ArgumentError as error:
        raise InputError(_one_line(str(error), _leaves(kind))) from None
    return values


def _one_line(message: str, leaves: Mapping[str, Any]) -> str:
    key = re.search(r'Parser key "([^"]+)"', message)
    value = re.search(r"(?:Got|Given) value: (.*)", message, re.DOTALL)
    if key is None or value is None or key[1] not in leaves:
        return " ".join(message.split())
    wanted = re.sub(r"typing\.|<class '(\w+)'>", r"\1", str(leaves[key[1]])).replace("NoneType", "null")
    return f"{key[1]} is {value[1].strip()!r}; expected {wanted.replace('None', 'null')}"


def _build(kind: type, values: Any) -> Any:
    hints = get_type_hints(kind)
    built = {
        item.name: _build(hints[item.name], values[item.name]) if is_dataclass(hints[item.name]) else values[item.name]
        for item in fields(kind)
    }
    return kind(**built)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _nearest(word: str, words: Sequence[str]) -> str:
    near = get_close_matches(word, words, 1)
    return f" (did you mean {near[0]!r}?)" if near else ""
