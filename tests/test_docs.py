"""README and docs work as written: Python blocks run, commands parse, links and the reference lead somewhere."""

import argparse
import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
import yaml

from fitformer.cli import VERBS
from fitformer.config import load as config

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
GUIDES = sorted(DOCS.glob("*.md"))
REFERENCE = sorted((DOCS / "reference").glob("*.md"))
SOURCE = ROOT / "src" / "fitformer"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *GUIDES]
PLACEHOLDER = re.compile(r"\b[A-Z]{3,}\b")


def commands():
    """Every `fitformer VERB ...` line of a page's code blocks that has no placeholder in capitals."""
    for page in PAGES:
        for line in re.findall(r"^(?:    |\$ )?(?:\$ )?(fitformer .+)$", page.read_text(), re.MULTILINE):
            words = shlex.split(line, comments=True)[1:]
            if not any(PLACEHOLDER.fullmatch(word) for word in words):
                yield pytest.param(words, id=f"{page.name}: {line[:60]}")


def recipe_commands():
    for name in config.names():
        line = re.search(r"^# command: fitformer (.+)$", config.read_text(name), re.MULTILINE)
        assert line, f"{name} says no command"
        yield pytest.param(shlex.split(line.group(1)), id=name)


def parser_of(verb):
    module = importlib.import_module(f"fitformer.cli.{verb}")
    parser = argparse.ArgumentParser(exit_on_error=False)
    module.add_arguments(parser)
    return parser


@pytest.mark.parametrize("words", [*commands(), *recipe_commands()])
def test_commands_parse(words):
    verb, *rest = words
    assert verb in VERBS
    arguments, unknown = parser_of(verb).parse_known_args(rest)
    if verb == "train" and arguments.recipe:
        assert config.load(arguments.recipe, unknown)
    else:
        assert not unknown


# What the examples of a page need; they take long, or only the slow tests install it.
NEEDED = {"transformers.md": "transformers", "export.md": "onnxruntime", "timm.md": "timm"}


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.slow] * (page.name in NEEDED), id=page.name) for page in PAGES]
)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    if page.name in NEEDED:
        pytest.importorskip(NEEDED[page.name])
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)


def links(page):
    """Files that a page links to."""
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
    return [(page.parent / target).resolve() for target in targets]


@pytest.mark.parametrize(
    "page", [*PAGES, *REFERENCE, *sorted((DOCS / "spec").glob("*.md"))], ids=lambda page: page.name
)
def test_links_lead_somewhere(page):
    for target in links(page):
        assert target.exists(), target


def test_readme_links_every_guide():
    assert set(GUIDES) <= set(links(ROOT / "README.md"))


def test_index_and_navigation_lead_to_every_page():
    pages = set(DOCS.rglob("*.md"))
    assert set(links(DOCS / "index.md")) >= pages - {DOCS / "index.md"}
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert sorted(DOCS / name for name in leaves(nav)) == sorted(pages)


def leaves(nav):
    if isinstance(nav, str):
        return [nav]
    return [leaf for part in (nav.values() if isinstance(nav, dict) else nav) for leaf in leaves(part)]


def public_modules():
    """Every module whose name and folders are public, but for the command line, which is documented by its help."""
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        if not any(part.startswith("_") for part in parts) and parts[0] != "cli":
            yield ".".join(("fitformer", *parts))


def test_reference_has_every_room_and_module_once():
    named = [(page, name) for page in REFERENCE for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)]
    for page, name in named:
        assert name.split(".")[1] == page.stem
        path = ROOT.joinpath("src", *name.split("."))
        assert path.with_suffix(".py").is_file() or (path / "__init__.py").is_file(), f"{page.name}: no module {name}"
    names = [name for _, name in named]
    assert len(names) == len(set(names))
    rooms = {f"fitformer.{page.stem}" for page in REFERENCE}
    missing = ({*public_modules()} | rooms) - set(names)
    assert not missing, f"docs/reference/ lacks: {sorted(missing)}"


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_docstrings_describe_arguments_that_exist(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            unknown = described(node) - taken(node)
            assert not unknown, f"{node.name} takes no {', '.join(sorted(unknown))}"


def described(node):
    """Names in the section Args of a docstring; several may share a line."""
    section = re.search(r"^Args:\n((?:    .*\n?|\n)+)", ast.get_docstring(node) or "", re.MULTILINE)
    lines = re.findall(r"^    (\w[\w, ]*):", section[1], re.MULTILINE) if section else []
    return {name for line in lines for name in line.split(", ")}


def taken(node):
    """Names of a function's parameters, or of those of a class's constructor."""
    if isinstance(node, ast.ClassDef):
        made = [part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"]
        return {name for function in made for name in taken(function)}
    args = node.args
    named = [*args.posonlyargs, *args.args, *args.kwonlyargs, *filter(None, (args.vararg, args.kwarg))]
    return {arg.arg for arg in named}


SCRIPTS = sorted(path for folder in ("benchmarks", "examples") for path in (ROOT / folder).glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_import_names_that_exist(script):
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "fitformer":
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name) or importlib.import_module(f"{node.module}.{alias.name}")


def test_every_test_named_in_the_architecture_exists():
    for name in re.findall(r"`(test_\w+\.py)`", (DOCS / "architecture.md").read_text()):
        assert (ROOT / "tests" / name).is_file(), name


def test_every_file_named_in_the_architecture_exists():
    text = (DOCS / "architecture.md").read_text().split("## Rooms")[0]
    for name in re.findall(r"`(\w+/[\w/]*(?:\.py)?)`", text):
        assert (SOURCE / name).exists() or (ROOT / name).exists() or (DOCS / name).exists(), name
