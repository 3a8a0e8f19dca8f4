"""The benchmark of slides: what its tasks decide by, and that it runs, goes on and prints its page, at toy sizes."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("one_thread")
FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def slides(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("slides")


@pytest.fixture
def tasks(slides):
    return importlib.import_module("slide_tasks")


def types(tasks, task, label, seed=0):
    """Types of the patches of some slides of a class, (SIDE, SIDE) each."""
    random = np.random.default_rng(seed)
    return [tasks.draw_types(task, random, label) for _ in range(20)]


def touching(tasks, cells, one, other):
    return (tasks.spread(cells == one) & (cells == other)).any()


def inside(tasks, cells):
    """Whether cells that are not A are shut in by A, from above, below and the sides."""
    outside = np.zeros((tasks.SIDE + 2, tasks.SIDE + 2), dtype=bool)
    outside[0] = True
    free = np.pad(cells != tasks.A, 1, constant_values=True)
    while True:
        more = outside.copy()
        for step in tasks.STEPS:
            more |= np.roll(outside, step, (0, 1)) & free
        if (more == outside).all():
            return (free & ~outside).any()
        outside = more


@pytest.mark.parametrize("label", [0, 1])
def test_classes_are_what_the_tasks_say(tasks, label):
    for cells in types(tasks, "neighbours", label):
        assert touching(tasks, cells, tasks.A, tasks.B) == label
        assert [(cells == kind).sum() for kind in (tasks.A, tasks.B, tasks.C)] == [9, 9, 9]
    for cells in types(tasks, "ring", label):
        assert inside(tasks, cells) == label
        # One piece and no loose patches, whose number could give the class away.
        assert pieces(tasks, cells == tasks.A) == 1
    for cells in types(tasks, "clusters", label):
        assert (cells == tasks.A).sum() == 36
        assert (pieces(tasks, cells == tasks.A) > 3) == label
    for cells in types(tasks, "share", label):
        assert ((cells == tasks.A).sum() > tasks.PATCHES / 10) == label
    for cells in types(tasks, "rare", label):
        assert (cells == tasks.B).any() == label
        assert (cells != tasks.ABSENT).sum() == tasks.PATCHES


def pieces(tasks, cells):
    """Connected pieces of some cells."""
    left, count = cells.copy(), 0
    while left.any():
        piece = np.zeros_like(left)
        piece[tuple(np.argwhere(left)[0])] = True
        while (more := tasks.spread(piece) & left).sum() > piece.sum():
            piece = more
        left, count = left & ~piece, count + 1
    return count


def test_slides_are_a_function_of_the_seed(tasks):
    one, again, other = (tasks.draw("share", 4, 0, part) for part in (0, 0, 1))
    assert np.array_equal(one.features, again.features)
    assert not np.array_equal(one.features, other.features)
    pictures, there = one.pictures()
    assert np.array_equal(pictures[there].reshape(one.features.shape), one.features)
    assert not pictures[~there].any()


def test_the_page_of_a_small_run(slides, tmp_path, monkeypatch, capsys):
    pytest.importorskip("torchmil")
    words = ["--output", str(tmp_path), "--tasks", "share", "--models", "FIT;ABMIL", "--seeds", "1", "--steps", "2"]
    words += ["--slides", "16,20,20", "--patches", "0"]

    def page(*more):
        monkeypatch.setattr(sys, "argv", ["slides.py", *words, *more])
        slides.main()
        return capsys.readouterr().out

    first = page()
    rows = [line.strip("| ").split(" | ") for line in first.splitlines() if line.startswith("| share")]
    assert [row[1] for row in rows] == ["FIT", "ABMIL"]
    assert all(0 <= float(row[3]) <= 1 for row in rows)
    kept = {file: file.read_bytes() for file in tmp_path.iterdir()}
    assert len(kept) == 2 * len(slides.RATES)
    # What is there is not done again.
    assert page() == page("--page") == first
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == kept


@pytest.mark.parametrize("name", ["FIT", "FIT, features in memory", "ABMIL", "TransMIL"])
def test_a_step_of_each_model_on_a_file(slides, name, tmp_path):
    if not name.startswith("FIT"):
        pytest.importorskip("torchmil")
    slides.write_slide(tmp_path / "a.h5", 70, 8)
    found = slides.step(name, tmp_path / "a.h5", 2)
    assert found["seconds"] > 0
    assert found["parameters"] == sum(p.numel() for p in slides.STEPS[name](8).parameters())
