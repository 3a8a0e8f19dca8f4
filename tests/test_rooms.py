"""The import contract: a file imports only from its own room and from rooms that stand before it."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src"
PACKAGE = SOURCE / "fitformer"

# The order of `docs/architecture.md` and of the README's tree.
ROOMS = (
    "errors",
    "_support",
    "patching",
    "diffusion",
    "execution",
    "generation",
    "models",
    "interop",
    "viz",
    "data",
    "config",
    "tasks",
    "profiling",
    "training",
    "inference",
    "evaluation",
    "cli",
)
PURE = ("patching", "diffusion", "execution", "generation", "models")
FORBIDDEN = ("lightning", "torch.distributed", "tifffile", "zarr", "openslide", "h5py")

# (importing module, imported module): why it is still there. An entry whose import is gone fails the test: remove it.
ALLOWED: dict[tuple[str, str], str] = {}


def name_of(path):
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(text):
    """Full names of all that a source text imports, wherever: at the top, in functions, for type checking."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}: write the full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in FORBIDDEN:
            yield ast.unparse(node)


def module_of(name):
    """The module of this package that an imported name lies in; None for `__version__` and for other packages."""
    if name.split(".")[0] != "fitformer" or name == "fitformer.__version__":
        return None
    while name not in MODULES:
        name = name.rpartition(".")[0]
    return name


def room_of(module):
    """The room of a module; None for the package's own `__init__` and `__main__`."""
    room = module.removeprefix("fitformer").strip(".").split(".")[0]
    return room if room in ROOMS else None


def may_import(importer, imported):
    """Whether the order of rooms lets one module import another."""
    inner, outer = room_of(importer), room_of(imported)
    if inner is None:
        return True
    if outer is None:  # the package itself, which re-exports models
        return ROOMS.index(inner) > ROOMS.index("models")
    return ROOMS.index(outer) <= ROOMS.index(inner)


NAMES = {module: set(imports(path.read_text())) for module, path in MODULES.items()}
EDGES = {
    (module, found)
    for module, names in NAMES.items()
    for name in names
    if (found := module_of(name)) is not None and found != module
}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import a.b as c", ["a.b"]),
        ("from a import b, c", ["a.b", "a.c"]),
        ("def f():\n    from a.b import c", ["a.b.c"]),
        ("if TYPE_CHECKING:\n    import a", ["a"]),
        ("import torch\ntorch.distributed.barrier()", ["torch", "torch.distributed"]),
    ],
)
def test_imports_are_found_wherever_they_stand(text, found):
    assert sorted(imports(text)) == found


def test_order_of_rooms_decides():
    assert may_import("fitformer.models.trunk", "fitformer.execution.plain")
    assert may_import("fitformer.data.order", "fitformer.data.masks")
    assert may_import("fitformer.cli.info", "fitformer")
    assert may_import("fitformer.__main__", "fitformer.cli")
    assert not may_import("fitformer.models.trunk", "fitformer.data")
    assert not may_import("fitformer.models.trunk", "fitformer")


def test_every_module_is_in_a_room():
    assert {module for module in MODULES if room_of(module) is None} == {"fitformer", "fitformer.__main__"}


def test_files_import_only_from_rooms_before_their_own():
    wrong = {edge for edge in EDGES if not may_import(*edge)} - ALLOWED.keys()
    assert not wrong, sorted(wrong)


def test_no_import_circle():
    graph = {module: {b for a, b in EDGES - ALLOWED.keys() if a == module} for module in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_allowed_exceptions_are_still_needed():
    assert ALLOWED.keys() <= EDGES, sorted(ALLOWED.keys() - EDGES)


@pytest.mark.parametrize("module", [module for module in MODULES if room_of(module) in PURE])
def test_models_know_no_trainer_processes_or_files(module):
    wrong = [name for name in NAMES[module] if any(f"{name}.".startswith(f"{bad}.") for bad in FORBIDDEN)]
    assert not wrong, wrong


def tree_of_the_readme():
    block = re.search(r"^```\nsrc/fitformer/\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert block
    return [line.split()[0].rstrip("/") for line in block.group(1).splitlines() if line.startswith("  ")]


def test_top_level_is_small_and_is_the_tree_of_the_readme():
    there = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert len(there) <= 20
    assert set(tree_of_the_readme()) == there - {"__init__.py", "py.typed"}


def test_readme_and_architecture_give_the_rooms_in_their_order():
    assert [name.removesuffix(".py") for name in tree_of_the_readme()] == [*ROOMS, "__main__"]
    section = (ROOT / "docs" / "architecture.md").read_text().split("## Rooms\n")[1].split("\n## ")[0]
    assert re.findall(r"^\d+\. `(\w+)`", section, re.MULTILINE) == list(ROOMS)
