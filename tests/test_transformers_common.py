"""transformers' own common tests pass over FITForCausalLM, but for those that docs/transformers.md explains."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from source_distribution import source_of_tests

pytest.importorskip("transformers")
pytest.importorskip("parameterized")

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
INI = "[pytest]\naddopts = --import-mode=importlib\nfilterwarnings = ignore::pytest.PytestUnknownMarkWarning\n"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A folder whose `tests` is that of the source distribution."""
    return source_of_tests("transformers", tmp_path_factory.mktemp("sdist"))


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
