"""The GPU report's script, at toy sizes on the CPU: every part has rows, and a bad part loses only its own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("gpu_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), "--tiny", "--device", "cpu", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows_of(page, part):
    section = page.split(f"## {part}:")[1].split("\n## ")[0]
    return [line for line in section.splitlines() if line.startswith("|")][2:]


def python(code):
    return [sys.executable, "-c", code]


def test_one_part_is_measured_printed_and_written(tmp_path):
    page = run("--parts", "generation", "--output", str(tmp_path / "page.md"))
    assert len(rows_of(page, "generation")) == 8
    assert "Failed parts: none" in page
    assert (tmp_path / "page.md").read_text() == page.removesuffix("\n")
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]


@pytest.mark.slow
def test_every_part_has_rows_and_none_fails(gpu):
    page = run("--limit", "600")
    assert "Failed parts: none" in page
    counts = {part: len(rows_of(page, part)) for part in gpu.PARTS}
    assert counts == {
        "equality": 3 * 8 * 2,
        "mfu": 2 * 3,
        "huge": 1,
        "overlap": 1,
        "compile": 1,
        "generation": 2 * 2 * 2,
        "bf16": 3 * 8 + 1,
        "tests": 1,
    }


def test_a_part_that_hangs_keeps_the_rows_it_had(gpu):
    code = 'import time; print(\'{"run": "first"}\', flush=True); time.sleep(600)'
    first, failed = gpu.run_part(python(code), 2)
    assert first == {"run": "first"}
    assert "limit" in failed["failed"]


@pytest.mark.parametrize("code", ["raise ValueError('broken')", "import os; os.abort()", "print('no row')"])
def test_a_part_that_ends_badly_is_one_row(gpu, code):
    (row,) = gpu.run_part(python(code), 60)
    assert row["failed"]


def test_other_parts_go_on_after_a_bad_one_and_the_total_is_bounded(gpu, monkeypatch):
    given = iter([[{"failed": "broken"}], [{"run": "good"}]])
    monkeypatch.setattr(gpu, "run_part", lambda command, limit: next(given))
    found = gpu.measure(["equality", "mfu"], "cpu", True, 60)
    assert found == {"equality": [{"failed": "broken"}], "mfu": [{"run": "good"}]}
    assert "Failed parts: equality." in gpu.page(found, [])
    (row,) = gpu.measure(["mfu"], "cpu", True, 0)["mfu"]
    assert "not started" in row["failed"]


def test_copies_are_hidden_where_kernels_run(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    parts = importlib.import_module("gpu_parts")
    assert parts.covered([(0, 4), (10, 12)], [(1, 2), (1.5, 3), (11, 20)]) == 3
    assert parts.covered([(0, 4)], []) == 0
