"""Files come back bit for bit, whatever they hold; damaged and foreign files are refused, and those from elsewhere."""

import dataclasses
import math
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fitformer import FITDecoder
from fitformer.cli import main
from fitformer.data.datasets.text import ByteBuffer
from fitformer.errors import InputError
from fitformer.evaluation.likelihood import log_likelihood
from fitformer.generation import Uncached
from fitformer.inference.compression import codec, compress, container, decompress, numerics, segments
from fitformer.inference.compression.prediction import Predictor
from helpers import untrained_run

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {"latents_per_group": 2, "dim": 8, "latent_dim": 8, "heads": 2, "latent_heads": 2}
TEXT = b"def main(arguments):\n    return [each for each in arguments if each]\n"


def decoder(groups, n, layers="(1)1(1)", **options):
    torch.manual_seed(0)
    sizes = {**SIZES, "latent_position": "index" if groups is None else "learned", **options}
    made = FITDecoder.from_config(layers=layers, num_groups=groups, tokens_per_group=n, vocab_size=256, **sizes).eval()
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return made


MODELS = {
    "fixed": decoder(3, 4),
    "one group": decoder(1, 5),
    "any length": decoder(None, 4, "(1)1(1)2(1)"),
    "rotary, in a band": decoder(None, 3, rotary=True, position="none", latent_position="shared", global_window=2),
    "wide reads": decoder(2, 6, "(0)1(2)", xattn_with_mlp=True, qk_norm=True, dim=12, latent_heads=4),
}


@pytest.fixture
def there(tmp_path):
    """Compress bytes to a file and bring them back."""

    class There:
        def __init__(self):
            self.count = 0

        def compressed(self, model, content, **options):
            self.count += 1
            source, self.path = tmp_path / f"{self.count}", tmp_path / f"{self.count}.fit"
            source.write_bytes(content)
            self.report = compress(model, source, self.path, **options)
            return self.path

        def back(self, model, path):
            target = path.with_suffix(".back")
            assert decompress(model, path, target) == target.stat().st_size
            return target.read_bytes()

    return There()


# ---- round trips ----


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.one_of(st.binary(max_size=30), st.text(max_size=30).map(str.encode), st.just(TEXT)),
    rows=st.one_of(st.none(), st.integers(1, 9)),
    window=st.one_of(st.none(), st.integers(1, 4)),
)
def test_any_bytes_come_back(there, name, content, rows, window):
    path = there.compressed(MODELS[name], content, segments=rows, window=window)
    assert there.back(MODELS[name], path) == content


@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 5, 8, 11, 12, 13, 24, 25])
def test_lengths_around_the_ends_of_groups_and_of_the_table(there, length):
    content = bytes(np.random.default_rng(length).integers(0, 256, length, dtype=np.uint8))
    for rows in (1, 2):
        path = there.compressed(MODELS["fixed"], content, segments=rows)
        assert there.back(MODELS["fixed"], path) == content


def test_blocks_of_columns_are_seams_that_do_not_show(there, monkeypatch):
    content = TEXT * 3
    found = set()
    for block in (1, 3, 7, 4096):
        monkeypatch.setattr(segments, "BLOCK", block)
        path = there.compressed(MODELS["any length"], content, segments=5)
        assert there.back(MODELS["any length"], path) == content
        found.add(path.read_bytes())
    assert len(found) == 1


@settings(max_examples=60)
@given(length=st.integers(0, 300), rows=st.integers(1, 40))
def test_segments_cover_a_sequence_once(length, rows):
    cut = segments.Segments(length, rows)
    stops = [cut.stop(row) for row in range(rows)]
    assert [0, *stops[:-1]] == cut.starts
    assert stops[-1] == length
    lengths = [stop - start for start, stop in zip(cut.starts, stops, strict=True)]
    assert max(lengths) - min(lengths) <= 1
    assert max(lengths) == cut.steps
    assert [cut.live(step) for step in range(cut.steps)] == [
        sum(n > step for n in lengths) for step in range(cut.steps)
    ]


def test_more_segments_for_longer_files():
    found = [segments.default_segments(length) for length in (0, 1, 16384, 32768, 10**6, 10**9)]
    assert found == [1, 1, 1, 2, 61, 64]


# ---- the likelihood is real ----


@pytest.mark.parametrize("name", ["any length", "fixed"])
def test_the_coder_takes_the_bits_of_the_likelihood(there, name):
    model = MODELS[name]
    window = model.tokens_per_group * 3
    content = (TEXT * 40)[: window if name == "fixed" else 900]
    there.compressed(model, content, segments=1)
    bits = -log_likelihood(model, content) / math.log(2)
    assert there.report.model_bits == pytest.approx(bits, rel=1e-5)
    # Words of 32 bits: at most two of them are not full.
    assert 0 <= 8 * there.report.coded - bits <= 0.001 * bits + 64


def test_a_model_that_knows_the_text_needs_little(there):
    model = decoder(None, 4)
    with torch.no_grad():
        for weight in (*model.parameters(),):
            weight.zero_()
        model.output_bias[ord("a")] = 12.0
    there.compressed(model, b"a" * 1600, segments=8)
    assert there.report.coded < 40
    assert there.report.compressed == there.path.stat().st_size


def test_probabilities_are_those_of_the_decoder_on_the_context_alone():
    for name, window in [("fixed", None), ("fixed", 2), ("any length", None), ("any length", 2)]:
        model = MODELS[name]
        tokens = torch.randint(0, 256, (2, 30), generator=torch.Generator().manual_seed(1))
        predictor, plain = Predictor(model, 2, 30, window), Uncached(model, window)
        for place in range(30):
            before = tokens[:, place - 1] if place else torch.zeros(2, dtype=torch.int64)
            wanted = plain(tokens[:, :place], [0, 0]).softmax(-1).detach().numpy()
            np.testing.assert_allclose(predictor.next(before), wanted, atol=1e-6)


# ---- what is refused ----


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A compressed file of the model `fixed`."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "file").write_bytes(TEXT)
    compress(MODELS["fixed"], folder / "file", folder / "file.fit", segments=2)
    return (folder / "file.fit").read_bytes()


def refused(tmp_path, content, match, model=None):
    """One line that matches, and nothing left behind."""
    (tmp_path / "bad").write_bytes(content)
    with pytest.raises(InputError, match=match) as error:
        decompress(model or MODELS["fixed"], tmp_path / "bad", tmp_path / "out")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_every_changed_byte_is_found(whole, tmp_path):
    for place in range(0, len(whole), 7):
        changed = bytearray(whole)
        changed[place] ^= 0x10
        refused(tmp_path, bytes(changed), "damaged|no file that `fitformer compress` wrote")


def test_every_cut_is_found(whole, tmp_path):
    for length in (1, 7, 8, 13, 40, len(whole) - 17, len(whole) - 4, len(whole) - 1):
        refused(tmp_path, whole[:length], "damaged or cut off")
    refused(tmp_path, whole + b"\0", "damaged or cut off")


@pytest.mark.parametrize("content", [b"", b"some text", b"PK\x03\x04" * 20, bytes(100)])
def test_foreign_files(content, tmp_path):
    refused(tmp_path, content, "no file that `fitformer compress` wrote")


def forged(whole, tmp_path, words=None, version=1, packed=None, **changes):
    """The file with another header or other words, and a right checksum."""
    (tmp_path / "whole").write_bytes(whole)
    header, found = container.read(tmp_path / "whole")
    with open(tmp_path / "forged", "wb") as file:
        container.write(file, dataclasses.replace(header, **changes), found if words is None else words)
    content = (tmp_path / "forged").read_bytes()
    (tmp_path / "forged").unlink()
    (tmp_path / "whole").unlink()
    if packed is not None:
        content = struct.pack("<8sBI", container.MAGIC, version, len(packed)) + packed + bytes(16)
    body = content[:8] + bytes([version]) + content[9:-16]
    return body + container.checksum(body)


def test_other_versions_and_headers_without_a_meaning(whole, tmp_path):
    refused(tmp_path, forged(whole, tmp_path, version=2), "version 2 .* reads version 1")
    for changes in ({"length": -1}, {"segments": 0}, {"segments": 10**9}, {"threads": 10**9}, {"window": 0}):
        refused(tmp_path, forged(whole, tmp_path, **changes), "header that means nothing")
    refused(tmp_path, forged(whole, tmp_path, packed=b"no deflated JSON"), "header that means nothing")


def test_another_model_is_refused(whole, tmp_path):
    refused(tmp_path, whole, "other weights or options", decoder(3, 4, heads=1))
    model = decoder(3, 4)
    model.output_bias.data[3] += 1e-6
    refused(tmp_path, whole, "other weights or options", model)


@pytest.mark.parametrize("name", list(numerics.environment(torch.device("cpu"))))
def test_another_machine_or_build_is_refused(whole, tmp_path, name):
    environment = {**numerics.environment(torch.device("cpu")), name: "another"}
    refused(tmp_path, forged(whole, tmp_path, environment=environment), f"elsewhere \\({name} another there, .* here")


def test_other_numbers_are_refused_at_the_first_group(whole, tmp_path, monkeypatch):
    steps = []
    following = Predictor.next
    monkeypatch.setattr(Predictor, "next", lambda self, column: steps.append(1) or following(self, column) * 1.0000001)
    refused(tmp_path, whole, "first probabilities differ")
    assert len(steps) == MODELS["fixed"].tokens_per_group + 1


def test_other_numbers_later_are_refused_at_the_end(whole, tmp_path, monkeypatch):
    following = Predictor.next

    def drifting(self, column):
        found = following(self, column)
        return np.roll(found, 1, axis=1) if self.position > 20 else found

    monkeypatch.setattr(Predictor, "next", drifting)
    refused(tmp_path, whole, "cannot be decompressed here")


def test_words_that_mean_nothing_are_refused(whole, tmp_path):
    for words in (np.zeros(0, np.uint32), np.full(3, 2**32 - 1, np.uint32), np.arange(90, dtype=np.uint32)):
        refused(tmp_path, forged(whole, tmp_path, words=words), "cannot be decompressed here")


def test_the_number_of_threads_is_that_of_the_compression(there, tmp_path):
    threads = []
    torch.set_num_threads(2)
    try:
        path = there.compressed(MODELS["fixed"], TEXT[:9], segments=3)
        torch.set_num_threads(1)
        note = lambda done, total: threads.append(torch.get_num_threads())  # noqa: E731
        decompress(MODELS["fixed"], path, tmp_path / "back", on_step=note)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(1)
    assert (tmp_path / "back").read_bytes() == TEXT[:9]
    assert threads == [2] * 3


def test_places_that_are_taken_or_not_there(there, tmp_path):
    path = there.compressed(MODELS["fixed"], TEXT)
    with pytest.raises(InputError, match=r"1\.fit is there already"):
        compress(MODELS["fixed"], tmp_path / "1", path)
    with pytest.raises(InputError, match="1 is there already"):
        decompress(MODELS["fixed"], path, tmp_path / "1")
    assert (tmp_path / "1").read_bytes() == TEXT
    for call in (compress, decompress):
        with pytest.raises(InputError, match="nowhere is not there"):
            call(MODELS["fixed"], tmp_path / "nowhere", tmp_path / "out")
        with pytest.raises(InputError, match="is a folder"):
            call(MODELS["fixed"], tmp_path, tmp_path / "out")
        with pytest.raises(InputError, match="no regular file"):
            call(MODELS["fixed"], "/dev/zero", tmp_path / "out")


def test_a_file_that_becomes_shorter_is_one_error(there, tmp_path, monkeypatch):
    monkeypatch.setattr("fitformer.data.datasets.text._LARGE_FROM", 1)
    monkeypatch.setattr(segments, "BLOCK", 8)
    (tmp_path / "file").write_bytes(TEXT)

    def cut(done, total):
        (tmp_path / "file").write_bytes(TEXT[:20])

    with pytest.raises(InputError, match=f"had {len(TEXT)} bytes when it was listed and has 20"):
        compress(MODELS["fixed"], tmp_path / "file", tmp_path / "out", on_step=cut)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_bad_numbers_and_decoders(tmp_path):
    (tmp_path / "file").write_bytes(TEXT)
    arguments = tmp_path / "file", tmp_path / "out"
    for options in ({"segments": 0}, {"segments": 2**20}, {"window": 0}, {"segments": 1.5}):
        with pytest.raises(InputError, match=next(iter(options))):
            compress(MODELS["fixed"], *arguments, **options)
    made = {"layers": "(1)1(1)", "num_groups": 2, "tokens_per_group": 4, **SIZES}
    for vocabulary in (17, 257):
        other = FITDecoder.from_config(**made, vocab_size=vocabulary).eval()
        with pytest.raises(InputError, match=f"vocabulary of {vocabulary}"):
            compress(other, *arguments)
    with pytest.raises(InputError, match="class-conditional"):
        compress(FITDecoder.from_config(**made, vocab_size=256, num_classes=3).eval(), *arguments)
    broken = decoder(3, 4)
    broken.output_bias.data.fill_(math.nan)
    with pytest.raises(InputError, match="not finite"):
        compress(broken, *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_files_are_read_in_pieces(monkeypatch):
    content = ByteBuffer([codec.whole_file(__file__).pieces[0]])
    sizes = []
    monkeypatch.setattr(ByteBuffer, "window", counting(ByteBuffer.window, sizes))
    reader = segments.Reader(content, segments.Segments(len(content), 3))
    monkeypatch.setattr(segments, "BLOCK", 100)
    columns = list(reader.columns())
    assert sum(map(len, columns)) == len(content)
    assert max(sizes) == 100


def counting(window, sizes):
    def call(self, start, stop):
        sizes.append(stop - start)
        return window(self, start, stop)

    return call


# ---- the command line ----


TINY = ["model.dim=16", "model.latent_dim=16", "model.heads=2", "model.latent_heads=2", "model.latents_per_group=2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text").write_bytes(TEXT * 20)
    text = ["data.source=files", f"data.path={folder / 'text'}", "data.length=32", "model.tokens_per_group=8"]
    recipes = {"bytes": ("python-bytes-demo", text), "pixels": ("digits-pixels", [])}
    colour = ["data.image_size=[4,6]", "data.channels=3", "data.levels=null", "model.patch_size=[2,3]"]
    recipes["colour"] = ("digits-pixels", [*colour, "objective.order=snake"])
    sides = ["data.image_size=8", "model.group_size=4", "model.patch_size=2"]
    recipes["one"] = ("digits-classify", sides)
    return {name: untrained_run(folder / name, recipe, *TINY, *more) for name, (recipe, more) in recipes.items()}


def use(capsys, *words, status=0):
    assert main([str(word) for word in words]) == status
    out, err = capsys.readouterr()
    return out if status == 0 else err.splitlines()[-1]


def test_a_file_goes_and_comes_back_by_the_command_line(runs, capsys, tmp_path):
    file = tmp_path / "notes.txt"
    file.write_bytes(TEXT * 3)
    out = use(capsys, "compress", runs["bytes"], file, "--segments", 4)
    assert "notes.txt.fit" in out
    assert f"{len(TEXT) * 3:,}" in out
    shutil.move(file, tmp_path / "original")
    assert str(file) in use(capsys, "decompress", runs["bytes"], f"{file}.fit")
    assert file.read_bytes() == TEXT * 3
    use(capsys, "decompress", runs["bytes"], f"{file}.fit", "-o", tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == TEXT * 3


def grey(rows, columns, levels=17):
    values = np.random.default_rng(0).integers(0, levels, (rows, columns))
    return np.rint(values * (255 / (levels - 1))).astype(np.uint8)


@pytest.mark.parametrize(
    ("name", "pixels"),
    [("pixels", grey(8, 8)), ("colour", np.random.default_rng(1).integers(0, 256, (4, 6, 3), dtype=np.uint8))],
)
def test_an_image_comes_back_by_a_run_of_pixels(runs, capsys, tmp_path, name, pixels):
    Image.fromarray(pixels).save(tmp_path / "image.bmp")
    assert "bits per dim" in use(capsys, "compress", runs[name], tmp_path / "image.bmp", "-o", tmp_path / "packed")
    use(capsys, "decompress", runs[name], tmp_path / "packed", "-o", tmp_path / "back.png")
    with Image.open(tmp_path / "back.png") as back:
        assert back.format == "PNG"
        np.testing.assert_array_equal(np.asarray(back), pixels)


def test_an_image_that_would_change_is_refused(runs, capsys, tmp_path):
    odd = grey(8, 8)
    odd[3, 4] ^= 1
    cases = {"size": (grey(8, 9), "8 x 9 x 1"), "colour": (np.stack([grey(8, 8)] * 3, -1), "8 x 8 x 3")}
    cases["levels"] = (odd, "17 levels")
    for name, (pixels, match) in cases.items():
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
        said = use(capsys, "compress", runs["pixels"], tmp_path / f"{name}.png", status=2)
        assert match in said
        assert "would change" in said
    (tmp_path / "text").write_bytes(TEXT)
    assert "cannot be read as an image" in use(capsys, "compress", runs["pixels"], tmp_path / "text", status=2)


@pytest.mark.slow
def test_another_process_gets_the_same_bits(runs, tmp_path):
    file = tmp_path / "file"
    file.write_bytes(TEXT * 10)
    code = "import sys; from fitformer.cli import main; sys.exit(main(sys.argv[1:]))"
    for verb, target in (("compress", file), ("decompress", f"{file}.fit")):
        for run in range(2):
            words = [verb, runs["bytes"], str(target), "-o", f"{tmp_path / verb}-{run}"]
            subprocess.run([sys.executable, "-c", code, *words], check=True)
        if verb == "compress":
            shutil.copy(tmp_path / "compress-0", f"{file}.fit")
        assert (tmp_path / f"{verb}-0").read_bytes() == (tmp_path / f"{verb}-1").read_bytes()
    assert (tmp_path / "decompress-0").read_bytes() == TEXT * 10


def test_the_command_line_refuses_in_one_line(runs, capsys, tmp_path):
    (tmp_path / "file").write_bytes(TEXT)
    assert "run of the task classify" in use(capsys, "compress", runs["one"], tmp_path / "file", status=2)
    assert "say with --output" in use(capsys, "decompress", runs["bytes"], tmp_path / "file", status=2)
    words = ["decompress", runs["bytes"], tmp_path / "file", "-o", tmp_path / "out"]
    assert "no file that `fitformer compress` wrote" in use(capsys, *words, status=2)
    assert "is not there" in use(capsys, "compress", runs["bytes"], tmp_path / "nowhere", status=2)
    assert "no run directory" in use(capsys, "compress", tmp_path / "nowhere", tmp_path / "file", status=2)
