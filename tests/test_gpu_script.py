"""The one script for GPUs, at tiny sizes on the CPU: every part has rows, and a part that fails loses its own alone."""

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
sys.path.append(str(FOLDER))
import gpu  # noqa: E402


def run(*options):
    command = [sys.executable, str(FOLDER / "gpu.py"), "--tiny", "--device", "cpu", *options]
    return subprocess.run(command, capture_output=True, text=True, check=True)


def sections(page):
    return {part.splitlines()[0]: part for part in page.split("\n## ")[1:]}


def test_parts_write_a_page(tmp_path):
    done = run("--parts", "overlap,generation", "--output", str(tmp_path / "page.md"))
    page = (tmp_path / "page.md").read_text()
    assert page == done.stdout
    assert "--parts overlap,generation" in page
    found = sections(page)
    assert list(found) == [gpu.TITLES["overlap"], gpu.TITLES["generation"]]
    assert "| failed |" not in page
    rows = found[gpu.TITLES["generation"]].splitlines()
    assert float(rows[4].split("|")[3]) > 0
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]


def test_a_part_that_hangs_or_fails_loses_its_own_rows(monkeypatch):
    done = run("--parts", "generation,overlap", "--seconds", "2")
    assert all("| failed" in part for part in sections(done.stdout).values())
    assert "failed: generation, overlap" in done.stderr
    (row,) = gpu.run_part("generation", ["--tiny", "--device", "nowhere"], 60)
    assert row["failed"].startswith("status 1: ")


def test_the_limits_fit_in_eight_minutes():
    assert sum(gpu.LIMITS.values()) < 480
    assert gpu.LIMITS.keys() == gpu.TITLES.keys()


@pytest.mark.slow
def test_every_part_runs():
    done = run()
    found = sections(done.stdout)
    assert list(found) == list(gpu.TITLES.values())
    assert "failed" not in done.stdout
