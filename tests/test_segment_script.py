"""The benchmark of huge label maps: what it counts at borders, and that it runs beside MONAI, if that is installed."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("one_thread")
FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("segment_huge")


def run(script, monkeypatch, capsys, *options):
    sizes = ["--side", "96", "--preset", "tiny", "--group-size", "32", "--patch-size", "8", "--tile", "64"]
    monkeypatch.setattr(sys, "argv", ["segment_huge.py", *sizes, *options])
    script.main()
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_changes_are_counted_at_borders_and_at_the_other_edges_of_patches(script):
    labels = np.zeros((4, 32), np.uint8)
    labels[:, 16:] = 1
    labels[:1, 24:] = 2
    labels[:, 3] = 3  # within a patch
    assert script.changes(labels, [0, 16, 32], patch=8) == {"there": 1, "elsewhere": 0.125}


def test_windows_overlap_by_a_quarter_and_the_last_ends_with_the_image(script):
    assert script.window_borders(2048, 1024) == [768, 1024, 1792]  # of windows from 0, 768 and 1024
    assert script.window_borders(1024, 1024) == []


def test_streamed_plain_and_tiles_are_compared(script, monkeypatch, capsys):
    *_, compared = run(script, monkeypatch, capsys, "--compare", "--no-step")
    assert compared["pixels_unlike_plain"] == 0
    assert 0 < compared["tiles_unlike_plain"] < 1


def test_without_monai_one_error_says_what_to_install(script, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "monai.inferers", None)
    with pytest.raises(SystemExit, match="pip install monai"):
        run(script, monkeypatch, capsys, "--monai")


def test_a_window_of_monai_that_holds_the_whole_image_gives_the_label_map(script, monkeypatch, capsys):
    pytest.importorskip("monai")
    *_, compared = run(script, monkeypatch, capsys, "--monai", "--compare", "--tile", "96")
    assert compared["windows_unlike_whole"] == 0
    *_, compared = run(script, monkeypatch, capsys, "--monai", "--compare")
    assert compared["windows_unlike_whole"] > 0
