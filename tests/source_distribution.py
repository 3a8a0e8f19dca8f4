"""The tests of another package, from the source distribution of the version that is installed."""

import importlib.metadata
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def source_of_tests(package, scratch):
    """A folder, ignored by git and kept between runs, whose `tests` is that of a package's source distribution."""
    version = importlib.metadata.version(package)
    name = f"{package}-{version}"
    folder = ROOT / "build" / f"{name}-tests"
    if not folder.exists():
        with tarfile.open(_download(package, version, scratch)) as archive:
            inside = [each for each in archive.getmembers() if each.name.startswith(f"{name}/tests/")]
            archive.extractall(scratch, inside, filter="data")
        (scratch / name / "tests" / "__init__.py").touch()
        folder.parent.mkdir(exist_ok=True)
        shutil.move(scratch / name, folder)
    return folder


def _download(package, version, scratch):
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    pip += ["--no-binary", package, f"{package}=={version}", "--dest", str(scratch)]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1]
        pytest.skip(f"the source distribution of {package} {version} cannot be had: {reason}")
    return scratch / f"{package}-{version}.tar.gz"
