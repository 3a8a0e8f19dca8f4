"""The benchmark of compression, on a small untrained run: its page has what was measured."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from helpers import untrained_run

pytestmark = pytest.mark.usefixtures("one_thread")
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "compress.py"
TINY = ["model.dim=16", "model.latent_dim=16", "model.heads=2", "model.latent_heads=2", "model.latents_per_group=2"]


def test_the_page_of_a_small_run(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("compress_script", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    (tmp_path / "text").write_bytes(b"def main():\n    return 0\n" * 300)
    data = ["data.source=files", f"data.path={tmp_path / 'text'}", "data.length=32", "model.tokens_per_group=8"]
    run = untrained_run(tmp_path / "run", "python-bytes-demo", *TINY, *data)
    words = [run, "--bytes", "400", "--segments", "4", "--output", str(tmp_path / "page.md")]
    monkeypatch.setattr(sys, "argv", ["compress.py", *words])
    script.main()
    page = (tmp_path / "page.md").read_text()
    assert page in capsys.readouterr().out
    assert f"`python benchmarks/compress.py {run} --bytes 400 --segments 4`" in page
    rows = re.findall(r"^\| (.+) \| ([\d,]+) \| ([\d.]+) \| [+-][\d.]+% \|$", page, re.MULTILINE)
    assert [name.split(",")[0] for name, *_ in rows] == [
        "`fitformer compress`", "`gzip -9`", "`xz -9e`", "`zstd --ultra -22`", "the model's likelihood",
    ]  # fmt: skip
    for _, size, bits in rows:
        assert float(bits) == pytest.approx(8 * float(size.replace(",", "")) / 400, abs=0.02)
    # An untrained model says 8 bits; the file adds its header.
    assert float(rows[4][2]) == pytest.approx(8, abs=0.2)
    assert 0 <= float(re.search(r"coder's bits are ([\d.]+)%", page)[1]) < 2
