"""transformers' own common tests pass over FITForCausalLM, but for those that docs/transformers.md explains."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from xml.etree import ElementTree

import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("parameterized")

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
NAME = f"transformers-{transformers.__version__}"
# Ignored by git, and kept between runs.
FOLDER = ROOT / "build" / f"{NAME}-tests"
INI = "[pytest]\naddopts = --import-mode=importlib\nfilterwarnings = ignore::pytest.PytestUnknownMarkWarning\n"


def pip_download(folder):
    """The source distribution of the transformers that is installed."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    pip += ["--no-binary", "transformers", f"transformers=={transformers.__version__}", "--dest", str(folder)]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the source distribution of {NAME} cannot be had: {done.stderr.strip().splitlines()[-1]}")
    return folder / f"{NAME}.tar.gz"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A folder whose `tests` is that of the source distribution."""
    if not FOLDER.exists():
        scratch = tmp_path_factory.mktemp("sdist")
        with tarfile.open(pip_download(scratch)) as archive:
            inside = [each for each in archive.getmembers() if each.name.startswith(f"{NAME}/tests/")]
            archive.extractall(scratch, inside, filter="data")
        (scratch / NAME / "tests" / "__init__.py").touch()
        FOLDER.parent.mkdir(exist_ok=True)
        shutil.move(scratch / NAME, FOLDER)
    return FOLDER


def explained():
    """The tests that the table of skips names, in its second column."""
    table = (ROOT / "docs" / "transformers.md").read_text().split("## Skipped")[1].split("\n## ")[0]
    rows = re.findall(r"^\|.*\|$", table, re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`(test_\w+)`", row.split("|")[2])}


def named(test, names):
    """The name in the table of a test, whose parameters follow its name."""
    found = [name for name in names if test == name or re.fullmatch(rf"{name}_\d+\w*", test)]
    return found[0] if found else test


def test_common_tests_pass_or_are_explained(sources, tmp_path):
    shutil.copy(Path(__file__).with_name("transformers_model.py"), sources / "tests" / "test_fit.py")
    (sources / "pytest.ini").write_text(INI)
    report = tmp_path / "report.xml"
    path = os.pathsep.join(filter(None, (str(sources), str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    # Offline, and on the CPU, so that the same tests are skipped on every machine.
    env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    pytest_ = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "pytest.ini", "tests/test_fit.py"]
    done = subprocess.run([*pytest_, f"--junitxml={report}"], cwd=sources, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:]
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    skipped = {case.get("name") for case in cases if case.find("skipped") is not None}
    assert len(cases) - len(skipped) >= 60
    names = explained()
    assert {named(test, names) for test in skipped} == names
