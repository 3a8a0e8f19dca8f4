"""The benchmark of compression, on a small untrained run: its page has what was measured."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

from fitformer import FITDecoder
from fitformer.models.config import TrunkConfig
from helpers import untrained_run

pytestmark = pytest.mark.usefixtures("one_thread")
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "compress.py"
TINY = ["model.dim=16", "model.latent_dim=16", "model.heads=2", "model.latent_heads=2", "model.latents_per_group=2"]


def test_the_page_of_a_model_folder_is_of_what_the_comparison_holds_out(tmp_path, monkeypatch, capsys):
    script = loaded(monkeypatch)
    options = {"rotary": True, "position": "none", "latent_position": "shared"}
    decoder = FITDecoder(TrunkConfig("(1)1(1)", 16, 16, 2, 2, 2, **options), None, 8, 256)
    decoder.save_pretrained(tmp_path / "FIT")
    monkeypatch.setattr(script, "read", lambda share: (None, torch.arange(500).remainder(251).to(torch.uint8)))
    monkeypatch.setattr(sys, "argv", ["compress.py", str(tmp_path / "FIT"), "--bytes", "400", "--window", "4"])
    script.main()
    page = capsys.readouterr().out
    assert "FIT: " in page
    assert "400 held-out bytes" in page
    # Half of the window is context.
    assert "the model's likelihood, windows of 16 + 16 bytes" in page


def loaded(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("compress_script", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_the_page_of_a_small_run(tmp_path, monkeypatch, capsys):
    script = loaded(monkeypatch)
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
