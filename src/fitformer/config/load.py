"""Reading recipes from YAML with dotted overrides, writing and comparing them; `config.schema` defines their fields.

This module imports neither torch nor numpy, so that the command line checks a recipe at once.
"""

import re
from argparse import ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from fitformer._support.suggest import nearest, suggest
from fitformer.config.schema import Recipe
from fitformer.config.tasks import recipe_class, task_names
from fitformer.errors import InputError

# Rows and columns, as the command line takes sizes everywhere.
_SIDES = re.compile(r"(\d+)[xX](\d+)")

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
"""Keys that may differ when a run is resumed: apart from rounding, they do not change the result.

Devices only as long as they leave a step as many examples, which training checks: `auto` does not say how many.
"""


def load(recipe: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by name (see `names`) or by the path of a YAML file, then apply overrides.

    Args:
        recipe: e.g. `digits-classify` or `my/recipe.yaml`.
        overrides: `--trainer.steps=100`, `--trainer.steps 100` (two items) or `trainer.steps=100`.

    Raises:
        InputError: no such recipe, an unknown key (the message suggests the most similar one), a value of the wrong
            type or out of range.
    """
    return parse(read_text(recipe), overrides, where=recipe)


def parse(text: str, overrides: Sequence[str] = (), where: str = "the recipe") -> Recipe:
    """Read a recipe from its YAML text; `where` names it in errors.

    Raises:
        InputError: as `load`.
    """
    given = _read_yaml(text, where)
    try:
        kind = recipe_class(str(given.get("task")))
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    written, pairs, leaves = dict(flatten(given)), split_overrides(overrides), _leaves(kind)
    for source, keys in ((where, written), ("the command line", dict(pairs))):
        for key in keys:
            _check_key(key, leaves, source)
    try:
        values = {key: _typed(key, leaves[key], value) for key, value in written.items()}
        values |= {key: _typed(key, leaves[key], value, from_text=True) for key, value in pairs}
        return _build(kind, values)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def dump(recipe: Recipe) -> str:
    """A recipe as YAML with every key; `parse(dump(recipe)) == recipe`."""
    return yaml.safe_dump(_plain(asdict(recipe)), sort_keys=False, allow_unicode=True, width=120)


def differences(old: Recipe, new: Recipe) -> dict[str, tuple[Any, Any]]:
    """Keys, other than `HARMLESS` ones, whose values differ between two recipes, each with both values."""
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
        InputError: neither a packaged recipe nor a text file; the message suggests the most similar name.
    """
    if recipe in names():
        return files("fitformer.config").joinpath("recipes", f"{recipe}.yaml").read_text(encoding="utf-8")
    path = Path(recipe)
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{recipe} is not a recipe: it is not UTF-8 text ({error})") from None
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise InputError(f"no recipe file {recipe!r}")
    hint = suggest(recipe, names())
    raise InputError(f"no recipe {recipe!r}{hint}; `fitformer train --list` shows all recipes")


def split_overrides(overrides: Sequence[str]) -> list[tuple[str, str]]:
    """Overrides, in any of the three spellings, as pairs of key and text.

    Raises:
        InputError: an item in none of the spellings.
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
    """Yield the leaves of nested mappings with their dotted keys."""
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
    except RecursionError:
        raise InputError(f"{where} nests deeper than a recipe can; its sections hold plain values and lists") from None
    if not isinstance(given, dict):
        raise InputError(
            f"{where} holds no keys; a recipe is a mapping that starts with task: {'|'.join(task_names())}"
        )
    # A section without keys keeps its defaults.
    return {key: value for key, value in given.items() if value is not None}


def _leaves(kind: type) -> Mapping[str, Any]:
    """Types of a recipe's leaves by dotted key."""
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
    # A key without its section also counts: `steps` suggests `trainer.steps`.
    by_name = {leaf.rpartition(".")[2]: leaf for leaf in leaves}
    near = nearest(key, leaves, 0.75) or by_name.get(nearest(key.rpartition(".")[2], by_name) or "")
    hint = f"did you mean {near!r}?" if near else f"the sections are {', '.join(sorted(sections))}"
    raise InputError(f"{where}: unknown key {key!r}; {hint}")


def _keys_of(section: str, leaves: Mapping[str, Any]) -> str:
    return ", ".join([leaf for leaf in leaves if leaf.startswith(section + ".")][:3])


def _typed(key: str, kind: Any, value: Any, from_text: bool = False) -> Any:
    """A value as the type of its key, by jsonargparse; `from_text` for the text of an override."""
    # Imported here: listing the recipes does not need it.
    from jsonargparse import ArgumentParser

    # jsonargparse takes None for any type.
    if value is None and kind is not Any and type(None) not in get_args(kind):
        raise InputError(f"{key} is null; expected {_type_name(kind)}")
    if isinstance(value, str) and tuple[int, int] in get_args(kind) and (sides := _SIDES.fullmatch(value)):
        value, from_text = [int(side) for side in sides.groups()], False
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=kind)
    try:
        parsed = parser.parse_args([f"--value={value}"]) if from_text else parser.parse_object({"value": value})
    except ArgumentError:
        raise InputError(f"{key} is {str(value)!r}; expected {_type_name(kind)}") from None
    return parsed.value


def _type_name(kind: Any) -> str:
    """A type as it is written in code, with YAML's null for None."""
    name = kind.__name__ if isinstance(kind, type) else str(kind)
    return re.sub(r"\btyping\.|\bNone(Type)?\b", lambda match: "" if match[0] == "typing." else "null", name)


def _build(kind: type, values: Mapping[str, Any], prefix: str = "") -> Any:
    """An instance of a recipe or section from typed leaves by dotted key; fields without a leaf keep their default."""
    hints, given = get_type_hints(kind), {}
    for item in fields(kind):
        key = f"{prefix}{item.name}"
        if is_dataclass(hints[item.name]):
            given[item.name] = _build(hints[item.name], values, f"{key}.")
        elif key in values:
            given[item.name] = values[key]
    return kind(**given)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value
