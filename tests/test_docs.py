"""What the README and the docs say to type works: Python blocks are run, commands are parsed, files exist."""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest

from fitformer.cli import VERBS
from fitformer.config import load as config

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_file_tree_of_the_readme_is_the_tree():
    text = (ROOT / "README.md").read_text()
    block = re.search(r"^```\nsrc/fitformer/\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert block
    named = {line.split()[0].rstrip("/") for line in block.group(1).splitlines() if line.startswith("  ")}
    source = ROOT / "src" / "fitformer"
    there = {path.name for path in source.iterdir() if path.name not in ("__init__.py", "__pycache__", "py.typed")}
    assert named == there


def test_every_test_named_in_the_architecture_exists():
    for name in re.findall(r"`(test_\w+\.py)`", (ROOT / "docs" / "architecture.md").read_text()):
        assert (ROOT / "tests" / name).is_file(), name
