"""`evaluate --file`: bits of files of one's own by a run's model, beside gzip, xz and zstd of the same bytes."""

import gzip
import json
import lzma
import math

import numpy as np
import pytest
import torch
import zstandard
from PIL import Image
from scipy.io import wavfile

from fitformer import patching
from fitformer.cli import main
from fitformer.data.datasets.text import ByteBuffer, Piece, whole_file
from fitformer.data.wav import read_sound
from fitformer.errors import InputError
from fitformer.evaluation import compressors
from fitformer.evaluation.compressors import compressed_sizes
from fitformer.evaluation.files import evaluate_files
from fitformer.evaluation.likelihood import log_likelihood
from fitformer.training.run_dir import Run
from helpers import untrained_run

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = ["model.dim=16", "model.latent_dim=16", "model.heads=2", "model.latent_heads=2", "model.latents_per_group=2"]
TEXT = b"for each in range(10):\n    print(each)\n" * 12


SOUND = np.rint(9000 * np.sin(np.arange(300) / 7)).astype(np.int16)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text").write_bytes(TEXT)
    text = ["data.source=files", f"data.path={folder / 'text'}", "data.length=32", "model.tokens_per_group=8"]
    sides = ["data.image_size=8", "model.group_size=4", "model.patch_size=2"]
    recipes = {"bytes": ("python-bytes-demo", text), "pixels": ("digits-pixels", []), "one": ("digits-classify", sides)}
    recipes["classes"] = ("digits-pixels", ["objective.class_conditional=true"])
    wavfile.write(folder / "sound.wav", 8000, SOUND)
    sound = ["task: audio", "data: {source: wav, length: 32, sample_rate: 8000, path: PATH}"]
    (folder / "audio.yaml").write_text("\n".join(sound).replace("PATH", str(folder / "sound.wav")))
    recipes["audio"] = (str(folder / "audio.yaml"), ["model.tokens_per_group=8"])
    return {name: untrained_run(folder / name, recipe, *TINY, *more) for name, (recipe, more) in recipes.items()}


def use(capsys, *words, status=0):
    assert main([str(word) for word in words]) == status
    out, err = capsys.readouterr()
    return out if status == 0 else err.splitlines()[-1]


@pytest.mark.parametrize("content", [b"a", TEXT, np.random.default_rng(0).bytes(5000)])
def test_compressors_in_pieces_are_those_in_one(content, monkeypatch):
    monkeypatch.setattr(compressors, "PIECE", 100)
    found = dict(compressed_sizes(ByteBuffer([Piece("content", 0, len(content), content)])))
    assert found["gzip"] == len(gzip.compress(content, 9))
    assert found["xz"] == len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))
    assert found["zstd"] == len(zstandard.ZstdCompressor(level=22).compress(content))


def test_a_file_is_one_sequence(runs, tmp_path):
    (tmp_path / "file").write_bytes(TEXT)
    ((name, found),) = evaluate_files(Run.open(runs["bytes"]), [tmp_path / "file"], context=20, stride=5)
    assert name == str(tmp_path / "file")
    bits = -log_likelihood(Run.open(runs["bytes"]).model(), TEXT, context=20, stride=5) / math.log(2)
    assert found["bits_per_byte"] == pytest.approx(bits / len(TEXT))
    assert found["tokens"] == len(TEXT)
    assert found["gzip_bits_per_byte"] == 8 * len(gzip.compress(TEXT, 9)) / len(TEXT)
    assert list(found) == ["tokens", *(f"{each}bits_per_byte" for each in ("", "gzip_", "xz_", "zstd_"))]


def test_several_files_and_all_of_them_by_the_command_line(runs, capsys, tmp_path):
    contents = {"a": TEXT[:70], "b": TEXT[:100]}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    files = [tmp_path / name for name in contents]
    words = ["evaluate", runs["bytes"], "--file", *files]
    found = json.loads(use(capsys, *words, "--json", "--batch-size", 2))["files"]
    assert [row["file"] for row in found] == [*map(str, files), "all"]
    for name in ("bits_per_byte", "gzip_bits_per_byte"):
        total = sum(row[name] * row["tokens"] for row in found[:2])
        assert found[2][name] * 170 == pytest.approx(total)
    shown = use(capsys, *words, "--no-baselines")
    assert f"{found[0]['bits_per_byte']:.4f}" in shown
    assert "gzip" not in shown


def test_an_image_has_bits_per_dim(runs, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 17, (8, 8), dtype=np.uint8)
    Image.fromarray(np.rint(pixels * (255 / 16)).astype(np.uint8)).save(tmp_path / "image.png")
    run = Run.open(runs["pixels"])
    ((_, found),) = evaluate_files(run, [tmp_path / "image.png"], baselines=False)
    shifted = patching.shift_right(torch.from_numpy(pixels.astype(np.int64)).view(1, 8, 8))
    logits = run.model()(shifted).detach().double().log_softmax(-1)
    picked = logits.gather(-1, torch.from_numpy(pixels.astype(np.int64)).view(1, 8, 8, 1))
    assert found["bits_per_dim"] == pytest.approx(float(-picked.mean()) / math.log(2), rel=1e-5)
    assert found["tokens"] == 64


def test_a_sound_has_bits_per_sample(runs, tmp_path):
    wavfile.write(tmp_path / "file.wav", 8000, SOUND)
    run = Run.open(runs["audio"])
    ((_, found),) = evaluate_files(run, [tmp_path / "file.wav"])
    codes = read_sound(tmp_path / "file.wav", 8000).codes.tobytes()
    assert found["bits_per_sample"] == pytest.approx(-log_likelihood(run.model(), codes) / math.log(2) / 300)
    assert found["tokens"] == 300
    assert found["xz_bits_per_sample"] > 0


def test_bad_input(runs, capsys, tmp_path):
    (tmp_path / "file").write_bytes(TEXT)
    (tmp_path / "empty").touch()
    file = ("--file", tmp_path / "file")
    assert "is a classify run" in use(capsys, "evaluate", runs["one"], *file, status=2)
    assert "is class-conditional" in use(capsys, "evaluate", runs["classes"], *file, status=2)
    assert "no whole WAV file" in use(capsys, "evaluate", runs["audio"], *file, status=2)
    assert "is empty" in use(capsys, "evaluate", runs["bytes"], "--file", tmp_path / "empty", status=2)
    assert "is not there" in use(capsys, "evaluate", runs["bytes"], "--file", tmp_path / "no", status=2)
    assert "is a folder" in use(capsys, "evaluate", runs["bytes"], "--file", tmp_path, status=2)
    assert "cannot be read as an image" in use(capsys, "evaluate", runs["pixels"], *file, status=2)
    assert "decoder's 32" in use(capsys, "evaluate", runs["bytes"], *file, "--context", 33, status=2)
    assert "give --file" in use(capsys, "evaluate", runs["bytes"], "--stride", 5, status=2)
    assert "leave one of them out" in use(capsys, "evaluate", runs["bytes"], *file, "--count", 5, status=2)


def test_a_file_that_shrinks_is_one_error(runs, tmp_path, monkeypatch):
    monkeypatch.setattr("fitformer.data.datasets.text._LARGE_FROM", 1)
    (tmp_path / "file").write_bytes(TEXT)
    with pytest.raises(InputError, match=f"had {len(TEXT)} bytes when it was listed and has 40 now"):
        for _ in evaluate_files(
            Run.open(runs["bytes"]),
            [tmp_path / "file"],
            baselines=False,
            on_tokens=lambda done, total: (tmp_path / "file").write_bytes(TEXT[:40]),
        ):
            pass


def test_whole_file_is_a_regular_one(tmp_path):
    with pytest.raises(InputError, match="no regular file"):
        whole_file("/dev/zero")
    (tmp_path / "file").write_bytes(b"abc")
    assert whole_file(tmp_path / "file").window(0, 9).tobytes() == b"abc"
